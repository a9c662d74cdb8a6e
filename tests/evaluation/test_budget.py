"""From a budget to a depth: optimal by brute force, and clear where there is none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dld import DepthReport
from hf_dld.evaluation import DepthRow, choose_depth

FIGURES = {
    "max_latency_s": "latency_p90_s",
    "max_rtf": "rtf",
    "max_memory_mb": "memory_mb",
    "max_parameters": "parameters",
    "max_wer": "wer",
}
NUMBERS = st.integers(0, 6).map(float)  # few values, so that limits are met exactly and rates are equal
ROWS = st.lists(st.fixed_dictionaries(dict.fromkeys(FIGURES.values(), NUMBERS)), min_size=1, max_size=6)
LIMITS = st.dictionaries(st.sampled_from(list(FIGURES)), NUMBERS, min_size=1)


def make_report(rows):
    return DepthReport(
        "tiny",
        "even",
        1,
        1,
        "",
        [DepthRow(**{"cer": 0.0, **row}, num_active_layers=k, active_layers=[]) for k, row in enumerate(rows, 1)],
    )


@settings(max_examples=300, deadline=None)
@given(ROWS, LIMITS)
def test_the_best_of_the_feasible(rows, limits):
    report = make_report(rows)
    feasible = [row for row in report.rows if all(getattr(row, FIGURES[name]) <= limits[name] for name in limits)]
    if not feasible:
        with pytest.raises(ValueError, match="no depth keeps"):
            choose_depth(report, **limits)
        return
    chosen = choose_depth(report, **limits)
    assert chosen in feasible
    if list(limits) == ["max_wer"]:
        assert chosen.num_active_layers == min(row.num_active_layers for row in feasible)
    else:
        assert chosen.wer == min(row.wer for row in feasible)
        equals = [row.num_active_layers for row in feasible if row.wer == chosen.wer]
        assert chosen.num_active_layers == min(equals)


@pytest.fixture
def report():
    common = {"memory_mb": 50.0, "rtf": 0.1}
    rows = [(1_000, 0.4, 0.1), (2_000, 0.2, 0.2), (3_000, 0.1, 0.3)]
    return make_report([{"parameters": p, "wer": w, "latency_p90_s": s, **common} for p, w, s in rows])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "give at least one of max_latency_s, max_rtf, max_memory_mb, max_parameters, max_wer"),
        ({"max_latency_s": -1}, "max_latency_s=-1 must be a finite number of at least 0"),
        ({"max_wer": float("nan")}, "max_wer=nan must be a finite"),
        (
            {"max_latency_s": 0.05},
            "no depth keeps max_latency_s=0.05 s: the nearest, 1 active layers, has 0.1 s, 0.05 s more",
        ),
        (
            {"max_latency_s": 0.2, "max_wer": 0.05},
            "no depth keeps max_wer=0.05: the nearest, 3 active layers, has 0.1, 0.05 more",
        ),
        (
            {"max_latency_s": 0.1, "max_wer": 0.2},
            r"at once: max_latency_s=0.1 s is kept by \[1\], max_wer=0.2 is kept by \[2, 3\] active layers",
        ),
    ],
)
def test_no_such_depth(report, limits, message):
    with pytest.raises(ValueError, match=message):
        choose_depth(report, **limits)


def test_a_report_without_the_figure(report):
    report.rows[1].latency_p90_s = None
    with pytest.raises(ValueError, match="max_latency_s needs latency_p90_s, which the report 'tiny' lacks"):
        choose_depth(report, max_latency_s=1)
    assert choose_depth(report, max_parameters=2_000).num_active_layers == 2
    report.rows.clear()
    with pytest.raises(ValueError, match="has no depths"):
        choose_depth(report, max_wer=1)
