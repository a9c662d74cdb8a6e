"""`python -m hf_dld export-onnx`: depths of a dynamic checkpoint as ONNX graphs."""

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """Write depths of a dynamic checkpoint as ONNX graphs with their processor, for onnxruntime.

  python -m hf_dld export-onnx DIR --num_active_layers 6 --output DIR6
  python -m hf_dld export-onnx DIR --active_layers 0 3 7 --output DIR3 --int8
  python -m hf_dld export-onnx DIR --num_active_layers 3 6 --output OUT      writes OUT/3_layers and OUT/6_layers

Each is compared with PyTorch before it appears under its name. docs/onnx.md transcribes with onnxruntime alone.
Needs pip install "hf_dld[onnx]".
"""


def add_export_onnx_command(commands: Any) -> None:
    parser = commands.add_parser(
        "export-onnx",
        help="write depths of a dynamic checkpoint as ONNX graphs",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="folder or Hub id of a dynamic or stock WavLM or Wav2Vec2-Conformer")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--num_active_layers",
        type=int,
        nargs="+",
        metavar="K",
        help="how many layers; for several counts, --output gets a folder K_layers for each. Default: the layers that "
        "the checkpoint is set to",
    )
    depth.add_argument("--active_layers", type=int, nargs="+", metavar="I", help="which layers, 0-based and ascending")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--int8", action="store_true", help="quantize the weights of the linear layers to 8 bits")
    parser.set_defaults(run=run_export_onnx)


def run_export_onnx(args: argparse.Namespace) -> None:
    from ..data import load_processor
    from ..deploy.onnx_export import check_extra, export_onnx
    from ..deploy.static import check_free, load_dynamic

    check_extra()
    depths: list[Any] = list(dict.fromkeys(args.num_active_layers or [])) or [args.active_layers]
    folders = [args.output / f"{depth}_layers" if len(depths) > 1 else args.output for depth in depths]
    for folder in folders:
        check_free(folder)
    processor = load_processor(args.checkpoint)
    model = load_dynamic(args.checkpoint)
    for depth in args.num_active_layers or []:  # none is written if one of them is impossible
        model.config.resolve_active_layers(num_active_layers=depth)
    for depth, folder in zip(depths, folders, strict=True):
        export = export_onnx(model, folder, depth, args.int8, processor=processor)
        print(
            f"{export.file}: layers {', '.join(map(str, export.active_layers))}, {export.size_bytes / 1e6:.1f} MB; "
            f"on noise its logits differ by at most {export.difference:.1g} from PyTorch's, and "
            f"{export.token_agreement:.1%} of the frames have the same token"
        )
