#!/usr/bin/env python3
"""What more ranks bring: steps of one rank with one thread beside steps of several with one thread each.

    python3 benchmarks/scaling.py PROGRAM [--shape llama124m|minilm] [--ranks 2] [--plans ddp,zero3] [--steps 12] [--repeats 3]
                                          [--bf16]

PROGRAM is build/release/shardtune. Every rank has the same number of rows, so that N ranks do N times the work; the efficiency is the
time of a step of one rank as a share of that of all, the difference is what communication shows (and what the ranks take from
each other: caches and memory are theirs in common). Runs alternate, the first two steps of each are dropped, medians. Random
weights and rows. The ranks need a core each, and an idle machine. Aim: 0.95 at 2 ranks.
"""
import steps


def main():
    options = steps.argument_parser(__doc__, shape="llama124m").parse_args()
    print(f"{options.shape}, {'bf16' if options.bf16 else 'fp32'}")
    print(f"{'plan':8} {'1 rank ms':>10} {str(options.ranks) + ' ranks ms':>12} {'exposed ms':>11} {'efficiency':>11}")
    with steps.inputs(options) as folder:
        for plan in options.plans:
            one, all_ranks = steps.median_milliseconds(options, folder,
                                                       [(ranks, ["--sharding", plan]) for ranks in (1, options.ranks)])
            print(f"{plan:8} {one:10.1f} {all_ranks:12.1f} {all_ranks - one:11.1f} {one / all_ranks:11.3f}", flush=True)


if __name__ == "__main__":
    main()
