"""`python -m hf_dld report`: error rates and costs of a checkpoint at every depth."""

import argparse
import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

DESCRIPTION = """Evaluate a checkpoint at every depth: WER and CER with intervals, parameters, GMAC, time and memory.

  python -m hf_dld report DIR --dataset my_corpus
  python -m hf_dld report DIR --dataset my_corpus --selection random --draws 10 --depths 2 4 6

Writes depth_report.json, .csv, .md, .png and .svg, and the errors of each utterance for `compare`, beside the
checkpoint or to --output; with another selection than the checkpoint's own, depth_report_SELECTION. An interrupted
evaluation goes on when the same command is repeated.
"""


def add_report_command(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="evaluate a checkpoint at every depth",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="folder or Hub id of a dynamic or stock WavLM or Wav2Vec2-Conformer")
    parser.add_argument("--dataset", required=True, help="Hub id, folder with metadata.csv files, or CSV/JSON manifest")
    parser.add_argument("--dataset_config", metavar="NAME", help="configuration of a Hub dataset")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--text_column", metavar="NAME", help="default: found among the usual names")
    parser.add_argument("--audio_column", metavar="NAME", help="default: found among the usual names")
    parser.add_argument(
        "--audio_root", metavar="FOLDER", help="that audio paths may not leave; default: the manifest's"
    )
    parser.add_argument("--max_duration_s", type=float, default=30.0, help="longer ones are left out; default: 30")
    parser.add_argument("--streaming", action="store_true", help="read the dataset as it goes, without storing it")
    parser.add_argument("--depths", type=int, nargs="+", metavar="K", help="numbers of active layers; default: all")
    parser.add_argument(
        "--selection",
        choices=("even", "first", "schedule", "random"),
        help="how a count becomes layers; default: the checkpoint's own",
    )
    parser.add_argument("--draws", type=int, default=5, help="random subsets of a depth; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of random subsets and intervals; default: %(default)s")
    parser.add_argument("--name", help="what tables call the model; default: the name of its folder")
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument(
        "--timed_utterances", type=int, default=50, help="passes timed at each depth, 0 for none; default: %(default)s"
    )
    parser.add_argument("--device", help="cpu, cuda, ...; default: an accelerator if there is one")
    parser.add_argument(
        "--cache_dir", type=Path, help="for interrupted evaluations; default: in the Hugging Face cache"
    )
    parser.add_argument("--output", type=Path, help="folder to write to; default: the checkpoint's")
    parser.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoConfig

    from ..data import load_processor, load_speech_dataset, prepare_dataset
    from ..data.datasets import public_name
    from ..evaluation import evaluate_depths, plot_depths
    from ..models import DYNAMIC_CLASSES
    from ..models.depth import check_num_active_layers
    from ..whole_files import write_whole_text

    output = args.output or Path(args.checkpoint)
    if args.output is None and not output.is_dir():
        raise SystemExit(f"{args.checkpoint} is not a folder to write the report to: give --output")
    config = AutoConfig.from_pretrained(args.checkpoint)
    if config.model_type not in DYNAMIC_CLASSES:
        raise SystemExit(f"{args.checkpoint} is a {config.model_type} model, not one of {sorted(DYNAMIC_CLASSES)}")
    for depth in args.depths or []:  # before any audio is read
        check_num_active_layers(depth, config.num_hidden_layers)
    device = args.device or torch.accelerator.current_accelerator() or "cpu"
    model = DYNAMIC_CLASSES[config.model_type].from_pretrained(args.checkpoint).to(device)
    processor = load_processor(args.checkpoint)
    dataset = load_speech_dataset(
        args.dataset,
        args.dataset_config,
        args.split,
        audio_column=args.audio_column,
        text_column=args.text_column,
        audio_root=args.audio_root,
        streaming=args.streaming,
    )
    dataset, _ = prepare_dataset(
        dataset, processor, model._get_feat_extract_output_lengths, max_duration_s=args.max_duration_s
    )
    output.mkdir(parents=True, exist_ok=True)
    own = args.selection in (None, model.config.layer_selection)
    stem = "depth_report" if own else f"depth_report_{args.selection}"
    report = evaluate_depths(
        model,
        dataset,
        processor,
        args.depths,
        selection=args.selection,
        draws=args.draws,
        seed=args.seed,
        name=args.name or Path(args.checkpoint).resolve().name,
        batch_size=args.batch_size,
        timed_utterances=args.timed_utterances,
        cache_dir=args.cache_dir or default_cache_dir(args),
        errors_path=output / f"{stem}.errors.npz",
    )
    report.dataset, report.dataset_config = public_name(args.dataset), args.dataset_config
    report.split = args.split
    report.to_json(output / f"{stem}.json")
    report.to_csv(output / f"{stem}.csv")
    write_whole_text(output / f"{stem}.md", report.to_markdown())
    for suffix in ("png", "svg"):
        plot_depths([report], output / f"{stem}.{suffix}", against="gmac_per_s")
    print(report.to_markdown())


def default_cache_dir(args: argparse.Namespace) -> Path:
    """In the Hugging Face cache; a folder for each stream, which has no fingerprint that would tell it from another."""
    from huggingface_hub import cached_assets_path

    folder = cached_assets_path("hf_dld", "depth_report")
    if not args.streaming:
        return folder
    names = ("dataset_config", "split", "text_column", "audio_column", "audio_root", "max_duration_s")
    path = Path(args.dataset)
    stream = [str(path.resolve() if path.exists() else path), *(getattr(args, name) for name in names)]
    return folder / blake2b(json.dumps(stream).encode(), digest_size=16).hexdigest()
