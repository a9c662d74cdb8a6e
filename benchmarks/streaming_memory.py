"""Does memory stay flat while a long stream is trained on? Resident size over 100,000 tiny utterances.

    python benchmarks/streaming_memory.py
    python benchmarks/streaming_memory.py --format webdataset

Writes shards of utterances of 0.02 s to a temporary folder and trains a tiny model on their stream, through shuffling
buffer, filter and collator, as run_dld_ctc.py does with --streaming. Prints a Markdown table of the resident memory of
the process, and how much it grew between the end of the warm-up and the end. Linux only.
"""

import argparse
import io
import tarfile
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from measure import conditions, print_table
from transformers import TrainerCallback

import hf_dld
from hf_dld.data import load_speech_dataset, training_stream
from hf_dld.data.audio import encode_wav

RATE_HZ, SAMPLES = 16_000, 320
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 8),
    "conv_stride": (5, 8),
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}


def make_rows(count: int, generator: np.random.Generator) -> list[dict[str, Any]]:
    samples = generator.standard_normal((count, SAMPLES)).astype(np.float32)
    return [{"audio": {"bytes": encode_wav(wave, RATE_HZ), "path": None}, "text": "abc"} for wave in samples]


def make_shards(folder: Path, kind: str, utterances: int, shards: int) -> None:
    generator = np.random.default_rng(0)
    for shard in range(shards):
        rows = make_rows(utterances // shards, generator)
        if kind == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(folder / f"train-{shard:05d}.parquet")
            continue
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for index, row in enumerate(rows):
                for ending, content in (("wav", row["audio"]["bytes"]), ("txt", row["text"].encode())):
                    member = tarfile.TarInfo(f"{shard:05d}_{index:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def resident_mb() -> float:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


class Watch(TrainerCallback):
    """Resident memory and seconds at every so many utterances."""

    def __init__(self, every: int):
        self.every, self.start = every, time.perf_counter()
        self.rows: list[tuple[int, float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        heard = state.global_step * args.per_device_train_batch_size
        if heard % self.every < args.per_device_train_batch_size:
            self.rows.append((heard, resident_mb(), time.perf_counter() - self.start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("parquet", "webdataset"), default="parquet")
    parser.add_argument("--utterances", type=int, default=100_000)
    parser.add_argument("--warm_up", type=int, default=20_000, help="utterances before memory is compared")
    parser.add_argument("--shards", type=int, default=100, help="ten are open at a time")
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()

    torch.set_num_threads(1)
    processor = hf_dld.build_character_processor(["abc"])
    model = hf_dld.DLDWavLMForCTC(
        hf_dld.DLDWavLMConfig(
            **TINY, vocab_size=len(processor.tokenizer), pad_token_id=processor.tokenizer.pad_token_id
        )
    )
    watch = Watch(every=args.warm_up)
    with tempfile.TemporaryDirectory() as folder:
        # by another process, whose memory is not counted
        process = get_context("spawn").Process(
            target=make_shards, args=(Path(folder), args.format, args.utterances, args.shards)
        )
        process.start()
        process.join()
        stream, report = training_stream(
            load_speech_dataset(folder, streaming=True),
            processor,
            model._get_feat_extract_output_lengths,
            min_duration_s=0.0,
        )
        trainer = hf_dld.DLDTrainer(
            model=model,
            teacher=None,
            args=hf_dld.DLDTrainingArguments(
                f"{folder}/run",
                kl_weight=0.0,
                max_steps=args.utterances // args.batch_size,
                per_device_train_batch_size=args.batch_size,
                save_strategy="no",
                logging_steps=500,
                train_sampling_strategy="random",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=stream,
            data_collator=hf_dld.DataCollatorCTC(processor),
            processing_class=processor,
            callbacks=[watch],
        )
        trainer.train()
    print(f"\n{conditions()}\n{args.shards} {args.format} shards, {report.kept:,} utterances read\n")
    print_table(
        ["utterances", "resident, MB", "seconds"], ([f"{n:,}", f"{mb:.0f}", f"{s:.0f}"] for n, mb, s in watch.rows)
    )
    start, end = watch.rows[0][1], watch.rows[-1][1]
    print(f"Growth from {watch.rows[0][0]:,} utterances on: {end - start:.1f} MB, {100 * (end / start - 1):.1f} %.")


if __name__ == "__main__":
    main()
