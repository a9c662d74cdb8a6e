"""`kill -9` at any moment of the main job: the same command again ends with the weights of the undisturbed run.

The suite kills one run in each of its phases. `HF_DLD_KILLS=20 pytest tests/examples/test_kills.py` kills as many runs
at random moments too.
"""

import json
import multiprocessing
import os
import random
import runpy
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from test_run_dld_ctc import MODEL, SCRIPT, corpus

from hf_dld.whole_files import WRITING

__all__ = ["corpus"]  # the fixture

KILLS = int(os.environ.get("HF_DLD_KILLS", "0"))
# the server imports once what every run needs, and a run is forked from it: a process of its own, in no time
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["hf_dld.distill", "hf_dld.evaluation.metrics", "hf_dld.evaluation.plots", "hf_dld.deploy.hub", "peft.peft_model"]
)


def run_script(settings: str) -> None:
    torch.set_num_threads(1)
    sys.argv = [SCRIPT, settings]
    runpy.run_path(SCRIPT, run_name="__main__")


@pytest.fixture(scope="module")
def start(corpus, tmp_path_factory):
    """Starts the main job with a folder of its own to write to; returns its process."""

    def call(folder: Path) -> multiprocessing.Process:
        settings = {
            "dataset": str(corpus),
            "output_dir": str(folder / "out"),
            "teacher_cache_dir": str(folder / "posteriors"),
            "train_teacher": True,
            "teacher_epochs": 1,
            "model_config": MODEL,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "eval_strategy": "epoch",
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 2,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        folder.mkdir(exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        process = PROCESSES.Process(target=run_script, args=(str(folder / "run.yaml"),))
        process.start()
        return process

    return call


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """The folder of a run that nothing disturbs, and the seconds that it takes."""
    folder, began = tmp_path_factory.mktemp("undisturbed") / "run", time.monotonic()
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    return folder, time.monotonic() - began


def kill_when(process: multiprocessing.Process, moment: Callable[[], bool]) -> bool:
    """Whether the process was still there to be killed when the moment came."""
    while process.is_alive() and not moment():
        time.sleep(0.001)
    process.kill()
    process.join()
    return process.exitcode == -9


def check_files(folder: Path) -> None:
    """Every file under a name of its own can be read to its end."""
    for path in folder.rglob("*"):
        if path.is_dir() or any(part.startswith(WRITING) for part in path.parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert [tensors.get_tensor(name) for name in tensors.keys()]
        elif path.suffix in (".pt", ".pth", ".bin", ".npz"):
            assert zipfile.ZipFile(path).testzip() is None
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        elif path.suffix == ".md":
            assert path.read_text().endswith("\n")


def check_result(folder: Path, undisturbed: Path) -> None:
    check_files(folder)
    files = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (folder, undisturbed)]
    names = [[name for name in found if "depth_report_cache" not in name] for found in files]
    assert names[0] == names[1], "nothing is missing, and nothing is left over"
    for model in ("model.safetensors", "teacher/model.safetensors"):
        first, second = (load_file(root / "out" / model) for root in (folder, undisturbed))
        assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first), model


def test_killed_in_each_phase(start, undisturbed, tmp_path):
    """In a step, a checkpoint, the cache of the teacher's posteriors, an evaluation, a report: one run, five times."""
    folder = tmp_path / "run"

    def exists(*patterns: str) -> Callable[[], bool]:
        return lambda: any(next(folder.glob(pattern), None) is not None for pattern in patterns)

    moments = {
        "the teacher's cache": exists(f"posteriors/*/{WRITING}*", "posteriors/*/*.safetensors"),
        "a step": exists("out/checkpoints/checkpoint-2/trainer_state.json"),
        "a checkpoint": exists(f"out/checkpoints/{WRITING}checkpoints/checkpoint-4/optimizer.pt"),
        "the evaluation": exists("out/depth_report_cache/*/errors-0.1.2"),
        "the report": exists(f"out/{WRITING}*png", "out/depth_report.png"),
    }
    for name, moment in moments.items():
        assert kill_when(start(folder), moment), name
        check_files(folder)
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    check_result(folder, undisturbed[0])


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_at_a_random_moment(start, undisturbed, tmp_path, seed):
    reference, duration_s = undisturbed
    folder = tmp_path / "run"
    end = time.monotonic() + random.Random(seed).uniform(0, duration_s)
    kill_when(start(folder), lambda: time.monotonic() >= end)
    check_files(folder)
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    check_result(folder, reference)
