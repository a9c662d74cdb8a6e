"""Speech made here: noise of a given length, rate and number of channels, and small corpora of it."""

import csv
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What `datasets` caches goes into a fresh folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def write_audio(tmp_path):
    def write(name: str, duration_s: float = 0.5, rate_hz: int = 16_000, channels: int = 1, **kwargs) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (round(duration_s * rate_hz), channels)
        samples = np.random.default_rng(len(name)).uniform(-0.5, 0.5, shape).astype(np.float32)
        soundfile.write(path, samples, rate_hz, **kwargs)
        return path

    return write


@pytest.fixture
def write_corpus(tmp_path, write_audio):
    """A folder with a metadata.csv of (file name, transcript, duration_s) rows; a duration of None makes no file."""

    def write(rows: list[tuple], folder: str = "corpus/train") -> Path:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, _, duration_s in rows:
            if duration_s is not None:
                write_audio(f"{folder}/{name}", duration_s)
        with open(tmp_path / folder / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "transcription"), *((name, text) for name, text, _ in rows)])
        return (tmp_path / folder).parent

    return write
