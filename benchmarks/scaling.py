#!/usr/bin/env python3
"""What more ranks bring: steps of one rank with one thread beside steps of several with one thread each.

    python3 benchmarks/scaling.py PROGRAM [--shape llama124m|minilm] [--ranks 2] [--plans ddp,zero3] [--steps 12] [--repeats 3]
                                          [--bf16] [--json FILE]

PROGRAM is build/release/shardtune. Every rank has the same number of rows, so that N ranks do N times the work; the efficiency is the
time of a step of one rank as a share of that of all. What the ranks take from each other without a word (memory bandwidth, caches,
clock) is measured, too: as many jobs of one rank each, at the same time; what is slower than that is communication. Runs
alternate, the first two steps of each are dropped, medians. Random weights and rows. The ranks need a core each, and an idle
machine. Aim: 0.95 at 2 ranks.
"""
import statistics

import results
import steps

AIMS = {2: 0.95}  # by number of ranks


def main():
    options = steps.argument_parser(__doc__, shape="llama124m").parse_args()
    figures = results.Figures("scaling", options.json)
    print(steps.describe(options))
    ranks = options.ranks
    print(f"{'plan':8} {'1 rank ms':>10} {f'{ranks} jobs ms':>11} {f'{ranks} ranks ms':>12} {'efficiency':>11} {'of jobs':>8}")
    with steps.inputs(options) as folder:
        for plan in options.plans:
            arguments = ["--sharding", plan]
            all_three = steps.milliseconds(options, folder, [(1, arguments), (1, arguments, ranks), (ranks, arguments)])
            one, jobs, together = (statistics.median(results.flat(repeats)) for repeats in all_three)
            print(f"{plan:8} {one:10.1f} {jobs:11.1f} {together:12.1f} {one / together:11.3f} {jobs / together:8.3f}", flush=True)
            for peer, beside, aim in ((all_three[0], "one rank", AIMS.get(ranks)), (all_three[1], f"{ranks} jobs of one rank", None)):
                figures.add(f"{steps.describe(options)}, {plan}, {ranks} ranks", "ms", all_three[2], peer=peer, beside=beside, aim=aim,
                            is_times_as_fast=True)
    figures.finish()


if __name__ == "__main__":
    main()
