"""WavLM with any number of its encoder layers. Tensor names and outputs at full depth are those of stock WavLM."""

from typing import Any

import torch
from torch import nn
from transformers import WavLMForCTC, WavLMModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.wavlm.modeling_wavlm import (
    WavLMAttention,
    WavLMEncoder,
    WavLMEncoderStableLayerNorm,
    WavLMFeatureEncoder,
    WavLMPreTrainedModel,
)
from transformers.utils.output_capturing import OutputRecorder

from .attention import attend, by_products
from .configuration_dld import DLDWavLMConfig
from .feature_encoder import FeatureEncoderMixin
from .modeling_dld import (
    DynamicDepthEncoderMixin,
    DynamicDepthModelMixin,
    LayerOutput,
    ctc_head,
    stock_layers,
    zero_padding,
)
from .pieces import in_pieces, piece_length


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that keeps its weights, for `output_attentions`: (batch, heads, frames, frames)."""
    weights = query @ key.transpose(-1, -2) * scaling + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class DLDWavLMAttention(WavLMAttention):
    """WavLM's attention through its projection modules and `scaled_dot_product_attention`.

    Stock WavLM hands the raw weights to `F.multi_head_attention_forward`, so that adapters and quantized projections
    are bypassed, and it always computes the attention weights. Same parameters, same result.
    """

    def __init__(self, config: DLDWavLMConfig, has_relative_position_bias: bool):
        super().__init__(
            embed_dim=config.hidden_size,
            num_heads=config.num_attention_heads,
            dropout=config.attention_dropout,
            num_buckets=config.num_buckets,
            max_distance=config.max_bucket_distance,
            has_relative_position_bias=has_relative_position_bias,
        )
        self.config = config
        self.is_causal = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        index: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        Args:
            hidden_states: (batch, frames, hidden).
            attention_mask: (batch, 1, 1, frames), added to the scores: 0, or the lowest number where there is padding.
            position_bias: (1, heads, frames, frames), the same for all layers; gated here by the hidden states.
            index: unused, part of the stock signature.

        Returns:
            The output (batch, frames, hidden), the weights (batch, heads, frames, frames) with eager attention, else
            `None`, and `position_bias` as it came.
        """
        head_shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)

        gate = self.compute_gate(hidden_states.view(head_shape)).to(query.dtype)
        inputs, length = (query, key, value, gate, position_bias), self.num_heads
        plain = by_products(self.config, query)
        attend = self.attend_by_products if plain else self.attend
        if in_pieces(gate.device):
            # of no more heads at a time than whose gated bias stays in the processor's cache until it is used
            bias_bytes = gate.nbytes * gate.shape[-2]
            if plain:
                bias_bytes *= 2  # and so do its weights
            length = piece_length(self.num_heads, bias_bytes)
        if length >= self.num_heads:
            output, weights = attend(*inputs, attention_mask, **kwargs)
        else:
            pieces = zip(*(heads.split(length, dim=1) for heads in inputs), strict=True)
            outputs, weights = zip(*(attend(*piece, attention_mask, **kwargs) for piece in pieces), strict=True)
            output = torch.cat(outputs, dim=2)
            weights = None if weights[0] is None else torch.cat(weights, dim=1)
        return self.out_proj(output.reshape(hidden_states.shape)), weights, position_bias

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gate: torch.Tensor,
        position_bias: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output (batch, frames, heads, head) of these heads, and their weights with eager attention."""
        bias = position_bias.to(query.dtype)
        # one pass over (batch, heads, frames, frames): the gated bias and the padding mask become one attention mask
        bias = gate * bias if attention_mask is None else torch.addcmul(attention_mask.to(query.dtype), gate, bias)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        return attention(self, query, key, value, bias, dropout=dropout, scaling=self.scaling, **kwargs)

    def attend_by_products(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gate: torch.Tensor,
        position_bias: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The output of `attend`, from plain products; the gated bias is added to the scores where they are."""
        scores = torch.matmul(query * self.scaling, key.transpose(2, 3))
        scores.addcmul_(gate, position_bias.to(scores.dtype))
        if attention_mask is not None:
            scores += attention_mask.to(scores.dtype)
        return attend(scores, value, self.dropout if self.training else 0.0), None

    def compute_gate(self, heads: torch.Tensor) -> torch.Tensor:
        """The gate on the position bias, (batch, heads, frames, 1), from hidden states (batch, frames, heads, head).

        WavLM (arXiv 2110.13900), equation 5.
        """
        projected = self.gru_rel_pos_linear(heads).unflatten(-1, (2, 4)).sum(-1).transpose(1, 2)
        gate_a, gate_b = torch.sigmoid(projected).chunk(2, dim=-1)
        return gate_a * (gate_b * self.gru_rel_pos_const - 1.0) + 2.0


def relative_position_bias(attention: nn.Module, frames: int) -> torch.Tensor:
    """The bias of every frame on every other, (1, heads, frames, frames), before it is gated.

    Equal to `compute_bias` of stock attention, but each distance is looked up once instead of once for each pair of
    frames, and the rows are dense in memory: those of the gated bias are so too, or attention would copy it.
    """
    frame = torch.arange(frames, device=attention.rel_attn_embed.weight.device)
    distances = torch.arange(1 - frames, frames, device=frame.device)
    values = attention.rel_attn_embed(attention._relative_positions_bucket(distances))
    index = frame - frame[:, None] + (frames - 1)  # of the distance of each key to each query
    return values.t().index_select(1, index.flatten()).view(1, -1, frames, frames)


class RelativePositionBias(nn.Module):
    """What every depth needs of layer 0, where that layer itself was pruned; the tensor keeps its name."""

    _relative_positions_bucket = WavLMAttention._relative_positions_bucket

    def __init__(self, config: DLDWavLMConfig):
        super().__init__()
        self.num_buckets, self.max_distance = config.num_buckets, config.max_bucket_distance
        self.rel_attn_embed = nn.Embedding(config.num_buckets, config.num_attention_heads)


class DynamicWavLMEncoderMixin(DynamicDepthEncoderMixin):
    """What the two WavLM encoders share; they differ in whether the layer norm comes before or after the layers."""

    def __init__(self, config: DLDWavLMConfig):
        super().__init__(config)
        for index in config.present_layers:
            self.layers[index].attention = DLDWavLMAttention(config, has_relative_position_bias=index == 0)
        if 0 not in config.present_layers:
            self.layers[0].attention = RelativePositionBias(config)

    def before_layers(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        hidden_states = self.embed_positions(zero_padding(hidden_states, attention_mask))
        frames = hidden_states.shape[1]
        # layer 0 owns the embedding; computed here, it serves whichever layers run
        position_bias = relative_position_bias(self.layers[0].attention, frames)
        if attention_mask is not None:
            padding = ~attention_mask[:, None, None, :]
            attention_mask = torch.zeros(padding.shape, dtype=position_bias.dtype, device=padding.device)
            attention_mask = attention_mask.masked_fill(padding, torch.finfo(position_bias.dtype).min)
        return hidden_states, {"attention_mask": attention_mask, "position_bias": position_bias}


class DLDWavLMEncoder(DynamicWavLMEncoderMixin, WavLMEncoder):
    """The post-norm encoder (WavLM base): `hidden_states` (batch, frames, hidden) through the active layers."""

    def embed_positions(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.layer_norm(hidden_states + self.pos_conv_embed(hidden_states)))

    def after_layers(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class DLDWavLMEncoderStableLayerNorm(DynamicWavLMEncoderMixin, WavLMEncoderStableLayerNorm):
    """The pre-norm encoder (WavLM large): `hidden_states` (batch, frames, hidden) through the active layers."""

    def embed_positions(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(hidden_states + self.pos_conv_embed(hidden_states))

    def after_layers(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layer_norm(hidden_states)


class DLDWavLMFeatureEncoder(FeatureEncoderMixin, WavLMFeatureEncoder):
    """`WavLMFeatureEncoder` that takes features too."""


class DLDWavLMPreTrainedModel(DynamicDepthModelMixin, WavLMPreTrainedModel):
    config_class = DLDWavLMConfig
    config: DLDWavLMConfig
    _supports_sdpa = True
    always_gathered = ("Embedding",)  # layer 0's relative positions
    _can_record_outputs = {
        "hidden_states": LayerOutput,
        "attentions": OutputRecorder(DLDWavLMAttention, index=1, layer_name="encoder"),
    }


class DLDWavLMModel(DLDWavLMPreTrainedModel, WavLMModel):
    """`WavLMModel` that runs `active_layers` or `num_active_layers` of its encoder layers.

    Both may be given in the call, for that call only; else `set_active_layers` and the configuration decide.
    `hidden_states[i + 1]` is the output of layer i, equal to its input where the layer was skipped; `attentions` has
    an entry for each layer that ran (eager attention only).
    """

    stock_class = WavLMModel

    def __init__(self, config: DLDWavLMConfig):
        config = self.dynamic_config(config)
        with stock_layers(config, 0 if config.pruned_layers else config.num_hidden_layers):
            super().__init__(config)
        encoder_class = DLDWavLMEncoderStableLayerNorm if config.do_stable_layer_norm else DLDWavLMEncoder
        self.encoder = encoder_class(config)
        self.feature_extractor = DLDWavLMFeatureEncoder(self.feature_extractor)
        if self.adapter is not None:
            self.adapter.layerdrop = 0.0  # skipping an adapter layer would change the number of frames
        self.post_init()


class DLDWavLMForCTC(DLDWavLMPreTrainedModel, WavLMForCTC):
    """`WavLMForCTC` that runs any number of its encoder layers (see `DLDWavLMModel`).

    Loads any stock WavLM checkpoint: same tensor names, same logits at full depth.

    Example::

        model = DLDWavLMForCTC.from_pretrained("microsoft/wavlm-base-plus", num_active_layers=6)
        model.set_active_layers(4)
        model(input_values, active_layers=[0, 3, 7])  # this call only
    """

    stock_class = WavLMForCTC

    def __init__(self, config: DLDWavLMConfig, target_lang: str | None = None):
        config = self.dynamic_config(config)
        # not the stock constructor: it would build a stock encoder first, only to throw it away
        PreTrainedModel.__init__(self, config)
        self.wavlm = DLDWavLMModel(config)
        self.dropout = nn.Dropout(config.final_dropout)
        self.target_lang = target_lang
        self.lm_head = ctc_head(config)
        self.post_init()
