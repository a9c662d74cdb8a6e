"""Does the pipeline stay right and small under load? Threads share one, and each call runs at another depth.

    OMP_NUM_THREADS=1 python benchmarks/pipeline_load.py

Runs for 5 minutes by default and prints a Markdown line: the calls, how many of them gave another text than the model
alone gives at that depth (0 is the only good number), resident memory after the warm-up and at the end, and the
throughput. The model is a small WavLM with random weights, for which every depth writes another text.
"""

import argparse
import ctypes
import gc
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import conditions, print_table
from transformers import Pipeline, pipeline

from hf_dld import build_character_processor
from hf_dld.models import DLDWavLMConfig, DLDWavLMForCTC

RATE_HZ = 16_000
SMALL = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256}
SMALL |= {"conv_dim": (32,) * 7, "feat_extract_norm": "layer", "do_stable_layer_norm": True}


@dataclass
class Load:
    """What so many calls came to. `wrong` texts are those of another depth than the call's."""

    calls: int
    wrong: int
    audio_s: float
    seconds: float
    start_mb: float
    end_mb: float


def run_load(recognise: Pipeline, clips: Sequence[np.ndarray], threads: int, seconds: float) -> Load:
    """Call one pipeline from so many threads, each call at a drawn depth; some leave the depth to the pipeline.

    Args:
        recognise: of a dynamic model; its own depth is what `num_active_layers` of its model's configuration says.
        clips: samples at 16 kHz; each is drawn for any call.
        threads: that call at the same time.
        seconds: no call begins later.

    Raises:
        ValueError: two depths give one text, so that it could not be seen which of them ran.
    """
    depths = [None, *range(1, recognise.model.config.num_hidden_layers + 1)]
    expected = [{depth: transcribe(recognise, clip, depth) for depth in depths} for clip in clips]
    if any(len(set(texts.values())) < len(depths) - 1 for texts in expected):
        raise ValueError("two depths give the same text: no test of which one ran")
    warm_up(recognise, clips, depths, threads)
    start_mb, started = resident_mb(), time.monotonic()

    def work(seed: int) -> tuple[int, int, float]:
        draw, calls, wrong, audio_s = random.Random(seed), 0, 0, 0.0
        while time.monotonic() < started + seconds:
            index, depth = draw.randrange(len(clips)), draw.choice(depths)
            wrong += call(recognise, clips[index], depth) != expected[index][depth]
            calls, audio_s = calls + 1, audio_s + len(clips[index]) / RATE_HZ
        return calls, wrong, audio_s

    with ThreadPoolExecutor(threads) as pool:
        calls, wrong, audio_s = map(sum, zip(*pool.map(work, range(threads)), strict=True))
    return Load(calls, wrong, audio_s, time.monotonic() - started, start_mb, resident_mb())


def call(recognise: Pipeline, clip: np.ndarray, depth: int | None) -> str:
    return recognise(clip, **({} if depth is None else {"num_active_layers": depth}))["text"]


def transcribe(recognise: Pipeline, clip: np.ndarray, depth: int | None) -> str:
    """Without the pipeline."""
    features = recognise.feature_extractor(clip, sampling_rate=RATE_HZ, return_tensors="pt")
    with torch.inference_mode():
        tokens = recognise.model(**features, num_active_layers=depth).logits.argmax(-1)[0]
    return recognise.tokenizer.decode(tokens)


def warm_up(recognise: Pipeline, clips: Sequence[np.ndarray], depths: Sequence[Any], threads: int) -> None:
    """Every length in every thread: the allocators keep what the largest needs."""
    with ThreadPoolExecutor(threads) as pool:
        for clip in clips:
            list(pool.map(lambda depth, clip=clip: call(recognise, clip, depth), [*depths] * threads))


def resident_mb() -> float:
    """What the process keeps: without what its allocator could give back, which varies by 25 MB from call to call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6


def make_pipeline() -> Pipeline:
    torch.manual_seed(0)
    processor = build_character_processor(["abcdefghijklmnopqrstuvwxyz"])
    config = DLDWavLMConfig(vocab_size=len(processor.tokenizer), num_active_layers=3, **SMALL)
    model = DLDWavLMForCTC(config).eval()
    for parameter in model.parameters():  # fresh weights are too small to write anything but blanks
        parameter.data += 0.1 * torch.randn_like(parameter)
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    return pipeline("automatic-speech-recognition", model=model, device="cpu", **parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=5.0)
    args = parser.parse_args()
    print(f"{conditions()}\n")
    generator = np.random.default_rng(0)
    clips = [generator.standard_normal(round(s * RATE_HZ)).astype(np.float32) for s in (1.0, 2.5, 4.0, 7.0)]
    load = run_load(make_pipeline(), clips, args.threads, 60 * args.minutes)
    print_table(
        ("threads", "minutes", "calls", "wrong", "memory at start", "at the end", "calls a second", "audio a second"),
        [
            (
                args.threads,
                f"{load.seconds / 60:.1f}",
                load.calls,
                load.wrong,
                f"{load.start_mb:.0f} MB",
                f"{load.end_mb:.0f} MB",
                f"{load.calls / load.seconds:.1f}",
                f"{load.audio_s / load.seconds:.1f} s",
            )
        ],
    )


if __name__ == "__main__":
    main()
