"""PyTorch float32, ONNX float32 and ONNX int8 side by side: size, speed and error at some depths.

    python benchmarks/onnx_export.py
    python benchmarks/onnx_export.py --checkpoint outputs/quickstart --dataset examples/corpora/spoken_commands \\
        --depths 1 3 6

Without a checkpoint: a random model of base size (12 layers of width 768) on noise of some lengths. With one: the test
split of its corpus, one utterance at a time, and its word error rates. Batch 1, one thread. The three take turns on the
same input, in rounds after one that is not counted; the table has the median over rounds of the CPU time of the
process, so that what else a machine does disturbs it little, with the least and the most. Differences are from
PyTorch's logits, relative to the largest of them. PyTorch runs the dynamic model, as its users do.
(Not called onnx.py: a script's folder comes first on the path, and it would be imported for the package.)
"""

import argparse
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers

import hf_dld
from hf_dld.data import decode_audio, load_processor
from hf_dld.data.vocabulary import decode_labels
from hf_dld.deploy.onnx_export import export_onnx, quantize
from hf_dld.deploy.static import load_dynamic
from hf_dld.evaluation.cost import count_parameters
from hf_dld.evaluation.metrics import WordErrorRate
from hf_dld.models import DYNAMIC_CLASSES

ENGINES = ("PyTorch float32", "ONNX float32", "ONNX int8")
HEADER = (
    "| layers | audio | engine | MB | CPU time, s: median (range) | speed | largest difference | same tokens |\n"
    "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |"
)
Engine = Callable[[np.ndarray], np.ndarray]
"""From samples (1, samples) to logits (1, frames, vocabulary)."""


def pytorch_engine(model: Any) -> Engine:
    @torch.inference_mode()
    def run(samples: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(samples)).logits.numpy()

    return run


def onnx_engine(file: Path) -> Engine:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(samples: np.ndarray) -> np.ndarray:
        mask = np.ones(samples.shape, dtype=np.int64)
        return session.run(["logits"], {"input_values": samples, "attention_mask": mask})[0]

    return run


def engines_at(model: Any, processor: Any, depth: int, folder: Path) -> tuple[list[Engine], list[float]]:
    """The three engines at a depth, and the sizes of their weights in MB."""
    model.set_active_layers(depth)
    export = export_onnx(model, folder / "float32", processor=processor)
    shutil.copytree(folder / "float32", folder / "int8")
    int8 = folder / "int8" / export.file.name
    quantize(int8)  # the file that export_onnx(..., int8=True) writes, without tracing again
    parameters = count_parameters(model, model.active_layers)
    sizes = [4 * parameters, export.size_bytes, int8.stat().st_size]
    engines = [pytorch_engine(model), onnx_engine(export.file), onnx_engine(int8)]
    return engines, [size / 1e6 for size in sizes]


def take_turns(
    engines: Sequence[Engine], clips: Sequence[np.ndarray], rounds: int
) -> tuple[list[list[float]], list[list[np.ndarray]]]:
    """CPU seconds for all clips, for each engine and round, and each engine's logits of the clips."""
    logits = [[engine(clip) for clip in clips] for engine in engines]
    times: list[list[float]] = [[] for _ in engines]
    for _ in range(rounds):
        for engine, taken in zip(engines, times, strict=True):
            start = time.process_time()
            for clip in clips:
                engine(clip)
            taken.append(time.process_time() - start)
    return times, logits


def rows_of(
    label: str, sizes: Sequence[float], times: Sequence[Sequence[float]], logits: Sequence[Sequence[np.ndarray]],
    word_error_rate: Callable[[Sequence[np.ndarray]], float] | None,
) -> list[str]:  # fmt: skip
    rows = []
    reference, reference_s = logits[0], statistics.median(times[0])
    scale = max(np.abs(clip).max() for clip in reference)
    for engine, size, taken, found in zip(ENGINES, sizes, times, logits, strict=True):
        difference = max(np.abs(a - b).max() for a, b in zip(reference, found, strict=True)) / scale
        pairs = zip(reference, found, strict=True)
        agreement = np.concatenate([(a.argmax(-1) == b.argmax(-1)).ravel() for a, b in pairs]).mean()
        median = statistics.median(taken)
        columns = [
            label, engine, f"{size:.1f}",
            f"{median:.3f} ({min(taken):.3f} to {max(taken):.3f})", f"{reference_s / median:.2f}",
            f"{difference:.1e}" if difference else "0", f"{agreement:.1%}",
        ]  # fmt: skip
        if word_error_rate is not None:
            columns.append(f"{word_error_rate(found):.1%}")
        rows.append(f"| {' | '.join(columns)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a trained dynamic checkpoint; default: a random one of base size")
    parser.add_argument("--dataset", help="with --checkpoint: its corpus, of which the test split is transcribed")
    parser.add_argument("--model_type", default="dld_wavlm", choices=sorted(DYNAMIC_CLASSES), help="of the random one")
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 12])
    parser.add_argument("--seconds", type=float, nargs="+", default=[5], help="of noise, for the random one")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if bool(args.checkpoint) != bool(args.dataset):
        parser.error("--checkpoint and --dataset go together")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

    word_error_rate = None
    if args.checkpoint:
        processor = load_processor(args.checkpoint)
        model = load_dynamic(args.checkpoint).eval()
        dataset, _ = hf_dld.prepare_dataset(
            hf_dld.load_speech_dataset(args.dataset, split="test"), processor, model._get_feat_extract_output_lengths
        )
        rate_hz = processor.feature_extractor.sampling_rate
        audio = [decode_audio(row["audio"], rate_hz) for row in dataset]
        clips = [processor(samples, sampling_rate=rate_hz, return_tensors="np").input_values for samples in audio]
        references = [decode_labels(processor.tokenizer, row["labels"]) for row in dataset]

        def word_error_rate(logits: Sequence[np.ndarray]) -> float:
            predictions = [processor.decode(clip[0].argmax(-1)) for clip in logits]
            return WordErrorRate().compute(predictions=predictions, references=references)["wer"]

        inputs = {f"{len(clips)} utterances, {sum(clip.size for clip in clips) / rate_hz:.0f} s": clips}
    else:
        processor = hf_dld.build_character_processor(["abcdefghijklmnopqrstuvwxyz'"])
        torch.manual_seed(0)
        model_class = DYNAMIC_CLASSES[args.model_type]
        config = {"vocab_size": len(processor.tokenizer), "hidden_size": 768, "num_attention_heads": 12}
        model = model_class(model_class.config_class(**config, num_hidden_layers=12, intermediate_size=3072)).eval()
        generator = np.random.default_rng(0)
        inputs = {
            f"{seconds:g} s": [generator.standard_normal((1, int(16_000 * seconds)), dtype=np.float32)]
            for seconds in args.seconds
        }

    rows = []
    for depth in args.depths:
        with tempfile.TemporaryDirectory() as folder:
            engines, sizes = engines_at(model, processor, depth, Path(folder))
            for audio_label, clips in inputs.items():
                times, logits = take_turns(engines, clips, args.rounds)
                rows += rows_of(f"{depth} | {audio_label}", sizes, times, logits, word_error_rate)
                print(*rows[-len(ENGINES) :], sep="\n", file=sys.stderr, flush=True)

    what = args.checkpoint or f"random {model.config.model_type} of base size"
    print(
        f"\n{what}, batch 1, one thread of {processor_name()}, torch {torch.__version__}, onnxruntime "
        f"{onnxruntime.__version__}, {args.rounds} rounds\n"
    )
    print(HEADER if word_error_rate is None else HEADER.replace(" |\n", " | WER |\n") + " ---: |")
    print(*rows, sep="\n")


def processor_name() -> str:
    """The CPU's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
