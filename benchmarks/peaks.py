"""The most that the machine's cores multiply and copy, by the benchmarks peak/... of benchmark_kernels."""
import google_benchmark

UNITS = {"bf16": ("amx_bf16", "avx512_bf16", "avx512_fp32", "avx2_fp32"), "fp32": ("avx512_fp32", "avx2_fp32")}  # the fastest first


def unit_of(dtype, known):
    """The unit whose peak products of the dtype are measured by, of those known; None where there is none."""
    return next((unit for unit in UNITS[dtype] if unit in known), None)


def measure(program, variables, *, repetitions=3, seconds=0.1):
    """{"registers": {unit: GFLOP/s}, "memory": GB/s read and written}, the best of the repetitions."""
    found = google_benchmark.rates(google_benchmark.run(program, "^peak/(.*/registers|memory/copy)", repetitions=repetitions,
                                                        seconds=seconds, variables=variables))
    best = {name.removeprefix("peak/"): max(values) / 1e9 for name, (_, values) in found.items()}
    return {"registers": {name.partition("/")[0]: rate for name, rate in best.items() if name.endswith("/registers")},
            "memory": best["memory/copy"]}
