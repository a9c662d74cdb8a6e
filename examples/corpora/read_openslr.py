#!/usr/bin/env python
"""Bring LibriSpeech or TED-LIUM 3, as OpenSLR distributes them, into folders with a metadata.csv for each split.

    python examples/corpora/read_openslr.py librispeech LibriSpeech lists/librispeech
    python examples/corpora/read_openslr.py tedlium3 TEDLIUM_release-3 corpora/tedlium3 --num_proc 8

LibriSpeech (https://www.openslr.org/12, CC BY 4.0) has a file for each utterance already, so that only lists are
written, by the Hub's names of the splits (train.clean.100, ...): train with --dataset lists/librispeech
--audio_root LibriSpeech. The Hub has the same corpus as Parquet, openslr/librispeech_asr, which needs none of this.

TED-LIUM 3 (https://www.openslr.org/51, CC BY-NC-ND 3.0) has whole talks, and STM files that tell where the segments
are: each becomes a FLAC file, 16 bits and 16 kHz as the talks. This is the "legacy" division, whose validation (dev)
and test splits are those of TED-LIUM 2. Transcripts stay as they are, marks included: `python -m hf_dld prepare`
rewrites them (examples/recipes/README.md says how).

Repeated after an interruption, it starts again; a split's metadata.csv is there when all of the split is.
"""

import argparse
import csv
import io
import multiprocessing
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import soundfile

from hf_dld.whole_files import write_whole_text

LIBRISPEECH_SPLITS = {
    "train-clean-100": "train.clean.100",
    "train-clean-360": "train.clean.360",
    "train-other-500": "train.other.500",
    "dev-clean": "validation.clean",
    "dev-other": "validation.other",
    "test-clean": "test.clean",
    "test-other": "test.other",
}
TEDLIUM_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def read_librispeech(source: Path, output: Path) -> None:
    """Write OUTPUT/SPLIT/metadata.csv for each split of the corpus that is there; file names are relative to SOURCE."""
    found = [folder for folder in LIBRISPEECH_SPLITS if (source / folder).is_dir()]
    if not found:
        raise ValueError(f"{source} has none of {', '.join(LIBRISPEECH_SPLITS)}: give the folder LibriSpeech itself")
    for folder in found:
        rows = [
            (str(path.parent.relative_to(source) / f"{name}.flac"), text, name.split("-")[0])
            for path in sorted((source / folder).glob("*/*/*.trans.txt"))
            for name, _, text in (line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines())
        ]
        write_metadata(output / LIBRISPEECH_SPLITS[folder], ("file_name", "transcription", "speaker"), rows)


def read_tedlium(source: Path, output: Path, num_proc: int) -> None:
    """Write OUTPUT/SPLIT/TALK/*.flac, a file for each segment, and OUTPUT/SPLIT/metadata.csv."""
    root = source / "legacy"
    missing = [folder for folder in TEDLIUM_SPLITS if not (root / folder / "stm").is_dir()]
    if missing:
        raise ValueError(f"{root} has no {missing[0]}/stm: give the folder TEDLIUM_release-3 itself")
    for folder, split in TEDLIUM_SPLITS.items():
        talks = sorted((root / folder / "stm").glob("*.stm"))
        with multiprocessing.Pool(num_proc) as pool:
            cut = list(pool.imap(partial(cut_talk, output=output / split), talks))
        rows = [row for segments, _ in cut for row in segments]
        for segment in (segment for _, left_out in cut for segment in left_out):
            print(f"left out, because its talk has no audio there: {segment}")
        write_metadata(output / split, ("file_name", "transcription", "speaker", "seconds"), rows)


def cut_talk(stm: Path, output: Path) -> tuple[list[tuple[str, str, str, str]], list[str]]:
    """The rows of a talk's segments, whose files are written, and the names of those with no audio in the talk."""
    rows, left_out = [], []
    for talk, segments in groupby(read_stm(stm), key=itemgetter(0)):  # one, but not always the STM file's own name
        (output / talk).mkdir(parents=True, exist_ok=True)
        with soundfile.SoundFile(stm.parent.parent / "sph" / f"{talk}.sph") as file:
            rate_hz = file.samplerate
            for _, speaker, start_s, end_s, text in segments:
                start, end = round(start_s * rate_hz), min(round(end_s * rate_hz), file.frames)
                name = f"{talk}/{talk}-{round(start_s * 100):07}-{round(end_s * 100):07}.flac"
                if start >= end:
                    left_out.append(name)
                    continue
                file.seek(start)
                soundfile.write(output / name, file.read(end - start, dtype="int16"), rate_hz, subtype="PCM_16")
                rows.append((name, text, speaker, f"{(end - start) / rate_hz:.3f}"))
    return rows, left_out


def read_stm(path: Path) -> Iterator[tuple[str, str, float, float, str]]:
    """Talk, speaker, start and end in seconds, and transcript of each segment; lines of an STM file are

    TALK CHANNEL SPEAKER START_S END_S <LABEL> TRANSCRIPT
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith(";;"):
            continue
        try:
            talk, _, speaker, start, end, _, *words = line.split()
            segment = talk, speaker, float(start), float(end), " ".join(words)
        except ValueError:
            raise ValueError(f"{path}, line {number}: not a segment of an STM file: {line[:80]!r}") from None
        yield segment


def write_metadata(folder: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if not rows:
        raise ValueError(f"no utterance was found for {folder}")
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows([header, *rows])
    folder.mkdir(parents=True, exist_ok=True)
    write_whole_text(folder / "metadata.csv", content.getvalue())
    print(f"{folder}: {len(rows):,} utterances")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=("librispeech", "tedlium3"))
    parser.add_argument("source", type=Path, help="the unpacked folder LibriSpeech or TEDLIUM_release-3")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that cut talks")
    args = parser.parse_args()
    if args.corpus == "librispeech":
        read_librispeech(args.source, args.output)
    else:
        read_tedlium(args.source, args.output, args.num_proc)


if __name__ == "__main__":
    main()
