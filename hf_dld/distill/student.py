"""Smaller students made from a teacher, and how they are saved for good."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoFeatureExtractor, AutoModel, FeatureExtractionMixin, PreTrainedModel

from ..data.collator import on_model
from ..models.depth import check_active_layers, select_layers
from ..models.modeling_dld import DynamicDepthModelMixin, renumber_layers
from .checkpoints import save_whole
from .layer_features import encoder_layers

# what does not depend on the width of the encoder
_WIDTH_FREE = ("feature_extractor.", "feature_projection.layer_norm.")


def make_student(
    teacher: PreTrainedModel,
    num_hidden_layers: int | None = None,
    layers: Sequence[int] | None = None,
    hidden_size: int | None = None,
) -> PreTrainedModel:
    """A smaller encoder of the teacher's kind: the stock class without a head, in float32, in eval mode.

    Of the teacher's width, it has the teacher's weights: `layers` or evenly spaced ones, renumbered, and all else.
    Of another width, its layers and projections have fresh weights; only the feature encoder, which does not depend on
    the width, is the teacher's. Heads keep their size, so their number follows the width, and so does the feed-forward
    width.

    The student can be masked: where the teacher's configuration has no SpecAugment, and so no vector for a masked
    frame, `mask_time_prob` becomes 0.05, Transformers' default.

    Args:
        teacher: a speech encoder, stock or dynamic, or a model with a head on top of one.
        num_hidden_layers: the student's layers; default: as many as `layers` names.
        layers: 0-based teacher layers that the student starts from, ascending; default: evenly spaced
            (`select_layers`).
        hidden_size: default: the teacher's.

    Raises:
        ValueError: an impossible number of layers, layer or width, or a teacher that is no speech encoder.
    """
    encoder = teacher.base_model
    total = len(encoder_layers(encoder))
    if isinstance(encoder, DynamicDepthModelMixin):
        encoder = encoder.to_static(total)
    config = copy.deepcopy(encoder.config)
    chosen = choose_layers(num_hidden_layers, layers, total)
    config.num_hidden_layers = len(chosen)
    if config.mask_time_prob == 0 and config.mask_feature_prob == 0:
        config.mask_time_prob = 0.05
    config.apply_spec_augment = True
    state_dict = renumber_layers(encoder.state_dict(), chosen)
    same_width = hidden_size in (None, config.hidden_size)
    if not same_width:
        if layers is not None:
            raise ValueError(
                f"layers names teacher layers whose weights are copied, which hidden_size {hidden_size} rules out: the "
                f"teacher's is {config.hidden_size}. Give num_hidden_layers."
            )
        _change_width(config, hidden_size)
        state_dict = {name: tensor for name, tensor in state_dict.items() if name.startswith(_WIDTH_FREE)}
    student = type(encoder)(config)
    missing, unexpected = student.load_state_dict(state_dict, strict=False)
    if unexpected or (same_width and set(missing) - {"masked_spec_embed"}):
        raise RuntimeError(f"The student's tensors do not match the teacher's: {unexpected or missing}.")
    return student.float().eval()


def choose_layers(num_hidden_layers: int | None, layers: Sequence[int] | None, total: int) -> tuple[int, ...]:
    """The teacher layers, of `total`, that `make_student` takes; the same errors."""
    if layers is None:
        if num_hidden_layers is None or not 1 <= num_hidden_layers <= total:
            raise ValueError(
                f"num_hidden_layers must be from 1 to {total}, because the teacher has {total} layers; "
                f"got {num_hidden_layers!r}."
            )
        return select_layers(num_hidden_layers, total)
    chosen = check_active_layers(layers, total, "layers")
    if num_hidden_layers not in (None, len(chosen)):
        raise ValueError(f"layers names {len(chosen)} layers, but num_hidden_layers is {num_hidden_layers}.")
    return chosen


def _change_width(config: Any, hidden_size: int) -> None:
    head_size = config.hidden_size // config.num_attention_heads
    if hidden_size < head_size or hidden_size % head_size:
        raise ValueError(
            f"hidden_size must be a multiple of {head_size}, the size of the teacher's attention heads; "
            f"got {hidden_size}."
        )
    config.intermediate_size = round(config.intermediate_size * hidden_size / config.hidden_size)
    config.num_attention_heads = hidden_size // head_size
    if getattr(config, "num_conv_pos_embedding_groups", None):
        config.num_conv_pos_embedding_groups = math.gcd(config.num_conv_pos_embedding_groups, hidden_size)
    if getattr(config, "output_hidden_size", None) == config.hidden_size:
        config.output_hidden_size = hidden_size
    config.hidden_size = hidden_size


def save_student(
    folder: str | Path, student: PreTrainedModel, feature_extractor: FeatureExtractionMixin
) -> PreTrainedModel:
    """Save the student with its feature extractor, whole or not at all, then load both as a user would and run them.

    Returns:
        The model that was loaded.

    Raises:
        RuntimeError: what was saved does not compute what the student does; the folder is then not to be used.
        OSError: it could not be saved (see `save_whole`).
    """
    save_whole(folder, student, feature_extractor)
    loaded = AutoModel.from_pretrained(folder)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    second = torch.randn(extractor.sampling_rate, generator=torch.Generator().manual_seed(0)).numpy()
    inputs = extractor(second, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    was_training = student.training
    with torch.no_grad():
        expected = student.eval().base_model(**on_model(inputs, student)).last_hidden_state.cpu()
        difference = (loaded.eval()(**on_model(inputs, loaded)).last_hidden_state - expected).abs().max().item()
    student.train(was_training)
    if not difference <= 1e-3 * expected.abs().max().item():
        raise RuntimeError(
            f"The student that was saved to {folder} computes something else than the one in memory: their outputs "
            f"differ by up to {difference:.2g}."
        )
    return loaded
