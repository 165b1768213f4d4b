#!/usr/bin/env python3
"""What the same bits at any number of ranks cost: steps with --reduction tree beside --reduction fast.

    python3 benchmarks/reduction/reduction.py PROGRAM [--shape minilm|llama124m] [--ranks 2] [--plans ddp,zero3]
                                              [--accumulation 1,4] [--steps 12] [--repeats 3] [--bf16]

PROGRAM is build/release/shardtune. Runs of both alternate, the first two steps of each are dropped; the cost is the
difference of the medians as a share of a step with fast. Random weights and rows; nothing is read or downloaded. Aim: at
most 5 %. The ranks need a core each, and an idle machine: below some 20 steps per figure noise is larger than the cost.
"""
import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

SHAPES = {  # config.json, tokens of a row, rows of a micro-batch
    "minilm": ({"architectures": ["BertForSequenceClassification"], "model_type": "bert", "vocab_size": 30522, "hidden_size": 384,
                "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 512}, 32, 32),
    "llama124m": ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50257, "hidden_size": 768,
                   "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
                   "max_position_embeddings": 1024, "tie_word_embeddings": True}, 256, 2)}
DROPPED = 2
WORDS = 1000


def write_inputs(folder, shape, tokens):
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"] + [f"w{i}" for i in range(WORDS)])}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                  "vocab": vocabulary}}))
    (folder / "config.json").write_text(json.dumps(shape))
    numbers = random.Random(1)
    with open(folder / "train.jsonl", "w") as handle:
        for _ in range(2000):
            text = " ".join(f"w{numbers.randrange(WORDS)}" for _ in range(tokens))
            handle.write(json.dumps({"text": text, "label": numbers.choice("ab")}) + "\n")


def step_seconds(options, folder, plan, accumulation, reduction):
    shape, _, rows = SHAPES[options.shape]
    task = "causal-lm" if shape["model_type"] == "llama" else "text-classification"
    command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", options.ranks, options.program, "train",
               "--config_name", folder, "--task", task, "--train_file", folder / "train.jsonl", "--output_dir", folder / "out",
               "--overwrite_output_dir", "--sharding", plan, "--per_device_train_batch_size", rows,
               "--gradient_accumulation_steps", accumulation, "--max_steps", options.steps + DROPPED, "--logging_steps", 1,
               "--save_strategy", "no", "--num_threads", 1, "--disable_tqdm", "--log_level", "error", "--reduction", reduction,
               "--bf16", str(options.bf16).lower()]
    if plan == "hsdp":
        command += ["--hsdp_shard_size", max(1, options.ranks // 2)]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        sys.exit(f"exit code {result.returncode}: {result.stderr[-3000:]}")
    records = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [record["step_seconds"] for record in records[DROPPED:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--plans", default="ddp,zero3")
    parser.add_argument("--accumulation", default="1,4")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    print(f"{options.shape}, {options.ranks} ranks, {'bf16' if options.bf16 else 'fp32'}")
    print(f"{'plan':8} {'accumulation':>12} {'tree ms':>10} {'fast ms':>10} {'cost %':>8}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_inputs(folder, *SHAPES[options.shape][:2])
        for plan in options.plans.split(","):
            for accumulation in map(int, options.accumulation.split(",")):
                seconds = {"tree": [], "fast": []}
                for _ in range(options.repeats):
                    for reduction, values in seconds.items():
                        values += step_seconds(options, folder, plan, accumulation, reduction)
                tree, fast = (1e3 * statistics.median(values) for values in seconds.values())
                print(f"{plan:8} {accumulation:12} {tree:10.1f} {fast:10.1f} {100 * (tree - fast) / fast:8.1f}", flush=True)


if __name__ == "__main__":
    main()
