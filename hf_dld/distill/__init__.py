"""Training: the losses, the frozen teacher and the trainers."""

from .ctc_trainer import CTCTrainer
from .dld_trainer import DLDTrainer
from .lora import lora_config
from .losses import ctc_loss, kl_loss
from .training_args import CTCTrainingArguments, DLDTrainingArguments

__all__ = [
    "CTCTrainer",
    "CTCTrainingArguments",
    "DLDTrainer",
    "DLDTrainingArguments",
    "ctc_loss",
    "kl_loss",
    "lora_config",
]
