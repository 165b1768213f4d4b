"""Figures out of what the C++ benchmarks print, one function a program; README.md beside each says what it measures."""
import re

from results import Problem, make_figure

OVERLAP_SHARE = 0.10  # of the communication may show


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


def kernels(output):
    """| operator | forward, own | ATen | times | both, own | ATen | times |, and | tokens x in x out | y, own | ATen | dx ... |"""
    figures = []
    for line in output.splitlines():
        row = cells(line)
        if not line.startswith("|") or len(row) != 7 or row[0] in ("operator", "tokens x in x out") or row[0].startswith("---"):
            continue
        is_product = re.fullmatch(r"\d+ x \d+ x \d+", row[0])
        groups = {"y": 1, "dx": 3, "dW": 5} if is_product else {"forward": 1, "forward and backward": 4}
        for what, at in groups.items():
            own, aten = (number("kernels", line, text) for text in row[at:at + 2])
            name = f"bf16 product {row[0]}, {what}" if is_product else f"{row[0]}, {what}"
            figures.append(make_figure("kernels", name, "GFLOP/s" if is_product else "ms", [[own]], peer=[[aten]], beside="ATen",
                                       is_times_as_fast=not is_product))
    return found("kernels", figures)


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
