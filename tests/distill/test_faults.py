"""What ends a run early leaves a whole checkpoint, and the resumed run ends with the weights of the undisturbed one."""

import json
import logging
import multiprocessing
import os
import re
import resource
import signal
from pathlib import Path

import datasets
import pytest
import soundfile
import torch
from conftest import make_dynamic
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_dld.data.audio import AudioError
from hf_dld.distill.faults import NonFiniteLossError, TrainingStopped

from .test_trainer import NO_DROPOUT, arguments, assert_same, make_trainer, weights

NOISY = {**NO_DROPOUT, "hidden_dropout": 0.1, "mask_time_prob": 0.2, "mask_time_length": 2, "layerdrop": 0.0}


class At(TrainerCallback):
    """Calls a function once, at an event of a step."""

    def __init__(self, event: str, step: int, function):
        def call(args, state, control, **_):
            if state.global_step == step and self.function is not None:
                self.function, function = None, self.function
                function()

        self.function = function
        setattr(self, event, call)


@pytest.fixture
def files(tmp_path, dataset):
    """The dataset of noise as files in a folder."""
    folder = tmp_path / "drive"
    folder.mkdir()
    examples = []
    for index, example in enumerate(dataset):
        path = str(folder / f"{index}.wav")
        soundfile.write(path, example["audio"] * 0.1, 16_000)
        examples.append({**example, "audio": {"bytes": None, "path": path}})
    return examples


@pytest.fixture(scope="module")
def undisturbed():
    """The weights of undisturbed runs, by their options."""
    return {}


@pytest.fixture
def disturb(tmp_path, processor, files, undisturbed):
    """Trains undisturbed; then disturbed, which must raise; then resumes. Returns the error, asserts equal weights."""

    def train(folder, callback=None, resume=None, data=files, **options):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, **options}
        trainer = make_trainer(
            tmp_path / folder, processor, data, model=make_dynamic("wavlm-stable", **NOISY), **options
        )
        if callback is not None:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer)

    def call(callback, error, **options):
        described = str(sorted((name, value) for name, value in options.items() if name != "data"))
        if described not in undisturbed:
            undisturbed[described] = train("straight", **options)
        straight = undisturbed[described]
        with pytest.raises(error) as raised:
            train("disturbed", callback, **options)
        run = tmp_path / "disturbed" / "run"
        assert not [path.name for path in run.iterdir() if not path.name.startswith("checkpoint-")]
        call.after(run)
        assert_same(straight, train("disturbed", resume=True, **options))
        return raised.value

    call.after = lambda run: None
    return call


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_run_that_is_resumed_in_its_second_epoch(disturb, files, strategy):
    """The order of an epoch is found again, whatever was drawn before it."""
    options = {"data": datasets.Dataset.from_list(files), "max_steps": 6, "train_sampling_strategy": strategy}
    stop = At("on_step_begin", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    disturb(stop, TrainingStopped, per_device_train_batch_size=4, save_steps=10, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm(disturb, workers, caplog):
    """As a scheduler sends it: to all processes of the job. Nothing was to be saved before the end."""
    transformers_logging.enable_propagation()

    def terminate():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    found = []
    disturb.after = lambda run: found.extend(checkpoints(run))
    options = {"save_strategy": "no", "eval_strategy": "epoch", "dataloader_num_workers": workers}
    with caplog.at_level(logging.WARNING):
        stopped = disturb(At("on_step_begin", 1, terminate), TrainingStopped, **options)
    assert stopped.code == 75 and found == ["checkpoint-2"]
    assert "SIGTERM: training stops after step 2 of 4, with exit code 75. Repeat the command" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_of_a_program_with_its_own_handler(tmp_path, processor, dataset):
    came = []
    signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        trainer = make_trainer(tmp_path, processor, dataset, max_steps=2, enable_jit_checkpoint=True)
        trainer.add_callback(At("on_step_begin", 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        trainer.train()
        assert came and trainer.state.global_step == 2
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_drive_that_vanishes(disturb, tmp_path):
    drive, away = tmp_path / "drive", tmp_path / "away"
    disturb.after = lambda run: away.rename(drive)
    error = disturb(At("on_step_end", 2, lambda: drive.rename(away)), AudioError)
    assert "no such file. It could be read before training, so a drive may be gone" in str(error)
    assert str(drive) in str(error) and error.reason == "no such file"


class DeadlyDataset(list):
    """Kills the process that reads it, if that is a worker, while the file `order` is there."""

    order: Path

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None and self.order.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_data_loader_worker_that_dies(disturb, files, tmp_path):
    data = DeadlyDataset(files)
    data.order = tmp_path / "order"
    disturb.after = lambda run: data.order.unlink()
    error = disturb(At("on_step_end", 2, data.order.touch), RuntimeError, data=data, dataloader_num_workers=1)
    assert re.search(r"DataLoader worker \(pid.*\) (exited unexpectedly|is killed by signal: Killed)", str(error))


def test_a_disk_that_is_full(disturb):
    # the operating system refuses to let any file grow beyond this size, as it would on a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def free_some_space(run):
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpoints(run) == ["checkpoint-1", "checkpoint-2"]

    disturb.after = free_some_space
    fill = At("on_save", 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])))
    try:
        error = disturb(fill, OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "Could not write" in str(error) and "checkpoint-3: " in str(error)
    assert "The checkpoints before it are whole: free some space and repeat the command" in str(error)


def test_an_evaluation_that_is_cut_short(disturb):
    """It comes behind the checkpoint of its step, and the resumed run does without it."""

    def interrupt():
        raise KeyboardInterrupt

    disturb(At("on_prediction_step", 3, interrupt), KeyboardInterrupt, eval_strategy="epoch")


@pytest.mark.parametrize("spelling", ["run", "./run", "run//"])
def test_the_best_checkpoint_is_found_under_its_name(tmp_path, monkeypatch, processor, dataset, spelling):
    monkeypatch.chdir(tmp_path)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.3}
    trainer = make_trainer(tmp_path, processor, dataset, output_dir=spelling, save_total_limit=1, **options, **best)

    class SaveAgain(TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            control.should_save = True

    trainer.add_callback(SaveAgain())
    trainer.train()
    run = Path("run")
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    step = min(losses, key=losses.get)
    assert checkpoints(run) == [f"checkpoint-{step}"] and len(list(run.iterdir())) == 1
    state = json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint == str(run / f"checkpoint-{step}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[step], rel=1e-4)


def test_the_best_checkpoint_of_a_run_that_was_moved(tmp_path, processor, dataset):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # the first step is the best: the others undo what it learnt
    best = {"load_best_model_at_end": True, "metric_for_best_model": "first_2", "greater_is_better": True}
    options |= {**best, "save_total_limit": 2, "compute_metrics": lambda _: {"first": -trainer.state.global_step}}
    trainer = make_trainer(tmp_path, processor, dataset, output_dir=str(tmp_path / "a"), max_steps=2, **options)
    trainer.train()
    first = load_file(tmp_path / "a" / "checkpoint-1" / "model.safetensors")
    (tmp_path / "a").rename(tmp_path / "b")
    trainer = make_trainer(tmp_path, processor, dataset, output_dir=str(tmp_path / "b"), max_steps=5, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert sorted(checkpoints(tmp_path / "b")) == ["checkpoint-1", "checkpoint-5"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "b" / "checkpoint-1")
    state = json.loads((tmp_path / "b" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "b" / "checkpoint-1")
    assert_same(first, weights(trainer))


def test_sigterm_where_only_the_best_is_saved(tmp_path, processor, dataset):
    """Every step is evaluated and none after the first is better, so that none of them is saved otherwise."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "max_steps": 4}
    options |= {"metric_for_best_model": "first_2", "greater_is_better": True}
    options |= {"compute_metrics": lambda _: {"first": -trainer.state.global_step}}
    trainer = make_trainer(tmp_path, processor, dataset, **options)
    trainer.add_callback(At("on_step_begin", 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert trainer.state.global_step == 2 and checkpoints(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]


class NoNumbers:
    """A collator that makes NaN of utterances in files called bad."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples):
        batch = self.collator(examples)
        for index, example in enumerate(examples):
            if "bad" in example["audio"]["path"]:
                batch["input_values"][index] = float("nan")
        return batch


@pytest.fixture
def nan_trainer(tmp_path, processor, dataset):
    """Trains in the order of the dataset, of which the utterances of these numbers are bad, 4 to a step."""

    def make(bad, variant="wavlm-stable", **options):
        data = []
        for index, example in enumerate(dataset):
            audio = {"array": example["audio"], "sampling_rate": 16_000}
            data.append({**example, "audio": {**audio, "path": f"{'bad' if index in bad else 'good'}{index}.wav"}})
        options = {"max_steps": 3, "train_sampling_strategy": "sequential", **options}
        trainer = make_trainer(tmp_path, processor, data, variant, **options)
        trainer.data_collator = NoNumbers(trainer.data_collator)
        return trainer

    return make


@pytest.mark.parametrize("options", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}])
@pytest.mark.parametrize("variant", ["wavlm-stable", "conformer-relative"])
def test_a_step_without_a_number_changes_nothing(nan_trainer, variant, options, caplog):
    transformers_logging.enable_propagation()
    options = {"batch_norm": "updated", "variant": variant, **options}
    trainer = nan_trainer({5}, max_steps=1, **options)
    trainer.train()
    first = weights(trainer)
    trainer = nan_trainer({5}, max_steps=2, **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    # the utterances of a batch disturb each other in nothing but batch normalisation
    others = "good4.wav, bad5.wav, good6.wav, good7.wav"
    named = "bad5.wav" if variant == "wavlm-stable" or len(options) > 2 else others
    assert f"Step 2: the loss or its gradient is not finite, and the step changes no weight. Utterances: {named}." in (
        caplog.text
    )
    assert_same(first, weights(trainer))
    trainer = nan_trainer({5}, **options)
    trainer.train()
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    assert not trainer.model.lm_head.weight.equal(first["lm_head.weight"]), "and training goes on behind it"


def test_losses_that_stay_nan_end_training(nan_trainer, tmp_path):
    trainer = nan_trainer({1, 2, 6}, max_nonfinite_steps=2)
    before = weights(trainer)
    with pytest.raises(NonFiniteLossError) as raised:
        trainer.train()
    saved = tmp_path / "run" / "checkpoint-2"
    assert "not finite in 2 steps in a row, the last of them step 2." in str(raised.value)
    assert f"None of these steps changed a weight; {saved} has the weights from before." in str(raised.value)
    assert "Their utterances: bad1.wav, bad2.wav, bad6.wav." in str(raised.value)
    assert_same(before, {**before, **type(trainer.model).from_pretrained(saved).state_dict()})


def test_gradients_that_are_infinite(nan_trainer):
    trainer = nan_trainer({}, max_nonfinite_steps=1)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLossError, match=r"in 1 steps .* utterances: good0.wav, good1.wav, good2.wav"):
        trainer.train()


def test_impossible_numbers_of_steps(tmp_path):
    with pytest.raises(ValueError, match="max_nonfinite_steps must be at least 1; got 0"):
        arguments(tmp_path, max_nonfinite_steps=0)
