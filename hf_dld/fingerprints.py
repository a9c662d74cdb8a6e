"""A hash of what decides a model's outputs besides its configuration, by which results are kept."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def hash_weights(digest: Any, model: nn.Module) -> None:
    """Update a `hashlib` digest with every tensor of a model's state, and with which of its adapters (PEFT) are on.

    Whether an adapter is on, and what its output is scaled by, stands neither in the tensors nor in the configuration.
    """
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            scaling = sorted(getattr(module, "scaling", {}).items())
            digest.update(f"{name}{module.disable_adapters}{module.active_adapters}{scaling}".encode())
