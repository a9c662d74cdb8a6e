"""Costs: multiply-accumulates and memory against independent counts."""

import pytest
import torch
from conftest import make_dynamic
from torch.utils.flop_counter import FlopCounterMode

from hf_dld.evaluation.cost import PeakTensorMemory, count_gmac_per_s, measure_memory_mb


def test_gmac_are_those_of_real_passes(variant):
    model = make_dynamic(variant)
    counted = count_gmac_per_s(model, [1, 3], 0.5, 16_000)
    assert model.config._attn_implementation == "sdpa"
    eager = make_dynamic(variant, attn_implementation="eager")
    for depth, gmac_per_s in zip((1, 3), counted, strict=True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            eager(torch.zeros(1, 8000), num_active_layers=depth)
        assert gmac_per_s == pytest.approx(counter.get_total_flops() / 2 / 1e9 / 0.5)
    longer = count_gmac_per_s(model, [3], 5.0, 16_000)[0]
    assert longer > counted[1], "attention is quadratic in the length"


def test_peak_of_tensors_that_live_together():
    start = torch.ones(1000)  # not made while counting
    with PeakTensorMemory() as memory:
        first = start + 1
        view = first.view(10, 100)
        del first
        second = view * 2
        view.add_(1)
        del view
        third = second + 1
    assert (memory.peak, memory.live) == (8000, 8000)
    assert third.sum() == 5000
    del second, third
    assert memory.live == 0


def test_memory_grows_with_depth_and_length():
    model = make_dynamic("wavlm-stable")
    short, long = ({"input_values": torch.zeros(1, samples)} for samples in (8000, 80_000))
    one, four = (measure_memory_mb(model, long, range(depth)) for depth in (1, 4))
    assert measure_memory_mb(model, short, [0]) < one < four
