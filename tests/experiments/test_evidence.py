"""The harness from nothing to the page of results, on a few utterances and with models too small to learn anything."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
EXPERIMENT = {
    "name": "tiny",
    "title": "Tiny",
    "made_by": "nobody",
    "licence": "Apache-2.0",
    "model_config": {
        "model_type": "wavlm",
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "conv_dim": [8, 8],
        "conv_kernel": [400, 3],
        "conv_stride": [320, 1],
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_length": 2,
    },
    "teachers": {
        "strong": {"max_steps": 2},
        "better": {"max_steps": 2, "depth_sampling": "balanced", "kl_weight": 0.0},
    },
    "starts": {"teacher": {"learning_rate": 1e-5}, "scratch": {"learning_rate": 1e-5}},
    "training": {"max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4},
    "depths": [1, 4],
    "eval_depths": [1, 4],
    "eval_steps": 1,
    "seeds": [0],
    "reference": "layer dropping, Bernoulli 0.5",
    "shown": ["DLD, balanced (shipped)"],
    "methods": {
        "better teacher, cut": {"kind": "cut", "teacher": "better", "starts": ["teacher"]},
        "layer dropping, Bernoulli 0.5": {"depth_sampling": "bernoulli", "kl_weight": 0.0},
        "DLD, balanced (shipped)": {"depth_sampling": "balanced"},
        "DLD, balanced, better teacher": {"depth_sampling": "balanced", "teacher": "better", "starts": ["scratch"]},
        "DLD, half transcribed": {"depth_sampling": "selection", "transcribed": 0.5, "starts": ["teacher"]},
        "static, trained alone": {"kind": "static", "layers": [4], "starts": ["scratch"]},
        "static, each depth alone": {"kind": "static", "layers": [1], "starts": ["teacher"]},
        "early exit": {"kind": "early_exit", "starts": ["scratch"]},
        "static, own learning rate": {"kind": "static", "layers": [4], "starts": ["scratch"], "learning_rate": "own"},
    },
}


@pytest.fixture
def corpus(tmp_path):
    """A few utterances of the embedded corpus."""
    source = ROOT / "examples" / "corpora" / "spoken_commands"
    for split, count in {"train": 20, "validation": 2, "test": 3}.items():
        lines = (source / split / "metadata.csv").read_text().splitlines()[: count + 1]
        folder = tmp_path / "corpus" / split
        folder.mkdir(parents=True)
        for file in {line.split(",")[0] for line in lines[1:]}:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes((source / split / file).read_bytes())
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "corpus"


@pytest.fixture
def harness(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
    modules = [importlib.import_module(name) for name in ("evidence", "finished", "results")]
    for module in modules[:2]:
        monkeypatch.setattr(module, "RESULTS_DIR", tmp_path / "results")
    monkeypatch.setattr(modules[2], "IMAGES", tmp_path)
    return modules[0], modules[2]


def run(evidence, monkeypatch, path, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evidence.py", str(path), "--work", str(path.parent / "work"), *options])
    evidence.main()


def test_from_nothing_to_the_page(harness, corpus, monkeypatch, tmp_path, capsys):
    evidence, results = harness
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT | {"dataset": str(corpus)}))
    run(evidence, monkeypatch, path)
    assert "11 of 11 runs are missing" in capsys.readouterr().out
    run(evidence, monkeypatch, path, "--dry_run")
    assert "0 of 11 runs are missing" in capsys.readouterr().out

    stored = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "results" / "tiny").glob("*-seed-0.json")}
    taught = {name: sorted(result["teachers"]) for name, result in stored.items()}
    assert taught == {
        "better-teacher-cut-from-teacher-seed-0": ["better"],
        "layer-dropping-bernoulli-0-5-from-teacher-seed-0": ["strong"],
        "layer-dropping-bernoulli-0-5-from-scratch-seed-0": [],
        "dld-balanced-shipped-from-teacher-seed-0": ["strong"],
        "dld-balanced-shipped-from-scratch-seed-0": ["strong"],
        "dld-balanced-better-teacher-from-scratch-seed-0": ["better"],
        "dld-half-transcribed-from-teacher-seed-0": ["strong"],
        "static-trained-alone-4-layers-from-scratch-seed-0": [],
        "static-each-depth-alone-1-layers-from-teacher-seed-0": ["strong"],
        "early-exit-from-scratch-seed-0": [],
        "static-own-learning-rate-4-layers-from-scratch-seed-0": [],
    }
    tuned = tmp_path / "results" / "tiny" / "learning-rate-of-static-own-learning-rate-4-layers-from-scratch.json"
    errors = {float(rate): error for rate, error in json.loads(tuned.read_text())["errors"].items()}
    own = stored["static-own-learning-rate-4-layers-from-scratch-seed-0"]["arguments"]["learning_rate"]
    assert {1e-5, 2e-5} <= errors.keys() and errors[own] == min(errors.values())
    for result in stored.values():
        trained = result["kind"] != "cut"
        assert [point["step"] for point in result["evaluations"]] == ([1, 2] if trained else [])
        assert (result["train_cpu_s"] > 0) == trained
        own = next(iter(result["rates"].values()))
        assert [row["num_active_layers"] for row in own] == (
            [result["num_layers"]] if "static" in result["kind"] else [1, 4]
        )

    experiment = evidence.read_experiment(path)
    page = results.page([experiment])
    assert "11 of 11 runs are finished." in page
    assert (tmp_path / "results_tiny.png").exists()
    for method in EXPERIMENT["methods"]:
        assert f"\n| {method} |" in page

    search = json.loads(tuned.read_text())
    tuned.write_text(json.dumps(search | {"errors": search["errors"] | {"0.5": -1.0}}))
    with pytest.raises(ValueError, match=r"trained with the learning rate .*e-05, and errs least with 0.5: remove"):
        results.page([experiment])


def test_no_student_is_charged_for_its_teacher(harness, corpus, monkeypatch, tmp_path):
    evidence, _ = harness
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT | {"dataset": str(corpus)}))
    results, work = tmp_path / "results" / "tiny", tmp_path / "work" / "tiny"
    begin, begun = evidence.Stopwatch.on_train_begin, []

    def on_train_begin(*args, **kwargs):
        begun.append(
            sorted(folder.name for part in (results / "teachers", work / "posteriors") for folder in part.glob("*"))
        )
        begin(*args, **kwargs)

    monkeypatch.setattr(evidence.Stopwatch, "on_train_begin", on_train_begin)
    run(evidence, monkeypatch, path, "--only", "^dld-balanced-(shipped|better-teacher)-from-scratch")
    # the clock of each teacher starts, then that of its student
    assert begun == [[], ["strong", "strong"], ["strong", "strong"], ["better", "better", "strong", "strong"]]
    [cost] = json.loads((results / "cost-of-posteriors.json").read_text()).values()
    assert cost["cpu_s"] > 0 and cost["commit"]


@given(st.integers(-6, 6), st.integers(-6, 6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_best_value_is_found_from_anywhere(harness, start, best):
    tried = []

    def error(value: float) -> float:
        tried.append(value)
        return abs(math.log2(value) - best)

    assert harness[0].best_by_doubling(2.0**start, error) == 2.0**best
    around = {-2, -1, 1, 2} if start == best else {1, 2} if start < best else {-1, -2}
    assert {2.0 ** (best + distance) for distance in around} <= set(tried)


def test_one_training_that_went_badly_does_not_end_the_search(harness):
    errors = {1.0: 0.5, 2.0: 0.6, 4.0: 0.4, 8.0: 0.45, 16.0: 0.45}
    assert harness[0].best_by_doubling(1.0, errors.__getitem__) == 4.0


def test_data_that_are_not_made_yet(harness, monkeypatch, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT | {"dataset": "outputs/gone"}))
    with pytest.raises(SystemExit, match="There is no outputs/gone in .*It is made by: nobody"):
        run(harness[0], monkeypatch, path)


def test_an_experiment_that_is_not_there(harness, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(harness[0], monkeypatch, tmp_path / "gone.yaml")
    assert f"there is no file {tmp_path / 'gone.yaml'}; there are " in capsys.readouterr().err


def test_an_experiment_adds_to_the_methods_of_another_and_leaves_some_out(harness, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(EXPERIMENT | {"dataset": "outputs/gone"}))
    methods = {"one more": {"depth_sampling": "uniform"}, "early exit": None}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"extends": "base.yaml", "name": "more", "methods": methods}))
    experiment = harness[0].read_experiment(tmp_path / "more.yaml")
    assert experiment.name == "more" and "early exit" in EXPERIMENT["methods"]
    assert experiment.methods.keys() == {*EXPERIMENT["methods"], "one more"} - {"early exit"}
    assert experiment.methods["one more"] == {"depth_sampling": "uniform"}


def test_nothing_is_added_to_what_a_lost_teacher_taught(harness, monkeypatch, tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT | {"dataset": "outputs/gone", "closed": True}))
    with pytest.raises(SystemExit):
        run(harness[0], monkeypatch, path)
    assert f"{EXPERIMENT['name']} is closed: the teacher of its runs is lost" in capsys.readouterr().err
