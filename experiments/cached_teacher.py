"""Does training with cached posteriors reach what a live teacher reaches? The same runs with both, several seeds.

    make quickstart
    python experiments/cached_teacher.py --teacher outputs/quickstart/teacher --dataset examples/corpora/spoken_commands

Students start from the teacher and are trained with DLD by the quickstart's settings, for fewer steps; a seed draws the
same layers and batches for both. Writes experiments/results/cached_teacher.json and prints a Markdown table of word
error rates on the test split (mean over seeds, and their range).
"""

import argparse
import json
import statistics
import tempfile
from typing import Any

from common import RESULTS_DIR, environment, store
from transformers import AutoConfig, AutoModelForCTC, AutoProcessor, set_seed

import hf_dld
from hf_dld.evaluation import evaluate_depths
from hf_dld.models import DYNAMIC_CLASSES

RESULTS = RESULTS_DIR / "cached_teacher.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 6])
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.teacher)
    stock = AutoModelForCTC.from_pretrained(args.teacher)
    splits = {}
    for split in ("train", "test"):
        speech = hf_dld.load_speech_dataset(args.dataset, split=split)
        splits[split], _ = hf_dld.prepare_dataset(
            speech, processor, stock._get_feat_extract_output_lengths, decode_once=split == "train"
        )
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for cache_dir in (None, f"{folder}/cache"):
                student = train_student(args, seed, cache_dir, folder, processor, splits["train"])
                report = evaluate_depths(student, splits["test"], processor, args.depths, timed_utterances=0)
                errors = {row.num_active_layers: row.wer for row in report.rows}
                runs.append({"teacher": "cached" if cache_dir else "live", "seed": seed, "wer": errors})
                print(json.dumps(runs[-1]), flush=True)
    store(RESULTS, {"arguments": vars(args), **environment(), "runs": runs})
    print(markdown(runs, args.depths))


def train_student(
    args: argparse.Namespace, seed: int, cache_dir: str | None, folder: str, processor: Any, train: Any
) -> Any:
    model_class = DYNAMIC_CLASSES[AutoConfig.from_pretrained(args.teacher).model_type]
    set_seed(seed)
    trainer = hf_dld.DLDTrainer(
        model=model_class.from_pretrained(args.teacher),
        teacher=model_class.from_pretrained(args.teacher),
        args=hf_dld.DLDTrainingArguments(
            folder,
            teacher_cache_dir=cache_dir,
            depth_sampling="selection",
            seed=seed,
            max_steps=args.steps,
            learning_rate=2e-3,
            warmup_steps=0.1,
            weight_decay=0.01,
            adam_beta2=0.98,
            per_device_train_batch_size=8,
            save_strategy="no",
            logging_steps=100,
            disable_tqdm=True,
        ),
        train_dataset=train,
        data_collator=hf_dld.DataCollatorCTC(processor),
        processing_class=processor,
    )
    trainer.train()
    return trainer.model


def markdown(runs: list[dict[str, Any]], depths: list[int]) -> str:
    lines = ["| teacher | " + " | ".join(f"{depth} layers" for depth in depths) + " |"]
    lines.append("| --- |" + " ---: |" * len(depths))
    for teacher in ("live", "cached"):
        chosen = [run["wer"] for run in runs if run["teacher"] == teacher]
        columns = [[100 * wer[depth] for wer in chosen] for depth in depths]
        cells = [f"{statistics.mean(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})" for rates in columns]
        lines.append(f"| {teacher} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
