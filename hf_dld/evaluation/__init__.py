"""What a model is worth: error rates, and a report over all depths with what each depth costs."""

from .batches import length_sorted_batches
from .budget import choose_depth
from .depth_report import DepthDraw, DepthReport, DepthRow, compare_markdown
from .evaluate import evaluate_depths
from .latency import LatencyModel, calibrate_latency
from .metrics import CharacterErrorRate, WordErrorRate, asr_metrics, count_errors
from .paired import PairedDifference, paired_differences, paired_markdown
from .plots import plot_depths

__all__ = [
    "CharacterErrorRate",
    "DepthDraw",
    "DepthReport",
    "DepthRow",
    "LatencyModel",
    "PairedDifference",
    "WordErrorRate",
    "asr_metrics",
    "calibrate_latency",
    "choose_depth",
    "compare_markdown",
    "count_errors",
    "evaluate_depths",
    "length_sorted_batches",
    "paired_differences",
    "paired_markdown",
    "plot_depths",
]
