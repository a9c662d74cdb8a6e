"""Batches of utterances of similar length, in an order that all processes agree on and a resumed run finds again."""

from collections.abc import Callable, Iterator, Sequence

import datasets
import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

BATCHES_PER_BUCKET = 4  # more mix the batches better, fewer leave less padding


def longest_first(dataset: datasets.Dataset) -> np.ndarray:
    """Indices (utterances,) by falling `input_length`, read as Arrow columns: no Python object for an utterance."""
    column = dataset.select_columns("input_length").with_format("arrow")
    lengths = [table["input_length"].to_numpy().astype(np.int32) for table in column.iter(100_000)]
    return np.argsort(-np.concatenate(lengths or [np.empty(0, np.int32)]), kind="stable").astype(np.uint32)


class SecondsBatchSampler(Sampler[list[int]]):
    """Batches of utterances of similar length, each of at most so many seconds with its padding.

    Sorted by length, the utterances are cut into buckets of a few batches each, and a bucket's batches hold as many
    utterances as fit with its longest one. Every epoch mixes the utterances of a bucket and the order of all batches
    anew, as a function of (seed, epoch). The number of batches is the same in every epoch, for that is how a `Trainer`
    plans its steps and finds back to where it was interrupted.

    Args:
        durations_s: the length of each utterance.
        max_batch_s: the most that a batch may hold: its number of utterances times its longest one.
        seed: of the order.
        epoch: gives the present epoch when an epoch is begun.

    Raises:
        ValueError: an utterance that is longer than a batch.
    """

    def __init__(
        self,
        durations_s: Sequence[float],
        max_batch_s: float,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
    ):
        durations = np.asarray(durations_s, dtype=np.float64)
        if durations.size and durations.max() > max_batch_s:
            raise ValueError(
                f"max_batch_seconds={max_batch_s:g} is less than the longest utterance, number {durations.argmax()}, "
                f"which has {durations.max():g} s: raise it, or leave longer utterances out (max_duration_s)."
            )
        self.seed, self.epoch = seed, epoch
        self.buckets: list[tuple[np.ndarray, int]] = []  # utterances, and the number of their batches
        longest_first = np.argsort(-durations, kind="stable")
        while longest_first.size:
            batch_size = int(max_batch_s / durations[longest_first[0]])
            bucket, longest_first = np.split(longest_first, [batch_size * BATCHES_PER_BUCKET])
            self.buckets.append((bucket, -(-len(bucket) // batch_size)))

    def __len__(self) -> int:
        return sum(num_batches for _, num_batches in self.buckets)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch()))
        batches = [
            batch.tolist()
            for bucket, num_batches in self.buckets
            for batch in np.array_split(random.permutation(bucket), num_batches)
        ]
        for index in random.permutation(len(batches)):
            yield batches[index]


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Transformers' sampler of similar lengths, whose order is a function of (seed, epoch) and nothing else.

    Args:
        batch_size: utterances in a batch of all processes and accumulation steps together.
        lengths: of each utterance.
        seed: of the order.
        epoch: gives the present epoch when an epoch is begun.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        # mixed into the 32 bits that torch's generator looks at
        mixed = np.random.SeedSequence((self.seed, self.epoch())).generate_state(1)[0]
        self.generator.manual_seed(int(mixed))
        return super().__iter__()
