"""A Trainer for CTC models, with evaluation in little memory."""

from typing import Any

import torch
from torch import nn
from transformers import default_data_collator

from ..data.collator import DataCollatorCTC
from .losses import ctc_loss, frame_mask
from .teacher import num_frames
from .utterance_trainer import UtteranceTrainer, lengths_in


class CTCTrainer(UtteranceTrainer):
    """Trains a CTC model, stock or dynamic, on batches of `hf_dld.data.DataCollatorCTC`.

    The loss is the mean over the utterances of the global batch of CTC / |y| (see `losses.ctc_loss`), however that
    batch is split (see `UtteranceTrainer`). Evaluation keeps token ids, not logits. A processor that is the
    `processing_class` gives the `data_collator` where there is none.

    Raises:
        ValueError: a model whose blank, `config.pad_token_id`, is not the tokenizer's; in a step, labels beyond the
            model's vocabulary.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.data_collator is default_data_collator and hasattr(self.processing_class, "feature_extractor"):
            self.data_collator = DataCollatorCTC(self.processing_class)
        self.blank_id = self.model.config.pad_token_id
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        expected = getattr(tokenizer, "pad_token_id", None)
        if expected is not None and expected != self.blank_id:
            raise ValueError(
                f"The CTC blank of the model, config.pad_token_id, is {self.blank_id}, and the tokenizer's is "
                f"{expected} ({tokenizer.pad_token!r}): the model would learn one and be decoded with the other. Load "
                "it with pad_token_id=processor.tokenizer.pad_token_id."
            )

    def compute_utterance_terms(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inner = self.unwrapped_model
        largest = int(inputs["labels"].max())
        if largest >= inner.config.vocab_size:
            raise ValueError(
                f"The labels hold token {largest}, and the model's vocabulary ends at {inner.config.vocab_size - 1}: "
                "load it with vocab_size=len(processor.tokenizer), or make the labels with its own processor."
            )
        frame_lengths = num_frames(inner, inputs["input_lengths"])
        model_inputs = {name: value for name, value in inputs.items() if name not in ("labels", "input_lengths")}
        # a checkpoint in half precision loads as such, and features come in float32
        model_inputs[inner.main_input_name] = model_inputs[inner.main_input_name].to(inner.dtype)
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
        num_rows = len(lengths_in(inputs))
        inputs = self.without_repeats(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, logits = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        frame_lengths = num_frames(self.unwrapped_model, inputs["input_lengths"])
        tokens = logits.argmax(-1)
        tokens = tokens.masked_fill(~frame_mask(frame_lengths, tokens.shape[1]), -100)
        # as many rows on every process, to be gathered
        rows = (0, 0, 0, num_rows - len(tokens))
        return loss, nn.functional.pad(tokens, rows, value=-100), nn.functional.pad(inputs["labels"], rows, value=-100)

    def without_repeats(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch without the utterances that Accelerate repeats where the processes' last batches would be smaller.

        They are dropped when the processes' results are gathered, but a long one would add to the padding of the
        others, which most models hear: error rates would depend on the number of processes.
        """
        state, num_rows = self.accelerator.gradient_state, len(inputs["input_lengths"])
        if not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        kept = state.remainder - self.args.process_index * num_rows
        if not 0 < kept < num_rows:  # nothing but repeats is computed all the same: sharded models need all processes
            return inputs
        multiple = getattr(self.data_collator, "pad_to_multiple_of", None) or 1
        longest = -(-int(inputs["input_lengths"][:kept].max()) // multiple) * multiple
        return {
            name: values[:kept] if name in ("labels", "input_lengths") else values[:kept, :longest]
            for name, values in inputs.items()
        }
