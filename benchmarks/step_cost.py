#!/usr/bin/env python3
"""What a step costs besides its work: time of a step against tokens, parameters and ranks, with fitted lines.

    python3 benchmarks/step_cost.py PROGRAM [--series tokens,parameters,ranks] [--plan ddp] [--steps 12] [--repeats 3] [--fp32]

PROGRAM is build/release/shardtune. Llama-shaped models with random weights, rows of 128 tokens. `tokens`: the smallest model, 1 to 128
rows a step; `parameters`: one row, 10 million to half a billion; `ranks`: the smallest model, one row a rank. Every rank has one
thread. Runs alternate, the first two steps of each are dropped, medians; lines by least squares of relative errors, so that short steps
count as much as long ones. Fixed cost: where the line of `tokens` begins, less what its parameters cost by the line of
`parameters` (the optimizer's pass). Aim: at most 2 ms. Needs some 12 GiB for half a billion parameters, and an idle machine.
"""
import argparse
import pathlib
import tempfile

import steps

ROW_TOKENS = 128
ROWS = [1, 2, 4, 8, 16, 32, 64, 128]
WIDTHS = [(256, 8), (512, 8), (768, 12), (1024, 24), (1280, 26)]  # hidden size, layers
RANKS = [1, 2, 3, 4]
AIM_MS = 2.0


def shape(hidden, layers):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": hidden,
            "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 64, "max_position_embeddings": 1024, "tie_word_embeddings": True}


def num_parameters(hidden, layers):
    return 4096 * hidden + hidden + layers * (4 * hidden * hidden + 3 * hidden * 4 * hidden + 2 * hidden)


def fitted_line(points):
    """Intercept and slope of the line with the least sum of squared relative errors."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points)) / total
    slope = (sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points))
             / sum(w * (x - mean_x)**2 for w, (x, _) in zip(weights, points)))
    return mean_y - slope * mean_x, slope


def measure(options, runs):
    """Milliseconds of a step of each of `runs`: (hidden size, layers), rows, ranks."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for width, _, _ in runs:
            if width in folders:
                continue
            folders[width] = pathlib.Path(temporary) / f"{width[0]}x{width[1]}"
            folders[width].mkdir()
            steps.write_inputs(folders[width], shape(*width), ROW_TOKENS)
        arguments = ["--sharding", options.plan]
        return steps.medians(options.repeats, [
            lambda width=width, rows=rows, ranks=ranks: steps.step_seconds(options, folders[width], ranks, arguments, rows=rows)
            for width, rows, ranks in runs])


def report(name, unit, points):
    intercept, slope = fitted_line(points)
    print(f"\n{name}: {intercept:.2f} ms + {slope:.4g} ms for each {unit}")
    for x, milliseconds in points:
        print(f"  {x:10.4g} {milliseconds:10.2f} ms, the line {intercept + slope * x:10.2f}", flush=True)
    return intercept, slope


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("--series", default="tokens,parameters,ranks", type=lambda names: names.split(","))
    parser.add_argument("--plan", default="ddp")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fp32", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.series) - {"tokens", "parameters", "ranks"}:
        parser.error(f"--series: {', '.join(sorted(unknown))} is unknown; tokens, parameters and ranks exist")
    options.bf16 = not options.fp32
    smallest = WIDTHS[0]
    millions = num_parameters(*smallest) / 1e6
    lines = {}
    if "tokens" in options.series:
        times = measure(options, [(smallest, rows, 1) for rows in ROWS])
        lines["tokens"] = report(f"{millions:.1f} million parameters, tokens", "1000 tokens",
                                 [(rows * ROW_TOKENS / 1000, time) for rows, time in zip(ROWS, times)])
    if "parameters" in options.series:
        times = measure(options, [(width, 1, 1) for width in WIDTHS])
        lines["parameters"] = report(f"{ROW_TOKENS} tokens, parameters", "million parameters",
                                     [(num_parameters(*width) / 1e6, time) for width, time in zip(WIDTHS, times)])
    if "ranks" in options.series:
        times = measure(options, [(smallest, 1, ranks) for ranks in RANKS])
        lines["ranks"] = report(f"{millions:.1f} million parameters, {ROW_TOKENS} tokens a rank, ranks", "rank", list(zip(RANKS, times)))
    if "tokens" in lines and "parameters" in lines:
        # The line of parameters holds their optimizer's pass and the work of one row, which the line of tokens has as well.
        work = lines["tokens"][1] * ROW_TOKENS / 1000 / millions
        fixed = lines["tokens"][0] - (lines["parameters"][1] - work) * millions
        print(f"\nfixed cost of a step: {fixed:.2f} ms (aim: at most {AIM_MS:g})")


if __name__ == "__main__":
    main()
