"""What single encoder layers compute, by layer index, and which layer of the student copies which of the teacher."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

TARGETS = ("ffn", "hidden")


def map_layers(num_student_layers: int, num_teacher_layers: int, num_distilled: int | None = None) -> dict[int, int]:
    """Which student layers predict, and the teacher layer that each one predicts.

    Counted from 1, student layer i predicts teacher layer round(i * N_t / N_s), so that the last predicts the last.
    With `num_distilled` = K, the student layers are round(k * N_s / K) for k = 1..K. This is the map of USAD
    (arXiv 2506.18843, section III-B), which says of CoLLD (arXiv 2309.07707) that it predicts "each and every layer of
    the teacher"; CoLLD's own map for a shallower student is not known, so K = N_s is inferred. Halves round to even.

    Returns:
        0-based student indices, ascending, to 0-based teacher indices.

    Raises:
        ValueError: `num_distilled` is not from 1 to the number of student layers.
    """
    distilled = num_student_layers if num_distilled is None else num_distilled
    if not 1 <= distilled <= num_student_layers:
        raise ValueError(
            f"num_distilled_layers must be from 1 to {num_student_layers}, because the student has "
            f"{num_student_layers} layers (None means all of them); got {num_distilled!r}."
        )
    student_layers = [round(k * num_student_layers / distilled) for k in range(1, distilled + 1)]
    # a student more than twice as deep as its teacher would round to a layer 0, which there is not
    return {i - 1: max(round(i * num_teacher_layers / num_student_layers), 1) - 1 for i in student_layers}


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The encoder layers of a speech encoder, or of a model with a head on top of one.

    Raises:
        ValueError: the model has none where WavLM, HuBERT, wav2vec 2.0, Wav2Vec2-Conformer and Wav2Vec2-BERT do.
    """
    layers = getattr(getattr(model.base_model, "encoder", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or feed_forward(layers[0]) is None:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) cannot be distilled layer by layer: needs a speech "
            "encoder with `encoder.layers`, each with a feed-forward module, such as WavLM, HuBERT, wav2vec 2.0, "
            "Wav2Vec2-Conformer or Wav2Vec2-BERT."
        )
    return layers


def feed_forward(layer: nn.Module) -> nn.Module | None:
    """The feed-forward module of an encoder layer; of a Conformer's two, the second."""
    return getattr(layer, "ffn2", None) or getattr(layer, "feed_forward", None)


@contextmanager
def collect_features(
    model: PreTrainedModel, layers: Iterable[int], target: str = "hidden"
) -> Iterator[dict[int, torch.Tensor]]:
    """Collect what these layers compute while the context is open, through forward hooks.

    Args:
        model: a speech encoder, or a model with a head on top of one.
        layers: 0-based indices.
        target: `"hidden"`: the layer's output; `"ffn"`: the output of its feed-forward module, before the residual.

    Yields:
        A dictionary that the next forward passes fill: layer index to (batch, frames, hidden). A layer that is
        skipped has no entry.
    """
    features: dict[int, torch.Tensor] = {}

    def store(index: int, module: nn.Module, args: Any, output: Any) -> None:
        features[index] = output[0] if isinstance(output, tuple) else output

    stack = encoder_layers(model)
    modules = {index: stack[index] if target == "hidden" else feed_forward(stack[index]) for index in layers}
    handles = [module.register_forward_hook(partial(store, index)) for index, module in modules.items()]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
