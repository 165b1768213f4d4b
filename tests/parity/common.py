"""What the comparisons share: where things lie, starting the program, the Hugging Face side, and the report.

scripts/parity sets the environment that is read here.
"""
import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

BINARY = os.environ["SHARDTUNE_BINARY"]
DATA = pathlib.Path(os.environ["SHARDTUNE_TEST_DATA"])
MINILM = pathlib.Path(os.environ["SHARDTUNE_MINILM"])
STORIES = DATA / "models" / "llama-stories260K"
GPT2 = DATA / "models" / "gpt2-capp"  # has no tokenizer file: its rows are token ids, whichever tokenizer stands by
GPT2_ARGUMENTS = ["--task", "causal-lm", "--tokenizer_name", STORIES]
SST2 = DATA / "data" / "sst2"
SST2_ARGUMENTS = ["--column_names", "sentence,label", "--text_column", "sentence", "--label_column", "label"]
NO_DROPOUT = ["--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0", "--classifier_dropout", "0"]

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
_missed = False


def report(what, figure, bar, more_is_better=False):
    """One line per comparison; finish() turns a miss into exit code 1."""
    global _missed
    good = figure >= bar if more_is_better else figure <= bar  # false for NaN
    _missed |= not good
    print(f"{'ok  ' if good else 'MISS'} {what}: {figure:.4g} (bar: {'>=' if more_is_better else '<='} {bar:.4g})", flush=True)


def finish():
    sys.exit(1 if _missed else 0)


def shardtune(*arguments, ranks=0):
    """Runs the program, under mpirun when ranks > 0; its messages are shown only when it fails. Returns its stdout."""
    command = ["mpirun", "-n", str(ranks)] if ranks else []
    command += [BINARY, *map(str, arguments)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"exit code {result.returncode} of: {' '.join(command)}\n{result.stderr[-4000:]}")
    return result.stdout


def gpt2_rows():
    """Token ids of every length from 2 to the model's 512 positions, in steps that grow."""
    generator = torch.Generator().manual_seed(3)
    lengths = [2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 512]
    return [torch.randint(0, 53, (n,), generator=generator).tolist() for n in lengths]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def read_rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def sst2(name):
    """[(sentence, label)] of train, dev or test."""
    with open(SST2 / f"{name}.tsv", encoding="utf-8", newline="") as handle:
        return [(text, int(label)) for text, label in csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)]


def sine_head(num_labels, width):
    """The head of the stored reference trace: 0.02 sin(1 + flat index), computed in double."""
    flat = torch.arange(num_labels * width, dtype=torch.float64)
    return (0.02 * torch.sin(1 + flat)).float().view(num_labels, width)


def save_classifier(directory, weight):
    """MiniLM with this classification head [labels, width] and bias 0, as a Hugging Face model directory."""
    config = AutoConfig.from_pretrained(MINILM, num_labels=weight.shape[0])
    model = AutoModelForSequenceClassification.from_pretrained(MINILM, config=config, dtype=torch.float32)
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.zero_()
    model.save_pretrained(directory)
    for file in MINILM.iterdir():
        if file.name.startswith(("tokenizer", "vocab", "special_tokens")):
            shutil.copy(file, directory)
    return directory


def classifier(directory, dropout=False):
    """The model in fp32, by default without dropout."""
    if dropout:
        return AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    return AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)


def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def score(model, rows_file, folder, *arguments):
    """Runs `score`; returns its rows and all logits by row index."""
    shardtune("score", "--model_name_or_path", model, "--input", rows_file, "--output", folder / "score.jsonl",
              "--full_logits", folder / "logits.safetensors", *arguments)
    logits = load_file(folder / "logits.safetensors")
    return read_rows(folder / "score.jsonl"), {int(name.split(".")[1]): value for name, value in logits.items()}


def step_losses(output_dir):
    return [row["loss"] for row in read_rows(pathlib.Path(output_dir) / "metrics.jsonl") if "loss" in row]
