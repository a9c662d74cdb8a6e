"""What a model is worth: error rates, and a report over all depths with what each depth costs."""

from ..lazy import lazy_attributes

_MODULES = {
    "CharacterErrorRate": "metrics",
    "DepthDraw": "depth_report",
    "DepthReport": "depth_report",
    "DepthRow": "depth_report",
    "DepthSchedule": "schedule_search",
    "LatencyModel": "latency",
    "LayerSetScorer": "layer_sets",
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
    "run_layer_sets": "layer_sets",
    "search_depth_schedule": "schedule_search",
}
__all__ = list(_MODULES)
__getattr__ = lazy_attributes(__name__, _MODULES)
