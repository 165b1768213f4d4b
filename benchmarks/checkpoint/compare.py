"""Saving and loading beside torch: python compare.py BENCHMARK_CHECKPOINT DIR [MEBIBYTES [STEP_MS...]] [--json FILE]

The same amount of fp32 state (1,500 MB) on the same disk, in turn: dd with direct writes and reads, torch.save and torch.load on
one rank, DCP on two ranks over gloo (save, async_save, load), benchmark_checkpoint with two ranks for each length of step. Loads find nothing in
the page cache. Needs torch (scripts/parity --python has it); prints figures and their ratios to the aims: stall at most 2 % of
torch.save's and 20 % of DCP async's, written at 0.8 of dd's rate, loaded at 0.8 of dd's, steps at most 10 % slower during a save.
"""
import argparse
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

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import machine
import results

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


def drop_from_cache(path):
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def measure_torch_save(folder, num_bytes):
    tensors, times, loads = state(num_bytes), [], []
    for _ in range(3):
        start = time.perf_counter()
        with open(folder / "torch.pt", "wb") as out:
            torch.save(tensors, out)
            out.flush()
            os.fsync(out.fileno())
        times.append(time.perf_counter() - start)
        drop_from_cache(folder / "torch.pt")
        start = time.perf_counter()
        torch.load(folder / "torch.pt")
        loads.append(time.perf_counter() - start)
    (folder / "torch.pt").unlink()
    return sorted(times)[1], sorted(loads)[1]


def dcp_rank(rank, folder, num_bytes, shared):
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
        drop_from_cache(folder / "dcp2")
    dist.barrier()
    start = time.perf_counter()
    dcp.load(tensors, checkpoint_id=str(folder / "dcp2"))
    dist.barrier()
    if rank == 0:
        shared.update(load=time.perf_counter() - start, save=sorted(blocking)[1], stall=sorted(stalls)[1], total=sorted(durations)[1])
    dist.destroy_process_group()


def measure_ours(program, folder, mebibytes, step_ms):
    before = machine.disk_rates(folder, mebibytes)
    ours = json.loads(subprocess.run([program, str(folder / "ours"), "2", str(mebibytes), step_ms, "3"], check=True,
                                     capture_output=True, text=True, env=os.environ | machine.PROGRAM_MALLOC).stdout)
    shutil.rmtree(folder / "ours")
    return ours, before, machine.disk_rates(folder, mebibytes)


def print_ours(step_ms, ours, before, after):
    step, during = ours["step_seconds"], ours["step_seconds_during_save"]
    print(f"shardtune, steps of {step_ms} ms")
    print(f"  training held up     {1e3 * ours['stall_seconds']:8.1f} ms of a save, {ours['copied_megabytes']:.0f} MB copied on update "
          f"(copying {1e3 * ours['copy_seconds']:.1f} ms, waiting {1e3 * ours['wait_seconds']:.1f} ms)")
    print(f"  steps                {1e3 * step:8.0f} ms, {1e3 * during:.0f} ms during a save ({during / step - 1:+.1%}); "
          f"a save costs {1e3 * ours['lost_seconds_per_save']:.0f} ms in all")
    print(f"  written              {ours['write_megabytes_per_second']:8.0f} MB/s; dd {before[0]:.0f} before, "
          f"{after[0]:.0f} after; committed after {ours['commit_seconds']:.2f} s")
    print(f"  save in between      {1e3 * ours['save_in_between_seconds']:8.0f} ms")
    print(f"  loaded               {ours['load_megabytes_per_second']:8.0f} MB/s; dd {before[1]:.0f} before, "
          f"{after[1]:.0f} after", flush=True)


def report_ours(figures, title, ours, dd, peers):
    """`dd`: (write, read) rates, MB/s; `peers`: seconds of torch and of DCP."""
    write, read = dd
    stall, save, load = 1e3 * ours["stall_seconds"], 1e3 * ours["save_in_between_seconds"], ours["load_megabytes_per_second"]

    def add(what, unit, value, peer, beside, **more):
        figures.add(f"{what}, {title}", unit, [[value]], peer=[[peer]], beside=beside, **more)

    add("written", "MB/s", ours["write_megabytes_per_second"], write, "dd, direct", aim=0.8)
    add("loaded", "MB/s", load, read, "dd, direct", aim=0.8)
    add("loaded", "MB/s", load, ours["state_megabytes"] / peers["torch_load"], "torch.load")
    add("loaded", "MB/s", load, ours["state_megabytes"] / peers["load"], "DCP")
    add("training held up by a save", "ms", stall, 1e3 * peers["torch_save"], "torch.save", aim=0.02, more_is_better=False)
    add("training held up by a save", "ms", stall, 1e3 * peers["stall"], "DCP async_save", aim=0.2, more_is_better=False)
    add("step during a save", "ms", 1e3 * ours["step_seconds_during_save"], 1e3 * ours["step_seconds"], "steps without", aim=1.1,
        more_is_better=False)
    add("save that is waited for", "ms", save, 1e3 * peers["torch_save"], "torch.save", is_times_as_fast=True)
    add("save that is waited for", "ms", save, 1e3 * peers["save"], "DCP", is_times_as_fast=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("mebibytes", nargs="?", type=int, default=1432)
    parser.add_argument("step_ms", nargs="*")
    results.add_json_option(parser)
    options = parser.parse_args()
    program, folder, mebibytes, steps = options.program, options.folder, options.mebibytes, options.step_ms or ["400", "2000"]
    folder.mkdir(parents=True, exist_ok=True)
    ours = [measure_ours(program, folder, mebibytes, step_ms) for step_ms in steps]
    torch_save, torch_load = measure_torch_save(folder, mebibytes << 20)
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(dcp_rank, args=(folder, mebibytes << 20, shared), nprocs=2)
        peers = {**shared, "torch_save": torch_save, "torch_load": torch_load}
    shutil.rmtree(folder)
    print(f"state {mebibytes} MiB; torch {torch.__version__}")
    for step_ms, (measured, before, after) in zip(steps, ours):
        print_ours(step_ms, measured, before, after)
    print(f"torch, one rank        {1e3 * torch_save:8.0f} ms save + fsync, {1e3 * torch_load:.0f} ms load ({mebibytes * 1.048576 / torch_load:.0f} MB/s)")
    print(f"DCP, two ranks         {1e3 * peers['save']:8.0f} ms save, {1e3 * peers['load']:.0f} ms load ({mebibytes * 1.048576 / peers['load']:.0f} MB/s)")
    print(f"DCP async_save         {1e3 * peers['stall']:8.0f} ms held up, written after {peers['total']:.2f} s")
    figures = results.Figures("checkpoint", options.json)
    for step_ms, (measured, before, after) in zip(steps, ours):
        rates = [(first + last) / 2 for first, last in zip(before, after)]
        report_ours(figures, f"{mebibytes} MiB, steps of {step_ms} ms", measured, rates, peers)
    figures.finish()


if __name__ == "__main__":
    main()
