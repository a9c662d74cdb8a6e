"""Publishing: a checkpoint's folder goes to the Hub in one call that may be repeated until it is through."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

from ..distill.checkpoints import RUN_FILE
from .model_card import CARD_FILE, is_own_card, make_model_card

# the model, its processor, code and card, and what the card shows; not checkpoints, optimizers, the teacher and pickles
PUBLISHED = ["*.safetensors", "*.json", "*.py", "*.md", "*.png", "*.svg", "*.txt", "*.model", "*.jinja"]
# the run's arguments name folders of this machine
NOT_PUBLISHED = ["*/*", ".*", RUN_FILE, "trainer_state.json"]

EXPLANATIONS = {
    401: "the Hub does not accept the token: log in with `hf auth login`, or pass one that may write",
    403: "this token may not write there: the name belongs to somebody else, or the token may only read",
    404: "there is no such repository, or the token may not see it",
}


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a dynamic-depth model",
) -> CommitInfo:
    """Upload model, processor, code, model card, depth reports and schedule from a folder to a repository of the Hub.

    The repository is made when it is missing; one that is there gets a new commit. A card is written where there is
    none, and one that nobody edited since `make_model_card` is written again with the repository's name; no other file
    is touched. Subfolders (checkpoints, the teacher), optimizer states and the run's arguments stay here. After a
    failure the same call uploads what is still missing.

    Args:
        folder: what `save_pretrained` wrote for the model and its processor.
        repo_id: `"name"`, under the token's own account, or `"namespace/name"`.
        private: of a repository that is made now; default: public, or what the organization has set.
        token: one that may write; default: the one that is logged in.
        revision: the branch that gets the commit, made from the main one when it is missing; default: the main one.
        commit_message: first line of the commit.

    Returns:
        The commit: `commit_url`, `oid`, `repo_url`.

    Raises:
        ValueError: the folder lacks a part of a checkpoint, the name is impossible, or `private` was asked for and the
            repository is public. Nothing was uploaded.
        OSError: the Hub could not be reached or refused; says why, and what to do.
    """
    folder = Path(folder)
    _check_complete(folder)
    card_wanted = _is_card_wanted(folder)
    repo_id = create_repository(repo_id, private=private, token=token)
    if card_wanted:
        make_model_card(folder, repo_id).save(folder / CARD_FILE)
    hub = HfApi(token=token)
    try:
        if revision is not None:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        return hub.upload_folder(
            repo_id=repo_id,
            revision=revision,
            folder_path=folder,
            commit_message=commit_message,
            allow_patterns=PUBLISHED,
            ignore_patterns=list(NOT_PUBLISHED),
        )
    except Exception as error:  # transport errors, refusals and failed uploads have no class in common
        branch = f" --revision {revision}" if revision is not None else ""
        raise OSError(
            f"Could not push {folder} to {repo_id}: {_explain(error)}. Nothing is lost here: repeat the call, or "
            f"`python -m hf_dld push {folder} {repo_id}{branch}`, and what is missing is uploaded."
        ) from error


def create_repository(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Make sure that the repository is there and that the token may write to it; returns its full name.

    Called before a long training, it finds a wrong token or name while that costs seconds.

    Raises:
        ValueError: an impossible name; or `private`, and the repository is there and public.
        OSError: as in `push_to_hub`.
    """
    validate_repo_id(repo_id)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # somebody else's repository is found, but cannot be written to
        public = private and not api.repo_info(repo_id).private
    except Exception as error:
        raise OSError(f"Could not make or find the repository {repo_id} on the Hub: {_explain(error)}.") from error
    if public:
        raise ValueError(f"{repo_id} is there and public, though a private repository was asked for; choose another.")
    return repo_id


def _check_complete(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    parts = {
        "config.json": "config.json" in names,
        "weights (*.safetensors)": any(name.endswith(".safetensors") for name in names),
        "a processor (processor_config.json or preprocessor_config.json)": bool(
            names & {"processor_config.json", "preprocessor_config.json"}
        ),
    }
    missing = [part for part, found in parts.items() if not found]
    if missing:
        raise ValueError(f"{folder} is not a whole checkpoint, so it is not pushed: it lacks {', '.join(missing)}.")


def _is_card_wanted(folder: Path) -> bool:
    """Whether there is no card, or one that nobody edited; a static model's card is its owner's."""
    if not hasattr(AutoConfig.from_pretrained(folder), "resolve_active_layers"):
        return False
    path = folder / CARD_FILE
    if path.exists() and not is_own_card(path):
        return False
    unedited = str(make_model_card(folder))
    return not path.exists() or path.read_text(encoding="utf-8") == unedited


def _explain(error: BaseException) -> str:
    """Why the Hub refused, or that it could not be reached, with the error's own first words."""
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return " ".join(str(error).split())  # such as metadata of the card that the Hub does not accept
    cause: Any = error
    while cause is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    said = " ".join(str(cause or error).split()) or type(error).__name__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in EXPLANATIONS:
        return f"{EXPLANATIONS[status]} ({said})"
    if status is None or status >= 500:
        return f"the connection was lost, or the Hub is out of order ({said})"
    return said
