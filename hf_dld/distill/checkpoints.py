"""Runs that can be interrupted: which checkpoint to go on from, whose folder it is, and saves that are whole or not."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..whole_files import remove_unfinished, whole_folder

if TYPE_CHECKING:
    from transformers import TrainingArguments  # slow to import, and exports need none

RUN_FILE = "run.json"
LIBRARIES = ("torch", "transformers", "datasets")


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-N` of a folder that was written to its end, or None.

    The trainers of this package write checkpoints beside and rename them. The stock Trainer writes in place, its state
    last, so a checkpoint without one was cut short, by a kill or a full disk.
    """
    complete = [path for path in Path(folder).glob("checkpoint-*") if _is_complete(path)]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return checkpoint.name.rpartition("-")[2].isdigit()


# Where a run writes, how it is watched and what its device can may change between its start and its continuation; and
# how a stream goes on, which takes long where all that was heard is read again.
_MAY_CHANGE = (
    "output_dir logging_dir disable_tqdm run_name push_to_hub dataloader_pin_memory ignore_data_skip data_seed".split()
)


def describe_run(training: "TrainingArguments", **others: Any) -> dict[str, Any]:
    """What tells one run of a script from another, for `claim_output_dir`: its argument dataclasses by name.

    Raises:
        ValueError: for a `resume_from_checkpoint`, which would not be looked at.
    """
    if training.resume_from_checkpoint is not None:
        raise ValueError(
            f"resume_from_checkpoint is {training.resume_from_checkpoint!r}, but the same command goes on by itself "
            "from the last checkpoint in its output_dir: leave it out."
        )
    settings = {
        name: value
        for name, value in training.to_dict().items()
        if name not in _MAY_CHANGE and not name.startswith("hub_")
    }
    return {**{name: vars(arguments) for name, arguments in others.items()}, "training": settings}


def claim_output_dir(folder: str | Path, run: dict[str, Any]) -> None:
    """Make the folder this run's own, or find that it is: the same command goes on where it was interrupted.

    A run that failed before it left any work behind may be replaced by a corrected one. The versions of the libraries
    that it starts with are stored beside it, and may be others when it goes on. What was being written when it was
    killed is removed.

    Args:
        folder: made when it is missing.
        run: what describes the run, JSON values (`describe_run`).

    Raises:
        ValueError: the folder belongs to a run with other settings, or holds files of no run. Nothing is changed.
    """
    folder, run = Path(folder), json.loads(json.dumps(run))
    remove_unfinished(folder.parent)
    remove_unfinished(folder, recursive=True)
    if (folder / RUN_FILE).exists():
        earlier = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        different = sorted(changed_settings({**earlier, "versions": None}, run))
        work = [path for path in folder.iterdir() if path.name != RUN_FILE]
        if different and work:
            raise ValueError(
                f"{folder} holds another run, which this one would overwrite ({'; '.join(different)}). Choose another "
                "output_dir, or repeat that run's settings to continue it."
            )
        if not different:
            return
        # a run that failed before it did anything: the corrected command takes its place
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not the folder of an earlier run; choose another output_dir.")
    run["versions"] = {library: version(library) for library in LIBRARIES}
    with whole_folder(folder) as beside:  # a kill leaves no folder that looks like somebody else's
        (beside / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def changed_settings(then: Any, now: Any, name: str = "") -> list[str]:
    """Each setting of nested dictionaries that is not what it was; one that is missing is None, as one left out is."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            change
            for key in then.keys() | now.keys()
            for change in changed_settings(then.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if then == now else [f"{name}: {then!r} then, {now!r} now"]


def save_whole(folder: str | Path, *parts: Any) -> None:
    """Save a model, a processor and the like with `save_pretrained`, each file whole or not at all.

    All is written beside the folder before anything in it is replaced, so that a full disk leaves what was there.

    Raises:
        OSError: naming the folder and what went wrong; half-written files are removed.
    """
    try:
        with whole_folder(folder) as beside:
            for part in parts:
                part.save_pretrained(beside)
    except Exception as error:  # safetensors has an error class of its own for a full disk
        raise OSError(
            f"Could not save to {folder}: {error}. What was saved there before, and the checkpoints of this run, are "
            "as they were: free some space and repeat the command to continue."
        ) from error
