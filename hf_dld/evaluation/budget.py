"""From a budget to a depth: the best row of a report within limits."""

import math

from .depth_report import DepthReport, DepthRow

# each limit, the figure of a row that it bounds, and its unit
_LIMITS = {
    "max_latency_s": ("latency_p90_s", " s"),
    "max_rtf": ("rtf", ""),
    "max_memory_mb": ("memory_mb", " MB"),
    "max_parameters": ("parameters", ""),
    "max_wer": ("wer", ""),
}


def choose_depth(
    report: DepthReport,
    *,
    max_latency_s: float | None = None,
    max_rtf: float | None = None,
    max_memory_mb: float | None = None,
    max_parameters: int | None = None,
    max_wer: float | None = None,
) -> DepthRow:
    """The best depth of a report that keeps every limit given.

    The best is the one with the lowest WER, and of equal ones the one with the fewest layers. With `max_wer` alone it
    is the cheapest, the one with the fewest layers.

    Args:
        report: of the machine that the model will run on, where time or memory is limited.
        max_latency_s: for the 90th percentile of the seconds that one utterance takes.
        max_rtf: seconds of computing for a second of audio.
        max_memory_mb: as `DepthRow.memory_mb`.
        max_parameters: of the layers that run and of the rest.
        max_wer: a fraction (0.1 is 10 %).

    Raises:
        ValueError: no limit or an impossible one, a figure that the report lacks, or limits that no depth keeps; the
            message then says which, and by how much the nearest depth misses it.
    """
    given = {
        "max_latency_s": max_latency_s,
        "max_rtf": max_rtf,
        "max_memory_mb": max_memory_mb,
        "max_parameters": max_parameters,
        "max_wer": max_wer,
    }
    limits = {name: limit for name, limit in given.items() if limit is not None}
    _check(report, limits)
    rows = [row for row in report.rows if all(getattr(row, _LIMITS[n][0]) <= limit for n, limit in limits.items())]
    if not rows:
        raise ValueError(_why_none(report, limits))
    if set(limits) == {"max_wer"}:
        return min(rows, key=lambda row: row.num_active_layers)
    return min(rows, key=lambda row: (row.wer, row.num_active_layers))


def _check(report: DepthReport, limits: dict[str, float]) -> None:
    if not limits:
        raise ValueError(f"give at least one of {', '.join(_LIMITS)}")
    if not report.rows:
        raise ValueError(f"the report {report.name!r} has no depths to choose from")
    for name, limit in limits.items():
        if not math.isfinite(limit) or limit < 0:
            raise ValueError(f"{name}={limit!r} must be a finite number of at least 0")
        figure = _LIMITS[name][0]
        if any(getattr(row, figure) is None for row in report.rows):
            raise ValueError(f"{name} needs {figure}, which the report {report.name!r} lacks: evaluate again to add it")


def _why_none(report: DepthReport, limits: dict[str, float]) -> str:
    missed = []
    for name, limit in limits.items():
        figure, unit = _LIMITS[name]
        nearest = min(report.rows, key=lambda row: getattr(row, figure))
        value = getattr(nearest, figure)
        if value > limit:
            missed.append(
                f"no depth keeps {name}={limit:g}{unit}: the nearest, {nearest.num_active_layers} active layers, has "
                f"{value:.4g}{unit}, {value - limit:.4g}{unit} more"
            )
    if missed:
        return "; ".join(missed)
    keeps = []
    for name, limit in limits.items():
        figure, unit = _LIMITS[name]
        depths = [row.num_active_layers for row in report.rows if getattr(row, figure) <= limit]
        keeps.append(f"{name}={limit:g}{unit} is kept by {depths}")
    return f"no depth keeps all limits at once: {', '.join(keeps)} active layers"
