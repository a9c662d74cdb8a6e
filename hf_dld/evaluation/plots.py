"""The figure of error against depth or cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..whole_files import whole_file
from .depth_report import DepthReport

# Okabe and Ito's palette, which colour-blind readers can tell apart; each line has a marker of its own too
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("s", "o", "^", "D", "v", "P")
FIGURE_SUFFIXES = (".png", ".svg")
_LABELS = {
    "num_active_layers": "active encoder layers",
    "gmac_per_s": "billion multiply-accumulates for 1 s of audio (GMAC)",
}


def plot_depths(
    reports: Sequence[DepthReport],
    path: str | Path,
    title: str = "",
    against: Literal["num_active_layers", "gmac_per_s"] = "num_active_layers",
) -> None:
    """Draw WER against depth or cost, one line for each report, to a PNG or SVG file.

    Where the reports have confidence intervals, they are drawn as bars; against GMAC each point is marked with its
    number of layers.

    Raises:
        ValueError: another kind of file, no report, an unknown `against`, or a report that lacks it.
    """
    if Path(path).suffix not in FIGURE_SUFFIXES:
        raise ValueError(f"{path} is no name for a figure: it must end in {', '.join(FIGURE_SUFFIXES)}")
    if against not in _LABELS:
        raise ValueError(f"against={against!r} must be one of {tuple(_LABELS)}")
    if not reports:
        raise ValueError("no report to plot")
    for report in reports:
        if any(getattr(row, against) is None for row in report.rows):
            raise ValueError(f"the report {report.name!r} has no {against}: evaluate again to add it")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    has_intervals = False
    for index, report in enumerate(reports):
        colour = COLOURS[index % len(COLOURS)]
        rows = sorted(report.rows, key=lambda row: row.num_active_layers)
        x = [getattr(row, against) for row in rows]
        y = [100 * row.wer for row in rows]
        intervals = [row.wer_interval or [row.wer, row.wer] for row in rows]
        has_intervals |= any(row.wer_interval is not None for row in rows)
        bars = [
            [100 * (row.wer - low), 100 * (high - row.wer)] for row, (low, high) in zip(rows, intervals, strict=True)
        ]
        axes.errorbar(
            x,
            y,
            yerr=list(zip(*bars, strict=True)),
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.5,
            elinewidth=1,
            capsize=2.5,
            label=report.name,
        )
        if against != "num_active_layers":
            for row, left, height in zip(rows, x, y, strict=True):
                label = str(row.num_active_layers)
                axes.annotate(label, (left, height), (5, 3), textcoords="offset points", color=colour, fontsize=8)
    bars_note = ", bars: 95 % intervals" if has_intervals else ""
    numbers_note = "; numbers: active layers" if against != "num_active_layers" else ""
    axes.set_xlabel(_LABELS[against] + numbers_note)
    axes.set_ylabel(f"word error rate (%){bars_note}")
    axes.set_ylim(bottom=0)
    if against == "num_active_layers":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(title)
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=150)
