"""DLD, distillation-based layer dropping (arXiv 2601.16117), as a Trainer."""

from numbers import Number
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import ModelOutput, logging

from ..data.collator import on_model
from ..models.depth import check_num_active_layers
from ..models.modeling_dld import check_dynamic
from .batch_norm import FreezeBatchNorm, has_statistics
from .ctc_trainer import CTCTrainer
from .lora import adapters_off, check_base_teacher
from .losses import ctc_loss, kl_loss, truncated_kl_loss
from .posterior_cache import (
    CACHE_DTYPES,
    CachedTeacherCollator,
    PosteriorCache,
    fill_posterior_cache,
    teacher_fingerprint,
)
from .teacher import (
    batched_by,
    check_cacheable,
    check_teacher,
    equal_feature_encoders,
    freeze,
    has_frozen_feature_encoder,
    num_frames,
)
from .training_args import DLDTrainingArguments

logger = logging.get_logger(__name__)

CARD_TAGS = ("hf_dld", "dynamic-depth", "layer-dropping", "ctc")
CARD_ARGUMENTS = (
    "depth_sampling layerdrop ctc_weight kl_weight kl_weight_end kl_temperature kl_direction batch_norm "
    "batch_norm_freeze_at".split()
)


class DLDTrainer(CTCTrainer):
    """Trains one model to work at every depth: layers are skipped at random, a frozen teacher and transcripts teach.

    For an utterance with T valid frames, teacher posteriors p, student posteriors q(A) with active layers A::

        L = ctc_weight * CTC(q(A), y) / |y|  +  kl_weight * tau^2 / T * sum_t sum_v p_tv (log p_tv - log q_tv(A))

    meaned over the utterances of the global batch (arXiv 2601.16117; weights, temperature, direction and masking are
    not published, see `DLDTrainingArguments`). Utterances without a transcript count for the second term alone.

    The layers of a step are a function of (`args.seed`, optimizer step): every process and every accumulated
    micro-batch of a step skip the same ones, and a resumed run draws what the straight run would have drawn.

    With `args.teacher_cache_dir` the teacher runs once over the training set, before the first step, and is let go;
    the KL is then that of its `teacher_cache_top` most probable tokens and the rest (`losses.truncated_kl_loss`).

    Args:
        model: the student, a dynamic model of `hf_dld.models`, or a `PeftModel` around one: then only its adapters
            and `modules_to_save` are trained, and checkpoints hold nothing else. Or leave it out and give `model_init`.
        teacher: a CTC model with the same vocabulary and frame rate, which is frozen; or `"self"`: each step runs the
            full depth and one drawn depth, and the full depth's posteriors, detached, teach the drawn one (the full
            depth is then masked by SpecAugment like the rest of the step); or `"base"`, for a `PeftModel`: the weights
            that it started from, at full depth, in eval mode, with the adapters off. Unlike `"self"`, this teacher
            never moves and takes no dropout and no SpecAugment; unlike another model, it takes no memory. It answers
            with the base model's own CTC head, which must have been trained. Or `None`: plain layer dropping.
        args: `DLDTrainingArguments`.
        kwargs: as in `transformers.Trainer`.

    Raises:
        TypeError: for a student that is no dynamic model with a CTC head.
        ValueError: for a teacher with another vocabulary, blank or frame rate; `"base"` where there are no adapters,
            or training would change what is under them; a weight for a KL without a teacher; an impossible depth in
            `eval_depths`; a student with pruned layers; a cache for no teacher model, or for a training set that is
            streamed.
    """

    args: DLDTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | None = None,
        args: DLDTrainingArguments | None = None,
        teacher: PreTrainedModel | PeftModel | str | None = None,
        **kwargs: Any,
    ):
        args = DLDTrainingArguments() if args is None else args
        if isinstance(teacher, str) and teacher not in ("self", "base"):
            raise ValueError(f'teacher must be a model, "self", "base" or None; got {teacher!r}.')
        for name in ("kl_weight", "kl_weight_end"):
            if teacher is None and getattr(args, name):
                raise ValueError(
                    f"{name} is {getattr(args, name)}, but there is no teacher to compare with: pass teacher=, or "
                    f"{name}=0 for plain layer dropping."
                )
        if args.teacher_cache_dir is not None:
            check_cacheable(teacher, kwargs.get("train_dataset"))
        self.self_teaching, self.base_teaching = teacher == "self", teacher == "base"
        self.teacher = teacher if isinstance(teacher, nn.Module) else None
        if model is not None:
            model = self.prepare_student(model, args)
        super().__init__(model=model, args=args, **kwargs)
        if hasattr(self.model, "freeze_batch_norm") and args.batch_norm_freeze_at < 1:
            self.add_callback(FreezeBatchNorm(args.batch_norm_freeze_at))
        if self.teacher is not None:
            # whole on every device, where the student may be sharded; FSDP would leave it on the CPU
            self.teacher = self.accelerator.prepare_model(freeze(teacher), device_placement=True, evaluation_mode=True)
        self.posterior_cache: PosteriorCache | None = None
        self.evaluated_depth: int | None = None
        self.equal_encoders: bool | None = None

    def prepare_student(
        self, model: PreTrainedModel | PeftModel, args: DLDTrainingArguments
    ) -> PreTrainedModel | PeftModel:
        """Check that the student can be trained so, before any weight is moved, and choose its batch statistics."""
        check_dynamic(model)
        config = model.config
        if config.pruned_layers:
            raise ValueError(
                f"DLD trains every layer, and {config.pruned_layers} of the student were pruned when it was loaded: "
                "load it without prune_inactive_layers, or train it at its one depth with CTCTrainer."
            )
        self.num_layers = config.num_hidden_layers
        self.eval_depths = [check_num_active_layers(depth, self.num_layers) for depth in args.eval_depths or []]
        self.eval_depths = self.eval_depths or sorted({-(-self.num_layers * i // 3) for i in (1, 2, 3)})
        if self.teacher is not None:
            check_teacher(self.teacher, model)
        elif self.base_teaching:
            check_base_teacher(model)
        if not hasattr(model, "freeze_batch_norm"):
            return model
        if args.batch_norm is None:
            # means of 0 and variances of 1 normalise nothing, and a Conformer hardly learns so
            args.batch_norm = "frozen" if has_statistics(model) else "updated"
        if args.batch_norm == "frozen" and args.batch_norm_freeze_at < 1:
            raise ValueError(
                f"batch_norm_freeze_at is {args.batch_norm_freeze_at}, but the statistics are frozen from the start: "
                'choose batch_norm="updated" or leave it out.'
            )
        if args.batch_norm == "frozen":
            model.freeze_batch_norm()
        elif isinstance(model, PeftModel):
            raise ValueError(
                f'batch_norm="{args.batch_norm}" gathers new running statistics in the base model, which a PeftModel '
                'does not save with its adapters: use batch_norm="frozen".'
            )
        elif args.batch_norm == "synchronized":
            if args.device.type in ("cpu", "mps"):
                raise ValueError(
                    f'batch_norm="synchronized" is torch\'s SyncBatchNorm, which does not run on {args.device.type}: '
                    'use "frozen", which needs no synchronization, or "updated".'
                )
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model

    def call_model_init(self, trial: Any = None) -> PreTrainedModel | PeftModel:
        """The student that `model_init` makes, for every trial of a search for hyperparameters."""
        return self.prepare_student(super().call_model_init(trial), self.args)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `transformers.Trainer`, after filling the cache of `args.teacher_cache_dir`."""
        self.equal_encoders = None  # the student's weights may be loaded from a checkpoint
        if self.args.teacher_cache_dir is not None and self.posterior_cache is None:
            self.posterior_cache = self.cache_teacher()
            self.teacher = None  # its memory is the student's now
        return super().train(*args, **kwargs)

    def cache_teacher(self) -> PosteriorCache:
        """The teacher's posteriors of the training set, computed as far as they are not on disk yet.

        Every process computes its share, so that none waits for another longer than a collective operation may.

        Raises:
            ValueError: the feature extractor is not known; an utterance that cannot be decoded.
            OSError: the posteriors cannot be written.
        """
        processor = getattr(self.data_collator, "processor", self.processing_class)
        if not hasattr(processor, "feature_extractor"):
            raise ValueError(
                "teacher_cache_dir needs to know the feature extractor: pass data_collator=DataCollatorCTC(processor), "
                "or the processor as processing_class."
            )
        args, teacher = self.args, self.accelerator.unwrap_model(self.teacher)
        fingerprint = teacher_fingerprint(
            teacher,
            processor,
            top=min(args.teacher_cache_top, teacher.config.vocab_size),
            temperature=args.kl_temperature,
            dtype=args.teacher_cache_dtype,
            mixed_precision=self.accelerator.mixed_precision,
        )
        cache = PosteriorCache(Path(args.teacher_cache_dir) / fingerprint)
        common = batched_by(teacher, processor)
        computed = fill_posterior_cache(
            cache,
            self.train_dataset,
            processor,
            self.run_teacher,
            lambda samples: num_frames(teacher, samples),
            top=args.teacher_cache_top,
            temperature=args.kl_temperature,
            dtype=CACHE_DTYPES[args.teacher_cache_dtype],
            batch_size=1 if common is None else args.per_device_eval_batch_size,
            batched_by=common,
            rank=args.process_index,
            num_processes=args.world_size,
            num_workers=args.dataloader_num_workers,
            progress_bar=not args.disable_tqdm and self.is_local_process_zero(),
        )
        self.accelerator.wait_for_everyone()
        cache.refresh()
        logger.info(f"{cache.folder}: teacher posteriors of {computed} utterances computed here, others were there.")
        return cache

    def get_train_dataloader(self) -> DataLoader:
        """As in `transformers.Trainer`; the batches hold the cached posteriors, see `CachedTeacherCollator`."""
        if self.posterior_cache is None:
            return super().get_train_dataloader()
        collator = self.data_collator
        self.data_collator = CachedTeacherCollator(collator, self.posterior_cache)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator  # evaluation needs no teacher

    def draw_layers(self) -> list[tuple[int, ...]]:
        """The sets of layers that the current optimizer step trains, the full depth last where it is among them."""
        drawn = self.args.draw_layers(self.unwrapped_model.config, self.state.global_step)
        if self.self_teaching:
            drawn.append(tuple(range(self.num_layers)))
        # the full depth last: DDP looks for unused parameters in the graph of the last forward pass
        return sorted(set(drawn), key=len)

    def current_kl_weight(self) -> float:
        """`kl_weight`, or its linear fade to `kl_weight_end` at the present step."""
        if self.args.kl_weight_end is None:
            return self.args.kl_weight
        progress = min(self.state.global_step / max(self.state.max_steps - 1, 1), 1.0)
        return self.args.kl_weight + progress * (self.args.kl_weight_end - self.args.kl_weight)

    def compute_terms(
        self, model: nn.Module, model_inputs: dict[str, Any], frame_lengths: torch.Tensor, labels: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        cached = [model_inputs.pop(name) for name in CachedTeacherCollator.names if name in model_inputs]
        if not model.training:
            logits = model(**model_inputs, num_active_layers=self.evaluated_depth).logits
            return {"loss": ctc_loss(logits, frame_lengths, labels, self.blank_id)}, logits

        layer_sets = self.draw_layers()
        kl_weight = self.current_kl_weight()
        model_inputs = self.share_features(model_inputs)
        teacher_logits = None
        if kl_weight > 0 and not self.self_teaching and not cached:
            # before the student's activations take up memory, and before a gradient hangs on its adapters
            teacher_logits = self.compute_teacher_logits(model_inputs)
        student_logits = [model(**model_inputs, active_layers=layers).logits for layers in layer_sets]
        if kl_weight > 0 and self.self_teaching:
            teacher_logits = student_logits[-1]

        ctc_terms, kl_terms = [], []
        for logits in student_logits:
            ctc_terms.append(ctc_loss(logits, frame_lengths, labels, self.blank_id))
            options = (frame_lengths, self.args.kl_temperature, self.args.kl_direction)
            if cached and kl_weight > 0:
                known_frames = cached[0].shape[1]  # the longest utterance's; the batch may be padded beyond
                kl_terms.append(truncated_kl_loss(logits[:, :known_frames], *cached, *options))
            elif teacher_logits is not None and logits is not teacher_logits:
                kl_terms.append(kl_loss(logits, teacher_logits, *options))
        # each set of layers weighs the same, so that two of them learn at the pace of one
        ctc = torch.stack(ctc_terms).sum(0) / len(layer_sets)
        kl = torch.stack(kl_terms).sum(0) / len(layer_sets) if kl_terms else torch.zeros_like(ctc)
        num_active_layers = torch.full_like(ctc, sum(map(len, layer_sets)) / len(layer_sets))
        loss = self.args.ctc_weight * ctc + kl_weight * kl
        return {"loss": loss, "ctc_loss": ctc, "kl_loss": kl, "num_active_layers": num_active_layers}, logits

    @torch.no_grad()
    def share_features(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        """The features in place of the samples, if the student's feature encoder is frozen and equals the teacher's.

        All passes of the step then use them. SpecAugment and the dropout of the feature projection come after.
        """
        student = self.unwrapped_model
        if self.is_sharded:
            return model_inputs  # a sharded model gathers its weights in its own forward pass only
        if not has_frozen_feature_encoder(student):
            return model_inputs
        if self.equal_encoders is None:
            teacher = self.accelerator.unwrap_model(self.teacher) if self.teacher is not None else student
            self.equal_encoders = equal_feature_encoders(teacher, student)
        if not self.equal_encoders:
            return model_inputs
        name = student.main_input_name
        return model_inputs | {name: student.extract_features(model_inputs[name])}

    @torch.no_grad()
    def compute_teacher_logits(self, model_inputs: dict[str, Any]) -> torch.Tensor:
        """The teacher's logits, (batch, frames, vocab), without gradient."""
        if self.base_teaching:
            with adapters_off(self.unwrapped_model):
                return self.model_wrapped(**model_inputs, active_layers=tuple(range(self.num_layers))).logits
        return self.run_teacher(**model_inputs).logits

    def run_teacher(self, **model_inputs: torch.Tensor) -> ModelOutput:
        """The teacher's output; it may hold its weights in a lower precision than the student, and hears so too."""
        return self.teacher(**on_model(model_inputs, self.teacher))

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluate `args.eval_depths`: `eval_wer_6` is the word error rate with 6 active layers, `eval_wer_mean` the
        mean over these depths. `eval_loss` is that mean too, so that the best checkpoint can be chosen by it. What is
        no number, or not there at every depth, has no mean.

        The predictions that come back are those of the last of the depths.
        """
        metrics: dict[str, float] = {}
        for depth in self.eval_depths:
            self.evaluated_depth = depth
            try:
                output = super().evaluation_loop(
                    dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
                )
            finally:
                self.evaluated_depth = None
            metrics |= {f"{name}_{depth}": value for name, value in output.metrics.items()}
        for name in output.metrics:
            values = [metrics.get(f"{name}_{depth}") for depth in self.eval_depths]
            if all(isinstance(value, Number) for value in values):
                metrics[f"{name}_mean"] = sum(values) / len(values)
        if f"{metric_key_prefix}_loss_mean" in metrics:
            metrics[f"{metric_key_prefix}_loss"] = metrics.pop(f"{metric_key_prefix}_loss_mean")
        return output._replace(metrics=metrics)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """The Trainer's draft with the arguments of DLD added; a card that `hf_dld` wrote stays as it is."""
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        if path.exists():
            present = ModelCard.load(path).data.tags or []
            if "hf_dld" in present and "generated_from_trainer" not in present:
                return
        tags = [*([tags] if isinstance(tags, str) else tags or []), *CARD_TAGS]
        super().create_model_card(language, license, tags, **{"tasks": "automatic-speech-recognition", **kwargs})
        card = ModelCard.load(path)
        card.data.pipeline_tag = "automatic-speech-recognition"
        card.data.metrics = ["wer", "cer"]
        arguments = "\n".join(f"- {name}: {getattr(self.args, name)}" for name in CARD_ARGUMENTS)
        card.text += (
            f"\n### Layer dropping\n\nThe model runs with any number of its {self.num_layers} encoder layers "
            f"(`num_active_layers`). They were trained with:\n{arguments}\n"
        )
        card.save(path)
