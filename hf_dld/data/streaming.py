"""Training from a corpus that is read as it goes, and never held or indexed."""

from collections.abc import Callable
from typing import Any

import datasets
from transformers import ProcessorMixin

from .filtering import FilterReport, prepare_dataset


def training_stream(
    dataset: datasets.IterableDataset,
    processor: ProcessorMixin,
    frames_of: Callable[[int], int],
    *,
    shuffle_buffer_size: int | None = 1000,
    seed: int = 0,
    **limits: Any,
) -> tuple[datasets.IterableDataset, FilterReport]:
    """An endless stream of a corpus's utterances that can be trained on, shuffled.

    Endless, so that a run of any `max_steps` is one epoch: the Trainer resumes a stream by skipping what was read, and
    would find nothing left beyond the first pass. The order depends on `seed` alone.

    Args:
        dataset: as `load_speech_dataset(..., streaming=True)` returns it.
        processor, frames_of: as in `prepare_dataset`.
        shuffle_buffer_size: an utterance is drawn from so many that are held, not decoded; None keeps their order. A
            corpus that is sorted needs a large one.
        seed: of the shuffling.
        limits: further arguments of `prepare_dataset`, such as `min_duration_s`.

    Returns:
        The stream, and a report that grows while it is read, each pass counting anew, in the process that reads it.

    Raises:
        ValueError: a buffer of less than 1, or a corpus of which nothing is left.
    """
    if shuffle_buffer_size is not None and shuffle_buffer_size < 1:
        raise ValueError(f"shuffle_buffer_size must be at least 1 utterance; got {shuffle_buffer_size}.")
    once, report = prepare_dataset(dataset, processor, frames_of, **limits)
    if next(iter(once), None) is None:
        raise ValueError(f"no utterance is left to train on:\n{report}")
    endless = dataset.repeat(None)
    if shuffle_buffer_size is not None:
        endless = endless.shuffle(seed=seed, buffer_size=shuffle_buffer_size)
    return prepare_dataset(endless, processor, frames_of, decode_once=True, **limits)
