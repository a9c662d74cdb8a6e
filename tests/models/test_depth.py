"""Rules of depth.py that hold for all inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_dld.models.depth import (
    DEPTH_SAMPLINGS,
    check_active_layers,
    check_depth_schedule,
    check_num_active_layers,
    sample_layers,
    select_layers,
)

layer_counts = st.integers(1, 48)


@st.composite
def count_and_layers(draw):
    num_hidden_layers = draw(layer_counts)
    return draw(st.integers(1, num_hidden_layers)), num_hidden_layers


@given(count_and_layers(), st.sampled_from(["even", "first"]))
def test_selection_names_that_many_ascending_layers(counts, selection):
    count, num_hidden_layers = counts
    layers = select_layers(count, num_hidden_layers, selection)
    assert len(layers) == count
    assert check_active_layers(layers, num_hidden_layers) == layers


@given(count_and_layers())
def test_even_is_rounded_linspace(counts):
    count, num_hidden_layers = counts
    layers = select_layers(count, num_hidden_layers)
    if count == 1:
        assert layers == (0,)
    else:
        assert (layers[0], layers[-1]) == (0, num_hidden_layers - 1)
        exact = [(num_hidden_layers - 1) * i / (count - 1) for i in range(count)]
        assert layers == tuple(int(x) for x in np.round(exact))


def test_even_by_hand():
    assert select_layers(4, 12) == (0, 4, 7, 11)
    assert select_layers(6, 12) == (0, 2, 4, 7, 9, 11)
    assert select_layers(12, 12) == tuple(range(12))
    assert select_layers(3, 12, "first") == (0, 1, 2)


@st.composite
def schedules(draw):
    num_hidden_layers = draw(st.integers(1, 12))
    order = draw(st.permutations(range(num_hidden_layers)))
    return [sorted(order[:count]) for count in range(1, num_hidden_layers + 1)]


@given(schedules())
def test_schedule_is_looked_up(schedule):
    num_hidden_layers = len(schedule)
    check_depth_schedule(schedule, num_hidden_layers)
    for count in range(1, num_hidden_layers + 1):
        assert select_layers(count, num_hidden_layers, "schedule", schedule) == tuple(schedule[count - 1])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([[0], [0, 1]], r"every count from 1 to 3, that many layer indices; got lists of \[1, 2\]"),
        ([[0], [0, 1, 2], [0, 1, 2]], r"got lists of \[1, 3, 3\]"),
        ([[3], [0, 1], [0, 1, 2]], "strictly ascending layer indices from 0 to 2"),
    ],
)
def test_wrong_schedules(schedule, message):
    with pytest.raises(ValueError, match=message):
        check_depth_schedule(schedule, 3)


def test_schedule_is_needed():
    with pytest.raises(ValueError, match="needs a depth_schedule"):
        select_layers(2, 4, "schedule")
    with pytest.raises(ValueError, match="layer_selection must be one of .*; got 'odd'"):
        select_layers(2, 4, "odd")


@given(layer_counts, st.sampled_from(DEPTH_SAMPLINGS), st.integers(0, 10**6), st.integers(0, 10**6))
def test_draws_are_functions_of_seed_and_step(num_hidden_layers, sampling, seed, step):
    drawn = sample_layers(num_hidden_layers, sampling, seed=seed, step=step)
    assert drawn == sample_layers(num_hidden_layers, sampling, seed=seed, step=step)
    assert len(drawn) == (2 if sampling == "sandwich" else 1)
    for layers in drawn:
        assert check_active_layers(layers, num_hidden_layers) == layers
    if sampling == "sandwich":
        assert drawn[0] == tuple(range(num_hidden_layers))
    if sampling in ("selection", "balanced"):
        assert drawn == [select_layers(len(drawn[0]), num_hidden_layers)]


def frequencies(sampling, steps=6000, num_hidden_layers=4, **kwargs):
    counts, layers = np.zeros(num_hidden_layers + 1), np.zeros(num_hidden_layers)
    for step in range(steps):
        drawn = sample_layers(num_hidden_layers, sampling, seed=7, step=step, **kwargs)[-1]
        counts[len(drawn)] += 1
        layers[list(drawn)] += 1
    return counts / steps, layers / steps


def test_bernoulli_distribution():
    # 4 independent gates of 0.5, the empty draw (1/16) drawn again
    counts, layers = frequencies("bernoulli")
    np.testing.assert_allclose(counts, np.array([0, 4, 6, 4, 1]) / 15, atol=0.02)
    np.testing.assert_allclose(layers, 0.5 / (15 / 16), atol=0.02)
    counts, _ = frequencies("bernoulli", layerdrop=0.0)
    assert counts[4] == 1


def test_balanced_counts():
    counts, _ = frequencies("balanced")  # 1/k each, of 1 + 1/2 + 1/3 + 1/4 = 25/12 together
    np.testing.assert_allclose(counts[1:] * np.arange(1, 5), 12 / 25, atol=0.04)


@pytest.mark.parametrize("sampling", ["uniform", "selection"])
def test_uniform_counts(sampling):
    counts, layers = frequencies(sampling)
    np.testing.assert_allclose(counts[1:], 0.25, atol=0.02)
    if sampling == "uniform":
        np.testing.assert_allclose(layers, layers.mean(), atol=0.02)


def test_wrong_draws():
    with pytest.raises(ValueError, match="layerdrop must be at least 0 and below 1"):
        sample_layers(4, "bernoulli", seed=0, step=0, layerdrop=1.0)
    with pytest.raises(ValueError, match="depth_sampling must be one of .*; got 'all'"):
        sample_layers(4, "all", seed=0, step=0)


@given(st.integers(), layer_counts)
def test_counts_are_checked(count, num_hidden_layers):
    if 1 <= count <= num_hidden_layers:
        assert check_num_active_layers(count, num_hidden_layers) == count
    else:
        with pytest.raises(ValueError, match=f"from 1 to {num_hidden_layers}.*; got {count}"):
            check_num_active_layers(count, num_hidden_layers)


def test_numpy_counts_are_counts():
    assert check_num_active_layers(np.int64(3), 4) == 3
    assert check_active_layers(np.array([0, 2]), 4) == (0, 2)
