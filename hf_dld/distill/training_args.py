"""Arguments of the trainers: Transformers' own, with defaults that suit CTC, and those of DLD."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..models.depth import DEPTH_SAMPLINGS
from .losses import KL_DIRECTIONS

BATCH_NORM_POLICIES = ("frozen", "updated")


@dataclass
class CTCTrainingArguments(TrainingArguments):
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
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "The label column."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # each process collates its own share of a stream: joined batches would have to be padded alike
            self.accelerator_config.dispatch_batches = False


@dataclass
class DLDTrainingArguments(CTCTrainingArguments):
    """Arguments of `DLDTrainer`: how the layers are drawn, what the losses weigh, which depths are evaluated."""

    depth_sampling: str = field(
        default="selection",
        metadata={
            "help": "How a step draws its layers: bernoulli (the paper), uniform (any count, any layers), selection "
            "(any count, the layers that inference would use for it), sandwich (full depth and one drawn depth)."
        },
    )
    layerdrop: float = field(
        default=0.5, metadata={"help": "For bernoulli: the probability that a layer is skipped, 0 <= p < 1."}
    )
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
    batch_norm: str = field(
        default="frozen",
        metadata={
            "help": "Conformer only. frozen: batch normalisation uses the running statistics that the student starts "
            "with; updated: statistics of the batch, running statistics gathered over all depths."
        },
    )
    eval_depths: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers of active layers to evaluate (eval_wer_6, ...). Default: a third, two, all."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Stays on: the parameters of skipped layers take no part in a step."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("depth_sampling", DEPTH_SAMPLINGS),
            ("kl_direction", KL_DIRECTIONS),
            ("batch_norm", BATCH_NORM_POLICIES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}.")
        if not 0 <= self.layerdrop < 1:
            raise ValueError(f"layerdrop must be at least 0 and below 1, else no layer runs; got {self.layerdrop}.")
        for name in ("ctc_weight", "kl_weight", "kl_weight_end"):
            weight = getattr(self, name)
            if weight is not None and weight < 0:
                raise ValueError(f"{name} must be at least 0, since a loss is minimised; got {weight}.")
        if self.kl_temperature <= 0:
            raise ValueError(
                f"kl_temperature must be above 0, for logits are divided by it; got {self.kl_temperature}."
            )
