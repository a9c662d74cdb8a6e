import csv
import json
import tarfile
import zipfile

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


@pytest.mark.parametrize("streaming", [False, True])
def test_joined_splits(write_corpus, streaming):
    write_corpus(ROWS[:1], "corpus/train.clean.100")
    folder = write_corpus(ROWS[1:], "corpus/train.other.500")
    dataset = load_speech_dataset(folder, split="train.other.500+train.clean.100", streaming=streaming)
    assert names_and_texts(dataset) == [("b.wav", "TWO"), ("c.wav", None), ("a.wav", "ONE")]
    with pytest.raises(ValueError, match="has no split 'dev'; its splits are: train.clean.100, train.other.500"):
        load_speech_dataset(folder, split="train.clean.100+dev", streaming=streaming)


@pytest.mark.parametrize("split", ["", "train+", "train+train"])
def test_splits_that_cannot_be_joined(write_corpus, split):
    with pytest.raises(ValueError, match=r"must be the name of a split, or several different ones with '\+' between"):
        load_speech_dataset(write_corpus(ROWS), split=split)


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


@pytest.mark.parametrize("link", ["secret.wav", "secret/a.wav"])
def test_links_that_leave_the_corpus_folder_are_refused(tmp_path, write_audio, link):
    write_audio("world/secret/a.wav")
    corpus = tmp_path / "world" / "corpus"
    corpus.mkdir()
    (corpus / link.split("/")[0]).symlink_to("../secret" if "/" in link else "../secret/a.wav")
    (corpus / "m.csv").write_text(f"audio,text\n{link},TWO\n")
    with pytest.raises(ValueError, match=r"m\.csv, line 2: .* leaves the corpus folder .*: audio_root='/'"):
        load_speech_dataset(corpus / "m.csv")
    for root in ("/", tmp_path / "world"):
        path = link if root == "/" else f"corpus/{link}"
        (corpus / "m.csv").write_text(f"audio,text\n{corpus / link if root == '/' else path},TWO\n")
        dataset = load_speech_dataset(corpus / "m.csv", audio_root=root)
        assert decode_audio(dataset[0]["audio"], 16_000).shape == (8000,)


def test_links_within_the_corpus_and_those_of_the_hub_s_cache_are_fine(tmp_path, write_audio):
    write_audio("hub/blobs/3f2a", format="WAV")
    corpus = tmp_path / "hub" / "snapshots" / "main"
    (corpus / "train").mkdir(parents=True)
    (corpus / "train" / "a.wav").symlink_to("../../../blobs/3f2a")
    (corpus / "train" / "b.wav").symlink_to("a.wav")
    (corpus / "all").symlink_to("train")
    (corpus / "m.csv").write_text("audio,text\ntrain/a.wav,ONE\nall/b.wav,TWO\n")
    dataset = load_speech_dataset(corpus / "m.csv")
    assert [decode_audio(row["audio"], 16_000).shape for row in dataset] == [(8000,)] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_that_name_files_elsewhere(tmp_path, write_audio, streaming):
    (tmp_path / "hub").mkdir()
    inside, outside = write_audio("hub/a.wav"), write_audio("secret.wav")
    table = tmp_path / "hub" / "train.parquet"
    # neither within the cache, where `datasets` unpacks
    back = f"{datasets.config.HF_DATASETS_CACHE}/..{outside}" if streaming else outside
    for path in (inside, back):
        features = datasets.Features({"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                                      "text": datasets.Value("string")})  # fmt: skip
        rows = {"audio": [{"bytes": None, "path": str(path)}], "text": ["ONE"]}
        Dataset.from_dict(rows, features).to_parquet(table)
        if path == inside:
            row = next(iter(load_speech_dataset(tmp_path / "hub", streaming=streaming)))
            assert decode_audio(row["audio"], 16_000).shape == (8000,)
            table.unlink()
    with pytest.raises(ValueError, match="audio path .*secret.wav' leaves the corpus folder .*hub; only files"):
        next(iter(load_speech_dataset(tmp_path / "hub", streaming=streaming)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["struct", "string", "csv"])
def test_tables_that_name_files_by_relative_paths(tmp_path, write_audio, monkeypatch, kind, streaming):
    """They are relative to the corpus, not to where the program runs, where another file has the same name."""
    write_audio("corpus/clips/a.wav", duration_s=0.5)
    write_audio("elsewhere/clips/a.wav", duration_s=0.25)
    path, root = "clips/a.wav", tmp_path / "corpus"
    if kind == "csv":
        (root / "train.csv").write_text(f"path,sentence\n{path},ONE\n")
    else:
        audio = {"bytes": None, "path": path} if kind == "struct" else path
        stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        features = {"audio": stored if kind == "struct" else datasets.Value("string"), "text": datasets.Value("string")}
        rows = {"audio": [audio], "text": ["ONE"]}
        Dataset.from_dict(rows, datasets.Features(features)).to_parquet(root / "train.parquet")
    monkeypatch.chdir(tmp_path / "elsewhere")
    row = next(iter(load_speech_dataset(root, streaming=streaming)))
    assert row["audio"]["path"] == str(root / path) and row["text"] == "ONE"
    assert decode_audio(row["audio"], 16_000).shape == (8000,)


def test_a_manifest_that_was_moved(tmp_path, write_audio, monkeypatch):
    """Given by a relative path, it is not found again in the cache with the paths of where it was."""
    write_audio("project/corpus/a.wav")
    (tmp_path / "project/corpus/metadata.csv").write_text("file_name,transcription\na.wav,ONE\n")
    monkeypatch.chdir(tmp_path / "project")
    load_speech_dataset("corpus")
    (tmp_path / "project").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    [row] = load_speech_dataset("corpus")
    assert row["audio"]["path"] == str(tmp_path / "moved/corpus/a.wav")


def test_transcripts_that_pandas_did_not_find(tmp_path):
    rows = '{"audio": "a.wav"}\n{"audio": "b.wav", "text": NaN}\n{"audio": "c.wav", "text": "ONE"}\n'
    (tmp_path / "m.jsonl").write_text(rows)
    assert names_and_texts(load_speech_dataset(tmp_path / "m.jsonl")) == [
        ("a.wav", None), ("b.wav", None), ("c.wav", "ONE"),
    ]  # fmt: skip


def test_archives_that_unpack_to_more_than_there_is_room_for(tmp_path):
    with zipfile.ZipFile(tmp_path / "clips.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.wav", bytes(10_000_000))
    with pytest.raises(ValueError, match=r"clips.zip has [\d,]+ bytes and would unpack to 10,000,000; at most 100"):
        load_speech_dataset(tmp_path)
    (tmp_path / "clips.zip").unlink()
    (tmp_path / "a.wav").write_bytes(bytes(1000))
    cases = [("w:gz", "a.wav", "not a whole, uncompressed TAR archive"), ("w", "a.txt.gz", "a.txt.gz is compressed")]
    for mode, name, message in cases:
        with tarfile.open(tmp_path / "clips.tar", mode) as archive:
            archive.add(tmp_path / "a.wav", name)
        with pytest.raises(ValueError, match=f"clips.tar.*{message}"):
            load_speech_dataset(tmp_path)


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
        ("m.json", "[" * 100_000, "m.json: not JSON .*recursion"),
        ("m.json", '[{"audio": "a.wav"}', "m.json: not JSON .Expecting"),
        ("m.jsonl", '{"audio": ' + "1" * 5000, "m.jsonl, row 1: not JSON .*4300 digits"),
        ("m.jsonl", '{"audio": "\\ud800.wav", "text": "A"}', "m.jsonl, row 1: '.ud800.wav' is not Unicode text"),
        ("m.jsonl", '{"audio": "a.wav", "text": ["A"]}', "row 1: column 'text' must hold text, it is .'A'"),
        ("m.jsonl", '{"audio": "a.wav", "text": true}', "row 1: column 'text' must hold text, it is True"),
        ("m.csv", "audio,text\n" + "a" * 200_000, r"m.csv, line 2: not a table \(field larger than field limit"),
        (
            "m.csv",
            'audio,text\na.wav,ONE\nb.wav,"TWO\nc.wav,ONE\n',
            "m.csv, line 3: not a table .unexpected end.*quotation mark",
        ),
        ("m.csv", 'audio,text\na.wav,"ONE\nb.wav,"TWO"\n', r"m.csv, line 2: not a table .',' expected after '\"'"),
        ("m.csv", "audio,text,text\na.wav,A,B\n", r"m.csv: two columns have the same name \(audio, text, text\)"),
        ("m.txt", "a.wav ONE\n", "m.txt is not a manifest: its name must end in one of .csv, .tsv, .json, .jsonl"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=problem):
        load_speech_dataset(tmp_path / name)


def test_a_manifest_in_another_encoding(tmp_path):
    (tmp_path / "m.csv").write_bytes("audio,text\na.wav,zwölf\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"m\.csv, line 2: not UTF-8 text .invalid"):
        load_speech_dataset(tmp_path / "m.csv")
    far = "audio,text\n" + "a.wav,one\n" * 10_000 + "a.wav,zwölf"
    (tmp_path / "far.csv").write_bytes(far.encode("latin-1"))
    with pytest.raises(ValueError, match=r"far\.csv, line 10002: not UTF-8 text"):
        load_speech_dataset(tmp_path / "far.csv")


def test_quotation_marks_that_are_closed(tmp_path):
    """A text may have several lines, and marks of its own; JSON may begin with white space."""
    texts = ["two\nlines", 'say "hi" now', "a, b", '"q"']
    with open(tmp_path / "m.csv", "w", newline="") as file:
        csv.writer(file).writerows([["audio", "text"], *(["a.wav", text] for text in texts)])
    rows = [{"audio": "a.wav", "text": text} for text in texts]
    (tmp_path / "m.json").write_text("\n  " + json.dumps(rows))
    for name in ("m.csv", "m.json"):
        assert load_speech_dataset(tmp_path / name)["text"][:] == texts


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


def test_a_folder_that_is_not_made_yet_is_named_beside_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match=f"nor is there a file or folder outputs/digits in {tmp_path}"):
        load_speech_dataset("outputs/digits")


def test_a_configuration_of_a_local_corpus(write_corpus):
    with pytest.raises(
        ValueError, match="name='clean' chooses a configuration of a Hub dataset, but .* is a local corpus"
    ):
        load_speech_dataset(write_corpus(ROWS), "clean")


def test_a_folder_of_loose_files_says_what_to_do(write_audio):
    folder = write_audio("loose/a.wav").parent
    with pytest.raises(ValueError, match="holds loose audio files.*list loose files in a metadata.csv"):
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
