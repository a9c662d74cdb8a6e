"""The corpora: the embedded one is as its page says, and digits are joined reproducibly."""

import csv
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hf_dld import load_speech_dataset
from hf_dld.data import decode_audio

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = EXAMPLES / "corpora" / "spoken_commands"
JOIN = EXAMPLES / "corpora" / "join_digits.py"


def rows_of(split):
    with open(COMMANDS / split / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_embedded_corpus_loads(split):
    dataset, rows = load_speech_dataset(COMMANDS, split=split), rows_of(split)
    assert len(dataset) == len(rows)
    for index in (0, len(rows) // 2, len(rows) - 1):
        samples = decode_audio(dataset[index]["audio"], 16_000)
        assert len(samples) / 16_000 == pytest.approx(float(rows[index]["seconds"]), abs=0.02)
        assert dataset[index]["text"] == rows[index]["transcription"]


def test_the_embedded_corpus_is_what_it_says():
    rows = {split: rows_of(split) for split in ("train", "validation", "test")}
    assert 300 <= sum(map(len, rows.values())) <= 800
    assert sum(path.stat().st_size for path in COMMANDS.rglob("*") if path.is_file()) < 8_000_000
    speakers = {split: {row["speaker"] for row in split_rows} for split, split_rows in rows.items()}
    assert len(set.union(*speakers.values())) >= 10
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not speakers[one] & speakers[other], "voices of the test split are in no other"
        sentences = [{row["transcription"] for row in rows[split]} for split in (one, other)]
        assert not sentences[0] & sentences[1]
    words = {
        split: {word for row in split_rows for word in row["transcription"].split()}
        for split, split_rows in rows.items()
    }
    assert words["test"] <= words["train"] and words["validation"] <= words["train"]


def test_the_voices_of_each_split_are_what_the_seed_draws():
    """Nobody chose them: the split of every voice follows from seed 0."""
    module = runpy.run_path(str(EXAMPLES / "corpora" / "make_spoken_commands.py"))
    splits = module["draw_splits"](0)
    drawn = {voice.name: splits[voice.speaker] for voice in module["VOICES"]}
    stored = {row["speaker"]: split for split in ("train", "validation", "test") for row in rows_of(split)}
    assert drawn == stored
    assert splits["kal"] == drawn["flite_kal"] == drawn["festival_kal"], "one person, two engines"


@pytest.fixture
def digits(tmp_path):
    """Three speakers, three digits: tones instead of speech."""
    for split in ("train", "validation", "test"):
        folder = tmp_path / "source" / split
        folder.mkdir(parents=True)
        rows = [["file_name", "transcription", "speaker", "seconds"]]
        for speaker, pitch in (("ann", 200), ("bob", 300), ("eve", 400)):
            for number, digit in enumerate(("one", "two", "three")):
                samples = np.sin(np.arange(2000) * (number + 1) * pitch * 2 * np.pi / 8000)
                soundfile.write(folder / f"{speaker}_{digit}.flac", 0.5 * samples, 8000)
                rows.append([f"{speaker}_{digit}.flac", digit, speaker, "0.25"])
        with open(folder / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    return tmp_path / "source"


def join(*arguments):
    return subprocess.run([sys.executable, JOIN, *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("babble", [(), ("--babble_snr_db", 2, 12)])
def test_joining_is_reproducible(digits, tmp_path, babble):
    options = ("--source", digits, "--utterances", 4, 2, 2, "--digits", 2, 3, *babble)
    for name in ("first", "second"):
        done = join(*options, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    first = sorted(path for path in (tmp_path / "first").rglob("*.flac"))
    assert len(first) == 8
    for path in first:
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()
    texts = load_speech_dataset(tmp_path / "first", split="train")["text"]
    assert all(2 <= len(text.split()) <= 3 for text in texts)
    assert "made with the same options already" in join(*options, "--output", tmp_path / "first").stdout
    other = join(*options, "--output", tmp_path / "first", "--seed", 1)
    assert other.returncode != 0 and "was made with other options: seed was 0 and is now 1" in other.stderr


def test_joining_nothing(tmp_path):
    done = join("--source", tmp_path / "none", "--output", tmp_path / "out")
    assert done.returncode != 0 and "does not exist or is no folder" in done.stderr


def test_the_generator_says_what_is_missing(tmp_path, monkeypatch, capsys):
    """Without the synthesizers, an error names the Debian packages that have them."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["make_spoken_commands.py", "--output", str(tmp_path / "out")])
    with pytest.raises((SystemExit, RuntimeError, FileNotFoundError, ValueError)) as error:
        runpy.run_path(str(EXAMPLES / "corpora" / "make_spoken_commands.py"), run_name="__main__")
    assert "install" in f"{error.value} {capsys.readouterr().err}"
