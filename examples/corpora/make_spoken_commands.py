#!/usr/bin/env python
"""Make spoken_commands, the small free speech corpus that this repository carries for its quickstart and its tests.

It is synthetic speech: the sentences are drawn from the small English grammar below, written for this project, and
spoken by free speech synthesizers. Background noise (coloured noise and babble of other voices of the same split) is
mixed in and stays in the audio.

Engines and voices, and under which terms:

    flite 2.2           kal16, awb, rms, slt      Carnegie Mellon University's BSD-like licence
    festival 2.5        kal, ked (diphones)       University of Edinburgh and CMU, BSD-like licences
    festvox-us-slt-hts  slt (HTS)                 CMU and Nagoya Institute of Technology, BSD-like licences
    SVOX Pico (ttspico) en-US, en-GB              Apache License 2.0
    espeak-ng 1.51      accents and variants      GPL-3.0-or-later (the program; it makes no claim on what it speaks)

The sentences, the recordings and this script are under the Apache License 2.0, as the rest of the repository.

To run it (about 2 minutes):

    apt-get install flite espeak-ng festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts
    pip install numpy soundfile soxr ttspico
    python examples/corpora/make_spoken_commands.py --output examples/corpora/spoken_commands

The result depends on the arguments and on the versions of the engines and of libsndfile only: same ones, same bytes.
"""

import argparse
import csv
import functools
import io
import itertools
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLING_RATE_HZ = 16_000
VORBIS_COMPRESSION = 0.95  # of libsndfile's 0 to 1; Vorbis because it decodes five times as fast as Opus
COLOUR_DB = 8.0
SPECTRUM_SHIFT = (0.84, 1.18)
FESTIVAL_VOICES_FOLDER = Path("/usr/share/festival/voices")
DEBIAN_PACKAGES = {"flite": "flite", "espeak-ng": "espeak-ng", "text2wave": "festival"}
FESTIVAL_PACKAGES = {
    "kal_diphone": "festvox-kallpc16k",
    "ked_diphone": "festvox-kdlpc16k",
    "cmu_us_slt_arctic_hts": "festvox-us-slt-hts",
}

SPLIT_OF_REMAINDER = ("train", "train", "test", "train", "validation")

# One line per kind of command; a [slot] takes any entry of its list.
TEMPLATES = (
    "turn [switch] the [room] [device]",
    "set the [room] [device] to [number]",
    "[barrier verb] the [room] [barrier] at [number]",
    "[player verb] the [player] in the [room] at [number]",
)
SLOTS = {
    "switch": ("on", "off"),
    "room": ("kitchen", "bedroom", "garden", "office"),
    "device": ("light", "fan", "heater"),
    "number": ("five", "seven", "eight", "ten", "twenty"),
    "barrier verb": ("open", "close"),
    "barrier": ("door", "window"),
    "player verb": ("play", "stop"),
    "player": ("music", "radio"),
}


@dataclass(frozen=True)
class Voice:
    """One voice of the corpus; `pitch` is the engine's own pitch setting (espeak-ng only)."""

    name: str
    engine: str
    engine_voice: str
    pitch: int = 50

    @property
    def speaker(self) -> str:
        """Who speaks: kal and slt each come from two engines, and must be in one split."""
        return self.name if self.engine == "espeak" else self.name.partition("_")[2]

    @property
    def technique(self) -> str:
        """How the voice is made."""
        if self.engine in ("espeak", "pico"):
            return {"espeak": "formants", "pico": "statistical, Pico"}[self.engine]
        return "diphones" if self.speaker in ("kal", "ked") else "statistical"


# How many of espeak-ng's speakers validation and test have for themselves, beside one of another technique each.
HELD_OUT = {"validation": 2, "test": 6}

VOICES = (
    Voice("flite_kal", "flite", "kal16"),
    Voice("flite_slt", "flite", "slt"),
    Voice("festival_kal", "festival", "kal_diphone"),
    Voice("festival_ked", "festival", "ked_diphone"),
    Voice("festival_slt", "festival", "cmu_us_slt_arctic_hts"),
    Voice("pico_us", "pico", "en-US"),
    Voice("espeak_us_m1", "espeak", "en-us+m1", pitch=40),
    Voice("espeak_gb_f2", "espeak", "en-gb+f2", pitch=55),
    Voice("espeak_us_klatt2", "espeak", "en-us+klatt2", pitch=45),
    Voice("espeak_rp_m3", "espeak", "en-gb-x-rp+m3", pitch=35),
    Voice("espeak_us_f1", "espeak", "en-us+f1", pitch=60),
    Voice("espeak_gb_m7", "espeak", "en-gb+m7", pitch=50),
    Voice("espeak_rp_linda", "espeak", "en-gb-x-rp+linda", pitch=50),
    Voice("espeak_nyc_adam", "espeak", "en-us-nyc+adam", pitch=45),
    Voice("espeak_scotland_m5", "espeak", "en-gb-scotland+m5", pitch=40),
    Voice("espeak_lancaster_f4", "espeak", "en-gb-x-gbclan+f4", pitch=50),
    Voice("espeak_us_steph", "espeak", "en-us+steph", pitch=60),
    Voice("espeak_gb_klatt4", "espeak", "en-gb+klatt4", pitch=55),
    Voice("espeak_us_andy", "espeak", "en-us+andy", pitch=45),
    Voice("espeak_us_alicia", "espeak", "en-us+Alicia", pitch=60),
    Voice("espeak_midlands_m2", "espeak", "en-gb-x-gbcwmd+m2", pitch=50),
    Voice("espeak_gb_f3", "espeak", "en-gb+f3", pitch=65),
    Voice("espeak_us_benjamin", "espeak", "en-us+benjamin", pitch=45),
    Voice("espeak_gb_belinda", "espeak", "en-gb+belinda", pitch=60),
    Voice("espeak_us_klatt", "espeak", "en-us+klatt", pitch=50),
    Voice("espeak_nyc_paul", "espeak", "en-us-nyc+paul", pitch=40),
    Voice("espeak_us_anika", "espeak", "en-us+anika", pitch=55),
    Voice("espeak_us_m4", "espeak", "en-us+m4", pitch=45),
    Voice("espeak_us_michael", "espeak", "en-us+Michael", pitch=50),
    Voice("espeak_gb_steph3", "espeak", "en-gb+steph3", pitch=55),
    Voice("espeak_us_rob", "espeak", "en-us+rob", pitch=35),
    Voice("espeak_rp_grandma", "espeak", "en-gb-x-rp+grandma", pitch=60),
    Voice("flite_awb", "flite", "awb"),
    Voice("espeak_us_m8", "espeak", "en-us+m8", pitch=45),
    Voice("espeak_gb_f5", "espeak", "en-gb+f5", pitch=55),
    Voice("flite_rms", "flite", "rms"),
    Voice("pico_gb", "pico", "en-GB"),
    Voice("espeak_us_victor", "espeak", "en-us+victor", pitch=50),
    Voice("espeak_gb_m6", "espeak", "en-gb+m6", pitch=50),
)


@dataclass(frozen=True)
class Utterance:
    """One line of a metadata.csv with its clean speech."""

    file_name: str
    transcription: str
    speaker: str
    speech: np.ndarray  # (samples,)


# ---------------------------------------------------------------------------------------------------- sentences


def sentences_of(template: str, split: str) -> list[str]:
    """The sentences of one template that belong to one split; no other split may have them.

    Where the slots' entries are numbered, the sum of the numbers decides. So each split has every entry about as often.
    """
    pieces = re.split(r"\[([^]]+)\]", template)  # text and slot in turn
    choices = [enumerate(SLOTS[piece] if i % 2 else (piece,)) for i, piece in enumerate(pieces)]
    sentences = []
    for chosen in itertools.product(*choices):
        numbers, words = zip(*chosen, strict=True)
        if SPLIT_OF_REMAINDER[sum(numbers) % len(SPLIT_OF_REMAINDER)] == split:
            sentences.append("".join(words))
    return sentences


def draw_sentences(split: str, count: int, rng: np.random.Generator) -> list[str]:
    """Take as many sentences of each template, and each of a template's sentences that the split may have as often."""
    sentences = []
    for number, template in enumerate(TEMPLATES):
        allowed = sentences_of(template, split)
        shuffled = [allowed[i] for i in rng.permutation(len(allowed))]
        share = len(range(number, count, len(TEMPLATES)))
        sentences += itertools.islice(itertools.cycle(shuffled), share)
    return [sentences[i] for i in rng.permutation(count)]


def count_words(sentences: list[str]) -> Counter[str]:
    return Counter(word for sentence in sentences for word in sentence.split())


# ------------------------------------------------------------------------------------------------------- voices


def draw_splits(seed: int) -> dict[str, str]:
    """The split of each speaker, drawn blindly: by the seed alone.

    Validation and test are about new voices, not about new ways to make one: train hears every technique.
    """
    rng = random.Random(seed)
    speakers = {technique: set() for technique in sorted({voice.technique for voice in VOICES})}
    for voice in VOICES:
        speakers[voice.technique].add(voice.speaker)
    splits = {voice.speaker: "train" for voice in VOICES}
    others = rng.sample([technique for technique in speakers if technique != "formants"], len(HELD_OUT))
    for (split, count), other in zip(HELD_OUT.items(), others, strict=True):
        free = [speaker for speaker in sorted(speakers["formants"]) if splits[speaker] == "train"]
        for speaker in [*rng.sample(free, count), rng.choice(sorted(speakers[other]))]:
            splits[speaker] = split
    return splits


def check_engines() -> None:
    """Raise one error that lists every missing engine and voice and how to get it."""
    missing = [package for program, package in DEBIAN_PACKAGES.items() if shutil.which(program) is None]
    for voice, package in FESTIVAL_PACKAGES.items():
        if not list(FESTIVAL_VOICES_FOLDER.glob(f"*/{voice}")):
            missing.append(package)
    problems = []
    if missing:
        problems.append(f"missing speech synthesizers; on Debian: apt-get install {' '.join(missing)}")
    try:
        import ttspico  # noqa: F401
    except ImportError:
        problems.append("missing the SVOX Pico synthesizer: pip install ttspico (needs a C compiler)")
    if problems:
        raise RuntimeError("; ".join(problems))


def run_engine(command: list[str]) -> None:
    """Run a synthesizer program and show what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}: {done.stderr.strip()}")


def speak_pico(language: str, text: str, tempo: float) -> tuple[np.ndarray, int]:
    import ttspico

    engine = ttspico.TtsEngine(language)
    engine.rate = round(100 * tempo)
    pcm = np.frombuffer(engine.speak(text), dtype="<i2")
    return pcm.astype(np.float64) / 32768, 16_000


def speak(voice: Voice, text: str, tempo: float) -> tuple[np.ndarray, int]:
    """Speak `text`, `tempo` times as fast as the voice usually does: (samples,) and their rate in Hz."""
    if voice.engine == "pico":
        return speak_pico(voice.engine_voice, text, tempo)
    with tempfile.TemporaryDirectory() as folder:
        text_file, wave_file = Path(folder, "text.txt"), Path(folder, "speech.wav")
        text_file.write_text(text + "\n", encoding="ascii")
        if voice.engine == "flite":
            stretch = f"duration_stretch={1 / tempo:.4f}"
            command = ["flite", "-voice", voice.engine_voice, "--setf", stretch, "-t", text, "-o", str(wave_file)]
        elif voice.engine == "festival":
            setup = f"(begin (voice_{voice.engine_voice}) (Parameter.set 'Duration_Stretch {1 / tempo:.4f}))"
            command = ["text2wave", "-eval", setup, "-o", str(wave_file), str(text_file)]
        else:
            words_per_minute = str(round(165 * tempo))
            command = ["espeak-ng", "-v", voice.engine_voice, "-s", words_per_minute, "-p", str(voice.pitch)]
            command += ["-f", str(text_file), "-w", str(wave_file)]
        run_engine(command)
        speech, rate_hz = soundfile.read(wave_file)
    return speech, rate_hz


def trim_silence(speech: np.ndarray, threshold_db: float = -40.0) -> np.ndarray:
    """Cut the silence at both ends: what lies `threshold_db` below the loudest 10 ms frame."""
    frame = SAMPLING_RATE_HZ // 100
    frames = speech[: len(speech) // frame * frame].reshape(-1, frame)
    level = np.sqrt(np.mean(frames**2, axis=1))
    loud = np.flatnonzero(level > level.max() * 10 ** (threshold_db / 20))
    return speech[loud[0] * frame : (loud[-1] + 1) * frame]


def colour(speech: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Raise or lower each of eight bands, wider towards high frequencies, by up to `COLOUR_DB`: (samples,)."""
    spectrum = np.fft.rfft(speech)
    position = np.linspace(0, 1, len(spectrum)) ** 0.6
    gain_db = np.interp(position, np.linspace(0, 1, 8), rng.uniform(-COLOUR_DB, COLOUR_DB, 8))
    return np.fft.irfft(spectrum * 10 ** (gain_db / 20), len(speech))


def make_speech(voice: Voice, text: str, split: str, rng: np.random.Generator) -> np.ndarray:
    """Speak `text` at 16 kHz with unit RMS between short silences: (samples,).

    In train the whole spectrum is also shifted at random (by reading the samples at another rate) and its bands are
    raised and lowered, because few voices here come from people: it makes up the vocal tracts that are missing.
    """
    shift = rng.uniform(*SPECTRUM_SHIFT) if split == "train" else 1.0
    tempo = rng.uniform(0.95, 1.2)
    speech, rate_hz = speak(voice, text, tempo / shift)
    speech = trim_silence(soxr.resample(speech, rate_hz * shift, SAMPLING_RATE_HZ))
    if split == "train":
        speech = colour(speech, rng)
    speech = speech / np.sqrt(np.mean(speech**2))
    before, after = (int(seconds * SAMPLING_RATE_HZ) for seconds in rng.uniform(0.05, 0.2, size=2))
    return np.pad(speech, (before, after))


# -------------------------------------------------------------------------------------------------------- noise


def coloured_noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit RMS whose spectrum falls with frequency by a random exponent, from white to brown: (samples,)."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    bins = np.maximum(np.arange(len(spectrum)), length / 200)  # flat below 80 Hz, or brown noise is all rumble
    noise = np.fft.irfft(spectrum * bins ** (-rng.uniform(0, 2) / 2), length)
    return noise / np.sqrt(np.mean(noise**2))


def babble(length: int, others: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Three to six other utterances at once, each repeated from a random point on, with unit RMS: (samples,)."""
    chosen = rng.choice(len(others), size=rng.integers(3, 7), replace=False)
    voices = [np.resize(np.roll(others[i], rng.integers(len(others[i]))), length) for i in chosen]
    mixed = np.sum(voices, axis=0)
    return mixed / np.sqrt(np.mean(mixed**2))


def add_noise(
    speech: np.ndarray, others: list[np.ndarray], snr_db: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Mix noise into speech of unit RMS at a random ratio within `snr_db`, at a random level: (samples,)."""
    share = rng.uniform()
    noise = np.sqrt(share) * coloured_noise(len(speech), rng) + np.sqrt(1 - share) * babble(len(speech), others, rng)
    noisy = speech + noise * 10 ** (-rng.uniform(*snr_db) / 20)
    level = 10 ** (rng.uniform(-30, -22) / 20)
    return np.clip(noisy * level, -0.99, 0.99)


# -------------------------------------------------------------------------------------------------------- files


@functools.cache
def ogg_checksum_table() -> list[int]:
    """The 256 entries that `ogg_checksum` looks up."""
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = ((value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


def ogg_checksum(page: bytes) -> int:
    """The CRC of an Ogg page whose checksum field is zero (polynomial 0x04c11db7, not reflected, as RFC 3533 says)."""
    table, checksum = ogg_checksum_table(), 0
    for byte in page:
        checksum = ((checksum << 8) & 0xFFFFFFFF) ^ table[(checksum >> 24) ^ byte]
    return checksum


def with_fixed_serial(ogg: bytes, serial: int) -> bytes:
    """Replace the stream serial number, which libsndfile draws from the clock: otherwise no two runs are equal."""
    pages, start = [], 0
    while start < len(ogg):
        segments = ogg[start + 26]
        end = start + 27 + segments + sum(ogg[start + 27 : start + 27 + segments])
        page = bytearray(ogg[start:end])
        page[14:18], page[22:26] = struct.pack("<I", serial), bytes(4)
        page[22:26] = struct.pack("<I", ogg_checksum(page))
        pages.append(bytes(page))
        start = end
    return b"".join(pages)


def write_vorbis(path: Path, samples: np.ndarray) -> None:
    """Write (samples,) at 16 kHz as Ogg Vorbis."""
    buffer = io.BytesIO()
    soundfile.write(
        buffer, samples, SAMPLING_RATE_HZ, format="OGG", subtype="VORBIS", compression_level=VORBIS_COMPRESSION
    )
    path.write_bytes(with_fixed_serial(buffer.getvalue(), zlib.crc32(path.name.encode())))


def assign_voices(split: str, count: int, rng: np.random.Generator, seed: int) -> list[Voice]:
    """Give each of `count` utterances one of the split's voices.

    In train the voices that do not come from espeak-ng speak more often, for there are fewer of them and they are
    closer to people; in validation and test all voices count alike.
    """
    splits = draw_splits(seed)
    voices = [voice for voice in VOICES if splits[voice.speaker] == split]
    times = 4 if split == "train" else 1
    weighted = [voice for voice in voices for _ in range(1 if voice.engine == "espeak" else times)]
    shuffled = [weighted[i] for i in rng.permutation(len(weighted))]
    chosen = list(itertools.islice(itertools.cycle(shuffled), count))
    return [chosen[i] for i in rng.permutation(count)]


def speak_split(split: str, count: int, seed: int) -> list[Utterance]:
    """Speak a split, clean. Each utterance has its own random stream: none depends on the others."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    sentences = draw_sentences(split, count, rng)
    voices = assign_voices(split, count, rng, seed)
    utterances = []
    for number, (voice, sentence) in enumerate(zip(voices, sentences, strict=True)):
        file_name = f"{split}_{number:04d}.ogg"
        rng = np.random.default_rng([seed, zlib.crc32(file_name.encode())])
        utterances.append(Utterance(file_name, sentence, voice.name, make_speech(voice, sentence, split, rng)))
    return utterances


def write_split(folder: Path, utterances: list[Utterance], snr_db: tuple[float, float], seed: int) -> float:
    """Add noise, write the audio and metadata.csv, and return the seconds of audio."""
    folder.mkdir(parents=True)
    total_s = 0.0
    with (folder / "metadata.csv").open("w", newline="", encoding="ascii") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_name", "transcription", "speaker", "seconds"])
        for utterance in utterances:
            rng = np.random.default_rng([seed, zlib.crc32(utterance.file_name.encode()), 1])
            others = [other.speech for other in utterances if other.speaker != utterance.speaker]
            noisy = add_noise(utterance.speech, others, snr_db, rng)
            write_vorbis(folder / utterance.file_name, noisy)
            seconds = len(noisy) / SAMPLING_RATE_HZ
            total_s += seconds
            writer.writerow([utterance.file_name, utterance.transcription, utterance.speaker, f"{seconds:.3f}"])
    return total_s


DATASHEET = """\
# spoken_commands

Synthetic English voice commands in noise: a small free corpus for the quickstart and the tests of hf_dld. Made by
[make_spoken_commands.py](../make_spoken_commands.py), which also wrote this page.

- Audio: 16 kHz mono, Ogg Vorbis at about {kbit_s} kbit/s; {minutes:.1f} minutes in {utterances} utterances,
  {size_mb:.1f} MB.
- Layout: what `datasets` calls an audiofolder; each split has a metadata.csv
  (file_name, transcription, speaker, seconds).
- Transcriptions: lower-case letters and spaces; {words} distinct words, each of which occurs
  {fewest} times or more in train.
- Sentences: {sentences} distinct ones, drawn from a grammar written for this project. No sentence of one split occurs
  in another, so validation and test are made of new word sequences.
- Noise, baked in: coloured noise (white to brown) and babble of 3 to 6 other voices of the same split in random
  proportion, {low:g} to {high:g} dB below the speech.
- Voices: no voice of one split occurs in another. In train, each utterance has a random shift of its spectrum
  (x{shift_low:g} to x{shift_high:g}) and random gains in eight bands (up to {colour_db:g} dB); in all splits a random
  tempo.

## What it is good for, and what not

It shows that training, distillation and evaluation work, within minutes and without a download. It says little about
people's speech: most voices are formant synthesis, and there are no hesitations, no rooms and no microphones.

The voices of validation and test are in no other split, and the seed drew them. The rule of the draw is the second
one: by the first, which did not ask that train hears every technique of synthesis, all diphone voices were held out,
and the quickstart's model had 31 % of the words wrong at full depth.

## Origin and licences

All of it is made by programs from text written here; there is no recording of a person in it other than the voice
databases behind some of the synthesizers. The corpus is under the Apache License 2.0, as the rest of the repository.

| engine | voices | licence of engine and voices |
|---|---|---|
| flite 2.2 | kal16, awb, rms, slt | BSD-like (Carnegie Mellon University) |
| festival 2.5 | kal and ked diphones | BSD-like (University of Edinburgh, Carnegie Mellon University) |
| festvox-us-slt-hts | slt | BSD-like (Carnegie Mellon University, Nagoya Institute of Technology) |
| SVOX Pico, by ttspico 0.3.2 | en-US, en-GB | Apache License 2.0 |
| espeak-ng 1.51 | English accents with variants | GPL-3.0-or-later for the program, not for what it speaks |

## Utterances for each split and voice

| voice | engine's voice | train | validation | test |
|---|---|---|---|---|
{table}

## How it was made

    apt-get install flite espeak-ng festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts
    pip install numpy soundfile soxr ttspico
    {command}

With libsndfile {libsndfile} and the versions above, the same bytes come out.
"""


def voice_table(splits: dict[str, list[Utterance]]) -> str:
    """The rows of the datasheet's table: utterances for each voice and split, and their sums."""
    counts = {split: Counter(utterance.speaker for utterance in utterances) for split, utterances in splits.items()}
    rows = [
        [voice.name, f"{voice.engine} {voice.engine_voice}", *(str(counts[split][voice.name]) for split in counts)]
        for voice in VOICES
    ]
    rows.append(["all", "", *(str(count.total()) for count in counts.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_datasheet(
    folder: Path, splits: dict[str, list[Utterance]], total_s: float, args: argparse.Namespace, counts: dict[str, int]
) -> None:
    """Write the corpus' README.md."""
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*.ogg"))
    sentences = {utterance.transcription for utterances in splits.values() for utterance in utterances}
    words = count_words([utterance.transcription for utterance in splits["train"]])
    if unheard := {word for sentence in sentences for word in sentence.split()} - set(words):
        raise ValueError(f"train lacks words that the other splits have, ask for more of it: {sorted(unheard)}")
    command = (
        f"python make_spoken_commands.py --output spoken_commands --utterances {' '.join(map(str, counts.values()))} "
        f"--snr_db {args.snr_db[0]:g} {args.snr_db[1]:g} --seed {args.seed}"
    )
    text = DATASHEET.format(
        kbit_s=round(8 * size_bytes / total_s / 1000),
        minutes=total_s / 60,
        utterances=sum(counts.values()),
        size_mb=size_bytes / 1e6,
        sentences=len(sentences),
        words=len(words),
        fewest=min(words.values()),
        low=args.snr_db[0],
        high=args.snr_db[1],
        table=voice_table(splits),
        shift_low=SPECTRUM_SHIFT[0],
        shift_high=SPECTRUM_SHIFT[1],
        colour_db=COLOUR_DB,
        command=command,
        libsndfile=soundfile.__libsndfile_version__,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to make; it must not exist yet")
    parser.add_argument(
        "--utterances", type=int, nargs=3, default=(620, 50, 130), metavar=("TRAIN", "VALIDATION", "TEST")
    )
    parser.add_argument("--snr_db", type=float, nargs=2, default=(15.0, 30.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"--output {args.output} exists already; remove it first")
    if args.snr_db[0] > args.snr_db[1]:
        parser.error(f"--snr_db {args.snr_db[0]:g} {args.snr_db[1]:g}: LOW must not be above HIGH")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_engines()
    counts = dict(zip(("train", "validation", "test"), args.utterances, strict=True))
    splits: dict[str, list[Utterance]] = {}
    total_s = 0.0
    for split, count in counts.items():
        splits[split] = speak_split(split, count, args.seed)
        split_s = write_split(args.output / split, splits[split], tuple(args.snr_db), args.seed)
        total_s += split_s
        print(f"{split}: {count} utterances, {split_s / 60:.1f} minutes")
    write_datasheet(args.output, splits, total_s, args, counts)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
