"""Files and folders that are whole or not there: written beside and renamed, so that a kill leaves nothing half-done.

What a killed process was writing stays under a name of its own, `.writing-...`, until `remove_unfinished`.
"""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

WRITING = ".writing-"
ABANDONED_S = 86_400.0  # on another machine, whose processes cannot be seen

_own: set[str] = set()  # names that this process is writing


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside to write to, with the same suffix, which takes the place of `path` at the end; not after an error.

    The folder of `path` is made when it is missing.
    """
    with _beside(Path(path)) as beside:
        yield beside
        os.replace(beside, path)


def write_whole_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text to a file, whole or not at all."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` at the end; after an error nothing of it stays.

    Where `folder` has files already, those of the same name are replaced one by one, and the others stay.
    """
    folder = Path(folder)
    with _beside(folder) as beside:
        beside.mkdir()
        yield beside
        try:
            os.replace(beside, folder)
        except OSError:  # it is there and not empty, perhaps since a moment: other processes of a run write it too
            if not folder.is_dir():
                raise
            for path in beside.iterdir():
                os.replace(path, folder / path.name)


@contextmanager
def only_user_of(folder: Path, taken: str) -> Iterator[None]:
    """Holds a lock on a folder, made when it is missing; `ValueError` with the message `taken` where another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(taken) from None
    try:
        yield
    finally:
        lock.release()


def remove_unfinished(folder: str | Path, recursive: bool = False) -> None:
    """Remove what processes that are no more were writing into a folder, which may be missing.

    What is written at the moment stays, whoever writes it; on another machine, what was begun within the last day.
    """
    pattern = f"{WRITING}*"
    for path in list(Path(folder).rglob(pattern) if recursive else Path(folder).glob(pattern)):
        with suppress(FileNotFoundError):  # another process removes it too
            if _is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f"{WRITING}{uuid4().hex[:8]}-{os.getpid()}-{platform.node()}-{path.name}"
    _own.add(beside.name)
    try:
        yield beside
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)
        _own.discard(beside.name)


def _is_abandoned(path: Path) -> bool:
    if time.time() - path.stat().st_mtime > ABANDONED_S:
        return True
    try:
        process, machine_and_name = path.name.removeprefix(WRITING).split("-", 2)[1:]
        if not machine_and_name.startswith(f"{platform.node()}-"):
            return False
        if int(process) == os.getpid():  # a container's processes have the same number after every start
            return path.name not in _own
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (ValueError, PermissionError):  # not named here; a process of somebody else
        pass
    return False
