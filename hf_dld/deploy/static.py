"""Static export: one depth as a stock checkpoint, which loads where this package was never installed."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCTC, PreTrainedModel, ProcessorMixin

from ..data import load_processor
from ..data.collator import on_model
from ..distill.batch_norm import reestimate_batch_norm
from ..models import DYNAMIC_CLASSES
from ..whole_files import whole_folder

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit. Sound exports differ by about 1e-6: rounding."""


@dataclass(frozen=True)
class StaticExport:
    """What `export_static` wrote: where, which layers of the dynamic model, and how near its logits are.

    `parameters` is a count; `difference` the largest absolute difference of a logit from the dynamic model's.
    """

    folder: Path
    model_class: str
    active_layers: tuple[int, ...]
    parameters: int
    difference: float


def export_static(
    checkpoint: str | Path | PreTrainedModel,
    output_dir: str | Path,
    active_layers: int | Sequence[int] | None = None,
    *,
    processor: ProcessorMixin | None = None,
    batch_norm_batches: Iterable[dict[str, Any]] | None = None,
) -> StaticExport:
    """Write one depth of a dynamic model as a stock checkpoint with its processor, and check that it is the same model.

    The folder holds a `WavLMForCTC` or `Wav2Vec2ConformerForCTC` with just these layers, in the model's dtype, and no
    code. It is loaded again as a stock process would, and both models transcribe the same generated audio, one clip
    of it padded, in float32 on the CPU. Only then does the folder appear under its name.

    Args:
        checkpoint: a dynamic model, or the folder or Hub id of a dynamic or stock checkpoint.
        output_dir: the folder to make; may exist if it is empty.
        active_layers: how many layers, or which ones (ascending 0-based indices); `None` for those that the model is
            set to.
        processor: saved beside the model; read from the checkpoint when it is `None`, so it must be given with a model.
        batch_norm_batches: keyword arguments of the model, such as `input_values` and `attention_mask`. The Conformer's
            batch normalisation statistics are estimated anew on them, for this depth (`reestimate_batch_norm`). The
            model that is given keeps its own.

    Raises:
        ValueError: for an impossible depth, a checkpoint that is no WavLM or Wav2Vec2-Conformer or has no processor, a
            folder that is in use, or statistics wanted for a model without batch normalisation. Nothing is written.
        RuntimeError: the written model does not compute what the dynamic one does. Nothing of it stays.
        OSError: it could not be written. Nothing of it stays.
    """
    output_dir = Path(output_dir)
    check_free(output_dir)
    model, processor = load_for_export(checkpoint, processor)
    layers = model.config.resolve_depth(active_layers)
    if batch_norm_batches is not None:
        model = copy.deepcopy(model)
        model.set_active_layers(layers)
        reestimate_batch_norm(model, (on_model(batch, model) for batch in batch_norm_batches))
    static = model.to_static(layers)
    written = False
    try:
        with whole_folder(output_dir) as beside:
            static.save_pretrained(beside)
            processor.save_pretrained(beside)
            written = True
            difference = compare_logits(model, layers, beside)
    except Exception as error:  # safetensors has an error class of its own for a full disk
        if written:
            raise
        raise OSError(f"Could not export to {output_dir}: {error}. Nothing of it was left there.") from error
    return StaticExport(output_dir, type(static).__name__, layers, static.num_parameters(), difference)


def load_for_export(
    checkpoint: str | Path | PreTrainedModel, processor: ProcessorMixin | None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The dynamic model and the processor of what is to be exported; `ValueError` where one of them is missing."""
    if hasattr(checkpoint, "get_base_model"):
        raise ValueError("The model has adapters (PEFT): export what its merge_and_unload() returns.")
    if not isinstance(checkpoint, PreTrainedModel):
        processor = processor or load_processor(checkpoint)  # first, for it is missing more often and loads faster
        return load_dynamic(checkpoint), processor
    if not hasattr(checkpoint, "to_static"):
        raise ValueError(
            f"Only a dynamic model has depths to export, and {type(checkpoint).__name__} is not one. Load the "
            "checkpoint with hf_dld.DLDWavLMForCTC or hf_dld.DLDWav2Vec2ConformerForCTC; stock ones load there too."
        )
    if processor is None:
        raise ValueError("A model in memory has no processor, and an exported one needs it: give processor=.")
    return checkpoint, processor


def check_free(folder: Path) -> None:
    """Raise `ValueError` if there is anything at `folder` that an export would overwrite."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder; choose another one for the export.")


def load_dynamic(checkpoint: str | Path) -> PreTrainedModel:
    """The dynamic model of a dynamic or stock CTC checkpoint.

    Raises:
        ValueError: another kind of model, adapters alone, or an encoder without a CTC head.
    """
    if Path(checkpoint, "adapter_config.json").exists() and not Path(checkpoint, "config.json").exists():
        raise ValueError(f"{checkpoint} holds adapters (PEFT): merge them into their model, and export that.")
    model_type = AutoConfig.from_pretrained(checkpoint).model_type
    if model_type not in DYNAMIC_CLASSES:
        raise ValueError(
            f"{checkpoint} is a {model_type} model, and only these can run some of their layers: "
            f"{', '.join(sorted(DYNAMIC_CLASSES))}."
        )
    model, loading = DYNAMIC_CLASSES[model_type].from_pretrained(checkpoint, output_loading_info=True)
    if any(name.startswith("lm_head.") for name in loading["missing_keys"]):
        raise ValueError(f"{checkpoint} has no CTC head (lm_head), and a new one would be random: fine-tune it first.")
    return model


@torch.no_grad()
def compare_logits(model: PreTrainedModel, layers: Sequence[int], folder: Path) -> float:
    """The largest absolute difference between the logits of a dynamic model and of its static export in a folder.

    Raises:
        RuntimeError: it is larger than rounding explains, or not a number.
    """
    static = AutoModelForCTC.from_pretrained(folder, dtype=torch.float32, device_map=None).eval()
    # in half precision and on some accelerators equal weights may give visibly different logits
    if model.dtype != torch.float32 or model.device.type != "cpu" or model.training:
        # not a deep copy, which takes along the rotary positions that stock encoders keep, in the dtype of the last use
        weights, model = model.state_dict(), type(model)(copy.deepcopy(model.config))
        model.load_state_dict(weights)
        model.eval()
    generator = torch.Generator().manual_seed(0)
    input_values = torch.randn(2, 16_000, generator=generator)
    attention_mask = torch.ones(2, 16_000, dtype=torch.long)
    input_values[1, 10_000:], attention_mask[1, 10_000:] = 0.0, 0
    logits = static(input_values, attention_mask=attention_mask).logits
    expected = model(input_values, attention_mask=attention_mask, active_layers=layers).logits
    difference, scale = (logits - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE * scale:  # nor if either is not a number
        raise RuntimeError(
            f"The exported model is not the dynamic one at layers {', '.join(map(str, layers))}: their logits differ "
            f"by up to {difference:.2g}, with logits up to {scale:.2g}. Nothing was exported."
        )
    return difference
