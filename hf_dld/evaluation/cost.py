"""What a depth costs: parameters, multiply-accumulates, seconds and bytes."""

import copy
import platform
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from ..data import DataCollatorCTC
from ..data.collator import on_model

COST_POLICY = (
    "latency: seconds of one forward pass of one utterance (features in, logits out) of this dataset's lengths; the "
    "depths take turns; RTF is their sum over the seconds of audio. Memory: weights of the layers that run, and the "
    "peak of the tensors of one forward pass of the length named for GMAC; Python, the libraries, and layers that are "
    "loaded but do not run come on top"
)


def count_parameters(model: PreTrainedModel, active_layers: Iterable[int]) -> int:
    """Parameters that take part when only `active_layers` run: those of a static model of these layers."""
    encoder_layers = model.base_model.encoder.layers
    skipped = set(range(len(encoder_layers))) - set(active_layers)
    unused = {
        id(parameter)
        for index in skipped
        for name, parameter in encoder_layers[index].named_parameters()
        if not name.endswith("rel_attn_embed.weight")  # WavLM's layer 0 owns it, and every depth uses it
    }
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in unused)


def count_gmac_per_s(
    model: PreTrainedModel, num_active_layers: Sequence[int], audio_s: float, sampling_rate_hz: int
) -> list[float]:
    """Billions of multiply-accumulates for a second of audio at each depth, in an utterance of `audio_s` seconds.

    Those of matrix products and convolutions, counted by torch.utils.flop_counter on the meta device, which computes
    nothing. Attention is eager there: the counter does not see into fused attention on a CPU. All layers cost the same.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    config.pruned_layers = None  # layer 0 stands for whichever layers are there
    with torch.device("meta"):
        twin = type(model)(config).eval()
        audio = torch.zeros(1, round(audio_s * sampling_rate_hz))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(audio, active_layers=[0])
    layer = next(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("r.layers.0"))
    rest = counter.get_total_flops() - layer
    return [(rest + depth * layer) / 2 / 1e9 / audio_s for depth in num_active_layers]


def noise_batch(model: PreTrainedModel, processor: ProcessorMixin, num_samples: int) -> BatchFeature:
    """One utterance of noise as the model takes it, on its device: what is said does not change what it costs."""
    noise = np.random.default_rng(0).standard_normal(num_samples).astype(np.float32)
    batch = DataCollatorCTC(processor)([{"audio": noise, "labels": []}])
    return on_model({name: batch[name] for name in batch if name not in ("labels", "input_lengths")}, model)


def forward_seconds(model: PreTrainedModel, batch: dict[str, torch.Tensor], active_layers: Sequence[int]) -> float:
    """Seconds of one forward pass; on an accelerator until it has finished."""
    on_cpu = model.device.type == "cpu"
    with torch.inference_mode():
        start = time.perf_counter()
        model(**batch, active_layers=active_layers)
        if not on_cpu:
            torch.accelerator.synchronize()
        return time.perf_counter() - start


def measure_latency(
    model: PreTrainedModel, processor: ProcessorMixin, lengths: Sequence[int], layer_sets: Sequence[Sequence[int]]
) -> np.ndarray:
    """Seconds (utterances, depths) of a forward pass of one utterance of each of `lengths` samples.

    The depths take turns at each length, so that whatever else the machine does meets all of them alike.
    """
    batch = noise_batch(model, processor, max(lengths))
    for layers in layer_sets:  # first passes allocate, and choose kernels
        forward_seconds(model, batch, layers)
    seconds = np.empty((len(lengths), len(layer_sets)))
    for row, length in zip(seconds, lengths, strict=True):
        batch = noise_batch(model, processor, length)
        row[:] = [forward_seconds(model, batch, layers) for layers in layer_sets]
    return seconds


class PeakTensorMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is on; `peak` is the most that lived at once.

    What a kernel needs for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        known = {storage._cdata for storage in _storages((args, kwargs))}
        output = function(*args, **(kwargs or {}))
        for storage in _storages(output):
            if storage._cdata not in known | self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return output

    def free(self, storage: int, size: int) -> None:
        self.seen.discard(storage)
        self.live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def measure_memory_mb(model: PreTrainedModel, batch: dict[str, torch.Tensor], active_layers: Sequence[int]) -> float:
    """Megabytes of the weights that `active_layers` need, and of the peak of what a forward pass allocates.

    The latter is what the allocator counts on an accelerator; on a CPU, the tensors of the operations.
    """
    element_size = next(model.parameters()).element_size()
    weights = count_parameters(model, active_layers) * element_size
    with torch.inference_mode():
        if model.device.type == "cpu":
            with PeakTensorMemory() as memory:
                model(**batch, active_layers=active_layers)
            activations = memory.peak
        else:
            torch.accelerator.reset_peak_memory_stats()
            before = torch.accelerator.memory_allocated()
            model(**batch, active_layers=active_layers)
            activations = torch.accelerator.max_memory_allocated() - before
    return (weights + activations) / 1e6


def describe_conditions(model: PreTrainedModel) -> dict[str, Any]:
    """What timings depend on: device, threads, dtype, attention and versions."""
    device = {"device": model.device.type}
    if model.device.type == "cuda":
        device["device"] = torch.cuda.get_device_name(model.device)
    elif model.device.type == "cpu":
        device = {"device": _cpu_name(), "threads": torch.get_num_threads()}
    return {
        **device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
