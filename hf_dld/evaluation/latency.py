"""How long a pass will take on this machine: measured in seconds without a dataset, for any depth and length."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.collator import on_model
from ..models.depth import check_num_active_layers
from ..models.feature_encoder import samples_of_a_frame
from .cost import describe_conditions, forward_seconds

# Lengths that are measured, as shares of the longest: more where short audio bends the curve
_SHARES = (1 / 30, 0.1, 0.25, 0.45, 0.7, 1.0)
_REPEATS = 5
_SECONDS_FOR_A_POINT = 2.0


@dataclass(frozen=True)
class LatencyModel:
    """Seconds of a forward pass of one utterance, as a function of depth and length.

    No polynomial holds for all lengths, because long audio leaves the processor's caches: between two lengths that were
    measured, it is interpolated. The seconds themselves, in a straight line, are too many where the operations of
    attention grow with the square of the length; the seconds for a second of audio are too many where a cost that every
    pass has is spread over more audio. So the smaller of the two counts. Each layer adds the same.

    Args:
        num_hidden_layers: of the model.
        audio_s: the lengths that were measured, ascending.
        first_layer_s: seconds of a pass with one active layer, for each length.
        all_layers_s: the same with all layers.
        conditions: under which this holds.
    """

    num_hidden_layers: int
    audio_s: tuple[float, ...]
    first_layer_s: tuple[float, ...]
    all_layers_s: tuple[float, ...]
    conditions: dict[str, Any]

    def predict(self, num_active_layers: int, audio_s: float) -> float:
        """Seconds that `num_active_layers` take for `audio_s` seconds of audio."""
        depth = check_num_active_layers(num_active_layers, self.num_hidden_layers)
        if not (math.isfinite(audio_s) and audio_s > 0):
            raise ValueError(f"audio_s={audio_s!r} must be a finite number above 0")
        share = (depth - 1) / max(self.num_hidden_layers - 1, 1)
        measured_s = (1 - share) * np.array(self.first_layer_s) + share * np.array(self.all_layers_s)
        return _interpolate(audio_s, np.array(self.audio_s), measured_s)

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
    is_number = isinstance(latency_budget_s, numbers.Real) and not isinstance(latency_budget_s, bool)
    if not is_number or not math.isfinite(latency_budget_s) or latency_budget_s <= 0:
        raise ValueError(f"latency_budget_s={latency_budget_s!r} must be a finite number of seconds above 0")


def calibrate_latency(
    model: PreTrainedModel, sampling_rate_hz: int = 16_000, *, max_audio_s: float = 30.0
) -> LatencyModel:
    """Measure this model on the device that it is on, for a `LatencyModel`.

    One layer and all layers are timed on noise of six lengths up to `max_audio_s`, in turns, up to five times where
    that is quick; the medians count.

    Takes about as long as transcribing 75 s of audio with one layer and with all, for `max_audio_s=30`, and a few
    seconds more. The model is left as it came, and the number of threads is the one that is set.
    """
    least_s = samples_of_a_frame(model.config) / sampling_rate_hz / min(_SHARES)
    if not (math.isfinite(max_audio_s) and max_audio_s >= least_s):
        raise ValueError(
            f"max_audio_s={max_audio_s!r} must be a finite number of at least {least_s:.3g} s, so that the shortest of "
            "the lengths that are timed makes a frame"
        )
    total = model.config.num_hidden_layers
    depths = sorted({1, total})
    points = [(depth, max_audio_s * share) for share in _SHARES for depth in depths]
    was_training = model.training
    model.eval()
    try:
        seconds = _measure_points(model, points, sampling_rate_hz)
    finally:
        model.train(was_training)
    first, last = seconds.reshape(len(_SHARES), len(depths))[:, [0, -1]].T
    lengths = tuple(max_audio_s * share for share in _SHARES)
    return LatencyModel(total, lengths, tuple(map(float, first)), tuple(map(float, last)), describe_conditions(model))


def _interpolate(audio_s: float, lengths: np.ndarray, seconds: np.ndarray) -> float:
    """Seconds for a length from those of others; beyond the longest, on as between the last two."""
    if audio_s < lengths[0]:  # what every pass costs weighs more the shorter it is
        slope = (seconds[1] - seconds[0]) / (lengths[1] - lengths[0])
        return float(seconds[0] - min(slope, seconds[0] / lengths[0]) * (lengths[0] - audio_s))
    upper = int(np.clip(np.searchsorted(lengths, audio_s), 1, len(lengths) - 1))
    (low, high), rates = lengths[upper - 1 : upper + 1], (seconds / lengths)[upper - 1 : upper + 1]
    share = (audio_s - low) / (high - low)
    rate = rates[0] + (rates[1] - rates[0]) * share
    if audio_s > high:  # a rate that falls does not fall for ever
        return float(audio_s * max(rate, rates[1]))
    straight_s = seconds[upper - 1] + (seconds[upper] - seconds[upper - 1]) * share
    return float(min(audio_s * rate, straight_s))


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
            samples = torch.randn(1, round(audio_s * sampling_rate_hz), generator=generator)
            mask = torch.ones_like(samples, dtype=torch.long)
            batch = on_model({model.main_input_name: samples, "attention_mask": mask}, model)
            layers = model.config.resolve_active_layers(num_active_layers=depth)
            taken = forward_seconds(model, batch, layers)
            if turn >= 0:
                times.append(taken)
    return np.array([np.median(times) for times in seconds])
