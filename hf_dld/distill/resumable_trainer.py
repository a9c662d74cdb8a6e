"""A Trainer that loses nothing: checkpoints are whole, and what ends a run early leaves one behind."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints

from ..whole_files import WRITING
from .faults import FaultGuard

BESIDE = f"{WRITING}checkpoints"


class ResumableTrainer(Trainer):
    """What `docs/reliability.md` promises of training: a resumed run ends with the weights of the undisturbed one.

    `checkpoint-N` is written beside and renamed, so that a folder of this name is whole. On SIGTERM, and after
    `args.max_nonfinite_steps` steps whose loss is not finite, training ends behind a checkpoint (`faults`). Evaluation
    leaves the random numbers of training as they were, so that one which a kill cuts short is not missed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.writing_beside = False
        self.guard = FaultGuard(
            self.args.max_nonfinite_steps, self.accelerator.reduce, scales_loss=self.accelerator.scaler is not None
        )
        self.add_callback(self.guard)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `transformers.Trainer`.

        Raises:
            TrainingStopped: SIGTERM came; a checkpoint is written. A `SystemExit`: uncaught, the exit code is 75.
            NonFiniteLossError: the loss stayed NaN or infinite; a checkpoint with the weights from before is written.
        """
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir, BESIDE), ignore_errors=True)  # of a run that was killed
        with self.guard.listening():
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `transformers.Trainer`; random numbers are drawn apart from those of training."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluation_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # resumed from the last checkpoint of a run that ended within an epoch: Transformers would take one more
            # step before it looks
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # whether to save, with save_strategy="best": what ends training is to leave a checkpoint behind all the same
        return super()._determine_best_metric(*args, **kwargs) or self.guard.reason is not None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.guard.gradient_norm = super()._get_grad_norm(model, grad_norm)
        return self.guard.gradient_norm

    def _get_output_dir(self, trial: Any) -> str:
        # one spelling: the best checkpoint is found by comparing paths, and pathlib drops the "./" that os.path keeps
        folder = os.path.normpath(super()._get_output_dir(trial))
        return os.path.join(folder, BESIDE) if self.writing_beside else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.push_to_hub:  # uploads from where the checkpoint was written go on in the background
            super()._save_checkpoint(model, trial)
            return
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            self.writing_beside = True
            super()._save_checkpoint(model, trial)
        except Exception as error:  # torch and safetensors have error classes of their own for a full disk
            shutil.rmtree(folder / BESIDE, ignore_errors=True)
            raise OSError(
                f"Could not write {folder / name}: {error}. The checkpoints before it are whole: free some space and "
                "repeat the command to continue."
            ) from error
        finally:
            self.writing_beside = False
        self.accelerator.wait_for_everyone()  # each process writes its random numbers
        # super() looks for the best one beside this one alone, where others of this run do not lie
        recorded = self.state.best_model_checkpoint
        best = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == folder / name or best.exists():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            if self.state.best_model_checkpoint != recorded:
                self.state.save_to_json(str(folder / BESIDE / name / TRAINER_STATE_NAME))
            if (folder / name).exists():
                os.replace(folder / name, folder / BESIDE / "replaced")
            os.replace(folder / BESIDE / name, folder / name)
            shutil.rmtree(folder / BESIDE)
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
