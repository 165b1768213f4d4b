"""One epoch of MiniLM on SST-2, batch 32, 5e-5, linear schedule, beside the HF Trainer.
Paired (same head, same order, dropout 0, fp32): at least 99.5 % equal predictions on the dev set. Unpaired (five seeds,
fp32 and bf16, dropout on): mean accuracies within two standard errors of their difference; all values are printed.
Takes over an hour. Each finished run leaves its predictions in the cache directory under the hash of the program, so that
the comparison can be interrupted. SHARDTUNE_PARITY_WRAPPER is put before the command of each run ("flock FILE").
"""
import hashlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import torch
from transformers import Trainer, TrainingArguments, set_seed

import common

SEEDS = (1, 2, 3, 4, 5)
CACHE = pathlib.Path(os.environ["SHARDTUNE_PARITY_CACHE"]) / "quality"


class Rows(torch.utils.data.Dataset):
    def __init__(self, name, tokenizer):
        self.rows = common.sst2(name)
        self.encoded = tokenizer([text for text, _ in self.rows], truncation=True, max_length=128)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.encoded["input_ids"][index], "label": self.rows[index][1]}


def run_theirs(model_dir, seed, is_bf16, is_paired, output_dir):
    set_seed(seed)  # before the model: the new head's values come from it
    model = common.classifier(model_dir, dropout=not is_paired)
    tokenizer = common.tokenizer(model_dir)
    arguments = TrainingArguments(output_dir=output_dir, seed=seed, bf16=is_bf16, use_cpu=True, num_train_epochs=1,
                                  per_device_train_batch_size=32, per_device_eval_batch_size=32, learning_rate=5e-5,
                                  save_strategy="no", logging_steps=50, report_to="none", disable_tqdm=True,
                                  train_sampling_strategy="sequential" if is_paired else "random")
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows("train", tokenizer), processing_class=tokenizer)
    trainer.train()
    return trainer.predict(Rows("dev", tokenizer)).predictions.argmax(-1).tolist()


def run_ours(model_dir, seed, is_bf16, is_paired, output_dir):
    arguments = [*common.NO_DROPOUT, "--train_sampling_strategy", "sequential"] if is_paired else []
    common.shardtune("train", "--model_name_or_path", model_dir, "--task", "text-classification", "--train_file",
                     common.SST2 / "train.tsv", *common.SST2_ARGUMENTS, "--output_dir", output_dir, "--seed", seed,
                     "--bf16", str(is_bf16).lower(), "--num_train_epochs", "1", "--per_device_train_batch_size", "32",
                     "--learning_rate", "5e-5", "--max_seq_length", "128", "--save_strategy", "no", *arguments)
    rows = output_dir / "dev.jsonl"
    common.write_rows(rows, [{"text": text} for text, _ in common.sst2("dev")])
    common.shardtune("predict", "--model_name_or_path", output_dir / "model", "--input", rows, "--output",
                     output_dir / "predictions.jsonl")
    return [int(row["label"]) for row in common.read_rows(output_dir / "predictions.jsonl")]


def predictions(side, name, model_dir, seed=1, is_bf16=False, is_paired=False):
    """The run's predictions, out of the cache or by a process of its own (`quality.py SIDE ...`)."""
    version = hashlib.sha256((pathlib.Path(common.BINARY).parent / "libexec" / "shardtune").read_bytes()).hexdigest()[:12] if side == "ours" else "transformers"
    file = CACHE / f"{name}-{version}.json"
    if not file.exists():
        command = [sys.executable, __file__, side, str(model_dir), str(seed), str(int(is_bf16)), str(int(is_paired)), str(file)]
        subprocess.run(os.environ.get("SHARDTUNE_PARITY_WRAPPER", "").split() + command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())


def one_run(side, model_dir, seed, is_bf16, is_paired, file):
    with tempfile.TemporaryDirectory() as temporary:
        run = run_theirs if side == "theirs" else run_ours
        result = run(model_dir, int(seed), is_bf16 == "1", is_paired == "1", pathlib.Path(temporary))
    part = pathlib.Path(file + ".part")
    part.write_text(json.dumps(result))
    part.rename(file)


def accuracy(labels, predicted):
    return sum(a == b for a, b in zip(labels, predicted, strict=True)) / len(labels)


def paired(labels):
    model_dir = CACHE / "paired-model"
    if not model_dir.exists():
        part = CACHE / "paired-model.part"
        shutil.rmtree(part, ignore_errors=True)
        common.save_classifier(part, common.sine_head(2, 384)).rename(model_dir)
    theirs = predictions("theirs", "paired", model_dir, is_paired=True)
    ours = predictions("ours", "paired", model_dir, is_paired=True)
    print(f"     paired: accuracy {accuracy(labels, ours):.4f}, transformers {accuracy(labels, theirs):.4f}")
    common.report("paired epoch: share of equal predictions", accuracy(theirs, ours), 0.995, more_is_better=True)


def unpaired(labels, precision):
    means, errors = {}, {}
    for side in ("ours", "theirs"):
        values = [accuracy(labels, predictions(side, f"{precision}-{seed}", common.MINILM, seed, precision == "bf16"))
                  for seed in SEEDS]
        means[side], errors[side] = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
        print(f"     {precision}, {side}: {' '.join(f'{v:.4f}' for v in values)}; mean {means[side]:.4f}, standard error "
              f"{errors[side]:.4f}", flush=True)
    common.report(f"{precision}, five seeds: difference of the mean accuracies", abs(means["ours"] - means["theirs"]),
                  2 * (errors["ours"] ** 2 + errors["theirs"] ** 2) ** 0.5)


def main():
    if len(sys.argv) > 1:
        one_run(*sys.argv[1:])
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    labels = [label for _, label in common.sst2("dev")]
    paired(labels)
    for precision in ("fp32", "bf16"):
        unpaired(labels, precision)
    common.finish()


if __name__ == "__main__":
    main()
