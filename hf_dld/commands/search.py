"""`python -m hf_dld search`: find the layers that a dynamic checkpoint keeps for every number of layers."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """Find, on development data, which layers a dynamic checkpoint keeps for every number of layers.

  python -m hf_dld search DIR --dataset my_corpus --split validation
  python -m hf_dld search DIR --dataset my_corpus --objective kl        needs no transcripts

What is found goes into DIR/config.json as the checkpoint's own choice of layers, and with its scores and its cost into
DIR/depth_schedule.json. An interrupted search goes on when the same command is repeated.
"""


def add_search_command(commands: Any) -> None:
    parser = commands.add_parser(
        "search",
        help="find the best layers for every depth of a dynamic checkpoint",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a dynamic checkpoint; its config.json is changed")
    parser.add_argument("--dataset", required=True, help="Hub id, folder with metadata.csv files, or manifest")
    parser.add_argument("--dataset_config", metavar="NAME", help="configuration of a Hub dataset")
    parser.add_argument("--split", default="validation", help="never the test split; default: %(default)s")
    parser.add_argument("--text_column", help="default: found among the usual names")
    parser.add_argument("--audio_column", help="default: found among the usual names")
    parser.add_argument("--audio_root", help="folder that audio paths may not leave; default: the manifest's")
    parser.add_argument(
        "--objective",
        choices=("ctc", "kl", "wer"),
        default="ctc",
        help="what is to be small: CTC loss, KL divergence from the full depth, or WER; default: %(default)s",
    )
    parser.add_argument(
        "--beam_size", type=int, default=1, help="sets kept for each count; 1 is greedy and nested; default: 1"
    )
    parser.add_argument("--max_utterances", type=int, default=1000, help="drawn by the seed; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--cache_gb", type=float, default=2.0, help="memory for reused states; default: %(default)s")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: cuda where there is one, else cpu")
    parser.set_defaults(run=run_search)


def run_search(args: argparse.Namespace) -> None:
    model, processor = load_checkpoint(args.checkpoint, args.device)
    from ..data import load_speech_dataset, prepare_dataset
    from ..evaluation import LayerSetScorer, search_depth_schedule

    needs_text = args.objective != "kl"
    dataset = load_speech_dataset(
        args.dataset,
        args.dataset_config,
        args.split,
        audio_column=args.audio_column,
        text_column=args.text_column if needs_text else None,
        audio_root=args.audio_root,
        transcribed=needs_text,
    )
    frames_of = model._get_feat_extract_output_lengths
    dataset, _ = prepare_dataset(dataset, processor, frames_of, keep_untranscribed=not needs_text)

    names = ("objective", "max_utterances", "seed", "batch_size", "cache_gb")
    options = {name: getattr(args, name) for name in names}
    resume_file = args.checkpoint / "depth_schedule.partial.json"
    schedule = search_depth_schedule(
        model, dataset, processor, beam_size=args.beam_size, resume_file=resume_file, **options
    )
    counts = range(1, len(schedule.layers) + 1)
    before = [model.config.resolve_active_layers(num_active_layers=count) for count in counts]
    scores = LayerSetScorer(model, dataset, processor, **options).score(before, "Layers as they were")

    print(f"{schedule.objective} on {schedule.utterances} utterances of {args.split!r}:")
    print(changes_markdown(before, [scores[layers] for layers in before], schedule))
    schedule.to_json(args.checkpoint / "depth_schedule.json")
    write_schedule(args.checkpoint, schedule.layers)
    resume_file.unlink()
    cost = schedule.cost
    print(
        f"{cost.layer_sets} sets of layers on {cost.batches} batches: {cost.layer_calls} layer calls instead of "
        f"{cost.layer_calls_without_reuse}, {cost.feature_encoder_calls} of the feature encoder"
    )


def load_checkpoint(checkpoint: Path, device: str | None) -> tuple[Any, Any]:
    """The model and its processor, or an error before any work if the folder cannot take the result."""
    import torch
    from transformers import AutoConfig

    from ..data import load_processor
    from ..models import DYNAMIC_CLASSES

    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint / 'config.json'} is not there: give the folder of a dynamic checkpoint.")
    if not os.access(checkpoint, os.W_OK):
        raise PermissionError(f"{checkpoint} is read-only, and its config.json is to be changed: copy it first.")
    config = AutoConfig.from_pretrained(checkpoint)
    model_class = DYNAMIC_CLASSES.get(config.model_type)
    if model_class is None or config.model_type != model_class.config_class.model_type:
        raise ValueError(
            f"{checkpoint} is a {config.model_type!r} checkpoint, which cannot store a choice of layers. A stock one "
            "becomes a dynamic one with save_pretrained of hf_dld.DLDWavLMForCTC or hf_dld.DLDWav2Vec2ConformerForCTC."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model_class.from_pretrained(checkpoint).to(device), load_processor(checkpoint)


def changes_markdown(before: Sequence[Sequence[int]], scores: Sequence[float], schedule: Any) -> str:
    lines = ["| active layers | before | score | now | score |", "| ---: | --- | ---: | --- | ---: |"]
    for old, old_score, new, new_score in zip(before, scores, schedule.layers, schedule.scores, strict=True):
        cells = [
            str(len(new)),
            " ".join(map(str, old)),
            f"{old_score:.4f}",
            " ".join(map(str, new)),
            f"{new_score:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_schedule(checkpoint: Path, layers: list[list[int]]) -> None:
    """Put the schedule into the checkpoint's config.json, and say what changed; the rest of the file stays."""
    from ..evaluation.schedule_search import write_json

    path = checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    before = f"layer_selection was {config.get('layer_selection', 'even')!r}"
    if config.get("depth_schedule") is not None:
        before += ", depth_schedule was " + ("the same" if config["depth_schedule"] == layers else "another")
    write_json(path, {**config, "depth_schedule": layers, "layer_selection": "schedule"})
    print(f"{path}: a count of layers now means these layers ({before})")
    if config.get("active_layers") is not None:
        print(f"As before, the checkpoint runs layers {config['active_layers']} unless a call asks for another depth.")
    reports = [name for name in ("depth_report.json", "README.md") if (checkpoint / name).exists()]
    if reports:
        print(f"{' and '.join(reports)} may still tell of the layers as they were: evaluate the depths again.")
