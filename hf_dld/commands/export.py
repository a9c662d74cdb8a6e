"""`python -m hf_dld export`: depths of a dynamic checkpoint as stock checkpoints."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DESCRIPTION = """Write depths of a dynamic checkpoint as stock checkpoints, which load without this package.

  python -m hf_dld export DIR --num_active_layers 6 --output DIR6
  python -m hf_dld export DIR --active_layers 0 3 7 --output DIR3
  python -m hf_dld export DIR --num_active_layers 3 6 --output OUT      writes OUT/3_layers and OUT/6_layers

Each is loaded again as a stock model and compared with the dynamic one before it appears under its name.
"""


def add_export_command(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write depths of a dynamic checkpoint as stock checkpoints",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="folder or Hub id of a dynamic or stock WavLM or Wav2Vec2-Conformer")
    depth = parser.add_mutually_exclusive_group(required=True)
    depth.add_argument(
        "--num_active_layers",
        type=int,
        nargs="+",
        metavar="K",
        help="how many layers; for several counts, --output gets a folder K_layers for each",
    )
    depth.add_argument("--active_layers", type=int, nargs="+", metavar="I", help="which layers, 0-based and ascending")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--push_to_hub",
        metavar="REPO",
        help="upload it to this repository too; for several counts, to REPO-K-layers each",
    )
    parser.add_argument("--private", action="store_true", default=None, help="make private repositories")
    parser.add_argument(
        "--batch_norm_dataset",
        metavar="DATASET",
        help="re-estimate the Conformer's batch normalisation at each depth on this corpus (Hub id, folder or "
        "manifest; transcripts are not needed)",
    )
    parser.add_argument("--batch_norm_config", metavar="NAME", help="configuration of a Hub dataset")
    parser.add_argument("--batch_norm_split", default="train", help="default: %(default)s")
    parser.add_argument(
        "--batch_norm_audio_root", metavar="FOLDER", help="that audio paths may not leave; default: the manifest's"
    )
    parser.add_argument(
        "--batch_norm_utterances", type=int, default=200, help="how many, from the start; default: %(default)s"
    )
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> None:
    from ..data import load_processor
    from ..deploy.hub import create_repository, push_to_hub
    from ..deploy.static import check_free, export_static, load_dynamic

    depths: list[Any] = list(dict.fromkeys(args.num_active_layers or [])) or [args.active_layers]
    several = len(depths) > 1
    folders = [args.output / f"{depth}_layers" if several else args.output for depth in depths]
    # all that can be refused is refused before anything is written
    for folder in folders:
        check_free(folder)
    processor = load_processor(args.checkpoint)
    model = load_dynamic(args.checkpoint)
    for depth in depths:
        model.config.resolve_depth(depth)
    batches = batch_norm_batches(args, model, processor) if args.batch_norm_dataset else None
    repositories: list[str | None] = [None] * len(depths)
    if args.push_to_hub:
        names = [f"{args.push_to_hub}-{depth}-layers" if several else args.push_to_hub for depth in depths]
        repositories = [create_repository(name, private=args.private) for name in names]
    for depth, folder, repo_id in zip(depths, folders, repositories, strict=True):
        export = export_static(model, folder, depth, processor=processor, batch_norm_batches=batches)
        print(
            f"{export.folder}: {export.model_class} of layers {', '.join(map(str, export.active_layers))} "
            f"({export.parameters / 1e6:.2f} M parameters); its logits differ by at most {export.difference:.1g} "
            "from the dynamic model's"
        )
        if repo_id is not None:
            commit = push_to_hub(folder, repo_id, private=args.private, commit_message="Upload a static export")
            print(commit.commit_url)


def batch_norm_batches(args: argparse.Namespace, model: Any, processor: Any) -> Iterable[dict[str, Any]]:
    """Batches of the corpus as the model takes them, read once and used for every depth."""
    from ..data import load_speech_dataset, prepare_dataset
    from ..distill.batch_norm import norms_of
    from ..evaluation import length_sorted_batches

    norms_of(model)
    dataset = load_speech_dataset(
        args.batch_norm_dataset,
        args.batch_norm_config,
        args.batch_norm_split,
        audio_root=args.batch_norm_audio_root,
        transcribed=False,
    )
    dataset = dataset.select(range(min(args.batch_norm_utterances, len(dataset))))
    dataset, _ = prepare_dataset(dataset, processor, model._get_feat_extract_output_lengths, keep_untranscribed=True)
    names = ("input_values", "attention_mask")
    return [
        {name: batch[name] for name in names if name in batch}
        for batch in length_sorted_batches(dataset, processor, batch_size=16)
    ]
