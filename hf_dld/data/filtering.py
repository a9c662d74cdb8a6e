"""Utterances that cannot be trained on are found before training: each is dropped, counted and reported."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Audio, Features, List, Value
from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .audio import AudioError, audio_name, decode_audio, encode_wav
from .manifests import file_version
from .vocabulary import encode_text, unknown_characters

logger = logging.get_logger(__name__)

EXAMPLES_PER_REASON = 3
UNKNOWN_CHARACTERS = "characters outside the vocabulary"
NO_TRANSCRIPT = "no transcript"
UNREADABLE_IN_A_ROW = 100  # files of a stream; no corpus is like that, a drive that is gone is
ROWS_IN_MEMORY = 16  # of decoded audio, before they are written: 30 MB of utterances of 30 s
_AUDIO_FEATURES = Features({"duration_s": Value("float64"), "input_length": Value("int64"), "problem": Value("string")})
_DECODED_FEATURES = Features({**_AUDIO_FEATURES, "audio": Audio(decode=False)})
_TEXT_FEATURES = Features({"labels": List(Value("int64")), "frames_needed": Value("int64"), "unknown": Value("string")})
_SCRATCH = ["problem", "frames_needed", "unknown"]


@dataclass
class FilterReport:
    """How many utterances were kept, and how many were dropped for each reason, with up to three examples."""

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.kept + sum(self.dropped.values())

    def count(self, reason: str | None, example: Callable[[], str]) -> None:
        """Count one utterance: kept when `reason` is None. `example` is only called where it is still wanted."""
        if reason is None:
            self.kept += 1
            return
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES_PER_REASON:
            shown.append(example())

    def __str__(self) -> str:
        width = max(map(len, ["kept", *self.dropped]))
        lines = [f"{'kept':{width}}  {self.kept:8,} of {self.total:,}"]
        for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]):
            more = ", ..." if count > len(self.examples[reason]) else ""
            lines.append(f"{reason:{width}}  {count:8,}  {', '.join(self.examples[reason])}{more}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Limits:
    frames_of: Callable[[int], int]
    min_duration_s: float
    max_duration_s: float
    keep_untranscribed: bool

    def reason_to_drop(self, row: dict[str, Any]) -> str | None:
        if row["problem"]:
            return row["problem"]
        if problem := duration_problem(row["duration_s"], self.min_duration_s, self.max_duration_s):
            return problem
        if row["unknown"]:
            return UNKNOWN_CHARACTERS
        if not row["labels"] and not self.keep_untranscribed:
            return NO_TRANSCRIPT
        if int(self.frames_of(row["input_length"])) < max(1, row["frames_needed"]):
            return "target longer than its frames"
        return None


def prepare_dataset(
    dataset: datasets.Dataset | datasets.IterableDataset,
    processor: ProcessorMixin | FeatureExtractionMixin,
    frames_of: Callable[[int], int],
    *,
    min_duration_s: float = 0.25,
    max_duration_s: float = 30.0,
    keep_untranscribed: bool = False,
    decode_once: bool = False,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset | datasets.IterableDataset, FilterReport]:
    """Add `duration_s`, `input_length` (samples at the model's rate) and `labels`; drop what cannot be trained on.

    Dropped: audio that cannot be decoded, is too short or too long, has no transcript, a transcript with characters
    outside the vocabulary, or one that does not fit. CTC emits one token a frame and a blank between equal neighbours,
    so a target fits when `frames >= tokens + equal neighbours`.

    Every file is decoded once. `datasets` caches what was measured, not the verdicts, so a second run is instant with
    the same or other limits; a file that changed on disk is measured again. Decoded audio is kept only with
    `decode_once`.

    Args:
        dataset: with `audio` and, unless nothing is transcribed, `text` (see `load_speech_dataset`).
        processor: its feature extractor gives the sampling rate, its tokenizer the labels. Or a feature extractor
            alone, for a dataset without `text` and with `keep_untranscribed`.
        frames_of: from samples to the model's output frames, such as `model._get_feat_extract_output_lengths`.
        min_duration_s, max_duration_s: both are still allowed.
        keep_untranscribed: keep utterances without a transcript, with `labels == []`.
        decode_once: replace `audio` by what was decoded and resampled, so that no later epoch does it again: exact
            (32-bit WAV, 4 bytes a sample, 230 MB an hour at 16 kHz), in the cache of `datasets`, not in memory. Pays
            for small compressed corpora and many epochs. With an `IterableDataset`, `audio` becomes samples, which the
            collator need not decode again; shuffle before, for a buffer would hold them.
        num_proc: processes that decode, 1 when None; not for an `IterableDataset`.

    Returns:
        The dataset and a report, logged as a warning if anything was dropped. With an `IterableDataset` both are lazy:
        the report grows while the dataset is read, in each pass again, in the process that reads it; the first
        utterance dropped for a reason is logged, and 100 files in a row that cannot be read are an `AudioError`.

    Raises:
        ValueError: impossible limits, or nothing is left (not for an `IterableDataset`).
        TypeError: a `DatasetDict`.
    """
    if isinstance(dataset, dict):
        kind = type(dataset).__name__
        raise TypeError(f"prepare_dataset takes one split of the {kind}, of which there are: {', '.join(dataset)}.")
    check_limits(min_duration_s, max_duration_s)
    limits = _Limits(frames_of, min_duration_s, max_duration_s, keep_untranscribed)
    extractor = getattr(processor, "feature_extractor", processor)
    measure_audio = partial(_measure_audio, sampling_rate_hz=extractor.sampling_rate)
    # without a tokenizer there is nothing to measure transcripts with
    measure_text = partial(_measure_text, tokenizer=getattr(processor, "tokenizer", None))
    if isinstance(dataset, datasets.IterableDataset):
        measure_audio = partial(measure_audio, keep=_as_samples if decode_once else None)
        return _filter_lazily(dataset, measure_audio, measure_text, limits)
    measure_audio = partial(measure_audio, keep=_as_wav if decode_once else None)
    measured = _measure(dataset, measure_audio, measure_text, decode_once, num_proc)
    report = FilterReport()
    keep = list(_indices_to_keep(measured, limits, report))
    if not keep:
        raise ValueError(f"no utterance is left to train or evaluate on:\n{report}")
    if report.dropped:
        logger.warning(f"some utterances are left out:\n{report}")
        measured = measured.select(keep)
    return measured.remove_columns(_SCRATCH), report


def check_limits(min_duration_s: float, max_duration_s: float) -> None:
    """Raise `ValueError` unless a duration can be within the limits."""
    if not 0 <= min_duration_s <= max_duration_s:
        raise ValueError(
            f"min_duration_s={min_duration_s} and max_duration_s={max_duration_s}: need 0 <= minimum <= maximum"
        )


def duration_problem(duration_s: float, min_duration_s: float, max_duration_s: float) -> str | None:
    """The reason to drop an utterance of this duration, or None."""
    if duration_s < min_duration_s:
        return f"shorter than {min_duration_s:g} s"
    if duration_s > max_duration_s:
        return f"longer than {max_duration_s:g} s"
    return None


def _measure_audio(
    audio: Any,
    sampling_rate_hz: int,
    keep: Callable[[np.ndarray, int], dict[str, Any]] | None,
    version: str | None = None,
) -> dict[str, Any]:
    """With `keep`, what it makes of the samples takes the place of the audio.

    `version` is not used: it is part of the cache key, so that changed files are measured again.
    """
    try:
        samples, problem = decode_audio(audio, sampling_rate_hz), None
    except AudioError as error:
        samples, problem = (), error.reason
    measured = {"duration_s": len(samples) / sampling_rate_hz, "input_length": len(samples), "problem": problem}
    if keep is None:
        return measured
    path = audio.get("path") if isinstance(audio, Mapping) else None
    return {**measured, "audio": audio if problem else {**keep(samples, sampling_rate_hz), "path": path}}


def _as_wav(samples: np.ndarray, sampling_rate_hz: int) -> dict[str, Any]:
    return {"bytes": encode_wav(samples, sampling_rate_hz)}


def _as_samples(samples: np.ndarray, sampling_rate_hz: int) -> dict[str, Any]:
    return {"array": samples, "sampling_rate": sampling_rate_hz}


def _measure_text(text: str | None, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    if text is None:
        return {"labels": [], "frames_needed": 0, "unknown": ""}
    labels = encode_text(tokenizer, text)
    return {
        "labels": labels,
        "frames_needed": ctc_frames_needed(labels),
        "unknown": "".join(unknown_characters(tokenizer, text)),
    }


def ctc_frames_needed(labels: list[int]) -> int:
    """The fewest frames that CTC can emit these labels in: one each, and a blank between equal neighbours."""
    return len(labels) + sum(left == right for left, right in zip(labels, labels[1:], strict=False))


def _measure(
    dataset: datasets.Dataset, measure_audio, measure_text, decode_once: bool, num_proc: int | None
) -> datasets.Dataset:
    # Measured beside the dataset and joined to it: a map over the whole would copy audio that is stored as bytes.
    added = [column for column in [*_AUDIO_FEATURES, *_TEXT_FEATURES] if column in dataset.column_names]
    dataset = dataset.remove_columns(added).cast_column("audio", Audio(decode=False))
    audio = dataset.select_columns("audio").map(
        partial(measure_audio, version=_files_version(dataset)),
        input_columns="audio",
        remove_columns="audio",
        features=_DECODED_FEATURES if decode_once else _AUDIO_FEATURES,
        writer_batch_size=ROWS_IN_MEMORY if decode_once else 1000,
        num_proc=num_proc,
        desc="Reading audio",
    )
    has_text = "text" in dataset.column_names
    source = dataset.select_columns("text") if has_text else audio.select_columns("input_length")
    texts = source.map(
        measure_text if has_text else lambda _: measure_text(None),
        input_columns=source.column_names,
        remove_columns=source.column_names,
        features=_TEXT_FEATURES,
        desc="Encoding transcripts",
    )
    if decode_once:
        dataset = dataset.remove_columns("audio")
    return datasets.concatenate_datasets([dataset, audio, texts], axis=1)


def _files_version(dataset: datasets.Dataset) -> str:
    """A hash of the size and the time of last change of the files that the dataset has the paths of, not the bytes."""
    version = blake2b(digest_size=16)
    for chunk in dataset.data.column("audio").chunks:
        stored = chunk.field("bytes").is_valid().to_pylist()
        for path, is_stored in zip(chunk.field("path").to_pylist(), stored, strict=True):
            if not is_stored:
                version.update(f"{path}{size_and_time(path)}".encode())
    return version.hexdigest()


def size_and_time(path: str | None) -> tuple[int, int] | None:
    try:
        return file_version(Path(path or ""))
    except (OSError, ValueError):
        return None


def _indices_to_keep(measured: datasets.Dataset, limits: _Limits, report: FilterReport) -> Iterable[int]:
    for index, row in enumerate(measured.select_columns(["duration_s", "input_length", "labels", *_SCRATCH])):
        reason = limits.reason_to_drop(row)
        report.count(reason, lambda i=index, row=row, reason=reason: _example(measured[i]["audio"], row, reason))
        if reason is None:
            yield index


def _example(audio: Any, row: dict[str, Any], reason: str) -> str:
    return f"{audio_name(audio)} ({row['unknown']})" if reason == UNKNOWN_CHARACTERS else audio_name(audio)


def _filter_lazily(
    dataset: datasets.IterableDataset, measure_audio, measure_text, limits: _Limits
) -> tuple[datasets.IterableDataset, FilterReport]:
    report = FilterReport()
    unreadable_in_a_row = 0

    def measure(example: dict[str, Any]) -> dict[str, Any]:
        return {**measure_audio(example["audio"]), **measure_text(example.get("text"))}

    def keep(example: dict[str, Any]) -> bool:
        nonlocal unreadable_in_a_row
        unreadable_in_a_row = unreadable_in_a_row + 1 if example["problem"] else 0
        if unreadable_in_a_row == UNREADABLE_IN_A_ROW:  # an endless stream would go on for ever
            raise AudioError(
                f"the last {UNREADABLE_IN_A_ROW} files of the stream could not be read, the last of them "
                f"{audio_name(example['audio'])}: {example['problem']}",
                example["problem"],
            )
        reason = limits.reason_to_drop(example)
        report.count(reason, lambda: _example(example["audio"], example, reason))
        if reason is not None and report.dropped[reason] == 1:
            logger.warning(f"left out: {report.examples[reason][0]}: {reason}; more of these are only counted")
        return reason is None

    return dataset.map(measure).filter(keep).remove_columns(_SCRATCH), report
