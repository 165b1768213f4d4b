"""Whether figures have become worse since others were recorded: by ratios only, since minutes and machines differ in speed."""

MARGIN = 0.10


def verdict(old, new):
    """"worse", "better" or "same": whether the new ratios lie wholly beyond the old ones, by more than the margin."""
    below = new.ratio_high < old.ratio_low - MARGIN * abs(old.ratio_low)
    above = new.ratio_low > old.ratio_high + MARGIN * abs(old.ratio_high)
    if not below and not above:
        return "same"
    return "better" if above == new.more_is_better else "worse"


def compare(old, new):
    """[(new figure, its old one or None, verdict)], and the keys of old figures that were not measured.

    A figure without a ratio, or that is not in the old results, has the verdict "not compared".
    """
    known = {figure.key: figure for figure in old}
    rows = []
    for figure in new:
        before = known.pop(figure.key, None)
        is_comparable = before is not None and before.ratio is not None and figure.ratio is not None
        rows.append((figure, before, verdict(before, figure) if is_comparable else "not compared"))
    return rows, list(known)


def table(rows):
    """Text for a terminal, the worst first."""
    order = {"worse": 0, "better": 1, "same": 2, "not compared": 3}
    lines = []
    for figure, before, what in sorted(rows, key=lambda row: order[row[2]]):
        def interval(one):
            return "-" if one is None or one.ratio is None else f"{one.ratio:.3g} ({one.ratio_low:.3g} to {one.ratio_high:.3g})"
        beside = f", beside {figure.beside}" if figure.beside else ""
        lines.append(f"{what:13} {interval(before):>24} -> {interval(figure):<24} {figure.case}: {figure.name}{beside}")
    return "\n".join(lines)
