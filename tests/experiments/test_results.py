"""The tables of the documentation are those of the stored results."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["schedule", "cascade"])
def test_schedule_page_shows_what_was_stored(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
    script = runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))
    stored = json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text())
    table = script["markdown"](stored["models"] if name == "cascade" else stored)
    page = (ROOT / "docs" / "schedule.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 10 and [row for row in rows if row not in page] == []


def test_results_page_shows_what_was_stored(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
    results = importlib.import_module("results")
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(results, "IMAGES", tmp_path)
    results.main()
    assert results.PAGE.read_text() == (ROOT / "docs" / "results.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} <= {path.name for path in ROOT.glob("docs/images/*.png")}


@pytest.fixture
def nothing_finished(monkeypatch, tmp_path):
    """The modules `finished` and `evidence`, an experiment, and the empty folder where its results are looked for."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
    finished, evidence = importlib.import_module("finished"), importlib.import_module("evidence")
    experiment = evidence.read_experiment(ROOT / "experiments" / "evidence" / "digits_wavlm.yaml")
    monkeypatch.setattr(finished, "RESULTS_DIR", tmp_path)
    folder = tmp_path / experiment.name
    folder.mkdir()
    return finished, evidence, experiment, folder


def test_students_of_different_teachers_are_not_compared(nothing_finished):
    finished, evidence, experiment, folder = nothing_finished
    runs = {run.name: run for run in evidence.plan(experiment)}

    def finish(name: str, teachers: dict[str, str]) -> None:
        stored = {"method": runs[name].method, "start": runs[name].start, "seed": 0, "teachers": teachers}
        (folder / f"{name}.json").write_text(json.dumps(stored))

    finish("layer-dropping-bernoulli-0-5-from-teacher-seed-0", {"strong": "be0e"})  # begins as it
    finish("layer-dropping-bernoulli-0-5-from-scratch-seed-0", {})
    finish("dld-balanced-weak-teacher-from-scratch-seed-0", {"weak": "f1a5"})
    finished.Finished(experiment)
    finish("dld-bernoulli-0-5-the-paper-from-scratch-seed-0", {"strong": "f1a5"})  # learns from another
    with pytest.raises(ValueError, match=r"students of different teachers \(be0e, f1a5\) do not compare"):
        finished.Finished(experiment)


def test_times_count_what_distillation_needs_beforehand(nothing_finished):
    """Posteriors and the teacher, where they are asked for; and only times of one machine are compared."""
    finished, evidence, experiment, folder = nothing_finished
    (folder / "cost-of-teacher-strong.json").write_text('{"cpu_s": 400.0}')
    reference, shipped = "layer dropping, Bernoulli 0.5", "DLD, balanced (shipped)"

    def train(method: str, seed: int, machine: str = "one", kl_weight: float = 1.0) -> None:
        points = [{"step": step, "cpu_s": step / 10, "wer_mean": 1 - step / 1000} for step in (250, 500, 1000)]
        stored = {
            "method": method, "start": "scratch", "seed": seed, "num_layers": 12, "kind": "dynamic", "teachers": {},
            "machine": machine, "arguments": {"max_steps": 1000, "kl_weight": kl_weight}, "train_cpu_s": 100.0,
            "evaluations": points,
        }  # fmt: skip
        [run] = [
            run
            for run in evidence.plan(experiment)
            if run.name.endswith(f"-from-scratch-seed-{seed}") and (run.method, run.start) == (method, "scratch")
        ]
        (folder / f"{run.name}.json").write_text(json.dumps(stored))

    for seed in range(3):
        train(reference, seed, kl_weight=0.0)
        train(shipped, seed, machine="another" if seed == 2 else "one")
    (folder / "cost-of-posteriors.json").write_text('{"one": {"cpu_s": 60.0}, "another": {"cpu_s": 1.0}}')
    done = finished.Finished(experiment)
    assert finished.budget_ratios(done, shipped, "scratch", "step") == [1.0, 1.0, 1.0]
    for counted, expected in (("training", 1.0), ("posteriors", 1.6), ("teachers", 5.6)):
        assert finished.budget_ratios(done, shipped, "scratch", "cpu_s", counted) == pytest.approx([expected] * 2)


def test_errors_of_other_utterances_are_not_paired(nothing_finished):
    finished, _, experiment, folder = nothing_finished
    methods = "layer dropping, Bernoulli 0.5", "DLD, balanced (shipped)"

    def transcribe(name: str, method: str, text: list[int]) -> None:
        stored = {"method": method, "start": "scratch", "seed": 0, "num_layers": 12, "teachers": {"strong": "be0e"}}
        stored |= {"machine": "one"}
        (folder / f"{name}.json").write_text(json.dumps(stored))
        np.savez(folder / f"{name}.npz", text=np.array(text, np.uint32), word_errors_12=np.array([1, 2], np.uint8))

    transcribe("layer-dropping-bernoulli-0-5-from-scratch-seed-0", methods[0], [7, 8])
    transcribe("dld-balanced-shipped-from-scratch-seed-0", methods[1], [7, 8])
    assert finished.Finished(experiment).interval(*methods, "scratch", 12) == "+0.0 to +0.0 %"
    transcribe("dld-balanced-shipped-from-scratch-seed-0", methods[1], [8, 7])
    with pytest.raises(ValueError, match="shipped-from-scratch-seed-0 transcribed other utterances"):
        finished.Finished(experiment).interval(*methods, "scratch", 12)
