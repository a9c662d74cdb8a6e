"""Train a dynamic speech recogniser by distillation-based layer dropping (DLD), from a corpus to a checkpoint.

    python examples/run_dld_ctc.py examples/quickstart.yaml
    python examples/run_dld_ctc.py --dataset my_corpus --teacher my_finetuned_wavlm --output_dir outputs/mine
    python examples/run_dld_ctc.py --dataset my_corpus --student my_wavlm_ctc --output_dir outputs/mine --lora_r 16
    python examples/run_dld_ctc.py --dataset my_corpus --student my_wavlm --output_dir outputs/mine --kl_weight 0

Takes a teacher or trains one first (--train_teacher), makes the student, trains it with DLD, evaluates every depth and
saves a directory that `pipeline("automatic-speech-recognition")` loads, with a table and a plot of WER against active
layers. With --kl_weight 0 there need not be a teacher: the student, which may be a pre-trained encoder without a head,
learns every depth from the transcripts alone (layer dropping). With --lora_r, adapters alone are trained, taught by the
weights under them; OUTPUT_DIR/adapter keeps them, and OUTPUT_DIR is the merged model. An interrupted run goes on where
it was when the same command is repeated.

With several processes (docs/distributed.md):

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/run_dld_ctc.py ...
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from peft import get_peft_model
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCTC, HfArgumentParser, pipeline, set_seed

import hf_dld
from hf_dld.data import FilterReport, load_processor, load_speech_dataset, prepare_dataset, training_stream
from hf_dld.data.datasets import public_name
from hf_dld.deploy import create_repository, push_to_hub, write_model_card
from hf_dld.deploy.model_card import CARD_FILE, check_facts, is_own_card
from hf_dld.distill.checkpoints import claim_output_dir, describe_run, last_complete_checkpoint, save_whole
from hf_dld.evaluation import DepthReport, asr_metrics, compare_markdown, evaluate_depths, plot_depths
from hf_dld.models import DYNAMIC_CLASSES
from hf_dld.models.depth import DEPTH_SAMPLINGS, check_num_active_layers
from hf_dld.whole_files import write_whole_text

logger = logging.getLogger("run_dld_ctc")


@dataclass
class ModelArguments:
    teacher: str | None = field(default=None, metadata={"help": "CTC checkpoint that teaches, 'self' or 'base'."})
    train_teacher: bool = field(
        default=False, metadata={"help": "Train a teacher first, from teacher_start or from model_config."}
    )
    teacher_start: str | None = field(
        default=None, metadata={"help": "Pre-trained WavLM or Conformer, without a head, to fine-tune as the teacher."}
    )
    teacher_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    teacher_epochs: float | None = field(default=None, metadata={"help": "Default: num_train_epochs."})
    teacher_depth_sampling: str | None = field(
        default=None,
        metadata={
            "help": "Drop layers while the teacher is trained too, drawn so (see depth_sampling). docs/method.md says "
            "where that makes a better teacher, and where a worse one. Default: all layers, always."
        },
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={"help": "Precision in which the teacher teaches, such as bfloat16. Default: as it was saved."},
    )
    student: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint that the student starts from, with or without a head, or 'config'. Default: teacher."
        },
    )
    model_config: dict | str | None = field(
        default=None, metadata={"help": "What is trained from scratch: a JSON object with model_type, or a JSON file."}
    )
    freeze_feature_encoder: bool = field(
        default=False,
        metadata={"help": "Keep the student's feature encoder as is, and that of a teacher with teacher_start."},
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": "Train LoRA adapters of this rank; teacher defaults to 'base', the weights under them."},
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "Their scale times lora_r. Default: 2 lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on their input, 0 <= p < 1."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the modules they adapt. Default: the attention's projections."}
    )

    def __post_init__(self) -> None:
        self.settle_lora()
        if self.train_teacher and self.teacher is not None or not (self.has_teacher or self.student):
            raise ValueError(
                "Give one of teacher (a CTC checkpoint, or 'self'), train_teacher, or, with kl_weight 0, student; "
                f"got teacher={self.teacher!r}, train_teacher={self.train_teacher} and student={self.student!r}."
            )
        if isinstance(self.model_config, str):
            text = self.model_config
            self.model_config = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
        if self.teacher_start is not None and not self.train_teacher:
            raise ValueError(
                f"teacher_start={self.teacher_start!r} is what train_teacher fine-tunes: give train_teacher too, or "
                "give the checkpoint as teacher if it was fine-tuned already."
            )
        if self.teacher_depth_sampling is not None and not self.train_teacher:
            raise ValueError(
                f"teacher_depth_sampling is {self.teacher_depth_sampling!r}, but no teacher is trained: give "
                "train_teacher."
            )
        if self.teacher_depth_sampling not in (None, *DEPTH_SAMPLINGS):
            raise ValueError(
                f"teacher_depth_sampling must be one of {', '.join(DEPTH_SAMPLINGS)}; got "
                f"{self.teacher_depth_sampling!r}."
            )
        if self.architecture == "config" and (self.model_config or {}).get("model_type") not in DYNAMIC_CLASSES:
            raise ValueError(
                "Training from scratch needs model_config with a model_type, one of "
                f"{sorted(DYNAMIC_CLASSES)}; got {self.model_config!r}."
            )
        if self.teacher_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"teacher_dtype must be float32, bfloat16 or float16; got {self.teacher_dtype!r}.")
        if self.teacher_dtype is not None and not self.has_teacher:
            raise ValueError(f"teacher_dtype is {self.teacher_dtype}, but there is no teacher.")
        if self.teacher_dtype is not None and self.teacher in ("self", "base"):
            raise ValueError(
                f"teacher_dtype is {self.teacher_dtype}, but teacher {self.teacher!r} is the student itself: a "
                "precision for both is what bf16 or fp16 ask for."
            )
        if self.teacher in ("self", "base") and self.student is None:
            raise ValueError(f"With teacher {self.teacher!r} there is no other model to start from: give student.")

    @property
    def has_teacher(self) -> bool:
        return self.train_teacher or self.teacher is not None

    @property
    def architecture(self) -> str:
        """The checkpoint whose configuration the student has, or 'config' for model_config."""
        return self.student or self.teacher or self.teacher_start or "config"

    def settle_lora(self) -> None:
        """What the student and the teacher are where adapters are trained, if that was left open."""
        if self.lora_r is None:
            if self.teacher == "base" or self.lora_alpha or self.lora_dropout or self.lora_target_modules:
                raise ValueError(
                    "teacher 'base' and the other lora_ options are about LoRA adapters: give lora_r, their rank."
                )
            return
        if self.train_teacher or self.student == "config":
            raise ValueError(
                "lora_r adapts a model that is trained already: give it as student or teacher, and neither "
                f"train_teacher nor student 'config'; got train_teacher={self.train_teacher} and "
                f"student={self.student!r}."
            )
        if self.student is None and self.teacher not in ("self", "base"):
            self.student = self.teacher
        if self.student is not None and self.teacher in (None, self.student):
            self.teacher = "base"  # the same weights, but held once


@dataclass
class DataArguments:
    dataset: str = field(metadata={"help": "Hub id, folder with metadata.csv files, or CSV/JSON manifest."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split that is evaluated while training."})
    test_split: str = field(default="test", metadata={"help": "Split of the final table."})
    text_column: str | None = field(default=None, metadata={"help": "Default: found among the usual names."})
    audio_column: str | None = field(default=None, metadata={"help": "Default: found among the usual names."})
    audio_root: str | None = field(
        default=None, metadata={"help": "Folder that audio paths may not leave; default: that of the file with them."}
    )
    min_duration_s: float = field(default=0.25, metadata={"help": "Shorter utterances are left out."})
    max_duration_s: float = field(default=30.0, metadata={"help": "Longer utterances are left out."})
    keep_untranscribed: bool = field(default=False, metadata={"help": "Train by KL on speech without transcripts."})
    vocabulary: str = field(default="characters", metadata={"help": "Of a new head: characters, bpe or unigram."})
    vocab_size: int = field(default=256, metadata={"help": "For bpe and unigram."})
    sampling_rate_hz: int = field(default=16_000, metadata={"help": "From scratch: the rate the model hears."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that decode the corpus."})
    decode_once: bool = field(
        default=False,
        metadata={"help": "Keep decoded audio in the datasets cache (230 MB an hour), for small corpora, many epochs."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training split as it goes, for max_steps; batches are not grouped by length."},
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "With streaming: an utterance is drawn from so many that are held."}
    )

    def __post_init__(self) -> None:
        if self.vocabulary not in ("characters", "bpe", "unigram"):
            raise ValueError(f"vocabulary must be 'characters', 'bpe' or 'unigram'; got {self.vocabulary!r}.")
        if self.shuffle_buffer_size < 1:
            raise ValueError(f"shuffle_buffer_size must be at least 1 utterance; got {self.shuffle_buffer_size}.")
        if self.decode_once and self.streaming:
            raise ValueError("decode_once keeps decoded audio on disk, and streaming keeps nothing: choose one.")


@dataclass
class CardArguments:
    """What the model card cannot read anywhere; left out, it is said to be unknown."""

    language: str | None = field(default=None, metadata={"help": "ISO 639 code of the speech, such as en."})
    license: str | None = field(default=None, metadata={"help": "The model's licence, as the Hub names it: cc-by-4.0."})
    dataset_license: str | None = field(default=None, metadata={"help": "Licence of the dataset, in words."})
    base_model: str | None = field(
        default=None,
        metadata={"help": "Hub id of the model that it started from. Default: the student's or teacher's."},
    )

    def __post_init__(self) -> None:
        check_facts(self.language, [self.base_model])


def parse_arguments() -> tuple[ModelArguments, DataArguments, CardArguments, hf_dld.DLDTrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, CardArguments, hf_dld.DLDTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(sys.argv[1])
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def check_depths(model_args: ModelArguments, args: hf_dld.DLDTrainingArguments) -> None:
    """Fail before any audio is read if a depth to evaluate is impossible."""
    if model_args.architecture == "config":
        num_layers = model_args.model_config.get("num_hidden_layers", 12)
    else:
        num_layers = AutoConfig.from_pretrained(model_args.architecture).num_hidden_layers
    for depth in args.eval_depths or []:
        check_num_active_layers(depth, num_layers)


def settle_teacher(model_args: ModelArguments, args: hf_dld.DLDTrainingArguments) -> None:
    """Fail before any audio is read if nobody is there to learn from, or who is there has no head."""
    if model_args.teacher == "base" and not has_head(model_args.student):
        if distils(args):
            raise ValueError(
                f"{model_args.student} has no CTC head, so that it cannot teach: give a CTC checkpoint as teacher, or "
                "kl_weight 0 for plain layer dropping."
            )
        model_args.teacher = None
    if distils(args) and not model_args.has_teacher:
        fading = args.kl_weight_end is not None
        weight = f"fades from {args.kl_weight} to {args.kl_weight_end}" if fading else f"is {args.kl_weight}"
        raise ValueError(
            f"kl_weight {weight}, but there is no teacher: give teacher or train_teacher, or kl_weight 0 for plain "
            "layer dropping."
        )


def distils(args: hf_dld.DLDTrainingArguments) -> bool:
    return max(args.kl_weight, args.kl_weight_end or 0.0) > 0


def check_streaming(model_args: ModelArguments, args: hf_dld.DLDTrainingArguments) -> None:
    """Fail before any audio is read if something is asked for that a stream does not have: a length, or an end."""
    if args.max_steps <= 0:
        raise ValueError(
            "streaming needs max_steps, the number of optimizer steps, because a stream has no known length; got "
            f"{args.max_steps}."
        )
    if model_args.teacher_epochs is not None:
        raise ValueError(
            f"teacher_epochs is {model_args.teacher_epochs}, but a stream has no epochs: with streaming, the teacher "
            "is trained for max_steps too."
        )
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise ValueError(f"{name} is 'epoch', but a stream has no epochs: use 'steps' with streaming.")
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy is 'batch_rebalance', which needs all lengths in advance, and a stream has none: "
            "with streaming, use 'random' (drawn from shuffle_buffer_size utterances) or 'sequential'."
        )


def check_lora(model_args: ModelArguments) -> None:
    """Fail before any audio is read if the adapters do not fit the student."""
    if model_args.lora_r is not None:
        model_class = student_class(model_args.student)
        with torch.device("meta"):  # names, no weights
            model = model_class(model_class.config_class.from_pretrained(model_args.student))
        hf_dld.lora_config(model, **lora_options(model_args))


def lora_options(model_args: ModelArguments) -> dict[str, Any]:
    return {
        "r": model_args.lora_r,
        "lora_alpha": model_args.lora_alpha,
        "lora_dropout": model_args.lora_dropout,
        "target_modules": model_args.lora_target_modules,
    }


def load_splits(data_args: DataArguments) -> dict[str, Any]:
    splits = {"train": data_args.train_split, "eval": data_args.eval_split, "test": data_args.test_split}
    return {
        role: load_speech_dataset(
            data_args.dataset,
            data_args.dataset_config,
            split,
            audio_column=data_args.audio_column,
            text_column=data_args.text_column,
            audio_root=data_args.audio_root,
            streaming=data_args.streaming and role == "train",
        )
        for role, split in splits.items()
    }


def make_processor(model_args: ModelArguments, data_args: DataArguments, train: Any) -> Any:
    """The teacher's or student's own processor, or one with a vocabulary from the training transcripts."""
    if model_args.teacher not in (None, "self", "base"):
        return load_processor(model_args.teacher)
    pretrained = model_args.teacher_start
    if model_args.student not in (None, "config"):
        if has_head(model_args.student):
            return load_processor(model_args.student)
        pretrained = model_args.student
    if pretrained is not None:
        heard = AutoFeatureExtractor.from_pretrained(pretrained)
        options = {"sampling_rate_hz": heard.sampling_rate, "do_normalize": heard.do_normalize}
        options["return_attention_mask"] = heard.return_attention_mask
    else:
        # group-norm feature encoders are trained without a mask, as the published ones were
        masked = model_args.model_config.get("feat_extract_norm", "group") == "layer"
        options = {"sampling_rate_hz": data_args.sampling_rate_hz, "return_attention_mask": masked}
    if data_args.vocabulary == "characters":
        return hf_dld.build_character_processor(train["text"], **options)
    return hf_dld.build_subword_processor(train["text"], data_args.vocab_size, data_args.vocabulary, **options)


def frame_counter(model_args: ModelArguments, processor: Any) -> Callable[[int], int]:
    """What says how many frames the student makes of so many samples."""
    if model_args.architecture == "config":
        model = model_from_config({**model_args.model_config, "num_hidden_layers": 1}, processor)
    else:
        model = AutoModelForCTC.from_config(AutoConfig.from_pretrained(model_args.architecture, num_hidden_layers=1))
    return model._get_feat_extract_output_lengths


def stream_training_split(
    data_args: DataArguments,
    args: hf_dld.DLDTrainingArguments,
    train: datasets.IterableDataset,
    processor: Any,
    frames_of: Callable[[int], int],
) -> tuple[datasets.IterableDataset, FilterReport]:
    """The training split as it is read, and the counts of what is left out on the way."""
    in_order = args.train_sampling_strategy == "sequential"
    return training_stream(
        train,
        processor,
        frames_of,
        min_duration_s=data_args.min_duration_s,
        max_duration_s=data_args.max_duration_s,
        keep_untranscribed=data_args.keep_untranscribed,
        shuffle_buffer_size=None if in_order else data_args.shuffle_buffer_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )


def prepare_splits(
    data_args: DataArguments,
    args: hf_dld.DLDTrainingArguments,
    splits: dict[str, Any],
    processor: Any,
    frames_of: Callable[[int], int],
) -> None:
    """Make the splits ready for training and evaluation, in place; a streamed training split is already."""
    with args.main_process_first():
        for role in ("eval", "test") if data_args.streaming else tuple(splits):
            training = role == "train"
            splits[role], report = prepare_dataset(
                splits[role],
                processor,
                frames_of,
                min_duration_s=data_args.min_duration_s,
                max_duration_s=data_args.max_duration_s,
                keep_untranscribed=data_args.keep_untranscribed and training,
                decode_once=data_args.decode_once and training,
                num_proc=data_args.num_proc,
            )
            logger.info("%s: %d utterances, %d left out", role, report.kept, report.total - report.kept)


def model_from_config(model_config: dict[str, Any], processor: Any) -> Any:
    """A dynamic model with random weights."""
    model_class = DYNAMIC_CLASSES[model_config["model_type"]]
    options = {name: value for name, value in model_config.items() if name != "model_type"}
    return model_class(model_class.config_class(**{**options, **vocabulary_of(processor)}))


def has_head(source: str) -> bool:
    """Whether a checkpoint recognises words, and has a vocabulary, rather than being a pre-trained encoder."""
    architectures = AutoConfig.from_pretrained(source).architectures
    return not architectures or any(name.endswith("ForCTC") for name in architectures)


def vocabulary_of(processor: Any) -> dict[str, int]:
    """What a new CTC head has to know of it."""
    return {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}


def untrained_teacher(model_args: ModelArguments, processor: Any) -> Any:
    """The dynamic class at full depth, which computes what the stock class does, faster."""
    if model_args.teacher_start is None:
        return model_from_config(model_args.model_config, processor)
    source = model_args.teacher_start
    model = student_class(source).from_pretrained(source, dtype=torch.float32, **vocabulary_of(processor))
    if model_args.freeze_feature_encoder:
        model.freeze_feature_encoder()
    return model


def train(trainer: Any) -> None:
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))


def make_teacher(
    model_args: ModelArguments, args: Any, processor: Any, splits: dict[str, Any], shared: dict[str, Any]
) -> str | None:
    """The folder or name of the teacher, trained here if it is wanted and not there yet."""
    if not model_args.train_teacher:
        return model_args.teacher
    folder = Path(args.output_dir) / "teacher"
    if (folder / "config.json").exists():
        logger.info("The teacher is trained already: %s", folder)
        return str(folder)
    trainer_class, arguments_class, sampling = hf_dld.CTCTrainer, hf_dld.CTCTrainingArguments, {}
    if model_args.teacher_depth_sampling is not None:
        trainer_class, arguments_class = hf_dld.DLDTrainer, hf_dld.DLDTrainingArguments
        sampling = {"depth_sampling": model_args.teacher_depth_sampling, "kl_weight": 0.0}
        names = ("layerdrop", "batch_norm", "batch_norm_freeze_at")
        sampling |= {name: getattr(args, name) for name in names}
    options = {option.name: getattr(args, option.name) for option in fields(hf_dld.CTCTrainingArguments) if option.init}
    teacher_args = arguments_class(
        **{
            **options,
            **sampling,
            "output_dir": f"{args.output_dir}/teacher_checkpoints",
            "learning_rate": model_args.teacher_learning_rate or args.learning_rate,
            "num_train_epochs": model_args.teacher_epochs or args.num_train_epochs,
            "max_steps": args.max_steps if isinstance(splits["train"], datasets.IterableDataset) else -1,
            "push_to_hub": False,
            "eval_strategy": "no",
            "save_strategy": "steps" if args.save_strategy == "best" else args.save_strategy,
            "save_total_limit": 1,
            "load_best_model_at_end": False,
            "metric_for_best_model": None,
            "greater_is_better": None,
        }
    )
    model = untrained_teacher(model_args, processor)
    transcribed = splits["train"].filter(lambda labels: len(labels) > 0, input_columns="labels")
    trainer = trainer_class(model=model, args=teacher_args, train_dataset=transcribed, **shared)
    train(trainer)
    model = trainer.whole_model()
    if trainer.is_world_process_zero():
        save_whole(folder, model.to_static(), processor)
    trainer.accelerator.wait_for_everyone()
    return str(folder)


def load_teacher(teacher: str, dtype: str | None = None) -> Any:
    """The dynamic class at full depth where there is one, which computes what the stock class does, faster."""
    if teacher in ("self", "base"):
        return teacher
    model_type = AutoConfig.from_pretrained(teacher).model_type
    model = DYNAMIC_CLASSES.get(model_type, AutoModelForCTC).from_pretrained(teacher, dtype=dtype or "auto")
    if model_type in DYNAMIC_CLASSES and not model.config.pruned_layers:
        model.set_active_layers(None)  # whichever of them the checkpoint runs by default
    return model


def student_class(source: str) -> Any:
    model_type = AutoConfig.from_pretrained(source).model_type
    if model_type not in DYNAMIC_CLASSES:
        raise ValueError(f"{source} is a {model_type} model; a student must be one of {sorted(DYNAMIC_CLASSES)}.")
    return DYNAMIC_CLASSES[model_type]


def make_student(model_args: ModelArguments, teacher: str | None, processor: Any) -> Any:
    if model_args.student == "config":
        return model_from_config(model_args.model_config, processor)
    source = model_args.student or teacher
    load = partial(student_class(source).from_pretrained, source, dtype=torch.float32)  # less loses small updates
    student, loading = load(output_loading_info=True)
    new_head = any(name.startswith("lm_head") for name in loading["missing_keys"])
    if new_head:  # which says the teacher's tokens, whatever the encoder was trained to say
        student = load(**vocabulary_of(processor))
    if model_args.lora_r is None:
        return student
    modules_to_save = ["lm_head"] if new_head else None
    return get_peft_model(
        student, hf_dld.lora_config(student, **lora_options(model_args), modules_to_save=modules_to_save)
    )


def report_depths(
    model: Any,
    processor: Any,
    test: Any,
    data_args: DataArguments,
    teacher: str | None,
    args: Any,
    accelerator: Accelerator,
) -> str | None:
    """Evaluate the student, and the teacher merely cut, at every depth; write JSON, a table and a plot.

    All processes share the evaluation; the main one writes, and returns the table.
    """
    output_dir = Path(args.output_dir)

    def evaluate(evaluated: Any, name: str, stem: str) -> DepthReport:
        report = evaluate_depths(
            evaluated,
            test,
            processor,
            name=name,
            batch_size=args.per_device_eval_batch_size,
            cache_dir=output_dir / "depth_report_cache",  # an interrupted evaluation goes on too
            errors_path=output_dir / f"{stem}.errors.npz",
            accelerator=accelerator,
        )
        if accelerator.is_main_process:
            report.dataset, report.dataset_config = public_name(data_args.dataset), data_args.dataset_config
            report.split = data_args.test_split
            report.to_json(output_dir / f"{stem}.json")
        return report

    reports = []
    teacher_type = AutoConfig.from_pretrained(teacher).model_type if teacher not in (None, "self") else None
    if teacher_type in DYNAMIC_CLASSES:
        cut = DYNAMIC_CLASSES[teacher_type].from_pretrained(teacher).to(model.device)
        if cut.config.num_hidden_layers == model.config.num_hidden_layers:
            reports.append(evaluate(cut, "teacher, cut", "teacher_depth_report"))
    reports.append(evaluate(model, "dynamic student", "depth_report"))
    if not accelerator.is_main_process:
        return None
    table = compare_markdown(reports)
    table = f"{table}\ndynamic student:\n\n{reports[-1].to_markdown()}"
    write_whole_text(output_dir / "depth_report.md", table)
    title = f"{reports[-1].utterances} test utterances, {reports[-1].words} words"
    plot_depths(reports, output_dir / "depth_report.png", title)
    return table


def on_hub(source: str | None) -> str | None:
    """The Hub id, unless it names something of this machine or nothing that was loaded."""
    return None if source in (None, "self", "config") or Path(source).exists() else source


def write_card(
    model_args: ModelArguments, data_args: DataArguments, card_args: CardArguments, output_dir: str, name: str | None
) -> None:
    path = Path(output_dir) / CARD_FILE
    if path.exists() and not is_own_card(path):
        logger.info("%s was written by somebody else and stays as it is", path)
        return
    facts = vars(card_args) | {"datasets": on_hub(data_args.dataset)}
    facts["base_model"] = card_args.base_model or on_hub(model_args.architecture)
    write_model_card(output_dir, name, **facts)


def transcribe_once(output_dir: str, test: Any) -> None:
    """Load what was saved, as a user would, and transcribe one utterance at two depths."""
    recogniser = pipeline("automatic-speech-recognition", model=output_dir)
    example = test[0]
    print(f"reference:  {example['text']}")
    num_layers = recogniser.model.config.num_hidden_layers
    for depth in (max(num_layers // 3, 1), num_layers):
        audio = {name: value for name, value in example["audio"].items() if value is not None}
        print(f"{depth:2} layers:  {recogniser(audio, num_active_layers=depth)['text']}")


def main() -> None:
    started = time.monotonic()
    model_args, data_args, card_args, args = parse_arguments()
    check_depths(model_args, args)
    check_lora(model_args)
    settle_teacher(model_args, args)
    if data_args.streaming:
        check_streaming(model_args, args)
    if args.process_index == 0:
        claim_output_dir(args.output_dir, describe_run(args, model=model_args, data=data_args))
    logging.basicConfig(format="%(message)s", level=logging.INFO if args.process_index == 0 else logging.WARNING)
    transformers.utils.logging.set_verbosity_warning()
    datasets.utils.logging.set_verbosity_warning()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    set_seed(args.seed)

    repo_id = None
    if args.push_to_hub and args.process_index == 0:
        # before the training: a wrong token or name should cost seconds
        name = args.hub_model_id or Path(args.output_dir).name
        repo_id = create_repository(name, private=args.hub_private_repo, token=args.hub_token)
    splits = load_splits(data_args)
    processor = make_processor(model_args, data_args, splits["train"])
    frames_of = frame_counter(model_args, processor)
    stream_report = None
    if data_args.streaming:
        splits["train"], stream_report = stream_training_split(data_args, args, splits["train"], processor, frames_of)
    prepare_splits(data_args, args, splits, processor, frames_of)
    shared = {
        "eval_dataset": splits["eval"],
        "data_collator": hf_dld.DataCollatorCTC(processor),
        "processing_class": processor,
        "compute_metrics": asr_metrics(processor.tokenizer),
    }

    teacher = make_teacher(model_args, args, processor, splits, shared)
    if model_args.has_teacher:
        logger.info("Teacher ready after %.0f s", time.monotonic() - started)
    student = make_student(model_args, teacher, processor)
    if model_args.freeze_feature_encoder:
        student.freeze_feature_encoder()
    # what goes to the Hub is what comes out at the end, not the checkpoints
    student_args = replace(args, output_dir=f"{args.output_dir}/checkpoints", push_to_hub=False)
    taught = distils(args) or teacher in ("self", "base")
    if not taught:
        student_args = replace(student_args, teacher_cache_dir=None)
    trainer = hf_dld.DLDTrainer(
        model=student,
        # held by the trainer alone, which lets it go once its posteriors are cached
        teacher=load_teacher(teacher, model_args.teacher_dtype) if taught else None,
        args=student_args,
        train_dataset=splits["train"],
        **shared,
    )
    if model_args.lora_r is not None and trainer.is_sharded:
        raise ValueError(
            "lora_r and a sharded model (FSDP, ZeRO) do not go together here, because the adapters could not be merged "
            "in the end: adapters need little memory, so use examples/accelerate/ddp.yaml."
        )
    train(trainer)
    logger.info("Student ready after %.0f s", time.monotonic() - started)
    if stream_report is not None and args.dataloader_num_workers == 0:  # else the workers have counted, each for itself
        logger.info("What was read of the training stream, repetitions included:\n%s", stream_report)

    model = trainer.whole_model()
    if model_args.lora_r is not None:
        if trainer.is_world_process_zero():
            save_whole(f"{args.output_dir}/adapter", model, processor)
        model = model.merge_and_unload()
    if trainer.is_world_process_zero():
        save_whole(args.output_dir, model, processor)
    if trainer.is_sharded:
        trainer.accelerator.wait_for_everyone()
        model = student_class(args.output_dir).from_pretrained(args.output_dir).to(args.device)
    before = model_args.student if teacher == "base" else teacher
    table = report_depths(model, processor, splits["test"], data_args, before, args, trainer.accelerator)

    if trainer.is_world_process_zero():
        print(table)
        write_card(model_args, data_args, card_args, args.output_dir, repo_id)
        transcribe_once(args.output_dir, splits["test"])
        if args.push_to_hub:
            options = {"private": args.hub_private_repo, "token": args.hub_token, "revision": args.hub_revision}
            commit = push_to_hub(args.output_dir, repo_id, **options)
            print(commit.commit_url)
        logger.info("Done in %.0f s: %s", time.monotonic() - started, args.output_dir)


if __name__ == "__main__":
    main()
