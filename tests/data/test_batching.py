"""Batches by seconds: nothing lost, nothing over the limit, the same number in every epoch and process."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st

from hf_dld.data.batching import SecondsBatchSampler, SeededLengthGroupedSampler

DURATIONS = st.lists(st.floats(0.1, 30.0), min_size=1, max_size=300)


@given(durations=DURATIONS, limit=st.floats(30.0, 200.0), seed=st.integers(0, 9))
def test_every_utterance_once_and_no_batch_over_the_limit(durations, limit, seed):
    epoch = 0
    sampler = SecondsBatchSampler(durations, limit, seed, lambda: epoch)
    for epoch in range(3):  # noqa: B007 (the sampler asks for it)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(index for batch in batches for index in batch) == list(range(len(durations)))
        assert all(len(batch) * max(durations[index] for index in batch) <= limit * (1 + 1e-9) for batch in batches)


@given(durations=DURATIONS, num_processes=st.integers(2, 5))
def test_processes_have_equally_many_batches_that_cover_all(durations, num_processes):
    sampler = SecondsBatchSampler(durations, 40.0)
    shares = [list(BatchSamplerShard(sampler, num_processes, rank)) for rank in range(num_processes)]
    assert len({len(share) for share in shares}) == 1
    assert {index for share in shares for batch in share for index in batch} == set(range(len(durations)))


def test_the_order_is_a_function_of_seed_and_epoch():
    durations = np.random.default_rng(0).uniform(1, 15, 500)
    orders = {
        (seed, epoch): list(SecondsBatchSampler(durations, 60.0, seed, lambda e=epoch: e))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({str(order) for order in orders.values()}) == 4
    assert orders[0, 1] == list(SecondsBatchSampler(durations, 60.0, 0, lambda: 1))
    # not only the order of the batches: who is with whom as well
    assert sorted(map(sorted, orders[0, 0])) != sorted(map(sorted, orders[0, 1]))


def test_little_is_padding():
    durations = np.random.default_rng(0).uniform(1, 15, 2000)
    batches = list(SecondsBatchSampler(durations, 120.0))
    padded = sum(len(batch) * durations[batch].max() for batch in batches)
    assert 1 - durations.sum() / padded < 0.03
    assert padded / len(batches) > 0.9 * 120.0


def test_an_utterance_longer_than_a_batch():
    with pytest.raises(
        ValueError, match="max_batch_seconds=5 is less than the longest utterance, number 1, which has 7.5 s"
    ):
        SecondsBatchSampler([1.0, 7.5, 2.0], 5.0)


def test_an_order_that_depends_on_seed_and_epoch_alone():
    epoch = 0
    lengths = list(range(40))
    sampler = SeededLengthGroupedSampler(4, lengths, seed=1, epoch=lambda: epoch)
    first = list(sampler)
    torch.rand(7)
    assert list(sampler) == first and sorted(first) == lengths and len(sampler) == 40
    other_seed = SeededLengthGroupedSampler(4, lengths, seed=2, epoch=lambda: epoch)
    assert list(other_seed) != first
    epoch = 1
    assert list(sampler) != first
