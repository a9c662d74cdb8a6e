"""Many sets of encoder layers scored on the same speech; what sets begin with in common is computed once."""

import math
import os.path
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from ..data import DataCollatorCTC
from ..data.collator import on_model
from ..data.vocabulary import decode_labels
from ..distill.losses import ctc_loss, kl_loss
from ..models.modeling_dld import check_dynamic
from .metrics import count_errors

OBJECTIVES = ("ctc", "kl", "wer")


def run_layer_sets(
    model: PreTrainedModel,
    hidden_states: torch.Tensor,
    layer_inputs: dict[str, Any],
    layer_sets: Iterable[tuple[int, ...]],
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Run sets of layers on one batch: `count_layer_calls(layer_sets)` layer calls, none of them twice.

    Args:
        model: a dynamic model.
        hidden_states, layer_inputs: as `model.before_layers` returns them.
        layer_sets: ascending 0-based indices each.

    Yields:
        Each set and the output of its last layer (batch, frames, hidden), for `model.ctc_logits`; the sets come in
        lexicographic order. At any time one state for each layer of the present set is held, never more.
    """
    states, previous = [hidden_states], ()
    # in lexicographic order, sets with a common beginning are neighbours: a depth-first walk of the tree of beginnings
    for layers in sorted(set(layer_sets)):
        common = len(os.path.commonprefix([previous, layers]))
        del states[common + 1 :]
        for layer in layers[common:]:
            states.append(model.base_model.encoder.run_layers(states[-1], (layer,), **layer_inputs))
        yield layers, states[-1]
        previous = layers


def count_layer_calls(layer_sets: Iterable[tuple[int, ...]]) -> int:
    """Layer calls that `run_layer_sets` makes: one for each different beginning of the sets."""
    return len({layers[:end] for layers in layer_sets for end in range(1, len(layers) + 1)})


@dataclass
class SearchCost:
    """What scoring ran, counted: a call is a call on one batch; `layer_sets` were scored on all `batches` each."""

    batches: int = 0
    layer_sets: int = 0
    feature_encoder_calls: int = 0
    layer_calls: int = 0
    layer_calls_without_reuse: int = 0


@dataclass
class _Speech:
    """A batch as far as it is the same for every set of layers."""

    hidden_states: torch.Tensor
    layer_inputs: dict[str, Any]
    frames: torch.Tensor
    labels: torch.Tensor
    full_depth_logits: torch.Tensor | None

    def size_bytes(self) -> int:
        values = (*vars(self).values(), *self.layer_inputs.values())
        return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


class LayerSetScorer:
    """Scores sets of layers on one sample of a dataset; lower is better.

    Args:
        model: a dynamic CTC model with all its layers; left in the mode that it came in. It is scored in eval mode.
        dataset: as `hf_dld.data.prepare_dataset` returns it, not streamed.
        processor: the model's own.
        objective: `"ctc"`: the CTC loss divided by the length of the transcript, mean over utterances; `"kl"`: the KL
            divergence of the full depth's posteriors (the teacher's place) and those of the set, mean over
            utterances, which needs no transcripts; `"wer"`: the word error rate of greedy decoding.
        max_utterances: at most so many utterances, drawn by `seed`; None for all. With `"ctc"` and `"wer"`
            utterances without a transcript are left out.
        seed: of the draw.
        batch_size: utterances in a batch; they are sorted by length, so that little is padding.
        cache_gb: what goes into the first layer is kept for as many batches as fit into so many gigabytes (10^9
            bytes) on the model's device, and computed again at each `score` for the rest.

    Raises:
        TypeError: not a dynamic CTC model, or a stream.
        ValueError: an impossible argument, or a dataset in which the objective has nothing to measure.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dataset: Any,
        processor: ProcessorMixin,
        objective: str = "ctc",
        *,
        max_utterances: int | None = 1000,
        seed: int = 0,
        batch_size: int = 16,
        cache_gb: float = 2.0,
    ):
        check_dynamic(model)
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {OBJECTIVES}; got {objective!r}.")
        for name, value in (("max_utterances", max_utterances), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value!r}.")
        if not cache_gb >= 0:
            raise ValueError(f"cache_gb must be at least 0; got {cache_gb!r}.")
        # every layer must be there: a model that was loaded without some of them says so here
        self.full_depth = model.config.resolve_active_layers(active_layers=range(model.config.num_hidden_layers))
        self.model, self.dataset, self.processor, self.objective = model, dataset, processor, objective
        self.indices = _sample(dataset, objective, max_utterances, seed)
        starts = range(0, len(self.indices), batch_size)
        self.batches = [self.indices[start : start + batch_size] for start in starts]
        self.cache_bytes = cache_gb * 1e9
        self.collate = DataCollatorCTC(processor)
        self.kept: list[_Speech] = []
        self.cost = SearchCost(batches=len(self.batches))

    def score(self, layer_sets: Iterable[Sequence[int]], description: str = "Scoring") -> dict[tuple[int, ...], float]:
        """The score of each set, ascending 0-based indices; one that is not a number counts as infinite."""
        layer_sets = {self.model.config.resolve_active_layers(active_layers=layers) for layers in layer_sets}
        totals = {layers: np.zeros(2) for layers in layer_sets}
        was_training = self.model.training
        self.model.eval()  # normalises by the running statistics and draws no dropout
        try:
            with torch.inference_mode():
                for speech in self._speech(description):
                    outputs = run_layer_sets(self.model, speech.hidden_states, speech.layer_inputs, layer_sets)
                    for layers, hidden_states in outputs:
                        totals[layers] += self._measure(self.model.ctc_logits(hidden_states), speech)
        finally:
            self.model.train(was_training)
        self.cost.layer_sets += len(layer_sets)
        self.cost.layer_calls += len(self.batches) * count_layer_calls(layer_sets)
        self.cost.layer_calls_without_reuse += len(self.batches) * sum(map(len, layer_sets))
        scores = {layers: float(total / max(amount, 1)) for layers, (total, amount) in totals.items()}
        return {layers: math.inf if math.isnan(score) else score for layers, score in scores.items()}

    def _speech(self, description: str) -> Iterator[_Speech]:
        for number, indices in enumerate(logging.tqdm(self.batches, desc=description, unit="batch")):
            if number < len(self.kept):
                yield self.kept[number]
                continue
            speech = self._prepare(indices)
            # the first that does not fit ends the keeping, for the next number is above len(self.kept) then
            if number == len(self.kept) and speech.size_bytes() <= self.cache_bytes:
                self.cache_bytes -= speech.size_bytes()
                self.kept.append(speech)
            yield speech

    def _prepare(self, indices: Sequence[int]) -> _Speech:
        batch = self.collate([self.dataset[index] for index in indices])
        labels = batch.pop("labels")
        frames = self.model._get_feat_extract_output_lengths(batch.pop("input_lengths"))
        hidden_states, layer_inputs = self.model.before_layers(**on_model(batch, self.model))
        self.cost.feature_encoder_calls += 1
        logits = None
        if self.objective == "kl":
            output = self.model.base_model.encoder.run_layers(hidden_states, self.full_depth, **layer_inputs)
            logits = self.model.ctc_logits(output)
            self.cost.layer_calls += len(self.full_depth)
            self.cost.layer_calls_without_reuse += len(self.full_depth)
        return _Speech(hidden_states, layer_inputs, frames.to(self.model.device), labels, logits)

    def _measure(self, logits: torch.Tensor, speech: _Speech) -> tuple[float, int]:
        """The sum of what the objective measures over a batch, and the number that the sum is to be divided by."""
        if self.objective == "wer":
            tokenizer = self.processor.tokenizer
            tokens = zip(logits.argmax(-1).tolist(), speech.frames.tolist(), strict=True)
            predictions = [tokenizer.decode(utterance[:length]) for utterance, length in tokens]
            references = [decode_labels(tokenizer, labels) for labels in speech.labels]
            errors, words = count_errors(predictions, references)
            return errors.sum(), words.sum()
        if self.objective == "kl":
            losses = kl_loss(logits, speech.full_depth_logits, speech.frames)
        else:
            losses = ctc_loss(logits, speech.frames, speech.labels.to(logits.device), self.model.config.pad_token_id)
        return losses.sum(dtype=torch.float64).item(), len(losses)


def _sample(dataset: Any, objective: str, max_utterances: int | None, seed: int) -> list[int]:
    """Indices of the utterances to measure, the longest first."""
    if isinstance(dataset, datasets.IterableDataset):
        raise TypeError(
            "Layers are scored on a sample, in batches of similar length, which needs a dataset that is not streamed, "
            f"such as prepare_dataset makes of one that was loaded without streaming; got {type(dataset).__name__}."
        )
    lengths = dataset["input_length"]
    if not len(lengths):
        raise ValueError("The dataset has no utterance to choose layers by.")
    usable = list(range(len(lengths)))
    if objective != "kl":
        usable = [index for index, labels in enumerate(dataset["labels"]) if labels]
    if not usable:
        raise ValueError(
            f"objective={objective!r} needs transcripts, and none of the {len(lengths)} utterances has one; "
            "objective='kl' needs none."
        )
    if max_utterances is not None and len(usable) > max_utterances:
        usable = sorted(random.Random(seed).sample(usable, max_utterances))
    return sorted(usable, key=lambda index: -lengths[index])
