"""What ends a training run before its last step, behind a checkpoint: SIGTERM, or losses that are not finite."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import get_worker_info
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..data.audio import audio_name

logger = logging.get_logger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h: nothing is wrong with the command, repeat it later
NAMES = "utterances"  # of a batch, in training
NAMES_SHOWN = 20


class TrainingStopped(SystemExit):
    """SIGTERM came and a checkpoint was written; where nobody catches this, the process exits with code 75."""


class NonFiniteLossError(ArithmeticError):
    """Too many steps in a row had a loss or gradient that is no number; the weights are those before the first."""


@dataclass
class TrainingCollator:
    """A collator whose batches also hold what their utterances are called, a list of str: `utterances`.

    Its worker processes leave SIGTERM, which schedulers send to all processes, to the one that trains and ends them.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __post_init__(self) -> None:
        _end_workers_at_exit(os.getpid())

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if get_worker_info() is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        batch = self.collator(examples)
        batch[NAMES] = [audio_name(example.get("audio")) for example in examples]
        return batch


@cache
def _end_workers_at_exit(process_id: int) -> None:
    """Once in a process: workers that are still there when Python exits would be waited for, and wait themselves.

    Python ends its daemonic processes by SIGTERM, which they ignore.
    """

    def kill_workers() -> None:
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler makes an error of a worker that is killed
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()

    Finalize(None, kill_workers, exitpriority=0)  # before Python waits for them


class FaultGuard(TrainerCallback):
    """Ends training, once a checkpoint is written, on SIGTERM and when the loss stays NaN or infinite.

    A step with such a loss or gradient changes nothing: its gradient is dropped, and running statistics of batch
    normalisation are put back. All processes decide alike, which takes one small reduction in each step.

    Args:
        max_nonfinite_steps: so many such steps in a row end training.
        reduce: sums a tensor over the processes.
        scales_loss: whether a loss scaler (float16) looks after gradients that overflow; only losses count then.
    """

    def __init__(
        self, max_nonfinite_steps: int, reduce: Callable[[torch.Tensor], torch.Tensor], scales_loss: bool = False
    ):
        self.max_nonfinite_steps, self.reduce, self.scales_loss = max_nonfinite_steps, reduce, scales_loss
        self.gradient_norm: torch.Tensor | float = 0.0  # of this step, told by the trainer
        self.reset()

    def reset(self) -> None:
        self.terminated = False
        self.reason: type[BaseException] | None = None  # to end training, after the next checkpoint
        self.losses: list[tuple[torch.Tensor, list[str]]] = []  # of the utterances of this step, with their names
        self.suspects: list[list[str]] = []  # of each step in a row that was not finite
        self.statistics: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile SIGTERM ends training as described, unless the program has a handler of its own."""
        self.reset()
        try:
            own = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            if own:
                signal.signal(signal.SIGTERM, self._terminate)
        except ValueError:  # only the main thread may set handlers
            own = False
        try:
            yield
        finally:
            if own:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _terminate(self, *_: Any) -> None:
        self.terminated = True

    def watch(self, losses: torch.Tensor, names: list[str]) -> None:
        """Take notice of the losses (batch,) of a micro-batch and of what its utterances are called."""
        self.losses.append((losses.detach(), names))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.losses = []
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self.statistics = [(buffer, buffer.clone()) for buffer in buffers]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        norm = self.gradient_norm
        norm = torch.as_tensor(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        finite_losses = [losses.isfinite().all().to(args.device) for losses, _ in self.losses]
        flags = [
            ~torch.stack(finite_losses).all(),
            torch.tensor(False, device=args.device) if self.scales_loss else ~norm.isfinite().all().to(args.device),
            torch.tensor(self.terminated, device=args.device),
        ]
        # one wait for the device in a step, like the Trainer's own look at the loss
        bad_loss, bad_gradient, terminated = self.reduce(torch.stack(flags).int()).tolist()
        if terminated:
            self.reason = TrainingStopped
        if not bad_loss and not bad_gradient:
            self.suspects = []
            return
        model.zero_grad()
        for buffer, before in self.statistics:
            buffer.copy_(before)
        self.suspects.append(self._find_suspects(every_loss_is_finite=not bad_loss))
        logger.warning(
            f"Step {state.global_step + 1}: the loss or its gradient is not finite, and the step changes no weight. "
            f"Utterances: {_shown(self.suspects[-1])}."
        )
        if len(self.suspects) >= self.max_nonfinite_steps:
            self.reason = NonFiniteLossError

    def _find_suspects(self, every_loss_is_finite: bool) -> list[str]:
        """The utterances of the step whose losses are not finite; all of them where it is the gradient alone."""
        finite = [ok and not every_loss_is_finite for losses, _ in self.losses for ok in losses.isfinite().tolist()]
        names = [name for _, names in self.losses for name in names]
        return [name for name, ok in zip(names, finite, strict=False) if not ok]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_save = control.should_save or self.reason is not None
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        saved = f"{args.output_dir}/checkpoint-{state.global_step}"
        if self.reason is TrainingStopped:
            logger.warning(
                f"SIGTERM: training stops after step {state.global_step} of {state.max_steps}, with exit code "
                f"{EXIT_CODE}. Repeat the command to continue from {saved}."
            )
            raise TrainingStopped(EXIT_CODE)
        if self.reason is NonFiniteLossError:
            names = list(dict.fromkeys(name for suspects in self.suspects for name in suspects))
            raise NonFiniteLossError(
                f"The loss or its gradient was not finite in {len(self.suspects)} steps in a row, the last of them "
                f"step {state.global_step}. None of these steps changed a weight; {saved} has the weights from before. "
                f"Their utterances: {_shown(names)}. Look at these files, lower the learning rate, or allow more such "
                "steps with max_nonfinite_steps."
            )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (", ".join(names[:NAMES_SHOWN]) or "those of another process") + more
