import datasets
import pytest
from datasets import Audio, Dataset

from hf_dld.data.audio import decode_audio
from hf_dld.data.datasets import load_speech_dataset

ROWS = [("a.wav", "ONE", 0.5), ("b.wav", "TWO", 0.3), ("c.wav", "", 0.4)]


def names_and_texts(dataset) -> list[tuple]:
    return [(row["audio"]["path"].rsplit("/", 1)[1], row["text"]) for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_with_metadata(write_corpus, streaming):
    folder = write_corpus(ROWS)
    dataset = load_speech_dataset(folder, streaming=streaming)
    assert names_and_texts(dataset) == [("a.wav", "ONE"), ("b.wav", "TWO"), ("c.wav", None)]
    assert decode_audio(next(iter(dataset))["audio"], 16_000).shape == (8000,)
    if not streaming:
        assert isinstance(dataset.features["audio"], Audio) and not dataset.features["audio"].decode


def test_a_split_folder_alone_is_the_train_split(write_corpus):
    assert len(load_speech_dataset(write_corpus(ROWS) / "train")) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_split_lists_the_splits(write_corpus, streaming):
    write_corpus(ROWS, "corpus/test")
    folder = write_corpus(ROWS, "corpus/train")
    with pytest.raises(ValueError, match="has no split 'validation'; its splits are: test, train"):
        load_speech_dataset(folder, split="validation", streaming=streaming)


def test_one_metadata_file_for_several_split_folders_is_refused(write_corpus):
    folder = write_corpus([("train/a.wav", "ONE", 0.1), ("test/b.wav", "TWO", 0.1)], "corpus/all") / "all"
    with pytest.raises(ValueError, match="is one file for the split folders train, test: put one into each"):
        load_speech_dataset(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", 'audio,text\nclips/a.wav,"ONE, TWO"\nclips/b.wav,007\nclips/c.wav,NULL\n'),
        ("m.csv", '\ufeffaudio,text\r\nclips/a.wav,"ONE, TWO"\r\nclips/b.wav,007\r\nclips/c.wav,NULL\r\n'),
        ("m.tsv", "path\tspeaker\tsentence\nclips/a.wav\t1\tONE, TWO\nclips/b.wav\t1\t007\nclips/c.wav\t1\tNULL\n"),
        (
            "m.jsonl",
            '{"audio_filepath": "clips/a.wav", "text": "ONE, TWO"}\n{"audio_filepath": "clips/b.wav", "text": "007"}\n'
            '\n{"audio_filepath": "./clips/c.wav", "text": "NULL"}\n',
        ),
        (
            "m.json",
            '[{"path": "clips/a.wav", "sentence": "ONE, TWO"}, {"path": "clips/b.wav", "sentence": "007"},'
            ' {"path": "clips/c.wav", "sentence": "NULL"}]',
        ),
    ],
)
def test_manifests_keep_transcripts_as_they_are_written(tmp_path, write_audio, name, content, streaming):
    for clip in "abc":
        write_audio(f"clips/{clip}.wav", 0.1)
    (tmp_path / name).write_text(content, newline="")
    dataset = load_speech_dataset(tmp_path / name, streaming=streaming)
    assert names_and_texts(dataset) == [("a.wav", "ONE, TWO"), ("b.wav", "007"), ("c.wav", "NULL")]
    assert all(len(decode_audio(row["audio"], 16_000)) == 1600 for row in dataset)


def test_an_edited_manifest_is_read_again(tmp_path):
    manifest = tmp_path / "m.csv"
    manifest.write_text("audio,text\na.wav,ONE\n")
    assert load_speech_dataset(manifest)["text"][:] == ["ONE"]
    manifest.write_text("audio,text\na.wav,ONE\nb.wav,TWO\n")
    assert load_speech_dataset(manifest)["text"][:] == ["ONE", "TWO"]


def test_missing_audio_is_no_error_here(write_corpus):
    assert len(load_speech_dataset(write_corpus([("gone.wav", "ONE", None)]))) == 1


@pytest.mark.parametrize("path", ["../secret.wav", "/etc/passwd", "clips/../../secret.wav", "."])
@pytest.mark.parametrize("streaming", [False, True])
def test_paths_that_leave_the_corpus_folder_are_refused(tmp_path, path, streaming):
    manifest = tmp_path / "corpus" / "m.csv"
    manifest.parent.mkdir()
    manifest.write_text(f"audio,text\nfine.wav,ONE\n{path},TWO\n")
    with pytest.raises(
        ValueError, match=r"m\.csv, line 3: audio path .* leaves the corpus folder .*corpus; only files"
    ):
        list(load_speech_dataset(manifest, streaming=streaming))


def test_an_absolute_path_inside_the_corpus_is_fine(tmp_path, write_audio):
    path = write_audio("clips/a.wav", 0.1)
    (tmp_path / "m.csv").write_text(f"audio,text\n{path},ONE\n")
    assert load_speech_dataset(tmp_path / "m.csv")[0]["audio"]["path"] == str(path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "m.csv",
            "audio,text\na.wav,ONE, TWO\n",
            r"line 2: 3 fields where the header has 2 \(audio, text\); a text that",
        ),
        ("m.csv", "audio,text\n,ONE\n", "line 2: column 'audio' must hold the path of an audio file, it is ''"),
        ("m.csv", "audio,text\n", "m.csv: no rows in this file"),
        ("m.csv", "", "m.csv: no rows in this file"),
        (
            "m.csv",
            "clip,words\na.wav,ONE\n",
            "which column holds the audio. Of clip, words, none is called audio, file_n",
        ),
        (
            "m.csv",
            "path,audio,text\na,a,ONE\n",
            "Of path, audio, text, audio and path could all be it. Name it with aud",
        ),
        (
            "m.csv",
            "audio,text,sentence\na,ONE,ONE\n",
            "text and sentence could all be it. Name it with text_column, or tr",
        ),
        ("m.csv", "audio,words\na,ONE\n", "which column holds the text. Of audio, words, none is called text"),
        ("m.jsonl", '{"audio": "a.wav", "text": "A"}\n{oops}\n', "m.jsonl, row 2: not JSON"),
        ("m.jsonl", "3\n", "m.jsonl, row 1: a row must be an object with named columns, it is 3"),
        ("m.txt", "a.wav ONE\n", "m.txt is not a manifest: its name must end in one of .csv, .tsv, .json, .jsonl"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=problem):
        load_speech_dataset(tmp_path / name)


def test_a_manifest_in_another_encoding(tmp_path):
    (tmp_path / "m.csv").write_bytes("audio,text\na.wav,zwölf\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"m\.csv: not UTF-8 text .invalid"):
        load_speech_dataset(tmp_path / "m.csv")


def test_named_columns(tmp_path):
    (tmp_path / "m.csv").write_text("clip,words,text\na.wav,ONE,x\n")
    dataset = load_speech_dataset(tmp_path / "m.csv", audio_column="clip", text_column="words")
    assert names_and_texts(dataset) == [("a.wav", "ONE")]
    with pytest.raises(ValueError, match="has no column 'word'; its columns are: clip, words, text"):
        load_speech_dataset(tmp_path / "m.csv", audio_column="clip", text_column="word")


def test_speech_without_transcripts(tmp_path):
    (tmp_path / "m.csv").write_text("file_name\na.wav\n")
    assert load_speech_dataset(tmp_path / "m.csv", transcribed=False).column_names == ["audio"]


def test_nothing_there(tmp_path):
    for path in (tmp_path / "gone", str(tmp_path / "gone"), "gone.csv", "./gone"):
        with pytest.raises(FileNotFoundError, match="no file or folder .*gone"):
            load_speech_dataset(path)


def test_a_configuration_of_a_local_corpus(write_corpus):
    with pytest.raises(
        ValueError, match="name='clean' chooses a configuration of a Hub dataset, but .* is a local corpus"
    ):
        load_speech_dataset(write_corpus(ROWS), "clean")


def test_a_folder_of_loose_files_says_what_to_do(write_audio):
    folder = write_audio("loose/a.wav").parent
    with pytest.raises(ValueError, match="holds loose audio files.* list loose files in a metadata.csv"):
        load_speech_dataset(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_embedded_audio_as_the_hub_serves_it(tmp_path, write_audio, streaming):
    rows = {
        "file": ["x"],
        "audio": [{"bytes": write_audio("a.flac").read_bytes(), "path": "a.flac"}],
        "sentence": ["ONE"],
        "text": [3],
    }
    (tmp_path / "hub").mkdir()
    Dataset.from_dict(rows).cast_column("audio", Audio()).to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    dataset = load_speech_dataset(tmp_path / "hub", text_column="sentence", streaming=streaming)
    row = next(iter(dataset))
    assert set(row) == {"audio", "text"} and row["text"] == "ONE"
    assert decode_audio(row["audio"], 16_000).shape == (8000,)
    with pytest.raises(ValueError, match="text and sentence could all be it"):
        load_speech_dataset(tmp_path / "hub", streaming=streaming)
    with pytest.raises(ValueError, match="column 'text' holds Value.'int64'., not text"):
        load_speech_dataset(tmp_path / "hub", text_column="text", streaming=streaming)
    with pytest.raises(ValueError, match=r"(Unknown split \"test\"|Bad split: test).*\['train'\]"):
        load_speech_dataset(tmp_path / "hub", split="test", streaming=streaming)


@pytest.mark.data
@pytest.mark.parametrize("streaming", [False, True])
def test_real_corpora(real_speech, streaming):
    dataset = load_speech_dataset(real_speech("mini_librispeech"), split="test", streaming=streaming)
    assert len(list(dataset)) == 97
    assert next(iter(dataset))["text"].startswith("MANTELISH EXCUSED HIMSELF")
    digits = load_speech_dataset(real_speech("spoken_digits"), split="validation", streaming=streaming)
    assert isinstance(digits, datasets.IterableDataset if streaming else Dataset)
    assert {row["text"] for row in digits} == set("zero one two three four five six seven eight nine".split())
