"""Trainings that must end with the same weights in one process and in several; `test_distributed.py` compares them.

    accelerate launch --config_file examples/accelerate/ddp.yaml -m distill.distributed_runs FOLDER [NAME ...]

runs them and writes what came out of each to FOLDER, from the main process.
"""

import gc
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import gather_object
from conftest import VOCAB_SIZE, make_dynamic, make_stock
from peft import PeftModel, get_peft_model
from torch.distributed.tensor import DTensor

from hf_dld import (
    CoLLDTrainer,
    CoLLDTrainingArguments,
    DataCollatorCoLLD,
    DataCollatorCTC,
    DLDTrainer,
    DLDTrainingArguments,
    build_character_processor,
    evaluate_depths,
)
from hf_dld.data.audio import encode_wav
from hf_dld.distill import lora_config
from hf_dld.evaluation.metrics import asr_metrics

NO_DROPOUT = {
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "conformer_conv_dropout": 0.0,
    "mask_time_prob": 0.0,
}
GLOBAL_BATCH = 4
PROCESSOR = build_character_processor(["abcdefghi"])
TRAINING = {
    "per_device_eval_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-3,  # else AdamW makes a whole step of what rounding leaves of a zero gradient
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
    "use_cpu": True,
}
RUNS: dict[str, dict[str, Any]] = {
    "wavlm": {"depth_sampling": "bernoulli", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "sandwich": {
        "variant": "wavlm", "depth_sampling": "sandwich", "freeze_feature_encoder": True, "dataloader_drop_last": True,
        "utterances": 15,
    },
    "self": {"teacher": "self", "train_sampling_strategy": "random"},
    "lora": {"teacher": "base"},
    "conformer": {"variant": "conformer-relative", "depth_sampling": "bernoulli"},
    "conformer, checkpointing": {
        "variant": "conformer-rotary", "gradient_checkpointing": True, "gradient_accumulation_steps": 2,
    },
    # last: Accelerate remembers FSDP in the environment
    "fsdp, wavlm": {"fsdp": True, "depth_sampling": "bernoulli", "gradient_accumulation_steps": 2},
    "fsdp, conformer": {"fsdp": True, "variant": "conformer-relative", "gradient_checkpointing": True},
}  # fmt: skip


class ShardingOnCPU(DLDTrainer):
    """Accelerate shards on accelerators alone, and does DDP on a CPU without a word; here it takes the CPU for one."""

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.world_size > 1:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def make_utterances(count: int, padded: bool) -> datasets.Dataset:
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        samples = generator.standard_normal(4000 + 300 * index if padded else 4000).astype(np.float32)
        labels = generator.integers(3, VOCAB_SIZE, 3).tolist()
        audio = {"bytes": encode_wav(samples, 16_000), "path": None}
        rows.append({"audio": audio, "labels": labels, "input_length": len(samples)})
    return datasets.Dataset.from_list(rows)


def make_trainer(
    folder: Path,
    num_processes: int,
    *,
    variant: str = "wavlm-stable",
    teacher: Any = "stock",
    utterances: int = 12,
    freeze_feature_encoder: bool = False,
    gradient_accumulation_steps: int = 1,
    fsdp: bool = False,
    **options: Any,
) -> DLDTrainer:
    student = make_dynamic(variant, **NO_DROPOUT)
    if freeze_feature_encoder:
        student.freeze_feature_encoder()
    if teacher == "stock":
        teacher = make_stock(variant, **NO_DROPOUT)
        with torch.no_grad():
            teacher.lm_head.weight.mul_(1.5)
    if teacher == "base":
        torch.manual_seed(0)
        student = get_peft_model(student, lora_config(student, r=2))
    if fsdp and num_processes > 1:
        options |= {"fsdp": True, "fsdp_config": {}}
    return (ShardingOnCPU if fsdp else DLDTrainer)(
        model=student,
        teacher=teacher,
        args=DLDTrainingArguments(
            **{
                "output_dir": str(folder),
                "per_device_train_batch_size": GLOBAL_BATCH // gradient_accumulation_steps // num_processes,
                "gradient_accumulation_steps": gradient_accumulation_steps,
                "eval_depths": [2],
            }
            | TRAINING
            | options
        ),
        # what most models make of an utterance depends on its padding, and so on the others in its micro-batch
        train_dataset=make_utterances(utterances, padded=variant == "wavlm-stable"),
        eval_dataset=make_utterances(13, padded=True),
        data_collator=DataCollatorCTC(PROCESSOR),
        processing_class=PROCESSOR,
        compute_metrics=asr_metrics(PROCESSOR.tokenizer),
    )


def run(name: str, folder: Path, num_processes: int) -> dict[str, Any]:
    trainer = make_trainer(folder / name, num_processes, **RUNS[name])
    model = trainer.unwrapped_model
    layers = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model.encoder.layers
    calls = [0] * len(layers)
    for index, layer in enumerate(layers):

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        layer.register_forward_pre_hook(count)
    trainer.train()
    result = {
        "calls": list(calls),
        "sharded": any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
        "weights": trainer.accelerator.get_state_dict(trainer.model),
        "logs": [
            {term: log[term] for term in ("loss", "ctc_loss", "kl_loss", "num_active_layers")}
            for log in trainer.state.log_history
            if "loss" in log
        ],
        "metrics": {name: value for name, value in trainer.evaluate().items() if "wer" in name or "cer" in name},
        "report": None,
    }
    if name == "conformer":
        options = {"depths": [1, 3], "batch_size": 4, "timed_utterances": 0, "cache_dir": folder / "cache"}
        for _ in range(2):  # the second time from what was kept
            report = evaluate_depths(model, trainer.eval_dataset, PROCESSOR, accelerator=trainer.accelerator, **options)
        result["report"] = asdict(report)
    return result


def run_colld(folder: Path, num_processes: int) -> dict[str, Any]:
    """Layer-to-layer distillation of a dynamic student, whose layers are dropped."""
    utterances = make_utterances(12, padded=True)
    torch.manual_seed(0)  # the heads
    trainer = CoLLDTrainer(
        model=make_dynamic("wavlm-stable", **{**NO_DROPOUT, "mask_time_prob": 0.05}).base_model,
        teacher=make_stock("wavlm-stable", **NO_DROPOUT).base_model,
        args=CoLLDTrainingArguments(
            str(folder / "colld"),
            per_device_train_batch_size=GLOBAL_BATCH // num_processes,
            depth_sampling="uniform",
            mask_time_length=4,
            **TRAINING,
        ),
        train_dataset=utterances,
        eval_dataset=utterances,
        data_collator=DataCollatorCoLLD(PROCESSOR.feature_extractor),
    )
    trainer.train()
    return {
        "weights": trainer.accelerator.get_state_dict(trainer.model),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "eval_loss": trainer.evaluate()["eval_loss"],
    }


class TellingTrainer(CoLLDTrainer):
    """Keeps what each process brings to a log, beside what is logged."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.brought = []

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mine = {name: (float(total), self.term_counts[name]) for name, total in self.term_sums.items()}
        self.brought.append(gather_object([mine]))
        super().log(logs, start_time)


def run_stock_colld(folder: Path, num_processes: int) -> dict[str, Any]:
    """Layer-to-layer distillation of a stock student, whose own LayerDrop each process draws for itself."""
    student = {**NO_DROPOUT, "mask_time_prob": 0.05, "hidden_dropout": 0.1, "layerdrop": 0.5}
    trainer = TellingTrainer(
        model=make_stock("wavlm-stable", **student).base_model,
        teacher=make_stock("wavlm-stable", **NO_DROPOUT).base_model,
        args=CoLLDTrainingArguments(
            str(folder / "stock colld"),
            per_device_train_batch_size=GLOBAL_BATCH // num_processes,
            mask_time_length=4,
            **TRAINING,
        ),
        train_dataset=make_utterances(12, padded=True),
        data_collator=DataCollatorCoLLD(PROCESSOR.feature_extractor),
    )
    trainer.train()
    return {"brought": trainer.brought, "logs": trainer.state.log_history}


COLLD_RUNS = {"colld": run_colld, "stock colld": run_stock_colld}


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    torch.set_num_threads(1)
    gc.freeze()
    for name in sys.argv[2:] or [*COLLD_RUNS, *RUNS]:
        num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        result = COLLD_RUNS[name](folder, num_processes) if name in COLLD_RUNS else run(name, folder, num_processes)
        if rank == "0":
            torch.save(result, folder / f"{name}.pt")


if __name__ == "__main__":
    main()
