"""The README's Python snippets run, from top to bottom, as they stand."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import make_dynamic

from hf_dld import build_character_processor, export_onnx
from hf_dld.deploy.onnx_export import EXTRA

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HAS_ONNX = all(map(find_spec, EXTRA))


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder as the quickstart leaves it, but of tiny random models, and what its training snippet needs."""
    processor = build_character_processor(["abcdefghi"])
    student = make_dynamic("wavlm-stable", num_hidden_layers=6)
    teacher = student.to_static()
    for folder, model in (("outputs/quickstart", student), ("outputs/quickstart/teacher", teacher)):
        model.save_pretrained(tmp_path / folder)
        processor.save_pretrained(tmp_path / folder)
    for folder in ("checkpoints", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    samples = np.random.default_rng(0).standard_normal(6000).astype(np.float32)
    dataset = [{"audio": samples, "labels": [3, 4], "input_length": 6000}] * 4
    return {
        "student": student,
        "teacher": teacher,
        "processor": processor,
        "train_dataset": dataset,
        "eval_dataset": dataset,
    }


def test_python_snippets(workspace):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 3
    for snippet in snippets:
        if "import onnxruntime" in snippet:
            if not HAS_ONNX:
                continue
            export_onnx("outputs/quickstart", "outputs/three_layers_onnx", 3)
        exec(compile(snippet, "README.md", "exec"), workspace)
    assert workspace["small"].config.num_hidden_layers == 2
    assert type(workspace["small"]).__name__ == "WavLMForCTC"
    if HAS_ONNX:
        expected = workspace["asr"]("examples/corpora/spoken_commands/test/test_0000.ogg")["text"]
        assert len(expected) > 5 and workspace["text"] == expected
    workspace["trainer"].args.max_steps = 1
    workspace["trainer"].args.train_sampling_strategy = "random"
    assert workspace["trainer"].train().global_step == 1


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_its_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
