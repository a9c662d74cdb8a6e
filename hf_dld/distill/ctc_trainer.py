"""A Trainer for CTC models, with evaluation in little memory."""

from typing import Any

import torch
from torch import nn

from .losses import ctc_loss, frame_mask
from .teacher import num_frames
from .utterance_trainer import UtteranceTrainer


class CTCTrainer(UtteranceTrainer):
    """Trains a CTC model, stock or dynamic, on batches of `hf_dld.data.DataCollatorCTC`.

    The loss is the mean over the utterances of the global batch of CTC / |y| (see `losses.ctc_loss`), however that
    batch is split (see `UtteranceTrainer`). Evaluation keeps token ids, not logits.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.blank_id = self.model.config.pad_token_id

    def compute_utterance_terms(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        frame_lengths = num_frames(self.unwrapped_model, inputs["input_lengths"])
        model_inputs = {name: value for name, value in inputs.items() if name not in ("labels", "input_lengths")}
        return self.compute_terms(model, model_inputs, frame_lengths, inputs["labels"])

    def compute_terms(
        self, model: nn.Module, model_inputs: dict[str, Any], frame_lengths: torch.Tensor, labels: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The losses of each utterance by name, each (batch,), with their weighted sum as `"loss"`; and the logits.

        Subclass and override to train with another loss.
        """
        logits = model(**model_inputs).logits
        return {"loss": ctc_loss(logits, frame_lengths, labels, self.blank_id)}, logits

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
