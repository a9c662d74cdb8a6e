"""DLD with CoLLD's loss as a third term: does teaching every layer help the shallow depths?"""

from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import TrainOutput

from hf_dld import DLDTrainer
from hf_dld.distill.layer_features import collect_features
from hf_dld.distill.losses import info_nce_loss
from hf_dld.distill.masking import draw_masked_frames


class LayerwiseDLDTrainer(DLDTrainer):
    """Adds to DLD's loss `colld_weight` times the mean InfoNCE of the layers that run.

    Each of them predicts, through a linear head of its own, the feed-forward features of the same layer of the teacher,
    at frames and against negatives that are drawn as CoLLD draws them (`CoLLDTrainer`). Unlike there, the student's
    input is not masked at these frames: the transcripts are learned in the same pass, from what can be heard.

    The heads are parameters of the student while it trains, and are thrown away afterwards. The teacher runs in every
    step, for its posteriors alone are cached. With two sets of layers in a step, those of the last one are taught.
    """

    def __init__(self, *args: Any, colld_weight: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.colld_weight = colld_weight

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        student, width = self.unwrapped_model, self.teacher.config.hidden_size
        student.colld_heads = nn.ModuleList(
            nn.Linear(student.config.hidden_size, width, device=student.device) for _ in range(self.num_layers)
        )
        try:
            return super().train(*args, **kwargs)
        finally:
            del student.colld_heads

    def compute_terms(
        self, model: nn.Module, model_inputs: dict[str, Any], frame_lengths: torch.Tensor, labels: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if not model.training:
            return super().compute_terms(model, model_inputs, frame_lengths, labels)
        layers, student = range(self.num_layers), self.unwrapped_model
        with (
            collect_features(self.teacher, layers, "ffn") as targets,
            collect_features(student, layers) as hidden_states,
        ):
            terms, logits = super().compute_terms(model, model_inputs, frame_lengths, labels)
        compared = draw_masked_frames(
            frame_lengths.tolist(),
            logits.shape[1],
            range(len(frame_lengths)),
            seed=self.args.seed,
            step=self.state.global_step,
        ).to(logits.device)
        losses = []
        for index, hidden in hidden_states.items():
            predictions = student.colld_heads[index](compared.gather(hidden))
            losses.append(
                info_nce_loss(predictions, compared.gather(targets[index]), compared.candidates, compared.counts)
            )
        terms["colld_loss"] = torch.stack(losses).mean(0)
        terms["loss"] = terms["loss"] + self.colld_weight * terms["colld_loss"]
        return terms, logits
