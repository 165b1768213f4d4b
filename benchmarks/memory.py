"""Memory of sharded training beside the formula. Run with: scripts/parity --python benchmarks/memory.py

A Llama-shaped model of 124 million parameters with random weights, zero3 on two ranks, bf16, four rows of 512 tokens a rank,
with gradient checkpointing off and on. Measured: each rank's peak resident set as the kernel reports it (ru_maxrss of the
process), less that of the same job with a model of no size; memory that the ranks have in common counts in full on each of
them. Expected: masters, two moments and gradients, 16 bytes a parameter over the ranks; the gathered bf16 weights of the two
largest units, 2 bytes a parameter; what --log_memory reports as activations, which is all that the forward pass leaves behind
(the loss of the head makes its gradient there). Nothing for gradients on their way. Exit code 1 when a peak is not within 15 %.
"""
import json
import lzma
import pathlib
import re
import subprocess
import sys
import tempfile

import common

RANKS, ROWS, TOKENS, MIB = 2, 4, 512, 1 << 20
SHAPE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50257, "hidden_size": 768,
         "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
         "max_position_embeddings": 1024, "tie_word_embeddings": True}
NOTHING = SHAPE | {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                   "num_key_value_heads": 1}
# Starts one rank and prints the peak of its resident set, in KiB, when it has ended.
WATCH = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); " \
        "print(f'peak {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss};', flush=True); sys.exit(code)"


def unit_sizes(shape):
    """Parameters of the root unit (embedding, tied head, last norm) and of each layer."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    return [shape["vocab_size"] * hidden + hidden] + [4 * hidden * hidden + 3 * hidden * wide + 2 * hidden] * shape["num_hidden_layers"]


def write_inputs(folder):
    with lzma.open(common.DATA / "tokenizers" / "gpt2" / "tokenizer.json.xz") as handle:
        (folder / "tokenizer.json").write_bytes(handle.read())
    with lzma.open(common.DATA / "data" / "tinyshakespeare" / "input.txt.xz", "rt", encoding="utf-8") as handle:
        text = handle.read()
    rows = [{"text": text[at:at + 6 * TOKENS]} for at in range(0, len(text) - 6 * TOKENS, 6 * TOKENS)]
    common.write_rows(folder / "long.jsonl", rows[:100])
    common.write_rows(folder / "short.jsonl", [{"text": "To be"}] * 100)


def run(folder, shape, rows, is_checkpointed):
    """(peak resident MiB of each rank, what --log_memory said last on each rank)."""
    (folder / "config.json").write_text(json.dumps(shape))
    command = ["mpirun", "-n", str(RANKS), sys.executable, "-c", WATCH, common.BINARY, "train", "--config_name", folder / "config.json",
               "--tokenizer_name", folder, "--task", "causal-lm", "--train_file", folder / rows, "--output_dir", folder / "out",
               "--overwrite_output_dir", "--max_seq_length", TOKENS, "--per_device_train_batch_size", ROWS, "--sharding", "zero3",
               "--bf16", "true", "--gradient_checkpointing", str(is_checkpointed).lower(), "--max_steps", "2", "--logging_steps", "1",
               "--log_memory", "true", "--save_strategy", "no"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        sys.exit(f"exit code {result.returncode}: {result.stderr[-3000:]}")
    peaks = [int(kib) / 1024 for kib in re.findall(r"peak (\d+);", result.stdout)]
    reports = re.findall(r"most memory so far, MiB: (.*)", result.stderr)[-RANKS:]
    assert len(peaks) == len(reports) == RANKS, result.stderr[-3000:]
    return peaks, reports


def main():
    sizes = unit_sizes(SHAPE)
    state = 16 * sum(sizes) / RANKS / MIB
    units = 2 * sum(sorted(sizes)[-2:]) / MIB
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_inputs(folder)
        idle = min(run(folder, NOTHING, "short.jsonl", False)[0])
        print(f"{sum(sizes) / 1e6:.1f} million parameters; idle {idle:.0f} MiB")
        for is_checkpointed in (False, True):
            peaks, reports = run(folder, SHAPE, "long.jsonl", is_checkpointed)
            activations = max(float(re.search(r"activations ([\d.]+)", report)[1]) for report in reports)
            expected = state + units + activations
            print(f"checkpointing {'on' if is_checkpointed else 'off'}: expected {expected:.0f} MiB = state {state:.0f} + two units "
                  f"{units:.0f} + activations {activations:.0f}; measured {', '.join(f'{peak - idle:.0f}' for peak in peaks)}")
            for report in reports:
                print(f"     {report}")
            common.report("largest deviation of a rank's peak", max(abs((peak - idle) / expected - 1) for peak in peaks), 0.15)
    common.finish()


if __name__ == "__main__":
    main()
