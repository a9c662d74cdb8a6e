"""`python -m hf_dld COMMAND`: what can be done with a checkpoint without writing Python."""

import argparse
from collections.abc import Sequence

from .commands.card import add_card_command
from .commands.compare import add_compare_command
from .commands.export import add_export_command
from .commands.export_onnx import add_export_onnx_command
from .commands.prepare import add_prepare_command
from .commands.push import add_push_command
from .commands.report import add_report_command
from .commands.search import add_search_command

ADD_COMMAND = (
    add_card_command,
    add_compare_command,
    add_export_command,
    add_export_onnx_command,
    add_prepare_command,
    add_push_command,
    add_report_command,
    add_search_command,
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hf_dld", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add_command in ADD_COMMAND:
        add_command(commands)
    arguments = parser.parse_args(arguments)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
