"""The figure of error against depth."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .depth_report import DepthReport

# Okabe and Ito's palette, which colour-blind readers can tell apart; each line has a marker of its own too
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
MARKERS = ("s", "o", "^", "D")


def plot_depths(reports: Sequence[DepthReport], path: str | Path, title: str = "") -> None:
    """Draw WER against the number of active layers, one line for each report, to a PNG or SVG file."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for index, report in enumerate(reports):
        axes.plot(
            [row.num_active_layers for row in report.rows],
            [100 * row.wer for row in report.rows],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            label=report.name,
        )
    axes.set_xlabel("active encoder layers")
    axes.set_ylabel("word error rate (%)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(title)
    figure.savefig(path, dpi=150)
