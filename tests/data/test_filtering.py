import logging
import os

import pytest
import soundfile
import torch
from datasets import Audio, Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from hf_dld.data.audio import decode_audio
from hf_dld.data.datasets import load_speech_dataset
from hf_dld.data.filtering import FilterReport, ctc_frames_needed, prepare_dataset
from hf_dld.data.vocabulary import build_character_processor, build_subword_processor, decode_labels

PROCESSOR = build_character_processor(["ABCDEFGHIJ ' KLMNOPQRSTUVWXYZ"])

CORPUS = [  # every way to be careless, and two good ones
    ("good.wav", "HELLO WORLD", 1.0),
    ("good_too.wav", "YES", 0.5),
    ("tiny.wav", "NO", 0.01),
    ("endless.wav", "NO", 3.0),
    ("missing.wav", "NO", None),
    ("text.wav", "NO", None),
    ("empty.wav", "NO", None),
    ("silent.wav", "", 0.5),
    ("umlaut.wav", "ÜBER 9", 0.5),
    ("umlaut_too.wav", "MÜDE", 0.5),
    ("hasty.wav", "A VERY LONG TEXT FOR HALF A SECOND", 0.5),
]
EXPECTED = {
    "shorter than 0.25 s": ["tiny.wav"],
    "longer than 2 s": ["endless.wav"],
    "no such file": ["missing.wav"],
    "not audio that libsndfile can decode": ["text.wav"],
    "empty file (0 bytes)": ["empty.wav"],
    "no transcript": ["silent.wav"],
    "characters outside the vocabulary": ["umlaut.wav (9Ü)", "umlaut_too.wav (Ü)"],
    "target longer than its frames": ["hasty.wav"],
}


def frames_of(samples: int) -> int:
    return (samples - 400) // 320 + 1


@pytest.fixture
def careless_corpus(write_corpus):
    folder = write_corpus(CORPUS)
    (folder / "train" / "text.wav").write_text("this is not audio" * 100)
    (folder / "train" / "empty.wav").touch()
    return folder


def names(dataset) -> list[str]:
    return [os.path.basename(row["audio"]["path"]) for row in dataset]


def short_examples(report: FilterReport) -> dict[str, list[str]]:
    return {reason: [os.path.basename(name) for name in found] for reason, found in report.examples.items()}


@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_trained_on_is_dropped_and_reported(careless_corpus, streaming, caplog):
    dataset = load_speech_dataset(careless_corpus, streaming=streaming)
    with caplog.at_level(logging.WARNING):
        prepared, report = prepare_dataset(dataset, PROCESSOR, frames_of, max_duration_s=2)
        rows = list(prepared)
    assert names(rows) == ["good.wav", "good_too.wav"]
    assert short_examples(report) == EXPECTED
    assert report.dropped == {reason: len(found) for reason, found in EXPECTED.items()}
    assert (report.kept, report.total) == (2, len(CORPUS))
    for reason in EXPECTED:
        assert reason in caplog.text
    assert set(rows[0]) == {"audio", "text", "duration_s", "input_length", "labels"}
    assert (rows[0]["duration_s"], rows[0]["input_length"], rows[0]["text"]) == (1.0, 16_000, "HELLO WORLD")
    assert decode_labels(PROCESSOR.tokenizer, rows[0]["labels"]) == "HELLO WORLD"
    assert isinstance(rows[0]["audio"], dict) and "array" not in rows[0]["audio"]


def test_the_report_is_a_readable_table():
    report = FilterReport()
    for index in range(5):
        report.count("no such file", lambda index=index: f"{index}.wav")
    report.count("no transcript", lambda: "x.wav")
    for _ in range(1234):
        report.count(None, lambda: pytest.fail("no example is needed of what is kept"))
    assert str(report).splitlines() == [
        "kept              1,234 of 1,240",
        "no such file          5  0.wav, 1.wav, 2.wav, ...",
        "no transcript         1  x.wav",
    ]


def test_one_missing_file_among_many(write_corpus):
    rows = [(f"{index}.wav", "A", 0.26 if index != 150 else None) for index in range(300)]
    prepared, report = prepare_dataset(load_speech_dataset(write_corpus(rows)), PROCESSOR, frames_of)
    assert (len(prepared), report.dropped) == (299, {"no such file": 1})


def test_nothing_dropped_is_not_a_warning(write_corpus, caplog):
    dataset = load_speech_dataset(write_corpus(CORPUS[:2]))
    with caplog.at_level(logging.WARNING):
        _, report = prepare_dataset(dataset, PROCESSOR, frames_of)
    assert not caplog.text and str(report) == "kept         2 of 2"


def test_nothing_left_is_an_error(write_corpus):
    dataset = load_speech_dataset(write_corpus(CORPUS[2:5]))
    with pytest.raises(ValueError, match=r"no utterance is left to train or evaluate on:\n(.|\n)*no such file +1"):
        prepare_dataset(dataset, PROCESSOR, frames_of, max_duration_s=2)


def test_a_dictionary_of_splits(write_corpus):
    splits = DatasetDict(train=load_speech_dataset(write_corpus(CORPUS[:1])))
    with pytest.raises(
        TypeError, match="prepare_dataset takes one split of the DatasetDict, of which there are: train"
    ):
        prepare_dataset(splits, PROCESSOR, lambda samples: samples // 320)


@pytest.mark.parametrize("streaming", [False, True])
def test_untranscribed_speech_can_be_kept(write_corpus, streaming):
    folder = write_corpus([("a.wav", "YES", 0.5), ("b.wav", "", 0.5), ("c.wav", "", 0.01)])
    dataset = load_speech_dataset(folder, streaming=streaming)
    prepared, report = prepare_dataset(dataset, PROCESSOR, frames_of, keep_untranscribed=True)
    assert [len(row["labels"]) for row in prepared] == [3, 0]
    without_text = load_speech_dataset(folder, transcribed=False, streaming=streaming)
    prepared, report = prepare_dataset(without_text, PROCESSOR, frames_of, keep_untranscribed=True)
    assert [row["labels"] for row in prepared] == [[], []]
    assert report.dropped == {"shorter than 0.25 s": 1}


def test_a_feature_extractor_is_enough_without_transcripts(write_corpus):
    folder = write_corpus([("a.wav", "YES", 0.5), ("b.wav", "", 0.01)])
    dataset = load_speech_dataset(folder, transcribed=False)
    prepared, report = prepare_dataset(dataset, PROCESSOR.feature_extractor, frames_of, keep_untranscribed=True)
    assert [(row["labels"], row["input_length"]) for row in prepared] == [([], 8000)]
    assert report.dropped == {"shorter than 0.25 s": 1}


def test_a_model_needs_one_frame_even_without_a_transcript(write_corpus):
    dataset = load_speech_dataset(write_corpus([("a.wav", "", 0.5)]))
    with pytest.raises(ValueError, match="target longer than its frames"):
        prepare_dataset(dataset, PROCESSOR, lambda samples: 0, keep_untranscribed=True)


@given(labels=st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_targets_fit_exactly_where_ctc_has_a_path(labels):
    def loss(frames: int) -> float:
        log_probs = torch.full((frames, 1, 4), 0.25).log()
        return torch.nn.functional.ctc_loss(
            log_probs, torch.tensor([labels]), torch.tensor([frames]), torch.tensor([len(labels)])
        ).item()

    needed = ctc_frames_needed(labels)
    assert loss(needed) < float("inf")
    assert needed == 1 or loss(needed - 1) == float("inf")


def test_a_target_that_just_fits(write_corpus):
    dataset = load_speech_dataset(write_corpus([("a.wav", "ALL", 0.5)]))
    assert len(prepare_dataset(dataset, PROCESSOR, lambda samples: torch.tensor(4))[0]) == 1
    with pytest.raises(ValueError, match="target longer than its frames"):
        prepare_dataset(dataset, PROCESSOR, lambda samples: torch.tensor(3))


def test_resampled_audio_is_measured_at_the_rate_of_the_model(write_audio, tmp_path):
    write_audio("stereo.wav", 1.0, 44_100, channels=2)
    (tmp_path / "m.csv").write_text("audio,text\nstereo.wav,YES\n")
    row = prepare_dataset(load_speech_dataset(tmp_path / "m.csv"), PROCESSOR, frames_of)[0][0]
    assert (row["input_length"], row["duration_s"]) == (16_000, 1.0)


def test_a_second_run_decodes_nothing(write_corpus):
    folder = write_corpus([*CORPUS[:2], CORPUS[2]])
    first, _ = prepare_dataset(load_speech_dataset(folder), PROCESSOR, frames_of)
    kept = folder / "train" / "good.wav"
    status, samples = kept.stat(), kept.read_bytes()
    kept.write_bytes(b"x" * len(samples))  # same size and time, other content: only a decode would notice
    os.utime(kept, ns=(status.st_atime_ns, status.st_mtime_ns))
    again, report = prepare_dataset(load_speech_dataset(folder), PROCESSOR, frames_of)
    assert list(again) == list(first) and report.dropped == {"shorter than 0.25 s": 1}
    with_other_limits, report = prepare_dataset(load_speech_dataset(folder), PROCESSOR, frames_of, min_duration_s=0.6)
    assert names(with_other_limits) == ["good.wav"] and report.dropped == {"shorter than 0.6 s": 2}


def test_a_repaired_file_is_measured_again(write_corpus, write_audio):
    folder = write_corpus([*CORPUS[:2], CORPUS[4]])
    assert len(prepare_dataset(load_speech_dataset(folder), PROCESSOR, frames_of)[0]) == 2
    write_audio("corpus/train/missing.wav", 0.5)
    assert len(prepare_dataset(load_speech_dataset(folder), PROCESSOR, frames_of)[0]) == 3


def test_another_tokenizer_gives_other_labels(write_corpus):
    folder = write_corpus(CORPUS[:2])
    subwords = build_subword_processor(["HELLO WORLD YES"], 14)
    for processor in (PROCESSOR, subwords):
        prepared, _ = prepare_dataset(load_speech_dataset(folder), processor, frames_of)
        assert decode_labels(processor.tokenizer, prepared[0]["labels"]) == "HELLO WORLD"


def test_preparing_twice_changes_nothing(careless_corpus):
    once, _ = prepare_dataset(load_speech_dataset(careless_corpus), PROCESSOR, frames_of)
    twice, report = prepare_dataset(once, PROCESSOR, frames_of)
    assert list(twice) == list(once) and twice.column_names == once.column_names and not report.dropped


def test_a_part_of_a_dataset_in_another_order(careless_corpus):
    dataset = load_speech_dataset(careless_corpus).select([8, 1, 0])
    prepared, report = prepare_dataset(dataset, PROCESSOR, frames_of)
    assert names(prepared) == ["good_too.wav", "good.wav"] and report.total == 3


def test_audio_stored_as_bytes_is_not_copied(write_audio):
    content = write_audio("a.flac", 1.0).read_bytes()
    rows = {"audio": [{"bytes": content, "path": "a.flac"}] * 3 + [{"bytes": b"", "path": "b.flac"}], "text": ["A"] * 4}
    dataset = Dataset.from_dict(rows).cast_column("audio", Audio())
    prepared, report = prepare_dataset(dataset, PROCESSOR, frames_of)
    assert (len(prepared), report.examples) == (3, {"empty file (0 bytes)": ["b.flac"]})
    cached = sum(os.path.getsize(file["filename"]) for file in prepared.cache_files)
    assert cached < len(content)


@pytest.mark.parametrize("stored", [False, True])
def test_audio_that_is_decoded_once(stored, careless_corpus, write_audio):
    write_audio("corpus/train/good.wav", 1.0, 44_100, channels=2)
    dataset = load_speech_dataset(careless_corpus)
    if stored:  # as bytes, as in Parquet
        dataset = Dataset.from_list([{**row, "audio": with_bytes(row["audio"])} for row in dataset])
        dataset = dataset.cast_column("audio", Audio(decode=False))
    plain, plain_report = prepare_dataset(dataset, PROCESSOR, frames_of, max_duration_s=2)
    decoded, report = prepare_dataset(dataset, PROCESSOR, frames_of, max_duration_s=2, decode_once=True)
    assert report.dropped == plain_report.dropped and short_examples(report) == short_examples(plain_report)
    assert sorted(decoded.column_names) == sorted(plain.column_names) and names(decoded) == names(plain)
    for before, after in zip(plain, decoded, strict=True):
        assert after["audio"]["bytes"] != before["audio"]["bytes"]
        assert (decode_audio(after["audio"], 16_000) == decode_audio(before["audio"], 16_000)).all()
        assert {**after, "audio": None} == {**before, "audio": None}
    for name in names(plain):
        (careless_corpus / "train" / name).unlink()
    assert len(decode_audio(decoded[0]["audio"], 16_000)) == 16_000


def with_bytes(audio: dict) -> dict:
    exists = os.path.exists(audio["path"])
    with open(audio["path"] if exists else os.devnull, "rb") as file:
        return {**audio, "bytes": file.read() if exists else None}


def test_a_stream_that_is_decoded_once_holds_samples(write_corpus):
    stream = load_speech_dataset(write_corpus(CORPUS[:2]), streaming=True)
    (example, *_), _ = prepare_dataset(stream, PROCESSOR, frames_of, decode_once=True)
    audio = example["audio"]
    assert audio["path"].endswith("good.wav") and audio["array"].shape == (example["input_length"],)


def test_several_processes_find_the_same(careless_corpus):
    prepared, report = prepare_dataset(
        load_speech_dataset(careless_corpus), PROCESSOR, frames_of, max_duration_s=2, num_proc=2
    )
    assert names(prepared) == ["good.wav", "good_too.wav"] and short_examples(report) == EXPECTED


@pytest.mark.parametrize(("shortest", "longest"), [(2, 1), (-1, 5)])
def test_impossible_limits(shortest, longest):
    dataset = Dataset.from_dict({"audio": [], "text": []})
    with pytest.raises(ValueError, match=f"min_duration_s={shortest} and max_duration_s={longest}: need 0 <= minimum"):
        prepare_dataset(dataset, PROCESSOR, frames_of, min_duration_s=shortest, max_duration_s=longest)


@pytest.mark.data
def test_real_corpora(real_speech):
    books = load_speech_dataset(real_speech("mini_librispeech"), split="test")
    prepared, report = prepare_dataset(books, PROCESSOR, frames_of)
    assert (len(prepared), report.dropped) == (97, {})
    assert sum(prepared["duration_s"]) == pytest.approx(0.33 * 3600, rel=0.05)
    folder = real_speech("spoken_digits")
    digits = load_speech_dataset(folder, split="validation")
    processor = build_character_processor(digits["text"])
    prepared, report = prepare_dataset(digits, processor, frames_of)
    durations = [soundfile.info(file).duration for file in (folder / "validation").glob("*.flac")]
    assert report.kept == sum(duration >= 0.25 for duration in durations) < report.total == 150
