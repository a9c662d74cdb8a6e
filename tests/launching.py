"""Scripts in two processes on the CPU, as `accelerate launch` would run them on two accelerators."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 600  # a hang fails; on an idle machine a launch takes a quarter of a minute


def launch(*command: object) -> str:
    """Run a script with examples/accelerate/ddp.yaml; its standard output."""
    options = ["--config_file", ROOT / "examples" / "accelerate" / "ddp.yaml", "--main_process_port", 0]
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, [*options, *command])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-20_000:]
    return done.stdout
