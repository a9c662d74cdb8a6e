"""The convolutions before the encoder, which at few active layers cost more than the encoder itself."""

import torch
from torch import nn


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
        # two-dimensional convolutions have this memory format, one-dimensional ones do not
        weight = self.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        output = nn.functional.conv2d(input.unsqueeze(2), weight, self.bias, (1, *self.stride))
        return output.contiguous(memory_format=torch.channels_last).squeeze(2)


class FeatureEncoderMixin:
    """A feature encoder that passes on what is its output already, so that passes and models can share it.

    Takes the place of a stock one and adopts its layers: new ones would draw other initial weights. Where each
    convolution is followed by a layer norm, they keep the channels last in memory.
    """

    def __init__(self, stock: nn.Module):
        nn.Module.__init__(self)
        self.conv_layers = stock.conv_layers
        self.gradient_checkpointing = stock.gradient_checkpointing
        self._requires_grad = stock._requires_grad
        for layer in self.conv_layers:
            if isinstance(getattr(layer, "layer_norm", None), nn.LayerNorm):
                layer.conv = ChannelsLastConv1d(layer.conv)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        """Samples (batch, samples), or features (batch, channels, frames), to features."""
        return input_values if input_values.ndim == 3 else super().forward(input_values)
