"""A DLD step, with a live, a cached and no teacher, beside a full-depth CTC step of the stock class: seconds.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --models wavlm-base digits_wavlm digits_conformer

Forward, backward, clipping and AdamW on the same batch of noise, in turns; loading data is not timed. The DLD steps
draw their layers by Bernoulli(0.5), both the same seeded sequence, whose mean is half of the layers. A round is one
pass over that sequence; shown are the median and the range over rounds. Feature encoders are frozen in all three (as
published checkpoints are fine-tuned) or, with --train_feature_encoder, trained in all three. On a busy machine
--cpu_time leaves out the time in which other processes ran. Prints one Markdown table.

With --teacher_forward: the table is that of the teacher's forward pass alone, computed in several ways.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import hf_dld
from hf_dld.distill.posterior_cache import CachedTeacherCollator
from hf_dld.models import DYNAMIC_CLASSES
from hf_dld.models.depth import sample_layers

EXAMPLES = Path(__file__).parents[1] / "examples"
BASE = {"model_type": "wavlm"}  # Transformers' defaults: 12 layers of 768, 94 M parameters
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def load_model(name: str) -> tuple[Any, int]:
    """A dynamic model with random weights, and its sampling rate in Hz."""
    example = {"model_config": BASE}
    if name != "wavlm-base":
        example = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    options = dict(example["model_config"])
    model_class = DYNAMIC_CLASSES[options.pop("model_type")]
    torch.manual_seed(0)
    return model_class(model_class.config_class(**options, vocab_size=32)), example.get("sampling_rate_hz", 16_000)


def make_examples(batch_size: int, seconds: float, rate_hz: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    tokens = int(seconds * 5)
    return [
        {
            "audio": random.standard_normal(int(seconds * rate_hz)).astype(np.float32),
            "labels": random.integers(4, 30, tokens).tolist(),
        }
        for _ in range(batch_size)
    ]


def seed_with_half_of_the_layers(num_layers: int, steps: int) -> int:
    def drawn(seed: int) -> int:
        return sum(len(sample_layers(num_layers, "bernoulli", seed=seed, step=step)[0]) for step in range(steps))

    return next(seed for seed in range(10_000) if drawn(seed) * 2 == num_layers * steps)


def take_step(
    trainer: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, Any], step: int, kl_weight: float = 1.0
) -> None:
    trainer.args.kl_weight = kl_weight
    trainer.state.global_step = step
    trainer.training_step(trainer.model, inputs, torch.tensor(len(inputs["labels"])))
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(name: str, args: argparse.Namespace, folder: str) -> str:
    teacher, rate_hz = load_model(name)
    student, stock = load_model(name)[0], teacher.to_static().train()
    if not args.train_feature_encoder:
        student.freeze_feature_encoder()
        stock.freeze_feature_encoder()
    processor = hf_dld.build_character_processor([LETTERS], sampling_rate_hz=rate_hz)
    large = name == "wavlm-base"
    batch_size, steps = (args.base_batch, args.base_steps) if large else (8, args.steps)
    examples = make_examples(batch_size, args.seconds, rate_hz)
    collator = hf_dld.DataCollatorCTC(processor)
    num_layers = student.config.num_hidden_layers
    options = {"use_cpu": True, "disable_tqdm": True, "seed": seed_with_half_of_the_layers(num_layers, steps)}
    ctc = hf_dld.CTCTrainer(
        model=stock, args=hf_dld.CTCTrainingArguments(folder, **options), data_collator=collator, train_dataset=examples
    )
    dld = hf_dld.DLDTrainer(
        model=student,
        teacher=teacher,
        args=hf_dld.DLDTrainingArguments(
            folder, depth_sampling="bernoulli", teacher_cache_dir=f"{folder}/cache", **options
        ),
        data_collator=collator,
        train_dataset=examples,
    )
    inputs = collator(examples)
    cached_inputs = CachedTeacherCollator(collator, dld.cache_teacher())(examples)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-5) for model in (stock, student)]
    ways = {
        "stock": lambda step: take_step(ctc, optimizers[0], inputs, step),
        "live": lambda step: take_step(dld, optimizers[1], inputs, step),
        "cached": lambda step: take_step(dld, optimizers[1], cached_inputs, step),
        "no KL": lambda step: take_step(dld, optimizers[1], inputs, step, kl_weight=0.0),
    }
    rounds = interleave(ways, steps, args.rounds, args.clock)
    cells = [name, str(batch_size), f"{num_layers / 2:g} of {num_layers}", spread([r["stock"] for r in rounds])]
    cells += [spread([r[way] / r["stock"] for r in rounds]) for way in ("live", "cached", "no KL")]
    return "| " + " | ".join(cells) + " |"


def interleave(
    ways: dict[str, Callable[[int], None]], steps: int, num_rounds: int, clock: Callable[[], float]
) -> list[dict[str, float]]:
    """Mean seconds of each way in each round. Every step is taken in all ways, another one first each time."""
    names = list(ways)
    for name in names:
        ways[name](0)
    rounds = []
    for _ in range(num_rounds):
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for step in range(steps):
            for name in names[step % len(names) :] + names[: step % len(names)]:
                started = clock()
                ways[name](step)
                seconds[name].append(clock() - started)
        rounds.append({name: sum(times) / steps for name, times in seconds.items()})
    return rounds


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def measure_teacher(name: str, args: argparse.Namespace) -> str:
    teacher, rate_hz = load_model(name)
    teacher.eval().requires_grad_(False)
    samples = torch.randn(args.base_batch if name == "wavlm-base" else 8, int(args.seconds * rate_hz))

    def timed(**contexts: Any) -> Callable[[int], None]:
        def run(step: int) -> None:
            with contexts["grad"](), torch.autocast("cpu", torch.bfloat16, enabled=contexts["bf16"]):
                teacher(contexts.get("features", samples))

        return run

    features = teacher.extract_features(samples)
    ways = {
        "no_grad": timed(grad=torch.no_grad, bf16=False),
        "inference_mode": timed(grad=torch.inference_mode, bf16=False),
        "bfloat16 autocast": timed(grad=torch.no_grad, bf16=True),
        "features given": timed(grad=torch.no_grad, bf16=False, features=features),
    }
    rounds = interleave(ways, 4, args.rounds, args.clock)
    return f"| {name} | " + " | ".join(spread([r[way] for r in rounds]) for way in ways) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["wavlm-base", "digits_wavlm", "digits_conformer"])
    parser.add_argument("--seconds", type=float, default=5.0, help="of audio in each utterance")
    parser.add_argument("--base_batch", type=int, default=1, help="utterances in a batch of wavlm-base; 8 for others")
    parser.add_argument("--base_steps", type=int, default=8, help="steps in a round, for wavlm-base")
    parser.add_argument("--steps", type=int, default=16, help="steps in a round, for the others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train_feature_encoder", action="store_true")
    parser.add_argument("--teacher_forward", action="store_true")
    parser.add_argument(
        "--cpu_time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="measure the time of this process on the processor, not that on the wall",
    )
    args = parser.parse_args()
    encoder = "" if args.teacher_forward else f"; encoder {'trained' if args.train_feature_encoder else 'frozen'}"
    print(
        f"{torch.get_num_threads()} threads, float32, torch {torch.__version__}, {args.seconds:g} s an utterance, "
        f"{args.rounds} rounds; seconds ({args.clock.__name__}): median (range){encoder}"
    )
    if args.teacher_forward:
        print(
            "| model | no_grad | inference_mode | bfloat16 autocast | features given |\n| --- | --- | --- | --- | --- |"
        )
    else:
        print("| model | batch | mean active layers | stock step, s | live / stock | cached / stock | no KL / stock |")
        print("| --- | ---: | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            print(measure_teacher(name, args) if args.teacher_forward else measure(name, args, folder), flush=True)


if __name__ == "__main__":
    main()
