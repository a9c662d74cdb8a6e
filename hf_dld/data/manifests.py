"""Rows of a CSV, TSV, JSON or JSON-lines file of utterances, read with nothing guessed about their types.

pandas, which `datasets` reads CSV with, turns the transcript NULL into a missing value, 007 into 7, and takes the first
column for an index when a transcript has a comma too many. The standard library does none of that.
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
MANIFEST_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")


def manifest_columns(manifest: Path) -> list[str]:
    """The column names: the header of a CSV or TSV file, the keys of the first JSON row."""
    for _, row in _numbered_rows(manifest):
        return list(row)
    raise ValueError(f"{manifest}: no rows in this file")


def manifest_rows(
    manifest: Path, audio_column: str, text_column: str | None, version: tuple[int, int] | None = None
) -> Iterator[dict]:
    """Rows `{"audio": {"bytes": None, "path"}}` and, with a text column, `"text"` (None where it is blank).

    Audio paths are relative to the manifest's folder and may not leave it. `version` (see `file_version`) is not used:
    it makes `datasets` read an edited file again.

    Raises:
        ValueError: naming file and line, for a row that cannot be used.
    """
    root = os.path.abspath(manifest.parent)
    for where, row in _numbered_rows(manifest):
        audio = row.get(audio_column)
        if not isinstance(audio, str) or not audio.strip():
            raise ValueError(f"{where}: column {audio_column!r} must hold the path of an audio file, it is {audio!r}")
        utterance = {"audio": {"bytes": None, "path": _path_within(root, audio, where)}}
        if text_column is not None:
            text = row.get(text_column)
            utterance["text"] = str(text) if text is not None and str(text).strip() else None
        yield utterance


def file_version(path: Path) -> tuple[int, int]:
    """Size and time of last change: what tells an edited file from the one that was cached."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _path_within(root: str, path: str, where: str) -> str:
    absolute = os.path.normpath(os.path.join(root, path))
    if not absolute.startswith(root.rstrip(os.sep) + os.sep):
        raise ValueError(f"{where}: audio path {path!r} leaves the corpus folder {root}; only files inside it are read")
    return absolute


def _numbered_rows(manifest: Path) -> Iterator[tuple[str, dict]]:
    # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column's name
    try:
        with open(manifest, encoding="utf-8-sig", newline="") as lines:
            if manifest.suffix.lower() in _DELIMITERS:
                yield from _csv_rows(manifest, lines)
            else:
                yield from _json_rows(manifest, lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _csv_rows(manifest: Path, lines) -> Iterator[tuple[str, dict]]:
    delimiter = _DELIMITERS[manifest.suffix.lower()]
    # TSV as speech corpora write it has no quoting: a transcript may begin with a quotation mark
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)
    header = next(reader, [])
    for fields in reader:
        where = f"{manifest}, line {reader.line_num}"
        if fields and len(fields) != len(header):
            raise ValueError(
                f"{where}: {len(fields)} fields where the header has {len(header)} ({', '.join(header)}); "
                "a text that contains the delimiter must be in quotation marks"
            )
        if fields:
            yield where, dict(zip(header, fields, strict=True))


def _json_rows(manifest: Path, lines) -> Iterator[tuple[str, dict]]:
    first = lines.read(1)
    lines.seek(0)
    rows = json.load(lines) if first == "[" else (line for line in lines if line.strip())
    for number, row in enumerate(rows, start=1):
        where = f"{manifest}, row {number}"
        try:
            row = json.loads(row) if isinstance(row, str) else row
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a row must be an object with named columns, it is {row!r}")
        yield where, row
