"""`python -m hf_dld push DIR REPO`: publish a checkpoint."""

import argparse
from typing import Any

from ..deploy.hub import push_to_hub


def add_push_command(commands: Any) -> None:
    parser = commands.add_parser(
        "push",
        help="publish a checkpoint on the Hub",
        description="Upload model, processor, code, model card, depth reports and schedule. After a failure, the same "
        "command uploads what is still missing.",
    )
    parser.add_argument("folder", help="the checkpoint")
    parser.add_argument("repo_id", help="name, or namespace/name")
    parser.add_argument("--private", action="store_true", default=None, help="make a private repository")
    parser.add_argument("--token", help="one that may write; default: the one of `hf auth login`, or HF_TOKEN")
    parser.add_argument("--revision", help="branch that gets the commit, made when missing; default: the main one")
    parser.set_defaults(run=push)


def push(arguments: argparse.Namespace) -> None:
    options = {name: getattr(arguments, name) for name in ("private", "token", "revision")}
    commit = push_to_hub(arguments.folder, arguments.repo_id, **options)
    print(commit.commit_url)
