"""CoLLD, contrastive layer-to-layer distillation (arXiv 2309.07707), as a Trainer."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.collator import DataCollatorCoLLD, on_model
from ..models.modeling_dld import DynamicDepthModelMixin
from .layer_features import collect_features, encoder_layers, map_layers
from .losses import info_nce_loss, l1_cosine_loss
from .masking import MaskedFrames, draw_masked_frames
from .teacher import freeze, num_encoder_frames
from .training_args import CoLLDTrainingArguments
from .utterance_trainer import UtteranceTrainer

# Stacked log-mel frames and the strides of a convolutional encoder cut an utterance's end differently
MAX_FRAME_DIFFERENCE = 1


class StudentWithHeads(nn.Module):
    """The student, and a linear layer for each student layer that predicts the teacher's features.

    One module, so that the Trainer optimizes, distributes and checkpoints both. The heads are of no use afterwards.
    """

    def __init__(self, student: PreTrainedModel, layers: list[int], target_size: int):
        super().__init__()
        self.student, self.main_input_name = student, student.main_input_name
        width, dtype = student.config.hidden_size, student.dtype
        self.heads = nn.ModuleDict({str(index): nn.Linear(width, target_size, dtype=dtype) for index in layers})

    def forward(self, masked: MaskedFrames, **inputs: Any) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """Run the student on masked `inputs`.

        Returns:
            For each predicting layer that ran, its predictions for the masked frames (batch, masked, target_size);
            and zeros (batch,) that depend on the student.
        """
        with collect_features(self.student, map(int, self.heads)) as features:
            output = self.student.base_model(**inputs, mask_time_indices=masked.time_mask)
        predictions = {index: self.heads[str(index)](masked.gather(hidden)) for index, hidden in features.items()}
        # where every predicting layer was skipped, a backward pass still needs something to start from
        return predictions, 0.0 * output.last_hidden_state[:, 0, 0]

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        self.student.activation_checkpointing_enable(**kwargs)


class CoLLDTrainer(UtteranceTrainer):
    """Teaches a small speech encoder to copy a large, frozen one layer by layer, on speech without transcripts.

    The teacher hears the whole utterance, the student one in which spans of frames are masked. At the masked frames,
    each student layer i (through a linear head of its own) predicts the features of teacher layer m(i). For an
    utterance with masked frames M and K predicting layers::

        L = 1/K sum_i 1/|M| sum_{t in M} l( head_i(h_i,t), c_m(i),t )

    meaned over the utterances of the global batch. An utterance too short to be masked counts 0.

    Published (abstract of arXiv 2309.07707): masked prediction and contrastive learning, layer to layer. From the first
    author's later USAD (arXiv 2506.18843), which refers to CoLLD for some of it: feed-forward features as targets, a
    positive and negatives for each frame; and USAD's own map of layers and L1-cosine as the alternative. Inferred here,
    so that the result is to be called "CoLLD-style": span masking with length 10 and probability 0.65, InfoNCE over
    cosine similarity / 0.1 with 100 negatives from the same utterance (all of wav2vec 2.0), linear heads on the
    student's layer outputs, and a student that starts from evenly spaced teacher layers.

    What is drawn for an utterance is a function of (`args.seed`, optimizer step, utterance): it does not depend on how
    a batch is split, and a resumed run draws what the straight run would have drawn. Evaluation draws the same each
    time. A dynamic student draws its layers as `DLDTrainer` does; a layer that is skipped predicts nothing in that
    step, and the mean is over those that ran.

    `save_model` saves the student alone; only checkpoints hold the heads.

    Args:
        model: the student, a speech encoder of Transformers (`make_student`) or a dynamic one, without the heads.
        teacher: a speech encoder with the same frame rate, or a model with a head on top of one; it is frozen.
        args: `CoLLDTrainingArguments`.
        data_collator: a `DataCollatorCoLLD`.
        kwargs: as in `transformers.Trainer`. `processing_class`: the student's feature extractor, saved beside it.

    Raises:
        ValueError: for another frame rate of the teacher, a model that is no speech encoder, a student that cannot be
            masked, a dynamic teacher that skips layers, or an impossible `num_distilled_layers`.
    """

    args: CoLLDTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: CoLLDTrainingArguments,
        teacher: PreTrainedModel,
        data_collator: DataCollatorCoLLD,
        **kwargs: Any,
    ):
        check_student(model)
        check_colld_teacher(teacher, model)
        num_layers = (len(encoder_layers(encoder)) for encoder in (model, teacher))
        self.layer_map = map_layers(*num_layers, args.num_distilled_layers)
        super().__init__(
            model=StudentWithHeads(model, list(self.layer_map), teacher.config.hidden_size),
            args=args,
            data_collator=data_collator,
            **kwargs,
        )
        self.teacher = self.accelerator.prepare_model(freeze(teacher.base_model), evaluation_mode=True)
        self.check_frame_rates()

    @property
    def student(self) -> PreTrainedModel:
        """The student without the heads."""
        return self.unwrapped_model.student

    def compute_utterance_terms(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], None]:
        student_inputs, teacher_inputs = split_inputs(inputs)
        student_inputs = on_model(student_inputs, self.student)
        masked = self.draw_masked_frames(inputs)
        targets = self.compute_targets(teacher_inputs, masked)
        layer_sets: list[dict[str, Any]] = [{}]
        if model.training and isinstance(self.student, DynamicDepthModelMixin):
            drawn = self.args.draw_layers(self.student.config, self.state.global_step)
            # the full depth last: DDP looks for unused parameters in the graph of the last forward pass
            layer_sets = [{"active_layers": layers} for layers in sorted(drawn, key=len)]

        terms: dict[str, torch.Tensor] = {}
        losses = []
        for active in layer_sets:
            predictions, loss = model(masked, **student_inputs, **active)
            for index, prediction in predictions.items():
                layer_loss = self.layer_loss(prediction, targets[self.layer_map[index]], masked)
                loss = loss + layer_loss / len(predictions)
                terms[f"loss_layer_{index}"] = layer_loss
            losses.append(loss)
        return {"loss": torch.stack(losses).mean(0), **terms}, None

    def layer_loss(self, predictions: torch.Tensor, targets: torch.Tensor, masked: MaskedFrames) -> torch.Tensor:
        """The loss of one layer, (batch,), from features (batch, masked, width)."""
        if self.args.objective == "l1_cosine":
            return l1_cosine_loss(predictions, targets, masked.counts)
        temperature = self.args.contrastive_temperature
        return info_nce_loss(predictions, targets, masked.candidates, masked.counts, temperature)

    @torch.no_grad()
    def compute_targets(self, teacher_inputs: dict[str, Any], masked: MaskedFrames) -> dict[int, torch.Tensor]:
        """The teacher's features at the masked frames, by teacher layer, each (batch, masked, width)."""
        teacher_layers = set(self.layer_map.values())
        with collect_features(self.teacher, teacher_layers, self.args.distill_target) as features:
            self.teacher(**on_model(teacher_inputs, self.teacher))
        return {index: masked.gather(feature) for index, feature in features.items()}

    def draw_masked_frames(self, inputs: dict[str, Any]) -> MaskedFrames:
        """The masked frames of a batch at the current optimizer step; in evaluation, the same at any time."""
        return draw_masked_frames(
            self.frame_lengths(inputs).tolist(),
            int(num_encoder_frames(self.student, inputs[self.student.main_input_name].shape[1])),
            inputs["utterance_ids"].tolist(),
            seed=self.args.seed,
            step=self.state.global_step + 1 if self.model.training else 0,
            mask_time_prob=self.args.mask_time_prob,
            mask_time_length=self.args.mask_time_length,
            num_negatives=self.args.num_negatives,
        ).to(inputs["input_lengths"].device)

    def frame_lengths(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Frames of each utterance that both models have, (batch,), without padding."""
        ours = num_encoder_frames(self.student, inputs["input_lengths"])
        theirs = num_encoder_frames(self.teacher, inputs.get("teacher_input_lengths", inputs["input_lengths"]))
        if ((ours - theirs).abs() > MAX_FRAME_DIFFERENCE).any():
            raise ValueError(
                "Teacher and student must have the same frame rate, because their features are compared frame by "
                f"frame: the same utterances are {theirs.tolist()} frames for the teacher and {ours.tolist()} for the "
                "student."
            )
        return torch.minimum(ours, theirs)

    def check_frame_rates(self) -> None:
        """Raise `ValueError` unless both models make the same number of frames of half a second to 20 s of noise."""
        rate_hz = self.data_collator.feature_extractor.sampling_rate
        noise = np.random.default_rng(0).standard_normal(20 * rate_hz).astype(np.float32)
        lengths = [round(seconds * rate_hz) for seconds in (0.5, 1.0, 3.33, 20.0)]
        batch = self.data_collator(
            [{"audio": {"array": noise[:length], "sampling_rate": rate_hz}} for length in lengths]
        )
        _, teacher_inputs = split_inputs(batch)
        for name, encoder, has in (("student", self.student, batch), ("teacher", self.teacher, teacher_inputs)):
            if encoder.main_input_name not in has:
                raise ValueError(
                    f"The {name}, a {encoder.config.model_type} model, needs {encoder.main_input_name}, which its "
                    f"feature extractor does not make: it makes {', '.join(sorted(has))}. Pass DataCollatorCoLLD the "
                    "feature extractors of both models."
                )
        self.frame_lengths(batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The mean loss of a batch. There is nothing else to keep: features have no labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in `transformers.Trainer`; the card is the student's, without the heads."""
        trained, self.model = self.model, self.student
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.model = trained

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student alone, ready for `from_pretrained`; the Trainer's own checkpoints hold the heads too."""
        is_checkpoint = _internal_call and output_dir is not None
        if is_checkpoint:
            super().save_model(output_dir, _internal_call=True)
            return
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.student.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def split_inputs(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The student's and the teacher's keyword arguments out of a batch of `DataCollatorCoLLD`."""
    student: dict[str, Any] = {}
    teacher: dict[str, Any] = {}
    for name, value in inputs.items():
        if name.startswith("teacher_"):
            teacher[name.removeprefix("teacher_")] = value
        elif name != "utterance_ids":
            student[name] = value
    for model_inputs in (student, teacher):
        model_inputs.pop("input_lengths", None)
    return student, teacher or student


def check_student(student: PreTrainedModel) -> None:
    """Raise `ValueError` unless the model is a whole speech encoder whose input frames can be masked."""
    if getattr(student.config, "pruned_layers", None):
        raise ValueError(
            f"Every layer of the student learns, and {student.config.pruned_layers} were pruned when it was loaded: "
            "load it without prune_inactive_layers."
        )
    encoder_layers(student)
    encoder = student.base_model
    if "mask_time_indices" not in inspect.signature(encoder.forward).parameters:
        raise ValueError(f"{type(student).__name__} cannot be a student: its forward takes no mask_time_indices.")
    if getattr(encoder, "masked_spec_embed", None) is None or not encoder.config.apply_spec_augment:
        raise ValueError(
            "The student cannot be masked: it needs apply_spec_augment=True and mask_time_prob above 0 in its "
            f"configuration, where they are {encoder.config.apply_spec_augment} and {encoder.config.mask_time_prob}, "
            "to have a vector that stands for masked frames (make_student sees to it)."
        )


def check_colld_teacher(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raise `ValueError` unless the teacher is another speech encoder than the student, and runs all its layers."""
    total = len(encoder_layers(teacher))
    ours = set(student.parameters())
    if any(parameter in ours for parameter in teacher.parameters()):
        raise ValueError("Teacher and student share weights, and the teacher's are frozen: load the teacher apart.")
    if isinstance(teacher, DynamicDepthModelMixin) and teacher.num_active_layers != total:
        raise ValueError(
            f"The teacher skips layers that the student should copy: {teacher.num_active_layers} of {total} run. Call "
            "teacher.set_active_layers(None)."
        )
