"""Streams to train on: endless, shuffled by a seed, filtered as they are read."""

import io
import itertools
import os
import tarfile
import time

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_dld import DataCollatorCTC
from hf_dld.data import build_character_processor, load_speech_dataset, training_stream
from hf_dld.data.audio import decode_audio, encode_wav

PROCESSOR = build_character_processor(["ABC"])
ROWS = [(f"{index}.wav", "ABC", 0.5) for index in range(8)] + [("tiny.wav", "A", 0.01), ("gone.wav", "A", None)]


def frames_of(samples: int) -> int:
    return samples // 320


def stream(folder, **options):
    return training_stream(load_speech_dataset(folder, streaming=True), PROCESSOR, frames_of, **options)


def names(rows) -> list[str]:
    return [os.path.basename(row["audio"]["path"]) for row in rows]


def test_the_bytes_of_decoded_audio_do_not_tell_the_time():
    """A teacher's posteriors are found by them, in another run too; libsndfile stores when it wrote floats."""
    samples = np.linspace(-1, 1, 1000, dtype=np.float32)
    first = encode_wav(samples, 16_000)
    time.sleep(1.1)
    assert encode_wav(samples, 16_000) == first
    assert np.array_equal(decode_audio(first, 16_000), samples)


def test_it_never_ends_and_drops_what_cannot_be_used(write_corpus):
    endless, report = stream(write_corpus(ROWS), shuffle_buffer_size=None)
    assert report.total == 0, "what was read to see that something is left does not count"
    rows = list(itertools.islice(endless, 20))
    assert names(rows) == [f"{index % 8}.wav" for index in range(20)]
    assert report.kept == 20
    assert report.dropped == {"shorter than 0.25 s": 2, "no such file": 2}, "each pass counts anew"
    assert rows[0]["input_length"] == 8000 and len(rows[0]["labels"]) == 3


def test_the_order_depends_on_the_seed_alone(write_corpus):
    folder = write_corpus(ROWS)
    orders = [names(itertools.islice(stream(folder, shuffle_buffer_size=5, seed=seed)[0], 24)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert set(orders[0]) == {f"{index}.wav" for index in range(8)}


def test_nothing_left_is_an_error_and_not_an_endless_search(write_corpus):
    with pytest.raises(ValueError, match=r"no utterance is left to train on:\n(.|\n)*no such file +1"):
        stream(write_corpus(ROWS[8:]))


@pytest.mark.parametrize("size", [0, -1])
def test_impossible_buffers(write_corpus, size):
    with pytest.raises(ValueError, match=f"shuffle_buffer_size must be at least 1 utterance; got {size}"):
        stream(write_corpus(ROWS), shuffle_buffer_size=size)


def test_limits_are_those_of_prepare_dataset(write_corpus):
    folder = write_corpus([("a.wav", "", 0.5), ("b.wav", "AB", 0.5)])
    endless, _ = stream(folder, shuffle_buffer_size=None, keep_untranscribed=True, max_duration_s=1.0)
    assert [len(row["labels"]) for row in itertools.islice(endless, 3)] == [0, 2, 0]
    with pytest.raises(ValueError, match="need 0 <= minimum <= maximum"):
        stream(folder, min_duration_s=3.0, max_duration_s=1.0)


SHARDS, PER_SHARD = 4, 3


@pytest.fixture(params=["parquet", "webdataset"])
def shards(request, tmp_path):
    """A folder of shards; an utterance's length tells which it is: 8000 samples and its number."""
    for shard in range(SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        files = {number: encode_wav(np.full(8000 + number, 0.1, np.float32), 16_000) for number in numbers}
        if request.param == "parquet":
            rows = [{"audio": {"bytes": file, "path": None}, "text": "ABC"} for file in files.values()]
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"train-{shard:05d}-of-{SHARDS:05d}.parquet")
            continue
        with tarfile.open(tmp_path / f"train-{shard:05d}.tar", "w") as tar:
            for number, file in files.items():
                for ending, content in (("wav", file), ("txt", b"ABC")):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return tmp_path


def numbers(rows) -> list[int]:
    return [row["input_length"] - 8000 for row in rows]


@pytest.mark.parametrize("buffer", [None, 4])
def test_shards_are_shared_by_processes_and_workers(shards, buffer):
    """As Accelerate and torch do it: no utterance is in two shares, and the order is the same every time."""
    endless, _ = stream(shards, shuffle_buffer_size=buffer)
    assert endless.num_shards == SHARDS
    once = SHARDS * PER_SHARD // 2
    count = once if buffer is None else 4 * once  # a buffer mixes the end of a pass with the start of the next
    parts = [endless.shard(num_shards=2, index=rank) for rank in (0, 1)]
    shares = [numbers(itertools.islice(part, count)) for part in parts]
    assert set(shares[0]).isdisjoint(shares[1])
    assert {*shares[0], *shares[1]} == set(range(SHARDS * PER_SHARD))
    read = [
        numbers(itertools.islice(DataLoader(parts[0], batch_size=None, num_workers=2, collate_fn=dict), count))
        for _ in range(2)
    ]
    assert read[0] == read[1] and set(read[0]) == set(shares[0])


def test_an_utterance_is_decoded_once(shards):
    endless, _ = stream(shards, shuffle_buffer_size=None)
    row = next(iter(endless))
    samples = np.full(8000, 0.1, np.float32)
    assert row["audio"]["array"].dtype == np.float32
    np.testing.assert_array_equal(decode_audio(row["audio"], 16_000), samples)
    collate = DataCollatorCTC(PROCESSOR)
    again = {"audio": encode_wav(samples, 16_000), "labels": row["labels"]}
    for name, tensor in collate([again]).items():
        assert torch.equal(collate([row])[name], tensor)
