"""Streams to train on: endless, shuffled by a seed, filtered as they are read."""

import itertools
import os

import pytest

from hf_dld.data import build_character_processor, load_speech_dataset, training_stream

PROCESSOR = build_character_processor(["ABC"])
ROWS = [(f"{index}.wav", "ABC", 0.5) for index in range(8)] + [("tiny.wav", "A", 0.01), ("gone.wav", "A", None)]


def frames_of(samples: int) -> int:
    return samples // 320


def stream(folder, **options):
    return training_stream(load_speech_dataset(folder, streaming=True), PROCESSOR, frames_of, **options)


def names(rows) -> list[str]:
    return [os.path.basename(row["audio"]["path"]) for row in rows]


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
