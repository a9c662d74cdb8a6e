"""Utterances in, a padded batch out."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin, PreTrainedModel, ProcessorMixin

from .audio import decode_audio

IGNORED_LABEL = -100


@dataclass
class DataCollatorCTC:
    """Decodes, extracts features with the model's own feature extractor, and pads.

    Each utterance is extracted alone and padded after: extracting a whole batch normalizes over the padding when the
    extractor returns no attention mask, so that the neighbours in a batch would change an utterance's features.

    Takes examples with `audio` (anything `decode_audio` takes) and `labels` (token ids; None or [] for an utterance
    without a transcript). Returns what the extractor returns, such as `input_values` `(batch, samples)` and, if it is
    configured to, `attention_mask`; `labels` `(batch, tokens)`, padded with -100, all -100 without a transcript; and
    `input_lengths` `(batch,)`, the samples (or feature frames) of each utterance without padding, which a loss that
    leaves padding out needs to know even where the model gets no mask. The trainers of `hf_dld.distill` take it.

    A `Trainer` needs `remove_unused_columns=False` with it: no model takes `audio`.

    Args:
        processor: holds the feature extractor.
        pad_to_multiple_of: pad the features to a multiple of this many samples (or feature frames).
    """

    processor: ProcessorMixin
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        waves = decode_all(examples, self.processor.feature_extractor.sampling_rate)
        batch = extract_and_pad(waves, self.processor.feature_extractor, self.pad_to_multiple_of)
        batch["labels"] = pad_labels([example["labels"] for example in examples])
        return batch


@dataclass
class DataCollatorCoLLD:
    """Decodes speech for a student and its teacher, which may listen to different features; labels are not needed.

    Takes examples with `audio`. Returns what the student's extractor returns and `input_lengths` (batch,), as
    `DataCollatorCTC` does; the same for the teacher, with names that start in `teacher_`, where its extractor is
    another one; and `utterance_ids` (batch,), a checksum of each utterance's samples, so that what is drawn for an
    utterance need not depend on its place in the batch. `hf_dld.distill.CoLLDTrainer` takes it.

    Args:
        feature_extractor: the student's.
        teacher_feature_extractor: the teacher's; default: the same.
        pad_to_multiple_of: pad both features to a multiple of this many samples (or feature frames).
    """

    feature_extractor: FeatureExtractionMixin
    teacher_feature_extractor: FeatureExtractionMixin | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rate_hz = self.feature_extractor.sampling_rate
        waves = decode_all(examples, rate_hz)
        batch = extract_and_pad(waves, self.feature_extractor, self.pad_to_multiple_of)
        batch["utterance_ids"] = torch.tensor([zlib.crc32(wave.tobytes()) for wave in waves])
        teacher = self.teacher_feature_extractor
        if teacher is not None and teacher.to_dict() != self.feature_extractor.to_dict():
            if teacher.sampling_rate != rate_hz:
                waves = decode_all(examples, teacher.sampling_rate)
            features = extract_and_pad(waves, teacher, self.pad_to_multiple_of)
            batch |= {f"teacher_{name}": value for name, value in features.items()}
        return batch


def decode_all(examples: list[dict[str, Any]], sampling_rate_hz: int) -> list[np.ndarray]:
    return [decode_audio(example["audio"], sampling_rate_hz) for example in examples]


def extract_and_pad(
    waves: list[np.ndarray], extractor: FeatureExtractionMixin, pad_to_multiple_of: int | None
) -> dict[str, torch.Tensor]:
    """What the extractor makes of each wave alone, padded to one batch, and its length: `input_lengths` (batch,)."""
    rate_hz, name = extractor.sampling_rate, extractor.model_input_names[0]
    features = []
    for wave in waves:
        extracted = extractor(wave, sampling_rate=rate_hz)
        # log-mel extractors may pad even a single utterance, to fill the last of their stacked frames
        length = int(extracted["attention_mask"][0].sum()) if "attention_mask" in extracted else None
        features.append({name: extracted[name][0][:length]})
    batch = extractor.pad(features, padding=True, pad_to_multiple_of=pad_to_multiple_of, return_tensors="pt")
    batch["input_lengths"] = torch.tensor([len(utterance[name]) for utterance in features])
    return dict(batch)


def on_model(batch: dict[str, torch.Tensor], model: PreTrainedModel) -> BatchFeature:
    """What goes into a model on its device, and features, which extractors give as float32, in its dtype."""
    return BatchFeature(batch).to(model.device, dtype=model.dtype)


def pad_labels(labels: list[list[int] | None]) -> torch.Tensor:
    """Labels as a tensor of shape `(batch, tokens)`, padded with -100 and at least one token wide (for `ForCTC`)."""
    rows = [torch.as_tensor([] if row is None else row, dtype=torch.long) for row in labels]
    longest = max(1, *(len(row) for row in rows))
    padded = torch.full((len(rows), longest), IGNORED_LABEL)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
