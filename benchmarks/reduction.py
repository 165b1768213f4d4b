#!/usr/bin/env python3
"""What the same bits at any number of ranks cost: steps with --reduction tree beside --reduction fast.

    python3 benchmarks/reduction.py PROGRAM [--shape minilm|llama124m] [--ranks 2] [--plans ddp,zero3] [--accumulation 1,4]
                                            [--steps 12] [--repeats 3] [--bf16]

PROGRAM is build/release/shardtune. Runs of both alternate, the first two steps of each are dropped; the cost is the
difference of the medians as a share of a step with fast. Random weights and rows; nothing is read or downloaded. Aim: at
most 5 %. The ranks need a core each, and an idle machine: below some 20 steps per figure noise is larger than the cost.
"""
import steps


def main():
    parser = steps.argument_parser(__doc__, shape="minilm")
    parser.add_argument("--accumulation", default="1,4")
    options = parser.parse_args()
    print(f"{options.shape}, {options.ranks} ranks, {'bf16' if options.bf16 else 'fp32'}")
    print(f"{'plan':8} {'accumulation':>12} {'tree ms':>10} {'fast ms':>10} {'cost %':>8}")
    with steps.inputs(options) as folder:
        for plan in options.plans:
            for accumulation in map(int, options.accumulation.split(",")):
                arguments = ["--sharding", plan, "--gradient_accumulation_steps", accumulation]
                if plan == "hsdp":
                    arguments += ["--hsdp_shard_size", max(1, options.ranks // 2)]
                tree, fast = steps.median_milliseconds(
                    options, folder, [(options.ranks, arguments + ["--reduction", order]) for order in ("tree", "fast")])
                print(f"{plan:8} {accumulation:12} {tree:10.1f} {fast:10.1f} {100 * (tree - fast) / fast:8.1f}", flush=True)


if __name__ == "__main__":
    main()
