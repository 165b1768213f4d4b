"""Time from starting to the end of the first optimizer step, beside the Hugging Face Trainer.
Run with: scripts/parity --python benchmarks/startup.py [REPEATS] [--json FILE]

MiniLM with a new head, SST-2, 32 sentences a step, fp32, one and two processes; repeats are interleaved and the ratio is that of
medians. Both sides print a line at the end of the step, and this script takes the time when it reads the line.
The Trainer's side gets the fastest set-up there is: the model from local files, sentences tokenized on demand, no CUDA
libraries to load.
"""
import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import common
import results

GOAL = 10  # times faster


def first_step(command, marker):
    """Seconds from start until a line with `marker` appears on standard error."""
    start = time.monotonic()
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    seconds, lines = None, []
    for line in process.stderr:
        lines.append(line)
        if marker in line and seconds is None:
            seconds = time.monotonic() - start
    if process.wait() != 0 or seconds is None:
        sys.exit(f"exit code {process.returncode} of: {' '.join(map(str, command))}\n{''.join(lines)[-3000:]}")
    return seconds


def ours(ranks, folder):
    return ["mpirun", "-n", ranks, common.BINARY, "train", "--model_name_or_path", common.MINILM, "--task", "text-classification",
            "--train_file", common.SST2 / "train.tsv", *common.SST2_ARGUMENTS, "--output_dir", folder / "out", "--max_steps", "1",
            "--per_device_train_batch_size", 32 // ranks, "--logging_steps", "1", "--save_strategy", "no"]


def theirs(ranks, folder):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks] if ranks > 1 else []
    return [sys.executable, *launcher, __file__, "--trainer", 32 // ranks, folder / "hf"]


def run_trainer(batch_size, output_dir):
    """What `theirs` starts: as small a Trainer script as does the job."""
    import torch
    from transformers import (AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments)

    class Announce(TrainerCallback):
        def on_step_end(self, *_, **__):
            print("first step done", file=sys.stderr, flush=True)

    class Rows(torch.utils.data.Dataset):
        def __init__(self, tokenizer):
            self.rows, self.tokenizer = common.sst2("train"), tokenizer

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            text, label = self.rows[index]
            return {**self.tokenizer(text, truncation=True), "label": label}

    tokenizer = AutoTokenizer.from_pretrained(common.MINILM)
    arguments = TrainingArguments(output_dir=output_dir, per_device_train_batch_size=batch_size, max_steps=1, use_cpu=True,
                                  save_strategy="no", report_to="none", disable_tqdm=True)
    model = AutoModelForSequenceClassification.from_pretrained(common.MINILM)
    Trainer(model=model, args=arguments, train_dataset=Rows(tokenizer), processing_class=tokenizer, callbacks=[Announce()]).train()


def main():
    if sys.argv[1:2] == ["--trainer"]:
        run_trainer(int(sys.argv[2]), sys.argv[3])
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("repeats", nargs="?", type=int, default=5)
    results.add_json_option(parser)
    options = parser.parse_args()
    repeats, figures = options.repeats, results.Figures("startup", options.json)
    print(f"{os.cpu_count()} cores, {repeats} interleaved repeats after one that warms the file cache; seconds to the end of the first step")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for ranks in (1, 2):
            times = {"shardtune": [], "transformers": []}
            for repeat in range(repeats + 1):
                pair = {"shardtune": first_step(ours(ranks, folder), "step 1/1"),
                        "transformers": first_step(theirs(ranks, folder), "first step done")}
                for side, seconds in pair.items():
                    times[side] += [seconds] if repeat else []
            for side, values in times.items():
                print(f"     {ranks} ranks, {side}: median {statistics.median(values):.2f} ({' '.join(f'{v:.2f}' for v in values)})")
            ours_and_theirs = [[[seconds] for seconds in values] for values in times.values()]
            figures.add(f"MiniLM, first step done, {ranks} ranks", "s", ours_and_theirs[0], peer=ours_and_theirs[1],
                        beside="transformers' Trainer", is_times_as_fast=True, aim=GOAL)
    figures.finish()


if __name__ == "__main__":
    main()
