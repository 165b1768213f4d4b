"""Every gradient of one batch from `score --save_gradients` against transformers in fp32: the norm of the difference is at
most 1e-4 of the gradient's norm, or 1e-6 of the global norm (key biases of BERT have a gradient of zero in theory)."""
import pathlib
import tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import common


def compare(what, model, gradients):
    theirs = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None for g in theirs.values())
    common.report(f"{what}: parameters without a counterpart, of {len(theirs)}", len(theirs.keys() ^ gradients.keys()), 0)
    global_norm = torch.stack([g.norm() for g in theirs.values()]).norm().item()
    worst, worst_name = 0.0, ""
    for name in theirs.keys() & gradients.keys():
        difference = (theirs[name].double() - gradients[name].double()).norm().item()
        share = difference / max(1e-4 * theirs[name].norm().item(), 1e-6 * global_norm)
        if not share <= worst:
            worst, worst_name = share, name
    common.report(f"{what}: worst gradient ({worst_name}), as a share of its bar", worst, 1.0)


def save_gradients(model, rows, folder, *arguments):
    common.write_rows(folder / "rows.jsonl", rows)
    common.shardtune("score", "--model_name_or_path", model, "--input", folder / "rows.jsonl", "--output",
                     folder / "score.jsonl", "--save_gradients", folder / "gradients.safetensors", *arguments)
    return load_file(folder / "gradients.safetensors")


def minilm(folder):
    rows = common.sst2("train")[:32]
    common.save_classifier(folder / "model", common.sine_head(2, 384))
    model = common.classifier(folder / "model")
    batch = common.tokenizer(folder / "model")([text for text, _ in rows], padding=True, return_tensors="pt")
    model(**batch, labels=torch.tensor([label for _, label in rows])).loss.backward()
    compare("MiniLM, 32 sentences", model,
            save_gradients(folder / "model", [{"text": text, "label": label} for text, label in rows], folder,
                           "--task", "text-classification", "--per_device_eval_batch_size", "32"))


def llama(folder):
    texts = [text for text, _ in common.sst2("train")[:32]]
    model = AutoModelForCausalLM.from_pretrained(common.STORIES, dtype=torch.float32)
    encoded = [common.tokenizer(common.STORIES)(text, return_tensors="pt")["input_ids"] for text in texts]
    count = sum(ids.shape[1] - 1 for ids in encoded)
    for ids in encoded:  # the mean over all tokens of the file, whatever their row
        (model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) / count).backward()
    compare("llama-stories260K, 32 sentences", model,
            save_gradients(common.STORIES, [{"text": text} for text in texts], folder, "--task", "causal-lm",
                           "--per_device_eval_batch_size", "32"))


def gpt2(folder):
    rows = common.gpt2_rows()
    # .eval(): no dropout, as `score` has none.
    model = AutoModelForCausalLM.from_pretrained(common.GPT2, dtype=torch.float32).eval()
    count = sum(len(ids) - 1 for ids in rows)
    for ids in rows:
        (model(torch.tensor([ids]), labels=torch.tensor([ids])).loss * (len(ids) - 1) / count).backward()
    compare("gpt2-capp, 13 rows", model,
            save_gradients(common.GPT2, [{"input_ids": ids} for ids in rows], folder, *common.GPT2_ARGUMENTS))


def main():
    with tempfile.TemporaryDirectory() as temporary:
        minilm(pathlib.Path(temporary))
        llama(pathlib.Path(temporary))
        gpt2(pathlib.Path(temporary))
    common.finish()


if __name__ == "__main__":
    main()
