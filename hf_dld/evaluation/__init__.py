"""What a model is worth: error rates, and a report over all depths."""

from .depth_report import DepthReport, DepthRow, compare_markdown, evaluate_depths
from .metrics import CharacterErrorRate, WordErrorRate, asr_metrics, count_errors
from .plots import plot_depths

__all__ = [
    "CharacterErrorRate",
    "DepthReport",
    "DepthRow",
    "WordErrorRate",
    "asr_metrics",
    "compare_markdown",
    "count_errors",
    "evaluate_depths",
    "plot_depths",
]
