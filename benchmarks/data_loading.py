"""Does the loader keep up? Audio seconds decoded and featurized in a second of one core, by how the audio is stored.

    OMP_NUM_THREADS=1 python benchmarks/data_loading.py

Reads Parquet shards of noise as training does with --streaming, through the shuffling buffer, the filter and the
collator to padded batches, and beside it what a DLD step of a model here consumes. Both in audio seconds per second of
processor time, so that other work on the machine matters less. Prints Markdown tables.
"""

import argparse
import io
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
from measure import conditions, print_table
from training_step import LETTERS, load_model, make_examples, take_step

import hf_dld
from hf_dld.data import load_speech_dataset, training_stream

RATE_HZ = 16_000
STORED: dict[str, tuple[int, int, dict[str, str]]] = {  # rate in Hz, channels, options of soundfile
    "WAV, 16 kHz": (16_000, 1, {"format": "WAV"}),
    "FLAC, 16 kHz": (16_000, 1, {"format": "FLAC"}),
    "Ogg Opus, 16 kHz": (16_000, 1, {"format": "OGG", "subtype": "OPUS"}),
    "MP3, 48 kHz": (48_000, 1, {"format": "MP3"}),
    "FLAC, 44.1 kHz stereo": (44_100, 2, {"format": "FLAC"}),
}


def make_shards(folder: Path, stored: str, utterances: int, seconds: float, shards: int = 4) -> None:
    rate_hz, channels, options = STORED[stored]
    generator = np.random.default_rng(0)
    noise = np.cumsum(generator.standard_normal((round(seconds * rate_hz), channels)), axis=0)  # falls off like speech
    noise = 0.3 * noise / np.abs(noise).max()
    rows = []
    for index in range(utterances):
        file = io.BytesIO()
        soundfile.write(file, np.roll(noise, index * 1000, axis=0), rate_hz, **options)
        rows.append({"audio": {"bytes": file.getvalue(), "path": None}, "text": LETTERS[: int(seconds * 5)]})
    for shard in range(shards):
        dataset = datasets.Dataset.from_list(rows[shard::shards])
        dataset.to_parquet(folder / f"train-{shard:05d}-of-{shards:05d}.parquet")


def loading_rate(
    folder: Path, utterances: int, batch_size: int, seconds: float, rounds: int
) -> tuple[list[float], float]:
    """Audio seconds in a second of processor time, for each of some passes; and bytes stored for a second of audio."""
    processor = hf_dld.build_character_processor([LETTERS], sampling_rate_hz=RATE_HZ)
    stream, _ = training_stream(
        load_speech_dataset(folder, streaming=True), processor, lambda samples: samples // 320, shuffle_buffer_size=100
    )
    collate, rows = hf_dld.DataCollatorCTC(processor), iter(stream)
    rates = []
    for _ in range(rounds + 1):  # the first opens files and fills the buffer
        start = time.process_time()
        for _ in range(utterances // batch_size):
            collate(list(itertools.islice(rows, batch_size)))
        rates.append(utterances * seconds / (time.process_time() - start))
    return rates[1:], sum(path.stat().st_size for path in folder.iterdir()) / utterances / seconds


def step_rate(name: str, batch_size: int, seconds: float, steps: int, folder: str) -> float:
    """Audio seconds that DLD steps with a live teacher consume in a second of processor time."""
    (teacher, rate_hz), (student, _) = load_model(name), load_model(name)
    student.freeze_feature_encoder()
    examples = make_examples(batch_size, seconds, rate_hz)
    collator = hf_dld.DataCollatorCTC(hf_dld.build_character_processor([LETTERS], sampling_rate_hz=rate_hz))
    trainer = hf_dld.DLDTrainer(
        model=student,
        teacher=teacher,
        args=hf_dld.DLDTrainingArguments(folder, use_cpu=True, disable_tqdm=True, depth_sampling="bernoulli"),
        data_collator=collator,
        train_dataset=examples,
    )
    optimizer, inputs = torch.optim.AdamW(student.parameters(), lr=1e-5), collator(examples)
    take_step(trainer, optimizer, inputs, 0, 1.0)
    start = time.process_time()
    for step in range(steps):
        take_step(trainer, optimizer, inputs, step, 1.0)
    return steps * batch_size * seconds / (time.process_time() - start)


def spread(rates: list[float]) -> list[Any]:
    return [f"{statistics.median(rates):.0f}", f"{min(rates):.0f}–{max(rates):.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="of audio in each utterance")
    parser.add_argument("--utterances", type=int, default=32, help="in the shards, and in a pass")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="passes that are timed")
    parser.add_argument("--models", nargs="*", default=["digits_wavlm"], help="whose steps are timed")
    parser.add_argument("--steps", type=int, default=4, help="with Bernoulli(0.5) layers")
    args = parser.parse_args()

    print(f"{conditions()}\n{args.seconds:g} s an utterance, batches of {args.batch_size}, {args.rounds} passes\n")
    rows = []
    for stored in STORED:
        with tempfile.TemporaryDirectory() as folder:
            make_shards(Path(folder), stored, args.utterances, args.seconds)
            rates, stored_bytes = loading_rate(
                Path(folder), args.utterances, args.batch_size, args.seconds, args.rounds
            )
        rows.append([stored, f"{stored_bytes / 1000:.0f}", *spread(rates)])
    print_table(["stored as", "kB a second", "audio seconds a core second", "range"], rows)
    with tempfile.TemporaryDirectory() as folder:
        steps = ([name, f"{step_rate(name, 1, args.seconds, args.steps, folder):.1f}"] for name in args.models)
        print_table(["DLD step, live teacher", "audio seconds a core second"], steps)


if __name__ == "__main__":
    main()
