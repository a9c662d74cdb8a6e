"""Do searched layers beat evenly spaced ones? Searched on validation, judged on test, for models of several trainings.

    python examples/corpora/join_digits.py --source ../shared/data/spoken_digits --output outputs/babble_digits \\
        --utterances 4000 200 800 --babble_snr_db 2 12
    python experiments/schedule.py --dataset outputs/babble_digits --output outputs/schedule

From the teacher's weights trains a dynamic student for each way of drawing layers, by layer dropping alone ("none" is
the teacher itself, merely cut; what is there already is used, so that an interrupted run goes on), searches schedules
on the validation split, and transcribes the test split with the evenly spaced layers, the found ones, and random ones
of the same number. Relative differences have 95 % intervals from a paired bootstrap over utterances. Writes
experiments/results/NAME.json and prints the Markdown tables of docs/schedule.md. Where there are few
words to judge by, characters are steadier: --unit character.
"""

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from common import RESULTS_DIR, environment
from transformers import AutoConfig, AutoModelForCTC, AutoProcessor

import hf_dld
from hf_dld.data import decode_labels
from hf_dld.distill.checkpoints import save_whole
from hf_dld.evaluation import count_errors, length_sorted_batches, run_layer_sets
from hf_dld.models import DYNAMIC_CLASSES
from hf_dld.models.depth import select_layers


def train(sampling: str, train_set, processor, args: argparse.Namespace) -> Path:
    """The folder of the student that draws its layers so; of the teacher itself for "none"."""
    if sampling == "none":
        return args.teacher
    folder = args.output / sampling
    if (folder / "config.json").exists():
        return folder
    training = hf_dld.DLDTrainingArguments(
        output_dir=f"{folder}_checkpoints",
        depth_sampling=sampling,
        kl_weight=0.0,  # neutral from the teacher's weights (docs/method.md), and a third of a step's time
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=16,
        warmup_steps=0.1,
        weight_decay=0.01,
        adam_beta2=0.98,
        save_strategy="no",
        logging_steps=50,
    )
    model_type = AutoConfig.from_pretrained(args.teacher).model_type
    trainer = hf_dld.DLDTrainer(
        model=DYNAMIC_CLASSES[model_type].from_pretrained(args.teacher),
        args=training,
        train_dataset=train_set,
        data_collator=hf_dld.DataCollatorCTC(processor),
        processing_class=processor,
    )
    trainer.train()
    save_whole(folder, trainer.unwrapped_model, processor)
    return folder


def transcribe(
    model, dataset, processor, layer_sets: Iterable[tuple[int, ...]], unit: Literal["word", "character"] = "word"
) -> tuple[np.ndarray, dict]:
    """Reference units of each utterance, and for each set of layers `errors`, `mean` and `lowest` (utterances,).

    The last two are confidences: the mean and the lowest log posterior of the best path's frames.
    """
    references, predictions = [], {layers: [] for layers in layer_sets}
    confidences = {layers: [] for layers in predictions}
    for batch in length_sorted_batches(dataset, processor, 16):
        references += [decode_labels(processor.tokenizer, labels) for labels in batch.pop("labels")]
        frames = model._get_feat_extract_output_lengths(batch.pop("input_lengths")).tolist()
        with torch.inference_mode():
            start, layer_inputs = model.before_layers(**batch)
            for layers, output in run_layer_sets(model, start, layer_inputs, predictions):
                best, tokens = model.ctc_logits(output).log_softmax(-1).max(-1)
                for row, length in enumerate(frames):
                    predictions[layers].append(processor.tokenizer.decode(tokens[row, :length]))
                    path = best[row, :length]
                    confidences[layers].append((path.mean().item(), path.min().item()))
    results = {}
    for layers, texts in predictions.items():
        errors, lengths = count_errors(texts, references, unit)
        mean, lowest = np.array(confidences[layers]).T
        results[layers] = {"errors": errors, "mean": mean, "lowest": lowest}
    return lengths, results


def difference(errors: np.ndarray, baseline: np.ndarray, resamples: int) -> dict:
    """The relative difference of two error rates on the same utterances, with its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(errors), size=(resamples, len(errors)))
    ratios = errors[drawn].sum(1) / baseline[drawn].sum(1) - 1
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"relative": float(errors.sum() / baseline.sum() - 1), "low": float(low), "high": float(high)}


def measure(sampling: str, splits: dict, processor, args: argparse.Namespace) -> dict:
    folder = train(sampling, splits["train"], processor, args)
    model = DYNAMIC_CLASSES[AutoConfig.from_pretrained(folder).model_type].from_pretrained(folder).eval()
    num_layers = model.config.num_hidden_layers
    schedules = {}
    for search in args.searches:
        objective, _, beam_size = search.partition(":")
        schedules[search] = hf_dld.search_depth_schedule(
            model,
            splits["validation"],
            processor,
            objective,
            beam_size=int(beam_size or 1),
            max_utterances=args.max_utterances,
            resume_file=args.output / f"{sampling}_{search.replace(':', '_')}.json",
        )
    rng = random.Random(0)
    counts = range(1, num_layers)  # at full depth all are the same
    even = {count: select_layers(count, num_layers) for count in counts}
    others = {c: [tuple(sorted(rng.sample(range(num_layers), c))) for _ in range(args.random_subsets)] for c in counts}
    found = {c: {name: tuple(schedule.layers[c - 1]) for name, schedule in schedules.items()} for c in counts}
    full = tuple(range(num_layers))
    wanted = {full, *even.values(), *sum(others.values(), [])}.union(*(sets.values() for sets in found.values()))
    lengths, results = transcribe(model, splits["test"], processor, wanted, args.unit)
    errors = {layers: result["errors"] for layers, result in results.items()}

    rows = []
    for count in counts:
        baseline, chance = errors[even[count]], np.mean([errors[layers] for layers in others[count]], axis=0)
        row = {"count": count, "even": rate(baseline, lengths), "random": rate(chance, lengths)}
        row["random_range"] = [f(rate(errors[s], lengths) for s in others[count]) for f in (min, max)]
        for name, layers in found[count].items():
            row[name] = {
                "layers": layers,
                "rate": rate(errors[layers], lengths),
                "against_even": difference(errors[layers], baseline, args.resamples),
                "against_random": difference(errors[layers], chance, args.resamples),
            }
        rows.append(row)
    return {
        "unit": args.unit,
        "full_depth": rate(errors[full], lengths),
        "test_units": int(lengths.sum()),
        "rows": rows,
        "searches": {name: asdict(schedule) for name, schedule in schedules.items()},
    }


def rate(errors: np.ndarray, lengths: np.ndarray) -> float:
    return float(errors.sum() / lengths.sum())


def markdown(models: dict) -> str:
    """A table for each model and search: rates and relative differences in percent, these with intervals."""
    lines = []
    for sampling, result in models.items():
        name = "The static teacher, merely cut" if sampling == "none" else f"Trained with `{sampling}`"
        for search in result["searches"]:
            objective, _, beam_size = search.partition(":")
            how = f"`{objective}`" + (f" with a beam of {beam_size}" if beam_size else "")
            lines += [f"{name}, searched by {how} ({100 * result['full_depth']:.1f} % at full depth):", ""]
            unit = {"word": "WER", "character": "CER"}[result["unit"]]
            lines.append(f"| layers | found | {unit} | even | against even | random (range) | against random |")
            lines.append("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
            for row in result["rows"]:
                found, (low, high) = row[search], row["random_range"]
                cells = [
                    str(row["count"]),
                    " ".join(map(str, found["layers"])),
                    f"{100 * found['rate']:.1f}",
                    f"{100 * row['even']:.1f}",
                    percent(found["against_even"]),
                    f"{100 * row['random']:.1f} ({100 * low:.1f} to {100 * high:.1f})",
                    percent(found["against_random"]),
                ]
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def percent(change: dict) -> str:
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * change[name] for name in ("relative", "low", "high")))


def load_splits(folder: Path, dataset: str, names: Iterable[str]) -> dict:
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForCTC.from_pretrained(folder)
    splits = {name: hf_dld.load_speech_dataset(dataset, split=name) for name in names}
    frames_of = model._get_feat_extract_output_lengths
    return {name: hf_dld.prepare_dataset(split, processor, frames_of)[0] for name, split in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--teacher", type=Path, default=RESULTS_DIR / "digits_wavlm/teachers/strong")
    parser.add_argument("--output", type=Path, required=True, help="folder for the students")
    parser.add_argument("--name", default="schedule", help="of the file in experiments/results")
    parser.add_argument("--unit", choices=["word", "character"], default="word", help="that errors on test are of")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=0.0015)
    parser.add_argument("--samplings", nargs="+", default=["none", "bernoulli", "selection", "balanced"])
    parser.add_argument(
        "--searches", nargs="+", default=["ctc", "kl", "wer"], help="by an objective; ctc:4 is one with a beam of 4"
    )
    parser.add_argument("--max_utterances", type=int, default=1000, help="of the validation split")
    parser.add_argument("--random_subsets", type=int, default=5, help="for each count")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap")
    args = parser.parse_args()

    splits, models = load_splits(args.teacher, args.dataset, ("train", "validation", "test")), {}
    processor = AutoProcessor.from_pretrained(args.teacher)
    args.output.mkdir(parents=True, exist_ok=True)
    for sampling in args.samplings:
        measured = args.output / f"{sampling}.json"
        if not measured.exists():
            arguments = {name: str(value) for name, value in vars(args).items()}
            result = {"arguments": arguments, **environment(), **measure(sampling, splits, processor, args)}
            measured.write_text(json.dumps(result, indent=2) + "\n")
        models[sampling] = json.loads(measured.read_text())
        (RESULTS_DIR / f"{args.name}.json").write_text(json.dumps(models, indent=2) + "\n")
        print(markdown(models), flush=True)


if __name__ == "__main__":
    main()
