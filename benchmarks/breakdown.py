"""Where the time of one forward pass goes, beside the floor that the machine's own matrix multiplication sets.

    python benchmarks/breakdown.py [--models "WavLM base"] [--seconds 10] [--runs 5]

Each part is timed by hooks on its modules, summed over the layers, at full depth and with one layer active. The floor
of a part is its multiply-accumulates (`torch.utils.flop_counter`) at the rate that one large float32 matrix product
reaches here, measured in the same run: what no implementation in this precision can be faster than.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from statistics import median

import torch
from inference import MODELS, audio, make_model
from measure import DEVICE, conditions, print_table, synchronize
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

PARTS = {  # the end of a module's name, and what the table calls it
    "feature_extractor": "feature encoder",
    "feature_projection": "feature projection",
    "pos_conv_embed": "position convolution",
    "attention": "attention",
    "self_attn": "attention",
    "conv_module": "convolution module",
    "feed_forward": "feed-forward",
    "ffn1": "feed-forward",
    "ffn2": "feed-forward",
    "lm_head": "CTC head",
}


def parts_of(model: nn.Module) -> dict[str, list[nn.Module]]:
    found = defaultdict(list)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in PARTS:
            found[PARTS[last]].append(module)
    return found


def matmul_rate(dtype: torch.dtype, size: int = 2048, runs: int = 5) -> float:
    """Multiply-accumulates per second of a square matrix product."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(runs + 1):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - start)
    return size**3 / median(seconds[1:])


@torch.inference_mode()
def part_seconds(model: nn.Module, values: torch.Tensor, num_active_layers: int, runs: int) -> dict[str, float]:
    """Median seconds of each part and, as "all", of the whole pass."""
    sums: dict[str, list[float]] = defaultdict(list)
    now: dict[str, float] = defaultdict(float)
    started: dict[nn.Module, float] = {}

    def before(module: nn.Module, *_: object) -> None:
        synchronize()
        started[module] = time.perf_counter()

    def after(part: str):
        def hook(module: nn.Module, *_: object) -> None:
            synchronize()
            now[part] += time.perf_counter() - started[module]

        return hook

    hooks = []
    for part, modules in {**parts_of(model), "all": [model]}.items():
        for module in modules:
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after(part))]
    for _ in range(runs + 1):
        now.clear()
        model(values, num_active_layers=num_active_layers)
        for part, seconds in now.items():
            sums[part].append(seconds)
    for hook in hooks:
        hook.remove()
    return {part: median(seconds[1:]) for part, seconds in sums.items()}


@torch.no_grad()  # the counter's hooks fail in inference mode
def part_macs(model: nn.Module, values: torch.Tensor, num_active_layers: int) -> dict[str, int]:
    macs: dict[str, int] = defaultdict(int)
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the counter does not know fused attention on a CPU
    with FlopCounterMode(display=False) as counter:
        model(values, num_active_layers=num_active_layers)
    model.set_attn_implementation(kind)
    for name, operations in counter.get_flop_counts().items():
        last = name.rpartition(".")[2]
        if last in PARTS:
            macs[PARTS[last]] += sum(operations.values()) // 2
    macs["all"] = counter.get_total_flops() // 2
    return macs


def rows(args: argparse.Namespace, rate: float) -> Iterator[list[object]]:
    for name in args.models:
        model = make_model(name, args.dtype)
        values = audio(1, args.seconds, args.dtype)
        for depth in (model.config.num_hidden_layers, 1):
            seconds, macs = part_seconds(model, values, depth, args.runs), part_macs(model, values, depth)
            for part, spent in sorted(seconds.items(), key=lambda item: -item[1]):
                floor = macs[part] / rate
                share = f"{100 * spent / seconds['all']:.0f} %"
                cells = [f"{1e3 * spent:.1f}", share, f"{macs[part] / 1e9:.2f}", f"{1e3 * floor:.1f}"]
                yield [name, depth, part, *cells, f"{spent / floor:.1f}" if floor else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["WavLM base", "Conformer base"], choices=MODELS)
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    print(conditions(args.dtype), end="\n\n")
    args.dtype = getattr(torch, args.dtype)
    rate = matmul_rate(args.dtype)
    print(f"matrix product: {rate / 1e9:.0f} GMAC/s\n")
    header = ["model", "active layers", "part", "ms", "share", "GMAC", "floor, ms", "times the floor"]
    print_table(header, rows(args, rate))


if __name__ == "__main__":
    main()
