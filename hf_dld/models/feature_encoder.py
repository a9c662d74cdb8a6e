"""The convolutions before the encoder, which at few active layers cost more than the encoder itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .pieces import in_pieces, is_traced, piece_length


def samples_of_a_frame(config: Any) -> int:
    """The samples that the convolutions of the feature encoder need to make a frame; of fewer they make an error."""
    samples = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def overwrite(
    function: Callable[..., torch.Tensor], hidden_states: torch.Tensor, dim: int, *parameters: torch.Tensor
) -> torch.Tensor:
    """`function(hidden_states, *parameters)`, piece by piece along `dim` in the memory of `hidden_states` on a CPU.

    The activations of the first convolutions are the longest tensors of the model; a second one beside them is most of
    the peak memory of a pass. Where a gradient may need the input, or a tracer would fix the number of pieces, nothing
    is overwritten.

    Args:
        function: of a piece along `dim`, and of the same piece of each parameter.
        hidden_states: the output of a convolution, which nobody else needs.
        dim: an axis along which `function` treats every index alone.
        parameters: one value for every index of `dim`.
    """
    if not in_pieces(hidden_states.device):
        return function(hidden_states, *parameters)
    length = piece_length(hidden_states.shape[dim], hidden_states.nbytes)
    pieces = zip(hidden_states.split(length, dim), *(values.split(length) for values in parameters), strict=True)
    for piece, *theirs in pieces:
        piece.copy_(function(piece, *theirs))
    return hidden_states


class ChannelsLastConv1d(nn.Conv1d):
    """An `nn.Conv1d` whose output has its channels last in memory; adopts the weights of another one.

    The layer norm that follows wants them there, and so do the activation and the next convolution: otherwise each
    copies the longest tensors of the model. Shapes and values are those of `nn.Conv1d`, (batch, channels, frames).
    """

    def __init__(self, stock: nn.Conv1d):
        sizes = (stock.in_channels, stock.out_channels, stock.kernel_size, stock.stride)
        # on "meta" no initial weights are drawn
        super().__init__(*sizes, bias=stock.bias is not None, device="meta")
        self.weight, self.bias = stock.weight, stock.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.in_channels == 1 and not is_traced():
            # windows of samples are a view, and their product with the weights has its channels last at once
            windows = input.squeeze(1).unfold(-1, *self.kernel_size, *self.stride)
            return nn.functional.linear(windows, self.weight.squeeze(1), self.bias).transpose(1, 2)
        # two-dimensional convolutions have this memory format, one-dimensional ones do not
        weight = self.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        output = nn.functional.conv2d(input.unsqueeze(2), weight, self.bias, (1, *self.stride))
        return output.contiguous(memory_format=torch.channels_last).squeeze(2)


class OverwritingGroupNorm(nn.GroupNorm):
    """A group norm with one group for each channel (batch, channels, frames); adopts the weights of another one."""

    def __init__(self, stock: nn.GroupNorm):
        super().__init__(stock.num_groups, stock.num_channels, eps=stock.eps, device="meta")
        self.weight, self.bias = stock.weight, stock.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return overwrite(self.normalize, input, 1, self.weight, self.bias)

    def normalize(self, channels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return nn.functional.group_norm(channels, len(weight), weight, bias, self.eps)


class OverwritingLayerNorm(nn.LayerNorm):
    """A layer norm over the channels of (batch, frames, channels); adopts the weights of another one."""

    def __init__(self, stock: nn.LayerNorm):
        super().__init__(stock.normalized_shape, eps=stock.eps, device="meta")
        self.weight, self.bias = stock.weight, stock.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return overwrite(super().forward, input, 1)


class OverwritingActivation(nn.Module):
    """An activation of (batch, channels, frames), along the axis that is not dense in memory."""

    def __init__(self, stock: nn.Module, dim: int):
        super().__init__()
        self.stock, self.dim = stock, dim

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return overwrite(self.stock, input, self.dim)


class FeatureEncoderMixin:
    """A feature encoder that passes on what is its output already, so that passes and models can share it.

    Takes the place of a stock one and adopts its layers: new ones would draw other initial weights. Where each
    convolution is followed by a layer norm, they keep the channels last in memory. Norms and activations overwrite
    what the convolutions gave, where that is safe.
    """

    def __init__(self, stock: nn.Module):
        nn.Module.__init__(self)
        self.conv_layers = stock.conv_layers
        self.gradient_checkpointing = stock.gradient_checkpointing
        self._requires_grad = stock._requires_grad
        for layer in self.conv_layers:
            norm = getattr(layer, "layer_norm", None)
            channels_last = isinstance(norm, nn.LayerNorm)
            if channels_last:
                layer.conv = ChannelsLastConv1d(layer.conv)
                layer.layer_norm = OverwritingLayerNorm(norm)
            elif norm is not None:
                layer.layer_norm = OverwritingGroupNorm(norm)
            layer.activation = OverwritingActivation(layer.activation, dim=2 if channels_last else 1)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        """Samples (batch, samples), or features (batch, channels, frames), to features."""
        if input_values.ndim == 3:
            return input_values
        if any(layer.gradient_checkpointing for layer in self.conv_layers):
            return super().forward(input_values)
        # the stock pass has a gradient of the samples computed, which only checkpoints that are re-entered need
        hidden_states = input_values.unsqueeze(1)
        for layer in self.conv_layers:
            hidden_states = layer(hidden_states)
        return hidden_states
