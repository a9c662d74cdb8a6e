"""Inference of the dynamic models against stock ones: at full depth, at fewer layers, and when the depth changes.

    python benchmarks/inference.py [--seconds 5 20] [--batch_sizes 1] [--runs 5] [--dtype bfloat16]

Random weights; the time does not depend on them. `stock` is Transformers' own class of all layers, `static` its class
with as many layers as are active.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from measure import DEVICE, conditions, print_table, ratio, time_interleaved

from hf_dld import DLDWav2Vec2ConformerConfig, DLDWav2Vec2ConformerForCTC, DLDWavLMConfig, DLDWavLMForCTC
from hf_dld.evaluation.cost import PeakTensorMemory

SMALL = {  # the size of examples/quickstart.yaml
    "hidden_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "feat_extract_norm": "layer",
    "conv_dim": (96, 128, 128, 128),
    "conv_kernel": (400, 5, 5, 5),
    "conv_stride": (160, 3, 1, 1),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 8,
    "vocab_size": 32,
}
AT_LEAST_S = 2.0  # of rounds for each ratio
MODELS = {
    "WavLM base": (DLDWavLMForCTC, DLDWavLMConfig, {}),
    "WavLM small": (DLDWavLMForCTC, DLDWavLMConfig, {**SMALL, "do_stable_layer_norm": True}),
    "Conformer base": (DLDWav2Vec2ConformerForCTC, DLDWav2Vec2ConformerConfig, {"vocab_size": 32}),
    "Conformer small": (DLDWav2Vec2ConformerForCTC, DLDWav2Vec2ConformerConfig, SMALL),
}


def make_model(name: str, dtype: torch.dtype) -> torch.nn.Module:
    model_class, config_class, options = MODELS[name]
    torch.manual_seed(0)
    return model_class(config_class(**options)).eval().to(DEVICE, dtype)


def audio(batch_size: int, seconds: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(batch_size, round(16_000 * seconds), device=DEVICE, dtype=dtype)


def peak_bytes(model: torch.nn.Module, values: torch.Tensor) -> int:
    """The most that the tensors of a pass take at once, without weights."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(values)
        return torch.cuda.max_memory_allocated() - before
    with PeakTensorMemory() as memory:
        model(values)
    return memory.peak


@torch.inference_mode()
def compare_full_depth(args: argparse.Namespace) -> Iterator[list[object]]:
    for name in args.models:
        dynamic = make_model(name, args.dtype)
        stock = dynamic.to_static()
        for seconds in args.seconds:
            for batch_size in args.batch_sizes:
                values = audio(batch_size, seconds, args.dtype)
                difference = float((dynamic(values).logits - stock(values).logits).abs().max())
                times = time_interleaved(
                    {"dynamic": partial(dynamic, values), "stock": partial(stock, values)},
                    args.runs,
                    warm_up=0,
                    at_least_s=AT_LEAST_S,
                )
                cells = [f"{median(times[which]):.3f}" for which in ("stock", "dynamic")]
                memory = peak_bytes(dynamic, values) / peak_bytes(stock, values)
                cells += [ratio(times, "dynamic", "stock"), f"{memory:.2f}", f"{difference:.0e}"]
                yield [name, f"{seconds:g}", batch_size, *cells]


@torch.inference_mode()
def compare_depths(args: argparse.Namespace) -> Iterator[list[object]]:
    for name in args.models:
        dynamic = make_model(name, args.dtype)
        num_layers = dynamic.config.num_hidden_layers
        for depth in sorted({1, num_layers // 4, num_layers // 2} - {0}):
            # the stock class differs by its attention too, so the layers alone are compared with a dynamic model
            # that has no others
            static = dynamic.to_static(depth)
            alone = type(dynamic)(type(dynamic.config)(**{**MODELS[name][2], "num_hidden_layers": depth}))
            alone.load_state_dict(static.state_dict())
            alone = alone.eval().to(DEVICE, args.dtype)
            for seconds in args.seconds:
                values = audio(1, seconds, args.dtype)
                times = time_interleaved(
                    {
                        "dynamic": partial(dynamic, values, num_active_layers=depth),
                        "alone": partial(alone, values),
                        "static": partial(static, values),
                    },
                    args.runs,
                    at_least_s=AT_LEAST_S,
                )
                cells = [ratio(times, "dynamic", "static"), ratio(times, "dynamic", "alone")]
                yield [name, f"{depth} of {num_layers}", seconds, f"{median(times['static']):.3f}", *cells]


def change_depth(model: torch.nn.Module, depths: list[int]) -> None:
    for depth in depths:
        model.set_active_layers(depth)


@torch.inference_mode()
def compare_changing(args: argparse.Namespace) -> Iterator[list[object]]:
    for name in args.models:
        model = make_model(name, args.dtype)
        depths = [1, model.config.num_hidden_layers]
        values = audio(1, 1.0, args.dtype)
        times = time_interleaved(
            {"change": partial(change_depth, model, depths * 50), "call": partial(model, values)}, args.runs
        )
        change_s, call_s = median(times["change"]) / 100, median(times["call"])
        yield [name, f"{1e6 * change_s:.0f}", f"{1e3 * call_s:.1f}", f"{100 * change_s / call_s:.2f} %"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--seconds", nargs="+", type=float, default=[5.0, 20.0], help="audio lengths")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    print(conditions(args.dtype), end="\n\n")
    args.dtype = getattr(torch, args.dtype)
    print_table(
        [
            "model",
            "audio (s)",
            "batch",
            "stock (s)",
            "dynamic, full depth (s)",
            "ratio (quartiles)",
            "ratio of peak memory",
            "max difference",
        ],
        compare_full_depth(args),
    )
    print_table(
        ["model", "active layers", "audio (s)", "static (s)", "ratio to static", "ratio to a dynamic model of these"],
        compare_depths(args),
    )
    print_table(["model", "change of depth (µs)", "call with 1 s of audio (ms)", "share"], compare_changing(args))


if __name__ == "__main__":
    main()
