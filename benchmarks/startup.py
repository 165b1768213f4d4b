"""Time from starting to the end of the first optimizer step, and memory at that point, beside the Hugging Face Trainer.
Run with: scripts/parity --python benchmarks/startup.py [REPEATS] [--json FILE]

MiniLM with a new head, SST-2, 32 sentences a step, fp32, one and two processes; repeats are interleaved and the ratio is that of
medians. Both sides print a line at the end of the step, and this script takes the time when it reads the line, and then the resident
set of the largest of all processes that the command has started.
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
import psutil
import results

GOAL, MEMORY_GOAL = 10, 0.25  # times faster; of the peer's resident set


def largest_resident_set(pid):
    """MiB of the largest process of the tree."""
    root, sizes = psutil.Process(pid), []
    for process in [root, *root.children(recursive=True)]:
        try:
            sizes.append(process.memory_info().rss / 2**20)
        except psutil.NoSuchProcess:
            pass  # it has ended since it was listed
    return max(sizes)


def first_step(command, marker):
    """Seconds from start until a line with `marker` appears on standard error, and MiB resident then."""
    start = time.monotonic()
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    seconds, mebibytes, lines = None, None, []
    for line in process.stderr:
        lines.append(line)
        if marker in line and seconds is None:
            seconds = time.monotonic() - start
            mebibytes = largest_resident_set(process.pid)
    if process.wait() != 0 or seconds is None:
        sys.exit(f"exit code {process.returncode} of: {' '.join(map(str, command))}\n{''.join(lines)[-3000:]}")
    return seconds, mebibytes


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
            measured = {"shardtune": [], "transformers": []}
            for _ in range(repeats + 1):
                measured["shardtune"].append(first_step(ours(ranks, folder), "step 1/1"))
                measured["transformers"].append(first_step(theirs(ranks, folder), "first step done"))
            times, sizes = [[[[pair[which]] for pair in pairs[1:]] for pairs in measured.values()] for which in (0, 1)]
            for side, seconds, mebibytes in zip(measured, map(results.flat, times), map(results.flat, sizes)):
                print(f"     {ranks} ranks, {side}: median {statistics.median(seconds):.2f} ({' '.join(f'{v:.2f}' for v in seconds)}) s, "
                      f"{statistics.median(mebibytes):.0f} MiB")
            beside = "transformers' Trainer"
            figures.add(f"MiniLM, first step done, {ranks} ranks", "s", times[0], peer=times[1], beside=beside, is_times_as_fast=True,
                        aim=GOAL)
            figures.add(f"MiniLM, resident then, {ranks} ranks", "MiB", sizes[0], peer=sizes[1], beside=beside, aim=MEMORY_GOAL,
                        more_is_better=False)
    figures.finish()


if __name__ == "__main__":
    main()
