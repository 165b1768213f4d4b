"""Training speed and memory beside the Hugging Face Trainer and TRL's, on one machine and in the same minutes.
Run with: scripts/parity --python benchmarks/training.py [--case NAME ...] [--steps N] [--repeats N] [--peers NAME,...]
          [--inputs DIR] [--json FILE]

Cases: `gpt2`, `gpt2-dropout`, `llama`: GPT-2 124M and a Llama of 0.5 billion parameters with random weights, both sides start
from the same file, 4 rows of 1024 tokens of tinyshakespeare a step, bf16 (the peers by autocast), AdamW. `minilm`, `minilm-fp32`:
MiniLM on SST-2, 32 sentences a step. `alpaca`: GPT-2 124M on instruction rows of 45 to 855 tokens, prompt, answer and end, 16 rows
a step; every token is a target.

Peers (training_cases.py says which a case has and how each is set up; training_peer.py is what runs):
  default   the Trainer as it comes; rows of different lengths are padded to the longest of the step
  tuned     malloc keeps its memory (MALLOC_MMAP_MAX_=0 and so on) and asks for huge pages
  grouping  tuned, and rows of about the same length share a step (group_by_length); alpaca in micro-batches of 4 rows, which pad
            less and keep the logits small: faster than 16 at once
  compile   as these, and torch_compile=True. Where lengths vary it recompiles for dynamic shapes at the second length.
  packing   TRL's SFTTrainer(packing=True), tuned. Strategy "bfd", each micro-batch one pack of 1024 tokens, three a step, about the
            tokens of 16 rows. On a CPU there is no attention that knows of packs (TRL asks for FlashAttention), but transformers
            makes the mask that keeps rows apart out of the position ids, so "bfd" with sdpa is valid. TRL flattens a micro-batch
            into one row, and the mask is the square of that: one pack is faster than three. "wrapped" needs no mask and is about
            as fast, but its rows see each other. Gradient checkpointing, TRL's default, is off.

A run goes over the first `steps` x `batch` rows of the case: first the steps that do not count (two; those that
compile, 3 or, where lengths vary, a whole pass), then each row once. So all sides count the same tokens, those that are not
padding, which is checked. A step's time is the distance between the lines that both sides print when a step ends. tokens/s are
those of each step or, where rows differ in length, of the pass. Each repeat runs shardtune and every peer once, in turn; the
figure is the ratio of medians. `the best of the peers` is the one with the highest median, of a run with all of them. Peak memory
is ru_maxrss of the process. gpt2 also says which share of its step the products would take at the register peak of the machine
(floor.py), where benchmark_kernels is built beside the program. Losses of all steps that both sides made are compared where dropout is off and the peer's steps are
those of shardtune: grouping and packing put other rows into a step.
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
import floor
import machine
import results
from training_cases import BEST, CASES, KEEP_MEMORY, PEERS, TOKENS, UNCOUNTED, alpaca_text, best_peer, chosen_peers, rates, uncounted_steps

RATE = 1e-4
PEER_PROGRAM = pathlib.Path(__file__).with_name("training_peer.py")
ENDED = re.compile(r"\bstep (\d+)/")


def tokenized(case, tokenizer):
    """The case's rows of token ids."""
    if case.rows == "text":
        with lzma.open(common.DATA / "data" / "tinyshakespeare" / "input.txt.xz", "rt", encoding="utf-8") as handle:
            ids = tokenizer.encode(handle.read()).ids
        return [ids[at:at + TOKENS] for at in range(0, len(ids) - TOKENS, TOKENS)]
    end = tokenizer.token_to_id("<|endoftext|>")
    rows = json.loads((common.DATA / "data" / "instruct" / "alpaca_en_demo.json").read_text("utf-8"))
    return [tokenizer.encode(alpaca_text(row)).ids + [end] for row in rows]


def write_inputs(folder, case):
    """The model as a Hugging Face directory and rows of token ids."""
    import tokenizers
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.shape), dtype=torch.float32)
    model.save_pretrained(folder / "model")
    with lzma.open(common.DATA / "tokenizers" / "gpt2" / "tokenizer.json.xz") as handle:
        (folder / "model" / "tokenizer.json").write_bytes(handle.read())
    rows = tokenized(case, tokenizers.Tokenizer.from_file(str(folder / "model" / "tokenizer.json")))
    common.write_rows(folder / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    print(f"{case.shape['model_type']}: {model.num_parameters() / 1e6:.1f} million parameters; {len(rows)} rows of "
          f"{min(map(len, rows))} to {max(map(len, rows))} tokens")


def ours(case, folder, steps):
    data = ["--model_name_or_path", folder / "model", "--task", "causal-lm", "--train_file", folder / "rows.jsonl"]
    if case.shape is None:
        data = ["--model_name_or_path", common.MINILM, "--task", "text-classification", "--train_file", common.SST2 / "train.tsv",
                *common.SST2_ARGUMENTS, "--max_seq_length", 128]
    return [common.BINARY, "train", *data, "--output_dir", folder / "out", "--overwrite_output_dir", "--max_train_samples",
            steps * case.batch, "--per_device_train_batch_size", case.batch, "--max_steps", steps + UNCOUNTED, "--learning_rate", RATE,
            "--lr_scheduler_type", "constant", "--bf16", str(case.bf16).lower(), "--logging_steps", "1", "--train_sampling_strategy",
            "sequential", "--save_strategy", "no"]


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


def run_ours(case, folder, steps):
    """{seconds and tokens (of each counted step), peak, losses (of each step), peaks (the machine's in this minute)}."""
    peaks = machine.peaks_of(os.environ.get("SHARDTUNE_BUILD", pathlib.Path(common.BINARY).parent)) if case.floor is not None else None
    seconds, peak = timed(ours(case, folder, steps))
    rows = [row for row in common.read_rows(folder / "out" / "metrics.jsonl") if "loss" in row]
    totals = [row["tokens"] for row in rows][UNCOUNTED - 1:]
    return {"seconds": seconds[UNCOUNTED - 1:], "peak": peak, "losses": [row["loss"] for row in rows], "peaks": peaks,
            "tokens": [after - before for before, after in zip(totals, totals[1:])]}


def run_peer(name, case_name, folder, steps):
    """As run_ours(), without the machine's peaks."""
    case, peer, output = CASES[case_name], PEERS[name], folder / "hf"
    output.mkdir(exist_ok=True)
    uncounted = uncounted_steps(case, peer, steps)
    request = {"case": case_name, "peer": name, "folder": str(folder), "output": str(output), "rows": steps * case.batch,
               "uncounted": uncounted, "rate": RATE}
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}  # of one repeat for the next
    seconds, peak = timed([sys.executable, PEER_PROGRAM, json.dumps(request)], environment | (KEEP_MEMORY if peer.keeps_memory else {}))
    result = json.loads((output / "result.json").read_text())
    return {"seconds": seconds[uncounted - 1:], "peak": peak, "losses": result["losses"], "tokens": result["tokens"][uncounted:]}


def measure(name, arguments, peers):
    """{shardtune or peer: [result of a repeat]}; all sides go over the same rows once."""
    case, measured = CASES[name], {side: [] for side in ("shardtune", *peers)}
    steps = arguments.steps or case.steps
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(arguments.inputs or temporary) / name
        folder.mkdir(parents=True, exist_ok=True)
        if case.shape is not None and not (folder / "rows.jsonl").exists():
            write_inputs(folder, case)
        for _ in range(arguments.repeats):
            measured["shardtune"].append(run_ours(case, folder, steps))
            for peer in peers:
                measured[peer].append(run_peer(peer, name, folder, steps))
    counts = {side: sum(repeats[0]["tokens"]) for side, repeats in measured.items()}
    if len(set(counts.values())) > 1:
        sys.exit(f"{name}: the sides have trained on different numbers of tokens, so their speeds cannot be compared: {counts}")
    return measured


def compare(name, arguments, figures):
    case = CASES[name]
    peers = chosen_peers(case, arguments.peers)
    measured = measure(name, arguments, peers)
    speeds = {side: [rates(case, result["tokens"], result["seconds"]) for result in repeats] for side, repeats in measured.items()}
    peaks = {side: [[result["peak"]] for result in repeats] for side, repeats in measured.items()}
    losses = {side: repeats[-1]["losses"] for side, repeats in measured.items()}
    for side, repeats in speeds.items():
        all_rates, counted = results.flat(repeats), measured[side][0]["tokens"]
        print(f"     {name}, {side}: median {statistics.median(all_rates):.0f} tokens/s ({min(all_rates):.0f} to {max(all_rates):.0f}), "
              f"{sum(counted)} tokens in {len(counted)} steps, peak {max(results.flat(peaks[side])):.0f} MiB, "
              f"last loss {losses[side][-1]:.4f}")
    own = speeds.pop("shardtune")
    if case.floor is not None:
        floor.add_share(figures, name, case.shape, TOKENS, own, [result["peaks"] for result in measured["shardtune"]], aim=case.floor)
    for peer in peers:
        beside = PEERS[peer].about
        figures.add(f"{name}, speed", "tokens/s", own, peer=speeds[peer], beside=beside, aim=case.aims.get(peer))
        figures.add(f"{name}, peak memory", "MiB", peaks["shardtune"], peer=peaks[peer], beside=beside, aim=case.memory.get(peer),
                    more_is_better=False)
        if case.loss is not None and PEERS[peer].has_steps_of(case):
            largest = max(abs(a - b) for a, b in zip(losses["shardtune"], losses[peer]))
            figures.add(f"{name}, largest difference of a step's loss, {beside}", "", [[largest]], aim=case.loss, more_is_better=False)
    if not peers:
        figures.add(f"{name}, speed", "tokens/s", own)
    elif BEST in case.aims and len(peers) == len(case.peers):
        best = best_peer(speeds)
        print(f"     {name}: the best of the peers is {best}")
        figures.add(f"{name}, speed", "tokens/s", own, peer=speeds[best], beside=BEST, aim=case.aims[BEST])


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, help="counted steps of a run; each case has its own number")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", type=lambda text: text.split(",") if text else [],
                        help=f"of {', '.join(PEERS)}; all that a case has when not given; none: --peers ''")
    parser.add_argument("--inputs", help="directory that keeps models and rows for the next run")
    results.add_json_option(parser)
    arguments = parser.parse_args()
    if unknown := set(arguments.peers or ()) - set(PEERS):
        parser.error(f"--peers: no peer is called {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    return arguments


def main():
    arguments = parse()
    figures = results.Figures(None, arguments.json)
    print(f"{os.cpu_count()} cores, {arguments.repeats} interleaved repeats")
    for name in arguments.case:
        figures.case = f"training-{name}"
        compare(name, arguments, figures)
    figures.finish()


if __name__ == "__main__":
    main()
