"""Runs a program made with Google Benchmark and reads the JSON that it writes."""
import json
import pathlib
import subprocess
import tempfile

from results import Problem

RATES = ("FLOP/s", "bytes/s")  # counters of our programs
SUFFIX = "/real_time"          # of names that are timed by the clock on the wall, as all of ours are


def names(program, variables):
    listed = start([program, "--benchmark_list_tests"], variables)
    return [line.removesuffix(SUFFIX) for line in listed.splitlines()]


def start(command, variables):
    done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True, env=variables)
    if done.returncode != 0:
        raise Problem(f"{' '.join(map(str, command))} has ended with exit code {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def run(program, pattern, *, repetitions, seconds, variables):
    """What the program writes about all benchmarks that match: each at least `seconds` in every repetition, all in random order."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "out.json"
        start([program, f"--benchmark_filter={pattern}", f"--benchmark_min_time={seconds}", f"--benchmark_repetitions={repetitions}",
               "--benchmark_enable_random_interleaving=true", f"--benchmark_out={file}", "--benchmark_out_format=json"], variables)
        try:
            return json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise Problem(f"{program}: its JSON cannot be read: {error}: run it by hand with --benchmark_out=FILE") from None


def rates(record):
    """{name: (one of RATES, its value in every repetition)}, in the program's order."""
    found = {}
    try:
        runs = [entry for entry in record["benchmarks"] if entry["run_type"] == "iteration"]  # the others are statistics
        for entry in sorted(runs, key=lambda entry: (entry["family_index"], entry["repetition_index"])):
            name = entry["run_name"].removesuffix(SUFFIX)
            kind = next((kind for kind in RATES if kind in entry), None)
            value = entry.get(kind)
            if entry.get("error_occurred") or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise Problem(f"{name}: {' or '.join(RATES)} is {json.dumps(value)} in the program's JSON, no number above zero "
                              f"({entry.get('error_message', 'no error reported')}): run the program by hand")
            found.setdefault(name, (kind, []))[1].append(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise Problem(f"this is not what Google Benchmark writes ({error!r}): run the program by hand with --benchmark_out=FILE") from None
    if not found:
        raise Problem("no benchmark in the program's JSON: the filter matches none")
    return found
