"""Which frames of a step are masked and which are negatives: functions of (seed, step, utterance), of nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .losses import frame_mask


@dataclass(frozen=True)
class MaskedFrames:
    """The masked frames of a batch.

    Args:
        time_mask: (batch, frames), true where the student's input is masked: `mask_time_indices` of the models.
        indices: (batch, masked), the masked frames of each utterance in order, padded with 0.
        counts: (batch,), how many masked frames each utterance has.
        candidates: (batch, masked, masked), true at (i, j) where j is i or one of its negatives (`info_nce_loss`).
    """

    time_mask: torch.Tensor
    indices: torch.Tensor
    counts: torch.Tensor
    candidates: torch.Tensor

    def to(self, device: torch.device) -> "MaskedFrames":
        return MaskedFrames(*(tensor.to(device) for tensor in vars(self).values()))

    def gather(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, masked, width), the masked frames of features (batch, frames, width), 0 in padding."""
        masked = features.gather(1, self.indices.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        return masked.masked_fill(~frame_mask(self.counts, masked.shape[1]).unsqueeze(-1), 0.0)


def draw_masked_frames(
    frame_lengths: Sequence[int],
    num_frames: int,
    utterance_ids: Sequence[int],
    *,
    seed: int,
    step: int,
    mask_time_prob: float = 0.65,
    mask_time_length: int = 10,
    num_negatives: int = 100,
) -> MaskedFrames:
    """Draw spans of masked frames and, for each masked frame, negatives among the others of its utterance.

    What an utterance draws depends on (`seed`, `step`, its id) alone: not on its neighbours in the batch, nor on how
    the batch is split, and a resumed run draws what the straight run would have drawn.

    Args:
        frame_lengths: frames of each utterance that are not padding.
        num_frames: frames of the padded batch.
        utterance_ids: a number of each utterance's own, at least 0.
        seed: of the run, at least 0.
        step: of the optimizer, at least 0.
        mask_time_prob, mask_time_length: see `draw_spans`.
        num_negatives: for each frame, without replacement, never the frame itself; all the others where there are
            fewer, none for an only one.
    """
    masked = []
    offsets = []
    for length, utterance_id in zip(frame_lengths, utterance_ids, strict=True):
        rng = np.random.default_rng([seed, step, utterance_id])
        masked.append(draw_spans(length, mask_time_prob, mask_time_length, rng))
        offsets.append(draw_negative_offsets(len(masked[-1]), num_negatives, rng))

    widest = max(1, *map(len, masked))
    time_mask = np.zeros((len(masked), num_frames), dtype=bool)
    indices = np.zeros((len(masked), widest), dtype=np.int64)
    candidates = np.tile(np.eye(widest, dtype=bool), (len(masked), 1, 1))
    for row, (frames, utterance_offsets) in enumerate(zip(masked, offsets, strict=True)):
        count = len(frames)
        time_mask[row, frames] = True
        indices[row, :count] = frames
        is_offset = np.zeros(max(count, 1), dtype=bool)
        is_offset[[0, *utterance_offsets]] = True
        positions = np.arange(count)
        candidates[row, :count, :count] = is_offset[(positions - positions[:, None]) % max(count, 1)]
    counts = np.array([len(frames) for frames in masked])
    return MaskedFrames(*map(torch.from_numpy, (time_mask, indices, counts, candidates)))


def draw_spans(num_frames: int, mask_time_prob: float, mask_time_length: int, rng: np.random.Generator) -> np.ndarray:
    """The masked frames of one utterance, ascending.

    As wav2vec 2.0 masks (arXiv 2006.11477, section 3.1, in the form of Transformers' `_compute_mask_indices`): about
    `mask_time_prob * num_frames / mask_time_length` spans of `mask_time_length` frames, with starts of their own but
    free to overlap, so that 0.65 masks about half of the frames. At least one span; none in an utterance of
    `mask_time_length` frames or fewer, which would not leave anything to predict from.
    """
    if num_frames <= mask_time_length:
        return np.zeros(0, dtype=np.int64)
    starts = num_frames - mask_time_length + 1
    count = int(mask_time_prob * num_frames / mask_time_length + rng.random())
    chosen = rng.choice(starts, min(max(count, 1), starts), replace=False)
    return np.unique(chosen[:, None] + np.arange(mask_time_length))


def draw_negative_offsets(num_masked: int, num_negatives: int, rng: np.random.Generator) -> np.ndarray:
    """How far each frame's negatives are behind it, counted in masked frames and around the end.

    Offsets that all frames of the utterance share give each frame negatives that are a uniform draw from the others,
    without replacement, for one small draw.
    """
    others = max(num_masked - 1, 0)
    return 1 + rng.choice(others, min(num_negatives, others), replace=False) if others else np.zeros(0, dtype=np.int64)
