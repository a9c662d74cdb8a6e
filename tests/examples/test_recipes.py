"""The recipes for large corpora, and the commands of docs/recipes.md, on a few utterances in the corpora's formats."""

import json
import logging
import re
import runpy
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import yaml
from conftest import make_stock
from transformers import AutoModelForCTC, Wav2Vec2FeatureExtractor

import hf_dld
from hf_dld.__main__ import main as hf_dld_main
from hf_dld.data.audio import encode_flac

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "examples" / "run_dld_ctc.py")
SMALL = {  # in place of what a recipe says of its model's size
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8, 8],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_feature_length": 2,
}
HUB_SPLITS = {  # name: utterances
    "train.clean.100": 3,
    "train.clean.360": 2,
    "train.other.500": 2,
    "validation.clean": 2,
    "validation.other": 2,
    "test.clean": 2,
    "test.other": 2,
}
SENTENCE = "HE'S HALF A MILE FROM THE QUAY"


def noise(seed: int, duration_s: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, round(duration_s * 16_000)).astype(np.float32)


def librispeech_of_the_hub(folder: Path) -> Path:
    """As openslr/librispeech_asr: one configuration of Parquet files with embedded FLAC, and other columns."""
    audio = datasets.Features({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    features = datasets.Features(
        {
            "file": datasets.Value("string"),
            "audio": audio,
            "text": datasets.Value("string"),
            "speaker_id": datasets.Value("int64"),
            "chapter_id": datasets.Value("int64"),
            "id": datasets.Value("string"),
        }
    )
    files = []
    for number, (split, utterances) in enumerate(HUB_SPLITS.items()):
        rows = []
        for index in range(utterances):
            name = f"19-198-{index:04}"
            content = encode_flac(noise(10 * number + index), 16_000)
            rows.append({"file": f"{name}.flac", "audio": {"bytes": content, "path": f"{name}.flac"}})
            rows[-1] |= {"text": SENTENCE, "speaker_id": 19, "chapter_id": 198, "id": name}
        path = folder / "all" / split / "0000.parquet"
        path.parent.mkdir(parents=True)
        datasets.Dataset.from_list(rows, features).cast_column("audio", datasets.Audio(decode=False)).to_parquet(path)
        files.append({"split": split, "path": f"all/{split}/*.parquet"})
    card = yaml.safe_dump({"configs": [{"config_name": "all", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")
    return folder


def librispeech_of_openslr(folder: Path) -> Path:
    for number, split in enumerate(
        ["train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "test-clean"]
    ):
        chapter = folder / split / "19" / "198"
        chapter.mkdir(parents=True)
        for index in range(2):
            soundfile.write(chapter / f"19-198-{index:04}.flac", noise(10 * number + index), 16_000)
        lines = [f"19-198-{index:04} {SENTENCE}\n" for index in range(2)]
        (chapter / "19-198.trans.txt").write_text("".join(lines))
    return folder


SEGMENTS = [  # start and end in seconds, transcript, and what is made of it
    (0.0, 1.0, "<unk> it 's about", "it's about"),
    (1.0, 2.2, "the thing they 're making", "the thing they're making"),
    (2.2, 2.9, "<unk>", None),
    (2.9, 3.9, "Nine  o 'clock", "nine o'clock"),
    (3.9, 4.5, "ignore_time_segment_in_scoring", None),
    (4.5, 9.9, "the talk ends within", "the talk ends within"),
    (7.0, 8.0, "nothing is there", None),
]


def tedlium(folder: Path, segments=SEGMENTS) -> Path:
    for number, split in enumerate(("train", "dev", "test")):
        talk = f"AlGore_{2000 + number}"
        for kind in ("stm", "sph"):
            (folder / "legacy" / split / kind).mkdir(parents=True)
        sph = folder / "legacy" / split / "sph" / f"{talk}.sph"
        soundfile.write(sph, noise(number, 6.0), 16_000, format="NIST", subtype="PCM_16")
        label = "<NA>" if split == "train" else "<o,f0,male>"
        lines = [f"{talk} 1 {talk} {start} {end} {label} {text}" for start, end, text, _ in segments]
        (folder / "legacy" / split / "stm" / f"{talk}.stm").write_text("\n".join([";; made here", *lines]) + "\n")
    return folder


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """Commands run in a folder of their own, where nothing is cached yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read_openslr(monkeypatch, *arguments) -> None:
    script = ROOT / "examples" / "corpora" / "read_openslr.py"
    monkeypatch.setattr("sys.argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def documented(word: str) -> list[str]:
    """The arguments of the command of docs/recipes.md which has this word, after the script's or package's name."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (python (?:.*\\\n)*.*)", page, re.MULTILINE)
    (command,) = (shlex.split(command.replace("\\\n", "")) for command in commands if word in command)
    return command[3:] if command[1] == "-m" else command[2:]


@pytest.fixture
def run_recipe(tmp_path, monkeypatch, caplog):
    """Runs a recipe with a small model, for two steps, on this machine; `changed` are other settings."""

    def call(name: str, **changed) -> Path:
        recipe = yaml.safe_load((ROOT / "examples" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
        if "model_config" in recipe:
            recipe["model_config"] |= SMALL
        else:
            start = make_stock("wavlm", num_hidden_layers=2, conv_stride=(5, 8, 8)).wavlm
            start.save_pretrained(tmp_path / "wavlm-base-plus")
            extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
            extractor.save_pretrained(tmp_path / "wavlm-base-plus")
            changed["teacher_start"] = str(tmp_path / "wavlm-base-plus")
        recipe |= {"max_steps": 2, "teacher_epochs": 1, "eval_depths": [1, 2], "eval_steps": 2, "save_steps": 2}
        recipe |= {
            "max_batch_seconds": 3,
            "num_proc": None,
            "dataloader_num_workers": 0,
            "use_cpu": True,
            "disable_tqdm": True,
            **changed,
        }
        recipe = {key: value for key, value in recipe.items() if value is not None}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        monkeypatch.setattr("sys.argv", [SCRIPT, str(tmp_path / "recipe.yaml")])
        with caplog.at_level(logging.INFO):
            runpy.run_path(SCRIPT, run_name="__main__")
        return tmp_path / recipe["output_dir"]

    return call


def check(output: Path, utterances: int) -> None:
    """The job is whole: a teacher, posteriors for it, a student, and a report of all its depths."""
    report = json.loads((output / "depth_report.json").read_text())
    assert [row["num_active_layers"] for row in report["rows"]] == [1, 2] and report["utterances"] == utterances
    assert (output / "teacher" / "model.safetensors").exists() and list(output.glob("teacher_cache/*/*.safetensors"))
    state = json.loads((output / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    assert {"eval_wer_1", "eval_wer_2"} <= state["log_history"][-1].keys()


def test_librispeech_of_the_hub(run_recipe, tmp_path, caplog):
    dataset = librispeech_of_the_hub(tmp_path / "librispeech_asr")
    output = run_recipe("librispeech_wavlm", dataset=str(dataset))
    check(output, utterances=2)
    assert "train: 7 utterances, 0 left out" in caplog.text, "of all three splits"
    processor = hf_dld.data.load_processor(output)
    assert set(SENTENCE) - {" "} <= set(processor.tokenizer.get_vocab())
    assert not processor.feature_extractor.do_normalize, "as the checkpoint that it starts from"
    start = hf_dld.DLDWavLMForCTC.from_pretrained("wavlm-base-plus", vocab_size=len(processor.tokenizer)).state_dict()
    for folder in (output / "teacher", output):
        for name, tensor in AutoModelForCTC.from_pretrained(folder).state_dict().items():
            if "feature_extractor" in name:
                assert tensor.equal(start[name])
            elif "layers.0.attention.q_proj.weight" in name:
                assert 0 < (tensor - start[name]).abs().max() < 0.01, "it was trained, from there"


def test_librispeech_of_openslr(run_recipe, tmp_path, caplog, monkeypatch):
    librispeech_of_openslr(tmp_path / "LibriSpeech")
    read_openslr(monkeypatch, *documented("read_openslr.py librispeech"))
    folder = {"dataset": "lists/librispeech", "dataset_config": None, "audio_root": "LibriSpeech"}
    output = run_recipe("librispeech_conformer", **folder)
    check(output, utterances=2)
    assert "train: 6 utterances, 0 left out" in caplog.text
    assert "bpe tokens asked for" in caplog.text, "so few words have no 256 pieces"


@pytest.fixture
def prepared(tmp_path, monkeypatch, capsys):
    """TED-LIUM as the documented commands prepare it; what they print."""
    tedlium(tmp_path / "TEDLIUM_release-3")
    for word in ("read_openslr.py tedlium3", "hf_dld prepare corpora/tedlium3"):
        arguments = ["1" if argument == "8" else argument for argument in documented(word)]  # processes
        read_openslr(monkeypatch, *arguments) if "read" in word else hf_dld_main(arguments)
    return capsys.readouterr().out


def test_tedlium_is_prepared(prepared):
    assert "no audio there: AlGore_2000/AlGore_2000-0000700-0000800.flac" in prepared
    assert "corpora/tedlium3/train: 6 utterances" in prepared
    expected = [text for *_, text in SEGMENTS if text is not None]
    for split in ("train", "validation", "test"):
        dataset = hf_dld.load_speech_dataset("prepared/tedlium3", split=split)
        assert dataset["text"][:] == expected
        lengths = [len(hf_dld.data.decode_audio(audio, 16_000)) for audio in dataset["audio"]]
        assert lengths == [16_000, 19_200, 16_000, 24_000], "the last one ends with its talk"
        assert re.search(
            rf"\| {split} \| no transcript \| 2 \| .*0000220-0000290.flac, .*0000390-0000450.flac", prepared
        )


@pytest.mark.parametrize("name", ["tedlium3_wavlm", "tedlium3_conformer"])
def test_tedlium(prepared, run_recipe, caplog, name):
    output = run_recipe(name)
    check(output, utterances=4)
    assert "train: 4 utterances, 0 left out" in caplog.text
    words = set("".join(hf_dld.data.load_processor(output).tokenizer.get_vocab()))
    assert "'" in words and not words & set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_marks_that_were_left_in_are_reported(tmp_path, monkeypatch):
    """A corpus that was cut but not prepared: no mark is learnt, and what is left out is counted."""
    tedlium(tmp_path / "TEDLIUM_release-3", SEGMENTS[:4])
    read_openslr(monkeypatch, "tedlium3", "TEDLIUM_release-3", "cut")
    dataset = hf_dld.load_speech_dataset("cut", split="train")
    processor = hf_dld.build_character_processor(dataset["text"])
    assert not {"<", ">"} & set(processor.tokenizer.get_vocab())
    _, report = hf_dld.prepare_dataset(dataset, processor, lambda samples: samples // 320)
    assert report.kept == 2 and report.dropped == {"characters outside the vocabulary": 2}


@pytest.mark.parametrize(
    ("corpus", "made", "message"),
    [
        ("librispeech", None, "has none of train-clean-100, .*: give the folder LibriSpeech itself"),
        ("librispeech", "test-clean", "no utterance was found for lists/test.clean"),
        ("tedlium3", None, "legacy has no train/stm: give the folder TEDLIUM_release-3 itself"),
    ],
)
def test_careless_folders(tmp_path, monkeypatch, corpus, made, message):
    (tmp_path / "source" / (made or "")).mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        read_openslr(monkeypatch, corpus, "source", "lists")


@pytest.mark.parametrize("line", ["AlGore_2009 1 AlGore_2009 0.5", "AlGore_2009 1 AlGore_2009 zero 1.5 <NA> so"])
def test_damaged_stm_files(tmp_path, line):
    module = runpy.run_path(str(ROOT / "examples" / "corpora" / "read_openslr.py"))
    (tmp_path / "talk.stm").write_text(f";; comment\n\n{line}\n")
    with pytest.raises(ValueError, match="talk.stm, line 3: not a segment of an STM file: 'AlGore_2009 1"):
        list(module["read_stm"](tmp_path / "talk.stm"))
