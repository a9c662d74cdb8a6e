"""What the experiments share: where they ran, and results that are stored whole or not at all."""

import json
import platform
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parent.parent
RESULTS_DIR = Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """Commit, versions and machine, to be stored beside every result."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.platform()}
    return {"commit": commit, **versions}


def spread(values: Iterable[float], scale: float = 100.0, sign: str = "") -> str:
    """The mean and, of more than one value, the range, with one decimal."""
    values = [scale * value for value in values]
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{sign}.1f} to {max(values):{sign}.1f})"


def store(path: Path, results: Any) -> None:
    """Write JSON beside the file and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
