"""The latency model: what it says, and that it is fitted to what was measured."""

import pytest
import torch
from conftest import NUM_LAYERS, make_dynamic
from hypothesis import given
from hypothesis import strategies as st

from hf_dld.evaluation import LatencyModel, calibrate_latency, latency

MODEL = LatencyModel(12, (1.0, 2.0, 4.0), (0.1, 0.3, 1.0), (0.65, 1.4, 3.2), {})


def test_prediction():
    assert MODEL.predict(1, 2.0) == pytest.approx(0.3) and MODEL.predict(12, 4.0) == pytest.approx(3.2)
    assert MODEL.predict(3, 1.0) == pytest.approx(0.1 + 2 * 0.05), "each layer adds the same"
    assert MODEL.predict(1, 3.0) == pytest.approx(3 * (0.15 + 0.25) / 2), "seconds a second, 0.15 at 2 s, 0.25 at 4 s"
    mostly_fixed = LatencyModel(12, (1.0, 3.0), (0.1, 0.14), (0.2, 0.3), {})
    assert mostly_fixed.predict(1, 2.0) == pytest.approx(0.12), "0.08 s for every pass, 0.02 s a second"
    assert MODEL.predict(1, 8.0) == pytest.approx(8 * (0.25 + 4 * 0.05)), "and so on beyond"


@given(st.integers(1, 12), st.floats(0.001, 1000), st.floats(0.001, 1000))
def test_longer_audio_takes_longer(depth, first, second):
    short, long = sorted((first, second))
    assert 0 < MODEL.predict(depth, short) <= MODEL.predict(depth, long) * (1 + 1e-9)


@given(st.floats(0.1, 60), st.floats(0.001, 10))
def test_the_deepest_that_keeps_the_budget(audio_s, budget_s):
    within = [depth for depth in range(1, 13) if MODEL.predict(depth, audio_s) <= budget_s]
    if within:
        assert MODEL.deepest(audio_s, budget_s) == max(within)
    else:
        with pytest.raises(ValueError, match="the fastest depth, 1 active layer, takes about"):
            MODEL.deepest(audio_s, budget_s)


@pytest.mark.parametrize("total", [1, 2, 12])
def test_calibration_finds_what_a_device_takes(total, monkeypatch):
    """A device of which every pass, second and square of it takes its time, with one interruption."""
    model = make_dynamic("wavlm-stable", num_hidden_layers=total).train()
    interruptions = iter([5.0])

    def device_s(depth, audio_s):
        return 0.001 + 0.02 * audio_s + 0.001 * audio_s**2 + depth * (0.0002 + 0.01 * audio_s + 0.0005 * audio_s**2)

    def forward_seconds(model, batch, active_layers):
        samples = batch["input_values"].shape[1]
        slow = next(interruptions, 0.0) if samples == 1600 and not model.training and forward_seconds.warm else 0.0
        forward_seconds.warm = True
        return device_s(len(active_layers), samples / 16_000) + slow

    forward_seconds.warm = False
    monkeypatch.setattr(latency, "forward_seconds", forward_seconds)
    monkeypatch.setattr(latency, "_SECONDS_FOR_A_POINT", 100.0)
    fitted = calibrate_latency(model, max_audio_s=3.0)
    for depth in range(1, total + 1):
        for audio_s in (0.05, 0.2, 1.0, 2.5, 3.0, 6.0):
            assert fitted.predict(depth, audio_s) == pytest.approx(device_s(depth, audio_s), rel=0.06)
        assert fitted.predict(depth, 3.0) == pytest.approx(device_s(depth, 3.0), rel=1e-6)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibration_of_a_real_model(dtype):
    model = make_dynamic("wavlm-stable").to(dtype)
    fitted = calibrate_latency(model, max_audio_s=1.0)
    assert fitted.num_hidden_layers == NUM_LAYERS and fitted.conditions["threads"] == 1
    assert fitted.predict(2, 0.5) > 0


def test_careless_arguments():
    with pytest.raises(ValueError, match="max_audio_s=0.3 must be a finite number of at least 0.309 s, so that"):
        calibrate_latency(make_dynamic("wavlm"), max_audio_s=0.3)
    for audio_s in (0, -1, float("inf")):
        with pytest.raises(ValueError, match="must be a finite number above 0"):
            MODEL.predict(1, audio_s)
        with pytest.raises(ValueError, match="max_audio_s=.* must be a finite number of at least 0.309 s"):
            calibrate_latency(make_dynamic("wavlm"), max_audio_s=audio_s)
        with pytest.raises(ValueError, match="latency_budget_s=.* must be a finite number of seconds above 0"):
            MODEL.deepest(1.0, audio_s)
    with pytest.raises(ValueError, match="from 1 to 12.*; got 13"):
        MODEL.predict(13, 1.0)
