"""Training: the losses, the frozen teacher, students, and the trainers."""

from .colld_trainer import CoLLDTrainer
from .ctc_trainer import CTCTrainer
from .dld_trainer import DLDTrainer
from .faults import NonFiniteLossError, TrainingStopped
from .lora import lora_config
from .losses import ctc_loss, info_nce_loss, kl_loss, l1_cosine_loss
from .student import make_student, save_student
from .training_args import CoLLDTrainingArguments, CTCTrainingArguments, DLDTrainingArguments

__all__ = [
    "CTCTrainer",
    "CTCTrainingArguments",
    "CoLLDTrainer",
    "CoLLDTrainingArguments",
    "DLDTrainer",
    "DLDTrainingArguments",
    "NonFiniteLossError",
    "TrainingStopped",
    "ctc_loss",
    "info_nce_loss",
    "kl_loss",
    "l1_cosine_loss",
    "lora_config",
    "make_student",
    "save_student",
]
