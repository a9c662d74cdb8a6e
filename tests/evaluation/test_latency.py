"""The latency model: what it says, and that it is fitted to what was measured."""

import pytest
from conftest import NUM_LAYERS, make_dynamic
from hypothesis import given
from hypothesis import strategies as st

from hf_dld.evaluation import LatencyModel, calibrate_latency, latency

MODEL = LatencyModel(12, (0.01, 0.02, 0.001), (0.002, 0.01, 0.0005), {})


def test_prediction():
    assert MODEL.predict(3, 2.0) == pytest.approx(0.01 + 0.04 + 0.004 + 3 * (0.002 + 0.02 + 0.002))


@given(st.floats(0.1, 60), st.floats(0.001, 10))
def test_the_deepest_that_keeps_the_budget(audio_s, budget_s):
    within = [depth for depth in range(1, 13) if MODEL.predict(depth, audio_s) <= budget_s]
    if within:
        assert MODEL.deepest(audio_s, budget_s) == max(within)
    else:
        with pytest.raises(ValueError, match="the fastest depth, 1 active layer, takes about"):
            MODEL.deepest(audio_s, budget_s)


@pytest.mark.parametrize("total", [1, 2, 12])
def test_calibration_finds_the_coefficients_of_a_device(total, monkeypatch):
    """A device that takes exactly what a latency model says, with one interruption."""
    device = LatencyModel(total, MODEL.rest, MODEL.layer, {})
    model = make_dynamic("wavlm-stable", num_hidden_layers=total).train()
    interruptions = iter([5.0])

    def forward_seconds(model, batch, active_layers):
        samples = batch["input_values"].shape[1]
        slow = next(interruptions, 0.0) if samples == 1600 and not model.training and forward_seconds.warm else 0.0
        forward_seconds.warm = True
        return device.predict(len(active_layers), samples / 16_000) + slow

    forward_seconds.warm = False
    monkeypatch.setattr(latency, "forward_seconds", forward_seconds)
    monkeypatch.setattr(latency, "_SECONDS_FOR_A_POINT", 100.0)
    fitted = calibrate_latency(model, max_audio_s=3.0)
    for depth in range(1, total + 1):
        for audio_s in (0.2, 1.0, 3.0, 10.0):
            assert fitted.predict(depth, audio_s) == pytest.approx(device.predict(depth, audio_s), rel=1e-6)
    assert model.training


def test_calibration_of_a_real_model():
    model = make_dynamic("conformer-relative")
    fitted = calibrate_latency(model, max_audio_s=1.0)
    assert fitted.num_hidden_layers == NUM_LAYERS and fitted.conditions["threads"] == 1
    assert fitted.predict(2, 0.5) > 0


def test_careless_arguments():
    for audio_s in (0, -1, float("inf")):
        with pytest.raises(ValueError, match="must be a finite number above 0"):
            MODEL.predict(1, audio_s)
        with pytest.raises(ValueError, match="max_audio_s=.* must be a finite number above 0"):
            calibrate_latency(make_dynamic("wavlm"), max_audio_s=audio_s)
        with pytest.raises(ValueError, match="latency_budget_s=.* must be a finite number of seconds above 0"):
            MODEL.deepest(1.0, audio_s)
    with pytest.raises(ValueError, match="from 1 to 12.*; got 13"):
        MODEL.predict(13, 1.0)
