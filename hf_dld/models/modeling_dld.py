"""What the dynamic models share: the encoder loop that obeys a set of active layers, and the model's own setting."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_dld import DEPTH_ARGUMENTS, DynamicDepthConfigMixin
from .depth import is_count
from .loading import check_loading, explained_errors


class LayerOutput(nn.Module):
    """Passes a layer's output on; skipped or not, every layer goes through here once.

    Transformers records hidden states with hooks on module calls. A hook on the layers would miss those that are
    skipped and shift the indices, so the hook sits on this module: `hidden_states[i]` always means layer i.
    """

    def forward(self, layer_input: torch.Tensor, layer_output: torch.Tensor) -> torch.Tensor:
        return layer_output


class PrunedLayer(nn.Module):
    """Keeps the index of a layer that the model does not have, so that the others keep theirs. It cannot run."""


@contextmanager
def stock_layers(config: PreTrainedConfig, count: int) -> Iterator[None]:
    """Let a stock constructor build `count` encoder layers; it gets `config` itself, which all modules share."""
    num_hidden_layers, config.num_hidden_layers = config.num_hidden_layers, count
    try:
        yield
    finally:
        config.num_hidden_layers = num_hidden_layers


class DynamicDepthEncoderMixin:
    """The loop of an encoder that runs some of its `layers`; a skipped layer passes its input on and costs nothing.

    The gate of DLD (arXiv 2601.16117): y + g * f(y) with g in {0, 1}, decided before the loop. An encoder says what
    comes before its layers, `before_layers`, and after them, `after_layers`.
    """

    def __init__(self, config: Any):
        present = config.present_layers
        with stock_layers(config, len(present)):
            super().__init__(config)
        built = dict(zip(present, self.layers, strict=True))
        self.layers = nn.ModuleList(
            built[index] if index in built else PrunedLayer() for index in range(config.num_hidden_layers)
        )
        self.layer_output = LayerOutput()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        active_layers: Any | None = None,
        num_active_layers: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        active_layers = self.config.resolve_active_layers(active_layers, num_active_layers)
        hidden_states, layer_inputs = self.before_layers(hidden_states, attention_mask)
        hidden_states = self.run_layers(hidden_states, active_layers, **layer_inputs, **kwargs)
        return BaseModelOutput(last_hidden_state=self.after_layers(hidden_states))

    def run_layers(
        self, hidden_states: torch.Tensor, active_layers: tuple[int, ...], **layer_kwargs: Any
    ) -> torch.Tensor:
        """Run the active layers on `hidden_states` of shape (batch, frames, hidden).

        May be called for a few layers at a time: what two sets of layers begin with need not be computed twice.
        """
        for index, layer in enumerate(self.layers):
            layer_input = hidden_states
            if index in active_layers:
                output = layer(hidden_states, **layer_kwargs)
                hidden_states = output[0] if isinstance(output, tuple) else output
            hidden_states = self.layer_output(layer_input, hidden_states)
        return hidden_states


class DynamicDepthModelMixin:
    """Which layers a model runs when a call does not say: read and set on the model and any head on top of it."""

    # classes of modules inside a layer that steps need which skip the layer
    always_gathered: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any | None = None,
        use_safetensors: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers, from a dynamic or a stock checkpoint, and with a depth.

        Args:
            pretrained_model_name_or_path, args, config, ignore_mismatched_sizes, output_loading_info, kwargs: as in
                `PreTrainedModel.from_pretrained`.
            use_safetensors: `False` loads a pickle (`pytorch_model.bin`); nothing else does.
            num_active_layers, active_layers, layer_selection, depth_schedule: replace the checkpoint's own. Where it
                was saved with a set of layers, that stays until `active_layers` or `num_active_layers` is given.
            prune_inactive_layers (`bool`, defaults to `False`): leave out the layers that do not run: they take no
                memory, and their tensors are not read. All indices stay those of the whole model, and asking for a
                pruned layer is an error. The model can be trained at this depth, exported and saved; what is saved is
                pruned when it is loaded again.

        Raises:
            CheckpointError: damaged or missing weights, or weights in a pickle that was not asked for.
            ValueError: an impossible depth.
        """
        if isinstance(config, PreTrainedConfig):
            # no configuration is loaded, which would take the depth and make a dynamic one of a stock one
            depth = {name: kwargs.pop(name) for name in DEPTH_ARGUMENTS if name in kwargs}
            config = cls.dynamic_config(config)
            if depth:
                config = cls.config_class.from_config(config, **depth)
        checkpoint, subfolder = pretrained_model_name_or_path, kwargs.get("subfolder", "")
        with explained_errors(checkpoint, subfolder, pickle_refused=use_safetensors is None):
            model, loading = super().from_pretrained(
                checkpoint,
                *args,
                config=config,
                use_safetensors=use_safetensors is not False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        check_loading(checkpoint, loading, ignore_mismatched_sizes=ignore_mismatched_sizes)
        return (model, loading) if output_loading_info else model

    @classmethod
    def dynamic_config(cls, config: PreTrainedConfig) -> Any:
        """`config` itself, or a dynamic one of its fields if it is the stock model's.

        Raises:
            TypeError: a configuration of another kind of model.
        """
        ours = cls.config_class
        if isinstance(config, DynamicDepthConfigMixin) and config.model_type == ours.model_type:
            return config
        if not isinstance(config, ours.stock_config_class):
            names = f"{ours.__name__} or {ours.stock_config_class.__name__}"
            raise TypeError(f"{cls.__name__} is made from a {names}; got a {type(config).__name__}.")
        return ours.from_config(config)

    def post_init(self) -> None:
        if self.config.pruned_layers:
            pruned = "|".join(map(str, self.config.pruned_layers))
            ignored = self._keys_to_ignore_on_load_unexpected or ()
            self._keys_to_ignore_on_load_unexpected = {*ignored, rf"encoder\.layers\.({pruned})\."}
        # what sharded training gathers at once: a layer, which is left alone in steps that skip it
        layers = (layer for layer in self.base_model.encoder.layers if not isinstance(layer, PrunedLayer))
        self._no_split_modules = {*self.always_gathered, *(type(layer).__name__ for layer in layers)}
        super().post_init()

    def get_input_embeddings(self) -> None:
        """None: what comes in are samples. (The stock method raises an error here, and sharded training asks.)"""

    def get_output_embeddings(self) -> None:
        """None: the CTC head is no embedding of what comes in."""

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Ascending 0-based indices of the encoder layers that run."""
        return self.config.resolve_active_layers()

    @property
    def num_active_layers(self) -> int:
        """How many encoder layers run."""
        return len(self.active_layers)

    def set_active_layers(self, active_layers: int | Sequence[int] | None) -> None:
        """Set the layers that run from now on; saved with the model's configuration.

        Args:
            active_layers: how many (turned into indices by `config.layer_selection`), or the ascending 0-based
                indices themselves, or `None` for all.

        Raises:
            ValueError: for an impossible count or index, or a pruned layer; the setting stays as it was.
        """
        if is_count(active_layers):
            count = self.config.num_hidden_layers if active_layers is None else active_layers
            layers = self.config.resolve_active_layers(num_active_layers=count)
            self.config.num_active_layers = None if active_layers is None else len(layers)
            self.config.active_layers = None
        else:
            indices = self.config.resolve_active_layers(active_layers=active_layers)
            self.config.num_active_layers, self.config.active_layers = len(indices), list(indices)

    def before_layers(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """What is the same whichever layers run, for running several sets of layers on one batch.

        `model.ctc_logits(model.base_model.encoder.run_layers(hidden_states, layers, **layer_inputs))` equals
        `model(input_values, attention_mask, active_layers=layers).logits`.

        Args:
            input_values: (batch, samples).
            attention_mask: (batch, samples), 1 where there is speech.

        Returns:
            The hidden states that go into the first layer, (batch, frames, hidden), and what every layer takes with
            them (masks and positions).
        """
        model = self.base_model
        features = self.extract_features(input_values).transpose(1, 2)
        if attention_mask is not None:
            attention_mask = model._get_feature_vector_attention_mask(
                features.shape[1], attention_mask, add_adapter=False
            )
        hidden_states, _ = model.feature_projection(features)
        hidden_states = model._mask_hidden_states(hidden_states, attention_mask=attention_mask)
        return model.encoder.before_layers(hidden_states, attention_mask)

    def ctc_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The logits (batch, frames, vocab) of a CTC model from the output of its last layer, see `before_layers`."""
        hidden_states = self.base_model.encoder.after_layers(hidden_states)
        if self.base_model.adapter is not None:
            hidden_states = self.base_model.adapter(hidden_states)
        return self.lm_head(self.dropout(hidden_states))

    def extract_features(self, input_values: torch.Tensor) -> torch.Tensor:
        """The feature encoder's output, which the model takes in place of `input_values` (its mask stays the samples').

        It does not depend on the active layers: passes at several depths, and models with equal feature encoders, need
        it only once. With `labels` give an `attention_mask` too: the stock head takes the shape of what comes in for
        that of samples.

        Args:
            input_values: (batch, samples).

        Returns:
            (batch, channels, frames).
        """
        return self.base_model.feature_extractor(input_values)

    def to_static(self, active_layers: int | Sequence[int] | None = None) -> PreTrainedModel:
        """A stock model made of just the active layers, with weights of its own; its outputs are equal.

        Args:
            active_layers: how many, or which ones, as in `set_active_layers`; `None` for those that run now.

        Returns:
            The stock class that belongs to this one (`DLDWavLMForCTC`: `WavLMForCTC`), in this model's mode and dtype.
        """
        layers = self.config.resolve_depth(active_layers)
        if getattr(self, "peft_config", None):
            raise ValueError(
                "The model has adapters (PEFT), which no stock model has: merge them into its weights first."
            )
        state_dict = renumber_layers(self.state_dict(), layers)
        config = self.config.to_static(len(layers))
        model, loading = self.stock_class.from_pretrained(
            None, config=config, state_dict=state_dict, dtype=self.dtype, output_loading_info=True
        )
        wrong = {what: names for what, names in loading.items() if names}
        if wrong:
            raise RuntimeError(f"The static model's tensors do not match the stock class: {wrong}.")
        return model.to(self.device).train(self.training)

    def extra_repr(self) -> str:
        layers = ", ".join(map(str, self.active_layers))
        return f"active layers: {layers} ({self.num_active_layers} of {self.config.num_hidden_layers})"


def check_dynamic(model: Any, with_head: bool = True) -> None:
    """Raise `TypeError` unless the model is a dynamic one, by default with a CTC head, or a `PeftModel` around one."""
    if not hasattr(model, "before_layers"):
        problem = "cannot run with some of its layers"
    elif with_head and not hasattr(model, "lm_head"):
        problem = "has no CTC head"
    else:
        return
    raise TypeError(
        f"A {type(model).__name__} {problem}; load the checkpoint with hf_dld.DLDWavLMForCTC or "
        "hf_dld.DLDWav2Vec2ConformerForCTC."
    )


def zero_padding(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Set the frames of (batch, frames, hidden) that `attention_mask` (batch, frames) leaves out to 0."""
    if attention_mask is None:
        return hidden_states
    return hidden_states.masked_fill(~attention_mask.unsqueeze(-1), 0.0)


def renumber_layers(state_dict: dict[str, torch.Tensor], layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Copies of the tensors of a model made of `layers` only, numbered from 0.

    WavLM's relative position embedding belongs to layer 0, whichever layer that was.
    """
    numbers = {old: new for new, old in enumerate(layers)}
    renumbered = {}
    for name, tensor in state_dict.items():
        prefix, found, rest = name.partition("encoder.layers.")
        if found:
            index, _, rest = rest.partition(".")
            new = 0 if rest.endswith("rel_attn_embed.weight") else numbers.get(int(index))
            if new is None:
                continue
            name = f"{prefix}{found}{new}.{rest}"
        renumbered[name] = tensor.detach().clone()
    return renumbered


def ctc_head(config: Any) -> nn.Linear:
    """The linear layer from the last hidden states to the vocabulary, as the stock CTC models build it."""
    if config.vocab_size is None:
        raise ValueError("A CTC model needs config.vocab_size, the number of tokens with the blank; it is None.")
    return nn.Linear(config.output_hidden_size if config.add_adapter else config.hidden_size, config.vocab_size)
