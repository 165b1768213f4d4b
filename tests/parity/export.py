"""The exported model of a training run loads with AutoModelForSequenceClassification and AutoTokenizer, nothing missing and
nothing left over, and gives the same logits as `score`. So does what `checkpoint export` makes of its checkpoint, in bf16 and
several files: every weight is the run's, rounded."""
import pathlib
import tempfile

import torch
from transformers import AutoModelForSequenceClassification, TrainerState

import common


def check_export_of_checkpoint(folder, model):
    directory = folder / "exported"
    common.shardtune("checkpoint", "export", folder / "run" / "checkpoint-5", directory, "--dtype", "bf16", "--max_shard_size",
                     "20MB")
    parts = list(directory.glob("model-*-of-*.safetensors"))
    common.report("checkpoint export: numbered parts", len(parts), 2, more_is_better=True)
    common.report("checkpoint export: bytes of the largest part", max(part.stat().st_size for part in parts), 24e6)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True, dtype="auto")
    common.report("checkpoint export: tensors that are missing, left over or of another shape",
                  sum(len(names) for names in info.values()), 0)
    theirs, ours = loaded.state_dict(), model.state_dict()
    wrong = sum(name not in theirs or theirs[name].dtype != torch.bfloat16 or not torch.equal(theirs[name], value.bfloat16())
                for name, value in ours.items() if value.is_floating_point())
    common.report(f"checkpoint export: tensors that are not the run's rounded to bf16, of {len(ours)}", wrong, 0)
    common.report("checkpoint export: texts with other token ids",
                  sum(common.tokenizer(directory)(text)["input_ids"] != common.tokenizer(folder / "run" / "model")(text)["input_ids"]
                      for text in ("A fine film.", "Unlikeable, but (somehow) it works")), 0)


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        common.shardtune("train", "--model_name_or_path", common.MINILM, "--task", "text-classification", "--train_file",
                         common.SST2 / "train.tsv", *common.SST2_ARGUMENTS, "--output_dir", folder / "run", "--bf16", "true",
                         "--sharding", "zero3", "--max_steps", "5", "--save_steps", "5", "--logging_steps", "2", ranks=2)
        state = TrainerState.load_from_json(folder / "run" / "checkpoint-5" / "trainer_state.json")
        wrong = (state.global_step, state.max_steps, state.logging_steps, len(state.log_history)) != (5, 5, 2, 2)
        common.report("trainer_state.json: wrong in transformers' TrainerState", int(wrong), 0)
        directory = folder / "run" / "model"
        model, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
        leftovers = sum(len(names) for names in info.values())
        common.report("tensors that from_pretrained misses, does not expect or finds in another shape", leftovers, 0)
        check_export_of_checkpoint(folder, model)
        common.report("label names that differ", int(list(model.config.id2label.values()) != ["0", "1"]), 0)
        tokenizer = common.tokenizer(directory)
        texts = [text for text, _ in common.sst2("dev")]
        common.write_rows(folder / "rows.jsonl", [{"text": text} for text in texts])
        scored, logits = common.score(directory, folder / "rows.jsonl", folder, "--task", "text-classification")
        wrong_ids, worst, largest = 0, 0.0, 1.0
        with torch.no_grad():
            for row, text in zip(scored, texts, strict=True):
                ids = tokenizer(text, return_tensors="pt")
                wrong_ids += ids["input_ids"][0].tolist() != row["input_ids"]
                theirs = model.eval()(**ids).logits[0]
                worst = max(worst, (theirs - logits[row["index"]]).abs().max().item())
                largest = max(largest, theirs.abs().max().item())
        common.report(f"exported model: rows with other token ids, of {len(texts)}", wrong_ids, 0)
        common.report("exported model: largest difference of a logit", worst, 1e-5 * largest)
    common.finish()


if __name__ == "__main__":
    main()
