"""docs/benchmarks.md and its plots out of recorded results."""
import pathlib

import plots
import results

HEAD = """# Benchmarks

Rendered by `benchmarks/run --report` from `benchmarks/results`; change those, not this page. How each figure is taken:
[benchmarks](../benchmarks/README.md).

Values and ratios are medians, in brackets the least and the greatest of the repeats. A ratio compares with the peer in the same
minutes: how many times as fast or as much where more is better, which share of the peer's time, memory or step where less is. An aim
is one of the ratio; of the value where there is no peer.
"""


def span(middle, low, high):
    texts = [f"{number:.3g}" if abs(number) < 100 else f"{number:.0f}" for number in (middle, low, high)]
    return texts[0] if low == high else f"{texts[0]} ({texts[1]} to {texts[2]})"


def ratio_text(figure):
    return "" if figure.ratio is None else span(figure.ratio, figure.ratio_low, figure.ratio_high)


def aim_text(figure):
    return "" if figure.aim is None else f"{'at least' if figure.more_is_better else 'at most'} {figure.aim:.3g}"


def rows(heading, lines):
    """A Markdown table."""
    table = [heading, ["---"] * len(heading), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in table) + "\n"


def figures_table(figures):
    lines = []
    for figure in figures:
        met = "" if figure.aim is None else "**missed**" if figure.has_missed else "met"
        value = f"{span(figure.value, figure.low, figure.high)} {figure.unit}".strip()
        lines.append([figure.name, value, figure.count, figure.beside or "", ratio_text(figure), aim_text(figure), met])
    return rows(["figure", "value", "measurements", "beside", "ratio", "aim", ""], lines)


def why_lost(figure):
    """None for a figure that reaches its aim and its peer; one whose best repeat does so is within the spread."""
    if not figure.has_missed and not figure.is_behind:
        return None
    bar = figure.aim if figure.has_missed else 1
    low, high = (figure.low, figure.high) if figure.ratio is None else (figure.ratio_low, figure.ratio_high)
    within = ", within the spread" if (high >= bar if figure.more_is_better else low <= bar) else ""
    if figure.has_missed:
        return "aim missed" + within
    return "behind its peer" + within + (", aim met" if figure.aim is not None else "")


def lost_section(found):
    lines = [[result.record["machine"]["type"], figure.case, figure.name, figure.beside or "", ratio_text(figure) or
              span(figure.value, figure.low, figure.high), aim_text(figure), why]
             for result in found for figure in result.figures if (why := why_lost(figure))]
    if not lines:
        return "## What lost\n\nNothing is below its aim or behind its peer.\n"
    return f"## What lost\n\n{len(lines)} of {sum(len(result.figures) for result in found)} figures are below their aim or behind their " \
        "peer.\n\n" + rows(["machine", "case", "figure", "beside", "ratio or value", "aim", "why"], lines)


def limits_text(limits):
    registers = ", ".join(f"{unit} {rate:.0f}" for unit, rate in limits.get("register_gigaflops", {}).items())
    parts = [f"all cores multiply in registers {registers} GFLOP/s" if registers else "",
             f"read and write {limits['memory_gigabytes_per_second']} GB/s of memory" if "memory_gigabytes_per_second" in limits else "",
             f"direct writes {limits['write_megabytes_per_second']} and reads {limits['read_megabytes_per_second']} MB/s"
             if "write_megabytes_per_second" in limits and "read_megabytes_per_second" in limits else ""]
    return ", ".join(filter(None, parts)) or "not measured"


def case_section(result, about, plot):
    record = result.record
    notes = [f"{about[0].upper()}{about[1:]}. Measured {record['day']}{', quick' if record['is_quick'] else ''}. "
             f"Limits before: {limits_text(record['before'])}; after: {limits_text(record['after'])}."]
    if not record["is_idle"]:
        notes.append("**The machine was not idle: these are no figures to rely on.**")
    if plot:
        notes.append(f"![ratios of {record['case']}]({plot})")
    return f"### {record['case']}\n\n" + "\n\n".join(notes) + "\n\n" + figures_table(result.figures)


def write(folder, docs, abouts):
    """Writes docs/benchmarks.md and docs/plots/*.svg; `abouts` says in words what each case measures. Returns what was written."""
    files = sorted(pathlib.Path(folder).glob("*/*.json"))
    if not files:
        raise results.Problem(f"{folder}: no results (MACHINE TYPE/CASE.json) to report: record some with benchmarks/run first")
    found, written, sections, kind = [results.load_result(path) for path in files], [], [], None
    for result in found:
        machine, case = result.record["machine"], result.record["case"]
        if case not in abouts:
            raise results.Problem(f"{folder}/{machine['type']}/{case}.json: no case is called '{case}' (known: {', '.join(abouts)}): "
                                  "remove the file")
        if machine["type"] != kind:
            kind = machine["type"]
            sections.append(f"## {kind}\n\n{machine['cores']} cores with {', '.join(map(str, machine['flags'])) or 'no vector flags'}; "
                            f"huge pages: {machine['huge_pages']}.\n")
        chosen, plot = plots.plotted(result.figures), None
        if chosen:
            plot = f"plots/{kind}-{case}.svg"
            written.append(docs / plot)
            written[-1].parent.mkdir(parents=True, exist_ok=True)
            written[-1].write_text(plots.bar_plot(f"{case} on {kind}", chosen), "utf-8")
        text = case_section(result, abouts[case], plot)
        num_left_out = sum(figure.ratio is not None for figure in result.figures) - len(chosen)
        sections.append(text if num_left_out == 0 else f"{text}\nThe plot shows the {len(chosen)} lowest ratios.\n")
    written.append(docs / "benchmarks.md")
    written[-1].write_text("\n".join([HEAD, lost_section(found), *sections]), "utf-8")
    return written
