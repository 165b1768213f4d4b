"""Saving beside torch: python compare.py BENCHMARK_CHECKPOINT DIR [MEBIBYTES [STEP_MS]]

The same amount of fp32 state (1,500 MB) on the same disk, in turn: dd with direct writes, torch.save on one rank, DCP on two
ranks over gloo (save and async_save), benchmark_checkpoint with two ranks. Needs torch (any recent version); prints a table and
the ratios to the aims: stall at most 2 % of torch.save's and 20 % of DCP async's, written at 0.8 of dd's rate.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

SIZES = (768 * 768, 768, 768 * 3072, 3072, 768 * 3072, 768)


def state(num_bytes, cut=1):
    tensors, held, i = {}, 0, 0
    while held < num_bytes:
        numel = SIZES[i % len(SIZES)]
        for field in ("value", "exp_avg", "exp_avg_sq"):
            tensors[f"layer.{i}.{field}"] = torch.full((numel // cut,), 1.0 + i)
        held += numel * 12
        i += 1
    return tensors


def measure_dd(folder, mebibytes):
    target = folder / "dd"
    start = time.perf_counter()
    subprocess.run(["dd", "if=/dev/zero", f"of={target}", "bs=4M", f"count={mebibytes // 4}", "oflag=direct", "conv=fsync"],
                   check=True, capture_output=True)
    seconds = time.perf_counter() - start
    target.unlink()
    return mebibytes * 1.048576 / seconds


def measure_torch_save(folder, num_bytes):
    tensors, times = state(num_bytes), []
    for _ in range(3):
        start = time.perf_counter()
        with open(folder / "torch.pt", "wb") as out:
            torch.save(tensors, out)
            out.flush()
            os.fsync(out.fileno())
        times.append(time.perf_counter() - start)
    (folder / "torch.pt").unlink()
    return sorted(times)[1]


def dcp_rank(rank, folder, num_bytes, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    # Each rank holds its half under names of its own, so that nothing is deduplicated.
    tensors = {f"rank{rank}.{name}": value for name, value in state(num_bytes, cut=2).items()}
    blocking, stalls, durations = [], [], []
    for i in range(3):
        start = time.perf_counter()
        dcp.save(tensors, checkpoint_id=str(folder / f"dcp{i}"))
        blocking.append(time.perf_counter() - start)
    for i in range(3):
        start = time.perf_counter()
        future = dcp.async_save(tensors, checkpoint_id=str(folder / f"async{i}"))
        stalls.append(time.perf_counter() - start)
        future.result()
        durations.append(time.perf_counter() - start)
    if rank == 0:
        results.update(save=sorted(blocking)[1], stall=sorted(stalls)[1], total=sorted(durations)[1])
    dist.destroy_process_group()


def main():
    program, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    mebibytes = int(sys.argv[3]) if len(sys.argv) > 3 else 1432
    step_ms = sys.argv[4] if len(sys.argv) > 4 else "400"
    folder.mkdir(parents=True, exist_ok=True)
    dd_before = measure_dd(folder, mebibytes)
    ours = json.loads(subprocess.run([program, str(folder / "ours"), "2", str(mebibytes), step_ms, "3"], check=True,
                                     capture_output=True, text=True).stdout)
    dd_after = measure_dd(folder, mebibytes)
    shutil.rmtree(folder / "ours")
    torch_seconds = measure_torch_save(folder, mebibytes << 20)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(dcp_rank, args=(folder, mebibytes << 20, results), nprocs=2)
        results = dict(results)
    shutil.rmtree(folder)
    dd = (dd_before + dd_after) / 2
    print(f"state {mebibytes} MiB, steps of {step_ms} ms; torch {torch.__version__}")
    print(f"dd oflag=direct                {dd:8.0f} MB/s ({dd_before:.0f} before, {dd_after:.0f} after)")
    print(f"shardtune, training held up    {1e3 * ours['stall_seconds']:8.1f} ms of a save; committed after {ours['commit_seconds']:.2f} s, "
          f"written at {ours['write_megabytes_per_second']:.0f} MB/s = {ours['write_megabytes_per_second'] / dd:.2f} of dd")
    print(f"shardtune, copied on update    {ours['copied_megabytes']:8.0f} MB; a step takes {1e3 * ours['step_seconds']:.0f} ms, "
          f"{1e3 * ours['step_seconds_during_save']:.0f} ms during a save ({ours['step_seconds_during_save'] / ours['step_seconds'] - 1:+.1%})")
    print(f"shardtune, save in between     {1e3 * ours['save_in_between_seconds']:8.0f} ms; load at {ours['load_megabytes_per_second']:.0f} MB/s")
    print(f"torch.save + fsync, one rank   {1e3 * torch_seconds:8.0f} ms; our stall is {ours['stall_seconds'] / torch_seconds:.1%} of it (aim: 2 %)")
    print(f"DCP save, two ranks            {1e3 * results['save']:8.0f} ms")
    print(f"DCP async_save, held up        {1e3 * results['stall']:8.0f} ms (written after {results['total']:.2f} s); "
          f"our stall is {ours['stall_seconds'] / results['stall']:.1%} of it (aim: 20 %)")


if __name__ == "__main__":
    main()
