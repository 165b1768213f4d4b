"""What benchmarks that time training steps share: shapes with random weights and rows, and a run of the program."""
import argparse
import contextlib
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import results

SHAPES = {  # config.json, tokens of a row, rows of a micro-batch
    "minilm": ({"architectures": ["BertForSequenceClassification"], "model_type": "bert", "vocab_size": 30522, "hidden_size": 384,
                "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 512}, 32, 32),
    "llama124m": ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50257, "hidden_size": 768,
                   "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
                   "max_position_embeddings": 1024, "tie_word_embeddings": True}, 256, 2)}
DROPPED = 2  # the first steps of a run: buffers are made, kernels compiled
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


@contextlib.contextmanager
def inputs(options):
    """A folder with what step_seconds() trains on."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(pathlib.Path(folder), *SHAPES[options.shape][:2])
        yield pathlib.Path(folder)


def argument_parser(doc, shape):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("--shape", choices=SHAPES, default=shape)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--plans", default="ddp,zero3", type=lambda plans: plans.split(","))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    results.add_json_option(parser)
    return parser


def step_seconds(options, folder, ranks, arguments, num_jobs=1, rows=None, num_steps=None):
    """Seconds of each step of a job, or of several at a time, with one thread a rank, each on a core of its own while there are any.

    num_steps: counted ones, options.steps when not given.
    """
    rows = rows or SHAPES[options.shape][2]
    task = "causal-lm" if json.loads((folder / "config.json").read_text())["model_type"] == "llama" else "text-classification"
    command = ["mpirun", "--bind-to", "none", "--oversubscribe", "-n", ranks, options.program, "train", "--config_name", folder,
               "--task", task, "--train_file", folder / "train.jsonl", "--overwrite_output_dir",
               "--per_device_train_batch_size", rows, "--max_steps", (num_steps or options.steps) + DROPPED, "--logging_steps", 1,
               "--save_strategy", "no", "--num_threads", 1, "--disable_tqdm", "--log_level", "error",
               "--bf16", str(options.bf16).lower(), *arguments]
    outputs = [folder / f"out{number}" for number in range(num_jobs)]
    jobs = [subprocess.Popen([*map(str, command), "--output_dir", out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             stdin=subprocess.DEVNULL) for out in outputs]
    errors = [job.communicate()[1] for job in jobs]
    for job, text in zip(jobs, errors):
        if job.returncode != 0:
            sys.exit(f"exit code {job.returncode}: {text[-3000:]}")
    seconds = []
    for out in outputs:
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        seconds += [record["step_seconds"] for record in records[DROPPED:]]
    return seconds


def in_turn(num_repeats, runs):
    """A list of repeats of milliseconds for each of `runs`, functions that return seconds of steps; the runs alternate."""
    repeats = [[] for _ in runs]
    for _ in range(num_repeats):
        for values, run in zip(repeats, runs):
            values.append([1e3 * seconds for seconds in run()])
    return repeats


def milliseconds(options, folder, runs):
    """The same for arguments of step_seconds."""
    return in_turn(options.repeats, [lambda run=run: step_seconds(options, folder, *run) for run in runs])


def describe(options):
    return f"{options.shape}, {'bf16' if options.bf16 else 'fp32'}"
