"""Compress a speech encoder by CoLLD-style layer-to-layer distillation, on speech that needs no transcripts.

    python examples/run_colld.py examples/colld_quickstart.yaml
    python examples/run_colld.py --teacher my_wavlm --num_hidden_layers 6 --dataset my_corpus --output_dir outputs/small

Makes a student of some of the teacher's layers (or takes a given one), trains it to copy the teacher layer by layer,
and saves it as a stock Transformers encoder with its feature extractor and a card, to be fine-tuned with any head. An
interrupted run goes on where it was when the same command is repeated.
"""

import logging
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, HfArgumentParser, set_seed

import hf_dld
from hf_dld.data import load_speech_dataset, prepare_dataset
from hf_dld.deploy import create_repository, push_to_hub
from hf_dld.deploy.colld_card import colld_card
from hf_dld.distill.checkpoints import claim_output_dir, describe_run, last_complete_checkpoint
from hf_dld.distill.layer_features import map_layers
from hf_dld.distill.student import choose_layers, save_student
from hf_dld.whole_files import whole_file

logger = logging.getLogger("run_colld")


@dataclass
class ModelArguments:
    teacher: str = field(metadata={"help": "Speech encoder that teaches, with or without a head."})
    student: str | None = field(
        default=None, metadata={"help": "Checkpoint that the student starts from. Default: layers of the teacher."}
    )
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "The student's layers, evenly spaced ones. Default: half of the teacher's."}
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "0-based teacher layers that the student starts from. Default: evenly spaced."}
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "The student's width; another one than the teacher's means fresh weights."}
    )
    freeze_feature_encoder: bool = field(default=False, metadata={"help": "Keep the student's feature encoder as is."})

    def __post_init__(self) -> None:
        if self.student is not None and (self.num_hidden_layers or self.layers or self.hidden_size):
            raise ValueError(
                "Give either student (a checkpoint) or num_hidden_layers, layers and hidden_size (to make one from "
                f"the teacher); got student={self.student!r} and others."
            )


@dataclass
class DataArguments:
    dataset: str = field(metadata={"help": "Hub id, folder with metadata.csv files, or CSV/JSON manifest."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default="validation", metadata={"help": "Split that the loss is measured on, or 'none'."}
    )
    audio_column: str | None = field(default=None, metadata={"help": "Default: found among the usual names."})
    audio_root: str | None = field(
        default=None, metadata={"help": "Folder that audio paths may not leave; default: that of the file with them."}
    )
    min_duration_s: float = field(default=1.0, metadata={"help": "Shorter utterances are left out."})
    max_duration_s: float = field(default=30.0, metadata={"help": "Longer utterances are left out."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that decode the corpus."})

    def __post_init__(self) -> None:
        self.eval_split = None if self.eval_split == "none" else self.eval_split


def parse_arguments() -> tuple[ModelArguments, DataArguments, hf_dld.CoLLDTrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, hf_dld.CoLLDTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(sys.argv[1])
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def check_models(model_args: ModelArguments, args: hf_dld.CoLLDTrainingArguments) -> None:
    """Fail before any audio is read if a checkpoint is missing or a number of layers is impossible."""
    for name in filter(None, (model_args.teacher, model_args.student)):
        if name.count("/") > 1 or name.startswith((".", "/", "~", "outputs/")):  # a Hub id is "name" or "owner/name"
            if not (Path(name) / "config.json").exists():
                hint = ": `make quickstart` trains it" if name == "outputs/quickstart/teacher" else ""
                raise FileNotFoundError(f"{name} is no folder with a checkpoint{hint}.")
    total = AutoConfig.from_pretrained(model_args.teacher).num_hidden_layers
    if model_args.student is None:
        if model_args.num_hidden_layers is None and model_args.layers is None:
            model_args.num_hidden_layers = max(total // 2, 1)
        num_layers = len(choose_layers(model_args.num_hidden_layers, model_args.layers, total))
    else:
        num_layers = AutoConfig.from_pretrained(model_args.student).num_hidden_layers
    map_layers(num_layers, total, args.num_distilled_layers)


def load_splits(data_args: DataArguments, extractor: Any) -> dict[str, Any]:
    splits = {}
    for role, split in (("train", data_args.train_split), ("eval", data_args.eval_split)):
        if split is None:
            splits[role] = None
            continue
        speech = load_speech_dataset(
            data_args.dataset,
            data_args.dataset_config,
            split,
            audio_column=data_args.audio_column,
            audio_root=data_args.audio_root,
            transcribed=False,
        )
        splits[role], report = prepare_dataset(
            speech,
            extractor,
            lambda samples: samples,  # there is no transcript that would have to fit
            min_duration_s=data_args.min_duration_s,
            max_duration_s=data_args.max_duration_s,
            keep_untranscribed=True,
            num_proc=data_args.num_proc,
        )
        logger.info("%s: %d utterances, %d left out", role, report.kept, report.total - report.kept)
    return splits


def main() -> None:
    started = time.monotonic()
    model_args, data_args, args = parse_arguments()
    check_models(model_args, args)
    claim_output_dir(args.output_dir, describe_run(args, model=model_args, data=data_args))
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    transformers.utils.logging.set_verbosity_warning()
    datasets.utils.logging.set_verbosity_warning()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    set_seed(args.seed)

    repo_id = None
    if args.push_to_hub and args.process_index == 0:
        # before the training: a wrong token or name should cost seconds
        name = args.hub_model_id or Path(args.output_dir).name
        repo_id = create_repository(name, private=args.hub_private_repo, token=args.hub_token)
    teacher = AutoModel.from_pretrained(model_args.teacher)
    teacher_extractor = AutoFeatureExtractor.from_pretrained(model_args.teacher)
    if model_args.student is None:
        student, extractor = (
            hf_dld.make_student(teacher, model_args.num_hidden_layers, model_args.layers, model_args.hidden_size),
            teacher_extractor,
        )
    else:
        student = AutoModel.from_pretrained(model_args.student, dtype=torch.float32)  # less loses small updates
        extractor = AutoFeatureExtractor.from_pretrained(model_args.student)
    if model_args.freeze_feature_encoder:
        if not hasattr(student, "feature_extractor"):
            raise ValueError(f"freeze_feature_encoder: a {student.config.model_type} model has no feature encoder.")
        student.feature_extractor.requires_grad_(False)

    with args.main_process_first():
        splits = load_splits(data_args, extractor)
    trainer = hf_dld.CoLLDTrainer(
        model=student,
        teacher=teacher,
        # what goes to the Hub is what comes out at the end, not the checkpoints
        args=replace(args, output_dir=f"{args.output_dir}/checkpoints", push_to_hub=False),
        train_dataset=splits["train"],
        eval_dataset=splits["eval"],
        data_collator=hf_dld.DataCollatorCoLLD(extractor, teacher_extractor),
        processing_class=extractor,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
    eval_loss = trainer.evaluate()["eval_loss"] if splits["eval"] is not None else None
    logger.info("Student ready after %.0f s", time.monotonic() - started)

    if trainer.is_world_process_zero():
        save_student(args.output_dir, trainer.student, extractor)
        steps = trainer.state.global_step
        card = colld_card(
            trainer.student, teacher, model_args.teacher, data_args.dataset, args, trainer.layer_map, steps, eval_loss
        )
        with whole_file(Path(args.output_dir) / "README.md") as beside:
            card.save(beside)
        sizes = [f"{model.num_parameters() / 1e6:.2f} M" for model in (teacher, trainer.student)]
        print(f"teacher: {sizes[0]} parameters, student: {sizes[1]}, loss on held-out speech: {eval_loss}")
        if args.push_to_hub:
            message = "Upload a distilled speech encoder"
            options = {"token": args.hub_token, "revision": args.hub_revision, "commit_message": message}
            commit = push_to_hub(args.output_dir, repo_id, **options)
            print(commit.commit_url)
        logger.info("Done in %.0f s: %s", time.monotonic() - started, args.output_dir)


if __name__ == "__main__":
    main()
