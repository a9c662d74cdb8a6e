"""Batch normalisation at a depth: the Conformer's running statistics depend on which layers ran before."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def has_statistics(model: nn.Module) -> bool:
    """Whether running statistics were ever gathered: a new layer's are means of 0 and variances of 1."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    return any(norm.running_mean.any() or (norm.running_var != 1).any() for norm in norms)


class FreezeBatchNorm(TrainerCallback):
    """Freezes a dynamic model's running statistics when a share of the steps is done.

    What is left of the training is with the statistics that inference will use.
    """

    def __init__(self, share: float):
        self.share = share

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if not model.base_model.batch_norm_frozen and state.global_step >= self.share * state.max_steps:
            model.freeze_batch_norm()


def norms_of(model: nn.Module) -> list[nn.BatchNorm1d]:
    """The batch normalisations of a model; `ValueError` if it has none."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch normalisation whose statistics could be estimated.")
    return norms


@torch.no_grad()
def reestimate_batch_norm(model: PreTrainedModel, batches: Iterable[dict[str, Any]]) -> None:
    """Replace the running statistics of the layers that run now by their averages over some batches.

    Once-for-all (arXiv 1908.09791) does so for every sub-network. The statistics of layers that are skipped, all other
    weights and the model's mode stay as they are.

    Args:
        model: at the depth for which the statistics are wanted (`set_active_layers`).
        batches: keyword arguments of the model, such as `input_values` and `attention_mask`; some hundred utterances.

    Raises:
        ValueError: the model has no batch normalisation.
    """
    norms = norms_of(model)
    was_training = model.training
    model.eval()
    momenta = [norm.momentum for norm in norms]
    kept = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    for batch in batches:
        model(**batch)
    for norm, momentum, (mean, variance) in zip(norms, momenta, kept, strict=True):
        norm.momentum = momentum
        if norm.num_batches_tracked == 0:  # skipped
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
    model.train(was_training)
