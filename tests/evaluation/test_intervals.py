"""Bootstrap intervals: what holds for any counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dld.evaluation.intervals import bootstrap_interval, error_rate, resampled_totals

COUNTS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 40)), min_size=1, max_size=30).map(np.array)


@settings(max_examples=50, deadline=None)
@given(COUNTS)
def test_intervals_hold_the_estimate_and_lie_within_the_extremes(counts):
    low, high = bootstrap_interval(counts, error_rate)
    assert low <= error_rate(counts.sum(axis=0)) <= high
    assert low >= 0
    if counts[:, 1].min() > 0:
        rates = counts[:, 0] / counts[:, 1]
        assert rates.min() - 1e-9 <= low and high <= rates.max() + 1e-9
    assert [low, high] == bootstrap_interval(counts, error_rate), "seeded"
    assert bootstrap_interval(counts[::-1], error_rate) == [low, high], "the order of utterances is of no account"


@settings(max_examples=20, deadline=None)
@given(COUNTS, st.integers(1, 5))
def test_totals_are_those_of_as_many_utterances(counts, seed):
    totals = resampled_totals(np.column_stack([counts, np.ones(len(counts), dtype=int)]), 50, seed)
    assert totals.shape == (50, 3) and (totals[:, 2] == len(counts)).all()


def test_the_bootstrap_is_the_usual_one():
    generator = np.random.default_rng(0)
    counts = np.stack([generator.poisson(2, 400), generator.integers(5, 15, 400)], axis=1)
    drawn = counts[generator.integers(0, 400, (4000, 400))].sum(axis=1)
    usual = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    assert bootstrap_interval(counts, error_rate, resamples=4000) == pytest.approx(usual, rel=0.01)


def test_blocks_do_not_matter(monkeypatch):
    counts = np.stack([np.arange(100) % 7, np.arange(100) % 11 + 1], axis=1)
    whole = resampled_totals(counts, 60)
    monkeypatch.setattr("hf_dld.evaluation.intervals._NUMBERS_AT_ONCE", 200)
    assert (resampled_totals(counts, 60) == whole).all()


def test_careless_arguments():
    with pytest.raises(ValueError, match="an interval needs at least one"):
        bootstrap_interval(np.empty((0, 2), dtype=int), error_rate)
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match=f"confidence={confidence} must be between 0 and 1"):
            bootstrap_interval(np.ones((3, 2), dtype=int), error_rate, confidence=confidence)
