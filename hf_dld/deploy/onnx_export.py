"""ONNX export: one depth as a graph that onnxruntime runs without PyTorch and without this package."""

import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, ProcessorMixin

from ..models import DLDWav2Vec2ConformerForCTC
from ..whole_files import whole_folder
from .static import check_free, load_for_export

MODEL_FILE = "model.onnx"
TOLERANCE = 1e-3
"""Largest difference of a float32 logit, relative to the largest logit. Sound exports differ by 1e-6 to 1e-4."""
EXTRA = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class OnnxExport:
    """What `export_onnx` wrote, and how near it is to PyTorch in float32 on generated audio (noise).

    `difference` is the largest absolute difference of a logit from PyTorch's, of the file that was written: for int8
    it is the error of quantization. `token_agreement` is the share of frames with the same most probable token.
    `size_bytes` counts the file and the weights beside it, if there are any.
    """

    file: Path
    active_layers: tuple[int, ...]
    size_bytes: int
    difference: float
    token_agreement: float


def export_onnx(
    checkpoint: str | Path | PreTrainedModel,
    output_dir: str | Path,
    active_layers: int | Sequence[int] | None = None,
    int8: bool = False,
    *,
    processor: ProcessorMixin | None = None,
) -> OnnxExport:
    """Write one depth of a dynamic model as `model.onnx` with its processor, and check that it is the same model.

    The graph holds just these layers, in float32. Batch and length are free:

    - `input_values`, float32 (batch, samples): what the processor makes of the audio;
    - `attention_mask`, int64 (batch, samples): 1 for audio, 0 for the padding after it. Where the processor makes no
      mask (models with group norm that were pretrained without one), give ones: that equals no mask;
    - `logits`, float32 (batch, frames, vocabulary): before the softmax.

    The float32 graph is compared with PyTorch on noise of two lengths, in batches of 1 and 3, with and without padding;
    `TOLERANCE` says how near it must be. Only then does the folder appear under its name. What transcribing needs
    besides the graph is in its metadata, all strings: `active_layers` and `vocabulary` (JSON lists), `blank_id`,
    `word_delimiter`, `sampling_rate_hz`, `do_normalize` ("true": the audio is brought to zero mean and unit variance),
    `num_hidden_layers` (of the dynamic model), `model_type` and `weights` ("float32" or "int8"). docs/onnx.md
    transcribes with it and onnxruntime alone.

    Needs `pip install "hf_dld[onnx]"`.

    Args:
        checkpoint: a dynamic model, or the folder or Hub id of a dynamic or stock checkpoint.
        output_dir: the folder to make; may exist if it is empty.
        active_layers: how many layers, or which ones (ascending 0-based indices); `None` for those that the model is
            set to.
        int8: quantize the weights of the linear layers to 8 bits, one scale per output, and their inputs as they come
            (onnxruntime's dynamic quantization). Convolutions stay in float32. Measure the error rate on your own
            speech: the report's agreement is one on noise.
        processor: saved beside the model; read from the checkpoint when it is `None`, so it must be given with a model.

    Raises:
        ImportError: the packages of the extra are missing.
        ValueError: for an impossible depth, a checkpoint that is no WavLM or Wav2Vec2-Conformer or has no processor, or
            a folder that is in use. Nothing is written.
        RuntimeError: the graph does not compute what the model does. Nothing of it stays.
        OSError: it could not be written. Nothing of it stays.
    """
    check_extra()
    output_dir = Path(output_dir)
    check_free(output_dir)
    model, processor = load_for_export(checkpoint, processor)
    layers = model.config.resolve_depth(active_layers)

    try:
        with whole_folder(output_dir) as beside:
            # made first: a folder that cannot be written is found before the minutes of work
            processor.save_pretrained(beside)
            file = beside / MODEL_FILE
            static = model.to_static(layers).to("cpu", torch.float32).eval()
            program = trace(shallow_copy(model, static))
            program.model.metadata_props.update(describe(model, layers, processor, int8))
            program.save(file)  # weights above the 2 GB limit of the format go to a file beside it
            difference, agreement = compare_with_pytorch(static, file)
            if int8:
                quantize(file)
                difference, agreement = compare_with_pytorch(static, file, tolerance=math.inf)
            size_bytes = sum(path.stat().st_size for path in beside.glob(f"{MODEL_FILE}*"))
    except OSError as error:
        raise OSError(f"Could not export to {output_dir}: {error}. Nothing of it was left there.") from error
    return OnnxExport(output_dir / MODEL_FILE, layers, size_bytes, difference, agreement)


def check_extra() -> None:
    """Raise `ImportError` unless the packages of the extra `onnx` are there."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ImportError(f'ONNX export needs {", ".join(missing)}: pip install "hf_dld[onnx]"')


def shallow_copy(model: PreTrainedModel, static: PreTrainedModel) -> PreTrainedModel:
    """A dynamic model of the static one's layers alone, in the form that exports well.

    Not the static model itself: stock WavLM's attention hands raw weights to `F.multi_head_attention_forward`. Not a
    deepcopy of `model`: a parametrized module shares its class with its deepcopy, and removing the weight norm there
    would break the original.
    """
    fields = {name: value for name, value in static.config.to_dict().items() if name != "model_type"}
    config = type(model.config).from_dict(fields)
    # "eager" is plain matrix products and a softmax, as SDPA becomes in ONNX; the fused one does not trace here
    shallow = type(model).from_pretrained(
        None, config=config, state_dict=static.state_dict(), dtype=torch.float32, attn_implementation="eager"
    )
    for module in shallow.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    if isinstance(shallow, DLDWav2Vec2ConformerForCTC) and config.position_embeddings_type == "relative":
        shallow.wav2vec2_conformer.encoder.embed_positions = RelativePositions(config.hidden_size)
    return shallow.eval()


class RelativePositions(nn.Module):
    """The Conformer's relative position embeddings for any length: (1, 2 * frames - 1, hidden).

    The stock module slices a table of `max_source_positions`, which would be stored in the graph (30 MB for a base-size
    model) and be silently too short for longer audio.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        exponents = torch.arange(0, hidden_size, 2, dtype=torch.int64).float()
        self.frequencies = nn.Buffer(torch.exp(exponents * -(math.log(10_000.0) / hidden_size)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        frames = hidden_states.shape[1]
        # from the farthest on the left to the farthest on the right
        distances = torch.arange(frames - 1, -frames, -1, device=hidden_states.device).to(hidden_states.dtype)
        angles = distances[:, None] * self.frequencies
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).unsqueeze(0)


class Logits(nn.Module):
    """The model with the inputs and the output of the graph."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_values, attention_mask=attention_mask).logits


def trace(model: PreTrainedModel) -> Any:
    """The `torch.onnx.ONNXProgram` of a model, free in batch and length."""
    # sizes of 1 would be taken for constants
    input_values, attention_mask = noise(batch=2, samples=12_000, padded=True)
    free = {0: "batch", 1: "samples"}
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Logits(model),
            (input_values, attention_mask),
            input_names=["input_values", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_values": free, "attention_mask": free},
            dynamo=True,
            verbose=False,
        )
    # the name of the frames is a formula of the samples; where each node came from tells the paths of this machine
    program.model.graph.outputs[0].shape[1] = "frames"
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    return program


def quantize(file: Path) -> None:
    """Replace the float32 model of a file by an int8 one."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = file.with_name("quantized.onnx")
    with quiet():
        # convolutions stay as they are: onnxruntime has no fast integer kernel for them, and the first hears raw audio
        quantize_dynamic(
            file, quantized, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8
        )
    for path in file.parent.glob(f"{file.name}*"):
        path.unlink()
    os.replace(quantized, file)


def describe(model: PreTrainedModel, layers: Sequence[int], processor: ProcessorMixin, int8: bool) -> dict[str, str]:
    """What transcribing needs to know besides the graph, as the strings of an ONNX file's metadata."""
    tokens = processor.tokenizer.get_vocab()
    vocabulary = [""] * max(model.config.vocab_size, max(tokens.values()) + 1)
    for token, index in tokens.items():
        vocabulary[index] = token
    return {
        "model_type": model.config.stock_config_class.model_type,
        "active_layers": json.dumps(list(layers)),
        "num_hidden_layers": str(model.config.num_hidden_layers),
        "sampling_rate_hz": str(processor.feature_extractor.sampling_rate),
        "do_normalize": json.dumps(bool(processor.feature_extractor.do_normalize)),
        "blank_id": str(model.config.pad_token_id),
        "vocabulary": json.dumps(vocabulary, ensure_ascii=False),
        # a character vocabulary has a token between words, pieces of words start with this mark
        "word_delimiter": getattr(processor.tokenizer, "word_delimiter_token", None) or "\u2581",
        "weights": "int8" if int8 else "float32",
    }


@torch.no_grad()
def compare_with_pytorch(model: PreTrainedModel, file: Path, tolerance: float = TOLERANCE) -> tuple[float, float]:
    """Run an ONNX file and the model that it was made of on noise.

    Args:
        model: in float32 on the CPU, in eval mode.
        tolerance: of the largest difference of a logit, relative to the largest logit.

    Returns:
        The largest absolute difference of a logit, and the share of frames with the same most probable token.

    Raises:
        RuntimeError: onnxruntime cannot run the file, or the logits differ by more, or are not numbers.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    difference, same = 0.0, []
    for batch in (1, 3):
        for samples in (8_000, 20_001):
            for padded in (False, True):
                input_values, attention_mask = noise(batch, samples, padded)
                with quiet():
                    expected = model(input_values, attention_mask=attention_mask).logits.numpy()
                inputs = {"input_values": input_values.numpy(), "attention_mask": attention_mask.numpy()}
                what = f"{batch} x {samples} samples, {'with' if padded else 'without'} padding"
                try:
                    (logits,) = session.run(None, inputs)
                except Exception as error:  # onnxruntime's errors share no class of their own
                    raise RuntimeError(f"onnxruntime cannot run the exported model on {what}: {error}") from error
                found, scale = np.abs(logits - expected).max().item(), np.abs(expected).max().item()
                if not found <= tolerance * scale:  # nor if either is not a number
                    raise RuntimeError(
                        f"The ONNX model is not the PyTorch one: on {what} their logits differ by up to {found:.2g}, "
                        f"with logits up to {scale:.2g}. Nothing was exported."
                    )
                difference = max(difference, found)
                same.append((logits.argmax(-1) == expected.argmax(-1)).ravel())
    return difference, np.concatenate(same).mean().item()


def noise(batch: int, samples: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and its mask, both (batch, samples); the last third of the last one is padding, if any is."""
    input_values = torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples))
    attention_mask = torch.ones(batch, samples, dtype=torch.long)
    if padded:
        input_values[-1, samples * 2 // 3 :], attention_mask[-1, samples * 2 // 3 :] = 0.0, 0
    return input_values, attention_mask


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' warnings, about packages and options that play no part here; errors are raised."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)
