#!/usr/bin/env python3
"""What the same bits at any number of ranks cost: steps with --reduction tree beside --reduction fast.

    python3 benchmarks/reduction.py PROGRAM [--shape minilm|llama124m] [--ranks 2] [--plans ddp,zero3] [--accumulation 1,4]
                                            [--steps 12] [--repeats 3] [--bf16] [--json FILE]

PROGRAM is build/release/shardtune. Runs of both alternate, the first two steps of each are dropped; the cost is the
difference of the medians as a share of a step with fast. Random weights and rows; nothing is read or downloaded. Aim: at
most 5 %. The ranks need a core each, and an idle machine: below some 20 steps per figure noise is larger than the cost.
"""
import statistics

import results
import steps

MOST = 1.05  # times the step with fast


def main():
    parser = steps.argument_parser(__doc__, shape="minilm")
    parser.add_argument("--accumulation", default="1,4")
    options = parser.parse_args()
    figures = results.Figures("reduction", options.json)
    print(f"{steps.describe(options)}, {options.ranks} ranks")
    print(f"{'plan':8} {'accumulation':>12} {'tree ms':>10} {'fast ms':>10} {'cost %':>8}")
    with steps.inputs(options) as folder:
        for plan in options.plans:
            for accumulation in map(int, options.accumulation.split(",")):
                arguments = ["--sharding", plan, "--gradient_accumulation_steps", accumulation]
                if plan == "hsdp":
                    arguments += ["--hsdp_shard_size", max(1, options.ranks // 2)]
                both = steps.milliseconds(
                    options, folder, [(options.ranks, arguments + ["--reduction", order]) for order in ("tree", "fast")])
                tree, fast = (statistics.median(results.flat(repeats)) for repeats in both)
                print(f"{plan:8} {accumulation:12} {tree:10.1f} {fast:10.1f} {100 * (tree - fast) / fast:8.1f}", flush=True)
                figures.add(f"{steps.describe(options)}, {options.ranks} ranks, {plan}, {accumulation} micro-batches a step", "ms", both[0],
                            peer=both[1], beside="--reduction fast", aim=MOST, more_is_better=False)
    figures.finish()


if __name__ == "__main__":
    main()
