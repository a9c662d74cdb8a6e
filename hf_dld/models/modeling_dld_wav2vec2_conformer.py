"""Wav2Vec2-Conformer with any number of its encoder layers; tensor names and full-depth outputs are the stock ones."""

from typing import Any

import torch
from torch import nn
from transformers import Wav2Vec2ConformerForCTC, Wav2Vec2ConformerModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import (
    Wav2Vec2ConformerEncoder,
    Wav2Vec2ConformerFeatureEncoder,
    Wav2Vec2ConformerPreTrainedModel,
    Wav2Vec2ConformerSelfAttention,
)
from transformers.utils.output_capturing import OutputRecorder

from .attention import attend, by_products, shift_relative
from .configuration_dld import DLDWav2Vec2ConformerConfig
from .feature_encoder import FeatureEncoderMixin
from .modeling_dld import (
    DynamicDepthEncoderMixin,
    DynamicDepthModelMixin,
    LayerOutput,
    ctc_head,
    stock_layers,
    zero_padding,
)


class DLDWav2Vec2ConformerSelfAttention(Wav2Vec2ConformerSelfAttention):
    """The Conformer's attention, by plain products where the fused kernel has no gradient for the position bias."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        relative_position_embeddings: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: (batch, frames, hidden).
            attention_mask: True where a key may be attended to, (batch, 1, frames, frames); numbers that are added with
                eager attention.
            relative_position_embeddings: (1, 2 * frames - 1, hidden) of the distances between frames, or the cosines
                and sines of the rotary kind.

        Returns:
            The output (batch, frames, hidden), and the weights (batch, heads, frames, frames) with eager attention,
            else `None`.
        """
        if not by_products(self.config, hidden_states):
            return super().forward(hidden_states, attention_mask, relative_position_embeddings, **kwargs)
        rotated = hidden_states
        if self.position_embeddings_type == "rotary":
            rotated = self._apply_rotary_embedding(hidden_states, relative_position_embeddings)
        head_shape = (*hidden_states.shape[:-1], self.num_heads, self.head_size)
        query = self.linear_q(rotated).view(head_shape)
        key = self.linear_k(rotated).view(head_shape).transpose(1, 2)
        value = self.linear_v(hidden_states).view(head_shape).transpose(1, 2)
        scores = self.scores(query, key, relative_position_embeddings)
        if attention_mask is not None:
            scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
        output = attend(scores, value, self.dropout.p if self.training else 0.0)
        return self.linear_out(output.reshape(hidden_states.shape)), None

    def scores(self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Scaled scores (batch, heads, frames, frames); Transformer-XL (arXiv 1901.02860), section 3.3.

        Args:
            query: (batch, frames, heads, head).
            key: (batch, heads, frames, head).
            positions: (1, 2 * frames - 1, hidden) of the distances between frames, used by the relative kind.
        """
        query = query * self.scaling
        if self.position_embeddings_type != "relative":
            return torch.matmul(query.transpose(1, 2), key.transpose(2, 3))
        by_content, by_position = (
            (query + bias * self.scaling).transpose(1, 2) for bias in (self.pos_bias_u, self.pos_bias_v)
        )
        distances = self.linear_pos(positions[0]).unflatten(-1, (self.num_heads, self.head_size)).permute(1, 2, 0)
        scores = torch.matmul(by_content, key.transpose(2, 3))
        scores += shift_relative(torch.matmul(by_position, distances))
        return scores


class DLDWav2Vec2ConformerEncoder(DynamicDepthEncoderMixin, Wav2Vec2ConformerEncoder):
    """The Conformer encoder: `hidden_states` (batch, frames, hidden) through the active layers."""

    def __init__(self, config: DLDWav2Vec2ConformerConfig):
        super().__init__(config)
        for index in config.present_layers:
            self.layers[index].self_attn = DLDWav2Vec2ConformerSelfAttention(config)

    def before_layers(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        hidden_states = zero_padding(hidden_states, attention_mask)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        hidden_states = self.dropout(hidden_states)
        if self.config.position_embeddings_type == "rotary":
            # kept from the last pass of this length, in its precision, and perhaps without a gradient
            self.embed_positions.cached_sequence_length = None
        # the same embeddings serve whichever layers run
        positions = self.embed_positions(hidden_states) if self.embed_positions is not None else None
        return hidden_states, {"attention_mask": attention_mask, "relative_position_embeddings": positions}

    def after_layers(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layer_norm(hidden_states)


class DLDWav2Vec2ConformerFeatureEncoder(FeatureEncoderMixin, Wav2Vec2ConformerFeatureEncoder):
    """`Wav2Vec2ConformerFeatureEncoder` that takes features too."""


class DLDWav2Vec2ConformerPreTrainedModel(DynamicDepthModelMixin, Wav2Vec2ConformerPreTrainedModel):
    config_class = DLDWav2Vec2ConformerConfig
    config: DLDWav2Vec2ConformerConfig
    _can_record_outputs = {
        "hidden_states": LayerOutput,
        "attentions": OutputRecorder(Wav2Vec2ConformerSelfAttention, index=1, layer_name="encoder"),
    }


class DLDWav2Vec2ConformerModel(DLDWav2Vec2ConformerPreTrainedModel, Wav2Vec2ConformerModel):
    """`Wav2Vec2ConformerModel` that runs `active_layers` or `num_active_layers` of its encoder layers.

    Both may be given in the call, for that call only; else `set_active_layers` and the configuration decide.
    `hidden_states[i + 1]` is the output of layer i, equal to its input where the layer was skipped; `attentions` has
    an entry for each layer that ran (eager attention only).
    """

    stock_class = Wav2Vec2ConformerModel

    def __init__(self, config: DLDWav2Vec2ConformerConfig):
        config = self.dynamic_config(config)
        with stock_layers(config, 0 if config.pruned_layers else config.num_hidden_layers):
            super().__init__(config)
        self.encoder = DLDWav2Vec2ConformerEncoder(config)
        self.feature_extractor = DLDWav2Vec2ConformerFeatureEncoder(self.feature_extractor)
        if self.adapter is not None:
            self.adapter.layerdrop = 0.0  # skipping an adapter layer would change the number of frames
        self.batch_norm_frozen = False
        self.post_init()

    def freeze_batch_norm(self) -> None:
        """Normalise by the running statistics in training too, and leave them as they are.

        The statistics of one layer depend on which layers ran before it, so that statistics gathered in training mix
        all depths (docs/method.md has the figures).
        """
        self.batch_norm_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> "DLDWav2Vec2ConformerModel":
        super().train(mode)
        if self.batch_norm_frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm1d | nn.SyncBatchNorm):
                    module.eval()
        return self


class DLDWav2Vec2ConformerForCTC(DLDWav2Vec2ConformerPreTrainedModel, Wav2Vec2ConformerForCTC):
    """`Wav2Vec2ConformerForCTC` that runs any number of its encoder layers (see `DLDWav2Vec2ConformerModel`).

    Loads any stock Wav2Vec2-Conformer checkpoint: same tensor names, same logits at full depth.

    Example::

        model = DLDWav2Vec2ConformerForCTC.from_pretrained(checkpoint, num_active_layers=6)
        model.set_active_layers(4)
        model(input_values, active_layers=[0, 3, 7])  # this call only
    """

    stock_class = Wav2Vec2ConformerForCTC

    def __init__(self, config: DLDWav2Vec2ConformerConfig, target_lang: str | None = None):
        config = self.dynamic_config(config)
        # not the stock constructor: it would build a stock encoder first, only to throw it away
        PreTrainedModel.__init__(self, config)
        self.wav2vec2_conformer = DLDWav2Vec2ConformerModel(config)
        self.dropout = nn.Dropout(config.final_dropout)
        self.target_lang = target_lang
        self.lm_head = ctc_head(config)
        self.post_init()

    def freeze_batch_norm(self) -> None:
        """See `DLDWav2Vec2ConformerModel.freeze_batch_norm`."""
        self.wav2vec2_conformer.freeze_batch_norm()
