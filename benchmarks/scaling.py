"""What DLD costs on machines that nobody here has: time, memory, communication and the posterior cache, by formula.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --devices 8 --peak_tflops 989 --utilisation 0.4 --price_per_hour 3

Operations are counted by torch.utils.flop_counter on the meta device, where nothing is computed; parameters likewise.
All else is arithmetic on them that docs/scaling.md writes out, with where the assumptions come from. Prints Markdown.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from measure import print_table
from torch.utils.flop_counter import FlopCounterMode

from hf_dld import DLDWav2Vec2ConformerForCTC, DLDWavLMForCTC

LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "vocab_size": 32,
    "attn_implementation": "eager",  # the counter does not see into fused attention
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "WavLM large": (DLDWavLMForCTC, LARGE),
    "Conformer 600 M": (DLDWav2Vec2ConformerForCTC, {**LARGE, "position_embeddings_type": "rotary"}),
}
RATE_HZ, FRAMES_PER_S = 16_000, 50
MASTER_BYTES = 16  # a float32 weight, its gradient and two moments of AdamW
CACHE_TOP = 8


@dataclass
class Costs:
    """Operations for a second of audio, and parameters."""

    layers: int
    features: float  # the feature encoder, forward
    rest: float  # projection, positions and head, forward
    layer: float  # one encoder layer, forward
    rest_parameters: int  # features and rest
    layer_parameters: int

    @property
    def parameters(self) -> int:
        return self.rest_parameters + self.layers * self.layer_parameters

    def forward(self, layers: float) -> float:
        return self.rest + layers * self.layer

    def step(self, student_layers: float, teacher: str) -> float:
        """A step: the frozen feature encoder once, the student forward and (twice that) back, the teacher forward."""
        taught = self.forward(self.layers) if teacher == "live" else 0.0
        return self.features + 3 * self.forward(student_layers) + taught


def count(model_class: Any, options: dict[str, Any], audio_s: float) -> Costs:
    with torch.device("meta"):
        model = model_class(model_class.config_class(**options)).eval()
        samples = torch.zeros(1, round(audio_s * RATE_HZ))
        with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
            model(samples, active_layers=[0])
    by_module = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}

    def operations_of(ending: str) -> float:
        return next(count for name, count in by_module.items() if name.endswith(ending)) / audio_s

    features, layer = operations_of(".feature_extractor"), operations_of("encoder.layers.0")
    encoder_layers = model.base_model.encoder.layers
    layer_parameters = sum(parameter.numel() for parameter in encoder_layers[1].parameters())
    return Costs(
        layers=len(encoder_layers),
        features=features,
        rest=counter.get_total_flops() / audio_s - features - layer,
        layer=layer,
        rest_parameters=model.num_parameters() - len(encoder_layers) * layer_parameters,
        layer_parameters=layer_parameters,
    )


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, nargs="+", default=[960, 100_000], help="of speech in the corpora")
    parser.add_argument("--epochs", type=float, nargs="+", default=[20, 1], help="over each of them")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64], help="accelerators for each of them")
    parser.add_argument("--utterance_s", type=float, default=15.0, help="seconds of audio in an utterance")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="bfloat16 operations a second of a device")
    parser.add_argument("--utilisation", type=float, default=0.2, help="the part of the peak that a step reaches")
    parser.add_argument("--price_per_hour", type=float, default=3.0, help="of a device, in dollars")
    args = parser.parse_args()

    costs = {name: count(*model, args.utterance_s) for name, model in MODELS.items()}
    rows = [
        [
            name,
            f"{cost.parameters / 1e6:.0f} M",
            f"{cost.layer_parameters / 1e6:.1f} M",
            *(f"{flops / 1e9:.2f}" for flops in (cost.features, cost.rest, cost.layer, cost.forward(cost.layers))),
            *(f"{cost.step(layers, teacher) / 1e9:.0f}" for layers, teacher in STEPS(cost)),
        ]
        for name, cost in costs.items()
    ]
    print(f"Operations for a second of audio, in billions; utterances of {args.utterance_s:g} s.\n")
    header = ["model", "parameters", "a layer's", "feature encoder", "rest", "a layer", "rest and all layers"]
    print_table([*header, "full-depth CTC step", "DLD step, live teacher", "DLD step, cached"], rows)


def STEPS(cost: Costs):
    half = cost.layers / 2
    return [(cost.layers, "none"), (half, "live"), (half, "cached")]


if __name__ == "__main__":
    main()
