"""A Trainer for losses of utterances: a loss that does not depend on how a batch is split."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler
from transformers.trainer_utils import has_length, seed_worker
from transformers.utils import logging

from ..data.audio import AudioError
from ..data.batching import SecondsBatchSampler, SeededLengthGroupedSampler
from .faults import NAMES, TrainingCollator
from .resumable_trainer import ResumableTrainer
from .training_args import load_whole_models

logger = logging.get_logger(__name__)


class UtteranceTrainer(ResumableTrainer, ABC):
    """What the trainers of this package share: losses that each utterance has, averaged over the global batch.

    Batches hold `input_lengths` (batch,), as the collators of `hf_dld.data` make them. The loss is the mean over the
    utterances of the global batch, however that batch is split over accumulation steps and processes: batch 1 with 4
    accumulation steps equals batch 4. (The stock Trainer multiplies the CTC loss by the accumulation steps.)

    The losses of a step are logged by name, each averaged over the utterances that had it since the last log; and so is
    `padding`, the fraction of the batches since then that was padded to the length of their longest utterances.

    With `args.max_batch_seconds` batches are bounded by seconds, not by utterances (`data.batching`): the training set
    then needs the column `duration_s`, which `prepare_dataset` adds.

    Raises:
        ValueError: `max_batch_seconds` with a training set that is streamed, or without that column; or a
            `compute_loss_func`.
    """

    # `get_batch_samples` counts the utterances of the whole accumulated batch, and `compute_loss` divides by that
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func is not called: losses here are those of each utterance, so that they do not depend "
                "on how a batch is split. For another loss, subclass the trainer and override its "
                "compute_utterance_terms."
            )
        load_whole_models()  # the teacher and the student again, after training
        self.model_accepts_loss_kwargs = False  # else the Trainer counts tokens, to divide the loss by them
        if self.args.max_batch_seconds is not None and self.train_dataset is not None:
            self.check_durations()
        if self.args.fsdp and not self.is_fsdp_enabled:
            logger.warning("FSDP shards on accelerators only: here every process holds the whole model, as with DDP.")
        self.check_shards()
        self.last_unwrapped: tuple[nn.Module, nn.Module] | None = None  # a model and what is inside of it
        self.term_sums: dict[str, torch.Tensor] = {}
        self.term_counts: dict[str, int] = {}
        self.speech_since_log, self.padded_since_log = torch.tensor(0), torch.tensor(0)  # samples

    def check_durations(self) -> None:
        if isinstance(self.train_dataset, IterableDataset | datasets.IterableDataset):
            raise ValueError(
                "max_batch_seconds needs to know all lengths beforehand, and this training set is streamed "
                f"({type(self.train_dataset).__name__}). Load it without streaming, or leave max_batch_seconds out."
            )
        columns = getattr(self.train_dataset, "column_names", None) or self.train_dataset[0].keys()
        if "duration_s" not in columns:
            raise ValueError(
                f"max_batch_seconds needs the column duration_s, which prepare_dataset adds; there are: {[*columns]}."
            )

    def check_shards(self) -> None:
        """Warn about a stream that the processes cannot share evenly."""
        dataset, processes = self.train_dataset, self.args.world_size
        if not isinstance(dataset, datasets.IterableDataset) or dataset.num_shards % processes == 0:
            return
        if dataset.num_shards < processes:
            consequence = "every process reads and decodes all of it, and uses its share"
        else:
            consequence = "processes with fewer shards repeat them more often"
        logger.warning(
            f"The training stream has {dataset.num_shards} shards for {processes} processes: {consequence}. Write the "
            "corpus in a multiple of as many shards."
        )

    def get_train_dataloader(self) -> DataLoader:
        """As in `transformers.Trainer`; with `args.max_batch_seconds`, batches of so many seconds."""
        collator = self.data_collator
        self.data_collator = TrainingCollator(collator)
        try:
            loader = self.make_train_dataloader()
        finally:
            self.data_collator = collator  # evaluation needs no names
        # workers draw their seeds from here, and not from the random numbers of training: a resumed run starts
        # persistent workers in another epoch than an undisturbed one
        seeds = torch.Generator().manual_seed(self.data_seed)
        getattr(loader, "base_dataloader", loader).generator = seeds  # Accelerate wraps it
        return loader

    def make_train_dataloader(self) -> DataLoader:
        args, dataset = self.args, self.train_dataset
        if args.max_batch_seconds is None or dataset is None:
            return super().get_train_dataloader()
        if isinstance(dataset, datasets.Dataset):
            durations_s = dataset["duration_s"]
        else:
            durations_s = read_column(dataset, "duration_s")
        batches = SecondsBatchSampler(
            durations_s,
            args.max_batch_seconds,
            seed=self.data_seed,
            epoch=self.present_epoch,
        )
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        # Accelerate deals whole batches to the processes, and some twice where that makes their numbers equal
        return self.accelerator.prepare(loader)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        args, dataset = self.args, train_dataset if train_dataset is not None else self.train_dataset
        if args.train_sampling_strategy != "group_by_length" or dataset is None or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        # the stock one draws from each process's own random state: from the second epoch on, processes would deal from
        # different orders, hearing some utterances twice and others never
        return SeededLengthGroupedSampler(
            # the order is that of the global batch, however it is split
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            lengths=self.read_lengths(dataset),
            seed=self.data_seed,
            epoch=self.present_epoch,
        )

    def read_lengths(self, dataset: Any) -> list[int]:
        """The column that `args.length_column_name` names; `ValueError` if there is none."""
        name = self.args.length_column_name
        columns = getattr(dataset, "column_names", None) or dataset[0].keys()
        if name not in columns:
            raise ValueError(
                f"train_sampling_strategy='group_by_length' needs the column {name}, which prepare_dataset adds; there "
                f"are: {[*columns]}. Or choose train_sampling_strategy='random'."
            )
        if isinstance(dataset, datasets.Dataset):
            return list(dataset[name])  # looked at several times an epoch, and a column reads every time: 1 ms
        return read_column(dataset, name)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """In the dataset's order, so that predictions can be laid beside it: the stock one groups by length too."""
        in_order = eval_dataset is not None and has_length(eval_dataset) and self.args.world_size <= 1
        return SequentialSampler(eval_dataset) if in_order else None

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        if description == "Training":
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            # the stock Trainer leaves the last utterances out of the evaluation too
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    @property
    def data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def present_epoch(self) -> int:
        return int(self.state.epoch or 0)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        self.forget_gradients()
        try:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        except AudioError as error:
            raise AudioError(
                f"{error}. It could be read before training, so a drive may be gone, or files were changed since. "
                f"The checkpoints in {self.args.output_dir} are whole: repeat the command when the audio is back.",
                error.reason,
            ) from error
        utterances = torch.tensor(sum(len(lengths_in(batch)) for batch in batches), device=device)
        return batches, self.accelerator.reduce(utterances, "sum")

    def forget_gradients(self) -> None:
        """Clear the gradients of the last step that DeepSpeed's ZeRO-3 keeps.

        It would use them again for all parameters that get no gradient in this step: those of skipped layers.
        """
        if self.is_deepspeed_enabled and hasattr(self.optimizer.optimizer, "grad_partitions_flat_buffer"):
            self.optimizer.optimizer.grad_partitions_flat_buffer.zero_()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of a micro-batch: the sum over its utterances, divided by `num_items_in_batch` utterances.

        With `return_outputs`, also what `compute_utterance_terms` returns beside the losses.
        """
        num_utterances = len(lengths_in(inputs))
        names = inputs.pop(NAMES, [])
        terms, outputs = self.compute_utterance_terms(model, inputs)
        losses = terms.pop("loss")
        loss = losses.sum()
        if num_items_in_batch is None:
            loss = loss / num_utterances
        else:
            # data-parallel training averages gradients over processes, but the sum over all utterances is wanted
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        if model.training:
            self.guard.watch(losses, names)
            self.record_terms(terms, num_utterances)
            self.record_lengths(inputs["input_lengths"])
        return (loss, outputs) if return_outputs else loss

    @abstractmethod
    def compute_utterance_terms(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The losses of each utterance by name, each (batch,), with their weighted sum as `"loss"`; and any outputs."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None: the stock estimate takes every sample of audio for a token of all layers, and takes 1 ms a step."""
        return 0

    @property
    def unwrapped_model(self) -> nn.Module:
        # Accelerate looks through all modules for compiled ones, a millisecond each of the three times a step
        if self.last_unwrapped is None or self.last_unwrapped[0] is not self.model:
            self.last_unwrapped = self.model, self.accelerator.unwrap_model(self.model)
        return self.last_unwrapped[1]

    @property
    def is_sharded(self) -> bool:
        """Whether a process may hold a part of the weights only (FSDP, DeepSpeed)."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def whole_model(self) -> nn.Module | None:
        """The trained model with all its weights, for saving. Every process has to call it.

        Returns:
            The model itself; where it is sharded, a copy on the CPU of the main process, and `None` on the others.

        Raises:
            ValueError: a sharded `PeftModel`, which `save_model` can save.
        """
        if not self.is_sharded:
            return self.unwrapped_model
        if isinstance(self.unwrapped_model, PeftModel):
            raise ValueError("A PeftModel that is sharded cannot be copied: save its adapters with save_model.")
        state_dict = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.is_world_process_zero():
            return None
        sharded = self.unwrapped_model
        model_class = next(kind for kind in type(sharded).__mro__ if not issubclass(kind, FSDPModule))
        model = model_class(sharded.config)
        model.load_state_dict(state_dict)
        return model.eval()

    def record_terms(self, terms: dict[str, torch.Tensor], num_utterances: int) -> None:
        for name, values in terms.items():
            self.term_sums[name] = self.term_sums.get(name, 0) + values.detach().sum()
            self.term_counts[name] = self.term_counts.get(name, 0) + num_utterances

    def record_lengths(self, lengths: torch.Tensor) -> None:
        self.speech_since_log = self.speech_since_log.to(lengths.device) + lengths.sum()
        self.padded_since_log = self.padded_since_log.to(lengths.device) + len(lengths) * lengths.max()

    def sum_over_processes(self, value: torch.Tensor | int) -> float:
        value = torch.as_tensor(value, dtype=torch.float32, device=self.args.device)
        return self.accelerator.reduce(value, "sum").item()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # which all processes log at the same steps
            # a process may have dropped a layer that another one has a loss of, and all must reduce the same ones
            for name in sorted(set(gather_object([*self.term_sums]))):
                total, count = self.term_sums.get(name, 0), self.term_counts.get(name, 0)
                logs[name] = self.sum_over_processes(total) / self.sum_over_processes(count)
            self.term_sums, self.term_counts = {}, {}
            if padded := self.sum_over_processes(self.padded_since_log):
                logs["padding"] = 1 - self.sum_over_processes(self.speech_since_log) / padded
            self.speech_since_log, self.padded_since_log = torch.tensor(0), torch.tensor(0)
        super().log(logs, start_time)


def read_column(dataset: Any, name: str) -> list:
    """A column of a training set that is not a table. It need not raise an `IndexError` behind its last example."""
    return [dataset[index][name] for index in range(len(dataset))]


def lengths_in(batch: dict[str, Any]) -> torch.Tensor:
    """The samples (batch,) of each utterance without padding; `ValueError` if the collator did not say."""
    if "input_lengths" not in batch:
        raise ValueError(
            f"A batch holds no input_lengths (batch,), which the losses need, only {[*batch]}: pass "
            "data_collator=hf_dld.DataCollatorCTC(processor), or add the samples of each utterance to what yours makes."
        )
    return batch["input_lengths"]
