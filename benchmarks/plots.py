"""Bar plots of ratios as SVG text, readable on light and on dark ground."""
import math
from xml.sax.saxutils import escape

WIDTH, LABELS, BARS, ROW, TOP, BOTTOM = 960, 540, 330, 15, 10, 46
MOST_ROWS = 40  # more cannot be taken in at a glance
GREY = "#6e7781"
COLOURS = {"aim met": "#2da44e", "ahead": "#4184e4", "behind": "#bf8700", "aim missed": "#cf4a3b"}


def state(figure):
    """A key of COLOURS; a figure behind its peer is that even where its aim asks for no more."""
    if figure.has_missed:
        return "aim missed"
    if figure.is_behind:
        return "behind"
    return "ahead" if figure.aim is None else "aim met"


def times_better(figure):
    """The ratio turned so that more is better."""
    return figure.ratio if figure.more_is_better else 1 / max(figure.ratio, 1e-9)


def plotted(figures):
    """Those with a ratio, in their order; of too many the lowest by times_better()."""
    with_ratio = [figure for figure in figures if figure.ratio is not None]
    lowest = sorted(with_ratio, key=times_better)[:MOST_ROWS]
    return [figure for figure in with_ratio if figure in lowest]


def ticks(low, high):
    """1, 2 and 5 times the powers of ten between the ends; only the powers where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 3 else (1,)
    return [value for power in powers for step in steps if low <= (value := step * 10.0 ** power) <= high]


def bar_plot(title, figures):
    """The SVG text; `figures` as from plotted(), one at least. The scale is logarithmic and bars start at 1, the peer."""
    numbers = [max(number, 1e-3) for f in figures for number in (f.ratio_low, f.ratio_high, *([f.aim] if f.aim else []))]
    low, high = min(0.5, min(numbers)) / 1.1, max(2.0, max(numbers)) * 1.1

    def x(ratio):
        return LABELS + BARS * math.log(min(max(ratio, low), high) / low) / math.log(high / low)

    bottom = TOP + ROW * len(figures)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" font-family="sans-serif" font-size="10" '
             f'fill="{GREY}">', f"<title>{escape(title)}</title>"]
    for tick in ticks(low, high):
        width = 1.5 if tick == 1 else 0.5
        parts += [f'<path d="M{x(tick):.1f} {TOP}V{bottom}" stroke="{GREY}" stroke-width="{width}" stroke-opacity="0.6"/>',
                  f'<text x="{x(tick):.1f}" y="{bottom + 12}" text-anchor="middle">{tick:g}</text>']
    for number, figure in enumerate(figures):
        parts += row(figure, TOP + ROW * number, x)
    at = LABELS
    for name, colour in COLOURS.items():
        parts += [f'<rect x="{at}" y="{bottom + 22}" width="9" height="9" fill="{colour}"/>',
                  f'<text x="{at + 13}" y="{bottom + 30}">{name}</text>']
        at += 80
    parts.append(f'<text x="{LABELS - 6}" y="{bottom + 30}" text-anchor="end">ratio beside the peer, line: spread, tick: aim</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def row(figure, y, x):
    middle, colour = y + ROW / 2, COLOURS[state(figure)]
    left, right = sorted((x(1), x(figure.ratio)))
    parts = [f'<text x="{LABELS - 6}" y="{middle + 3.5:.1f}" text-anchor="end">{escape(f"{figure.name}, beside {figure.beside}")}</text>',
             f'<rect x="{left:.1f}" y="{y + 2}" width="{max(right - left, 1):.1f}" height="{ROW - 4}" fill="{colour}"/>',
             f'<path d="M{x(figure.ratio_low):.1f} {middle}H{x(figure.ratio_high):.1f}" stroke="{GREY}" stroke-width="2"/>',
             f'<text x="{LABELS + BARS + 8}" y="{middle + 3.5:.1f}">{figure.ratio:.3g}</text>']
    if figure.aim:
        parts.append(f'<path d="M{x(figure.aim):.1f} {y}v{ROW}" stroke="{GREY}" stroke-width="2"/>')
    return parts
