"""How long a pass will take on this machine: measured in seconds without a dataset, for any depth and length."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..models.depth import check_num_active_layers
from .cost import describe_conditions, forward_seconds

# Lengths that are measured, as shares of the longest: more where short audio bends the curve
_SHARES = (1 / 30, 0.1, 0.3, 0.6, 1.0)
_REPEATS = 5
_SECONDS_FOR_A_POINT = 2.0


@dataclass(frozen=True)
class LatencyModel:
    """Seconds of a forward pass of one utterance, as a function of depth and length.

    `rest + num_active_layers * layer`, each a polynomial of the seconds of audio: its coefficients (constant, linear,
    quadratic). Attention is what is quadratic. Holds for the `conditions` under which it was measured.
    """

    num_hidden_layers: int
    rest: tuple[float, float, float]
    layer: tuple[float, float, float]
    conditions: dict[str, Any]

    def predict(self, num_active_layers: int, audio_s: float) -> float:
        """Seconds that `num_active_layers` take for `audio_s` seconds of audio."""
        depth = check_num_active_layers(num_active_layers, self.num_hidden_layers)
        if not (math.isfinite(audio_s) and audio_s > 0):
            raise ValueError(f"audio_s={audio_s!r} must be a finite number above 0")
        return float(np.polynomial.polynomial.polyval(audio_s, np.add(self.rest, np.multiply(depth, self.layer))))

    def deepest(self, audio_s: float, latency_budget_s: float) -> int:
        """The largest number of active layers that is predicted to keep the budget.

        Raises:
            ValueError: no depth does; the message names what the fastest one takes.
        """
        check_latency_budget(latency_budget_s)
        for depth in range(self.num_hidden_layers, 0, -1):
            if self.predict(depth, audio_s) <= latency_budget_s:
                return depth
        raise ValueError(
            f"latency_budget_s={latency_budget_s:g} cannot be kept for {audio_s:.2f} s of audio: the fastest depth, 1 "
            f"active layer, takes about {self.predict(1, audio_s):.3g} s on this device"
        )


def check_latency_budget(latency_budget_s: float) -> None:
    """Raise ValueError unless it is a finite number of seconds above 0."""
    is_number = isinstance(latency_budget_s, int | float) and not isinstance(latency_budget_s, bool)
    if not is_number or not math.isfinite(latency_budget_s) or latency_budget_s <= 0:
        raise ValueError(f"latency_budget_s={latency_budget_s!r} must be a finite number of seconds above 0")


def calibrate_latency(
    model: PreTrainedModel, sampling_rate_hz: int = 16_000, *, max_audio_s: float = 30.0
) -> LatencyModel:
    """Measure this model on the device that it is on, and fit a `LatencyModel`.

    One layer and all layers are timed on noise of five lengths up to `max_audio_s`, in turns, up to five times where
    that is quick. The six coefficients are those of least squares of the relative error of the medians.

    Takes about as long as transcribing 60 s of audio with one layer and with all, for `max_audio_s=30`, and a few
    seconds more. The model is left as it came, and the number of threads is the one that is set.
    """
    if not (math.isfinite(max_audio_s) and max_audio_s > 0):
        raise ValueError(f"max_audio_s={max_audio_s!r} must be a finite number above 0")
    total = model.config.num_hidden_layers
    depths = sorted({1, total})
    points = [(depth, max_audio_s * share) for share in _SHARES for depth in depths]
    was_training = model.training
    model.eval()
    try:
        seconds = _measure_points(model, points, sampling_rate_hz)
    finally:
        model.train(was_training)
    powers = np.array([[1.0, audio_s, audio_s**2] for _, audio_s in points])
    numbers = np.array([[depth] for depth, _ in points])
    # with a single layer there is nothing to tell layer and rest apart by, and no need to
    columns = powers if total == 1 else np.hstack([powers, numbers * powers])
    fitted = np.linalg.lstsq(columns / seconds[:, None], np.ones(len(points)), rcond=None)[0]
    rest, layer = tuple(map(float, fitted[:3])), tuple(map(float, fitted[3:])) or (0.0, 0.0, 0.0)
    return LatencyModel(total, rest, layer, describe_conditions(model))


def _measure_points(model: PreTrainedModel, points: list[tuple[int, float]], sampling_rate_hz: int) -> np.ndarray:
    """Median seconds of each (depth, seconds of audio)."""
    generator = torch.Generator().manual_seed(0)
    seconds: list[list[float]] = [[] for _ in points]
    for turn in range(-1, _REPEATS):  # turn -1 warms up
        for times, (depth, audio_s) in zip(seconds, points, strict=True):
            if turn > 0 and sum(times) + times[-1] > _SECONDS_FOR_A_POINT:
                continue
            if turn < 0 and audio_s != points[0][1]:
                continue
            samples = torch.randn(1, round(audio_s * sampling_rate_hz), generator=generator).to(model.device)
            batch = {model.main_input_name: samples, "attention_mask": torch.ones_like(samples, dtype=torch.long)}
            layers = model.config.resolve_active_layers(num_active_layers=depth)
            taken = forward_seconds(model, batch, layers)
            if turn >= 0:
                times.append(taken)
    return np.array([np.median(times) for times in seconds])
