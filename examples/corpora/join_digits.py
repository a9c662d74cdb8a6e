#!/usr/bin/env python
"""Join recordings of single spoken digits into connected digits such as "three one four".

The source is an audiofolder of single digits (the Free Spoken Digit Dataset, CC BY-SA 4.0, or one like it): train/,
validation/ and test/, each with audio and a metadata.csv that names file_name, transcription (zero to nine), speaker.
The output is an audiofolder again. All digits of an utterance come from one speaker, with short pauses between them,
and a split is made from the recordings of the same split only. The same arguments give the same audio.

    python examples/corpora/join_digits.py --source spoken_digits --output /tmp/digits --babble_snr_db 2 12

--babble_snr_db makes the task hard enough for the number of encoder layers to matter: it mixes in babble of several
other speakers of the same split and a little white noise. Without it the utterances are clean. Derived audio stays
under the licence of its source.
"""

import argparse
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SPLITS = ("train", "validation", "test")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPTIONS_FILE = "join_digits.json"
FORMATS = {"flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "OPUS")}
OPUS_RATES_HZ = (8_000, 12_000, 16_000, 24_000, 48_000)
BABBLE_SPEAKERS = 3
WHITE_NOISE_DB = -35.0  # below the speech, so that pauses are never digital silence


@dataclass(frozen=True)
class Recording:
    """One digit spoken once, with unit RMS."""

    digit: str
    speaker: str
    samples: np.ndarray  # (samples,)


def read_split(folder: Path, rate_hz: int) -> list[Recording]:
    """Read all recordings of one split at `rate_hz`."""
    metadata = folder / "metadata.csv"
    if not metadata.is_file():
        raise ValueError(f"{metadata} does not exist: --source must hold {', '.join(SPLITS)}, each with a metadata.csv")
    recordings = []
    with metadata.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["transcription"] not in DIGITS:
                raise ValueError(f"{metadata}: transcription {row['transcription']!r} is not a digit, zero to nine")
            samples, source_rate_hz = soundfile.read(folder / row["file_name"])
            if samples.ndim > 1:
                raise ValueError(f"{folder / row['file_name']} has {samples.shape[1]} channels, mono is needed")
            samples = soxr.resample(samples, source_rate_hz, rate_hz)
            level = np.sqrt(np.mean(samples**2)) if len(samples) else 0.0
            if level == 0:
                raise ValueError(f"{folder / row['file_name']} is silent or empty")
            recordings.append(Recording(row["transcription"], row["speaker"], samples / level))
    return recordings


def by_speaker(recordings: list[Recording]) -> dict[str, list[Recording]]:
    """Group recordings by speaker, in a fixed order."""
    speakers = sorted({recording.speaker for recording in recordings})
    return {name: [one for one in recordings if one.speaker == name] for name in speakers}


def join(chosen: list[Recording], rate_hz: int, rng: np.random.Generator) -> np.ndarray:
    """Set recordings one after the other, with pauses of 20 to 150 ms around them: (samples,)."""
    pauses = [np.zeros(int(seconds * rate_hz)) for seconds in rng.uniform(0.02, 0.15, size=len(chosen) + 1)]
    pieces = [pauses[0]]
    for recording, pause in zip(chosen, pauses[1:], strict=True):
        gain = 10 ** (rng.uniform(-3, 3) / 20)
        pieces += [gain * recording.samples, pause]
    return np.concatenate(pieces)


def babble(length: int, recordings: list[Recording], rng: np.random.Generator) -> np.ndarray:
    """Several speakers saying random digits at once without a pause, with unit RMS: (length,)."""
    speakers = by_speaker(recordings)
    chosen = rng.choice(sorted(speakers), size=min(BABBLE_SPEAKERS, len(speakers)), replace=False)
    mixed = np.zeros(length)
    for name in chosen:
        stream = np.zeros(0)
        while len(stream) < 2 * length:
            stream = np.concatenate([stream, speakers[name][rng.integers(len(speakers[name]))].samples])
        start = rng.integers(length)
        mixed += stream[start : start + length]
    return mixed / np.sqrt(np.mean(mixed**2))


def make_utterance(
    speakers: dict[str, list[Recording]],
    digits: tuple[int, int],
    rate_hz: int,
    babble_snr_db: tuple[float, float] | None,
    rng: np.random.Generator,
) -> tuple[str, str, np.ndarray]:
    """Make one utterance: its transcription, its speaker and (samples,)."""
    speaker = str(rng.choice(sorted(speakers)))
    count = int(rng.integers(digits[0], digits[1] + 1))
    # The digit is drawn before the recording, so that digits are equally frequent whatever the source holds.
    pools = [[one for one in speakers[speaker] if one.digit == digit] for digit in DIGITS]
    pools = [pool for pool in pools if pool]
    chosen = []
    for _ in range(count):
        pool = pools[rng.integers(len(pools))]
        chosen.append(pool[rng.integers(len(pool))])
    samples = join(chosen, rate_hz, rng)
    samples /= np.sqrt(np.mean(samples**2))
    if babble_snr_db is not None:
        others = [one for name, group in speakers.items() if name != speaker for one in group]
        samples += babble(len(samples), others, rng) * 10 ** (-rng.uniform(*babble_snr_db) / 20)
        samples += rng.standard_normal(len(samples)) * 10 ** (WHITE_NOISE_DB / 20)
    samples *= 10 ** (rng.uniform(-30, -22) / 20)
    return " ".join(one.digit for one in chosen), speaker, np.clip(samples, -0.99, 0.99)


def write_split(folder: Path, recordings: list[Recording], count: int, args: argparse.Namespace) -> None:
    """Make `count` utterances and their metadata.csv."""
    speakers = by_speaker(recordings)
    if not recordings:
        raise ValueError(f"--utterances asks for {count} in {folder.name}, whose source holds no recordings")
    if args.babble_snr_db is not None and len(speakers) < 2:
        raise ValueError(f"--babble_snr_db needs at least 2 speakers in {folder.name}, the source has {len(speakers)}")
    folder.mkdir(parents=True, exist_ok=True)
    major, subtype = FORMATS[args.format]
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_name", "transcription", "speaker", "seconds"])
        for number in range(count):
            rng = np.random.default_rng([args.seed, SPLITS.index(folder.name), number])
            text, speaker, samples = make_utterance(speakers, args.digits, args.sampling_rate, args.babble_snr_db, rng)
            file_name = f"{folder.name}_{number:05d}.{args.format}"
            soundfile.write(folder / file_name, samples, args.sampling_rate, format=major, subtype=subtype)
            writer.writerow([file_name, text, speaker, f"{len(samples) / args.sampling_rate:.3f}"])


def options_of(args: argparse.Namespace) -> dict[str, object]:
    """What the result depends on, as it is stored beside it."""
    return {
        "source": str(args.source.resolve()),
        "utterances": list(args.utterances),
        "digits": list(args.digits),
        "babble_snr_db": None if args.babble_snr_db is None else list(args.babble_snr_db),
        "sampling_rate": args.sampling_rate,
        "format": args.format,
        "seed": args.seed,
    }


def is_made(output: Path, options: dict[str, object]) -> bool:
    """Whether `output` was made with these options already; an error if it holds anything else."""
    if not output.exists() or not any(output.iterdir()):
        return False
    stored_file = output / OPTIONS_FILE
    if not stored_file.is_file():
        raise ValueError(f"--output {output} holds something else or an unfinished run: remove it")
    stored = json.loads(stored_file.read_text(encoding="utf-8"))
    differences = [
        f"{name} was {stored.get(name)!r} and is now {options.get(name)!r}"
        for name in sorted(stored.keys() | options.keys())
        if stored.get(name) != options.get(name)
    ]
    if differences:
        raise ValueError(f"--output {output} was made with other options: {'; '.join(differences)}")
    return True


def check(args: argparse.Namespace) -> None:
    """Raise an error for values that cannot work."""
    if not args.source.is_dir():
        raise ValueError(f"--source {args.source} does not exist or is no folder")
    if min(args.utterances) < 0 or max(args.utterances) == 0:
        raise ValueError(f"--utterances {args.utterances} must be 0 or more, and not 0 for all splits")
    if not 1 <= args.digits[0] <= args.digits[1]:
        raise ValueError(f"--digits {args.digits[0]} {args.digits[1]}: 1 <= MIN <= MAX is needed")
    if args.babble_snr_db is not None and args.babble_snr_db[0] > args.babble_snr_db[1]:
        raise ValueError(f"--babble_snr_db {args.babble_snr_db}: LOW must not be above HIGH")
    if args.sampling_rate <= 0:
        raise ValueError(f"--sampling_rate {args.sampling_rate} must be positive")
    if args.format == "ogg" and args.sampling_rate not in OPUS_RATES_HZ:
        raise ValueError(f"--sampling_rate {args.sampling_rate}: Opus has {OPUS_RATES_HZ} only; else --format flac")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="audiofolder of single digits")
    parser.add_argument("--output", type=Path, required=True, help="audiofolder to make")
    parser.add_argument(
        "--utterances", type=int, nargs=3, default=[2000, 200, 800], metavar=("TRAIN", "VALIDATION", "TEST")
    )
    parser.add_argument("--digits", type=int, nargs=2, default=[3, 7], metavar=("MIN", "MAX"), help="per utterance")
    parser.add_argument("--babble_snr_db", type=float, nargs=2, default=None, metavar=("LOW", "HIGH"))
    parser.add_argument("--sampling_rate", type=int, default=8_000, help="of the output, in Hz")
    parser.add_argument("--format", choices=sorted(FORMATS), default="flac")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check(args)
    options = options_of(args)
    if is_made(args.output, options):
        print(f"{args.output} was made with the same options already")
        return
    for split, count in zip(SPLITS, args.utterances, strict=True):
        if count > 0:
            write_split(args.output / split, read_split(args.source / split, args.sampling_rate), count, args)
        print(f"{split}: {count} utterances")
    # Written last: a folder without it is an unfinished one.
    (args.output / OPTIONS_FILE).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
