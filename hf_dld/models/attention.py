"""Attention by plain products, for what torch's fused kernel for CPUs lacks: a mask's gradient, fast bfloat16."""

from typing import Any

import torch
from torch import nn

from .pieces import is_traced


def by_products(config: Any, query: torch.Tensor) -> bool:
    """Whether plain products are to take the place of the fused kernel.

    Args:
        config: of the model, for its `_attn_implementation`.
        query: whose device and precision decide. The fused kernel for CPUs does not use their units for products in
            bfloat16, nor has it a gradient for a mask: what it falls back to is slow.
    """
    if config._attn_implementation != "sdpa" or query.device.type != "cpu" or is_traced():
        return False
    return query.dtype == torch.bfloat16 or torch.is_grad_enabled()


def attend(scores: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
    """The output (batch, frames, heads, head) of attention.

    Args:
        scores: (batch, heads, frames, frames), scaled and masked.
        value: (batch, heads, frames, head).
        dropout: the probability that a weight is dropped; 0 outside training.
    """
    weights = nn.functional.softmax(scores, dim=-1)
    if dropout > 0:
        # keeps a byte for each weight until the backward pass, where `nn.functional.dropout` keeps a number
        weights, _ = torch.native_dropout(weights, dropout, train=True)
    return torch.matmul(weights, value).transpose(1, 2)


def shift_relative(scores: torch.Tensor) -> torch.Tensor:
    """Scores of every query by the distance of a key, as a view of those by key.

    Args:
        scores: (batch, heads, frames, 2 * frames - 1); the distances fall from frames - 1 to 1 - frames, as in
            Transformer-XL (arXiv 1901.02860), appendix B. The rows are dense in memory, as products leave them.

    Returns:
        (batch, heads, frames, frames): key j of query i stands in column j - i + frames - 1 of its row.
    """
    frames, (*outer, row, column) = scores.shape[2], scores.stride()
    shape, strides = (*scores.shape[:2], frames, frames), (*outer, row - column, column)
    return scores.as_strided(shape, strides, scores.storage_offset() + (frames - 1) * column)
