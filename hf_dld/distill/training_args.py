"""Arguments of the trainers: Transformers' own, with defaults that suit speech, and those of DLD and CoLLD."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..models.depth import DEPTH_SAMPLINGS, sample_layers
from .layer_features import TARGETS
from .losses import KL_DIRECTIONS
from .posterior_cache import CACHE_DTYPES

ERROR_METRIC = re.compile(r"(^|_)(loss|wer|cer)(_|$)")
BATCH_NORM_POLICIES = ("frozen", "updated", "synchronized")
COLLD_OBJECTIVES = ("info_nce", "l1_cosine")


@dataclass
class SpeechTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults that training on speech needs."""

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Stays off: the collator decodes the audio column, which no model takes."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Batches of similar length, so that little is padding."}
    )
    length_column_name: str = field(
        default="input_length", metadata={"help": "Column with each utterance's length in samples."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True,
        metadata={"help": "Stays on: parameters of skipped layers, and some of stock models, take no part in a step."},
    )
    max_batch_seconds: float | None = field(
        default=None,
        metadata={
            "help": "The most seconds of audio in a batch on each device, padding included: batches of similar length "
            "and as many utterances as fit. Replaces per_device_train_batch_size and train_sampling_strategy."
        },
    )

    max_nonfinite_steps: int = field(
        default=5,
        metadata={
            "help": "Training ends behind a checkpoint after so many steps in a row whose loss or gradient is NaN or "
            "infinite, at least 1. Such a step changes no weight."
        },
    )

    def __post_init__(self) -> None:
        # Transformers takes any name that does not end in "loss" for something to be maximised: eval_loss_6, eval_wer
        if self.greater_is_better is None and ERROR_METRIC.search(self.metric_for_best_model or ""):
            self.greater_is_better = False
        super().__post_init__()
        load_whole_models()
        # else torch warns at every loader that it has no accelerator to pin memory for
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        self.enable_jit_checkpoint = False  # the trainers do more on SIGTERM, always: see `faults`
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, but it smooths the targets of "
                "cross-entropies, and no loss here is one: leave it out."
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay off: no model takes audio, and the collators need it.")
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha is {self.neftune_noise_alpha}, but it adds noise to the embeddings of tokens, "
                "and models of speech have none: leave it out."
            )
        if self.max_nonfinite_steps < 1:
            raise ValueError(f"max_nonfinite_steps must be at least 1; got {self.max_nonfinite_steps}.")
        if self.max_batch_seconds is not None and not self.max_batch_seconds > 0:
            raise ValueError(f"max_batch_seconds must be above 0 (seconds); got {self.max_batch_seconds}.")
        if self.accelerator_config.dispatch_batches is None:
            # each process collates its own share of a stream: joined batches would have to be padded alike
            self.accelerator_config.dispatch_batches = False


@dataclass
class CTCTrainingArguments(SpeechTrainingArguments):
    """`TrainingArguments` with the defaults that training on transcribed speech needs."""

    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "The label column."})


@dataclass
class LayerDropArguments(SpeechTrainingArguments):
    """How a step draws the layers of a dynamic model (see `models.depth.sample_layers`)."""

    depth_sampling: str = field(
        default="balanced",
        metadata={
            "help": "How a step draws its layers: bernoulli (the paper), uniform (any count, any layers), selection "
            "(any count, the layers that inference would use for it), balanced (the same, all counts with the same "
            "compute, so that few layers run more often), sandwich (full depth and one drawn depth)."
        },
    )
    layerdrop: float = field(
        default=0.5, metadata={"help": "For bernoulli: the probability that a layer is skipped, 0 <= p < 1."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("depth_sampling", self.depth_sampling, DEPTH_SAMPLINGS)
        if not 0 <= self.layerdrop < 1:
            raise ValueError(f"layerdrop must be at least 0 and below 1, else no layer runs; got {self.layerdrop}.")

    def draw_layers(self, config: Any, step: int) -> list[tuple[int, ...]]:
        """The sets of layers of a dynamic model with this `config` that the optimizer step `step` trains."""
        return sample_layers(
            config.num_hidden_layers,
            self.depth_sampling,
            seed=self.seed,
            step=step,
            layerdrop=self.layerdrop,
            layer_selection=config.layer_selection,
            depth_schedule=config.depth_schedule,
        )


@dataclass
class DLDTrainingArguments(LayerDropArguments, CTCTrainingArguments):
    """Arguments of `DLDTrainer`: how the layers are drawn, what the losses weigh, which depths are evaluated."""

    ctc_weight: float = field(default=1.0, metadata={"help": "Weight of the CTC loss, at least 0."})
    kl_weight: float = field(
        default=1.0, metadata={"help": "Weight of the KL to the teacher, at least 0; 0 is plain layer dropping."}
    )
    kl_weight_end: float | None = field(
        default=None,
        metadata={"help": "Weight that kl_weight reaches, linearly, at the last step. Default: it stays the same."},
    )
    kl_temperature: float = field(default=1.0, metadata={"help": "Temperature of both posteriors, above 0."})
    kl_direction: str = field(
        default="forward", metadata={"help": "forward: KL(teacher, student); reverse: KL(student, teacher)."}
    )
    teacher_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the teacher's posteriors of the training set: computed once, before the first step, "
            "and used again by every run with the same teacher and audio. Default: the teacher runs in every step."
        },
    )
    teacher_cache_top: int = field(
        default=8,
        metadata={"help": "Tokens of each frame that the cache keeps, at least 1; all others become one probability."},
    )
    teacher_cache_dtype: str = field(
        default="float16",
        metadata={
            "help": "float16 or float32, of the cached log-probabilities. In float32 and with all tokens kept, "
            "training is what it is with the teacher itself."
        },
    )
    batch_norm: str | None = field(
        default=None,
        metadata={
            "help": "Conformer only. frozen: batch normalisation uses the running statistics that the student starts "
            "with; updated: statistics of each process's batch, running statistics gathered over all depths; "
            "synchronized: the same over the batches of all processes, on accelerators only. Default: frozen, and "
            "updated for a student that has no statistics yet, one from scratch."
        },
    )
    batch_norm_freeze_at: float = field(
        default=1.0,
        metadata={
            "help": "For updated and synchronized: the share of the steps after which the running statistics, as they "
            "are by then, are frozen, above 0. Default: 1, never."
        },
    )
    eval_depths: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers of active layers to evaluate (eval_wer_6, ...). Default: a third, two, all."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kl_direction", self.kl_direction, KL_DIRECTIONS)
        if self.batch_norm is not None:
            check_choice("batch_norm", self.batch_norm, BATCH_NORM_POLICIES)
        if not 0 < self.batch_norm_freeze_at <= 1:
            raise ValueError(
                f"batch_norm_freeze_at must be above 0 and at most 1, a share of the steps; got "
                f"{self.batch_norm_freeze_at}."
            )
        check_choice("teacher_cache_dtype", self.teacher_cache_dtype, CACHE_DTYPES)
        for name in ("ctc_weight", "kl_weight", "kl_weight_end"):
            weight = getattr(self, name)
            if weight is not None and weight < 0:
                raise ValueError(f"{name} must be at least 0, since a loss is minimised; got {weight}.")
        if self.teacher_cache_top < 1:
            raise ValueError(
                f"teacher_cache_top must be at least 1, since the cache keeps the most probable tokens; got "
                f"{self.teacher_cache_top}."
            )
        if self.kl_temperature <= 0:
            raise ValueError(
                f"kl_temperature must be above 0, for logits are divided by it; got {self.kl_temperature}."
            )


@dataclass
class CoLLDTrainingArguments(LayerDropArguments):
    """Arguments of `CoLLDTrainer`: what the student predicts, by which objective, and what it does not hear.

    `depth_sampling` and `layerdrop` count for a dynamic student only.
    """

    objective: str = field(
        default="info_nce", metadata={"help": "info_nce (contrastive) or l1_cosine (regression, the control)."}
    )
    contrastive_temperature: float = field(
        default=0.1, metadata={"help": "For info_nce: cosine similarities are divided by it, above 0."}
    )
    num_negatives: int = field(
        default=100,
        metadata={"help": "For info_nce: negatives for each frame, other masked frames of its utterance, at least 1."},
    )
    distill_target: str = field(
        default="ffn",
        metadata={"help": "What the student predicts: ffn, the teacher layer's feed-forward output, or hidden."},
    )
    num_distilled_layers: int | None = field(
        default=None,
        metadata={"help": "Student layers that predict, evenly spaced, the last among them. Default: all."},
    )
    mask_time_prob: float = field(
        default=0.65,
        metadata={"help": "Masked share of the student's frames if no two spans overlapped (they do), 0 < p <= 1."},
    )
    mask_time_length: int = field(default=10, metadata={"help": "Frames of a masked span, at least 1."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective", self.objective, COLLD_OBJECTIVES)
        check_choice("distill_target", self.distill_target, TARGETS)
        if self.contrastive_temperature <= 0:
            raise ValueError(
                "contrastive_temperature must be above 0, for similarities are divided by it; "
                f"got {self.contrastive_temperature}."
            )
        if not 0 < self.mask_time_prob <= 1:
            raise ValueError(
                "mask_time_prob must be above 0, since only masked frames are predicted, and at most 1; "
                f"got {self.mask_time_prob}."
            )
        for name in ("num_negatives", "num_distilled_layers", "mask_time_length"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1; got {count}.")


def load_whole_models() -> None:
    """Have `from_pretrained` load whole models where DeepSpeed's ZeRO-3 is on; training shards them all the same.

    In parts it cannot load a weight-normed convolution, which every one of these models has.
    """
    unset_hf_deepspeed_config()


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise `ValueError` unless the value of the argument `name` is among the `allowed` ones."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}; got {value!r}.")
