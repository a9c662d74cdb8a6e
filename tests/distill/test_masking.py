"""Which frames are masked, and which are negatives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dld.distill.masking import draw_masked_frames, draw_negative_offsets, draw_spans

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=4)


def draw(lengths, step=1, seed=0, ids=None, **options):
    ids = range(len(lengths)) if ids is None else ids
    return draw_masked_frames(lengths, max(60, *lengths), list(ids), seed=seed, step=step, **options)


@given(st.integers(0, 80), st.floats(0.01, 1.0), st.integers(1, 12), st.integers(0, 9))
def test_spans(num_frames, prob, length, seed):
    frames = draw_spans(num_frames, prob, length, np.random.default_rng(seed))
    if num_frames <= length:
        assert len(frames) == 0
        return
    assert (np.diff(frames) > 0).all() and frames.min() >= 0 and frames.max() < num_frames
    runs = np.split(frames, np.flatnonzero(np.diff(frames) > 1) + 1)
    assert all(len(run) >= length for run in runs), "whole spans only"


def test_the_default_masks_about_half():
    rng = np.random.default_rng(0)
    shares = [len(draw_spans(500, 0.65, 10, rng)) / 500 for _ in range(200)]
    assert 1 - np.exp(-0.65) == pytest.approx(np.mean(shares), abs=0.02)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 20), st.integers(0, 5))
def test_negatives_are_other_masked_frames_and_never_the_positive(lengths, num_negatives, step):
    masked = draw(lengths, step, num_negatives=num_negatives, mask_time_length=3)
    assert masked.time_mask.sum(1).tolist() == masked.counts.tolist()
    for row, length in enumerate(lengths):
        count = int(masked.counts[row])
        assert not masked.time_mask[row, length:].any(), "padding is never masked"
        assert masked.indices[row, :count].tolist() == masked.time_mask[row].nonzero().flatten().tolist()
        candidates = masked.candidates[row]
        assert candidates.diagonal().all(), "the positive is a candidate, once, and so no negative"
        assert (
            not candidates[:count, count:].any()
            and not (candidates[count:] ^ torch.eye(len(candidates))[count:].bool()).any()
        )
        negatives = candidates[:count, :count].sum(1) - 1
        assert (negatives == min(num_negatives, max(count - 1, 0))).all()


def test_fewer_frames_than_negatives_gives_all_the_others():
    masked = draw([30])
    count = int(masked.counts[0])
    assert 1 < count <= 100 and masked.candidates[0, :count, :count].all()


def test_a_long_utterance_draws_100_of_the_others_evenly():
    rng = np.random.default_rng(0)
    seen = np.zeros(301)
    for _ in range(600):
        offsets = draw_negative_offsets(301, 100, rng)
        assert len(set(offsets)) == 100
        seen[offsets] += 1
    assert seen[0] == 0
    assert seen[1:].min() > 140 and seen[1:].max() < 260  # 200 expected, standard deviation 11.5


def test_one_masked_frame_has_no_negative():
    assert draw_negative_offsets(1, 100, np.random.default_rng(0)).tolist() == []
    masked = draw([2], mask_time_length=1, mask_time_prob=0.01)
    assert masked.counts.tolist() == [1] and masked.candidates.tolist() == [[[True]]]


def test_short_utterances_are_not_masked():
    masked = draw([10, 3, 0])
    assert masked.counts.tolist() == [0, 0, 0] and not masked.time_mask.any()
    assert masked.gather(torch.full((3, 60, 2), 7.0)).abs().sum() == 0


@settings(deadline=None)
@given(st.permutations(range(4)), st.integers(1, 9))
def test_an_utterance_draws_the_same_wherever_it_is(order, step):
    lengths = [40, 25, 60, 33]
    together = draw([lengths[i] for i in order], step, ids=order, num_negatives=5)
    for row, i in enumerate(order):
        alone = draw([lengths[i]], step, ids=[i], num_negatives=5)
        count = int(alone.counts[0])
        assert torch.equal(together.time_mask[row], alone.time_mask[0])
        assert torch.equal(together.candidates[row, :count, :count], alone.candidates[0])


def test_steps_seeds_and_utterances_differ():
    first = draw([60], 1).time_mask
    assert torch.equal(first, draw([60], 1).time_mask)
    for other in (draw([60], 2), draw([60], 1, seed=1), draw([60], 1, ids=[5])):
        assert not torch.equal(first, other.time_mask)


def test_gather():
    masked = draw([40, 25], mask_time_length=4)
    features = torch.arange(2 * 60, dtype=torch.float32).view(2, 60, 1)
    gathered = masked.gather(features)
    for row in range(2):
        count = int(masked.counts[row])
        assert gathered[row, :count, 0].tolist() == features[row, masked.time_mask[row], 0].tolist()
        assert not gathered[row, count:].any()
