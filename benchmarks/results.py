"""What a benchmark has measured: figures, the files that hold them, and how a driver reports them.

A figure is a measured number with its spread, and how it compares with a peer's where it has one. Python's standard library only.
"""
import dataclasses
import json
import math
import os
import pathlib
import statistics
import sys

FORMAT = 1  # of the files


class Problem(Exception):
    """Something the caller can set right; the message says what, which value, where, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """The judged number is the ratio, or the value where there is no peer: `aim` and `more_is_better` are about that one."""
    case: str
    name: str                       # with `beside` unique within the case; says what was measured, sizes included
    unit: str                       # of value, low and high
    value: float                    # the median,
    low: float                      # the least
    high: float                     # and the greatest
    count: int                      # of this many measurements
    beside: str | None = None       # the peer, measured in the same minutes
    ratio: float | None = None      # of medians; times as fast, or this figure as a share of the peer's
    ratio_low: float | None = None  # the least and the greatest of the repeats
    ratio_high: float | None = None
    aim: float | None = None
    more_is_better: bool = True

    @property
    def key(self):
        return self.name, self.beside

    @property
    def judged(self):
        return self.value if self.ratio is None else self.ratio

    @property
    def has_missed(self):
        """Its aim; a figure without one misses nothing."""
        return self.aim is not None and not (self.judged >= self.aim if self.more_is_better else self.judged <= self.aim)

    @property
    def is_behind(self):
        """Its peer."""
        return self.ratio is not None and (self.ratio < 1 if self.more_is_better else self.ratio > 1)


def flat(repeats):
    return [number for repeat in repeats for number in repeat]


def make_figure(case, name, unit, own, *, peer=None, is_times_as_fast=False, **more):
    """`own` and `peer` are lists of repeats, each a list of measurements; the repeats were taken in turn and are compared in pairs.

    The ratio is own / peer, or peer / own where the numbers are times and the question is how many times as fast.
    """
    numbers = flat(own)
    if not numbers or (peer is not None and (len(peer) != len(own) or not all([*own, *peer]))):
        raise Problem(f"{case}: {name}: {len(numbers)} numbers of {len(own)} repeats, and {peer and len(peer)} of the peer; a figure "
                      "needs one at least, and as many repeats of the peer: this is a fault of the driver")
    if peer is not None:
        def divided(ours, theirs):
            above, below = (theirs, ours) if is_times_as_fast else (ours, theirs)
            return statistics.median(above) / statistics.median(below)
        ratio = divided(numbers, flat(peer))
        ratios = [divided(*pair) for pair in zip(own, peer)] + [ratio]
        more |= {"ratio": ratio, "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return Figure(case=case, name=name, unit=unit, value=statistics.median(numbers), low=min(numbers), high=max(numbers),
                  count=len(numbers), **more)


def merge(runs):
    """The figures of several runs of the same driver as one list: medians of what each gave, from the least to the greatest of all."""
    together = {}
    for figure in flat(runs):
        together.setdefault(figure.key, []).append(figure)
    merged = []
    for figures in together.values():
        changed = {"value": statistics.median(f.value for f in figures), "low": min(f.low for f in figures),
                   "high": max(f.high for f in figures), "count": sum(f.count for f in figures)}
        if figures[0].ratio is not None:
            changed |= {"ratio": statistics.median(f.ratio for f in figures), "ratio_low": min(f.ratio_low for f in figures),
                        "ratio_high": max(f.ratio_high for f in figures)}
        merged.append(dataclasses.replace(figures[0], **changed))
    return merged


def write_json(path, record):
    """Whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", "utf-8")
    os.replace(part, path)


def as_records(figures):
    """For a file: fields that say nothing are left out, and no number has more digits than it is worth."""
    return [{key: float(f"{value:.6g}") if isinstance(value, float) else value
             for key, value in dataclasses.asdict(figure).items() if value is not None} for figure in figures]


NUMBER, TEXT, WHOLE, FACT = (int, float), (str,), (int,), (bool,)
KINDS = {NUMBER: "a finite number", TEXT: "a text", WHOLE: "a whole number", FACT: "true or false", (dict,): "an object", (list,): "a list"}
FIELDS = {"case": TEXT, "name": TEXT, "unit": TEXT, "value": NUMBER, "low": NUMBER, "high": NUMBER, "count": WHOLE, "beside": TEXT,
          "ratio": NUMBER, "ratio_low": NUMBER, "ratio_high": NUMBER, "aim": NUMBER, "more_is_better": FACT}
REMEDY = "take the file back from version control, or measure anew with benchmarks/run"


def field(where, record, name, kinds):
    """record[name], which must be there and of one of the types."""
    if name not in record:
        raise Problem(f"{where}: no field '{name}': {REMEDY}")
    value = record[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds) or \
            (isinstance(value, float) and not math.isfinite(value)):
        raise Problem(f"{where}: '{name}' is {json.dumps(value)[:60]}, not {KINDS[kinds]}: {REMEDY}")
    return value


def figure_of(where, record):
    if not isinstance(record, dict):
        raise Problem(f"{where} is {json.dumps(record)[:60]}, not an object: {REMEDY}")
    for name in record:
        if name not in FIELDS:
            raise Problem(f"{where}: unknown field '{name}': {REMEDY}")
    needed = [f.name for f in dataclasses.fields(Figure) if f.default is dataclasses.MISSING]
    if "ratio" in record or "beside" in record:
        needed += ["beside", "ratio", "ratio_low", "ratio_high"]
    figure = Figure(**{name: field(where, record, name, FIELDS[name]) for name in dict.fromkeys([*needed, *record])})
    if not figure.low <= figure.value <= figure.high:
        raise Problem(f"{where}: 'value' is {figure.value}, outside of low {figure.low} and high {figure.high}: {REMEDY}")
    if figure.ratio is not None and not figure.ratio_low <= figure.ratio <= figure.ratio_high:
        raise Problem(f"{where}: 'ratio' is {figure.ratio}, outside of {figure.ratio_low} and {figure.ratio_high}: {REMEDY}")
    return figure


def load(path):
    """(what the file says, its figures); Problem for a file that is damaged or of another format."""
    try:
        record = json.loads(pathlib.Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(f"{path}: cannot be read as JSON: {error}: {REMEDY}") from None
    if not isinstance(record, dict):
        raise Problem(f"{path}: holds no object: {REMEDY}")
    if field(path, record, "format", WHOLE) != FORMAT:
        raise Problem(f"{path}: 'format' is {record['format']}, this program reads {FORMAT}: {REMEDY}")
    figures = [figure_of(f"{path}: figures[{i}]", item) for i, item in enumerate(field(path, record, "figures", (list,)))]
    keys = [figure.key for figure in figures]
    for key in keys:
        if keys.count(key) > 1:
            raise Problem(f"{path}: figures: '{key[0]}' beside '{key[1]}' is there {keys.count(key)} times: {REMEDY}")
    return record, figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A case as benchmarks/run has recorded it: what its file says, and its figures."""
    record: dict
    figures: list


MACHINE = {"type": TEXT, "cores": WHOLE, "flags": (list,), "huge_pages": TEXT}
RESULT = {"case": TEXT, "day": TEXT, "is_quick": FACT, "is_idle": FACT, "machine": (dict,), "before": (dict,), "during": (dict,),
          "after": (dict,)}


def load_result(path):
    """Of a file DIR/MACHINE TYPE/CASE.json."""
    path = pathlib.Path(path)
    record, figures = load(path)
    for name, kinds in RESULT.items():
        field(path, record, name, kinds)
    for name, kinds in MACHINE.items():
        field(f"{path}: machine", record["machine"], name, kinds)
    for what, said, named in (("case", record["case"], path.stem), ("machine.type", record["machine"]["type"], path.parent.name)):
        if said != named:
            raise Problem(f"{path}: '{what}' is '{said}', the file's name says '{named}': {REMEDY}")
    return Result(record=record, figures=figures)


def add_json_option(parser):
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write the figures to FILE as well (benchmarks/run reads it)")


class Figures:
    """What a driver reports: a line for each figure, a file of all at the end, exit code 1 when an aim was missed."""

    def __init__(self, case, file):
        self.case, self.file, self.all = case, file, []

    def add(self, name, unit, own, **more):
        """As make_figure(), which see."""
        self.include([make_figure(self.case, name, unit, own, **more)])

    def include(self, figures):
        """Ready ones."""
        for figure in figures:
            self.all.append(figure)
            print(verdict_line(figure), flush=True)

    def finish(self):
        if self.file is not None:
            write_json(self.file, {"format": FORMAT, "figures": as_records(self.all)})
        sys.exit(1 if any(figure.has_missed for figure in self.all) else 0)


def verdict_line(figure):
    mark = "    " if figure.aim is None else "MISS" if figure.has_missed else "ok  "
    bar = "" if figure.aim is None else f" (bar: {'>=' if figure.more_is_better else '<='} {figure.aim:.4g})"
    if figure.ratio is None:
        return f"{mark} {figure.name}: {figure.value:.4g} {figure.unit}".rstrip() + bar
    return f"{mark} {figure.name}: {figure.value:.4g} {figure.unit}; ratio {figure.ratio:.4g} beside {figure.beside}{bar}"
