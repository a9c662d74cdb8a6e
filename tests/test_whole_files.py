"""Files and folders are whole or not there, and what killed processes left can be told from what is being written."""

import os
import platform
import subprocess

import pytest

from hf_dld.whole_files import WRITING, remove_unfinished, whole_file, whole_folder, write_whole_text


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "folder" / "report.png"
    with whole_file(path) as beside:
        beside.write_text("half")
        assert not path.exists() and beside.suffix == ".png"
        remove_unfinished(tmp_path, recursive=True)
        assert beside.exists(), "it is being written"
    assert path.read_text() == "half" and list(path.parent.iterdir()) == [path]
    with pytest.raises(RuntimeError), whole_file(path) as beside:
        beside.write_text("other")
        raise RuntimeError
    assert path.read_text() == "half" and list(path.parent.iterdir()) == [path]
    write_whole_text(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode() and not path.stat().st_mode & 0o111


def test_two_processes_make_the_same_folder(tmp_path):
    folder = tmp_path / "model"
    with whole_folder(folder) as first, whole_folder(folder) as second:
        (first / "a").write_text("first")
        (second / "a").write_text("second")
        (second / "b").write_text("second")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "first", "b": "second"}
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(OSError), whole_folder(folder / "a") as beside:
        (beside / "b").touch()
    assert (folder / "a").read_text() == "first"


def test_what_killed_processes_left_is_removed(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    node = platform.node()
    dead = [f"{WRITING}00000000-{child.pid}-{node}-x.json", f"{WRITING}00000000-{os.getpid()}-{node}-x.json"]
    alive = [f"{WRITING}00000000-{os.getppid()}-{node}-x.json", f"{WRITING}00000000-1-elsewhere-x.json", f"{WRITING}x"]
    for name in (*dead, *alive, "kept.json"):
        (tmp_path / name).touch()
    old = tmp_path / f"{WRITING}00000000-1-elsewhere-folder"
    old.mkdir()
    (old / "weights").touch()
    os.utime(old, (0, 0))
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*alive, "kept.json"}
    remove_unfinished(tmp_path / "missing")
