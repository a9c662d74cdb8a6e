"""Speech corpora as `datasets` objects with the columns `audio` (not decoded) and `text`."""

import os
import re
from functools import partial
from pathlib import Path

import datasets
from datasets import Audio, Features, Value

from .archives import check_archives
from .manifests import MANIFEST_SUFFIXES, file_version, manifest_columns, manifest_rows, path_within, real_path

AUDIO_COLUMNS = ("audio", "file_name", "path", "audio_filepath")
TEXT_COLUMNS = ("text", "transcription", "sentence", "transcript", "normalized_text", "txt")
METADATA_FILES = ("metadata.csv", "metadata.jsonl")

# The storage of Audio(decode=False), under a type that `datasets` can write and stream without torchcodec.
_STORED_AUDIO = {"bytes": Value("binary"), "path": Value("string")}


def load_speech_dataset(
    path: str | Path,
    name: str | None = None,
    split: str = "train",
    *,
    audio_column: str | None = None,
    text_column: str | None = None,
    audio_root: str | Path | None = None,
    transcribed: bool = True,
    streaming: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load one split of a speech corpus. Nothing is decoded, so a missing or broken file is not an error here.

    Args:
        path: a Hub dataset id; a folder whose split subfolders, or which itself, hold a metadata.csv or metadata.jsonl
            (the layout that `datasets` calls audiofolder), or any other folder that `datasets` loads, such as one of
            parquet files or, with `streaming`, WebDataset tars (an audio file and a .txt for each key); or a .csv,
            .tsv, .json or .jsonl manifest. Audio paths are relative to the file that lists them and may not leave its
            folder, by a symbolic link neither.
        name: the configuration of a Hub dataset.
        split: which split, or several that are joined, such as "train.clean.100+train.clean.360". A manifest, or a
            folder with one metadata file at its root, is one split named "train".
        audio_column, text_column: found among `AUDIO_COLUMNS` and `TEXT_COLUMNS` when None.
        audio_root: the folder that audio paths are relative to and may not leave, where it is not that of the file
            that lists them; "/" allows any absolute path.
        transcribed: False for speech without transcripts; there is then no `text` column.
        streaming: return an `IterableDataset` that reads as it goes.
        revision: the Git revision of a Hub dataset.
        cache_dir: where `datasets` keeps what it has read; its own default when None.

    Returns:
        A dataset with `audio`, dicts of `path` and `bytes` for `decode_audio`, and `text`, None or "" where an
        utterance has no transcript. All other columns are left out.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no such split or column, the same split twice, columns that could be meant in two ways, a manifest
            that cannot be used, an audio path that leaves its folder, or an archive that would unpack to much more
            than it is.
    """
    columns = partial(_pick_columns, audio_column=audio_column, text_column=text_column, transcribed=transcribed)
    joined = [
        _load_split(path, name, part, columns, audio_root, streaming, revision, cache_dir)
        for part in _split_names(split)
    ]
    return joined[0] if len(joined) == 1 else datasets.concatenate_datasets(joined)


def _split_names(split: str) -> list[str]:
    names = split.split("+")
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"split={split!r} must be the name of a split, or several different ones with '+' between")
    return names


def _load_split(path: str | Path, name: str | None, split: str, columns, audio_root, streaming, revision, cache_dir):
    source = Path(path).expanduser()
    manifest = _find_manifest(source, split)
    if manifest is not None:
        if name is not None:
            raise ValueError(f"name={name!r} chooses a configuration of a Hub dataset, but {source} is a local corpus")
        return _load_manifest(manifest, split, columns, audio_root, streaming, cache_dir)
    if source.is_dir():
        check_archives(source)
    elif _looks_local(path):
        raise FileNotFoundError(f"no file or folder {source}")
    dataset = _load_with_datasets(str(path), name, split, streaming, revision, cache_dir)
    features = dataset.features or _features_of(next(iter(dataset)))
    audio, text = columns(features, where=f"dataset {path}")
    chosen = {audio: "audio"} if text is None else {audio: "audio", text: "text"}
    if text is not None and getattr(features[text], "dtype", "string") not in ("string", "large_string"):
        raise ValueError(f"dataset {path}: column {text!r} holds {features[text]}, not text")
    dataset, stored = dataset.select_columns(list(chosen)), _STORED_AUDIO if streaming else Audio(decode=False)
    if getattr(features[audio], "dtype", None) in ("string", "large_string"):
        # paths, which Arrow cannot cast to what is stored of audio
        typed = Features({name: stored if name == audio else Value("string") for name in chosen})
        dataset = dataset.map(lambda path: {audio: {"bytes": None, "path": path}}, input_columns=audio, features=typed)
    else:
        dataset = dataset.cast_column(audio, stored)
    dataset = dataset.rename_columns({old: new for old, new in chosen.items() if old != new})
    return _within_corpus(dataset, audio_root or source)


def _features_of(row: dict) -> dict:
    """What a stream of a text format does not say: which columns hold text."""
    return {name: Value("string") if isinstance(value, str) else None for name, value in row.items()}


def public_name(source: str | Path) -> str:
    """A Hub id as it is; of a local path the end alone, which says nothing about its owner's folders."""
    path = Path(source)
    return path.name if path.is_absolute() else "/".join(path.parts[-2:])


def split_name(split: str) -> str:
    """What `datasets` may call the split of a folder: `dev_clean` that of `dev-clean`, which is no name to it."""
    return re.sub(r"[^\w.]", "_", split)


def speech_splits(path: str | Path, name: str | None = None) -> list[str]:
    """The splits that `load_speech_dataset` finds at this path; the same errors."""
    source = Path(path).expanduser()
    if not source.exists() and _looks_local(path):
        raise FileNotFoundError(f"no file or folder {source}")
    return list(_find_manifests(source)) or datasets.get_dataset_split_names(str(path), name)


def _find_manifests(source: Path) -> dict[str, Path]:
    """The files that list the utterances of each split; none where `datasets` must find them itself."""
    if source.is_file():
        if source.suffix.lower() not in MANIFEST_SUFFIXES:
            raise ValueError(f"{source} is not a manifest: its name must end in one of {', '.join(MANIFEST_SUFFIXES)}")
        return {"train": source}
    if source.is_dir():
        splits = {folder.name: found for folder in sorted(source.iterdir()) if (found := _metadata_in(folder))}
        return splits or _whole_folder(source)
    return {}


def _find_manifest(source: Path, split: str) -> Path | None:
    """The file that lists the split's utterances, or None where `datasets` must find them itself."""
    splits = _find_manifests(source)
    if splits and split not in splits:
        raise ValueError(f"{source} has no split {split!r}; its splits are: {', '.join(splits)}")
    return splits.get(split)


def _whole_folder(source: Path) -> dict[str, Path]:
    metadata = _metadata_in(source)
    subfolders = [split for split in ("train", "validation", "test") if (source / split).is_dir()]
    if metadata is not None and subfolders:  # all rows as "train" would train on the test set
        raise ValueError(f"{metadata} is one file for the split folders {', '.join(subfolders)}: put one into each")
    return {} if metadata is None else {"train": metadata}


def _metadata_in(folder: Path) -> Path | None:
    return next((folder / file for file in METADATA_FILES if (folder / file).is_file()), None)


def _looks_local(path: str | Path) -> bool:
    if isinstance(path, Path) or path.count("/") > 1:  # a Hub id is "name" or "owner/name"
        return True
    return path.startswith((".", "/", "~")) or path.endswith(MANIFEST_SUFFIXES)


def _load_manifest(manifest: Path, split: str, columns, audio_root, streaming: bool, cache_dir: str | None):
    audio, text = columns(dict.fromkeys(manifest_columns(manifest)), where=str(manifest))
    # the arguments are the key under which `datasets` keeps the rows, which hold absolute paths
    manifest = Path(os.path.abspath(manifest))
    features = Features({"audio": _STORED_AUDIO} | ({"text": Value("string")} if text is not None else {}))
    root = None if audio_root is None else Path(os.path.abspath(Path(audio_root).expanduser()))
    arguments = {"manifest": manifest, "audio_column": audio, "text_column": text, "audio_root": root}
    if streaming:
        return datasets.IterableDataset.from_generator(
            manifest_rows, features=features, gen_kwargs=arguments, split=datasets.NamedSplit(split_name(split))
        )
    arguments["version"] = file_version(manifest)
    try:
        dataset = datasets.Dataset.from_generator(
            manifest_rows, features, cache_dir, gen_kwargs=arguments, split=datasets.NamedSplit(split_name(split))
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None  # the cause names file and line, the wrapper says nothing
    return dataset.cast_column("audio", Audio(decode=False))


def _load_with_datasets(path: str, name, split: str, streaming: bool, revision, cache_dir):
    try:
        return datasets.load_dataset(
            path, name, split=split, streaming=streaming, revision=revision, cache_dir=cache_dir
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if "torchcodec" not in str(error.__cause__):
            raise
        raise ValueError(
            f"{path} holds loose audio files or archives of them, which `datasets` only reads with torchcodec. Read "
            "WebDataset tars with streaming=True; list loose files in a metadata.csv (columns file_name and "
            "transcription) in a local copy; on the Hub, try revision='refs/convert/parquet'"
        ) from error
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        if Path(path).exists():
            raise
        # "outputs/digits" may be meant as a folder, and reads as a dataset of the Hub where it is not made yet
        raise type(error)(f"{error}; nor is there a file or folder {path} in {Path.cwd()}") from error


def _within_corpus(dataset: datasets.Dataset | datasets.IterableDataset, root: str | Path):
    """Make the paths of audio that is not stored but named absolute.

    Refused, unless it lies in the corpus or where `datasets` unpacks it.
    """
    folders = [str(Path(root).expanduser().absolute()), os.path.realpath(datasets.config.HF_DATASETS_CACHE)]
    absolute = partial(_absolute_path, folders=folders)
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(absolute, input_columns="audio", features=dataset.features)
    named = [chunk for chunk in dataset.data.column("audio").chunks if chunk.field("bytes").null_count]
    # a map writes all audio anew, which need not be where the paths are absolute already
    if any(absolute(audio)["audio"] != audio for chunk in named for audio in chunk.to_pylist()):
        return dataset.map(absolute, input_columns="audio", features=dataset.features)
    return dataset


def _absolute_path(audio: dict, folders: list[str]) -> dict:
    root, unpacked = folders
    path = audio["path"]
    if audio["bytes"] is None and path is not None and not real_path(path).startswith(f"{unpacked}{os.sep}"):
        path = path_within(root, path, "dataset")
    return {"audio": {**audio, "path": path}}


def _pick_columns(
    features: dict, *, where: str, audio_column: str | None, text_column: str | None, transcribed: bool
) -> tuple[str, str | None]:
    typed = [column for column, feature in features.items() if isinstance(feature, Audio)]
    audio = _pick_column("audio", audio_column, typed or AUDIO_COLUMNS, features, where)
    text = _pick_column("text", text_column, TEXT_COLUMNS, features, where) if transcribed else None
    return audio, text


def _pick_column(kind: str, wanted: str | None, usual: tuple | list, columns: dict, where: str) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{where} has no column {wanted!r}; its columns are: {', '.join(columns)}")
        return wanted
    found = [column for column in usual if column in columns]
    if len(found) == 1:
        return found[0]
    problem = f"{' and '.join(found)} could all be it" if found else f"none is called {', '.join(usual)}"
    hint = "" if kind == "audio" else ", or transcribed=False for speech without transcripts"
    raise ValueError(
        f"{where}: which column holds the {kind}? Of {', '.join(columns)}, {problem}. Name it with {kind}_column{hint}"
    )
