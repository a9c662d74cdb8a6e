"""Corpora as Parquet shards: what is in them, what is refused, and that work which was interrupted goes on."""

import json
import os
import shutil

import datasets
import numpy as np
import pytest
import soundfile

from hf_dld.__main__ import main
from hf_dld.data import (
    build_character_processor,
    decode_audio,
    load_speech_dataset,
    prepare,
    prepare_corpus,
    prepare_dataset,
    speech_splits,
)
from hf_dld.data.filtering import UNREADABLE_IN_A_ROW
from hf_dld.whole_files import only_user_of

GOOD = [(f"good{index}.wav", f"WORD {index}", 0.3 + 0.05 * index) for index in range(5)]
BAD = [("tiny.wav", "NO", 0.01), ("gone.wav", "NO", None), ("silent.wav", "", 0.5), ("long.wav", "NO", 3.0)]
REASONS = {"shorter than 0.25 s": 1, "no such file": 1, "no transcript": 1, "longer than 2 s": 1}


@pytest.fixture
def corpus(write_corpus):
    write_corpus([*GOOD[:2], *BAD, *GOOD[2:]], "corpus/train")
    return write_corpus(GOOD[:1], "corpus/dev")


@pytest.fixture
def prepared(corpus, tmp_path):
    """Prepares the corpus with three rows to a shard: the second of the training set has nothing that is kept."""

    def call(**options):
        options = {"max_duration_s": 2, "shard_utterances": 3, "progress_bar": False, **options}
        return prepare_corpus(corpus, tmp_path / "out", **options)

    return call


def shard_names(folder):
    return sorted(path.name for path in (folder / "data").iterdir())


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "data").iterdir()}


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_written_can_be_loaded(prepared, corpus, tmp_path, streaming):
    out = tmp_path / "out"
    reports = prepared()
    assert speech_splits(corpus) == ["dev", "train"] == sorted(reports) == sorted(speech_splits(out))
    assert shard_names(out) == ["dev-00000-of-00001.parquet", *(f"train-{i:05}-of-00003.parquet" for i in range(3))]
    rows = list(load_speech_dataset(out, split="train", streaming=streaming))
    assert [row["text"] for row in rows] == [text for _, text, _ in GOOD]
    originals = [(corpus / "train" / name).read_bytes() for name, _, _ in GOOD]
    assert [row["audio"]["bytes"] for row in rows] == originals, "files are kept as they are"
    assert [row["audio"]["path"] for row in rows] == [f"train/{name}" for name, _, _ in GOOD]
    for path, options in (
        ("parquet", {"data_files": {"train": str(out / "data" / "train-*.parquet")}}),
        (str(out), {}),
    ):
        rows = list(datasets.load_dataset(path, **options, split="train", streaming=streaming))
        assert [row["duration_s"] for row in rows] == pytest.approx([seconds for _, _, seconds in GOOD])
        assert decode_audio(rows[0]["audio"], 16_000).shape == (4800,)
    dataset = load_speech_dataset(out, split="train", streaming=streaming)
    usable, _ = prepare_dataset(dataset, build_character_processor(["WORD 01234"]), lambda samples: samples // 320)
    assert len(list(usable)) == 5


def test_a_corpus_behind_a_link_or_with_its_audio_elsewhere(corpus, tmp_path, monkeypatch):
    """What is written names no folder of this machine."""
    (tmp_path / "link").symlink_to(corpus, target_is_directory=True)
    (tmp_path / "lists").mkdir()
    rows = [{"audio": f"train/{name}", "text": text} for name, text, _ in GOOD]
    (tmp_path / "lists" / "m.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    options = {"max_duration_s": 2, "progress_bar": False}
    prepare_corpus("link", "behind", ["train"], **options)
    main(["prepare", "lists/m.json", "elsewhere", "--audio_root", "corpus"])
    for folder in ("behind", "elsewhere"):
        paths = [row["audio"]["path"] for row in load_speech_dataset(tmp_path / folder)]
        assert paths == [f"train/{name}" for name, _, _ in GOOD]
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "behind/prepare_report.json").read_text())["refused"])


def test_split_folders_that_datasets_has_no_name_for(write_corpus, tmp_path):
    """LibriSpeech's are called so."""
    corpus = write_corpus(GOOD[:2], "corpus/dev-clean")
    for streaming in (False, True):
        loaded = load_speech_dataset(corpus, split="dev-clean", streaming=streaming)
        assert [row["text"] for row in loaded] == [text for _, text, _ in GOOD[:2]]
    reports = prepare_corpus(corpus, tmp_path / "out", progress_bar=False)
    assert list(reports) == ["dev_clean"], "prepared, it is named as datasets can"
    assert len(load_speech_dataset(tmp_path / "out", split="dev_clean")) == 2


def test_splits_of_one_name(write_corpus, tmp_path):
    write_corpus(GOOD[:2], "corpus/dev-clean")
    corpus = write_corpus(GOOD[2:4], "corpus/dev_clean")
    with pytest.raises(ValueError, match="The splits dev-clean, dev_clean would have one name, dev_clean: rename one"):
        prepare_corpus(corpus, tmp_path / "out", progress_bar=False)
    assert not (tmp_path / "out").exists()
    assert list(prepare_corpus(corpus, tmp_path / "out", ["dev-clean"], progress_bar=False)) == ["dev_clean"]


def test_two_at_once(prepared, tmp_path):
    with only_user_of(tmp_path / "out" / ".prepare", "taken"):
        with pytest.raises(ValueError, match="another process is preparing a corpus in .*out"):
            prepared()
        assert not (tmp_path / "out" / "data").exists()
    assert prepared()["train"].counts.kept == 5


def test_samples_on_another_scale(write_corpus, tmp_path):
    corpus = write_corpus([*GOOD[:2], ("loud.wav", "LOUD", 0.5)])
    wave = np.sin(np.arange(8000) * 0.1)
    soundfile.write(corpus / "train" / "loud.wav", 20_000 * wave, 16_000, subtype="FLOAT")
    soundfile.write(corpus / "train" / "good0.wav", 1.1 * wave, 16_000, subtype="FLOAT")
    report = prepare_corpus(corpus, tmp_path / "flac", sampling_rate_hz=16_000, progress_bar=False)["train"]
    reason = "samples far beyond [-1, 1], which FLAC cannot hold"
    assert report.refused == [["train/loud.wav", reason]] and report.counts.kept == 2
    assert prepare_corpus(corpus, tmp_path / "as_they_are", progress_bar=False)["train"].counts.kept == 3


def test_the_report(prepared, corpus, tmp_path, capsys):
    report = prepared()["train"]
    assert report.counts.kept == 5 and report.counts.dropped == REASONS
    assert report.duration_s == pytest.approx(sum(seconds for _, _, seconds in GOOD))
    content = json.loads((tmp_path / "out" / "prepare_report.json").read_text())
    assert content["splits"]["train"]["refused"] == REASONS and content["splits"]["dev"]["kept"] == 1
    assert {"split": "train", "audio": "train/gone.wav", "reason": "no such file"} in content["refused"]
    assert len(content["refused"]) == 4 and content["settings"]["source"] == str(corpus)
    main(["prepare", str(corpus), str(tmp_path / "out"), "--max_duration_s", "2", "--shard_utterances", "3"])
    table = capsys.readouterr().out
    assert table == (tmp_path / "out" / "prepare_report.md").read_text()
    assert "| train | kept | 5 of 9 | 0.00 h |\n" in table
    assert "| train | no such file | 1 | train/gone.wav |\n" in table


def test_flac_at_a_chosen_rate(write_audio, write_corpus, tmp_path):
    folder = write_corpus([("a.wav", "A", 0.5)])
    write_audio("corpus/train/a.wav", 0.5, 44_100, channels=2)
    prepare_corpus(folder, tmp_path / "out", sampling_rate_hz=16_000, progress_bar=False)
    [row] = load_speech_dataset(tmp_path / "out")
    assert row["audio"]["path"] == "train/a.flac" and row["audio"]["bytes"].startswith(b"fLaC")
    samples = decode_audio(row["audio"], 16_000)
    np.testing.assert_allclose(samples, decode_audio(folder / "train" / "a.wav", 16_000), atol=2**-15)


def test_speech_without_transcripts(prepared, tmp_path):
    reports = prepared(splits=["train"], keep_untranscribed=True)
    assert list(reports) == ["train"] and reports["train"].counts.kept == 6
    shutil.rmtree(tmp_path / "out")
    prepared(transcribed=False)
    [*rows] = load_speech_dataset(tmp_path / "out", transcribed=False)
    assert len(rows) == 6 and set(rows[0]) == {"audio"}


def test_transcripts_are_rewritten(write_corpus, tmp_path, capsys):
    """As TED-LIUM's need it: marks, words in two parts, and what stands for no transcript."""
    texts = ["It 's  fine <unk>", "they 're", "<unk>", "ignore_time_segment_in_scoring", "O'CLOCK"]
    corpus = write_corpus([(f"{index}.wav", text, 0.4) for index, text in enumerate(texts)])
    rules = ["^ignore_time_segment_in_scoring$", "", "<unk>", "", r" '(s|re)\b", r"'\1"]
    options = [part for rule in zip(rules[::2], rules[1::2], strict=True) for part in ("--text_rule", *rule)]
    main(["prepare", str(corpus), str(tmp_path / "out"), *options, "--text_case", "lower"])
    assert load_speech_dataset(tmp_path / "out")["text"][:] == ["it's fine", "they're", "o'clock"]
    assert "| train | no transcript | 2 | train/2.wav, train/3.wav |" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"prepared with other settings \(text_case: 'lower' then, None now"):
        main(["prepare", str(corpus), str(tmp_path / "out"), *options])


def test_an_interrupted_preparation_goes_on(prepared, tmp_path, monkeypatch):
    """What is done is not done again, and nothing can be loaded before all of it is."""
    out, written, write = tmp_path / "out", [], prepare._write_shard

    def write_shard(shard, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append((shard.split, shard.number))
        return write(shard, *args)

    monkeypatch.setattr(prepare, "_write_shard", write_shard)
    with pytest.raises(KeyboardInterrupt):
        prepared(splits=["train"])
    assert written == [("train", 0), ("train", 1)] and not (out / "data").exists()
    unfinished = out / ".prepare" / "train" / ".writing-0123abcd-999999999-elsewhere-00002.parquet"
    unfinished.write_bytes(b"PAR1")
    os.utime(unfinished, (0, 0))
    written[:] = [None]
    assert prepared(splits=["train"])["train"].counts.total == 9
    assert written == [None, ("train", 2)] and len(shard_names(out)) == 3 and not unfinished.exists()
    before = times(out)
    written.clear()
    assert list(prepared()) == ["dev", "train"] and written == [("dev", 0)], "another split can be added"
    assert before.items() <= times(out).items()


def test_a_changed_source_is_noticed(prepared, corpus, tmp_path):
    out = tmp_path / "out"
    prepared()
    before = times(out)
    soundfile.write(corpus / "train" / "gone.wav", np.zeros(8000), 16_000)  # of the second shard
    assert prepared()["train"].counts.kept == 6
    changed = {name for name, time in times(out).items() if time != before[name]}
    assert changed == {"train-00001-of-00003.parquet"}
    metadata = corpus / "train" / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("WORD 0", "WORD A") + "good0.wav,ONE MORE\n")
    assert prepared()["train"].counts.total == 10
    assert shard_names(out)[1:] == [f"train-{number:05}-of-00004.parquet" for number in range(4)]
    texts = load_speech_dataset(out)["text"]
    assert texts[0] == "WORD A" and texts[-1] == "ONE MORE"
    (out / "data" / "train-00000-of-00004.parquet").write_bytes(b"PAR1")  # half a copy
    prepared()
    assert load_speech_dataset(out)["text"][0] == "WORD A"
    metadata.write_text("file_name,transcription\ngood0.wav,ALONE\n")
    prepared()
    assert shard_names(out)[1:] == ["train-00000-of-00001.parquet"]


def test_several_processes_write_the_same(prepared, tmp_path):
    prepared(num_proc=2)
    several = {path.name: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
    (tmp_path / "out").rename(tmp_path / "several")
    prepared()
    assert several == {path.name: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}


def test_parquet_again(prepared, tmp_path):
    """A corpus whose audio is stored as bytes can be a source too."""
    prepared()
    reports = prepare_corpus(tmp_path / "out", tmp_path / "again", sampling_rate_hz=8000, progress_bar=False)
    assert reports["train"].counts.kept == 5 and reports["dev"].counts.kept == 1
    written = times(tmp_path / "again")
    prepare_corpus(tmp_path / "out", tmp_path / "again", sampling_rate_hz=8000, progress_bar=False)
    assert times(tmp_path / "again") == written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_duration_s": 3}, "min_duration_s=3 and max_duration_s=2: need 0 <= minimum <= maximum"),
        ({"sampling_rate_hz": 0}, "sampling_rate_hz must be at least 1; got 0"),
        ({"shard_utterances": 0}, "shard_utterances must be at least 1; got 0"),
        ({"num_proc": 0}, "num_proc must be at least 1; got 0"),
        ({"splits": ["test"]}, "has no split 'test'; its splits are: dev, train"),
        ({"text_column": "words"}, "has no column 'words'"),
        ({"splits": ["dev+train"]}, r"splits has 'dev\+train': give single splits; they are joined where"),
        ({"text_case": "title"}, r"text_case must be one of \('lower', 'upper'\), or None .*; got 'title'"),
        ({"text_rules": ["<unk>"]}, "must be a regular expression and a text; got '<unk>'"),
        ({"text_rules": [("<unk>", None)]}, r"must be a regular expression and a text; got \('<unk>', None\)"),
        ({"text_rules": [("(", "")]}, r"The rule '\(' to '' of text_rules cannot be used: missing \)"),
        ({"text_rules": [("a", r"\1")]}, "of text_rules cannot be used: invalid group reference 1"),
        ({"text_rules": [("a", r"\g<b>")]}, "of text_rules cannot be used: unknown group name 'b'"),
    ],
)
def test_careless_arguments(prepared, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepared(**options)
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else(prepared, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder /no/such/corpus"):
        prepare_corpus("/no/such/corpus", tmp_path / "out")
    with pytest.raises(ValueError, match=r"train: no utterance is left:\nkept +0 of 9"):
        prepared(splits=["train"], min_duration_s=2)
    with pytest.raises(ValueError, match=r"prepared with other settings \(min_duration_s: 2 then, 0.25 now\)"):
        prepared()
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is there and holds no prepared corpus; choose another output folder"):
        prepared()


def test_a_stream_of_a_drive_that_is_gone(write_corpus):
    rows = [(f"{index}.wav", "A", None) for index in range(UNREADABLE_IN_A_ROW)]
    dataset = load_speech_dataset(write_corpus(rows), streaming=True).repeat(None)
    stream, _ = prepare_dataset(dataset, build_character_processor(["A"]), lambda samples: samples // 320)
    with pytest.raises(ValueError, match=r"the last 100 files of the stream could not be read.*99.wav: no such file"):
        next(iter(stream))
