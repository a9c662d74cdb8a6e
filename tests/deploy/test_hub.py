"""Publishing, against a Hub on this machine: what goes up, what fails and how, and what a user does next."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import make_dynamic
from hub_server import READ_TOKEN, TOKEN
from huggingface_hub import constants
from huggingface_hub.utils import _http

import hf_dld
from hf_dld.__main__ import main
from hf_dld.deploy import create_repository, make_model_card, push_to_hub
from hf_dld.evaluation import DepthReport, DepthRow

SCHEDULE = [[1], [0, 3], [0, 1, 3], [0, 1, 2, 3]]
UPLOADED = {
    "README.md",
    "config.json",
    "configuration_dld.py",
    "depth.py",
    "depth_report.json",
    "attention.py",
    "feature_encoder.py",
    "loading.py",
    "model.safetensors",
    "modeling_dld.py",
    "modeling_dld_wavlm.py",
    "pieces.py",
    "processor_config.json",
    "tokenizer_config.json",
    "vocab.json",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: a checkpoint with its report, and what belongs to the run alone."""
    folder = tmp_path_factory.mktemp("finished")
    model = make_dynamic("wavlm-stable")
    model.config.layer_selection, model.config.depth_schedule = "schedule", SCHEDULE
    model.save_pretrained(folder)
    hf_dld.build_character_processor(["abcdefghi"]).save_pretrained(folder)
    rows = [DepthRow(len(layers), layers, 1000, 0.5, 0.25) for layers in SCHEDULE]
    DepthReport("tiny", "schedule", 5, 20, "batches of 1", rows).to_json(folder / "depth_report.json")
    (folder / "run.json").write_text('{"data": {"dataset": "/home/me/secret"}}')
    (folder / ".notes.json").write_text("{}")
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json"):
        (folder / name).write_bytes(b"state")
        for below in ("checkpoints/checkpoint-2", "teacher", "teacher_checkpoints"):
            (folder / below).mkdir(parents=True, exist_ok=True)
            (folder / below / name).write_bytes(b"state")
    model.to_static().save_pretrained(folder / "teacher")
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "tiny")


@pytest.fixture
def at_once(monkeypatch):
    """Requests are repeated without waiting."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_call_uploads_all_that_a_user_needs(folder, hub):
    before = contents(folder)
    commit = push_to_hub(folder, "tiny")
    assert commit.repo_url.repo_id == "me/tiny" and commit.commit_url.startswith(f"{hub.url}/me/tiny/commit/")
    assert "depth_schedule" in (folder / "config.json").read_text()
    files = hub.repositories["me/tiny"].files
    assert set(files) == UPLOADED
    card = files.pop("README.md").decode()
    assert 'model="me/tiny"' in card and "secret" in card and "/home/me" not in card
    assert files == {name: before[name] for name in files}
    assert contents(folder) == {**before, "README.md": card.encode()}
    assert not hub.repositories["me/tiny"].private


def test_again_without_a_change_and_with_one(folder, hub):
    push_to_hub(folder, "me/tiny", private=True)
    commits = list(hub.repositories["me/tiny"].commits)
    push_to_hub(folder, "me/tiny", private=True)
    assert hub.repositories["me/tiny"].commits == commits and hub.repositories["me/tiny"].private
    make_model_card(folder, language="en").save(folder / "README.md")
    push_to_hub(folder, "me/tiny")
    assert b"language: en" in hub.repositories["me/tiny"].files["README.md"]
    assert len(hub.repositories["me/tiny"].commits) == len(commits) + 1


def test_a_branch(folder, hub, at_once):
    push_to_hub(folder, "me/tiny")
    before = dict(hub.repositories["me/tiny"].files)
    for language in ("en", "de"):
        make_model_card(folder, language=language).save(folder / "README.md")
        main(["push", str(folder), "me/tiny", "--revision", "trial"])
        trial = hub.repositories["me/tiny"].branches["trial"]
        assert set(trial) == UPLOADED and f"language: {language}".encode() in trial["README.md"]
    assert hub.repositories["me/tiny"].files == before
    hub.fail = lambda method, path: 503 if "/branch/" in path else None
    with pytest.raises(OSError, match=r"`python -m hf_dld push \S+ me/tiny --revision trial`"):
        push_to_hub(folder, "me/tiny", revision="trial")


def test_a_card_takes_the_repository_s_name_unless_edited(folder, hub):
    make_model_card(folder, license="mit").save(folder / "README.md")
    assert 'model="tiny"' in (folder / "README.md").read_text()
    push_to_hub(folder, "me/first")
    push_to_hub(folder, "me/second")
    card = (folder / "README.md").read_text()
    assert 'model="me/second"' in card and "license: mit" in card and "me/first" not in card
    (folder / "README.md").write_text(card + "\nMy own words.\n")
    push_to_hub(folder, "me/third")
    assert (folder / "README.md").read_text() == card + "\nMy own words.\n"
    assert hub.repositories["me/third"].files["README.md"].endswith(b"\nMy own words.\n")


@pytest.mark.parametrize(
    ("status", "request_", "xet"),
    [
        (0, ("POST", "preupload"), False),
        (503, ("POST", "objects/batch"), False),
        (0, ("PUT", "/lfs/"), False),
        # as installations with Xet upload, to a server that takes all files as regular ones
        (0, ("POST", "preupload"), True),
        (503, ("POST", "/commit/"), True),
    ],
)
def test_a_short_loss_of_the_connection_is_survived(folder, hub, at_once, monkeypatch, status, request_, xet):
    if xet:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        monkeypatch.setattr("hub_server.LFS_SUFFIXES", ())
    hub.fail_once(status, *request_)
    push_to_hub(folder, "tiny")
    assert set(hub.repositories["me/tiny"].files) == UPLOADED


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (0, "repos/create"),
        (503, "repos/create"),
        (500, "auth-check"),
        (503, "validate-yaml"),
        (0, "preupload"),
        (500, "objects/batch"),
        (0, "/lfs/"),
        (0, "/commit/"),
        (503, "/commit/"),
    ],
)
def test_a_long_loss_is_reported_and_repeating_finishes(folder, hub, at_once, status, request_):
    before = contents(folder)
    hub.fail = lambda method, path: status if request_ in path else None
    with pytest.raises(OSError, match="the connection was lost, or the Hub is out of order") as caught:
        push_to_hub(folder, "tiny")
    if request_ not in ("repos/create", "auth-check"):
        assert f"Could not push {folder} to me/tiny" in str(caught.value)
        assert f"`python -m hf_dld push {folder} me/tiny`" in str(caught.value)
    assert {name: content for name, content in contents(folder).items() if name != "README.md"} == before
    assert not hub.repositories.get("me/tiny", SimpleNamespace(files=None)).files, "a commit is whole or not there"
    hub.fail = lambda method, path: None
    push_to_hub(folder, "tiny")
    assert set(hub.repositories["me/tiny"].files) == UPLOADED


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("me/tiny", "hf_wrong", "the Hub does not accept the token: log in with `hf auth login`.*401"),
        ("me/tiny", READ_TOKEN, "may not write there: the name belongs to somebody else, or the token may only read"),
        ("them/taken", TOKEN, "may not write there: the name belongs to somebody else.*namespace 'them'"),
        ("them/new", TOKEN, "may not write there: the name belongs to somebody else"),
    ],
)
def test_refusals(folder, hub, repo_id, token, message):
    before = contents(folder)
    with pytest.raises(OSError, match=message):
        push_to_hub(folder, repo_id, token=token)
    assert contents(folder) == before and not hub.repositories["them/taken"].files
    push_to_hub(folder, "me/tiny")
    assert set(hub.repositories["me/tiny"].files) == UPLOADED


@pytest.mark.parametrize("repo_id", ["me/ti ny", "a/b/c", "-tiny", "tiny.git", "", "ti--ny"])
def test_impossible_names(folder, hub, repo_id):
    with pytest.raises(ValueError, match="(?i)repo.*(name|id)"):
        push_to_hub(folder, repo_id)
    assert not hub.requests


def test_private_is_not_made_public(folder, hub):
    create_repository("tiny")
    with pytest.raises(ValueError, match="me/tiny is there and public, though a private repository was asked for"):
        push_to_hub(folder, "tiny", private=True)
    assert not hub.repositories["me/tiny"].files


def test_metadata_that_the_hub_refuses(folder, hub):
    make_model_card(folder, license="nonsense").save(folder / "README.md")
    with pytest.raises(OSError, match='Invalid metadata in README.md. - "license" must be one of'):
        push_to_hub(folder, "tiny")


def test_offline(folder):
    with pytest.raises(OSError, match="Could not make or find the repository me/tiny.*offline mode is enabled"):
        push_to_hub(folder, "me/tiny")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", r"it lacks config.json\."),
        ("model.safetensors", "it lacks weights"),
        ("processor_config.json", "it lacks a processor"),
    ],
)
def test_half_a_checkpoint(folder, hub, lost, message):
    (folder / lost).unlink()
    with pytest.raises(ValueError, match=f"{folder} is not a whole checkpoint, so it is not pushed: {message}"):
        push_to_hub(folder, "tiny")
    assert not hub.requests


def test_a_card_that_cannot_be_right(folder, hub):
    report = (folder / "depth_report.json").read_text()
    (folder / "depth_report.json").write_text(report.replace('"num_active_layers": 1,', '"num_active_layers": 2,'))
    with pytest.raises(ValueError, match="depth_report.json was measured with layers .* evaluate again"):
        push_to_hub(folder, "tiny")
    assert not hub.requests


def test_no_folder(hub, tmp_path):
    with pytest.raises(ValueError, match="is not a whole checkpoint.*config.json, weights.*, a processor"):
        push_to_hub(tmp_path / "missing", "tiny")


def test_a_static_model_goes_up_without_a_card(folder, hub):
    hf_dld.build_character_processor(["abcdefghi"]).save_pretrained(folder / "teacher")
    push_to_hub(folder / "teacher", "tiny-static")
    assert "README.md" not in hub.repositories["me/tiny-static"].files


def test_the_command(folder, hub, capsys):
    main(["push", str(folder), "tiny", "--private", "--token", TOKEN])
    assert capsys.readouterr().out.startswith(f"{hub.url}/me/tiny/commit/")
    assert hub.repositories["me/tiny"].private


USER = """
import hf_dld
from transformers import pipeline
asr = pipeline("automatic-speech-recognition", model="me/tiny", num_active_layers=2)
assert asr.model.config.layer_selection == "schedule"
asr("audio.flac")
lean = hf_dld.DLDWavLMForCTC.from_pretrained("me/tiny", num_active_layers=1)
assert lean.active_layers == (1,)
"""


def test_what_was_pushed_loads(folder, hub, tmp_path):
    push_to_hub(folder, "tiny", private=True)
    (tmp_path / "user").mkdir()
    samples = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    soundfile.write(tmp_path / "user" / "audio.flac", 0.1 * samples, 16_000)
    done = subprocess.run(
        [sys.executable, "-c", USER],
        cwd=tmp_path / "user",
        env={**os.environ, **hub.environment(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert any(method == "GET" and path.endswith("/model.safetensors") for method, path in hub.requests)
