"""`python -m hf_dld compare`: depth reports side by side."""

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """Print a Markdown table of depth reports side by side.

  python -m hf_dld compare teacher/depth_report.json student/depth_report.json --plot compared.png

Where two reports are about the same utterances, and the errors of each lie beside them (*.errors.npz, which `report`
writes), a second table says at which depths they differ by more than chance (paired bootstrap); otherwise a line says
why there is none.
"""


def add_compare_command(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="print depth reports side by side",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw WER of all of them to this .png or .svg file")
    parser.add_argument(
        "--against", choices=("num_active_layers", "gmac_per_s"), default="num_active_layers", help="x axis of the plot"
    )
    parser.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> None:
    from ..evaluation import DepthReport, compare_markdown, paired_differences, paired_markdown, plot_depths

    reports = [DepthReport.from_json(path) for path in args.reports]
    names = [report.name for report in reports]
    for report, path in zip(reports, args.reports, strict=True):
        if names.count(report.name) > 1:  # two selections of one model, or two folders of one name
            report.name = f"{report.name} ({path.parent.name}/{path.stem})"
    print(compare_markdown(reports))
    if args.plot is not None:
        plot_depths(reports, args.plot, against=args.against)
    if len(reports) == 2:
        try:
            differences = paired_differences(*args.reports)
        except ValueError as error:
            print(f"Whether they differ by more than chance cannot be said: {error}.")
        else:
            print(paired_markdown(differences, reports[0].name, reports[1].name))
