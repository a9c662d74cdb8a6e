"""The frozen teacher: what makes a model fit to teach a student."""

from collections.abc import Callable
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, ProcessorMixin


def check_teacher(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raise `ValueError` unless the posteriors of both models can be compared frame by frame.

    Vocabulary size, CTC blank and number of frames have to agree. They must be two models: the teacher is frozen.
    """
    ours = set(student.parameters())
    if any(parameter in ours for parameter in teacher.parameters()):
        raise ValueError(
            "Teacher and student share weights, and the teacher's are frozen: load the teacher apart, or pass "
            'teacher="self", or teacher="base" for the weights under the adapters of a PeftModel.'
        )
    for name, what in (("vocab_size", "vocabulary"), ("pad_token_id", "CTC blank")):
        theirs, ours = getattr(teacher.config, name), getattr(student.config, name)
        if theirs != ours:
            raise ValueError(
                f"Teacher and student must share the {what}, because their posteriors are compared token by token: "
                f"{name} is {theirs} for the teacher and {ours} for the student."
            )
    # 0.5 s to 30 s at 16 kHz, in steps that share no factor with a stride
    samples = torch.arange(8_000, 480_001, 7_919)
    theirs, ours = (num_frames(model, samples) for model in (teacher, student))
    if not torch.equal(theirs, ours):
        raise ValueError(
            "Teacher and student must have the same frame rate, because their posteriors are compared frame by frame: "
            f"{samples[-1]} samples are {theirs[-1]} frames for the teacher and {ours[-1]} for the student."
        )


def check_cacheable(teacher: Any, train_dataset: Any) -> None:
    """Raise `ValueError` unless the teacher is a model and the training set can be gone through beforehand."""
    if not isinstance(teacher, nn.Module):
        raise ValueError(
            "teacher_cache_dir keeps the posteriors of a frozen teacher, which has to be a model; got "
            f"teacher={teacher!r}. Leave teacher_cache_dir out."
        )
    if isinstance(train_dataset, IterableDataset | datasets.IterableDataset):
        raise ValueError(
            "teacher_cache_dir needs a training set that can be gone through before the first step, and this one is "
            f"streamed ({type(train_dataset).__name__}). Load it without streaming, or leave teacher_cache_dir out: "
            "the teacher then runs in every step."
        )


def freeze(teacher: PreTrainedModel) -> PreTrainedModel:
    """Put the teacher in eval mode (no dropout, no SpecAugment, fixed statistics) and stop its gradients."""
    return teacher.eval().requires_grad_(False)


FEATURE_ENCODER_SETTINGS = (
    "conv_dim conv_kernel conv_stride conv_bias feat_extract_norm feat_extract_activation layer_norm_eps"
).split()


def feature_encoder(model: nn.Module) -> nn.Module:
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return model.base_model.feature_extractor


def has_frozen_feature_encoder(model: nn.Module) -> bool:
    """Whether the model is a dynamic one whose feature encoder is not trained."""
    return hasattr(model, "extract_features") and not any(
        parameter.requires_grad for parameter in feature_encoder(model).parameters()
    )


def equal_feature_encoders(teacher: nn.Module, student: nn.Module) -> bool:
    """Whether both models, dynamic ones, make the same features of the same samples: equal settings and tensors.

    The teacher's may be the student's in a lower precision: it then gets better features than its own.
    """
    if not all(hasattr(model, "extract_features") for model in (teacher, student)):
        return False
    if any(getattr(teacher.config, name) != getattr(student.config, name) for name in FEATURE_ENCODER_SETTINGS):
        return False
    theirs, ours = (feature_encoder(model).state_dict() for model in (teacher, student))
    return theirs.keys() == ours.keys() and all(
        theirs[name].equal(tensor.to(theirs[name].dtype)) for name, tensor in ours.items()
    )


def batched_by(model: PreTrainedModel, processor: ProcessorMixin) -> Callable[[int], int] | None:
    """What utterances must have in common, by their samples, to have the outputs in a batch that each has alone.

    But for rounding. Attention that is masked needs nothing in common. A Conformer's convolutions reach into padded
    frames, so there must be none: utterances of as many frames, whose padding is samples that no frame hears. `None`
    where no batch is safe: group normalisation in a feature encoder is over all samples, padding included.
    """
    if getattr(model.config, "feat_extract_norm", None) != "layer":
        return None
    if "wavlm" in model.config.model_type and processor.feature_extractor.return_attention_mask:
        return lambda samples: 0
    return lambda samples: int(num_encoder_frames(model, samples))


def num_frames(model: PreTrainedModel, num_samples: Any) -> Any:
    """Frames that the model makes of so many samples (an integer or a tensor of them)."""
    return model._get_feat_extract_output_lengths(num_samples)


def num_encoder_frames(model: PreTrainedModel, num_samples: Any) -> torch.Tensor:
    """Frames that the encoder layers see of so many samples (or feature frames); an adapter after them is left out."""
    encoder = model.base_model
    # HuBERT has no adapter and no such argument
    options = {"add_adapter": False} if getattr(encoder.config, "add_adapter", False) else {}
    return torch.as_tensor(encoder._get_feat_extract_output_lengths(torch.as_tensor(num_samples), **options))
