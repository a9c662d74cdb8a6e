"""Rows of a CSV, TSV, JSON or JSON-lines file of utterances, read with nothing guessed about their types.

pandas, which `datasets` reads CSV with, turns the transcript NULL into a missing value, 007 into 7, and takes the first
column for an index when a transcript has a comma too many. The standard library does none of that.
"""

import csv
import json
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ROWS_WITH_COLUMNS = 1000  # that are looked at for the names of columns
MANIFEST_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")


def manifest_columns(manifest: Path) -> list[str]:
    """The column names: the header of a CSV or TSV file, the keys of the first JSON rows, which may lack some."""
    columns = {name: None for _, row in islice(_numbered_rows(manifest), _ROWS_WITH_COLUMNS) for name in row}
    if not columns:
        raise ValueError(f"{manifest}: no rows in this file")
    return list(columns)


def manifest_rows(
    manifest: Path,
    audio_column: str,
    text_column: str | None,
    audio_root: Path | None = None,
    version: tuple[int, int] | None = None,
) -> Iterator[dict]:
    """Rows `{"audio": {"bytes": None, "path"}}` and, with a text column, `"text"` (None where it is blank).

    Audio paths are relative to `audio_root`, the manifest's folder when None, and may not leave it. `version` (see
    `file_version`) is not used: it makes `datasets` read an edited file again.

    Raises:
        ValueError: naming file and line, for a row that cannot be used.
    """
    root = os.path.abspath(audio_root or manifest.parent)
    for where, row in _numbered_rows(manifest):
        audio = row.get(audio_column)
        if not isinstance(audio, str) or not audio.strip():
            raise ValueError(f"{where}: column {audio_column!r} must hold the path of an audio file, it is {audio!r}")
        utterance = {"audio": {"bytes": None, "path": path_within(root, _unicode(audio, where), where)}}
        if text_column is not None:
            utterance["text"] = _text(row.get(text_column), text_column, where)
        yield utterance


def file_version(path: Path) -> tuple[int, int]:
    """Size and time of last change: what tells an edited file from the one that was cached."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def path_within(root: str, path: str, where: str) -> str:
    """The absolute path of a file of a corpus; neither its name nor a symbolic link may leave the folder `root`.

    Raises:
        ValueError: it does. `where` says who names the path.
    """
    absolute = os.path.normpath(os.path.join(root, path))
    if not _is_below(absolute, root) or not any(_is_below(real_path(absolute), real) for real in _real_roots(root)):
        raise ValueError(
            f"{where}: audio path {path!r} leaves the corpus folder {root}; only files inside it are read. If it is "
            "meant to, name the folder that holds all audio: audio_root='/' allows any"
        )
    return absolute


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def real_path(path: str) -> str:
    """The path of a file without symbolic links; quicker than `os.path.realpath` for many files of a folder."""
    try:
        if not os.path.islink(path):  # spares looking at each folder above each file
            folder, name = os.path.split(path)
            return os.path.join(_real_folder(folder), name)
        return os.path.realpath(path)
    except ValueError:  # no path at all, such as one with a null byte: no file can be reached by it
        return path


_real_folder = lru_cache(maxsize=1024)(os.path.realpath)


@lru_cache(maxsize=16)
def _real_roots(root: str) -> list[str]:
    """Where the files of a corpus may really lie: in its folder; those downloaded from the Hub in `blobs` beside it."""
    real = Path(os.path.realpath(root))
    blobs = [real.parents[1] / "blobs"] if real.parent.name == "snapshots" else []
    return [str(real), *map(str, blobs)]


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair, which JSON can spell
        raise ValueError(f"{where}: {text!r} is not Unicode text") from None
    return text


def _text(text: Any, column: str, where: str) -> str | None:
    if isinstance(text, float) and math.isnan(text):
        return None  # pandas writes it where nothing is
    if not isinstance(text, str | int | float | None) or isinstance(text, bool):
        raise ValueError(f"{where}: column {column!r} must hold text, it is {text!r}")
    return _unicode(str(text), where) if text is not None and str(text).strip() else None


def _numbered_rows(manifest: Path) -> Iterator[tuple[str, dict]]:
    # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column's name
    try:
        with open(manifest, encoding="utf-8-sig", newline="") as lines:
            if manifest.suffix.lower() in _DELIMITERS:
                yield from _csv_rows(manifest, lines)
            else:
                yield from _json_rows(manifest, lines)
    except UnicodeDecodeError:
        check_utf8(manifest)
        raise


def check_utf8(manifest: Path) -> None:
    """Raise `ValueError` naming the first line that is not UTF-8; the decoder's own error names no place in a file."""
    with open(manifest, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{manifest}, line {number}: not UTF-8 text ({error.reason})") from None


def _csv_rows(manifest: Path, lines) -> Iterator[tuple[str, dict]]:
    delimiter = _DELIMITERS[manifest.suffix.lower()]
    # TSV as speech corpora write it has no quoting: a transcript may begin with a quotation mark
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    # strict: a quotation mark that is never closed would make one text of all that follows
    rows = _whole_rows(csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True), manifest)
    _, header = next(rows, ("", []))
    if len(set(header)) < len(header):
        raise ValueError(f"{manifest}: two columns have the same name ({', '.join(header)})")
    for where, fields in rows:
        if fields and len(fields) != len(header):
            raise ValueError(
                f"{where}: {len(fields)} fields where the header has {len(header)} ({', '.join(header)}); "
                "a text that contains the delimiter must be in quotation marks"
            )
        if fields:
            yield where, dict(zip(header, fields, strict=True))


def _whole_rows(reader: Any, manifest: Path) -> Iterator[tuple[str, list[str]]]:
    """The rows of a CSV reader, with the line that each begins in."""
    while True:
        where = f"{manifest}, line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{where}: not a table ({error}); it may lack a quotation mark, or have one too many"
            ) from None
        yield where, fields


def _json_rows(manifest: Path, lines) -> Iterator[tuple[str, dict]]:
    first = lines.read(1)
    while first.isspace():
        first = lines.read(1)
    lines.seek(0)
    if first == "[":
        rows = _json(lines.read(), str(manifest))
    else:
        rows = (_json(line, f"{manifest}, row {n}") for n, line in enumerate(filter(str.strip, lines), start=1))
    for number, row in enumerate(rows, start=1):
        where = f"{manifest}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a row must be an object with named columns, it is {row!r}")
        yield where, row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, or nested too deeply
        raise ValueError(f"{where}: not JSON ({error})") from None
