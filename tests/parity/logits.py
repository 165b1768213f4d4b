"""Logits of `score` against transformers in fp32, row by row without padding: at most 1e-5 x max(1, largest logit)."""
import lzma
import pathlib
import tempfile

import torch
from transformers import AutoModelForCausalLM

import common


def texts():
    """Short sentences, and paragraphs longer than MiniLM's 512 positions."""
    sentences = [text for text, _ in common.sst2("dev")[:100]]
    with lzma.open(common.DATA / "data" / "wikitext2" / "valid.txt.xz", "rt", encoding="utf-8") as handle:
        lines = [line.strip() for line in handle]
    paragraphs = sorted((line for line in lines if line), key=len)[-8:]
    return sentences + paragraphs + ["a", "naïve  façade, 日本語!"]


def compare(what, model, tokenizer, rows, folder, arguments):
    common.write_rows(folder / "rows.jsonl", [{"text": text} for text in rows])
    scored, logits = common.score(folder / "model", folder / "rows.jsonl", folder, *arguments)
    wrong_ids, worst, largest = 0, 0.0, 1.0
    with torch.no_grad():
        for row, text in zip(scored, rows, strict=True):
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
            wrong_ids += ids["input_ids"][0].tolist() != row["input_ids"]
            theirs = model(**ids).logits[0]
            worst = max(worst, (theirs - logits[row["index"]]).abs().max().item())
            largest = max(largest, theirs.abs().max().item())
    common.report(f"{what}: rows with other token ids, of {len(rows)}", wrong_ids, 0)
    common.report(f"{what}: largest difference of a logit", worst, 1e-5 * largest)


def minilm(what, weight, rows):
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        common.save_classifier(folder / "model", weight)
        compare(what, common.classifier(folder / "model").eval(), common.tokenizer(folder / "model"), rows, folder,
                ["--task", "text-classification"])


def llama(rows):
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        (folder / "model").symlink_to(common.STORIES.resolve())
        model = AutoModelForCausalLM.from_pretrained(common.STORIES, dtype=torch.float32).eval()
        compare("llama-stories260K", model, common.tokenizer(common.STORIES), rows, folder, ["--task", "causal-lm"])


def gpt2():
    rows, worst, largest = common.gpt2_rows(), 0.0, 1.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        common.write_rows(folder / "rows.jsonl", [{"input_ids": ids} for ids in rows])
        scored, logits = common.score(common.GPT2, folder / "rows.jsonl", folder, *common.GPT2_ARGUMENTS)
        model = AutoModelForCausalLM.from_pretrained(common.GPT2, dtype=torch.float32).eval()
        with torch.no_grad():
            for row, ids in zip(scored, rows, strict=True):
                theirs = model(torch.tensor([ids])).logits[0]
                worst = max(worst, (theirs - logits[row["index"]]).abs().max().item())
                largest = max(largest, theirs.abs().max().item())
    common.report("gpt2-capp: largest difference of a logit", worst, 1e-5 * largest)


def main():
    rows = texts()
    # The identity as head makes the base model's pooled output itself the logits.
    minilm("MiniLM, base (pooled output)", torch.eye(384), rows)
    minilm("MiniLM, classifier of 2", torch.randn(2, 384, generator=torch.Generator().manual_seed(1)), rows)
    llama([row for row in rows if len(row) < 1000])
    gpt2()
    common.finish()


if __name__ == "__main__":
    main()
