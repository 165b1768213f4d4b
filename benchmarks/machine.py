"""The machine under measurement: what kind it is, what it can do in this minute, and whether it has anything else to do."""
import os
import pathlib
import resource
import subprocess
import time

import peaks

FLAGS = ("avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile")  # that matter
MIB = 1 << 20
CPUINFO = pathlib.Path("/proc/cpuinfo")
# What launcher/front.cpp sets where the threads fit the cores: for programs started without it.
PROGRAM_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
PROGRAM = PROGRAM_MALLOC | {"GOMP_SPINCOUNT": "10000"}
if "GenuineIntel" in CPUINFO.read_text() and "avx2" in CPUINFO.read_text():
    PROGRAM |= {"MKL_CBWR": "AUTO,STRICT"}
# Idle: at most this much of a core per core of load before the first case, and this share of the time of our cores taken by
# others, or by other machines on the same host (steal), while nothing or only a driver of ours runs.
MOST_LOAD, MOST_OTHERS, MOST_STOLEN = 0.5, 0.05, 0.02
SAMPLE_SECONDS = 2


def cores():
    return sorted(os.sched_getaffinity(0))


def flags_of(cpuinfo):
    line = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return [flag for flag in FLAGS if flag in line.partition(":")[2].split()]


def instruction_set(flags):
    """The kernels' choice, by the conditions of kernels/instruction_set.cpp."""
    has = set(flags).issuperset
    if not has(("avx512f", "avx512bw", "avx512dq", "avx512vl")):
        return "avx2" if has(("avx2",)) else "portable"
    if not has(("avx512_bf16",)):
        return "avx512"
    return "amx" if has(("amx_bf16", "amx_tile")) else "avx512_bf16"


def describe():
    flags = flags_of(CPUINFO.read_text())
    try:
        pages = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        pages = pages[pages.index("[") + 1:pages.index("]")]
    except (OSError, ValueError):
        pages = "unknown"
    return {"type": f"{instruction_set(flags)}-{len(cores())}", "cores": len(cores()), "flags": flags, "huge_pages": pages}


def disk_rates(folder, mebibytes):
    """MB/s of direct writes (until they are durable) and direct reads in the folder; OSError where its file system has none."""
    target, rates = pathlib.Path(folder) / "dd", []
    try:
        for arguments in (["if=/dev/zero", f"of={target}", "oflag=direct", "conv=fsync"], [f"if={target}", "of=/dev/null", "iflag=direct"]):
            start = time.perf_counter()
            done = subprocess.run(["dd", "bs=4M", f"count={mebibytes // 4}", *arguments], capture_output=True, text=True)
            if done.returncode != 0:
                raise OSError(done.stderr.strip().splitlines()[-1])
            rates.append(mebibytes * MIB / 1e6 / (time.perf_counter() - start))
    finally:
        target.unlink(missing_ok=True)
    return rates


def peaks_of(build):
    """As peaks.measure(), in this minute; None where the build folder has no benchmark_kernels."""
    program = pathlib.Path(build) / "benchmark_kernels"
    return peaks.measure(program, dict(os.environ) | PROGRAM) if os.access(program, os.X_OK) else None


def limits(folder, mebibytes, build):
    """This minute's: the cores' where their program is built, the disk's where it can be asked, else why not."""
    found, measured = {}, peaks_of(build)
    if measured is not None:
        found = {"register_gigaflops": {unit: round(rate, 1) for unit, rate in measured["registers"].items()},
                 "memory_gigabytes_per_second": round(measured["memory"], 2)}
    try:
        write, read = disk_rates(folder, mebibytes)
        found |= {"write_megabytes_per_second": round(write), "read_megabytes_per_second": round(read)}
    except OSError as error:
        found["no_disk_rates"] = str(error).replace(str(folder), "DIR")
    return found


def core_seconds(stat, numbers, ticks):
    """(busy, stolen, all) seconds of the cores since the machine started, out of the text of /proc/stat."""
    busy = stolen = everything = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in numbers:
            user, nice, system, idle, waiting, interrupts, soft, steal = map(int, fields[:8])
            working = user + nice + system + interrupts + soft
            busy, stolen, everything = busy + working, stolen + steal, everything + working + idle + waiting + steal
    return busy / ticks, stolen / ticks, everything / ticks


class Watch:
    """From its making on: which share of our cores' time others have taken, in this machine and outside of it."""

    def __init__(self):
        self.start = self.now()

    @staticmethod
    def now():
        """Busy, stolen and all seconds of the cores, and those of this process and of what it has started and seen end."""
        own = sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
        return *core_seconds(pathlib.Path("/proc/stat").read_text(), cores(), os.sysconf("SC_CLK_TCK")), own

    def shares(self):
        return shares(self.start, self.now())


def shares(before, after):
    """{"others", "stolen"} of all time between two readings of Watch.now()."""
    busy, stolen, everything, own = (late - early for early, late in zip(before, after))
    everything = max(everything, 1e-9)
    return {"others": round(max(0.0, busy - own) / everything, 4), "stolen": round(max(0.0, stolen) / everything, 4)}


def sample():
    """The shares of a few seconds in which nothing of ours runs."""
    watch = Watch()
    time.sleep(SAMPLE_SECONDS)
    return watch.shares()


def complaint(found, num_cores):
    """Why the machine is not idle by {"others", "stolen"} and, where it is asked about, "load"; None when it is."""
    if found.get("load", 0) > MOST_LOAD * num_cores:
        return f"the load average is {found['load']:.2f} on {num_cores} cores (idle: at most {MOST_LOAD * num_cores:.2f})"
    if found["others"] > MOST_OTHERS:
        return f"other processes take {found['others']:.1%} of the cores' time (idle: at most {MOST_OTHERS:.0%})"
    if found["stolen"] > MOST_STOLEN:
        return f"the host takes {found['stolen']:.1%} of the cores' time for others, steal (idle: at most {MOST_STOLEN:.0%})"
    return None
