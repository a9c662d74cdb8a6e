"""A saved checkpoint carries its code: a fresh process without this package loads it with trust_remote_code."""

import json
import subprocess
import sys

import numpy as np
import torch
from conftest import make_dynamic

from hf_dld import build_character_processor

LOADER = """
import sys
sys.modules["hf_dld"] = None  # as good as not installed: importing it fails
import numpy, torch
from transformers import AutoModelForCTC, pipeline
samples = numpy.load("clip.npy")
for checkpoint in sys.argv[1:]:
    model = AutoModelForCTC.from_pretrained(checkpoint, trust_remote_code=True, num_active_layers=2)
    assert model.active_layers == (0, 3), model.active_layers
    with torch.no_grad():
        logits = model(torch.tensor(samples)[None], active_layers=[1, 2]).logits
    numpy.save(f"{checkpoint}.npy", logits.numpy())
    pruned = AutoModelForCTC.from_pretrained(
        checkpoint, trust_remote_code=True, active_layers=[1, 2], prune_inactive_layers=True
    )
    pruned.save_pretrained(f"{checkpoint}-pruned")
    pruned = AutoModelForCTC.from_pretrained(f"{checkpoint}-pruned", trust_remote_code=True)
    assert pruned.config.present_layers == (1, 2), pruned.config
    with torch.no_grad():
        assert torch.equal(pruned(torch.tensor(samples)[None]).logits, logits)
    recognise = pipeline(
        "automatic-speech-recognition",
        model=checkpoint,
        trust_remote_code=True,
        model_kwargs={"num_active_layers": 3},
    )
    assert recognise.model.active_layers == (0, 2, 3)
    assert isinstance(recognise(samples)["text"], str)
"""


def test_without_the_package(tmp_path, monkeypatch):
    models = {variant: make_dynamic(variant) for variant in ("wavlm-stable", "conformer-relative")}
    samples = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    np.save(tmp_path / "clip.npy", samples)
    for variant, model in models.items():
        model.save_pretrained(tmp_path / variant)
        build_character_processor(["abcdefghi"]).save_pretrained(tmp_path / variant)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *models], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for variant, model in models.items():
        with torch.no_grad():
            expected = model(torch.tensor(samples)[None], active_layers=[1, 2]).logits
        np.testing.assert_allclose(np.load(tmp_path / f"{variant}.npy"), expected, atol=1e-5)


def test_static_models_carry_no_code(tmp_path):
    make_dynamic("wavlm").to_static(2).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
