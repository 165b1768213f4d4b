#!/usr/bin/env python3
"""Operators and matrix products beside ATen's, and beside the peak of the registers and of the first-level cache.

    python3 benchmarks/kernels/compare.py PROGRAM [--rows REGEX] [--repeats 5] [--seconds 0.2] [--json FILE]

PROGRAM is build/release/benchmark_kernels. It is started once for each row (an operator at one size and dtype), with the
peaks that the row is compared with: within a few seconds all of them run in random order, each `repeats` times.
"""
import argparse
import os
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import google_benchmark
import machine
import peaks
import results
import tables


def rows_of(names):
    """{row: its dtype} of names FAMILY/SIZES/DTYPE/PASS/SIDE, in their order."""
    return {row: row.rpartition("/")[2] for name in names if not name.startswith("peak/") for row in [name.rsplit("/", 2)[0]]}


def pattern_of(row, dtype, names):
    """Of the row's benchmarks and of the peaks that tables.kernels() wants beside them."""
    unit = peaks.unit_of(dtype, {name.split("/")[1] for name in names if name.startswith("peak/")})
    wants_peaks = unit is not None and f"{row}/".startswith(tables.WITH_PEAKS)
    return f"^({re.escape(row)}/" + (f"|peak/{unit}/)" if wants_peaks else ")")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("--rows", default="", metavar="REGEX", help="only rows in whose name it is found")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each benchmark in each repeat, at least")
    results.add_json_option(parser)
    options = parser.parse_args()
    variables = dict(os.environ) | machine.PROGRAM
    figures = results.Figures("kernels", options.json)
    names = google_benchmark.names(options.program, variables)
    chosen = {row: dtype for row, dtype in rows_of(names).items() if re.search(options.rows, row)}
    if not chosen:
        sys.exit(f"no row matches '{options.rows}': {options.program} --benchmark_list_tests shows all")
    for row, dtype in chosen.items():
        record = google_benchmark.run(options.program, pattern_of(row, dtype, names), repetitions=options.repeats,
                                      seconds=options.seconds, variables=variables)
        figures.include(tables.kernels(record))
    figures.finish()


if __name__ == "__main__":
    try:
        main()
    except results.Problem as error:
        sys.exit(f"compare.py: {error}")
