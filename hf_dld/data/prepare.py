"""A large corpus as Parquet shards: decoded and measured once, in work that can be interrupted and goes on.

OUTPUT/data/SPLIT-00003-of-00010.parquet    columns audio (bytes, path), text, duration_s
OUTPUT/prepare_report.json, .md             what was kept, what was refused and why
OUTPUT/.prepare/                            the state: settings, what is known of each shard, shards of an
                                            unfinished split, which no loader looks at
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Audio, Features, Value
from pyarrow import parquet
from tqdm.auto import tqdm

from ..whole_files import only_user_of, remove_unfinished, whole_file, write_whole_text
from .audio import AudioError, audio_bytes, audio_name, decode_audio, encode_flac
from .datasets import load_speech_dataset, speech_splits, split_name
from .filtering import NO_TRANSCRIPT, FilterReport, check_limits, duration_problem, size_and_time
from .transcripts import check_text_rules, rewrite_transcript

LOUDEST = 1.5  # resampling overshoots a little; what is far beyond 1 is on another scale, and FLAC would be all clipped
TOO_LOUD = "samples far beyond [-1, 1], which FLAC cannot hold"
STATE, DATA, REPORT = ".prepare", "data", "prepare_report"
MEASURED_HZ = 16_000  # where no rate is chosen
# rows that a reader gets at once, and a writer holds: as many as `datasets` takes for audio, or as fit in so many bytes
GROUP_ROWS, GROUP_BYTES = 100, 64_000_000


@dataclass(frozen=True)
class Settings:
    """What decides what is written, for `prepare_corpus`, where the fields are described."""

    source: str
    name: str | None
    revision: str | None
    audio_column: str | None
    text_column: str | None
    audio_root: str | None
    transcribed: bool
    keep_untranscribed: bool
    min_duration_s: float
    max_duration_s: float
    sampling_rate_hz: int | None
    shard_utterances: int
    text_case: str | None
    text_rules: list[list[str]] | None


@dataclass
class ShardRecord:
    """What is known of a shard that was written: of which rows, how many bytes, and what was refused.

    `refused` are pairs of what an utterance is called and the reason.
    """

    version: str
    size: int
    kept: int
    duration_s: float
    refused: list[list[str]]


@dataclass
class SplitReport:
    """What became of a split: seconds that were kept, counts by reason, and each refused utterance with its reason."""

    duration_s: float = 0.0
    counts: FilterReport = field(default_factory=FilterReport)
    refused: list[list[str]] = field(default_factory=list)

    def add(self, shard: ShardRecord) -> None:
        self.duration_s += shard.duration_s
        self.counts.kept += shard.kept
        self.refused += shard.refused
        for name, reason in shard.refused:
            self.counts.count(reason, lambda name=name: name)


def prepare_corpus(
    source: str | Path,
    output: str | Path,
    splits: Sequence[str] | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
    audio_root: str | Path | None = None,
    transcribed: bool = True,
    keep_untranscribed: bool = False,
    min_duration_s: float = 0.25,
    max_duration_s: float = 30.0,
    sampling_rate_hz: int | None = None,
    shard_utterances: int = 1000,
    text_case: str | None = None,
    text_rules: Sequence[tuple[str, str]] | None = None,
    num_proc: int = 1,
    progress_bar: bool = True,
) -> dict[str, SplitReport]:
    """Write a corpus as Parquet shards of checked utterances, which `load_speech_dataset(output)` and
    `datasets.load_dataset` load, streaming too.

    Every file is decoded; one that cannot be, is too short or too long, or has no transcript is refused and reported.
    Called again after an interruption, it goes on: shards that are done are not done again, but for those whose rows
    or audio files (size, time of last change) are others now. A split appears in OUTPUT/data when all of it is done.

    Args:
        source: as for `load_speech_dataset`, and so are `name`, `revision`, `audio_column`, `text_column`,
            `audio_root` and `transcribed`.
        output: a folder to make, or one that an earlier call with the same settings has made.
        splits: which; default: all of the source. Another call may add others. Those that `datasets` has no name for
            get one: `dev-clean` becomes `dev_clean`.
        keep_untranscribed: keep utterances without a transcript, their text is then None or blank.
        min_duration_s, max_duration_s: both are still allowed.
        sampling_rate_hz: store mono 16-bit FLAC at this rate; default: the bytes of the files as they are.
        shard_utterances: rows of the source in a shard.
        text_case: "lower" or "upper" writes all transcripts so; default: as they are.
        text_rules: regular expressions and what takes the place of what they match, one after the other, before
            `text_case` (see `transcripts.rewrite_transcript`). A transcript of which nothing is left is none.
        num_proc: processes that decode, each a shard at a time.
        progress_bar: show one.

    Returns:
        A report for each split that the folder now has. The same is in prepare_report.json and .md.

    Raises:
        FileNotFoundError, ValueError: as `load_speech_dataset`; impossible arguments; a folder that holds something
            else or was made with other settings; a split of which nothing is left.
        OSError: a shard cannot be written. Those that are done are kept.
        RuntimeError: a process died. The same.
    """
    check_limits(min_duration_s, max_duration_s)
    check_text_rules(text_case, text_rules or ())
    for argument, value in (
        ("sampling_rate_hz", 1 if sampling_rate_hz is None else sampling_rate_hz),
        ("shard_utterances", shard_utterances),
        ("num_proc", num_proc),
    ):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1; got {value}")
    for split in splits or ():
        if "+" in split:
            raise ValueError(f"splits has {split!r}: give single splits; they are joined where they are loaded")
    local = Path(source).expanduser().exists()
    settings = Settings(
        _absolute(source) if local else str(source), name, revision, audio_column, text_column,
        None if audio_root is None else _absolute(audio_root), transcribed, keep_untranscribed, min_duration_s,
        max_duration_s, sampling_rate_hz, shard_utterances, text_case,
        [list(rule) for rule in text_rules] if text_rules else None,
    )  # fmt: skip
    load = partial(
        load_speech_dataset, source, name, revision=revision, audio_column=audio_column, text_column=text_column,
        audio_root=audio_root, transcribed=transcribed,
    )  # fmt: skip
    splits = splits or speech_splits(source, name)
    _check_names(splits)
    corpora = {split_name(split): load(split=split) for split in splits}
    output = Path(output)
    _check_free(output)
    with only_user_of(output / STATE, f"another process is preparing a corpus in {output}"):
        return _prepare(corpora, output, settings, num_proc, progress_bar)


def _check_free(output: Path) -> None:
    if (output / STATE / "settings.json").exists() or not output.exists():
        return
    if not output.is_dir() or any(path.name != STATE for path in output.iterdir()):
        raise ValueError(f"{output} is there and holds no prepared corpus; choose another output folder.")


def _check_names(splits: Sequence[str]) -> None:
    names = [split_name(split) for split in splits]
    same = [split for split, name in zip(splits, names, strict=True) if names.count(name) > 1]
    if same:
        raise ValueError(
            f"The splits {', '.join(same)} would have one name, {split_name(same[0])}: rename one, or prepare them "
            "into folders of their own."
        )


def _prepare(
    corpora: dict[str, datasets.Dataset], output: Path, settings: Settings, num_proc: int, progress_bar: bool
) -> dict[str, SplitReport]:
    _claim(output, settings)
    for split, dataset in corpora.items():
        shards = [
            _Shard(output, split, number, range(start, min(start + settings.shard_utterances, len(dataset))))
            for number, start in enumerate(range(0, len(dataset), settings.shard_utterances))
        ]
        progress = tqdm(total=len(shards), desc=f"Preparing {split}", unit="shard", disable=not progress_bar)
        with progress:
            for _ in _in_processes(partial(_do_shard, dataset=dataset, settings=settings), shards, num_proc):
                progress.update()
        _publish(output, split, shards)
    reports = _read_reports(output)
    _write_reports(output, settings, reports)
    for split in corpora:
        if not reports[split].counts.kept:
            raise ValueError(f"{split}: no utterance is left:\n{reports[split].counts}")
    return reports


def _absolute(path: str | Path) -> str:
    """As audio paths are made absolute: symbolic links stay what they are."""
    return os.path.abspath(Path(path).expanduser())


@dataclass(frozen=True)
class _Shard:
    output: Path
    split: str
    number: int
    rows: range

    @property
    def record_file(self) -> Path:
        return self.output / STATE / self.split / f"{self.number:05}.json"

    @property
    def new_file(self) -> Path:
        """Where the shard lies until all of its split is done."""
        return self.record_file.with_suffix(".parquet")

    def find_file(self) -> Path | None:
        published = (self.output / DATA).glob(f"{self.split}-{self.number:05}-of-*.parquet")
        return self.new_file if self.new_file.exists() else next(published, None)

    def read_record(self) -> ShardRecord | None:
        """What is known of the shard, if it is there, whole."""
        try:
            record = ShardRecord(**json.loads(self.record_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        file = self.find_file()
        return record if file is not None and file.stat().st_size == record.size else None


def _claim(output: Path, settings: Settings) -> None:
    file, wanted = output / STATE / "settings.json", json.loads(json.dumps(asdict(settings)))
    remove_unfinished(output, recursive=True)
    if file.exists():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        different = [name for name in wanted if wanted[name] != earlier.get(name)]
        if different:
            changes = ", ".join(f"{name}: {earlier.get(name)!r} then, {wanted[name]!r} now" for name in different)
            raise ValueError(f"{output} was prepared with other settings ({changes}); choose another output folder.")
    else:
        write_whole_text(file, json.dumps(wanted, indent=2) + "\n")


def _in_processes(function: Any, shards: list[_Shard], num_proc: int) -> Iterator[Any]:
    if num_proc == 1 or len(shards) < 2:
        yield from map(function, shards)
        return
    # not forked from here, for pyarrow has threads, but from a server that has imported what all of them need
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(min(num_proc, len(shards)), context)
    try:
        yield from pool.map(function, shards)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A process that prepares shards died; processes that need more memory than there is are killed. What is "
            "done is kept: repeat the command to continue, perhaps with a smaller num_proc."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _do_shard(shard: _Shard, dataset: datasets.Dataset, settings: Settings) -> None:
    record = shard.read_record()
    if record is not None:
        version = blake2b(digest_size=16)
        for row in map(dataset.__getitem__, shard.rows):
            version.update(_row_version(row))
        if version.hexdigest() == record.version:
            return
    shard.record_file.unlink(missing_ok=True)  # from now on it would describe another file
    record = _write_shard(shard, dataset, settings)
    write_whole_text(shard.record_file, json.dumps(asdict(record)) + "\n")


def _row_version(row: dict[str, Any]) -> bytes:
    """What tells a row from what it was: its text and path, and the audio's bytes, or its file's size and time."""
    audio = row["audio"]
    version = blake2b(f"{row.get('text')!r} {audio['path']!r}".encode(), digest_size=16)
    version.update(audio["bytes"] if audio["bytes"] is not None else repr(size_and_time(audio["path"])).encode())
    return version.digest()


def _write_shard(shard: _Shard, dataset: datasets.Dataset, settings: Settings) -> ShardRecord:
    features = {"audio": Audio(decode=False), "text": Value("string"), "duration_s": Value("float64")}
    if not settings.transcribed:
        del features["text"]
    schema = Features(features).arrow_schema
    version, kept, duration_s, refused = blake2b(digest_size=16), 0, 0.0, []
    try:
        with whole_file(shard.new_file) as beside:
            with parquet.ParquetWriter(beside, schema) as writer:
                group, group_bytes = [], 0
                for row in map(dataset.__getitem__, shard.rows):
                    version.update(_row_version(row))
                    try:
                        prepared = _prepare_row(row, settings)
                    except AudioError as error:
                        refused.append(
                            [_short_name(row["audio"], settings.audio_root or settings.source), error.reason]
                        )
                        continue
                    kept, duration_s = kept + 1, duration_s + prepared["duration_s"]
                    group.append(prepared)
                    group_bytes += len(prepared["audio"]["bytes"])
                    if len(group) == GROUP_ROWS or group_bytes >= GROUP_BYTES:
                        writer.write_table(pyarrow.Table.from_pylist(group, schema))
                        group, group_bytes = [], 0
                if group:
                    writer.write_table(pyarrow.Table.from_pylist(group, schema))
            size = beside.stat().st_size
    except OSError as error:
        raise OSError(
            f"Could not write {shard.new_file}: {error}. Shards that are done are kept: free some space and repeat the "
            "command to continue."
        ) from error
    return ShardRecord(version.hexdigest(), size, kept, duration_s, refused)


def _prepare_row(row: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The row as it is written; `AudioError` with the reason to refuse it."""
    name = _short_name(row["audio"], settings.audio_root or settings.source)
    content = audio_bytes(row["audio"])
    rate_hz = settings.sampling_rate_hz or MEASURED_HZ
    samples = decode_audio({"bytes": content, "path": row["audio"]["path"]}, rate_hz)
    duration_s = len(samples) / rate_hz
    problem = duration_problem(duration_s, settings.min_duration_s, settings.max_duration_s)
    text = rewrite_transcript(row.get("text"), settings.text_case, settings.text_rules or ())
    if settings.transcribed and not settings.keep_untranscribed and not (text or "").strip():
        problem = problem or NO_TRANSCRIPT
    if problem:
        raise AudioError(f"{name}: {problem}", problem)
    if settings.sampling_rate_hz is not None:
        if max(samples.max(), -samples.min()) > LOUDEST:
            raise AudioError(f"{name}: {TOO_LOUD}", TOO_LOUD)
        content, name = encode_flac(samples, rate_hz), str(Path(name).with_suffix(".flac"))
    prepared = {"audio": {"bytes": content, "path": name}, "text": text, "duration_s": duration_s}
    return {key: value for key, value in prepared.items() if key != "text" or settings.transcribed}


def _short_name(audio: dict[str, Any], source: str) -> str:
    """The path within the corpus, so that what is written names no folder of this machine."""
    name = audio_name(audio)
    root = source if os.path.isdir(source) else os.path.dirname(source)
    return os.path.relpath(name, root) if root and name.startswith(root + os.sep) else name


def _publish(output: Path, split: str, shards: list[_Shard]) -> None:
    """Give the shards of a split their final names, and remove those that are no more."""
    names = {f"{split}-{shard.number:05}-of-{len(shards):05}.parquet": shard for shard in shards}
    (output / DATA).mkdir(exist_ok=True)
    for name, shard in names.items():
        file = shard.find_file()
        if file != output / DATA / name:
            os.replace(file, output / DATA / name)
    for path in (output / DATA).glob(f"{split}-?????-of-?????.parquet"):
        if path.name not in names:
            path.unlink()
    for path in (output / STATE / split).iterdir():
        if path not in {shard.record_file for shard in shards}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read_reports(output: Path) -> dict[str, SplitReport]:
    reports = {}
    for folder in sorted(path for path in (output / STATE).iterdir() if path.is_dir()):
        reports[folder.name] = SplitReport()
        for file in sorted(folder.glob("*.json")):
            reports[folder.name].add(ShardRecord(**json.loads(file.read_text(encoding="utf-8"))))
    return reports


def _write_reports(output: Path, settings: Settings, reports: dict[str, SplitReport]) -> None:
    content = {
        "settings": asdict(settings),
        "splits": {
            split: {"kept": report.counts.kept, "hours": report.duration_s / 3600, "refused": report.counts.dropped}
            for split, report in reports.items()
        },
        "refused": [
            {"split": split, "audio": name, "reason": reason}
            for split, report in reports.items()
            for name, reason in report.refused
        ],
    }
    write_whole_text(output / f"{REPORT}.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_whole_text(output / f"{REPORT}.md", reports_markdown(reports))


def reports_markdown(reports: dict[str, SplitReport]) -> str:
    """A table with a line for what was kept of each split, and one for each reason to refuse."""
    lines = ["| split | outcome | utterances | |", "| --- | --- | ---: | --- |"]
    for split, report in reports.items():
        counts = report.counts
        lines.append(f"| {split} | kept | {counts.kept:,} of {counts.total:,} | {report.duration_s / 3600:.2f} h |")
        for reason, count in sorted(counts.dropped.items(), key=lambda item: -item[1]):
            more = ", ..." if count > len(counts.examples[reason]) else ""
            examples = ", ".join(counts.examples[reason]).replace("|", "\\|")
            lines.append(f"| {split} | {reason} | {count:,} | {examples}{more} |")
    return "\n".join(lines) + "\n"
