"""The tables of the documentation are those of the stored results."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["schedule", "cascade"])
def test_schedule_page_shows_what_was_stored(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
    script = runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))
    stored = json.loads(script["RESULTS"].read_text())
    table = script["markdown"](stored["models"] if name == "cascade" else stored)
    page = (ROOT / "docs" / "schedule.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 10 and [row for row in rows if row not in page] == []
