#!/usr/bin/env python3
"""What a step costs besides its work: time of a step against tokens, parameters, ranks and layers, with fitted lines.

    python3 benchmarks/step_cost.py PROGRAM [--series tokens,parameters,ranks,layers] [--plan ddp] [--steps 12] [--repeats 3] [--fp32]
                                            [--json FILE]

PROGRAM is build/release/shardtune. Llama-shaped models with random weights, rows of 128 tokens. `tokens`: the smallest model, 1 to 128
rows a step; `parameters`: one row, 10 million to half a billion; `ranks`: the smallest model, one row a rank; `layers`: next to no work,
8 tokens and layers of 16 thousand parameters. Every rank has one thread. Runs alternate, short steps are as many more (so that a slow
spell of the machine does not decide), the first two steps of each run are dropped, medians; lines by least squares of relative errors,
so that short steps count as much as long ones. Fixed cost: the step of `layers` with as many layers as the smallest model of the others;
the little work it does is in it. Where the other lines begin says the same less exactly: at 128 tokens a hundredth of their slope
is half a millisecond. Aim: at most 2 ms. Needs some 12 GiB for half a billion parameters, and an idle machine.
"""
import argparse
import functools
import pathlib
import statistics
import tempfile

import results
import steps

SERIES = ("tokens", "parameters", "ranks", "layers")
VOCABULARY, ROW_TOKENS = 4096, 128
ROWS = [1, 2, 4, 8, 16, 32, 64, 128]
WIDTHS = [(256, 8), (512, 8), (768, 12), (1024, 24), (1280, 26)]  # hidden size, layers
RANKS = [1, 2, 3, 4]
LAYERS, THIN, FEW_WORDS, FEW_TOKENS = [1, 2, 4, 8, 16], 32, 1024, 8  # layers, hidden size, vocabulary, tokens
AIM_MS = 2.0
WORK, MOST_STEPS = 7e10, 60  # of a run: parameters times tokens, some four seconds; and counted steps


def shape(hidden, layers, vocabulary=VOCABULARY):
    heads = max(1, hidden // 64)
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
            "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": heads, "max_position_embeddings": 1024, "tie_word_embeddings": True}


def num_parameters(hidden, layers, vocabulary=VOCABULARY):
    return vocabulary * hidden + hidden + layers * (4 * hidden * hidden + 3 * hidden * 4 * hidden + 2 * hidden)


def num_steps(least, parameters, tokens):
    return max(least, min(MOST_STEPS, round(WORK / (parameters * tokens))))


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
    """Repeats of milliseconds of steps of each of `runs`: arguments of shape(), tokens of a row, rows, ranks."""
    with tempfile.TemporaryDirectory() as temporary:
        arguments, work = ["--sharding", options.plan], []
        for model, tokens, rows, ranks in runs:
            folder = pathlib.Path(temporary) / "x".join(map(str, (*model, tokens)))
            if not folder.exists():
                folder.mkdir()
                steps.write_inputs(folder, shape(*model), tokens)
            count = num_steps(options.steps, num_parameters(*model), rows * tokens)
            work.append(functools.partial(steps.step_seconds, options, folder, ranks, arguments, rows=rows, num_steps=count))
        return steps.in_turn(options.repeats, work)


def report(figures, series, unit, scale, repeats):
    """Adds a figure for each of {x: repeats} and prints the line through their medians, per `scale` of x."""
    points = [(x / scale, statistics.median(results.flat(times))) for x, times in repeats.items()]
    intercept, slope = fitted_line(points)
    for x, times in repeats.items():
        figures.add(f"{series}, {x} {unit}", "ms", times)
    print(f"  line: {intercept:.2f} ms + {slope:.4g} ms for each {scale:g} {unit}; "
          f"farthest point {max(abs((intercept + slope * x) / y - 1) for x, y in points):.0%} off", flush=True)


def measure_series(options, figures):
    smallest = WIDTHS[0]
    num = num_parameters(*smallest)
    if "tokens" in options.series:
        times = measure(options, [(smallest, ROW_TOKENS, rows, 1) for rows in ROWS])
        by_tokens = {rows * ROW_TOKENS: repeats for rows, repeats in zip(ROWS, times)}
        report(figures, f"{num} parameters", "tokens", 1000, by_tokens)
    if "parameters" in options.series:
        times = measure(options, [(width, ROW_TOKENS, 1, 1) for width in WIDTHS])
        by_parameters = {num_parameters(*width): repeats for width, repeats in zip(WIDTHS, times)}
        report(figures, f"{ROW_TOKENS} tokens", "parameters", 1e6, by_parameters)
    if "ranks" in options.series:
        times = measure(options, [(smallest, ROW_TOKENS, 1, ranks) for ranks in RANKS])
        report(figures, f"{num} parameters, {ROW_TOKENS} tokens a rank", "ranks", 1, dict(zip(RANKS, times)))
    if "layers" in options.series:
        times = dict(zip(LAYERS, measure(options, [((THIN, layers, FEW_WORDS), FEW_TOKENS, 1, 1) for layers in LAYERS])))
        report(figures, f"{FEW_TOKENS} tokens, hidden size {THIN}", "layers", 1, times)
        figures.add(f"fixed cost of a step of {smallest[1]} layers", "ms", times[smallest[1]], aim=AIM_MS, more_is_better=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("--series", default=",".join(SERIES), type=lambda names: names.split(","))
    parser.add_argument("--plan", default="ddp")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fp32", action="store_true")
    results.add_json_option(parser)
    options = parser.parse_args()
    if unknown := set(options.series) - set(SERIES):
        parser.error(f"--series: {', '.join(sorted(unknown))} is unknown; there are {', '.join(SERIES)}")
    options.bf16 = not options.fp32
    figures = results.Figures("step_cost", options.json)
    measure_series(options, figures)
    figures.finish()


if __name__ == "__main__":
    main()
