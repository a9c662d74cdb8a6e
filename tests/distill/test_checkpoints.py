"""Interrupted runs, other runs' folders, and saves that fail."""

import json
import resource
import signal
from dataclasses import dataclass

import pytest
from conftest import make_dynamic

from hf_dld import DLDTrainingArguments
from hf_dld.distill.checkpoints import claim_output_dir, describe_run, last_complete_checkpoint, save_whole


def test_last_complete_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path / "missing") is None
    for step, state in ((5, "{}"), (20, "{}"), (100, None), (90, '{"glo')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")


def test_output_dir_of_the_same_run_is_continued(tmp_path):
    run = {"data": {"dataset": "a"}, "training": {"seed": 1, "betas": (0.9, 0.98)}}
    claim_output_dir(tmp_path / "run", run)
    (tmp_path / "run" / "model.safetensors").write_text("weights")
    claim_output_dir(tmp_path / "run", run)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(stored.pop("versions")) == {"torch", "transformers", "datasets"}
    (tmp_path / "run" / "run.json").write_text(json.dumps({**stored, "versions": {"torch": "1.0"}}))
    claim_output_dir(tmp_path / "run", run)  # another version of a library is not another run
    newer = {**run, "training": {**run["training"], "new_option": None}}
    claim_output_dir(tmp_path / "run", newer)  # an option that did not exist and is not used
    other = {"data": {"dataset": "a", "limits": {"s": 3}}, "training": {"seed": 2, "betas": (0.9, 0.98)}}
    different = r"\(data.limits: None then, {'s': 3} now; training.seed: 1 then, 2 now\)"
    with pytest.raises(ValueError, match=f"holds another run, which this one would overwrite {different}. Choose"):
        claim_output_dir(tmp_path / "run", other)


def test_output_dir_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is there and not the folder of an earlier run; choose another output_dir"):
        claim_output_dir(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_save_and_save_again(tmp_path):
    model = make_dynamic("wavlm")
    save_whole(tmp_path / "saved", model)
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    model.set_active_layers(2)
    save_whole(tmp_path / "saved", model)
    assert type(model).from_pretrained(tmp_path / "saved").num_active_layers == 2
    assert (tmp_path / "saved" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    model = make_dynamic("wavlm")
    save_whole(tmp_path / "saved", model)
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    # the operating system refuses to let any file grow beyond this size, as it would on a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="Could not save to .*saved: .*free some space and repeat the command"):
            save_whole(tmp_path / "saved", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_tells_runs_apart(tmp_path):
    @dataclass
    class Data:
        dataset: str = "corpus"

    def describe(folder="run", dataset="corpus", **options):
        options = {"output_dir": str(tmp_path / folder), "use_cpu": True, **options}
        return describe_run(DLDTrainingArguments(**options), data=Data(dataset))

    run = describe()
    assert run["data"] == {"dataset": "corpus"} and run["training"]["learning_rate"] == 5e-5
    watched = {"run_name": "mine", "disable_tqdm": True, "hub_model_id": "me/it", "hub_private_repo": True}
    assert describe("elsewhere", **watched) == run
    assert describe(ignore_data_skip=True, data_seed=7) == run  # how a stream is resumed at once
    with pytest.raises(ValueError, match="resume_from_checkpoint is 'x', but the same command goes on by itself"):
        describe(resume_from_checkpoint="x")
    assert describe(learning_rate=1e-3) != run and describe(dataset="other") != run
    json.dumps(run)
