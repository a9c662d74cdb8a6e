"""The CoLLD job from end to end, on a few beeps without transcripts, and as a careless user would call it."""

import csv
import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import make_stock
from distill.conftest import make_encoder
from hub_server import TOKEN
from transformers import AutoFeatureExtractor, AutoModel, SeamlessM4TFeatureExtractor, Wav2Vec2FeatureExtractor

SCRIPT = str(Path(__file__).parents[2] / "examples" / "run_colld.py")
OPTIONS = {"conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Tones of one second, listed without transcripts, one of them broken and one too short."""
    root = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 3)):
        (root / split).mkdir()
        for index in range(count):
            time = np.arange(16_000) / 16_000
            samples = 0.3 * np.sin(2 * np.pi * 300 * (1 + index) * time) + 0.01 * generator.standard_normal(16_000)
            soundfile.write(root / split / f"{index}.flac", samples, 16_000)
        soundfile.write(root / split / "short.flac", samples[:4000], 16_000)
        (root / split / "broken.flac").write_text("not audio")
        names = [*range(count), "short", "broken"]
        with open(root / split / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([["file_name"], *([f"{name}.flac"] for name in names)])
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint with a CTC head, four layers."""
    folder = tmp_path_factory.mktemp("teacher")
    make_stock("wavlm-stable", **OPTIONS).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path, monkeypatch, corpus, teacher):
    """Runs the script with a YAML file of these settings."""

    def call(**settings):
        defaults = {
            "teacher": teacher,
            "dataset": str(corpus),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "save_steps": 1,
            "mask_time_length": 4,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        settings = {name: value for name, value in {**defaults, **settings}.items() if value is not None}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        monkeypatch.setattr("sys.argv", [SCRIPT, str(tmp_path / "run.yaml")])
        runpy.run_path(SCRIPT, run_name="__main__")
        return tmp_path / "out"

    return call


def test_end_to_end_and_again(run, capsys):
    output = run()
    printed = capsys.readouterr().out
    assert "teacher: 0.0" in printed and "loss on held-out speech" in printed
    student = AutoModel.from_pretrained(output)
    assert type(student).__name__ == "WavLMModel" and student.config.num_hidden_layers == 2
    assert AutoFeatureExtractor.from_pretrained(output).return_attention_mask
    card = (output / "README.md").read_text()
    assert "CoLLD-style" in card and "| 1: 2, 2: 4 |" in card and "InfoNCE" in card and "not public" in card
    weights = (output / "model.safetensors").read_bytes()
    run()  # the same command again: nothing is trained, the same comes out
    assert (output / "model.safetensors").read_bytes() == weights


def test_push_to_a_branch(run, hub, capsys):
    output = run(max_steps=1, push_to_hub=True, hub_model_id="small", hub_revision="trial", hub_token=TOKEN)
    repository = hub.repositories["me/small"]
    assert repository.branches["trial"]["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert not repository.files and f"{hub.url}/me/small/commit/" in capsys.readouterr().out


def test_a_student_of_another_kind_and_other_features(run, tmp_path):
    make_encoder("bert").save_pretrained(tmp_path / "bert")
    SeamlessM4TFeatureExtractor().save_pretrained(tmp_path / "bert")
    output = run(student=str(tmp_path / "bert"), objective="l1_cosine", eval_split="none", distill_target="hidden")
    assert type(AutoModel.from_pretrained(output)).__name__ == "Wav2Vec2BertModel"
    card = (output / "README.md").read_text()
    assert "L1 distance" in card and "not measured" in card


def test_checkpoints_in_half_precision(run, teacher, tmp_path):
    for name in ("teacher", "student"):
        AutoModel.from_pretrained(teacher, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
        Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / name)
    output = run(teacher=str(tmp_path / "teacher"), student=str(tmp_path / "student"), max_steps=1)
    assert AutoModel.from_pretrained(output).dtype == torch.float32, "less loses small updates"


def test_another_width_and_a_frozen_feature_encoder(run, teacher):
    student = AutoModel.from_pretrained(run(hidden_size=24, layers=None, freeze_feature_encoder=True))
    assert student.config.hidden_size == 24
    original = AutoModel.from_pretrained(teacher).feature_extractor.state_dict()
    for name, tensor in student.feature_extractor.state_dict().items():
        assert tensor.equal(original[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "/no/such/teacher"}, "/no/such/teacher is no folder with a checkpoint"),
        ({"teacher": "outputs/quickstart/teacher"}, "outputs/quickstart/teacher is no folder .*: `make quickstart`"),
        ({"num_hidden_layers": 5}, "num_hidden_layers must be from 1 to 4"),
        ({"layers": [3, 1]}, "layers must be strictly ascending"),
        ({"num_distilled_layers": 3}, "num_distilled_layers must be from 1 to 2"),
        ({"student": "x", "num_hidden_layers": 2}, "Give either student .* or num_hidden_layers"),
        ({"objective": "mse"}, "objective must be one of"),
        ({"dataset": "/no/such/corpus"}, "no file or folder /no/such/corpus"),
        ({"eval_split": "dev"}, "has no split 'dev'; its splits are: train, validation"),
        ({"min_duration_s": 3.0}, "no utterance is left to train or evaluate on"),
    ],
)
def test_careless_arguments(run, tmp_path, monkeypatch, settings, message):
    if settings.get("teacher", "").startswith("outputs"):
        monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(**settings)
    assert not (tmp_path / "out" / "model.safetensors").exists()
