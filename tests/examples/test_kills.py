"""`kill -9` or SIGTERM at any moment of the main job: the same command again ends with the undisturbed weights.

The suite kills one run in each of its phases. `HF_DLD_KILLS=20 pytest tests/examples/test_kills.py` kills as many runs
at random moments too.
"""

import gc
import json
import multiprocessing
import os
import random
import re
import runpy
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from test_run_dld_ctc import MODEL, SCRIPT, corpus, time_once

from hf_dld.distill.checkpoints import last_complete_checkpoint
from hf_dld.distill.faults import EXIT_CODE
from hf_dld.evaluation import evaluate
from hf_dld.whole_files import WRITING

__all__ = ["corpus"]  # the fixture

KILLS = int(os.environ.get("HF_DLD_KILLS", "0"))
# the server imports once what every run needs, and a run is forked from it: a process of its own, in no time
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["hf_dld.distill", "hf_dld.evaluation.metrics", "hf_dld.evaluation.plots", "hf_dld.deploy.hub", "peft.peft_model"]
)


def run_script(settings: str) -> None:
    # as in a script started by hand: workers made through a forkserver of their own never learn that the run was killed
    multiprocessing.set_start_method("fork", force=True)
    gc.freeze()
    torch.set_num_threads(1)
    evaluate.measure_latency = time_once
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
            "dataloader_num_workers": 1,
            "dataloader_persistent_workers": True,  # they outlive the loop, and must not keep the process from ending
        }
        folder.mkdir(exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        process = PROCESSES.Process(target=run_script, args=(str(folder / "run.yaml"),))
        process.start()
        return process

    return call


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """The folder of a run that nothing disturbs, and the seconds of computing that it takes."""
    folder, needed_s = tmp_path_factory.mktemp("undisturbed") / "run", 0.0
    process = start(folder)
    while process.is_alive():
        needed_s = max(needed_s, computing_s(process))
        time.sleep(0.01)
    assert process.exitcode == 0
    return folder, needed_s


def computing_s(process: multiprocessing.Process) -> float:
    """What a process has computed so far: unlike time, the same on a busy machine."""
    try:
        return sum(psutil.Process(process.pid).cpu_times()[:2])
    except psutil.NoSuchProcess:
        return 0.0


@pytest.fixture
def end_when():
    """Ends a process, when the moment has come, by a kill or by SIGTERM; none of its children outlives it for long."""
    children = []

    def call(moment: Callable[[], bool], process: multiprocessing.Process, terminate: bool = False) -> int:
        while process.is_alive() and not moment():
            time.sleep(0.001)
        with suppress(psutil.NoSuchProcess):  # it was done before
            running = psutil.Process(process.pid)
            running.suspend()  # on a busy machine the moment would be over by the time that the children are known
            children.extend(running.children(recursive=True))
            process.terminate() if terminate else process.kill()
            running.resume()
        process.join(60)
        return process.exitcode

    yield call
    assert not psutil.wait_procs(children, timeout=60)[1], "data loader workers look every 5 s who waits for them"


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
    # the two last checkpoints are kept, which need not be the same ones
    names = [[name for name in found if not re.search("depth_report_cache|checkpoint-[1-5]", name)] for found in files]
    assert names[0] == names[1], "nothing is missing, and nothing is left over"
    for model in ("model.safetensors", "teacher/model.safetensors"):
        first, second = (load_file(root / "out" / model) for root in (folder, undisturbed))
        assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first), model


def test_killed_in_each_phase(start, end_when, undisturbed, tmp_path):
    """In a step, a checkpoint, the cache of the teacher's posteriors, an evaluation, a report: one run, five times."""
    folder = tmp_path / "run"

    def exists(*patterns: str) -> Callable[[], bool]:
        return lambda: any(next(folder.glob(pattern), None) is not None for pattern in patterns)

    moments = {
        "the teacher's cache": exists(f"posteriors/*/{WRITING}*", "posteriors/*/*.safetensors"),
        "a step": exists("out/checkpoints/checkpoint-2/trainer_state.json"),
        "a checkpoint": exists(f"out/checkpoints/{WRITING}checkpoints/checkpoint-6/optimizer.pt"),
        "the evaluation": exists("out/depth_report_cache/*/errors-0.1.2"),
        "the report": exists(f"out/{WRITING}*png", "out/depth_report.png"),
    }
    for name, moment in moments.items():
        assert end_when(moment, start(folder)) == -9, name
        check_files(folder)
        if name == "a step":
            another = exists(f"out/checkpoints/{WRITING}checkpoints/checkpoint-4")
            assert end_when(another, start(folder), terminate=True) == EXIT_CODE
            assert last_complete_checkpoint(folder / "out" / "checkpoints").endswith("checkpoint-5")
    process = start(folder)
    process.join(60)
    assert process.exitcode == 0
    check_result(folder, undisturbed[0])


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_at_a_random_moment(start, end_when, undisturbed, tmp_path, seed):
    reference, needed_s = undisturbed
    folder, process = tmp_path / "run", start(tmp_path / "run")
    moment_s = random.Random(seed).uniform(0, needed_s)
    exit_code = end_when(lambda: computing_s(process) >= moment_s, process)
    newest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime)
    when = f"{moment_s:.1f} of {needed_s:.1f} s, after writing {newest.relative_to(folder)}"
    print("killed" if exit_code == -9 else f"ended with {exit_code}", when)
    check_files(folder)
    process = start(folder)
    process.join(60)
    assert process.exitcode == 0
    check_result(folder, reference)
