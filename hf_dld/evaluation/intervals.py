"""Bootstrap intervals over utterances, in little memory however many utterances there are."""

from collections.abc import Callable

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000
_NUMBERS_AT_ONCE = 2_000_000


def resampled_totals(counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Column totals of bootstrap resamples: as many utterances, drawn with replacement, `resamples` times.

    Args:
        counts: (utterances, columns), integers, such as errors and words of each utterance.

    Returns:
        (resamples, columns). Utterances with equal counts are drawn together, by how often they occur, which has the
        same distribution: a million utterances have a few thousand different counts.
    """
    shape = counts.max(axis=0).astype(np.int64) + 1
    codes, occurrences = np.unique(np.ravel_multi_index(counts.T, shape), return_counts=True)
    kinds = np.stack(np.unravel_index(codes, shape), axis=1).astype(np.float64)
    generator = np.random.default_rng(seed)
    block = max(1, _NUMBERS_AT_ONCE // len(kinds))
    shares = occurrences / len(counts)
    return np.concatenate(
        [
            generator.multinomial(len(counts), shares, min(block, resamples - start)) @ kinds
            for start in range(0, resamples, block)
        ]
    )


def bootstrap_interval(
    counts: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[float]:
    """Percentile interval of a statistic of column totals, widened to hold the statistic of the data where need be.

    Args:
        counts: (utterances, columns), at least one utterance.
        statistic: from totals (..., columns) to values (...).

    Raises:
        ValueError: no utterance, or a confidence that is not between 0 and 1.
    """
    if not len(counts):
        raise ValueError("no utterance: an interval needs at least one")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must be between 0 and 1 (0.95 is 95 %)")
    estimate = statistic(counts.sum(axis=0, dtype=np.float64))
    values = statistic(resampled_totals(counts, resamples, seed))
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return [float(min(low, estimate)), float(max(high, estimate))]


def error_rate(totals: np.ndarray) -> np.ndarray:
    """Errors over reference length, from totals (..., 2); a length of 0 counts as 1."""
    return totals[..., 0] / np.maximum(totals[..., 1], 1)
