"""Utterances in batches of about equal length, in bounded memory."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import datasets
import torch
from transformers import ProcessorMixin
from transformers.utils import logging

from ..data import DataCollatorCTC
from ..data.batching import longest_first

CHUNK_BATCHES = 16


def batch_policy(dataset: Any, batch_size: int) -> str:
    """How `example_batches` batches, in words."""
    if isinstance(dataset, datasets.Dataset):
        return f"batches of {batch_size}, sorted by length"
    return f"batches of {batch_size}, sorted by length within chunks of {CHUNK_BATCHES * batch_size}"


def length_sorted_batches(
    dataset: Any, processor: ProcessorMixin, batch_size: int
) -> Iterable[dict[str, torch.Tensor]]:
    """Batches of the collator, the longest utterances first."""
    collate = DataCollatorCTC(processor)
    for examples in example_batches(dataset, batch_size):
        yield collate(examples)


def example_batches(
    dataset: Any, batch_size: int, first: int = 0, rank: int = 0, num_processes: int = 1
) -> Iterator[list[dict[str, Any]]]:
    """Batches of examples, the longest utterances first: what does not fit in memory fails at once.

    A `datasets.Dataset` is sorted as a whole, by its column `input_length`, and batches that are left out are not
    read. Anything else is read in its order, and sorted within chunks of `CHUNK_BATCHES` batches.

    Args:
        first: leave out so many batches of this process's share; 0 for a dataset that is not a `datasets.Dataset`.
        rank, num_processes: this process's share is every `num_processes`-th batch, from number `rank` on: the same
            batches as a single process makes, so that each utterance keeps its padding.
    """
    if isinstance(dataset, datasets.Dataset):
        order = longest_first(dataset)
        starts = range((first * num_processes + rank) * batch_size, len(order), num_processes * batch_size)
        for start in logging.tqdm(starts, desc="Evaluating", unit="batch", disable=rank > 0):
            yield [dataset[int(index)] for index in order[start : start + batch_size]]
        return
    yield from islice(_batches_in_order(dataset, batch_size, rank), rank, None, num_processes)


def _batches_in_order(dataset: Any, batch_size: int, rank: int) -> Iterator[list[dict[str, Any]]]:
    examples = iter(logging.tqdm(dataset, desc="Evaluating", unit="utterance", disable=rank > 0))
    while chunk := list(islice(examples, CHUNK_BATCHES * batch_size)):
        chunk.sort(key=lambda example: -example["input_length"])
        yield from (chunk[start : start + batch_size] for start in range(0, len(chunk), batch_size))
