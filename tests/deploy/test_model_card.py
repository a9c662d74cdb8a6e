"""Model cards: each as a whole against one pattern, its snippets as they stand, what is unknown stays so."""

import json
import re
import shutil
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest
import soundfile
import yaml
from conftest import NUM_LAYERS, make_dynamic, make_stock
from huggingface_hub import ModelCard

import hf_dld
from hf_dld.__main__ import main
from hf_dld.deploy import make_model_card, write_model_card
from hf_dld.distill.checkpoints import claim_output_dir
from hf_dld.evaluation import DepthReport, DepthRow, plot_depths

NUMBER = r"\d+(?:\.\d+)?"
INDICES = r"\d+(?:, \d+)*"
CELL = r"[^|\n]+"
METRIC = rf"""    - type: (?:wer|cer)
      value: {NUMBER}
      name: (?:WER|CER) \(%\), \d of \d layers
      args:
        num_active_layers: \d
"""
SNIPPET = r"```python\n(?:[^`]+\n)```"

# every card, from its first character to its last; a backslash at the end of a line joins it with the next
CARD = rf"""---
(?:base_model: [\w/-]+
)?(?:datasets:
(?:- [\w/-]+
)+)?(?:language: [a-z]+
)?library_name: transformers
(?:license: [\w.-]+
)?metrics:
- wer
- cer
(?:model_name: (?P<name>[\w/-]+)
)?pipeline_tag: automatic-speech-recognition
tags:
- hf_dld
- dynamic-depth
- layer-dropping
- ctc
- speech
- (?P<architecture>wavlm|wav2vec2-conformer)
(?:dataset_license: [^\n]+
)?(?:model-index:
- name: (?P<index_name>[\w/-]+)
  results:
  - task:
      type: automatic-speech-recognition
      name: Automatic Speech Recognition
    dataset:
      name: [\w/-]+
      type: [\w/-]+
(?:      split: test
)?    metrics:
(?:{METRIC}){{8}})?---

# (?P<title>[\w/-]+)

A (?:WavLM|Wav2Vec2-Conformer) model for speech recognition \(CTC\) that runs with any number of its \d encoder \
layers, chosen when it is loaded or at any call\. A skipped layer is the identity: it costs nothing, \
and each depth is exactly a smaller stock model of Transformers\.
(?:
Unless told otherwise it runs \d of them: {INDICES}\.
)?
\|  \|  \|
\| --- \| --- \|
\| language \| (?:unknown|[a-z]+) \|
\| licence of the model \| (?:unknown|[\w.-]+) \|
\| base model \| (?:unknown|none, trained from scratch|[\w/-]+) \|
\| training data \| (?:unknown|[\w/-]+) \|
\| licence of the training data \| {CELL} \|

## Use

With \[hf_dld\]\(#citations\), from any audio file that soundfile reads:

{SNIPPET}

Without hf_dld, by the code that this repository carries; here the samples have to be mono and at 16000 Hz:

{SNIPPET}

As a stock model of \d layers, a (?:WavLM|Wav2Vec2Conformer)ForCTC which then needs neither hf_dld nor this
repository's code:

{SNIPPET}

As an ONNX file of \d layers, for onnxruntime alone \(the export needs `pip install "hf_dld\[onnx\]"`\):

{SNIPPET}

(?:## Error rates

Unknown: no depth report was made of this checkpoint\.
|## Error rates at each depth

\|(?: {CELL} \|)+
\|(?: -+:? \|)+
(?:\| \d \| [\d.]+ M \|(?: {CELL} \|)+
){{4}}(?:
!\[Word error rate at each depth\]\(depth_report\.png\)
)?
Measured on (?:an unknown test set|the split `test` of [\w/-]+): \d+ utterances, \d+ words; greedy CTC decoding \
without a language model, in {CELL}\.
)
## Which layers run

`layer_selection` is `(?:even|first|schedule)`: [^\n]+ Counted from 0:

\| active layers \| which \|
\| --- \| --- \|
(?:\| \d \| {INDICES} \|
){{4}}
## Training

(?:Unknown: the arguments of the run are not stored beside this checkpoint\.
|\|  \|  \|
\| --- \| --- \|
\| method \| (?:layer dropping|distillation-based layer dropping \(DLD\)){CELL}\|
\| student starts from \| {CELL} \|
(?:\| teacher \| {CELL} \|
)?(?:\| trained \| {CELL} \|
)?(?:\| data \| split `train` of [\w/-]+ \|
)?(?:\| `[a-z_]+` \| [\w.-]+ \|
)+\| versions \| {CELL} \|
)
## Limits

- It writes only what its training transcripts wrote: their language, characters and spelling\.
(?:- Error rates hold for speech like the test set's; other speakers, rooms, noise and accents were not measured\.
|- How well it works is not known for any speech, and no depth is known to be useful\.
)(?:- At full depth its word error rate is {NUMBER} points (?:above|below) its teacher's on this test set\.
)?(?:- Padding changes its outputs slightly, so a batch may be transcribed otherwise than its utterances alone\.
)?
## Citations

The method \(an independent implementation of it\), the architecture, and the software:

```bibtex
(?:@misc\{{[\w-]+,
  title = \{{[^{{}}\n]+\}},
  year = \{{\d+\}},
  eprint = \{{\d+\.\d+\}},
  archivePrefix = \{{arXiv\}}
\}}

){{2,3}}@software\{{hf_dld,
  title = \{{hf_dld: dynamic-depth speech recognition for Hugging Face Transformers\}},
  author = \{{The hf_dld developers\}}
\}}
```
""".replace("\\\n", "")

RUN = {
    "model": {"teacher": None, "student": None, "train_teacher": True, "teacher_start": None, "lora_r": None},
    "data": {"dataset": "/data/corpora/beeps", "dataset_config": None, "train_split": "train", "test_split": "test"},
    "training": {
        "depth_sampling": "bernoulli",
        "layerdrop": 0.5,
        "ctc_weight": 1.0,
        "kl_weight": 1.0,
        "kl_weight_end": None,
        "kl_temperature": 1.0,
        "kl_direction": "forward",
        "batch_norm": "frozen",
        "max_steps": -1,
        "num_train_epochs": 4,
        "learning_rate": 0.002,
        "lr_scheduler_type": "linear",
        "seed": 0,
    },
}
FACTS = {
    "language": "en",
    "license": "cc-by-4.0",
    "base_model": "them/base",
    "datasets": ["them/beeps"],
    "dataset_license": "CC BY 4.0",
}
SCHEDULE = [[1], [0, 3], [0, 1, 3], [0, 1, 2, 3]]


def save(folder, variant="wavlm-stable", *, schedule=False, report=False, run=False, teacher=False):
    """A checkpoint of random weights with what a run leaves beside it."""
    model = make_dynamic(variant)
    if schedule:
        model.config.layer_selection, model.config.depth_schedule = "schedule", SCHEDULE
    if run:
        claim_output_dir(folder, RUN)
    model.save_pretrained(folder)
    hf_dld.build_character_processor(["abcdefghi"]).save_pretrained(folder)
    rows = []
    for count in range(1, NUM_LAYERS + 1):
        layers = list(model.config.resolve_active_layers(num_active_layers=count))
        rows.append(DepthRow(count, layers, 10_000 * count, 0.5 / count, 0.25 / count))
    depth_report = DepthReport("student", model.config.layer_selection, 130, 657, "batches of 16", rows)
    if report:
        depth_report.to_json(folder / "depth_report.json")
    if teacher:
        rows = [DepthRow(4, [0, 1, 2, 3], 40_000, 0.1, 0.05), *rows[:-1]]
        DepthReport("teacher", "even", 130, 657, "batches of 16", rows).to_json(folder / "teacher_depth_report.json")
        plot_depths([depth_report], folder / "depth_report.png")
    return folder


@pytest.mark.parametrize(
    ("variant", "schedule", "report", "run"),
    list(product(["wavlm-stable", "conformer-relative"], [False, True], [False, True], [False, True])),
)
def test_every_card_as_a_whole(variant, schedule, report, run, tmp_path):
    folder = save(tmp_path / "tiny", variant, schedule=schedule, report=report, run=run, teacher=report and run)
    for facts in ({}, {"repo_id": "me/tiny", **FACTS}):
        text = str(make_model_card(folder, **facts))
        match = re.fullmatch(CARD, text)
        assert match, text
        name = facts.get("repo_id", "tiny")
        assert {match["title"], match["name"] or match["index_name"]} == {name}
        assert match["architecture"] == ("wavlm" if "wavlm" in variant else "wav2vec2-conformer")
        assert ("Unknown: no depth report" in text) == (not report)
        assert ("Unknown: the arguments" in text) == (not run)
        assert "/data" not in text, "paths of this machine are nobody's business"
        assert ("unknown |" in text) == (not facts)
        for count, layers in enumerate(SCHEDULE if schedule else [[0], [0, 3], [0, 2, 3], [0, 1, 2, 3]], 1):
            assert f"| {count} | {', '.join(map(str, layers))} |" in text


def test_metadata(tmp_path):
    folder = save(tmp_path / "tiny", report=True, run=True, teacher=True)
    data = ModelCard(str(make_model_card(folder, "me/tiny", **FACTS))).data
    for name in ("language", "license", "base_model", "datasets"):
        assert data.get(name) == FACTS[name]
    values = {(result.metric_type, result.metric_args["num_active_layers"]): result for result in data.eval_results}
    assert set(values) == set(product(("wer", "cer"), range(1, NUM_LAYERS + 1)))
    assert (values["wer", 4].metric_value, values["cer", 3].metric_value) == (12.5, 8.33)
    assert values["wer", 4].dataset_type == "them/beeps" and values["wer", 4].dataset_split == "test"
    assert values["wer", 4].dataset_name == "beeps"
    text = str(make_model_card(folder))
    assert "word error rate is 2.5 points above its teacher's" in text and "| `layerdrop` | 0.5 |" in text


def test_a_report_of_another_test_set(tmp_path):
    """As `report` writes it over that of the run: called what it was measured on, and not set beside the teacher's."""
    folder = save(tmp_path / "tiny", report=True, run=True, teacher=True)
    report = DepthReport.from_json(folder / "depth_report.json")
    report.dataset, report.split, report.utterances = "chimes", "validation", 99
    report.to_json(folder / "depth_report.json")
    card = make_model_card(folder, "me/tiny", **FACTS)
    [found] = {(result.dataset_type, result.dataset_name, result.dataset_split) for result in card.data.eval_results}
    assert found == ("chimes", "chimes", "validation")
    assert "Measured on the split `validation` of chimes: 99 utterances" in str(card)
    assert "teacher: WER" not in str(card) and "its teacher's" not in str(card)
    report.dataset, report.split, report.utterances = "beeps", "test", 130  # that of the run
    report.to_json(folder / "depth_report.json")
    card = make_model_card(folder, "me/tiny", **FACTS)
    assert card.data.eval_results[0].dataset_type == "them/beeps" and card.data.eval_results[0].dataset_name == "beeps"
    assert "teacher: WER" in str(card)


def test_the_same_folder_gives_the_same_card_and_facts_once_given_stay(tmp_path):
    folder = save(tmp_path / "tiny", report=True, run=True)
    first = str(write_model_card(folder, "me/tiny", **FACTS))
    assert (folder / "README.md").read_text() == first
    assert str(write_model_card(folder)) == first
    changed = str(write_model_card(folder, language="de"))
    assert changed == first.replace("language: en", "language: de").replace("| language | en |", "| language | de |")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"kl_weight": 0.0}, "| method | layer dropping, without a teacher |"),
        ({"teacher": "self"}, "| method | layer dropping; in each step the full depth teaches the drawn one |"),
        ({"teacher": "them/wavlm"}, "| teacher | them/wavlm |"),
        ({"teacher": "/home/me/wavlm"}, "| teacher | wavlm |"),
        ({"teacher": "base"}, "| teacher | the weights under the adapters |"),
        ({"lora_r": 8}, "| trained | LoRA adapters of rank 8, merged into the weights |"),
        ({"student": "config"}, "| student starts from | random weights |"),
        ({"student": "them/wavlm"}, "| student starts from | them/wavlm |"),
        ({"max_steps": 300}, "| `max_steps` | 300 |"),
        ({"teacher_start": "them/wavlm-base"}, "| teacher | trained first, on the same data, from them/wavlm-base |"),
        ({"teacher_start": "them/wavlm-base"}, "| base model | unknown |"),
    ],
)
def test_how_it_was_trained(change, expected, tmp_path):
    folder = save(tmp_path / "tiny", run=True)
    run = json.loads((folder / "run.json").read_text())
    for part in ("model", "training"):
        run[part] |= {name: value for name, value in change.items() if name in run[part]}
    run["model"]["train_teacher"] = run["model"]["teacher"] is None
    (folder / "run.json").write_text(json.dumps(run))
    text = str(make_model_card(folder))
    assert expected in text and re.fullmatch(CARD, text), text
    assert "torch " in text and "transformers " in text


def test_snippets(tmp_path, monkeypatch):
    """In a folder where `me/NAME` is the checkpoint, instead of the Hub's repository of that name.

    Those that need no package: test_without_the_package.py.
    """
    samples = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    soundfile.write(tmp_path / "audio.flac", 0.1 * samples, 16_000)
    monkeypatch.chdir(tmp_path)
    exports = set()
    for variant in ("wavlm-stable", "conformer-relative"):
        folder = save(tmp_path / "me" / variant, variant, schedule=True)
        snippets = re.findall(r"```python\n(.*?)```", str(make_model_card(folder, f"me/{variant}")), re.DOTALL)
        with_package, _, static, onnx = snippets
        names = {}
        exec(compile(with_package, "card", "exec"), names)
        assert names["asr"].model.config.depth_schedule == SCHEDULE
        exec(compile(static, "card", "exec"), names)
        config = json.loads((tmp_path / "static" / "config.json").read_text())
        assert config["num_hidden_layers"] == 2 and not config["model_type"].startswith("dld")
        shutil.rmtree(tmp_path / "static")
        exports.add(onnx.replace(f"me/{variant}", "me/wavlm-stable"))
    [export] = exports  # the same for all but for the name: run once, for it takes 10 s
    if find_spec("onnxruntime") is not None:
        exec(compile(export, "card", "exec"), {})
        assert (tmp_path / "onnx" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"language": "English"}, "language must be an ISO 639 code such as 'en', or 'multilingual'; got 'English'"),
        ({"base_model": "a/b/c"}, "Repo id must be in the form"),
        ({"datasets": ["my data"]}, "Repo id must use alphanumeric"),
        ({"repo_id": "tiny.git"}, "Repo id cannot have '-' or '.' as the first or last|cannot end by '.git'"),
    ],
)
def test_impossible_facts(facts, message, tmp_path):
    folder = save(tmp_path / "tiny")
    with pytest.raises(ValueError, match=message):
        write_model_card(folder, **facts)
    assert not (folder / "README.md").exists()


def test_folders_without_a_dynamic_model(tmp_path):
    with pytest.raises(ValueError, match="holds no model: there is no config.json with a model_type in it"):
        make_model_card(tmp_path / "missing")
    make_stock("wavlm").save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="stock holds a wavlm model; cards are for .*dld_wavlm"):
        make_model_card(tmp_path / "stock")


def test_a_broken_file_is_named(tmp_path):
    folder = save(tmp_path / "tiny", report=True)
    (folder / "depth_report.json").write_text("{")
    with pytest.raises(ValueError, match="tiny/depth_report.json is not JSON .*; mend or remove it"):
        make_model_card(folder)


def test_a_report_of_other_layers(tmp_path):
    folder = save(tmp_path / "tiny", report=True)
    save(folder, schedule=True)
    with pytest.raises(ValueError, match=r"with layers \[0\] for 1 active layers, but config.json now selects \[1\]"):
        make_model_card(folder)


def test_somebody_s_own_words_stay(tmp_path):
    folder = save(tmp_path / "tiny")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    with pytest.raises(ValueError, match="README.md was not written by hf_dld, so it stays as it is"):
        write_model_card(folder)
    assert (folder / "README.md").read_text().endswith("Mine.\n")
    assert make_model_card(folder).data.license == "mit"


def test_the_depth_that_is_set_is_told(tmp_path):
    model = make_dynamic("wavlm")
    model.set_active_layers([1, 3])
    model.save_pretrained(tmp_path)
    assert "Unless told otherwise it runs 2 of them: 1, 3." in str(make_model_card(tmp_path))


@pytest.mark.parametrize(
    ("depth", "used", "table"),
    [
        ({"num_active_layers": 2}, "num_active_layers=2", ["| 1 | 0 |", "| 2 | 0, 3 |"]),
        ({"active_layers": [1, 2]}, "active_layers=[1, 2]", []),
    ],
)
def test_a_pruned_checkpoint(depth, used, table, tmp_path):
    save(tmp_path / "whole")
    model = hf_dld.DLDWavLMForCTC.from_pretrained(tmp_path / "whole", prune_inactive_layers=True, **depth)
    folder = tmp_path / "lean"
    model.save_pretrained(folder)
    card = str(make_model_card(folder))
    assert f'model="lean", {used})' in card and "2 of 4 layers" in card and "the others were left out (pruned)" in card
    layers = card.split("## Which layers run")[1].split("##")[0]
    assert [line for line in layers.splitlines() if line.startswith("| ") and line[2].isdigit()] == table


def test_the_command(tmp_path, capsys):
    folder = save(tmp_path / "tiny")
    main(["card", str(folder), "--repo_id", "me/tiny", "--language", "en", "--datasets", "them/a", "them/b"])
    assert capsys.readouterr().out == f"{folder}/README.md\n"
    metadata = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert metadata["datasets"] == ["them/a", "them/b"] and metadata["model_name"] == "me/tiny"


def test_a_checkpoint_without_its_code(tmp_path):
    folder = save(tmp_path / "tiny")
    assert "trust_remote_code=True" in str(make_model_card(folder))
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "trust_remote_code" not in str(make_model_card(folder))
