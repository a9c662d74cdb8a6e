"""Counts of errors for each utterance, kept in files: bounded memory, and an interrupted evaluation goes on."""

import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel, ProcessorMixin

from ..data import DataCollatorCTC, decode_labels
from ..data.collator import on_model
from ..data.filtering import size_and_time
from ..fingerprints import hash_weights
from ..whole_files import whole_file
from .batches import batch_policy, example_batches
from .layer_sets import run_layer_sets
from .metrics import count_errors

# What stays of an utterance: 20 bytes, and 8 for each set of layers
UTTERANCE = np.dtype([(name, "<u4") for name in ("text", "audio", "input_length", "words", "characters")])
ERRORS = np.dtype([("word", "<u4"), ("character", "<u4")])


class CountFile:
    """Rows of one dtype in a file that only grows. What a killed run wrote half of a row is cut off."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype = path, dtype
        path.touch()
        self.rows = path.stat().st_size // dtype.itemsize
        os.truncate(path, self.rows * dtype.itemsize)

    def append(self, start: int, rows: np.ndarray) -> None:
        """Write the rows that begin at number `start`; those that are there already are left out."""
        missing = rows[self.rows - start :]
        with open(self.path, "ab") as file:
            file.write(missing.tobytes())
        self.rows += len(missing)

    def read(self, start: int = 0, count: int = -1) -> np.ndarray:
        return np.fromfile(self.path, self.dtype, count, offset=start * self.dtype.itemsize)


class ErrorCounts:
    """The counts of one model on one dataset: `utterances`, and for each set of layers its errors, in one order."""

    def __init__(self, folder: Path, layer_sets: Iterable[tuple[int, ...]]):
        self.folder = folder
        self.utterances = CountFile(folder / "utterances", UTTERANCE)
        names = {layers: "errors-" + ".".join(map(str, layers)) for layers in layer_sets}
        self.errors = {layers: CountFile(folder / name, ERRORS) for layers, name in names.items()}

    @property
    def done(self) -> int:
        """Utterances that are counted for all sets."""
        return min(file.rows for file in (self.utterances, *self.errors.values()))

    def pairs(self, sets: Iterable[tuple[int, ...]], unit: str) -> np.ndarray:
        """(utterances, 2): errors summed over the sets of layers, and words or characters times the number of sets."""
        sets = list(sets)
        pairs = np.zeros((self.done, 2), np.uint32)
        for layers in sets:
            pairs[:, 0] += self.errors[layers].read()[unit]
        pairs[:, 1] = self.utterances.read()[f"{unit}s"]
        pairs[:, 1] *= len(sets)
        return pairs


def join_counts(part: ErrorCounts, folder: Path, batch_size: int) -> ErrorCounts:
    """The counts of all processes, in the order in which a single one would have made them.

    Every process has to call it, and gets the same.

    Args:
        part: this process's share, see `example_batches`.
        folder: an empty one of this process.
        batch_size: utterances in a batch.
    """
    whole = ErrorCounts(folder, part.errors)
    for mine, joined in [
        (part.utterances, whole.utterances),
        *zip(part.errors.values(), whole.errors.values(), strict=True),
    ]:
        for batches in zip_longest(*(_in_batches(rows, batch_size) for rows in gather_object([mine.read()]))):
            for rows in batches:
                if rows is not None:  # the last round need not have a batch for every process
                    joined.append(joined.rows, rows)
    return whole


def _in_batches(rows: np.ndarray, batch_size: int) -> Iterable[np.ndarray]:
    return (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


def count_at_depths(
    model: PreTrainedModel,
    dataset: Any,
    processor: ProcessorMixin,
    counts: ErrorCounts,
    batch_size: int,
    rank: int = 0,
    num_processes: int = 1,
) -> None:
    """Transcribe, with each set of layers, the utterances that `counts` lacks, and append their errors.

    Audio is read once for all sets, and what they have in common, the feature encoder and the layers that they begin
    with, is computed once. What an earlier run counted is not read again where the dataset is a `datasets.Dataset`,
    and checked against the utterances otherwise. With several processes, this is the share of number `rank`.
    """
    collate, tokenizer = DataCollatorCTC(processor), processor.tokenizer
    first = counts.done // batch_size if isinstance(dataset, datasets.Dataset) else 0
    start = first * batch_size
    for examples in example_batches(dataset, batch_size, first, rank, num_processes):
        labels = [[] if example["labels"] is None else example["labels"] for example in examples]
        references = [decode_labels(tokenizer, tokens) for tokens in labels]
        rows = _utterance_rows(examples, references)
        stored = counts.utterances.read(start, len(rows))
        if not np.array_equal(stored, rows[: len(stored)]):
            raise _another_dataset(counts, f"utterances {start} to {start + len(rows)} are others")
        counts.utterances.append(start, rows)
        end = start + len(rows)
        pending = [layers for layers, file in counts.errors.items() if file.rows < end]
        if pending:
            batch = collate(examples)
            batch.pop("labels")
            frames = model._get_feat_extract_output_lengths(batch.pop("input_lengths"))
            with torch.inference_mode():
                hidden_states, layer_inputs = model.before_layers(**on_model(batch, model))
                for layers, output in run_layer_sets(model, hidden_states, layer_inputs, pending):
                    tokens = model.ctc_logits(output).argmax(-1).cpu()
                    texts = [tokenizer.decode(row[:length]) for row, length in zip(tokens, frames, strict=True)]
                    counts.errors[layers].append(start, _error_rows(texts, references))
        start = end
    if start < counts.utterances.rows:
        raise _another_dataset(counts, f"it has {start} utterances instead of {counts.utterances.rows}")


def _utterance_rows(examples: list[dict[str, Any]], references: list[str]) -> np.ndarray:
    rows = np.zeros(len(examples), UTTERANCE)
    rows["text"] = [zlib.crc32(" ".join(text.split()).encode()) for text in references]
    rows["audio"] = [audio_checksum(example["audio"]) for example in examples]
    rows["input_length"] = [example["input_length"] for example in examples]
    for unit in ("word", "character"):
        rows[f"{unit}s"] = count_errors(references, references, unit)[1]
    return rows


def _error_rows(texts: list[str], references: list[str]) -> np.ndarray:
    rows = np.zeros(len(texts), ERRORS)
    for unit in ("word", "character"):
        rows[unit] = count_errors(texts, references, unit)[0]
    return rows


def audio_checksum(audio: Any) -> int:
    """Of the stored bytes or samples, or else of the file's path, size and time of last change."""
    if isinstance(audio, Mapping):
        found = (audio[key] for key in ("bytes", "array", "raw", "path") if audio.get(key) is not None)
        audio = next(found, "")
    if isinstance(audio, str | Path):
        audio = f"{audio}{size_and_time(str(audio))}".encode()
    return zlib.crc32(audio if isinstance(audio, bytes) else np.ascontiguousarray(audio).tobytes())


def _another_dataset(counts: ErrorCounts, detail: str) -> ValueError:
    return ValueError(
        f"the dataset is not the one that the cache counted ({detail}). Give another cache_dir, or delete "
        f"{counts.folder}"
    )


def evaluation_key(model: PreTrainedModel, dataset: Any, processor: ProcessorMixin, batch_size: int) -> str:
    """A hash of all that error counts depend on: weights, adapters, configuration, processor, batches and dataset.

    The dataset is known by the fingerprint that `datasets` keeps of its files and transformations. A streamed one has
    none: its utterances are compared one by one instead.
    """
    config = model.config.to_static(model.config.num_hidden_layers).to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    settings = {
        "model": type(model).__name__,
        "config": config,
        "computed": [model.device.type, str(model.dtype), model.config._attn_implementation],
        "features": processor.feature_extractor.to_dict(),
        "vocabulary": processor.tokenizer.get_vocab(),
        "tokenizer": repr(processor.tokenizer),
        "batches": batch_policy(dataset, batch_size),
        "dataset": getattr(dataset, "_fingerprint", None),
    }
    digest = blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    hash_weights(digest, model)
    return digest.hexdigest()


def save_errors(path: str | Path, counts: ErrorCounts, layer_sets: Mapping[int, list[tuple[int, ...]]]) -> None:
    """Write the errors of each utterance at each depth as an .npz file, one array at a time.

    The arrays: `text`, checksums of the references; and for words and for characters `words`, the reference lengths,
    and `word_errors_6`, the errors at 6 layers, summed over the sets of layers of that depth.
    """
    with whole_file(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as archive:

        def write(name: str, values: np.ndarray) -> None:
            small = values.astype(np.min_scalar_type(int(values.max(initial=0))))
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, small)

        utterances = counts.utterances.read()
        for name in ("text", "words", "characters"):
            write(name, utterances[name])
        for depth, sets in layer_sets.items():
            for unit in ("word", "character"):
                write(f"{unit}_errors_{depth}", counts.pairs(sets, unit)[:, 0])
