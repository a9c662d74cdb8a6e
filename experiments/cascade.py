"""Does it pay to go deeper only where few layers are unsure? Against fixed depths of the same average cost.

    python experiments/cascade.py --dataset outputs/babble_digits \\
        --models experiments/results/digits_wavlm/teachers/strong outputs/schedule/bernoulli

(the models of experiments/schedule.py, with evenly spaced layers and with the first ones, of which all are shared.)

Each utterance is transcribed with few layers; where the confidence (mean or lowest log posterior of the best path's
frames) is below a threshold, it is transcribed again with more. The second pass starts from the layers that both sets
begin with, the feature encoder runs once, and the second pass's CTC head is counted. For the cost of each fixed depth,
the best pair of depths, confidence and threshold is chosen on the validation split, as is the best fixed depth that
costs no more, and both are judged on the test split. Writes experiments/results/cascade.json and prints the tables of
docs/schedule.md.
"""

import argparse
import itertools
import json
import os.path
from pathlib import Path

import numpy as np
from common import RESULTS_DIR, environment
from schedule import difference, load_splits, percent, transcribe
from transformers import AutoConfig, AutoProcessor

from hf_dld.evaluation.cost import count_gmac_per_s
from hf_dld.models import DYNAMIC_CLASSES
from hf_dld.models.depth import select_layers

RESULTS = RESULTS_DIR / "cascade.json"
RATES = np.linspace(0.05, 0.95, 19)  # shares of the validation utterances that go deeper


def costs_gmac(model, processor, samples: int) -> tuple[float, float, float]:
    """GMAC of everything but the layers, of one layer, and of the CTC head, for one utterance of so many samples."""
    rate_hz = processor.feature_extractor.sampling_rate
    one, two = (samples / rate_hz * rate for rate in count_gmac_per_s(model, [1, 2], samples / rate_hz, rate_hz))
    head = int(model._get_feat_extract_output_lengths(samples)) * model.lm_head.weight.numel() / 1e9
    return 2 * one - two, two - one, head


def cascade(results: dict, shallow: tuple, deep: tuple, confidence: str, threshold: float, costs) -> tuple:
    """Errors of each utterance and the average GMAC."""
    rest, layer, head = costs
    deeper = results[shallow][confidence] < threshold
    errors = np.where(deeper, results[deep]["errors"], results[shallow]["errors"])
    again = len(deep) - len(os.path.commonprefix([shallow, deep]))
    return errors, rest + layer * len(shallow) + deeper.mean() * (again * layer + head)


def compare(validation: dict, test: dict, words: np.ndarray, costs, resamples: int) -> list[dict]:
    """A row for each budget, the cost of a fixed depth."""
    sets = sorted(validation, key=len)
    rest, layer, _ = costs
    tried = []
    for shallow, deep in itertools.combinations(sets, 2):
        for confidence, rate in itertools.product(("mean", "lowest"), RATES):
            threshold = float(np.quantile(validation[shallow][confidence], rate))
            errors, gmac = cascade(validation, shallow, deep, confidence, threshold, costs)
            tried.append((errors.sum(), gmac, (shallow, deep, confidence, threshold)))
    rows = []
    for budget in sets[1:-1]:
        limit = rest + layer * len(budget)
        affordable = [candidate for candidate in tried if candidate[1] <= limit]
        if not affordable:
            continue
        _, _, (shallow, deep, confidence, threshold) = min(affordable)
        fixed = min(sets[: len(budget)], key=lambda layers: (validation[layers]["errors"].sum(), len(layers)))
        errors, gmac = cascade(test, shallow, deep, confidence, threshold, costs)
        baseline = test[fixed]["errors"]
        rows.append(
            {
                "budget_gmac": limit,
                "fixed": len(fixed),
                "fixed_gmac": rest + layer * len(fixed),
                "fixed_wer": float(baseline.sum() / words.sum()),
                "shallow": len(shallow),
                "deep": len(deep),
                "confidence": confidence,
                "threshold": threshold,
                "went_deeper": float((test[shallow][confidence] < threshold).mean()),
                "cascade_gmac": float(gmac),
                "cascade_wer": float(errors.sum() / words.sum()),
                "against_fixed": difference(errors, baseline, resamples),
            }
        )
    return rows


def markdown(models: dict) -> str:
    lines = []
    for name, rows in models.items():
        lines += [
            f"`{name}`:",
            "",
            "| fixed: layers | GMAC | WER | cascade | goes deeper | GMAC | WER | against fixed |",
        ]
        lines.append("| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
        for row in rows:
            cells = [
                str(row["fixed"]),
                f"{row['fixed_gmac']:.3f}",
                f"{100 * row['fixed_wer']:.1f}",
                f"{row['shallow']}, then {row['deep']}",
                f"{100 * row['went_deeper']:.0f} %",
                f"{row['cascade_gmac']:.3f}",
                f"{100 * row['cascade_wer']:.1f}",
                percent(row["against_fixed"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap")
    args = parser.parse_args()

    models = {}
    for folder in args.models:
        processor, model_type = AutoProcessor.from_pretrained(folder), AutoConfig.from_pretrained(folder).model_type
        model = DYNAMIC_CLASSES[model_type].from_pretrained(folder).eval()
        splits = load_splits(folder, args.dataset, ("validation", "test"))
        costs = costs_gmac(model, processor, int(np.mean(splits["test"]["input_length"])))
        num_layers = model.config.num_hidden_layers
        for selection in ("even", "first"):
            sets = [select_layers(count, num_layers, selection) for count in range(1, num_layers + 1)]
            _, validation = transcribe(model, splits["validation"], processor, sets)
            words, test = transcribe(model, splits["test"], processor, sets)
            models[f"{folder.name}, {selection} layers"] = compare(validation, test, words, costs, args.resamples)
        content = {
            "arguments": {"dataset": args.dataset, "models": [str(folder) for folder in args.models]},
            **environment(),
            "models": models,
        }
        RESULTS.write_text(json.dumps(content, indent=2) + "\n")
        print(markdown(models), flush=True)


if __name__ == "__main__":
    main()
