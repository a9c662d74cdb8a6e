"""Utterances of noise, as a dataset and as a stream, with a processor for them."""

import io

import datasets
import numpy as np
import pytest
import soundfile

from hf_dld import build_character_processor


@pytest.fixture(scope="session")
def processor():
    return build_character_processor(["abcdefghi"])


@pytest.fixture(scope="session")
def make_dataset():
    """Of `count` utterances with 4 to 6 labels each, as `prepare_dataset` returns it; `seed` makes another one."""

    def make(count: int, seed: int = 0) -> datasets.Dataset:
        generator = np.random.default_rng(seed)
        rows = []
        for length in generator.integers(2000, 9000, count):
            wave = io.BytesIO()
            soundfile.write(wave, generator.uniform(-0.5, 0.5, length), 16_000, format="WAV")
            labels = generator.integers(2, 12, generator.integers(4, 7)).tolist()
            audio = {"bytes": wave.getvalue(), "path": None}
            rows.append({"audio": audio, "input_length": int(length), "labels": labels})
        return datasets.Dataset.from_list(rows)

    return make


@pytest.fixture(scope="session")
def dataset(make_dataset):
    return make_dataset(7)
