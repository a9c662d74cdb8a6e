"""Which statistics should a dynamic Conformer's batch normalisation use? Compared at several depths.

    python experiments/batch_norm.py --teacher outputs/digits_conformer/teacher --dataset outputs/connected_digits

For each policy (frozen at the teacher's statistics, updated in training) and seed, a student starts from the teacher
and is trained with DLD for the same steps; each is then evaluated on the test split with the statistics that it has,
and with statistics estimated anew for each depth on training utterances. Writes experiments/results/batch_norm.json and
prints a Markdown table of word error rates (mean over seeds, and their range).
"""

import argparse
import copy
import json
import statistics

from common import RESULTS_DIR, environment, store
from transformers import AutoModelForCTC, AutoProcessor

import hf_dld
from hf_dld.distill.batch_norm import reestimate_batch_norm
from hf_dld.evaluation import evaluate_depths, length_sorted_batches
from hf_dld.models import DYNAMIC_CLASSES

RESULTS = RESULTS_DIR / "batch_norm.json"


def error_rates(model, test, processor, depths, reestimation_set=None) -> dict[int, float]:
    """WER at each depth; with a `reestimation_set`, on statistics that are estimated on it for that depth."""
    rates = {}
    for depth in depths:
        at_depth = copy.deepcopy(model)
        at_depth.set_active_layers(depth)
        if reestimation_set is not None:
            batches = length_sorted_batches(reestimation_set, processor, 16)
            names = ("input_values", "attention_mask")
            reestimate_batch_norm(at_depth, ({n: batch[n] for n in names if n in batch} for batch in batches))
        rates[depth] = evaluate_depths(at_depth, test, processor, [depth], timed_utterances=0).rows[0].wer
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 6])
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.teacher)
    teacher = AutoModelForCTC.from_pretrained(args.teacher)
    student_class = DYNAMIC_CLASSES[teacher.config.model_type]
    splits = {}
    for split in ("train", "test"):
        dataset = hf_dld.load_speech_dataset(args.dataset, split=split)
        splits[split], _ = hf_dld.prepare_dataset(dataset, processor, teacher._get_feat_extract_output_lengths)
    some = splits["train"].select(range(200))

    runs = []
    for seed in args.seeds:
        for policy in ("frozen", "updated"):
            training = hf_dld.DLDTrainingArguments(
                output_dir=f"outputs/batch_norm_{policy}_{seed}",
                batch_norm=policy,
                depth_sampling="selection",
                seed=seed,
                max_steps=args.steps,
                learning_rate=args.learning_rate,
                warmup_steps=0.1,
                save_strategy="no",
                logging_steps=100,
            )
            trainer = hf_dld.DLDTrainer(
                model=student_class.from_pretrained(args.teacher),
                teacher=student_class.from_pretrained(args.teacher),
                args=training,
                train_dataset=splits["train"],
                data_collator=hf_dld.DataCollatorCTC(processor),
                processing_class=processor,
            )
            trainer.train()
            for estimated in (False, True):
                statistics_of = some if estimated else None
                rates = error_rates(trainer.model, splits["test"], processor, args.depths, statistics_of)
                runs.append({"policy": policy, "re-estimated": estimated, "seed": seed, "wer": rates})
                print(json.dumps(runs[-1]), flush=True)

    store(RESULTS, {"arguments": vars(args), **environment(), "runs": runs})
    print(markdown(runs, args.depths))


def markdown(runs: list[dict], depths: list[int]) -> str:
    lines = ["| statistics | " + " | ".join(f"{depth} layers" for depth in depths) + " |"]
    lines.append("| --- |" + " ---: |" * len(depths))
    for policy in ("frozen", "updated"):
        for estimated in (False, True):
            cells = []
            for depth in depths:
                chosen = [run for run in runs if (run["policy"], run["re-estimated"]) == (policy, estimated)]
                rates = [100 * run["wer"][depth] for run in chosen]
                cells.append(f"{statistics.mean(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})")
            name = policy + (", then re-estimated for each depth" if estimated else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
