"""The teacher's posteriors of a training set on disk: computed once, then the teacher costs nothing.

A folder of safetensors shards, one folder for each teacher and setting. An utterance is two tensors, named after the
hash of its audio (`hf_dld.data.audio.audio_key`): `KEY.log_probs` (frames, top + 1) and `KEY.tokens` (frames, top), as
`losses.truncate_posteriors` makes them. So the order of a training set does not matter, two of them share what they
have in common, and changed audio is never served the posteriors of what it was.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..data.audio import audio_key, audio_name
from ..data.batching import longest_first
from ..data.collator import DataCollatorCTC
from ..fingerprints import hash_weights
from ..whole_files import remove_unfinished, whole_file
from .losses import truncate_posteriors

CACHE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
CHUNK_BATCHES = 4  # held in memory to be sorted by length: 120 MB of utterances of 30 s, 16 to a batch
SHARD_FRAMES = 1_000_000  # held in memory until written: 50 MB with 8 tokens a frame


class PosteriorCache:
    """The posteriors in a folder, found by the key of the audio; memory-mapped, so that only what is used is read.

    Args:
        folder: of shards; may be missing or grow, see `refresh`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.shards: dict[str, Path] = {}  # of each key
        self.opened: dict[Path, Any] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take notice of shards that were written since."""
        for path in sorted(set(self.folder.glob("[!.]*.safetensors")) - set(self.shards.values())):
            names = self._open(path).keys()
            self.shards |= {name.removesuffix(".tokens"): path for name in names if name.endswith(".tokens")}

    def _open(self, path: Path) -> Any:
        if path not in self.opened:
            try:
                self.opened[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from error
        return self.opened[path]

    def __contains__(self, key: str) -> bool:
        return key in self.shards

    def __getitem__(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (frames, top + 1) and tokens (frames, top) of an utterance."""
        path = self.shards[key]
        try:
            log_probs, tokens = (self._open(path).get_tensor(f"{key}.{part}") for part in ("log_probs", "tokens"))
        except SafetensorError as error:
            raise _damaged(path, error) from error
        fits = log_probs.ndim == tokens.ndim == 2 and len(log_probs) == len(tokens)
        # as `losses.truncate_posteriors` makes them: one column less where all tokens are kept
        fits = fits and log_probs.shape[1] - tokens.shape[1] in (0, 1) and log_probs.is_floating_point()
        if not fits or tokens.is_floating_point() or log_probs.isnan().any() or (tokens < 0).any():
            raise _damaged(path, f"{key}: {tuple(log_probs.shape)} log-probabilities of {tuple(tokens.shape)} tokens")
        return log_probs, tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": {}}  # each worker process maps the files itself

    def write_shard(self, posteriors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Write posteriors by key as one more shard, whole or not at all.

        Raises:
            OSError: naming the folder and what went wrong; nothing half-written is left.
        """
        # named after what is in it: whoever else writes the same utterances writes the same file
        path = self.folder / f"{blake2b(''.join(posteriors).encode(), digest_size=8).hexdigest()}.safetensors"
        tensors = {}
        for key, (log_probs, tokens) in posteriors.items():
            tensors |= {f"{key}.log_probs": log_probs.contiguous(), f"{key}.tokens": tokens.contiguous()}
        try:
            with whole_file(path) as beside:
                save_file(tensors, beside)
        except Exception as error:  # safetensors has an error class of its own for a full disk
            raise OSError(
                f"Could not write teacher posteriors to {self.folder}: {error}. Those written before are kept: free "
                "some space and start again to go on from them."
            ) from error
        self.refresh()


def _damaged(path: Path, detail: Any) -> ValueError:
    return ValueError(f"{path} is not a whole file of teacher posteriors ({detail}): remove it and start again.")


@dataclass
class CachedTeacherCollator:
    """A collator whose batches also hold the teacher's posteriors of their utterances.

    `teacher_log_probs` (batch, frames, top + 1) and `teacher_tokens` (batch, frames, top), padded with 0, are added to
    what `collator` makes of the examples, which need their `audio`.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    cache: PosteriorCache
    names: ClassVar[tuple[str, str]] = ("teacher_log_probs", "teacher_tokens")

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        log_probs, tokens = zip(*(self._posteriors(example["audio"]) for example in examples), strict=True)
        batch = self.collator(examples)
        padded = (pad_sequence(utterances, batch_first=True) for utterances in (log_probs, tokens))
        return batch | dict(zip(self.names, padded, strict=True))

    def _posteriors(self, audio: Any) -> tuple[torch.Tensor, torch.Tensor]:
        key = audio_key(audio)
        if key not in self.cache:
            raise ValueError(
                f"{audio_name(audio)}: no teacher posteriors in {self.cache.folder}. They were computed when training "
                "started: the audio has changed since, or not all processes see the same folder."
            )
        return self.cache[key]


def teacher_fingerprint(teacher: PreTrainedModel, processor: ProcessorMixin, **settings: Any) -> str:
    """A hash of what decides the posteriors besides the audio: tensors, both configurations and the settings.

    Args:
        teacher: its class, configuration, every tensor of its state and which adapters are on count; its name or folder
            does not.
        processor: its feature extractor's configuration counts.
        settings: whatever else, JSON values.
    """
    config = {name: value for name, value in teacher.config.to_dict().items() if name != "_name_or_path"}
    facts = [type(teacher).__name__, config, processor.feature_extractor.to_dict(), settings]
    digest = blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
    hash_weights(digest, teacher)
    return digest.hexdigest()


def fill_posterior_cache(
    cache: PosteriorCache,
    dataset: Dataset | Sequence[dict[str, Any]],
    processor: ProcessorMixin,
    teacher: Callable[..., Any],
    frames_of: Callable[[int], int],
    *,
    top: int,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 1,
    batched_by: Callable[[int], int] | None = None,
    rank: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    shard_s: float = 300.0,
    progress_bar: bool = True,
) -> int:
    """Compute the posteriors of a dataset that the cache does not have yet.

    By default each utterance is run alone: with group normalisation in the feature encoder, and in every Conformer,
    the outputs depend on the padding, that is on the neighbours in a batch (see `teacher.batched_by`). A kill loses
    the work of `shard_s` seconds at most.

    Args:
        cache: what is missing is written to its folder.
        dataset: examples with `audio`, each reached by its index; a `datasets.Dataset` with the column `input_length`
            is gone through from the longest to the shortest.
        processor: holds the feature extractor.
        teacher: called with the features, on the CPU; returns the frozen CTC model's `logits` (batch, frames, vocab).
        frames_of: from samples to frames.
        top: tokens of each frame to keep.
        temperature: of the posteriors.
        dtype: of the log-probabilities on disk.
        batch_size: utterances that are run together, padded, where `batched_by` of their samples is the same.
        batched_by: default: all may be.
        rank, num_processes: this process does every `num_processes`-th utterance. All may write at the same time.
        num_workers: processes that decode.
        shard_s: a shard is written after so many seconds, or after a million frames.
        progress_bar: show one.

    Returns:
        How many utterances were computed.
    """
    remove_unfinished(cache.folder)
    order: Sequence[int] = range(len(dataset))
    if isinstance(dataset, datasets.Dataset) and "input_length" in dataset.column_names:
        order = longest_first(dataset).tolist()
    share = Subset(dataset, order[rank::num_processes])
    loader = DataLoader(
        share,
        batch_size=None,
        collate_fn=partial(_features_unless_cached, cache=cache, collator=DataCollatorCTC(processor)),
        num_workers=num_workers,
        generator=torch.Generator(),  # its own: the random numbers of training stay as they were
    )
    utterances = tqdm(loader, desc="Teacher posteriors", unit="utterance", disable=not progress_bar)
    pending: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    pending_frames, computed, started = 0, 0, time.monotonic()
    for features in _batches_by_length(utterances, cache, batch_size, batched_by):
        frames = [int(frames_of(utterance["input_lengths"][0])) for utterance in features.values()]
        with torch.no_grad():
            logits = teacher(**_pad_features(list(features.values()))).logits
        log_probs, tokens = truncate_posteriors(logits, top, temperature)
        token_dtype = torch.int16 if logits.shape[-1] <= 2**15 else torch.int32
        log_probs, tokens = log_probs.to("cpu", dtype), tokens.to("cpu", token_dtype)
        for row, (key, count) in enumerate(zip(features, frames, strict=True)):
            if log_probs[row, :count].isnan().any():
                raise ValueError(
                    f"The teacher's posteriors of an utterance of {count} frames (key {key}) are not numbers; it "
                    f"computes in {logits.dtype}: try float32. Those written before are kept."
                )
            # copies: of a part of a tensor, safetensors would refuse to be given the whole
            pending[key] = log_probs[row, :count].clone(), tokens[row, :count].clone()
        pending_frames, computed = pending_frames + sum(frames), computed + len(features)
        if pending_frames >= SHARD_FRAMES or time.monotonic() - started >= shard_s:
            cache.write_shard(pending)
            pending, pending_frames, started = {}, 0, time.monotonic()
    if pending:
        cache.write_shard(pending)
    return computed


def _batches_by_length(
    utterances: Iterable[tuple[str, dict[str, torch.Tensor] | None]],
    cache: PosteriorCache,
    batch_size: int,
    batched_by: Callable[[int], int] | None,
) -> Iterator[dict[str, dict[str, torch.Tensor]]]:
    """The features, by key, of utterances that the cache lacks, each once; a batch's are of about equal length."""

    def samples(item: tuple[str, dict[str, torch.Tensor]]) -> int:
        return item[1]["input_lengths"].item()

    seen: set[str] = set()

    def lacking() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for key, features in utterances:
            if features is not None and key not in seen and key not in cache:
                seen.add(key)
                yield key, features

    remaining = lacking()
    while chunk := list(islice(remaining, batch_size * (CHUNK_BATCHES if batch_size > 1 else 1))):
        chunk.sort(key=samples, reverse=True)
        for _, group in groupby(chunk, lambda item: batched_by(samples(item)) if batched_by else None):
            while batch := dict(islice(group, batch_size)):
                yield batch


def _pad_features(utterances: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The features of several utterances, each (1, samples), as one batch, padded with zeros as the collator does."""
    names = [name for name in utterances[0] if name != "input_lengths"]
    return {name: pad_sequence([utterance[name][0] for utterance in utterances], batch_first=True) for name in names}


def _features_unless_cached(
    example: dict[str, Any], cache: PosteriorCache, collator: DataCollatorCTC
) -> tuple[str, dict[str, torch.Tensor] | None]:
    """The key of an utterance, and what the teacher needs to hear of it if the cache does not know it."""
    key = audio_key(example["audio"])
    if key in cache:
        return key, None
    features = collator([{"audio": example["audio"], "labels": None}])
    del features["labels"]
    return key, features
