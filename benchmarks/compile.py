"""What does torch.compile give, and what does it cost? In inference at a fixed depth, and in training steps.

    OMP_NUM_THREADS=1 python benchmarks/compile.py [--models digits_wavlm digits_conformer wavlm-base]

Inference: one utterance at a third of the layers and at all of them, eager beside compiled. Training: forward and
backward passes of the student at the same two depths, each of which is a graph of its own
(`depth_sampling="balanced"` has as many as there are layers). Both on one shape of batch; compiling takes place before
the clock runs and has a column of its own, and the last column says after how many calls it has paid for itself. On a
CUDA device the compiled model also runs as CUDA graphs (mode "reduce-overhead"). Prints Markdown tables.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from measure import DEVICE, conditions, print_table, ratio, synchronize, time_interleaved
from training_step import CONFIGS, load_model

MODES = ["default", *(["reduce-overhead"] if DEVICE == "cuda" else [])]


def first_call_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def compare(eager: Callable[[], object], compiled: dict[str, Callable[[], object]], runs: int) -> Iterator[list[str]]:
    """A row for each compiled mode: eager seconds, ratio, seconds of compiling, calls until it has paid."""
    compile_s = {mode: first_call_s(call) for mode, call in compiled.items()}
    seconds = time_interleaved({"eager": eager, **compiled}, runs)
    eager_s = median(seconds["eager"])
    for mode in compiled:
        saved_s = eager_s - median(seconds[mode])
        pays = f"{compile_s[mode] / saved_s:.0f}" if saved_s > 0 else "never"
        yield [mode, f"{eager_s:.4f}", ratio(seconds, mode, "eager"), f"{compile_s[mode]:.0f}", pays]


@torch.no_grad()
def compare_inference(args: argparse.Namespace) -> Iterator[list[object]]:
    for name in args.models:
        model, rate_hz = load_model(name)
        model.eval().to(DEVICE)
        num_layers = model.config.num_hidden_layers
        values = torch.randn(1, int(args.seconds * rate_hz), device=DEVICE)
        for depth in depths_of(model):
            model.set_active_layers(depth)
            torch.compiler.reset()
            calls = {mode: partial(torch.compile(model, fullgraph=True, mode=mode), values) for mode in MODES}
            for row in compare(partial(model, values), calls, args.runs):
                yield [name, f"{depth} of {num_layers}", *row]


def depths_of(model: Any) -> tuple[int, int]:
    num_layers = model.config.num_hidden_layers
    return num_layers // 3, num_layers


def pass_at_each_depth(model: Any, depths: Iterable[int], values: torch.Tensor) -> None:
    for depth in depths:
        model(values, num_active_layers=depth).logits.square().mean().backward()
        model.zero_grad(set_to_none=True)


def compare_training(args: argparse.Namespace) -> Iterator[list[object]]:
    for name in args.models:
        model, rate_hz = load_model(name)
        model.to(DEVICE).train()
        model.freeze_feature_encoder()
        model.config.apply_spec_augment = False  # its masks are drawn by NumPy, which no graph holds
        depths = depths_of(model)
        values = torch.randn(1 if name in CONFIGS else 8, int(args.seconds * rate_hz), device=DEVICE)
        torch.compiler.reset()
        # no CUDA graphs: they need gradients at fixed addresses, and training clears them
        compiled = partial(pass_at_each_depth, torch.compile(model), depths, values)
        for row in compare(partial(pass_at_each_depth, model, depths, values), {"default": compiled}, args.runs):
            yield [name, " and ".join(map(str, depths)), *row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits_wavlm"])
    parser.add_argument("--seconds", type=float, default=5.0, help="of audio in each utterance")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    print(conditions(), end="\n\n")
    header = ["model", "active layers", "mode", "eager, s", "ratio (quartiles)", "compiling, s", "calls until it pays"]
    print_table(header, compare_inference(args))
    header[3], header[-1] = "eager, forward and backward at both depths, s", "rounds over both until it pays"
    print_table(header, compare_training(args))


if __name__ == "__main__":
    main()
