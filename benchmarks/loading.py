"""What does loading a few layers cost? Time and memory of pruned loading against a static model of the same layers.

    python benchmarks/loading.py
    python benchmarks/loading.py --model conformer --num_active_layers 6

Makes a base-size checkpoint with random weights and its static export, and loads them by turns, each time in a fresh
process: the static one with the stock class and with the dynamic class; the dynamic one pruned, and whole. Prints a
Markdown table of medians over the rounds, and of their ratios to the static model in the stock class: median, and
quartiles, of the ratios in each round. Linux only.

Memory is the peak of the process, imports included: when the model is loaded, and when it has heard a second of audio,
because float32 weights on a CPU are mapped from the file and only take memory when they are first used (give --dtype to
have them converted instead). Time is that of `from_pretrained`, without imports: the first time in a process, which
imports more of Transformers, and the median of five more. Stock WavLM also draws random numbers in each load, for the
parametrized weight of its position convolution, that are then not used; the dynamic class does not.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import conditions, print_table, ratio

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
MEASURED = {
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
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()

    dynamic_class, stock_class = CLASSES[args.model]
    options = {"dtype": args.dtype} if args.dtype else {}
    depth = {**options, "num_active_layers": args.num_active_layers}
    with tempfile.TemporaryDirectory() as folder:
        static, dynamic = Path(folder) / "static", Path(folder) / "dynamic"
        make_checkpoints(Path(folder), args.model, args.num_active_layers)
        ways = {
            "static": ("transformers", stock_class, static, options),
            "static, dynamic class": ("hf_dld", dynamic_class, static, options),
            "pruned": ("hf_dld", dynamic_class, dynamic, {**depth, "prune_inactive_layers": True}),
            "whole": ("hf_dld", dynamic_class, dynamic, depth),
        }
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for number in range(args.rounds + 1):
            for way, (module, name, checkpoint, arguments) in ways.items():
                measured = load_in_a_fresh_process(module, name, checkpoint, **arguments)
                if number > 0:  # the first round reads from disk what later ones find in memory
                    runs[way].append(measured)
            print(f"{number} of {args.rounds} rounds", file=sys.stderr)

    print(f"{stock_class}, {args.num_active_layers} layers active, {args.rounds} rounds.")
    print(f"{conditions(args.dtype or 'float32')}\n")
    header = ["model", "parameters"]
    for title, _ in MEASURED.values():
        header += [title, "ratio"]
    rows = []
    for way in ways:
        row = [way, f"{runs[way][0]['parameters'] / 1e6:.2f} M"]
        for what, (_, digits) in MEASURED.items():
            values = {way: [run[what] for run in runs[way]] for way in ways}
            row += [f"{statistics.median(values[way]):.{digits}f}", ratio(values, way, "static")]
        rows.append(row)
    print_table(header, rows)


if __name__ == "__main__":
    main()
