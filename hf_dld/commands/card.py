"""`python -m hf_dld card DIR`: write a checkpoint's model card."""

import argparse
from typing import Any

from ..deploy.model_card import CARD_FILE, write_model_card


def add_card_command(commands: Any) -> None:
    parser = commands.add_parser(
        "card",
        help="write a checkpoint's model card",
        description="Write the model card of a dynamic checkpoint from the files of its folder. What no file tells is "
        "given below; what is not given stays as the present card has it, or is said to be unknown.",
    )
    parser.add_argument("folder", help="the checkpoint")
    parser.add_argument("--repo_id", help="repository that the snippets load from; default: the folder's name")
    parser.add_argument("--language", help="ISO 639 code of the speech, such as en")
    parser.add_argument("--license", help="the model's licence, as the Hub names it: apache-2.0, cc-by-4.0, ...")
    parser.add_argument("--base_model", help="Hub id of the model whose weights this one started from")
    parser.add_argument("--datasets", nargs="+", help="Hub ids of the training data")
    parser.add_argument("--dataset_license", help="licence of the training data, in words")
    parser.set_defaults(run=write_card)


def write_card(arguments: argparse.Namespace) -> None:
    names = ("language", "license", "base_model", "datasets", "dataset_license")
    facts = {name: getattr(arguments, name) for name in names}
    write_model_card(arguments.folder, arguments.repo_id, **facts)
    print(f"{arguments.folder}/{CARD_FILE}")
