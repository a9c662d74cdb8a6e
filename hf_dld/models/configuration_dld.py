"""Configurations of the dynamic models: the stock configuration plus which layers run."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import InvalidVersion, parse
from transformers import PreTrainedConfig, Wav2Vec2ConformerConfig, WavLMConfig

from .depth import (
    LAYER_SELECTIONS,
    check_active_layers,
    check_depth_schedule,
    check_num_active_layers,
    check_num_hidden_layers,
    check_present,
    is_count,
    select_layers,
)

_CHOICE_OF_LAYERS = ("num_active_layers", "active_layers", "layer_selection", "depth_schedule")

_DEPTH_FIELDS = (*_CHOICE_OF_LAYERS, "pruned_layers")

DEPTH_ARGUMENTS = (*_CHOICE_OF_LAYERS, "prune_inactive_layers")

VERSION = "0.1.0"
"""The version of hf_dld, here because this file travels inside checkpoints; stored in their config.json."""


class DynamicDepthConfigMixin:
    """What the dynamic configurations share: the depth fields are checked wherever a configuration is made."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not isinstance(self.dtype, torch.dtype | None):
            raise ValueError(f"dtype must be a name like 'float32'; got {self.dtype!r}.")
        self.validate()  # the stock class does so in an __init__ that its subclasses do not have
        self.check_depth()

    def check_depth(self) -> None:
        """Raise `ValueError` if the depth fields are impossible for `num_hidden_layers`."""
        check_num_hidden_layers(self.num_hidden_layers)
        if self.layer_selection not in LAYER_SELECTIONS:
            raise ValueError(f"layer_selection must be one of {LAYER_SELECTIONS}; got {self.layer_selection!r}.")
        if self.depth_schedule is not None:
            check_depth_schedule(self.depth_schedule, self.num_hidden_layers)
            # numbers of other libraries become plain ones, or the configuration could not be saved
            self.depth_schedule = [list(map(operator.index, layers)) for layers in self.depth_schedule]
        elif self.layer_selection == "schedule":
            raise ValueError('layer_selection="schedule" needs a depth_schedule, and the config has none.')
        if self.num_active_layers is not None:
            self.num_active_layers = check_num_active_layers(self.num_active_layers, self.num_hidden_layers)
        if self.active_layers is not None:
            self.active_layers = list(check_active_layers(self.active_layers, self.num_hidden_layers))
        if self.pruned_layers is not None:
            check_active_layers(self.pruned_layers, self.num_hidden_layers, "pruned_layers")
            self.resolve_active_layers()

    @property
    def present_layers(self) -> tuple[int, ...]:
        """Ascending 0-based indices of the encoder layers that were not pruned."""
        return tuple(index for index in range(self.num_hidden_layers) if index not in (self.pruned_layers or ()))

    def present_depths(self, layer_selection: str | None = None) -> tuple[int, ...]:
        """The numbers of layers of which none was pruned: all from 1 on, unless some were.

        Args:
            layer_selection: how a count becomes layers; this configuration's own when None.
        """
        selection, total = layer_selection or self.layer_selection, self.num_hidden_layers
        return tuple(
            depth
            for depth in range(1, total + 1)
            if set(select_layers(depth, total, selection, self.depth_schedule)) <= set(self.present_layers)
        )

    def prune_inactive_layers(self) -> None:
        """Leave out, in the models made from this configuration, the layers that it does not run."""
        active_layers = self.resolve_active_layers()
        self.pruned_layers = [index for index in range(self.num_hidden_layers) if index not in active_layers] or None

    def resolve_active_layers(
        self, active_layers: Any | None = None, num_active_layers: int | None = None
    ) -> tuple[int, ...]:
        """The layers that run: `active_layers` wins over `num_active_layers`, which wins over this configuration.

        Returns:
            Ascending 0-based indices.

        Raises:
            ValueError: for an impossible count or index, or a layer that was pruned.
        """
        if active_layers is None and num_active_layers is None:
            active_layers, num_active_layers = self.active_layers, self.num_active_layers
        if active_layers is not None:
            layers = check_active_layers(active_layers, self.num_hidden_layers)
        elif num_active_layers is not None:
            layers = select_layers(num_active_layers, self.num_hidden_layers, self.layer_selection, self.depth_schedule)
        else:
            layers = tuple(range(self.num_hidden_layers))
        if self.pruned_layers:
            check_present(layers, self.pruned_layers, self.num_hidden_layers)
        return layers

    def to_diff_dict(self) -> dict[str, Any]:
        return {**super().to_diff_dict(), "hf_dld_version": VERSION}

    def resolve_depth(self, active_layers: int | Sequence[int] | None = None) -> tuple[int, ...]:
        """The layers that a depth means: how many, or which ones; `None` for those of this configuration.

        Raises:
            ValueError: for an impossible count or index.
        """
        if is_count(active_layers):
            return self.resolve_active_layers(num_active_layers=active_layers)
        return self.resolve_active_layers(active_layers=active_layers)

    def to_static(self, num_hidden_layers: int) -> PreTrainedConfig:
        """The stock configuration of a model of so many layers; what only the dynamic one knows is left out."""
        fields = self.to_dict()
        for name in (*_DEPTH_FIELDS, "model_type", "architectures", "auto_map"):
            fields.pop(name, None)
        with readable_config():
            return self.stock_config_class.from_dict({**fields, "num_hidden_layers": num_hidden_layers})

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        with readable_config():
            config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if not config_dict:  # Transformers would go on with the default configuration
            raise OSError(f"{args[0]} has no config.json, so it is not a checkpoint.")
        # a stock checkpoint is meant to load here, so the warning about its model_type would only scare
        if config_dict.get("model_type") == cls.stock_config_class.model_type:
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **depth: Any) -> Any:
        """A dynamic configuration with the fields of another one, stock or dynamic, and with `DEPTH_ARGUMENTS`."""
        fields = {**config.to_dict(), "model_type": cls.model_type}
        # a stock model leaves "eager" in its configuration where it has nothing better
        attention = config._attn_implementation if isinstance(config, cls) else None
        return cls.from_dict(fields, attn_implementation=attention, **depth)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # the depth given by the caller replaces the stored one before anything is checked, whole: a stored set of
        # layers must not win over the count that the caller asks for
        depth = {name: kwargs.pop(name) for name in _DEPTH_FIELDS if name in kwargs}
        if "num_active_layers" in depth:
            depth.setdefault("active_layers", None)
        prune_inactive_layers = kwargs.pop("prune_inactive_layers", False)
        with readable_config():
            fields = {**config_dict, **depth}
            check_version(fields.pop("hf_dld_version", VERSION), fields, cls)
            loaded = super().from_dict(fields, **kwargs)
        if prune_inactive_layers:
            (loaded[0] if isinstance(loaded, tuple) else loaded).prune_inactive_layers()
        return loaded


@contextmanager
def readable_config() -> Iterator[None]:
    """Turn whatever a damaged config.json makes of Transformers' reader into a `ValueError`."""
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())  # some have several lines
        raise ValueError(f"config.json cannot be used ({type(error).__name__}: {reason}).") from error


def check_version(saved_by: str, fields: dict[str, Any], config_class: type[PreTrainedConfig]) -> None:
    """Raise `ValueError` if a newer hf_dld saved what this one does not know, and would run without.

    Args:
        saved_by: version of hf_dld that saved the configuration.
        fields: what it saved.
        config_class: what it is loaded into.
    """
    try:
        newer = parse(saved_by) > parse(VERSION)
    except (InvalidVersion, TypeError):
        raise ValueError(f"hf_dld_version={saved_by!r} in config.json is not a version.") from None
    if not newer:
        return
    known = {*config_class().to_dict(), "auto_map"}
    unknown = sorted(name for name in fields if name not in known)
    if fields.get("layer_selection", "even") not in LAYER_SELECTIONS:
        unknown.append(f"layer_selection={fields['layer_selection']!r}")
    if unknown:
        raise ValueError(
            f"This checkpoint was saved by hf_dld {saved_by}, and hf_dld {VERSION}, which is installed, does not know "
            f"its {', '.join(unknown)}. Upgrade: pip install --upgrade hf_dld."
        )


class DLDWavLMConfig(DynamicDepthConfigMixin, WavLMConfig):
    """`WavLMConfig` of a model that runs with any number of its encoder layers.

    Args:
        num_active_layers (`int`, *optional*): how many encoder layers run, 1 to `num_hidden_layers`; `None`: all.
        active_layers (`list[int]`, *optional*): which ones, ascending 0-based indices; wins over the count.
        layer_selection (`str`, defaults to `"even"`): how a count becomes indices: `"even"`, `"first"` or
            `"schedule"`.
        depth_schedule (`list[list[int]]`, *optional*): `depth_schedule[k - 1]` are the layers for the count k.
        pruned_layers (`list[int]`, *optional*): layers that the model does not have, though it keeps their indices;
            `from_pretrained(..., prune_inactive_layers=True)` sets it.
        mask_feature_min_masks (`int`, defaults to 0): minimum number of SpecAugment masks along the features; the
            stock configuration lacks it, so that stock WavLM fails when `mask_feature_prob > 0`.
        ctc_zero_infinity (`bool`, defaults to `True`): a transcript longer than its frames counts as loss 0.

    The stock `layerdrop` is read but never applied: training draws its layers outside of the model.
    """

    model_type = "dld_wavlm"
    stock_config_class = WavLMConfig

    num_active_layers: int | None = None
    active_layers: list[int] | tuple[int, ...] | None = None
    layer_selection: str = "even"
    depth_schedule: list[list[int]] | None = None
    pruned_layers: list[int] | None = None
    mask_feature_min_masks: int = 0
    ctc_zero_infinity: bool = True


class DLDWav2Vec2ConformerConfig(DynamicDepthConfigMixin, Wav2Vec2ConformerConfig):
    """`Wav2Vec2ConformerConfig` of a model that runs with any number of its encoder layers.

    Args:
        num_active_layers (`int`, *optional*): how many encoder layers run, 1 to `num_hidden_layers`; `None`: all.
        active_layers (`list[int]`, *optional*): which ones, ascending 0-based indices; wins over the count.
        layer_selection (`str`, defaults to `"even"`): how a count becomes indices: `"even"`, `"first"` or
            `"schedule"`.
        depth_schedule (`list[list[int]]`, *optional*): `depth_schedule[k - 1]` are the layers for the count k.
        pruned_layers (`list[int]`, *optional*): layers that the model does not have, though it keeps their indices;
            `from_pretrained(..., prune_inactive_layers=True)` sets it.
        ctc_zero_infinity (`bool`, defaults to `True`): a transcript longer than its frames counts as loss 0.

    The stock `layerdrop` is read but never applied: training draws its layers outside of the model.
    """

    model_type = "dld_wav2vec2_conformer"
    stock_config_class = Wav2Vec2ConformerConfig

    num_active_layers: int | None = None
    active_layers: list[int] | tuple[int, ...] | None = None
    layer_selection: str = "even"
    depth_schedule: list[list[int]] | None = None
    pruned_layers: list[int] | None = None
    ctc_zero_infinity: bool = True
