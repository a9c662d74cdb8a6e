"""A Trainer for CTC models: a loss that does not depend on how a batch is split, and evaluation in little memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .losses import ctc_loss, frame_mask
from .teacher import num_frames


class CTCTrainer(Trainer):
    """Trains a CTC model, stock or dynamic, on batches of `hf_dld.data.DataCollatorCTC`.

    The loss is the mean over the utterances of the global batch of CTC / |y| (see `losses.ctc_loss`), however that
    batch is split over accumulation steps and processes: batch 1 with 4 accumulation steps equals batch 4. (The stock
    Trainer multiplies the CTC loss by the accumulation steps.) Evaluation keeps token ids, not logits.

    The losses of a step are logged by name, averaged over the utterances since the last log.
    """

    # `get_batch_samples` counts the utterances of the whole accumulated batch, and `compute_loss` divides by that
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # else the Trainer counts tokens, to divide the loss by them
        self.term_sums: dict[str, torch.Tensor] = {}
        self.utterances_since_log = 0
        self.blank_id = self.model.config.pad_token_id

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        utterances = torch.tensor(sum(len(batch["labels"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(utterances, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The loss of a micro-batch: the sum over its utterances, divided by `num_items_in_batch` utterances.

        With `return_outputs`, also the logits (batch, frames, vocab).
        """
        labels = inputs["labels"]
        frame_lengths = num_frames(self.unwrapped_model, inputs["input_lengths"])
        model_inputs = {name: value for name, value in inputs.items() if name not in ("labels", "input_lengths")}
        terms, logits = self.compute_terms(model, model_inputs, frame_lengths, labels)
        loss = terms.pop("loss").sum()
        if num_items_in_batch is None:
            loss = loss / len(labels)
        else:
            # data-parallel training averages gradients over processes, but the sum over all utterances is wanted
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        if model.training:
            self.record_terms(terms, len(labels))
        return (loss, logits) if return_outputs else loss

    def compute_terms(
        self, model: nn.Module, model_inputs: dict[str, Any], frame_lengths: torch.Tensor, labels: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The losses of each utterance by name, each (batch,), with their weighted sum as `"loss"`; and the logits.

        Subclass and override to train with another loss.
        """
        logits = model(**model_inputs).logits
        return {"loss": ctc_loss(logits, frame_lengths, labels, self.blank_id)}, logits

    @property
    def unwrapped_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def record_terms(self, terms: dict[str, torch.Tensor], num_utterances: int) -> None:
        for name, values in terms.items():
            self.term_sums[name] = self.term_sums.get(name, 0) + values.detach().sum()
        self.utterances_since_log += num_utterances

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.utterances_since_log:
            for name, total in self.term_sums.items():
                logs[name] = total.item() / self.utterances_since_log
            self.term_sums, self.utterances_since_log = {}, 0
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The mean loss of a batch, the best token of each frame (batch, frames), -100 in padding, and the labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, logits = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        frame_lengths = num_frames(self.unwrapped_model, inputs["input_lengths"])
        tokens = logits.argmax(-1)
        return loss, tokens.masked_fill(~frame_mask(frame_lengths, tokens.shape[1]), -100), inputs["labels"]
