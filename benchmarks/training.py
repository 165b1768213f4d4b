"""Training speed and memory beside the Hugging Face Trainer, on one machine and in the same minutes.
Run with: scripts/parity --python benchmarks/training.py [--case NAME ...] [--steps N] [--repeats N] [--peers tuned,default]
          [--inputs DIR] [--json FILE]

Cases: GPT-2 124M and a Llama of 0.5 billion parameters with random weights, both sides start from the same file, 4 rows
of 1024 tokens of tinyshakespeare a step, bf16 (the Trainer by autocast), AdamW; MiniLM on SST-2, 32 sentences a step. A step's
time is the distance between the lines that both sides print when a step ends; the first step does not count. tokens/s counts
tokens that are not padding. Each repeat runs shardtune and every peer once, in turn; the figure is the ratio of medians over all
counted steps. Peak memory is ru_maxrss of the process. Losses of all steps are compared where dropout is off.
Peers: `default` is the Trainer as it comes; `tuned` has malloc keep its memory (MALLOC_MMAP_MAX_=0 and so on) and ask
for huge pages and, for MiniLM, group_by_length.
"""
import argparse
import json
import lzma
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import common
import machine
import results

ROWS, TOKENS, RATE = 4, 1024, 1e-4
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20),
               **machine.PROGRAM_MALLOC}
GPT2 = {"model_type": "gpt2"}
LLAMA = {"model_type": "llama", "vocab_size": 50257, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 1024, "bos_token_id": 50256,
         "eos_token_id": 50256, "tie_word_embeddings": False}
GPT2_DROPOUT = ("embd_pdrop", "resid_pdrop", "attn_pdrop")
# name: shape or None for MiniLM, bf16, aims (times the tuned and the default peer; share of a peer's memory; largest difference of losses)
CASES = {
    "gpt2": {"shape": GPT2 | {name: 0.0 for name in GPT2_DROPOUT}, "bf16": True, "loss": 0.02, "aim": {"tuned": 1.7, "default": 4},
             "memory": {"tuned": 0.45}},
    "gpt2-dropout": {"shape": GPT2 | {name: 0.1 for name in GPT2_DROPOUT}, "bf16": True, "aim": {"tuned": 2.5}},
    "llama": {"shape": LLAMA, "bf16": True, "loss": 0.02, "aim": {"tuned": 1.4}},
    "minilm": {"shape": None, "bf16": True, "aim": {"default": 3.5}},
    "minilm-fp32": {"shape": None, "bf16": False, "aim": {"default": 1.8}},
}
ENDED = re.compile(r"\bstep (\d+)/")


def write_inputs(folder, case):
    """The model as a Hugging Face directory and rows of token ids."""
    import tokenizers
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case["shape"]), dtype=torch.float32)
    model.save_pretrained(folder / "model")
    print(f"{case['shape']['model_type']}: {model.num_parameters() / 1e6:.1f} million parameters")
    with lzma.open(common.DATA / "tokenizers" / "gpt2" / "tokenizer.json.xz") as handle:
        (folder / "model" / "tokenizer.json").write_bytes(handle.read())
    with lzma.open(common.DATA / "data" / "tinyshakespeare" / "input.txt.xz", "rt", encoding="utf-8") as handle:
        ids = tokenizers.Tokenizer.from_file(str(folder / "model" / "tokenizer.json")).encode(handle.read()).ids
    common.write_rows(folder / "rows.jsonl", [{"input_ids": ids[at:at + TOKENS]} for at in range(0, len(ids) - TOKENS, TOKENS)])


def ours(case, folder, steps):
    data = ["--model_name_or_path", folder / "model", "--task", "causal-lm", "--train_file", folder / "rows.jsonl",
            "--per_device_train_batch_size", ROWS]
    if case["shape"] is None:
        data = ["--model_name_or_path", common.MINILM, "--task", "text-classification", "--train_file", common.SST2 / "train.tsv",
                *common.SST2_ARGUMENTS, "--per_device_train_batch_size", 32, "--max_seq_length", 128]
    return [common.BINARY, "train", *data, "--output_dir", folder / "out", "--overwrite_output_dir", "--max_steps", steps,
            "--learning_rate", RATE, "--lr_scheduler_type", "constant", "--bf16", str(case["bf16"]).lower(), "--logging_steps", "1",
            "--train_sampling_strategy", "sequential", "--save_strategy", "no"]


def run_trainer(request):
    """What the peers start: the Trainer over the same rows in file order."""
    import torch
    from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback,
                              TrainingArguments, default_data_collator)

    class Announce(TrainerCallback):
        def on_step_end(self, _, state, *__, **___):
            print(f"step {state.global_step}/", file=sys.stderr, flush=True)

    class Ordered(Trainer):
        def _get_train_sampler(self, dataset=None):
            return super()._get_train_sampler(dataset) if request["groups"] else torch.utils.data.SequentialSampler(self.train_dataset)

    options = {"per_device_train_batch_size": ROWS}
    if request["is_minilm"]:
        tokenizer = AutoTokenizer.from_pretrained(common.MINILM)
        rows = [{**tokenizer(text, truncation=True, max_length=128), "label": label} for text, label in common.sst2("train")]
        model, collator = AutoModelForSequenceClassification.from_pretrained(common.MINILM, dtype=torch.float32), None
        options = {"per_device_train_batch_size": 32}
        if request["groups"]:
            options |= {"train_sampling_strategy": "group_by_length"}
    else:
        folder = pathlib.Path(request["folder"])
        rows = [{"input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["input_ids"])}
                for row in common.read_rows(folder / "rows.jsonl")]
        model, collator, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), default_data_collator, None
    arguments = TrainingArguments(output_dir=request["output"], max_steps=request["steps"], use_cpu=True, bf16=request["bf16"],
                                  learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
                                  report_to="none", disable_tqdm=True, **options)
    trainer = Ordered(model=model, args=arguments, train_dataset=rows, data_collator=collator, processing_class=tokenizer,
                      callbacks=[Announce()])
    useful = []
    if request["is_minilm"]:
        original = trainer.training_step
        trainer.training_step = lambda model, inputs, *rest: (useful.append(int(inputs["attention_mask"].sum())),
                                                              original(model, inputs, *rest))[1]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    pathlib.Path(request["output"], "result.json").write_text(json.dumps({"losses": losses, "tokens": useful}))


def timed(command, environment=None):
    """(seconds of every step but the first, peak MiB) of a run whose standard error names each step's end."""
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, env=os.environ | (environment or {}))
    ends, lines = [], []
    for line in process.stderr:
        lines.append(line)
        if (match := ENDED.search(line)) and int(match[1]) == len(ends) + 1:
            ends.append(time.monotonic())
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0 or len(ends) < 2:
        sys.exit(f"status {status} and {len(ends)} steps of: {' '.join(map(str, command))}\n{''.join(lines)[-3000:]}")
    return [after - before for before, after in zip(ends, ends[1:])], usage.ru_maxrss / 1024


def run_side(side, case, folder, steps):
    """{seconds, tokens (of each counted step), peak, losses}."""
    if side == "shardtune":
        seconds, peak = timed(ours(case, folder, steps))
        rows = [row for row in common.read_rows(folder / "out" / "metrics.jsonl") if "loss" in row]
        totals = [row["tokens"] for row in rows]
        return {"seconds": seconds, "peak": peak, "losses": [row["loss"] for row in rows],
                "tokens": [after - before for before, after in zip(totals, totals[1:])]}
    output = folder / "hf"
    output.mkdir(exist_ok=True)
    request = {"folder": str(folder), "output": str(output), "steps": steps, "bf16": case["bf16"], "is_minilm": case["shape"] is None,
               "groups": case["shape"] is None and side == "tuned"}
    seconds, peak = timed([sys.executable, __file__, "--trainer", json.dumps(request)], KEEP_MEMORY if side == "tuned" else None)
    result = json.loads((output / "result.json").read_text())
    return {"seconds": seconds, "peak": peak, "losses": result["losses"], "tokens": result["tokens"][1:] or [ROWS * TOKENS] * len(seconds)}


def compare(name, case, arguments, figures):
    sides = ["shardtune", *arguments.peers.split(",")] if arguments.peers else ["shardtune"]
    rates, peaks, losses = {side: [] for side in sides}, {side: [] for side in sides}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(arguments.inputs or temporary) / name
        if case["shape"] is not None and not (folder / "rows.jsonl").exists():
            write_inputs(folder, case)
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(arguments.repeats):
            for side in sides:
                result = run_side(side, case, folder, arguments.steps + 1)
                rates[side].append([tokens / seconds for tokens, seconds in zip(result["tokens"], result["seconds"])])
                peaks[side].append([result["peak"]])
                losses[side] = result["losses"]
    for side in sides:
        steps = results.flat(rates[side])
        print(f"     {name}, {side}: median {statistics.median(steps):.0f} tokens/s ({min(steps):.0f} to {max(steps):.0f}, "
              f"{len(steps)} steps), peak {max(results.flat(peaks[side])):.0f} MiB, last loss {losses[side][-1]:.4f}")
    for side in sides[1:]:
        beside = f"transformers, {side}"
        figures.add(f"{name}, speed", "tokens/s", rates["shardtune"], peer=rates[side], beside=beside, aim=case["aim"].get(side))
        figures.add(f"{name}, peak memory", "MiB", peaks["shardtune"], peer=peaks[side], beside=beside,
                    aim=case.get("memory", {}).get(side), more_is_better=False)
        if "loss" in case:
            largest = max(abs(a - b) for a, b in zip(losses["shardtune"], losses[side], strict=True))
            figures.add(f"{name}, largest difference of a step's loss, {beside}", "", [[largest]], aim=case["loss"], more_is_better=False)
    if len(sides) == 1:
        figures.add(f"{name}, speed", "tokens/s", rates["shardtune"])


def main():
    if sys.argv[1:2] == ["--trainer"]:
        run_trainer(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", default="tuned,default", help="none: --peers ''")
    parser.add_argument("--inputs", help="directory that keeps models and rows for the next run")
    results.add_json_option(parser)
    arguments = parser.parse_args()
    figures = results.Figures("training", arguments.json)
    print(f"{os.cpu_count()} cores, {arguments.repeats} interleaved repeats of {arguments.steps} counted steps")
    for name in arguments.case:
        compare(name, CASES[name], arguments, figures)
    figures.finish()


if __name__ == "__main__":
    main()
