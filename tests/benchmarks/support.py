"""What the tests of benchmarks/ share: its modules, and figures and results that nobody has measured."""
import json
import pathlib
import sys
import tempfile
import unittest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
sys.dont_write_bytecode = True
sys.path.insert(0, str(BENCHMARKS))

import results

# What benchmark_kernels has written; of Google Benchmark's statistics only the medians are left.
KERNELS = json.loads(pathlib.Path(__file__).with_name("kernels.json").read_text("utf-8"))
OPTIMIZER = """64 million parameters, 2 threads, amx
loop                       ms     GB/s of bandwidth %
read                     0.15    26.67           69.7
copy                     0.29    27.95           73.1
a += b                   0.31    40.00          100.0
AdamW fp32               0.66    42.00          105.0
AdamW bf16 moments       0.73    30.00           75.0
"""
OVERLAP = """plan              MiB/step     plain ms  injected ms   delayed ms    exposed %
ddp                   75.0        400.0        200.0        412.0          5.5
zero3                 75.0        400.0        200.0        398.0         -1.0
zero3-gathered       223.0        400.0        200.0        430.0         15.0
"""
COLLECTIVES = """2 ranks, own over shared memory; median microseconds (times as fast as Open MPI, as gloo)
all ranks together copy 5.6 GB/s in memory; a slot is written with 33.2 and read by another core with 32.7 GB/s;
gathering in memory that the ranks have in common takes 14.2 microseconds at any size

| operation | dtype | KiB | Open MPI | gloo | own | own, direct | own, in buffers | own, in buffers, direct |
|---|---|---|---|---|---|---|---|---|
| all_reduce | fp32 | 64 | 20.0 | 200.0 | 50.0 (0.4, 4.0) | 18.5 (1.4, 10.4) | 5.0 (4.0, 40.0) | 20.8 (1.3, 9.3) |
| all_reduce | bf16 | 262144 | 80.0 | 400.0 | 40.0 (2.0, 10.0) | 54.8 (1.0, 8.5) | 20.0 (4.0, 20.0) | 31.5 (1.8, 14.8) |

4 ranks, own over shared memory; median microseconds (times as fast as Open MPI, as gloo)

| operation | dtype | KiB | Open MPI | gloo | own | own, direct | own, in buffers | own, in buffers, direct |
|---|---|---|---|---|---|---|---|---|
| all_reduce | fp32 | 64 | 90.0 | 900.0 | 45.0 (2.0, 20.0) | 18.5 (1.4, 10.4) | 30.0 (3.0, 30.0) | 20.8 (1.3, 9.3) |
"""


class Folder(unittest.TestCase):
    """Tests that have a directory of their own."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = pathlib.Path(temporary.name)


def figure(name="speed", ratio=2.0, spread=0.05, **more):
    fields = {"case": "training", "name": name, "unit": "tokens/s", "value": 100.0, "low": 90.0, "high": 110.0, "count": 5}
    if ratio is not None:
        fields |= {"beside": "a peer", "ratio": ratio, "ratio_low": ratio - spread, "ratio_high": ratio + spread}
    return results.Figure(**(fields | more))


def record(figures, case="training", kind="avx2-4"):
    limits = {"register_gigaflops": {"amx_bf16": 3000.4, "avx2_fp32": 150.2}, "memory_gigabytes_per_second": 18.5,
              "write_megabytes_per_second": 900, "read_megabytes_per_second": 1800}
    return {"format": results.FORMAT, "case": case, "day": "2026-01-02", "is_quick": False, "is_idle": True,
            "machine": {"type": kind, "cores": 4, "flags": ["avx2"], "huge_pages": "madvise"},
            "before": limits | {"others": 0.0, "stolen": 0.0}, "during": {"others": 0.0, "stolen": 0.0}, "after": limits,
            "figures": results.as_records(figures)}


def write_result(folder, figures, case="training", kind="avx2-4"):
    path = pathlib.Path(folder) / kind / f"{case}.json"
    results.write_json(path, record(figures, case, kind))
    return path
