"""`python -m hf_dld prepare`: a corpus as checked Parquet shards."""

import argparse
from pathlib import Path
from typing import Any

from ..data.transcripts import TEXT_CASES

DESCRIPTION = """Write a corpus as Parquet shards of checked utterances with their durations.

  python -m hf_dld prepare my_corpus prepared --num_proc 8
  python -m hf_dld prepare my_corpus prepared_16k --sampling_rate_hz 16000      mono FLAC of 16 bits

  python -m hf_dld prepare my_corpus prepared --text_case lower --text_rule '<unk>' '' --text_rule " 's" "'s"

Every file is decoded once; what cannot be used is refused, counted and listed in prepare_report.json and .md. An
interrupted preparation goes on when the same command is repeated, and does again what has changed in the corpus. Use
the folder as --dataset, or with datasets.load_dataset.
"""


def add_prepare_command(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="write a corpus as checked Parquet shards",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="Hub id, folder with metadata.csv files, or CSV/JSON manifest")
    parser.add_argument("output", type=Path, help="folder to make, or to go on with")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="default: all")
    parser.add_argument("--name", help="configuration of a Hub dataset")
    parser.add_argument("--revision", help="Git revision of a Hub dataset")
    parser.add_argument("--text_column", metavar="NAME", help="default: found among the usual names")
    parser.add_argument("--audio_column", metavar="NAME", help="default: found among the usual names")
    parser.add_argument(
        "--audio_root", metavar="FOLDER", help="that audio paths may not leave; default: the manifest's"
    )
    parser.add_argument(
        "--untranscribed", dest="transcribed", action="store_false", help="the corpus has no column of transcripts"
    )
    parser.add_argument("--keep_untranscribed", action="store_true", help="keep utterances whose transcript is empty")
    parser.add_argument("--min_duration_s", type=float, default=0.25, help="default: %(default)s")
    parser.add_argument("--max_duration_s", type=float, default=30.0, help="default: %(default)s")
    parser.add_argument(
        "--sampling_rate_hz", type=int, metavar="HZ", help="store mono 16-bit FLAC at this rate; default: files as is"
    )
    parser.add_argument(
        "--text_rule", nargs=2, action="append", dest="text_rules", metavar=("REGEX", "TEXT"),
        help="what takes the place of what matches in transcripts; may be repeated, and then happens in that order",
    )  # fmt: skip
    parser.add_argument("--text_case", choices=TEXT_CASES, help="of the transcripts; default: as they are")
    parser.add_argument(
        "--shard_utterances", type=int, default=1000, help="utterances of the source in a shard; default: %(default)s"
    )
    parser.add_argument("--num_proc", type=int, default=1, help="processes that decode; default: %(default)s")
    parser.set_defaults(run=run_prepare)


def run_prepare(args: argparse.Namespace) -> None:
    from ..data.prepare import prepare_corpus, reports_markdown

    options = {name: value for name, value in vars(args).items() if name != "run"}
    reports = prepare_corpus(options.pop("source"), options.pop("output"), options.pop("splits"), **options)
    print(reports_markdown(reports), end="")
