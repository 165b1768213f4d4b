#!/usr/bin/env python3
"""What a step costs besides its work: time of a step against tokens, parameters and ranks, with fitted lines.

    python3 benchmarks/step_cost.py PROGRAM [--series tokens,parameters,ranks] [--plan ddp] [--steps 12] [--repeats 3] [--fp32]
                                            [--json FILE]

PROGRAM is build/release/shardtune. Llama-shaped models with random weights, rows of 128 tokens. `tokens`: the smallest model, 1 to 128
rows a step; `parameters`: one row, 10 million to half a billion; `ranks`: the smallest model, one row a rank. Every rank has one
thread. Runs alternate, the first two steps of each are dropped, medians; lines by least squares of relative errors, so that short steps
count as much as long ones. Fixed cost: where the line of `tokens` begins, less what its parameters cost by the line of
`parameters` (the optimizer's pass). Aim: at most 2 ms. Needs some 12 GiB for half a billion parameters, and an idle machine.
"""
import argparse
import pathlib
import statistics
import tempfile

import results
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
    """Repeats of milliseconds of steps of each of `runs`: (hidden size, layers), rows, ranks."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for width, _, _ in runs:
            if width in folders:
                continue
            folders[width] = pathlib.Path(temporary) / f"{width[0]}x{width[1]}"
            folders[width].mkdir()
            steps.write_inputs(folders[width], shape(*width), ROW_TOKENS)
        arguments = ["--sharding", options.plan]
        return steps.in_turn(options.repeats, [
            lambda width=width, rows=rows, ranks=ranks: steps.step_seconds(options, folders[width], ranks, arguments, rows=rows)
            for width, rows, ranks in runs])


def report(figures, series, unit, scale, repeats):
    """Adds a figure for each of {x: repeats}; the fitted line through their medians, per `scale` of x."""
    points = [(x / scale, statistics.median(results.flat(times))) for x, times in repeats.items()]
    intercept, slope = fitted_line(points)
    for x, times in repeats.items():
        figures.add(f"{series}, {x} {unit}", "ms", times)
    print(f"  line: {intercept:.2f} ms + {slope:.4g} ms for each {scale:g} {unit}; "
          f"farthest point {max(abs((intercept + slope * x) / y - 1) for x, y in points):.0%} off", flush=True)
    return intercept, slope


def measure_series(options, figures):
    """{name of a series: intercept in ms and slope, a thousand tokens, a million parameters or a rank}."""
    smallest = WIDTHS[0]
    num, lines = num_parameters(*smallest), {}
    if "tokens" in options.series:
        times = measure(options, [(smallest, rows, 1) for rows in ROWS])
        by_tokens = {rows * ROW_TOKENS: repeats for rows, repeats in zip(ROWS, times)}
        lines["tokens"] = report(figures, f"{num} parameters", "tokens", 1000, by_tokens)
    if "parameters" in options.series:
        times = measure(options, [(width, 1, 1) for width in WIDTHS])
        by_parameters = {num_parameters(*width): repeats for width, repeats in zip(WIDTHS, times)}
        lines["parameters"] = report(figures, f"{ROW_TOKENS} tokens", "parameters", 1e6, by_parameters)
    if "ranks" in options.series:
        times = measure(options, [(smallest, 1, ranks) for ranks in RANKS])
        lines["ranks"] = report(figures, f"{num} parameters, {ROW_TOKENS} tokens a rank", "ranks", 1, dict(zip(RANKS, times)))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("--series", default="tokens,parameters,ranks", type=lambda names: names.split(","))
    parser.add_argument("--plan", default="ddp")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fp32", action="store_true")
    results.add_json_option(parser)
    options = parser.parse_args()
    if unknown := set(options.series) - {"tokens", "parameters", "ranks"}:
        parser.error(f"--series: {', '.join(sorted(unknown))} is unknown; tokens, parameters and ranks exist")
    options.bf16 = not options.fp32
    figures = results.Figures("step_cost", options.json)
    lines = measure_series(options, figures)
    if "tokens" in lines and "parameters" in lines:
        # The line of parameters holds their optimizer's pass and the work of one row, which the line of tokens has as well.
        millions = num_parameters(*WIDTHS[0]) / 1e6
        work = lines["tokens"][1] * ROW_TOKENS / 1000 / millions
        fixed = lines["tokens"][0] - (lines["parameters"][1] - work) * millions
        figures.add("fixed cost of a step", "ms", [[fixed]], aim=AIM_MS, more_is_better=False)
    figures.finish()


if __name__ == "__main__":
    main()
