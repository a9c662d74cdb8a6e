"""What a model is worth: error rates, and a report over all depths with what each depth costs."""

from ..lazy import lazy_attributes

_MODULES = {
    "CharacterErrorRate": "metrics",
    "DepthDraw": "depth_report",
    "DepthReport": "depth_report",
    "DepthRow": "depth_report",
    "LatencyModel": "latency",
    "PairedDifference": "paired",
    "WordErrorRate": "metrics",
    "asr_metrics": "metrics",
    "calibrate_latency": "latency",
    "choose_depth": "budget",
    "compare_markdown": "depth_report",
    "count_errors": "metrics",
    "evaluate_depths": "evaluate",
    "length_sorted_batches": "batches",
    "paired_differences": "paired",
    "paired_markdown": "paired",
    "plot_depths": "plots",
}
__all__ = list(_MODULES)
__getattr__ = lazy_attributes(__name__, _MODULES)
