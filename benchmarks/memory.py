"""Memory of parallel training beside the formula, and memory and speed beside torch's FSDP2 over gloo.
Run with: scripts/parity --python benchmarks/memory.py [124M] [0.5B] [2] [4] [off] [on] [--plans zero3,ddp,zero1,zero2]
          [--precisions bf16,fp32] [--without-fsdp] [--json FILE]

Llama-shaped models with random weights on 2 and 4 ranks; 124M with 1024 tokens a rank, gradient checkpointing off and on, 0.5B
with 512 tokens and checkpointing on. Measured: each rank's peak resident set as the kernel reports it (VmHWM), less
that of the same job with a model of no size; pages that the ranks have in common count once over the ranks (RssShmem of
/proc/PID/status is replaced by Pss_Shmem of smaps_rollup). Expected: the table of docs/memory.md (masters, two moments,
gradients, compute copies); under zero3 the gathered weights of the two largest units, which the ranks have in common; partial
sums and activations as --log_memory reports them. Bar: within 8 %.
FSDP2 (fully_shard of every layer and the root, bf16 weights and fp32 reduction, AdamW, transformers' Llama), beside zero3 in bf16,
trains the same shape on as many tokens; its peak is measured in the same way. Seconds are those of the last step.
Needs about 20 GiB of free memory for 0.5B.
"""
import argparse
import itertools
import json
import lzma
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import common
import results

MIB = 1 << 20
STEPS, BAR = 2, 0.08
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50257, "max_position_embeddings": 1024,
         "tie_word_embeddings": True}


def llama(hidden, wide, layers, heads):
    return LLAMA | {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": heads,
                    "num_key_value_heads": heads}


# Name: shape, rows of how many tokens a rank gets, with gradient checkpointing or not.
CASES = {"124M": (llama(768, 2048, 12, 12), 2, 512, (False, True)), "0.5B": (llama(1024, 2816, 36, 16), 1, 512, (True,))}
NOTHING = llama(8, 8, 1, 1)
# Starts one rank; when it has ended prints its peak, and by how much less that is with pages in common counted once, in KiB.
WATCH = r"""
import os, re, resource, subprocess, sys, time
rank, more = subprocess.Popen(sys.argv[1:]), 0
def kib(file, key):
    return int(re.search(key + r":\s+(\d+)", open(f"/proc/{rank.pid}/{file}").read())[1])
while rank.poll() is None:
    try:
        more = max(more, kib("status", "RssShmem") - kib("smaps_rollup", "Pss_Shmem"))
    except (OSError, TypeError):
        pass  # it is ending
    time.sleep(0.3)
number = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("RANK"))
print(f"peak {number} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss} {more};", flush=True)
sys.exit(rank.returncode)
"""


def unit_sizes(shape):
    """Parameters of the root unit (embedding, tied head, last norm) and of each layer."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    return [shape["vocab_size"] * hidden + hidden] + [4 * hidden * hidden + 3 * hidden * wide + 2 * hidden] * shape["num_hidden_layers"]


def bytes_per_parameter(plan, precision, ranks):
    """The table of docs/memory.md, without what zero3 gathers."""
    masters, moments, gradients = (4, 8, 4) if plan == "ddp" else (4 / ranks, 8 / ranks, 4 / ranks)
    copies = 0 if plan == "zero3" else 2 if precision == "bf16" else 4 - masters
    return masters + moments + gradients + copies


def write_inputs(folder):
    with lzma.open(common.DATA / "tokenizers" / "gpt2" / "tokenizer.json.xz") as handle:
        (folder / "tokenizer.json").write_bytes(handle.read())
    with lzma.open(common.DATA / "data" / "tinyshakespeare" / "input.txt.xz", "rt", encoding="utf-8") as handle:
        text = handle.read()
    size = 6 * 512
    common.write_rows(folder / "long.jsonl", [{"text": text[at:at + size]} for at in range(0, len(text) - size, size)][:100])
    common.write_rows(folder / "short.jsonl", [{"text": "To be"}] * 100)


def run(command):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        sys.exit(f"exit code {result.returncode}: {result.stdout[-1000:]}{result.stderr[-3000:]}")
    return result


def peaks_of(result, ranks):
    """MiB by rank."""
    peaks = {int(rank): (int(peak) - int(more)) / 1024 for rank, peak, more in re.findall(r"peak (\d+) (\d+) (\d+);", result.stdout)}
    assert len(peaks) == ranks, result.stdout
    return [peaks[rank] for rank in range(ranks)]


def ours(folder, shape, rows, tokens, ranks, is_checkpointed, plan, precision):
    """(peak MiB of each rank, what --log_memory said last on each rank, seconds of the last step)."""
    (folder / "config.json").write_text(json.dumps(shape))
    is_nothing = shape is NOTHING
    result = run(["mpirun", "--oversubscribe", "--bind-to", "none", "-n", ranks, sys.executable, "-c", WATCH, common.BINARY, "train",
                  "--config_name", folder / "config.json", "--tokenizer_name", folder, "--task", "causal-lm", "--train_file",
                  folder / ("short.jsonl" if is_nothing else "long.jsonl"), "--output_dir", folder / "out", "--overwrite_output_dir",
                  "--max_seq_length", tokens, "--per_device_train_batch_size", rows, "--sharding", plan, "--bf16", str(precision == "bf16").lower(),
                  "--gradient_checkpointing", str(is_checkpointed).lower(), "--max_steps", STEPS, "--logging_steps", "1",
                  "--log_memory", "true", "--save_strategy", "no", "--ddp_bucket_cap_mb", "8"])
    reports = dict(re.findall(r"\[rank (\d+)\] most memory so far, MiB: (.*)", result.stderr))  # the last of each
    reports = [reports[str(rank)] for rank in range(ranks)]
    last = json.loads((folder / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    return peaks_of(result, ranks), reports, last.get("step_seconds", 0.0)


def fsdp(folder, shape, rows, tokens, ranks, is_checkpointed):
    (folder / "config.json").write_text(json.dumps(shape))
    result = run([sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc_per_node", ranks, sys.executable, "-c",
                  WATCH, sys.executable, __file__, "--fsdp", folder / "config.json", rows, tokens, int(is_checkpointed)])
    return peaks_of(result, ranks), float(re.search(r"last step ([\d.]+)", result.stdout)[1])


def train_with_fsdp(config_file, rows, tokens, is_checkpointed):
    """What `fsdp` starts: nothing is whole anywhere but what FSDP2 gathers."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    config = LlamaConfig(**{k: v for k, v in json.loads(pathlib.Path(config_file).read_text()).items() if k != "architectures"})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its tables are no weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for _ in range(STEPS):
        dist.barrier()
        start = time.monotonic()
        ids = torch.randint(config.vocab_size, (rows, tokens))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seconds = time.monotonic() - start
    assert torch.isfinite(loss), loss
    if dist.get_rank() == 0:
        print(f"last step {seconds}", flush=True)
    dist.destroy_process_group()


def compare(folder, case, idle, figures):
    name, ranks, is_checkpointed, plan, precision = case
    shape, rows, tokens, _ = CASES[name]
    sizes = unit_sizes(shape)
    peaks, reports, seconds = ours(folder, shape, rows, tokens, ranks, is_checkpointed, plan, precision)
    state = bytes_per_parameter(plan, precision, ranks) * sum(sizes) / MIB
    units = (2 if precision == "bf16" else 4) * sum(sorted(sizes)[-2:]) / ranks / MIB if plan == "zero3" else 0
    title = f"{name}, {ranks} ranks, checkpointing {'on' if is_checkpointed else 'off'}"
    if (plan, precision) != ("zero3", "bf16"):
        title += f", {plan} in {precision}"
    print(f"{title}: state {state:.0f} MiB + two units {units:.0f} + "
          f"partial sums + activations; {seconds:.2f} s a step")
    deviations = []
    for rank, (peak, report) in enumerate(zip(peaks, reports)):
        sums, activations = (float(re.search(part + r" ([\d.]+)", report)[1]) for part in ("partial sums", "activations"))
        expected = state + units + sums + activations
        deviations.append((peak - idle[0]) / expected - 1)
        print(f"     rank {rank}: expected {expected:.0f} (partial sums {sums:.0f}, activations {activations:.0f}), measured "
              f"{peak - idle[0]:.0f} MiB ({100 * deviations[-1]:+.1f} %)")
    print(f"     {reports[0]}", flush=True)
    figures.add(f"{title}, largest deviation of a rank's peak from the formula", "", [[max(map(abs, deviations))]], aim=BAR,
                more_is_better=False)
    if len(idle) == 1 or (plan, precision) != ("zero3", "bf16"):
        return
    theirs, their_seconds = fsdp(folder, shape, rows, tokens, ranks, is_checkpointed)
    print(f"     FSDP2: measured {', '.join(f'{peak - idle[1]:.0f}' for peak in theirs)} MiB, {their_seconds:.2f} s a step")
    figures.add(f"{title}, peak of a rank", "MiB", [[max(peaks) - idle[0]]], peer=[[max(theirs) - idle[1]]], beside="FSDP2",
                more_is_better=False)
    figures.add(f"{title}, step", "s", [[seconds]], peer=[[their_seconds]], beside="FSDP2", is_times_as_fast=True)


def main():
    if sys.argv[1:2] == ["--fsdp"]:
        train_with_fsdp(sys.argv[2], *map(int, sys.argv[3:]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("only", nargs="*", help="124M, 0.5B; numbers of ranks, 2, 4; checkpointing, off, on")
    parser.add_argument("--plans", default="zero3", type=lambda plans: plans.split(","))
    parser.add_argument("--precisions", default="bf16", type=lambda precisions: precisions.split(","))
    parser.add_argument("--without-fsdp", action="store_true")
    results.add_json_option(parser)
    options = parser.parse_args()
    for word in options.only:
        if word not in (*CASES, "2", "4", "off", "on"):
            parser.error(f"'{word}' is no model, number of ranks or way of checkpointing that is measured here")
    names = [name for name in CASES if name in options.only] or list(CASES)
    counts = [ranks for ranks in (2, 4) if str(ranks) in options.only] or [2, 4]
    modes = [mode == "on" for mode in ("off", "on") if mode in options.only] or [False, True]
    figures = results.Figures("memory", options.json)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_inputs(folder)
        for ranks in counts:
            idle = [min(ours(folder, NOTHING, 1, 512, ranks, False, "zero3", "bf16")[0])]
            if not options.without_fsdp:
                idle.append(min(fsdp(folder, NOTHING, 1, 8, ranks, False)[0]))
            print(f"{ranks} ranks: idle {' and of FSDP2 '.join(f'{peak:.0f}' for peak in idle)} MiB", flush=True)
            for name, plan, precision in itertools.product(names, options.plans, options.precisions):
                for is_checkpointed in sorted(set(CASES[name][-1]) & set(modes)):
                    compare(folder, (name, ranks, is_checkpointed, plan, precision), idle, figures)
    figures.finish()


if __name__ == "__main__":
    main()
