"""The main job from end to end, on a corpus of a few beeps, and as a careless user would call it."""

import csv
import json
import logging
import runpy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import make_dynamic
from hub_server import TOKEN
from launching import launch
from peft import PeftModel
from transformers import pipeline

import hf_dld
from hf_dld.data import load_processor
from hf_dld.evaluation.cost import measure_latency

SCRIPT = str(Path(__file__).parents[2] / "examples" / "run_dld_ctc.py")
MODEL = {
    "model_type": "wavlm",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [16, 16],
    "conv_kernel": [400, 5],
    "conv_stride": [160, 3],
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Beeps: three words, each a tone of its own. With a missing, a broken and an empty file."""
    root = tmp_path_factory.mktemp("corpus")
    tones = {"low": 300, "mid": 700, "high": 1500}
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 4), ("test", 4)):
        (root / split).mkdir()
        rows = []
        for index in range(count):
            words = list(generator.choice(list(tones), 2))
            time = np.arange(4000) / 16_000
            samples = np.concatenate([np.sin(2 * np.pi * tones[word] * time) for word in words])
            soundfile.write(root / split / f"{index}.flac", 0.3 * samples, 16_000)
            rows.append([f"{index}.flac", " ".join(words)])
        (root / split / "broken.flac").write_text("not audio")
        (root / split / "empty.flac").write_bytes(b"")
        rows += [["broken.flac", "low"], ["empty.flac", "low"], ["missing.flac", "low"], ["0.flac", ""]]
        with open(root / split / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([["file_name", "transcription"], *rows])
    return root


def write_settings(folder: Path, corpus: Path, **settings: Any) -> Path:
    """A YAML file of these settings, and of those that make the job quick."""
    defaults = {
        "dataset": str(corpus),
        "output_dir": str(folder / "out"),
        "train_teacher": True,
        "model_config": MODEL,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    settings = {name: value for name, value in {**defaults, **settings}.items() if value is not None}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def time_once(model: Any, processor: Any, lengths: Sequence[int], layer_sets: Sequence[Sequence[int]]) -> np.ndarray:
    """What the first of the timed utterances takes, for all of them: it is not the timings that are tested here."""
    return np.repeat(measure_latency(model, processor, lengths[:1], layer_sets), len(lengths), axis=0)


@pytest.fixture
def run(tmp_path, monkeypatch, corpus):
    """Runs the script with a YAML file of these settings."""
    monkeypatch.setattr("hf_dld.evaluation.evaluate.measure_latency", time_once)

    def call(**settings):
        monkeypatch.setattr("sys.argv", [SCRIPT, str(write_settings(tmp_path, corpus, **settings))])
        runpy.run_path(SCRIPT, run_name="__main__")
        return tmp_path / "out"

    call.folder = tmp_path / "out"
    return call


def test_two_processes(corpus, tmp_path):
    """From end to end: they share the work, one of them writes, and the error rates are those of a single process."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}
    settings |= {"eval_strategy": "steps", "eval_steps": 2}
    printed = launch(SCRIPT, write_settings(tmp_path, corpus, **settings))
    assert printed.count("reference:") == 1
    output = tmp_path / "out"
    report = json.loads((output / "depth_report.json").read_text())
    assert len(list(output.glob("depth_report_cache/*/part-1-of-2"))) == 2, "of the teacher and of the student"
    student, processor = hf_dld.DLDWavLMForCTC.from_pretrained(output), load_processor(output)
    test, _ = hf_dld.prepare_dataset(
        hf_dld.load_speech_dataset(corpus, split="test"), processor, student._get_feat_extract_output_lengths
    )
    alone = hf_dld.evaluate_depths(student, test, processor, batch_size=3, timed_utterances=0)
    assert [(row["wer"], row["cer"]) for row in report["rows"]] == [(row.wer, row.cer) for row in alone.rows]
    assert json.loads((output / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize("cached", [False, True])
def test_end_to_end_and_again(run, corpus, tmp_path, cached, capsys):
    settings: dict[str, Any] = {"model_config": MODEL}
    if cached:
        conformer = {**MODEL, "model_type": "wav2vec2-conformer", "conv_depthwise_kernel_size": 5}
        settings = {"model_config": conformer, "teacher_cache_dir": str(tmp_path / "posteriors"), "decode_once": True}
    output = run(**settings)
    printed = capsys.readouterr().out
    assert "| active layers | parameters | teacher, cut: WER | teacher, cut: CER | dynamic student: WER" in printed
    assert "reference:" in printed and " 1 layers:" in printed and " 3 layers:" in printed
    for name in ("depth_report.json", "depth_report.md", "depth_report.png", "teacher/model.safetensors", "README.md"):
        assert (output / name).stat().st_size > 0
    report = json.loads((output / "depth_report.json").read_text())
    assert (report["dataset"], report["split"]) == (corpus.name, "test")
    assert report["utterances"] == 4, "broken, empty, missing and untranscribed utterances are left out"
    recognise = pipeline("automatic-speech-recognition", model=str(output), num_active_layers=2)
    assert isinstance(recognise(str(corpus / "test" / "0.flac"))["text"], str)

    weights = (output / "model.safetensors").read_bytes()
    run(**settings)  # the same command again: nothing is trained, the same comes out
    assert len(list(tmp_path.glob("posteriors/*/*.safetensors"))) == cached
    assert (output / "model.safetensors").read_bytes() == weights
    again = json.loads((output / "depth_report.json").read_text())
    assert [row["wer"] for row in again["rows"]] == [row["wer"] for row in report["rows"]]


def test_push_to_hub(run, hub, capsys):
    settings = {"push_to_hub": True, "hub_model_id": "beeps", "hub_private_repo": True, "hub_revision": "trial"}
    settings["max_steps"] = 1
    with pytest.raises(OSError, match="Could not make or find the repository beeps.*does not accept the token"):
        run(**settings, hub_token="hf_wrong")  # before any work
    with pytest.raises(ValueError, match="language must be an ISO 639 code such as 'en'"):
        run(**settings, hub_token=TOKEN, language="English")
    hub.fail = lambda method, path: 503 if "/commit/" in path else None
    facts = {"hub_token": TOKEN, "language": "en", "dataset_license": "CC0"}
    repeat = r"`python -m hf_dld push \S+/out me/beeps --revision trial`"
    with pytest.raises(OSError, match=f"the Hub is out of order.*{repeat}"):
        run(**settings, **facts)
    weights = (output := run.folder / "model.safetensors").read_bytes()
    hub.fail = lambda method, path: None
    run(**settings, **facts)  # the same command again: nothing is trained, all is pushed
    assert output.read_bytes() == weights
    repository = hub.repositories["me/beeps"]
    files = repository.branches["trial"]
    assert repository.private and not repository.files and files["model.safetensors"] == weights
    assert f"{hub.url}/me/beeps/commit/{repository.commits[-1]}" in capsys.readouterr().out
    for name in ("config.json", "modeling_dld_wavlm.py", "processor_config.json", "depth_report.json"):
        assert files[name] == (run.folder / name).read_bytes()
    assert not [path for path in files if "/" in path or path == "run.json"]
    card = files["README.md"].decode()
    assert 'model="me/beeps"' in card and "language: en" in card and "training data | CC0 |" in card
    assert "none, trained from scratch" in card and str(run.folder.parent) not in card


def test_a_given_teacher_and_student(run, corpus, tmp_path):
    processor = hf_dld.build_character_processor(["low mid high"])
    config = {"vocab_size": len(processor.tokenizer), "conv_stride": (5, 8, 4)}
    teacher = make_dynamic("wavlm-stable", **config).to_static()
    teacher.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    options = {"train_teacher": None, "model_config": None, "teacher": str(tmp_path / "teacher"), "max_steps": 2}
    output = run(**options, keep_untranscribed=True, freeze_feature_encoder=True)
    student = hf_dld.DLDWavLMForCTC.from_pretrained(output)
    for name, tensor in teacher.wavlm.feature_extractor.state_dict().items():
        assert student.wavlm.feature_extractor.state_dict()[name].equal(tensor)
    assert not student.lm_head.weight.equal(teacher.lm_head.weight)


def test_a_student_without_a_head_learns_the_teacher_s_tokens(run, tmp_path):
    processor = hf_dld.build_character_processor(["low mid high"])
    teacher = make_dynamic("wavlm-stable", vocab_size=len(processor.tokenizer), conv_stride=(5, 8, 4))
    teacher.set_active_layers(1)
    for name, model in (("teacher", teacher), ("encoder", make_dynamic("wavlm-stable", conv_stride=(5, 8, 4)).wavlm)):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    options = {"train_teacher": None, "model_config": None, "max_steps": 1, "student": str(tmp_path / "encoder")}
    output = run(**options, teacher=str(tmp_path / "teacher"))
    assert hf_dld.DLDWavLMForCTC.from_pretrained(output).config.vocab_size == len(processor.tokenizer)
    loaded = runpy.run_path(SCRIPT)["load_teacher"](str(tmp_path / "teacher"))
    assert loaded.num_active_layers == loaded.config.num_hidden_layers, "a teacher teaches what its full depth says"


def test_precisions(run, tmp_path):
    """The teacher has the one that is asked for, or that it was saved in; a student is trained in float32."""
    processor = hf_dld.build_character_processor(["low mid high"])
    saved = make_dynamic("wavlm-stable", vocab_size=len(processor.tokenizer), conv_stride=(5, 8, 4))
    saved.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    options = {"train_teacher": None, "model_config": None, "max_steps": 1}
    output = run(**options, teacher=str(tmp_path / "half"))
    assert hf_dld.DLDWavLMForCTC.from_pretrained(output).dtype == torch.float32
    script = runpy.run_path(SCRIPT)
    saved.wavlm.save_pretrained(tmp_path / "headless")
    started = script["ModelArguments"](train_teacher=True, teacher_start=str(tmp_path / "headless"))
    assert script["untrained_teacher"](started, processor).dtype == torch.float32
    load_teacher = script["load_teacher"]
    assert load_teacher(str(tmp_path / "half")).dtype == torch.bfloat16
    assert load_teacher(str(tmp_path / "half"), "float32").dtype == torch.float32


def test_settings_that_belong_together_reach_the_teacher_together(run, tmp_path):
    """And without KL, a cache for posteriors is of no use, but no mistake."""
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}}
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "wer_mean"}
    output = run(kl_weight=0.0, teacher_cache_dir=str(tmp_path / "cache"), max_steps=1, **schedule, **best)
    assert (output / "model.safetensors").exists() and not (tmp_path / "cache").exists()


def test_kl_that_begins_at_nothing(run):
    output = run(kl_weight=0.0, kl_weight_end=1.0, max_steps=2)
    assert "| teacher | trained first, on the same data |" in (output / "README.md").read_text()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A stock CTC checkpoint with its processor, and beside it a pre-trained encoder, without head and tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    processor = hf_dld.build_character_processor(["low mid high"])
    model = make_dynamic("wavlm-stable", vocab_size=len(processor.tokenizer), conv_stride=(5, 8, 4)).to_static()
    for name, parts in (("ctc", (model, processor)), ("headless", (model.wavlm, processor.feature_extractor))):
        for part in parts:
            part.save_pretrained(root / name)
    return root / "ctc"


LORA = {"train_teacher": None, "model_config": None, "lora_r": 2, "max_steps": 2, "learning_rate": 0.01}


def test_lora_from_end_to_end(run, corpus, checkpoint, capsys):
    output = run(**LORA, teacher=str(checkpoint))
    assert "teacher, cut: WER" in capsys.readouterr().out
    start = hf_dld.DLDWavLMForCTC.from_pretrained(checkpoint)
    merged = hf_dld.DLDWavLMForCTC.from_pretrained(output).state_dict()
    changed = {name for name, tensor in merged.items() if not tensor.equal(start.state_dict()[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    merged_again = PeftModel.from_pretrained(start, output / "adapter").merge_and_unload().state_dict()
    assert all(tensor.equal(merged_again[name]) for name, tensor in merged.items())
    texts = {
        pipeline("automatic-speech-recognition", model=str(folder), num_active_layers=2)(
            str(corpus / "test" / "0.flac")
        )["text"]
        for folder in (output, output / "adapter")
    }
    assert len(texts) == 1

    weights = (output / "model.safetensors").read_bytes()
    run(**LORA, teacher=str(checkpoint))  # the same command again
    assert (output / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("a", None, ("a", "base")),
        (None, "a", ("a", "base")),
        ("a", "a", ("a", "base")),
        ("a", "base", ("a", "base")),
        ("a", "b", ("a", "b")),
        ("a", "self", ("a", "self")),
    ],
)
def test_lora_is_taught_by_the_weights_under_it(student, teacher, expected):
    """No second model is loaded, whichever name the checkpoint was given under."""
    settled = runpy.run_path(SCRIPT)["ModelArguments"](student=student, teacher=teacher, lora_r=2)
    assert (settled.student, settled.teacher) == expected


def test_lora_with_another_teacher_and_a_new_head(run, checkpoint):
    headless = str(checkpoint.parent / "headless")
    with pytest.raises(ValueError, match="headless has no CTC head, so that it cannot teach"):
        run(**LORA, student=headless)
    undistilled = run(**LORA, student=headless, kl_weight=0.0)
    assert "| method | layer dropping, without a teacher |" in (undistilled / "README.md").read_text()
    shutil.rmtree(undistilled)
    options = {"lora_target_modules": ["q_proj", "output_dense"], "lora_alpha": 3.0, "lora_dropout": 0.1}
    output = run(**LORA, **options, student=headless, teacher=str(checkpoint), depth_sampling="sandwich")
    saved = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["lm_head"] and set(saved["target_modules"]) == {"q_proj", "output_dense"}
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (2, 3.0, 0.1)
    merged = hf_dld.DLDWavLMForCTC.from_pretrained(output)
    # what the README says of adapters beside a new head, of whose size the base knows nothing
    vocabulary = {"vocab_size": merged.config.vocab_size, "pad_token_id": merged.config.pad_token_id}
    adapted = hf_dld.DLDWavLMForCTC.from_pretrained(output / "adapter", **vocabulary)
    speech = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapted.eval()(speech).logits, merged.eval()(speech).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_r": 0}, "lora_r must be an integer of at least 1.*; got 0"),
        ({"lora_r": -1}, "lora_r must be an integer of at least 1.*; got -1"),
        ({"lora_alpha": -1.0}, "lora_alpha must be above 0.*; got -1"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1; got 1.0"),
        ({"lora_target_modules": ["linear_q"]}, "has no module called linear_q; its encoder layers have .*q_proj"),
        ({"train_teacher": True}, "lora_r adapts a model that is trained already.* got train_teacher=True"),
        ({"student": "config", "teacher": "self"}, "lora_r adapts a model that is trained already.*student='config'"),
        ({"student": None}, "Give one of teacher .* train_teacher, or, with kl_weight 0, student"),
        ({"student": None, "teacher": "base"}, "With teacher 'base' there is no other model to start from"),
        ({"teacher_dtype": "bfloat16"}, "teacher_dtype is bfloat16, but teacher 'base' is the student itself"),
        ({"teacher_dtype": "half"}, "teacher_dtype must be float32, bfloat16 or float16; got 'half'"),
        ({"lora_r": None, "teacher": "base"}, "teacher 'base' and the other lora_ options are about LoRA adapters"),
        ({"lora_r": None, "lora_alpha": 8.0}, "the other lora_ options are about LoRA adapters: give lora_r"),
    ],
)
def test_careless_lora(run, checkpoint, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(**{**LORA, "student": str(checkpoint), "dataset": "/no/such/corpus", **settings})
    assert not (tmp_path / "out").exists(), "no data was touched, and nothing written"


def test_self_teaching_from_scratch(run, tmp_path):
    run(train_teacher=None, teacher="self", student="config", max_steps=2, vocabulary="bpe", vocab_size=20)
    assert not (tmp_path / "out" / "teacher").exists()


@pytest.mark.parametrize("student", ["config", "headless", "checkpoint"])
def test_layer_dropping_without_a_teacher(run, checkpoint, student):
    """From random weights, a pre-trained encoder (which gets the vocabulary of the transcripts), or a recogniser."""
    start = {"config": "config", "headless": str(checkpoint.parent / "headless"), "checkpoint": str(checkpoint)}[
        student
    ]
    output = run(train_teacher=None, student=start, kl_weight=0.0, max_steps=2)
    assert not (output / "teacher").exists() and not (output / "teacher_depth_report.json").exists()
    tokens = load_processor(output).tokenizer.get_vocab()
    assert set("lowmidhg") <= set(tokens), "the words are low, mid and high"
    assert (tokens == load_processor(checkpoint).tokenizer.get_vocab()) or student != "checkpoint"
    assert "layer dropping, without a teacher" in (output / "README.md").read_text()


def test_a_teacher_trained_with_dropped_layers(run):
    """Its depths were drawn, and it is stored as the stock model of all layers that any teacher is."""
    output = run(teacher_depth_sampling="balanced", student="config", max_steps=2, logging_steps=1)
    state = json.loads((output / "teacher_checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
    drawn = [entry["num_active_layers"] for entry in state["log_history"] if "num_active_layers" in entry]
    assert min(drawn) < MODEL["num_hidden_layers"] and {entry.get("kl_loss", 0) for entry in state["log_history"]} == {
        0
    }
    assert "| trained first, on the same data, with layers dropped (balanced) |" in (output / "README.md").read_text()
    saved = json.loads((output / "teacher" / "config.json").read_text())
    assert (saved["model_type"], saved["num_hidden_layers"]) == ("wavlm", MODEL["num_hidden_layers"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "kl_weight is 1.0, but there is no teacher.*train_teacher, or kl_weight 0 for plain layer dropping"),
        ({"kl_weight": 0.0, "kl_weight_end": 0.5}, "kl_weight fades from 0.0 to 0.5, but there is no teacher"),
        ({"kl_weight": 0.0, "teacher_dtype": "bfloat16"}, "teacher_dtype is bfloat16, but there is no teacher"),
    ],
)
def test_careless_without_a_teacher(run, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(**{"train_teacher": None, "student": "config", "dataset": "/no/such/corpus", **settings})
    assert not (tmp_path / "out").exists()


def test_streaming(run, caplog):
    """A teacher and a student from a stream of 12 good utterances, read more than once, for a vocabulary too."""
    settings = {"streaming": True, "max_steps": 5, "shuffle_buffer_size": 4, "num_train_epochs": None}
    with caplog.at_level(logging.INFO):
        output = run(**settings)
    assert (output / "depth_report.md").exists()
    assert json.loads((output / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text())["max_steps"] == 5
    report = caplog.text.partition("What was read of the training stream")[2]
    for reason in ("kept", "not audio that libsndfile can decode", "empty file", "no such file", "no transcript"):
        assert reason in report
    assert "test: 4 utterances, 4 left out" in caplog.text, "the other splits are loaded"
    weights = (output / "model.safetensors").read_bytes()
    run(**settings)
    assert (output / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decode_once": True}, "decode_once keeps decoded audio on disk, and streaming keeps nothing"),
        ({"max_steps": None}, "streaming needs max_steps.*a stream has no known length; got -1"),
        ({"teacher_epochs": 3.0}, "teacher_epochs is 3.0, but a stream has no epochs"),
        ({"eval_strategy": "epoch"}, "eval_strategy is 'epoch', but a stream has no epochs"),
        ({"save_strategy": "epoch"}, "save_strategy is 'epoch', but a stream has no epochs"),
        ({"train_sampling_strategy": "batch_rebalance"}, "which needs all lengths in advance, and a stream has none"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size must be at least 1 utterance; got 0"),
    ],
)
def test_careless_streaming(run, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(**{"streaming": True, "max_steps": 2, "dataset": "/no/such/corpus", **settings})
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_same_folder(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps({"model": {"teacher": "x"}, "data": {}, "training": {}}))
    (tmp_path / "out" / "model.safetensors").write_text("finished work")
    with pytest.raises(ValueError, match="holds another run, which this one would overwrite"):
        run()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors", "run.json"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "finished work"


def test_a_corrected_command_may_use_the_folder(run):
    with pytest.raises(ValueError, match="has no split 'dev'"):
        run(test_split="dev", max_steps=1)
    assert (run(max_steps=1) / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_depths": [4]}, "num_active_layers must be an integer from 1 to 3.*; got 4"),
        ({"eval_depths": [0]}, "from 1 to 3.*; got 0"),
        ({"teacher": "x"}, "Give one of teacher .* train_teacher, or, with kl_weight 0, student"),
        ({"train_teacher": None}, "Give one of teacher .* train_teacher, or, with kl_weight 0, student"),
        (
            {"train_teacher": None, "teacher": "x", "teacher_start": "y"},
            "teacher_start='y' is what train_teacher fine-t",
        ),
        ({"model_config": None}, "Training from scratch needs model_config with a model_type"),
        ({"model_config": {"hidden_size": 3}}, "needs model_config with a model_type, one of .*wavlm.*hidden_size"),
        (
            {"train_teacher": None, "teacher": "x", "teacher_depth_sampling": "balanced"},
            "teacher_depth_sampling is 'balanced', but no teacher is trained",
        ),
        ({"teacher_depth_sampling": "all"}, "teacher_depth_sampling must be one of bernoulli, .*; got 'all'"),
        ({"train_teacher": None, "teacher": "self"}, "With teacher 'self' there is no other model to start from"),
        ({"vocabulary": "words"}, "vocabulary must be 'characters', 'bpe' or 'unigram'; got 'words'"),
        ({"depth_sampling": "all"}, "depth_sampling must be one of"),
        ({"dataset": "/no/such/corpus"}, "no file or folder /no/such/corpus"),
        ({"test_split": "dev"}, "has no split 'dev'; its splits are: test, train, validation"),
        ({"min_duration_s": 3.0}, "no utterance is left to train or evaluate on"),
    ],
)
def test_careless_arguments(run, tmp_path, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(**settings)
    assert not (tmp_path / "out" / "model.safetensors").exists()
