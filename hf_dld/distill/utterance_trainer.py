"""A Trainer for losses of utterances: a loss that does not depend on how a batch is split."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer


class UtteranceTrainer(Trainer):
    """What the trainers of this package share: losses that each utterance has, averaged over the global batch.

    Batches hold `input_lengths` (batch,), as the collators of `hf_dld.data` make them. The loss is the mean over the
    utterances of the global batch, however that batch is split over accumulation steps and processes: batch 1 with 4
    accumulation steps equals batch 4. (The stock Trainer multiplies the CTC loss by the accumulation steps.)

    The losses of a step are logged by name, each averaged over the utterances that had it since the last log.
    """

    # `get_batch_samples` counts the utterances of the whole accumulated batch, and `compute_loss` divides by that
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # else the Trainer counts tokens, to divide the loss by them
        self.term_sums: dict[str, torch.Tensor] = {}
        self.term_counts: dict[str, int] = {}

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        utterances = torch.tensor(sum(len(batch["input_lengths"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(utterances, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of a micro-batch: the sum over its utterances, divided by `num_items_in_batch` utterances.

        With `return_outputs`, also what `compute_utterance_terms` returns beside the losses.
        """
        num_utterances = len(inputs["input_lengths"])
        terms, outputs = self.compute_utterance_terms(model, inputs)
        loss = terms.pop("loss").sum()
        if num_items_in_batch is None:
            loss = loss / num_utterances
        else:
            # data-parallel training averages gradients over processes, but the sum over all utterances is wanted
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        if model.training:
            self.record_terms(terms, num_utterances)
        return (loss, outputs) if return_outputs else loss

    def compute_utterance_terms(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The losses of each utterance by name, each (batch,), with their weighted sum as `"loss"`; and any outputs."""
        raise NotImplementedError

    @property
    def unwrapped_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def record_terms(self, terms: dict[str, torch.Tensor], num_utterances: int) -> None:
        for name, values in terms.items():
            self.term_sums[name] = self.term_sums.get(name, 0) + values.detach().sum()
            self.term_counts[name] = self.term_counts.get(name, 0) + num_utterances

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, total in self.term_sums.items():
                logs[name] = total.item() / self.term_counts[name]
            self.term_sums, self.term_counts = {}, {}
        super().log(logs, start_time)
