"""What does loading a few layers cost? Time and memory of pruned loading against a static model of the same layers.

    python benchmarks/loading.py
    python benchmarks/loading.py --model conformer --num_active_layers 6

Makes a base-size checkpoint with random weights and its static export, and loads them by turns, each time in a fresh
process: the static model with the stock class; the dynamic one with prune_inactive_layers=True; and the whole dynamic
one. Prints a Markdown table: medians, with the smallest and the largest, and ratios of the medians to the static
model's. Linux only.

Memory is the peak of the process, imports included: when the model is loaded, and when it has heard a second of audio,
because float32 weights on a CPU are mapped from the file and only take memory when they are first used (give --dtype to
have them converted instead). Time is that of `from_pretrained`, without imports: the first time in a process, which
imports more of Transformers, and the median of five more.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CLASSES = {
    "wavlm": ("DLDWavLMForCTC", "WavLMForCTC"),
    "conformer": ("DLDWav2Vec2ConformerForCTC", "Wav2Vec2ConformerForCTC"),
}
LOAD = """
import json, statistics, sys, time
import torch
from {module} import {name} as model_class

def load():
    start = time.perf_counter()
    model = model_class.from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
    return model, time.perf_counter() - start

def peak_mb():
    # VmHWM belongs to this program; getrusage would count the parent's memory before exec
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

model, first_s = load()
loaded_mb = peak_mb()
with torch.inference_mode():
    model(torch.zeros(1, 16_000, dtype=model.dtype))
print(json.dumps(dict(
    parameters=model.num_parameters(), loaded_mb=loaded_mb, heard_mb=peak_mb(), first_s=first_s,
    again_s=statistics.median(load()[1] for _ in range(5)),
)))
"""
COLUMNS = {
    "loaded_mb": ("loaded, MB", 0),
    "heard_mb": ("after 1 s of audio, MB", 0),
    "first_s": ("first load, s", 3),
    "again_s": ("more loads, s", 3),
}


def make_checkpoints(folder: Path, model: str, num_active_layers: int) -> None:
    import hf_dld

    model_class = getattr(hf_dld, CLASSES[model][0])
    dynamic = model_class(model_class.config_class(vocab_size=32))
    dynamic.save_pretrained(folder / "dynamic")
    dynamic.to_static(num_active_layers).save_pretrained(folder / "static")


def load_in_a_fresh_process(module: str, name: str, checkpoint: Path, **options: object) -> dict[str, float]:
    code = LOAD.format(module=module, name=name)
    command = [sys.executable, "-c", code, str(checkpoint), json.dumps(options)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CLASSES, default="wavlm", help="base size: 12 layers, 768 wide")
    parser.add_argument("--num_active_layers", type=int, default=3)
    parser.add_argument("--dtype", help="convert the weights while loading, such as bfloat16")
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()

    dynamic_class, stock_class = CLASSES[args.model]
    options = {"dtype": args.dtype} if args.dtype else {}
    depth = {**options, "num_active_layers": args.num_active_layers}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_checkpoints(folder, args.model, args.num_active_layers)
        ways = {
            "static": ("transformers", stock_class, folder / "static", options),
            "pruned": ("hf_dld", dynamic_class, folder / "dynamic", {**depth, "prune_inactive_layers": True}),
            "whole": ("hf_dld", dynamic_class, folder / "dynamic", depth),
        }
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for repetition in range(args.repetitions + 1):
            for way, (module, name, checkpoint, arguments) in ways.items():
                measured = load_in_a_fresh_process(module, name, checkpoint, **arguments)
                if repetition > 0:  # the first one reads from disk what later ones find in memory
                    runs[way].append(measured)
            print(f"{repetition} of {args.repetitions} repetitions", file=sys.stderr)

    def median(way: str, what: str) -> float:
        return statistics.median(run[what] for run in runs[way])

    def cell(way: str, what: str, digits: int) -> str:
        values = [run[what] for run in runs[way]]
        ratio = median(way, what) / median("static", what)
        return f"{median(way, what):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f}) | {ratio:.2f}"

    print(f"{stock_class}, {args.num_active_layers} layers active, {args.repetitions} repetitions\n")
    print("| model | parameters |", " | ratio | ".join(title for title, _ in COLUMNS.values()), "| ratio |")
    print("| --- | ---: |" + " ---: | ---: |" * len(COLUMNS))
    for way in ways:
        cells = " | ".join(cell(way, what, digits) for what, (_, digits) in COLUMNS.items())
        print(f"| {way} | {median(way, 'parameters') / 1e6:.2f} M | {cells} |")


if __name__ == "__main__":
    main()
