"""The rival of layer dropping: early exits, a CTC loss after several layers, all of which run in every step."""

from typing import Any

import torch
from torch import nn

from hf_dld import CTCTrainer
from hf_dld.distill.losses import ctc_loss


class EarlyExitTrainer(CTCTrainer):
    """Trains a dynamic model to be left after any of `exits` layers, by the mean of their CTC losses.

    The exits share the CTC head, and the final layer norm where there is one, so that what comes out is the same model
    as layer dropping gives, with `layer_selection="first"`. One pass through all layers serves every exit.
    """

    def __init__(self, *args: Any, exits: list[int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.exits = sorted(exits)

    def compute_terms(
        self, model: nn.Module, model_inputs: dict[str, Any], frame_lengths: torch.Tensor, labels: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if not model.training:
            return super().compute_terms(model, model_inputs, frame_lengths, labels)
        hidden_states = model(**model_inputs, output_hidden_states=True).hidden_states
        exits = [model.ctc_logits(hidden_states[count]) for count in self.exits]  # [k]: what k layers make
        losses = [ctc_loss(logits, frame_lengths, labels, self.blank_id) for logits in exits]
        return {"loss": torch.stack(losses).mean(0)}, exits[-1]
