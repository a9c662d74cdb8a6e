"""What people load who do not have this package: static models, and checkpoints by the code that they carry.

All of it in one fresh process, since importing Transformers takes longer than what is tested.
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import VARIANTS, make_dynamic
from test_model_card import save

from hf_dld import build_character_processor
from hf_dld.deploy import export_static, make_model_card

LAYERS = (1, 2)
WITH_CODE = ("wavlm-stable", "conformer-relative")
PREAMBLE = """
import sys
sys.modules["hf_dld"] = None  # as good as not installed: importing it fails
import json, numpy, torch, traceback
from transformers import AutoModelForCTC, pipeline
samples = numpy.load("clip.npy")
errors = {}
"""
# each in names of its own; what fails is written down, and the others go on
STEP = """
try:
    exec({code!r}, dict(globals()))
except BaseException:
    errors[{name!r}] = traceback.format_exc()
"""
STATIC = """
texts = {}
for variant in %r:
    model, loading = AutoModelForCTC.from_pretrained(f"static/{variant}", output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(model).__module__.startswith("transformers."), type(model)
    with torch.no_grad():
        numpy.save(f"static/{variant}.npy", model(torch.tensor(samples)[None]).logits.numpy())
    texts[variant] = pipeline("automatic-speech-recognition", model=f"static/{variant}")(samples)["text"]
json.dump(texts, open("static/texts.json", "w"))
"""
CARRIED = """
for checkpoint in %r:
    checkpoint = f"carried/{checkpoint}"
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


@pytest.fixture(scope="module")
def processor():
    return build_character_processor(["abcdefghi"])


@pytest.fixture(scope="module")
def models():
    return {variant: make_dynamic(variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def samples():
    return np.random.default_rng(0).standard_normal(16_000).astype(np.float32)


@pytest.fixture(scope="module")
def exports(models, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without")
    return folder, {
        variant: export_static(model, folder / "static" / variant, LAYERS, processor=processor)
        for variant, model in models.items()
    }


@pytest.fixture(scope="module")
def errors(models, processor, samples, exports):
    """The tracebacks of what failed in a process without the package. In its folder `me/NAME` is a checkpoint."""
    folder, _ = exports
    np.save(folder / "clip.npy", samples)
    soundfile.write(folder / "audio.flac", 0.1 * samples, 16_000)
    steps = {"static": STATIC % [*VARIANTS], "carried": CARRIED % [*WITH_CODE]}
    for variant in WITH_CODE:
        models[variant].save_pretrained(folder / "carried" / variant)
        processor.save_pretrained(folder / "carried" / variant)
        card = str(make_model_card(save(folder / "me" / variant, variant, schedule=True), f"me/{variant}"))
        snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
        steps[f"card of {variant}"] = f"{snippet}\nassert asr.model.active_layers == (0, 3)\n"
    code = PREAMBLE + "".join(STEP.format(code=code, name=name) for name, code in steps.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        done = subprocess.run(
            [sys.executable, "-c", f"{code}\njson.dump(errors, open('errors.json', 'w'))"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "errors.json").read_text())


def logits_of(model, samples):
    with torch.no_grad():
        return model(torch.tensor(samples)[None], active_layers=LAYERS).logits


def test_static_models(errors, models, samples, processor, exports):
    assert "static" not in errors, errors["static"]
    folder, exports = exports
    texts = json.loads((folder / "static" / "texts.json").read_text())
    # the feature extractor normalizes what the pipeline hears
    heard = processor(samples, sampling_rate=16_000).input_values[0]
    for variant, model in models.items():
        export = exports[variant]
        assert export.active_layers == LAYERS and export.difference < 1e-5
        assert export.model_class == type(model).stock_class.__name__
        assert export.parameters == model.to_static(LAYERS).num_parameters()
        assert "auto_map" not in json.loads((folder / "static" / variant / "config.json").read_text())
        assert not list((folder / "static" / variant).glob("*.py"))
        np.testing.assert_allclose(np.load(folder / "static" / f"{variant}.npy"), logits_of(model, samples), atol=1e-5)
        text = processor.batch_decode(logits_of(model, heard).argmax(-1))[0]
        assert texts[variant] == text
        with torch.no_grad():
            full = model(torch.tensor(heard)[None]).logits
        assert text != processor.batch_decode(full.argmax(-1))[0], "the depths must differ"


def test_checkpoints_carry_their_code(errors, models, samples, exports):
    assert "carried" not in errors, errors["carried"]
    for variant in WITH_CODE:
        logits = np.load(exports[0] / "carried" / f"{variant}.npy")
        np.testing.assert_allclose(logits, logits_of(models[variant], samples), atol=1e-5)


@pytest.mark.parametrize("variant", WITH_CODE)
def test_snippets_of_cards(errors, variant):
    assert f"card of {variant}" not in errors, errors[f"card of {variant}"]


def test_static_models_carry_no_code(tmp_path):
    make_dynamic("wavlm").to_static(2).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
