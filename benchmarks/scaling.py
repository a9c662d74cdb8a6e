"""What DLD costs on machines that nobody here has: time, memory, communication and the posterior cache, by formula.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --peak_tflops 312 --utilisation 0.3 --price_per_hour 1.5 --devices 8 32
    python benchmarks/scaling.py --recipes                                     those of examples/recipes alone

Operations are counted by torch.utils.flop_counter on the meta device, where nothing is computed; parameters likewise.
The rest is arithmetic, which docs/scaling.md writes out with where the assumptions come from. Prints Markdown tables.

With --check the share of this machine's matrix product rate that a real DLD step reaches is measured: the
`utilisation` of a CPU.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import conditions, print_table, time_interleaved
from torch.utils.flop_counter import FlopCounterMode
from training_step import LETTERS, make_examples, take_step

import hf_dld
from hf_dld.models import DYNAMIC_CLASSES

LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "vocab_size": 32,
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "WavLM large": (hf_dld.DLDWavLMForCTC, LARGE),
    "Conformer 600 M": (hf_dld.DLDWav2Vec2ConformerForCTC, {**LARGE, "position_embeddings_type": "rotary"}),
}
RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
RECIPE_HOURS = {"librispeech": 960.9, "tedlium3": 452.0}
RATE_HZ, FRAMES_PER_S = 16_000, 50
TRAINED_BYTES = 16  # of a parameter: float32 weight, gradient, and the two moments of AdamW
CACHE_TOP = 8


@dataclass
class Cost:
    """Operations (2 for a multiply-accumulate) for a second of audio, forward; and parameters."""

    layers: int
    features: float  # the feature encoder
    rest: float  # projection, positions and head
    layer: float  # one encoder layer
    feature_parameters: int
    rest_parameters: int
    layer_parameters: int
    rest_saved: float  # bytes kept for the way back, for a second of audio, in float32
    layer_saved: float

    @property
    def parameters(self) -> int:
        return self.feature_parameters + self.trained_parameters

    @property
    def trained_parameters(self) -> int:
        return self.rest_parameters + self.layers * self.layer_parameters

    def step(self, layers: float, teacher: str = "none", features_trained: bool = False) -> float:
        """A step; backward is twice forward; the teacher is forward. A frozen feature encoder runs once for both."""
        taught = self.rest + self.layers * self.layer if teacher == "live" else 0.0
        features = (3 if features_trained else 1) * self.features
        return features + 3 * (self.rest + layers * self.layer) + taught


def saved_bytes(model: Any, samples: torch.Tensor, layers: list[int]) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, weights left out."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(samples, active_layers=layers)
        return sum(kept[key].untyped_storage().nbytes() for key in kept.keys() - weights)


def count(model_class: Any, options: dict[str, Any], audio_s: float) -> Cost:
    # eager attention: the counter does not see into the fused one
    config = model_class.config_class(**options, attn_implementation="eager", mask_time_prob=0.0)
    with torch.device("meta"):
        model = model_class(config).eval()
        samples = torch.zeros(1, round(audio_s * RATE_HZ))
        with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
            model(samples, active_layers=[0])
        model.train().set_attn_implementation("sdpa")
        model.freeze_feature_encoder()
        saved = [saved_bytes(model, samples, layers) / audio_s for layers in ([1], [1, 2])]
    operations = {name: sum(counts.values()) / audio_s for name, counts in counter.get_flop_counts().items()}

    def of(ending: str) -> float:
        return next(value for name, value in operations.items() if name.endswith(ending))

    features, layer = of(".feature_extractor"), of("encoder.layers.0")
    base = model.base_model
    feature_parameters, layer_parameters = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (base.feature_extractor, base.encoder.layers[1])
    )
    layers = len(base.encoder.layers)
    return Cost(
        layers=layers,
        features=features,
        rest=counter.get_total_flops() / audio_s - features - layer,
        layer=layer,
        feature_parameters=feature_parameters,
        rest_parameters=model.num_parameters() - feature_parameters - layers * layer_parameters,
        layer_parameters=layer_parameters,
        rest_saved=2 * saved[0] - saved[1],
        layer_saved=saved[1] - saved[0],
    )


def mean_draw(layers: int) -> float:
    """Layers of a step on average, with the default draw ("balanced"): k of N with probability ~ 1/k."""
    return layers / sum(1 / count for count in range(1, layers + 1))


def operations_row(name: str, cost: Cost) -> list[str]:
    drawn = mean_draw(cost.layers)
    steps = [cost.step(cost.layers), cost.step(drawn, "live"), cost.step(drawn)]
    counts = [cost.features, cost.rest, cost.layer, *steps]
    return [name, f"{cost.parameters / 1e6:.0f} M", *(f"{count / 1e9:.1f}" for count in counts)]


def time_rows(name: str, cost: Cost, args: argparse.Namespace) -> list[list[str]]:
    rows = []
    for hours, epochs, devices in zip(args.hours, args.epochs, args.devices, strict=True):
        audio_s, drawn = hours * 3600, mean_draw(cost.layers)
        filling = audio_s * (cost.features + cost.rest + cost.layers * cost.layer)
        needed = {
            "full-depth CTC": epochs * audio_s * cost.step(cost.layers),
            "DLD, live teacher": epochs * audio_s * cost.step(drawn, "live"),
            "DLD, cached teacher": filling + epochs * audio_s * cost.step(drawn),
        }
        for what, operations in needed.items():
            device_hours = operations / (args.peak_tflops * 1e12 * args.utilisation) / 3600
            wall = device_hours / devices
            loaded = audio_s * epochs / (wall * 3600)
            rows.append(
                [
                    name,
                    f"{hours:,.0f} h x {epochs:g}",
                    what,
                    f"{operations / 1e18:.2f}",
                    f"{device_hours:,.0f}",
                    f"{devices}",
                    f"{wall:,.1f}",
                    f"{device_hours * args.price_per_hour:,.0f}",
                    f"{loaded:,.0f}",
                ]  # fmt: skip
            )
    return rows


def recipe_tables(args: argparse.Namespace) -> tuple[list[list[str]], list[list[str]]]:
    """Time and memory of each recipe: training the teacher, its posteriors, the student at the default draw."""
    times, memory = [], []
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        # microsoft/wavlm-base-plus has the sizes that are Transformers' defaults
        options = {**recipe.get("model_config", {"model_type": "wavlm"}), "vocab_size": 256}
        model_class = DYNAMIC_CLASSES[options.pop("model_type")]
        options = {name: value for name, value in options.items() if not name.startswith("mask_")}
        cost = count(model_class, options, args.utterance_s)
        trained = not recipe.get("freeze_feature_encoder", False)
        audio_s = 3600 * RECIPE_HOURS[path.stem.partition("_")[0]]
        jobs = {
            "teacher": (recipe["teacher_epochs"], cost.step(cost.layers, features_trained=trained)),
            "its posteriors": (1, cost.features + cost.rest + cost.layers * cost.layer),
            "student": (recipe["num_train_epochs"], cost.step(mean_draw(cost.layers), features_trained=trained)),
        }
        best_h = worst_h = 0.0
        for what, (epochs, operations) in jobs.items():
            heard_s = epochs * audio_s
            computing_h = heard_s * operations / (args.peak_tflops * 1e12 * args.utilisation) / 3600
            loading_h = heard_s / (args.loaded_by_core * args.workers) / 3600
            best_h += max(computing_h, loading_h)
            worst_h += max(4 * computing_h, loading_h)
            counts = [f"{epochs}", f"{operations / 1e9:.1f}", f"{heard_s * operations / 1e18:.2f}"]
            times.append([path.stem, what, *counts, f"{computing_h:.1f}", f"{4 * computing_h:.1f}", f"{loading_h:.1f}"])
        prices = [f"{hours:.0f} h, {hours * args.price_per_hour:.0f} $" for hours in (best_h, worst_h)]
        times.append([path.stem, "all", "", "", "", *prices, ""])
        memory.append(recipe_memory_row(path.stem, cost, model_class, options, recipe["max_batch_seconds"], trained))
    return times, memory


def recipe_memory_row(
    name: str, cost: Cost, model_class: Any, options: dict, batch_s: float, trained: bool
) -> list[str]:
    with torch.device("meta"):
        model = model_class(model_class.config_class(**options, mask_time_prob=0.0)).train()
        samples = torch.zeros(1, 15 * RATE_HZ)
        if not trained:
            model.freeze_feature_encoder()
        saved = saved_bytes(model, samples, list(range(cost.layers))) / 15
    weights = TRAINED_BYTES * (cost.parameters if trained else cost.trained_parameters)
    sizes = [f"{weights / 1e9:.1f}", f"{saved / 1e6:.0f}", f"{batch_s:g}", f"{(weights + saved * batch_s) / 1e9:.0f}"]
    return [name, f"{cost.parameters / 1e6:.0f} M", *sizes]


def memory_row(name: str, cost: Cost, devices: int) -> list[str]:
    teacher, whole = 4 * cost.parameters, TRAINED_BYTES * cost.trained_parameters + 4 * cost.feature_parameters
    layer = 4 * cost.layer_parameters  # the one or two that are gathered at a time, beside the parts
    sizes = [whole, whole + teacher, (whole - 4 * cost.feature_parameters) / devices + 2 * layer + teacher]
    saved = [(cost.rest_saved + layers * cost.layer_saved) for layers in (cost.layers, cost.layers / 2)]
    return [name, *(f"{size / 1e9:.1f}" for size in sizes), *(f"{size / 1e6:.0f}" for size in saved)]


def communication_row(name: str, cost: Cost, devices: int) -> list[str]:
    share, half = (devices - 1) / devices, cost.layers / 2
    all_reduce = 2 * share * 4 * cost.trained_parameters
    layers = {"all": cost.layers, "half": half}
    # a layer is gathered on the way there and back, what is not a layer once; gradients are scattered
    gathered = {
        which: share * 4 * (2 * cost.rest_parameters + 3 * count * cost.layer_parameters)
        for which, count in layers.items()
    }
    return [name, *(f"{size / 1e9:.2f}" for size in (all_reduce, gathered["all"], gathered["half"]))]


def check(seconds: float, rounds: int) -> None:
    """The share of this machine's matrix product rate that DLD steps of WavLM base with 6 of 12 layers reach."""
    torch.set_num_threads(1)
    cost = count(hf_dld.DLDWavLMForCTC, {"vocab_size": 32}, seconds)
    config = hf_dld.DLDWavLMConfig(vocab_size=32, mask_time_prob=0.0)
    student, teacher = hf_dld.DLDWavLMForCTC(config), hf_dld.DLDWavLMForCTC(config)
    student.freeze_feature_encoder()
    teacher.load_state_dict(student.state_dict())  # equal feature encoders are run once
    collator = hf_dld.DataCollatorCTC(hf_dld.build_character_processor([LETTERS]))
    examples = make_examples(1, seconds, RATE_HZ)
    with tempfile.TemporaryDirectory() as folder:
        trainer = hf_dld.DLDTrainer(
            model=student,
            teacher=teacher,
            args=hf_dld.DLDTrainingArguments(folder, use_cpu=True, disable_tqdm=True),
            data_collator=collator,
            train_dataset=examples,
        )
        trainer.draw_layers = lambda: [tuple(range(0, 12, 2))]
        optimizer, inputs = torch.optim.AdamW(student.parameters(), lr=1e-5), collator(examples)
        factor = torch.randn(1024, 1024)
        timed = time_interleaved(
            {"step": lambda: take_step(trainer, optimizer, inputs, 0, 1.0), "product": lambda: factor @ factor},
            rounds,
            clock=time.process_time,  # one thread: what else the machine does lengthens this less
        )
    rate = 2 * 1024**3 / statistics.median(timed["product"])
    step = cost.step(6, "live") * seconds / statistics.median(timed["step"])
    print(f"{conditions()}\n")
    print(
        f"matrix product {rate / 1e9:.0f} GFLOP/s, DLD step of {seconds:g} s {step / 1e9:.0f}: {step / rate:.2f} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, nargs="+", default=[960, 100_000], help="of speech in the corpora")
    parser.add_argument("--epochs", type=float, nargs="+", default=[20, 1], help="over each of them")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64], help="accelerators for each of them")
    parser.add_argument("--utterance_s", type=float, default=15.0, help="seconds of audio in an utterance")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="bfloat16 operations a second of a device")
    parser.add_argument("--utilisation", type=float, default=0.2, help="the part of the peak that a step reaches")
    parser.add_argument("--price_per_hour", type=float, default=3.0, help="of a device, in dollars")
    parser.add_argument("--recipes", action="store_true", help="the recipes of examples/recipes instead")
    parser.add_argument("--loaded_by_core", type=float, default=1193.0, help="audio seconds a core second, FLAC")
    parser.add_argument("--workers", type=float, default=8, help="cores that load for a device, for --recipes")
    parser.add_argument("--check", action="store_true", help="measure a step on this machine instead")
    parser.add_argument("--rounds", type=int, default=5, help="for --check")
    args = parser.parse_args()
    if args.check:
        check(args.utterance_s, args.rounds)
        return

    if args.recipes:
        times, memory = recipe_tables(args)
        rates = [f"hours at {share:g} of the peak" for share in (args.utilisation, args.utilisation / 4)]
        header = ["recipe", "job", "epochs", "10^9 operations a second of audio", "10^18 operations", *rates]
        print_table([*header, f"hours of loading, {args.workers:g} cores"], times)
        header = ["recipe", "parameters", "GB", "MB a second of audio", "seconds in a batch", "GB in all (float32)"]
        print_table(header, memory)
        return

    costs = {name: count(*model, args.utterance_s) for name, model in MODELS.items()}
    print(f"Billions of operations for a second of audio, in utterances of {args.utterance_s:g} s:\n")
    header = ["model", "parameters", "feature encoder", "rest", "a layer"]
    steps = ["full-depth CTC step", "DLD step, live teacher", "DLD step, cached teacher"]
    print_table([*header, *steps], (operations_row(*item) for item in costs.items()))
    print(f"Training at {args.utilisation:g} of {args.peak_tflops:g} TFLOP/s, {args.price_per_hour:g} $ an hour:\n")
    header = ["model", "corpus", "job", "10^18 operations", "device hours", "devices", "hours", "$"]
    rows = (row for item in costs.items() for row in time_rows(*item, args))
    print_table([*header, "audio seconds a second, all devices"], rows)
    devices = args.devices[0]
    print(f"Gigabytes on each of {devices} devices, and what a second of audio adds (all in float32):\n")
    header = ["model", "DDP, cached teacher", "DDP, live teacher", "sharded, live teacher"]
    header += ["MB a second of audio for the way back, all layers", "half of them"]
    print_table(header, (memory_row(*item, devices) for item in costs.items()))
    print(f"Gigabytes sent by each of {devices} devices in a step, in float32:\n")
    header = ["model", "DDP", "sharded, all layers", "sharded, half of the layers"]
    print_table(header, (communication_row(*item, devices) for item in costs.items()))
    an_hour = 3600 * FRAMES_PER_S * (2 * (CACHE_TOP + 1) + 2 * CACHE_TOP)
    sizes = ", ".join(f"{hours:,.0f} h: {hours * an_hour / 1e9:,.0f} GB" for hours in args.hours)
    print(f"The posterior cache, {CACHE_TOP} tokens of a frame in float16: {sizes}")


if __name__ == "__main__":
    main()
