"""Does the calibrated latency model predict what a pass takes? Predictions against measurements, on this machine.

    OMP_NUM_THREADS=1 python benchmarks/latency_prediction.py

For a WavLM of the base size (12 layers of width 768) and a small one, with random weights: calibrates, then measures
depths and lengths that calibration did not see, and this several times in turns, because a shared machine is faster at
one minute than at the next. Prints a Markdown table of medians: seconds, and the error of each prediction against what
was measured right after its calibration. Works for any number of threads that is set.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from measure import DEVICE, conditions, time_interleaved

from hf_dld.evaluation import calibrate_latency
from hf_dld.evaluation.cost import forward_seconds
from hf_dld.models import DLDWavLMConfig, DLDWavLMForCTC

SIZES = {
    "base": {},
    "small": {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 1024},
}
AUDIO_S = (2.0, 12.0, 30.0)


def make_model(size: str) -> DLDWavLMForCTC:
    torch.manual_seed(0)
    convolutions = {"conv_dim": (128,) * 7} if size == "small" else {}
    return DLDWavLMForCTC(DLDWavLMConfig(vocab_size=32, **convolutions, **SIZES[size])).eval().to(DEVICE)


def pass_of(model: DLDWavLMForCTC, depth: int, audio_s: float) -> Callable[[], float]:
    batch = {"input_values": torch.randn(1, round(audio_s * 16_000), device=DEVICE)}
    return partial(forward_seconds, model, batch, model.config.resolve_active_layers(num_active_layers=depth))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 4, 8, 12])
    parser.add_argument("--audio_s", type=float, nargs="+", default=AUDIO_S)
    parser.add_argument("--rounds", type=int, default=2, help="calibrations, each followed by --passes of each point")
    parser.add_argument("--passes", type=int, default=2)
    args = parser.parse_args()
    print(f"{conditions()}\n")
    print("| model | layers | audio | measured | predicted | error (min to max) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for size in args.sizes:
        model = make_model(size)
        calls = {(depth, audio_s): pass_of(model, depth, audio_s) for audio_s in args.audio_s for depth in args.depths}
        measured_s, predicted_s = ({point: [] for point in calls} for _ in range(2))
        took_s = []
        for _ in range(args.rounds):
            started = time.perf_counter()
            latency = calibrate_latency(model)
            took_s.append(time.perf_counter() - started)
            for point, times in time_interleaved(calls, args.passes).items():
                measured_s[point].append(statistics.median(times))
                predicted_s[point].append(latency.predict(*point))
        worst = 0.0
        for depth, audio_s in calls:
            measured, predicted = measured_s[depth, audio_s], predicted_s[depth, audio_s]
            errors = [mine / its - 1 for mine, its in zip(predicted, measured, strict=True)]
            error = statistics.median(errors)
            worst = max(worst, abs(error))
            seconds = f"{statistics.median(measured):.3f} s | {statistics.median(predicted):.3f} s"
            print(
                f"| {size} | {depth} | {audio_s:g} s | {seconds} "
                f"| {error:+.1%} ({min(errors):+.1%} to {max(errors):+.1%}) |"
            )
        print(f"\n{size}: worst error {worst:.1%}; calibration took {statistics.median(took_s):.1f} s\n")


if __name__ == "__main__":
    main()
