"""Curves as inline SVG. matplotlib draws them.

The colours are variables of `page.css`, so that dark mode and print work.
"""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from siss_diffusers.metrics.formats import short_number


# In units of the drawing. The text stays readable where a phone shrinks the drawing to two thirds.
WIDTH, HEIGHT, FONT_SIZE = 480, 290, 15
# Left, bottom, width and height of the area of the curves, as shares of the drawing.
MARGINS = (0.165, 0.2, 0.815, 0.765)
# Colours and dashes both differ, for print without colours and for more models than colours.
COLORS = ("#c00001", "#c00002", "#c00003", "#c00004", "#c00005", "#c00006")
DASHES: tuple[tuple[float, ...], ...] = ((), (7, 4), (2, 3), (9, 3, 2, 3))
# Stand-ins, which `inline_svg` replaces by the variables of `page.css`: matplotlib knows no variables.
SOFT, RULE = "#c00010", "#c00011"
VARIABLES = {color: f"var(--c{index})" for index, color in enumerate(COLORS)} | {
    SOFT: "var(--soft)",
    RULE: "var(--rule)",
}
# Upper ends of the axis of shares: the curves fill the drawing also where shares are small.
SHARE_LIMITS = (0.05, 0.1, 0.2, 0.5)


def line_color(index: int) -> str:
    """Return the colour of a curve as CSS."""
    return VARIABLES[COLORS[index % len(COLORS)]]


def line_dashes(index: int) -> str:
    """Return the dashes of a curve as the value of `stroke-dasharray`."""
    return " ".join(map(str, DASHES[index % len(DASHES)])) or "none"


def share_svg(curves: Mapping[str, Mapping[float, Mapping[str, Any]]], steps: str) -> str:
    """Draw the share of copies by steps, with its interval as a band where every point has one.

    The drawing contains numbers and the names of its axes, but no name of a model: those stand in the legend, which
    the template writes.

    Args:
        curves: by the name of a line its rows by steps, in their order. Each has a `copy_share`.
        steps: what the steps are of, for the axis.

    Returns:
        an `<svg>` element without ids of elements outside it, without scripts, styles or addresses.
    """
    import matplotlib

    # Not pyplot: it keeps state for the whole process.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    options = {"svg.fonttype": "none", "svg.hashsalt": "siss", "font.size": FONT_SIZE, "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes(MARGINS)
        for index, points in enumerate(curves.values()):
            draw_curve(axes, index, points, opacity=0.26 / max(2, len(curves)))
        last = max(step for points in curves.values() for step in points) or 1
        axes.set_xlim(-0.02 * last, 1.02 * last)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.xaxis.set_major_formatter(lambda step, _: short_number(step))
        limit = highest_limit([row for points in curves.values() for row in points.values()])
        axes.set_ylim(-0.02 * limit, 1.02 * limit)
        axes.set_yticks([limit * fifth / 5 for fifth in range(6)])
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
        style_axes(axes, steps)
        file = StringIO()
        # Without a background, a date and the addresses of the metadata.
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return inline_svg(file.getvalue())


def draw_curve(axes: Any, index: int, points: Mapping[float, Mapping[str, Any]], opacity: float) -> None:
    """Draw one model's curve, and the band of its intervals."""
    color, dashes = COLORS[index % len(COLORS)], DASHES[index % len(DASHES)]
    steps, shares = list(points), [row["copy_share"] for row in points.values()]
    bounds = [(row.get("copy_share_low"), row.get("copy_share_high")) for row in points.values()]
    if all(isinstance(bound, int | float) for pair in bounds for bound in pair):
        low, high = zip(*bounds)
        axes.fill_between(
            steps, low, high, color=color, alpha=opacity, linewidth=0, clip_on=False, gid=f"band-{index}"
        )
    (line,) = axes.plot(steps, shares, color=color, linewidth=2.2, clip_on=False, gid=f"curve-{index}")
    # In points, as in the legend; matplotlib would scale them by the width of the line.
    line.set_linestyle((0, [length / 2.2 for length in dashes]) if dashes else "solid")
    axes.plot(steps, shares, "o", color=color, markersize=6, clip_on=False, gid=f"points-{index}")


def highest_limit(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the upper end of the axis: the first round share above all shares and the ends of their intervals."""
    values = [row[key] for row in rows for key in ("copy_share", "copy_share_high") if row.get(key) is not None]
    return next((limit for limit in SHARE_LIMITS if max(values) <= limit), 1.0)


def style_axes(axes: Any, steps: str) -> None:
    """Leave horizontal lines and two labels."""
    axes.set_xlabel(f"steps of {steps}", color=SOFT, labelpad=8)
    axes.set_ylabel("copies among the samples", color=SOFT, labelpad=8)
    axes.grid(axis="y", color=RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, length=0, pad=6)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(SOFT)
    for artist in axes.findobj():
        artist.set_clip_on(False)


def inline_svg(document: str) -> str:
    """Return the `<svg>` element of a document that matplotlib wrote, with the page's colours and font."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    # HTML needs no namespaces. The page sets the size.
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", opening)
    rest = re.sub(r"font: ([\d.]+)px [^;\"]*", rf"font-size: {FONT_SIZE}px", rest)
    svg = f"{opening}>{rest}"
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg.strip()
