"""What do loading data and bookkeeping add to an epoch of training, beside its forward and backward passes?

    OMP_NUM_THREADS=1 python benchmarks/epoch.py [examples/quickstart.yaml examples/mini_librispeech.yaml]

Trains the dynamic student of each YAML file of examples/run_dld_ctc.py for an epoch, or --max_steps of it, on the
corpus that it names, with a teacher of random weights (the time does not depend on them). Measured are forward and
backward passes, the optimizer's steps with the clipping before them, and the rest: reading, decoding and collating
utterances, logging and whatever else the Trainer does. Filling the teacher's cache happens once and is not in it.
Prints one Markdown table.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import add_clock_option, conditions, print_table, synchronize
from transformers import TrainerCallback

import hf_dld

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import run_dld_ctc  # noqa: E402


class Stopwatch(TrainerCallback):
    """Seconds of an epoch, and of the passes, and the clipping and the optimizer's steps in it."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.epoch_s = self.optimizer_s = self.passes_s = 0.0

    def read(self) -> float:
        synchronize()
        return self.clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.read()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch_s = self.read() - self.began

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer_began = self.read()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer_s += self.read() - self.optimizer_began


class TimedTrainer(hf_dld.DLDTrainer):
    def __init__(self, *args: Any, stopwatch: Stopwatch, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stopwatch = stopwatch
        self.add_callback(stopwatch)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        began = self.stopwatch.read()
        loss = super().training_step(*args, **kwargs)
        self.stopwatch.passes_s += self.stopwatch.read() - began
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        began = self.stopwatch.read()
        norm = super()._clip_grad_norm(model)
        self.stopwatch.optimizer_s += self.stopwatch.read() - began
        return norm


def measure(path: str, args: argparse.Namespace, folder: str) -> list[object]:
    sys.argv = [sys.argv[0], path]
    model_args, data_args, _, training = run_dld_ctc.parse_arguments()
    model_config = model_args.model_config
    if model_config is None:
        raise ValueError(f"{path} has no model_config: the benchmark makes its models from one, without a download.")
    speech = hf_dld.load_speech_dataset(
        data_args.dataset, data_args.dataset_config, data_args.train_split, text_column=data_args.text_column
    )
    processor = run_dld_ctc.make_processor(model_args, data_args, speech)
    student, teacher = (run_dld_ctc.model_from_config(model_config, processor) for _ in range(2))
    frames_of = student._get_feat_extract_output_lengths
    utterances, report = hf_dld.prepare_dataset(
        speech, processor, frames_of, decode_once=data_args.decode_once, max_duration_s=data_args.max_duration_s
    )
    training = replace(
        training, output_dir=folder, num_train_epochs=1, save_strategy="no", eval_strategy="no", disable_tqdm=True
    )
    training.max_steps = args.max_steps
    if training.teacher_cache_dir is not None:
        training.teacher_cache_dir = f"{folder}/teacher_cache"
    rounds = []
    for _ in range(args.rounds):
        stopwatch = Stopwatch(args.clock)
        trainer = TimedTrainer(
            model=student,
            teacher=teacher,
            args=training,
            train_dataset=utterances,
            data_collator=hf_dld.DataCollatorCTC(processor),
            processing_class=processor,
            stopwatch=stopwatch,
        )
        trainer.train()
        rounds.append((stopwatch.passes_s, stopwatch.optimizer_s, stopwatch.epoch_s))
    shares = [(epoch_s - passes_s - optimizer_s) / passes_s for passes_s, optimizer_s, epoch_s in rounds]
    passes_s, optimizer_s, epoch_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    cells = [f"{seconds:.1f}" for seconds in (epoch_s, passes_s, optimizer_s)]
    spread = f"{statistics.median(shares):.1%} ({min(shares):.1%}–{max(shares):.1%})"
    return [Path(path).stem, trainer.state.global_step, report.kept, *cells, spread]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=[str(ROOT / "examples/quickstart.yaml")])
    parser.add_argument("--max_steps", type=int, default=-1, help="of the epoch, default: all")
    parser.add_argument("--rounds", type=int, default=2)
    add_clock_option(parser)
    args = parser.parse_args()
    print(conditions(), end="\n\n")
    header = [
        "recipe",
        "steps",
        "utterances",
        "epoch, s",
        "forward and backward, s",
        "optimizer and clipping, s",
        "rest / passes",
    ]
    with tempfile.TemporaryDirectory() as folder:
        print_table(header, (measure(path, args, f"{folder}/{index}") for index, path in enumerate(args.recipes)))


if __name__ == "__main__":
    main()
