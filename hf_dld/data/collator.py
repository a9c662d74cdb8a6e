"""Utterances in, a padded batch out."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin

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
        extractor = self.processor.feature_extractor
        rate_hz, name = extractor.sampling_rate, extractor.model_input_names[0]
        waves = (decode_audio(example["audio"], rate_hz) for example in examples)
        features = [{name: extractor(wave, sampling_rate=rate_hz)[name][0]} for wave in waves]
        batch = extractor.pad(features, padding=True, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors="pt")
        batch["input_lengths"] = torch.tensor([len(utterance[name]) for utterance in features])
        batch["labels"] = pad_labels([example["labels"] for example in examples])
        return dict(batch)


def pad_labels(labels: list[list[int] | None]) -> torch.Tensor:
    """Labels as a tensor of shape `(batch, tokens)`, padded with -100 and at least one token wide (for `ForCTC`)."""
    rows = [torch.tensor(row or [], dtype=torch.long) for row in labels]
    longest = max(1, *(len(row) for row in rows))
    padded = torch.full((len(rows), longest), IGNORED_LABEL)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
