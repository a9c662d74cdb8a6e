"""What a model is worth: error rates, and a report over all depths."""

from .depth_report import DepthReport, DepthRow, compare_markdown, evaluate_depths
from .layer_sets import LayerSetScorer, run_layer_sets
from .metrics import CharacterErrorRate, WordErrorRate, asr_metrics, count_errors
from .plots import plot_depths
from .schedule_search import DepthSchedule, search_depth_schedule

__all__ = [
    "CharacterErrorRate",
    "DepthReport",
    "DepthRow",
    "DepthSchedule",
    "LayerSetScorer",
    "WordErrorRate",
    "asr_metrics",
    "compare_markdown",
    "count_errors",
    "evaluate_depths",
    "plot_depths",
    "run_layer_sets",
    "search_depth_schedule",
]
