"""A DLD step, with a live, a cached and no teacher, beside a full-depth CTC step of the stock class: seconds.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --models wavlm-base ldasr-size

Forward, backward, clipping and AdamW on the same batch of noise, in turns; loading data is not timed. The DLD steps
draw their layers by Bernoulli(0.5), all the same seeded sequence, whose mean is half of the layers. A round is one
pass over that sequence; shown are the median ratio over the rounds and its quartiles. The last ratio has layer dropping
on both sides: the stock class then draws its own layers, anew in each round. Feature encoders are frozen
everywhere (as published checkpoints are fine-tuned) or, with --train_feature_encoder, trained everywhere. On a busy
machine --cpu_time leaves out the time in which other processes ran. Prints one Markdown table.

With --teacher_forward: the table is that of the teacher's forward pass alone, computed in several ways.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from measure import DEVICE, add_clock_option, conditions, print_table, ratio, time_interleaved

import hf_dld
from hf_dld.distill.posterior_cache import CachedTeacherCollator
from hf_dld.models import DYNAMIC_CLASSES
from hf_dld.models.depth import sample_layers

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = {
    "wavlm-base": {"model_type": "wavlm"},  # Transformers' defaults: 12 layers of 768, 94 M parameters
    "ldasr-size": {  # as the authors' earlier LDASR: 12 Conformer layers, 256 wide
        "model_type": "wav2vec2-conformer",
        "hidden_size": 256,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "conv_dim": (256, 256, 256),
        "conv_kernel": (400, 3, 3),
        "conv_stride": (160, 2, 2),
        "num_conv_pos_embeddings": 16,
    },
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def load_model(name: str) -> tuple[Any, int]:
    """A dynamic model with random weights, and its sampling rate in Hz."""
    if name in CONFIGS:
        example = {"model_config": CONFIGS[name]}
    else:
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
    trainer: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, Any], step: int, kl_weight: float
) -> None:
    trainer.args.kl_weight = kl_weight
    trainer.state.global_step = step
    trainer.training_step(trainer.model, inputs, torch.tensor(len(inputs["labels"])))
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(name: str, args: argparse.Namespace, folder: str) -> list[object]:
    teacher, rate_hz = load_model(name)
    student, stock = load_model(name)[0], teacher.to_static().train()
    teacher.to(getattr(torch, args.teacher_dtype))
    stock.config.layerdrop = 0.0  # Transformers' default skips every tenth layer
    if not args.train_feature_encoder:
        student.freeze_feature_encoder()
        stock.freeze_feature_encoder()
    processor = hf_dld.build_character_processor([LETTERS], sampling_rate_hz=rate_hz)
    batch_size = args.base_batch if name == "wavlm-base" else 8
    steps = args.base_steps if name in CONFIGS else args.steps
    examples = make_examples(batch_size, args.seconds, rate_hz)
    collator = hf_dld.DataCollatorCTC(processor)
    num_layers = student.config.num_hidden_layers
    seed = seed_with_half_of_the_layers(num_layers, steps)
    options = {"use_cpu": DEVICE == "cpu", "disable_tqdm": True, "seed": seed}
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

    def steps_of(trainer: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, Any], kl_weight: float) -> Any:
        return lambda: [take_step(trainer, optimizer, inputs, step, kl_weight) for step in range(steps)]

    ran: list[int] = []  # layers of stock steps with layer dropping, which draw more or fewer than half of them

    def stock_layerdrop() -> None:
        stock.config.layerdrop = 0.5
        hooks = [layer.register_forward_hook(lambda *_: ran.append(1)) for layer in stock.base_model.encoder.layers]
        steps_of(ctc, optimizers[0], inputs, 0.0)()
        for hook in hooks:
            hook.remove()
        stock.config.layerdrop = 0.0

    ways = {
        "stock": steps_of(ctc, optimizers[0], inputs, 0.0),
        "stock, layerdrop": stock_layerdrop,
        "live": steps_of(dld, optimizers[1], inputs, 1.0),
        "cached": steps_of(dld, optimizers[1], cached_inputs, 1.0),
        "no KL": steps_of(dld, optimizers[1], inputs, 0.0),
    }
    take_step(ctc, optimizers[0], inputs, 0, 0.0)
    take_step(dld, optimizers[1], inputs, 0, 1.0)
    seconds = time_interleaved(ways, args.rounds, warm_up=0, clock=args.clock)
    stock_s = statistics.median(seconds["stock"]) / steps
    ratios = [ratio(seconds, way, "stock") for way in ("live", "cached", "no KL")]
    ratios += [ratio(seconds, "no KL", "stock, layerdrop"), f"{len(ran) / steps / args.rounds:.1f}"]
    return [name, batch_size, f"{num_layers / 2:g} of {num_layers}", f"{stock_s:.3f}", *ratios]


def measure_teacher(name: str, args: argparse.Namespace) -> list[object]:
    teacher, rate_hz = load_model(name)
    teacher.eval().requires_grad_(False).to(DEVICE)
    samples = torch.randn(args.base_batch if name == "wavlm-base" else 8, int(args.seconds * rate_hz), device=DEVICE)
    features = teacher.extract_features(samples)

    def run(inputs: torch.Tensor, context: Any, bf16: bool = False) -> None:
        with context(), torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            teacher(inputs)

    ways = {
        "no_grad": lambda: run(samples, torch.no_grad),
        "inference_mode": lambda: run(samples, torch.inference_mode),
        "bfloat16": lambda: run(samples, torch.no_grad, bf16=True),
        "features given": lambda: run(features, torch.no_grad),
    }
    seconds = time_interleaved(ways, args.rounds, clock=args.clock)
    ratios = [ratio(seconds, way, "no_grad") for way in list(ways)[1:]]
    return [name, f"{statistics.median(seconds['no_grad']):.3f}", *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["wavlm-base", "ldasr-size", "digits_wavlm"])
    parser.add_argument("--seconds", type=float, default=5.0, help="of audio in each utterance")
    parser.add_argument("--base_batch", type=int, default=1, help="utterances in a batch of wavlm-base; 8 for others")
    parser.add_argument("--base_steps", type=int, default=3, help="steps in a round, for the large ones")
    parser.add_argument("--steps", type=int, default=8, help="steps in a round, for the others")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train_feature_encoder", action="store_true")
    parser.add_argument("--teacher_dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--teacher_forward", action="store_true")
    add_clock_option(parser)
    args = parser.parse_args()
    print(conditions())
    print(f"{args.seconds:g} s an utterance, {args.rounds} rounds, {args.clock.__name__}", end="")
    if args.teacher_forward:
        print("\n")
        header = ["model", "no_grad, s", "inference_mode", "bfloat16 autocast", "features given"]
        print_table(header, (measure_teacher(name, args) for name in args.models))
        return
    print(f", feature encoder {'trained' if args.train_feature_encoder else 'frozen'}, ", end="")
    print(f"teacher in {args.teacher_dtype}\n")
    ratios = [
        "live / stock",
        "cached / stock",
        "no KL / stock",
        "no KL / stock with LayerDrop 0.5",
        "its active layers",
    ]
    with tempfile.TemporaryDirectory() as folder:
        rows = (measure(name, args, folder) for name in args.models)
        print_table(["model", "batch", "mean active layers", "stock step, s", *ratios], rows)


if __name__ == "__main__":
    main()
