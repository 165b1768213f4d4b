"""Figures out of what the C++ benchmarks print or write, one function a program; README.md beside each says what it measures."""
import re

import google_benchmark
import peaks
from results import Problem, make_figure

OVERLAP_SHARE = 0.10  # of the communication may show
# Products reach at least this share of the peak. Attention of GPT-2's shape reaches at least this many GFLOP/s on two cores with
# avx512_bf16, where the peak of the registers was measured at ATTENTION_PEAK; elsewhere the same share of the peak.
PRODUCT_SHARE, ATTENTION_RATE, ATTENTION_PEAK = 0.9, 300, 469
WITH_PEAKS = ("linear/", "attention/4x1024/12x64/causal/bf16/")  # what is compared with the peaks as well


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def number(case, line, text):
    """A positive one: times and rates."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise Problem(f"{case}: '{text}' is no number above zero in the line '{line.strip()}': run the program by hand, and change "
                      "benchmarks/tables.py where its output has changed")
    return value


def found(case, figures):
    if not figures:
        raise Problem(f"{case}: no table row in the program's output: run it by hand, and change benchmarks/tables.py where its output "
                      "has changed")
    return figures


def kernels(record):
    """What Google Benchmark writes about names FAMILY/SIZES/DTYPE/PASS/{own,aten} and peak/UNIT/{registers,l1}."""
    rates, figures = google_benchmark.rates(record), []
    units = {name.split("/")[1] for name in rates if name.startswith("peak/")}
    for name, (kind, own) in rates.items():
        base, _, side = name.rpartition("/")
        if name.startswith("peak/") or side != "own":
            continue
        if len(rates.get(base + "/aten", ("", []))[1]) != len(own):
            raise Problem(f"kernels: {base}: not as many results of ATen as of the own kernel: run both with the same filter")
        unit = "GFLOP/s" if kind == "FLOP/s" else "GB/s"
        values = [[value / 1e9] for value in own]
        figures.append(make_figure("kernels", base, unit, values, peer=per_repeat(rates, base + "/aten"), beside="ATen", aim=1))
        peak = peaks.unit_of(base.split("/")[-2], units)
        if kind == "FLOP/s" and peak is not None and base.startswith(WITH_PEAKS):
            figures += beside_peaks(base, values, peak, rates, record)
    return found("kernels", figures)


def per_repeat(rates, name):
    return [[value / 1e9] for value in rates[name][1]]


def beside_peaks(base, values, peak, rates, record):
    """Shares of products, and of attention at GPT-2's shape."""
    def share(where, beside, aim):
        return make_figure("kernels", base, "GFLOP/s", values, peer=per_repeat(rates, f"peak/{peak}/{where}"), beside=beside, aim=aim)

    registers, l1 = f"{peak} in registers", f"{peak} from the first-level cache"
    if base.startswith("linear/"):
        return [share("registers", registers, PRODUCT_SHARE), share("l1", l1, PRODUCT_SHARE)]
    context = record.get("context", {})
    if (context.get("instruction_set"), context.get("threads")) == ("avx512_bf16", "2"):
        return [make_figure("kernels", f"{base}, alone", "GFLOP/s", values, aim=ATTENTION_RATE), share("registers", registers, None)]
    return [share("registers", registers, ATTENTION_RATE / ATTENTION_PEAK)]


def optimizer(output):
    """loop, ms, GB/s, share of the bandwidth in %: three plain loops first, whose best is the bandwidth."""
    figures = []
    rows = re.findall(r"^(\S.*?) +([\d.]+) +([\d.]+) +([\d.]+)$", output, re.MULTILINE)
    plain = ("read", "copy", "a += b")
    bandwidth = max((number("optimizer", name, rate) for name, _, rate, _ in rows if name in plain), default=None)
    for name, milliseconds, rate, _ in rows:
        if name in plain or bandwidth is None:
            continue
        figures.append(make_figure("optimizer", name, "GB/s", [[number("optimizer", name, rate)]], peer=[[bandwidth]],
                                   beside="the best plain loop", aim=0.7 if name == "AdamW fp32" else None))
    return found("optimizer", figures)


def overlap(output):
    """plan, MiB/step, plain ms, injected ms, delayed ms, exposed %: the ratio is that of steps with and without communication."""
    figures = []
    for line in output.splitlines():
        row = line.split()
        if len(row) != 6 or row[0] == "plan":
            continue
        plain, injected, _ = (number("overlap", line, text) for text in row[2:5])
        share = injected / plain
        delayed = plain + injected * float(row[5]) / 100  # by the median of pairs, steadier than the median of delayed steps
        aim = 1 + OVERLAP_SHARE * share if row[0] in ("ddp", "zero3") else None
        figures.append(make_figure("overlap", f"{row[0]}, step with communication of {share:.1f} times its length", "ms", [[delayed]],
                                   peer=[[plain]], beside="the step without", aim=aim, more_is_better=False))
    return found("overlap", figures)


def collectives(output):
    """| operation | dtype | KiB | Open MPI | gloo | own | ..., microseconds, a table for each number of ranks.

    Of the own columns those that go through the communication thread, as the program's calls do.
    """
    figures, ranks, columns = [], None, []
    for line in output.splitlines():
        if match := re.match(r"(\d+) ranks, own over", line):
            ranks = int(match[1])
        row = cells(line)
        if row[0] == "operation":
            columns = row
        if ranks is None or not columns or not line.startswith("|") or row[0] == "operation" or row[0].startswith("---"):
            continue
        if len(row) != len(columns):
            raise Problem(f"collectives: {len(row)} cells under {len(columns)} headings in the line '{line}'")
        texts = dict(zip(columns, row))
        for own in ("own", "own, in buffers"):
            for peer, aim in (("Open MPI", 3), ("gloo", 10)):
                microseconds = [number("collectives", line, texts.get(name, "").partition(" (")[0]) for name in (own, peer)]
                is_aimed_at = own == "own, in buffers" and ranks == 2 and int(texts["KiB"]) <= 32 << 10
                figures.append(make_figure(
                    "collectives", f"{texts['operation']} {texts['dtype']}, {texts['KiB']} KiB, {ranks} ranks, {own}", "us",
                    [[microseconds[0]]], peer=[[microseconds[1]]], is_times_as_fast=True, beside=peer, aim=aim if is_aimed_at else None))
    return found("collectives", figures)
