"""Which layers to keep for every number of layers, found on development data."""

import json
import math
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..fingerprints import hash_weights
from ..models.depth import check_depth_schedule, check_num_hidden_layers, select_layers
from ..whole_files import write_whole_text
from .error_counts import audio_checksum
from .layer_sets import LayerSetScorer, SearchCost
from .stored import parse, read_json

Beam = list[tuple[float, tuple[int, ...]]]


@dataclass
class DepthSchedule:
    """The layers for every count, and how they were found.

    `layers[k - 1]` are the k layers, ascending 0-based indices, and `scores[k - 1]` is their objective on the
    `utterances` that were used (lower is better).
    """

    layers: list[list[int]]
    scores: list[float]
    objective: str
    beam_size: int
    utterances: int
    seed: int
    cost: SearchCost

    def to_json(self, path: str | Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def from_json(cls, path: str | Path) -> "DepthSchedule":
        """Read what `to_json` wrote.

        Raises:
            ValueError: a file that holds no schedule, or one that no model could use.
        """
        try:
            schedule = parse(read_json(path), cls, "the schedule")
            check_num_hidden_layers(len(schedule.layers))
            check_depth_schedule(schedule.layers, len(schedule.layers))
        except ValueError as error:
            raise ValueError(f"{path} holds no depth schedule: {error}") from None
        return schedule

    def apply_to(self, config: PreTrainedConfig) -> None:
        """Make these the layers that a dynamic model of this configuration uses for a count, saved with it.

        Raises:
            ValueError: a model with another number of layers; nothing is changed then.
        """
        if config.num_hidden_layers != len(self.layers):
            raise ValueError(
                f"This schedule is one for {len(self.layers)} layers, and the encoder has {config.num_hidden_layers}."
            )
        check_depth_schedule(self.layers, config.num_hidden_layers)
        config.depth_schedule, config.layer_selection = [list(layers) for layers in self.layers], "schedule"


def search_depth_schedule(
    model: PreTrainedModel,
    dataset: Any,
    processor: ProcessorMixin,
    objective: str = "ctc",
    *,
    beam_size: int = 1,
    max_utterances: int | None = 1000,
    seed: int = 0,
    batch_size: int = 16,
    cache_gb: float = 2.0,
    resume_file: str | Path | None = None,
) -> DepthSchedule:
    """Find which layers to keep for every count, by leaving out one layer after the other.

    From all N layers down to one, each count keeps the `beam_size` best sets among those that come from the sets kept
    before by leaving out one layer; among equals the one that keeps the lower layers is taken. A `beam_size` of 1 is
    greedy removal: its sets are nested, each a subset of the next larger one. Wider beams need not be nested; they look
    at the evenly spaced layers of each count too, so that on these utterances none is worse than those, and one as wide
    as there are sets is the exhaustive search.

    The cost for each batch: greedy removal scores N(N+1)/2 sets, and, as sets share the states of the layers that they
    begin with, runs N(N+1)(N+2)/6 layers instead of N(N^2+2)/3 (364 instead of 584 for 12 layers: the work of 30
    transcriptions at full depth). A beam costs at most `beam_size` times as much, and the N evenly spaced sets. `"kl"`
    runs N layers more. The feature encoder runs once for each batch that fits into `cache_gb`, else up to N times.
    `cost` holds what was run.

    Args:
        model: a dynamic CTC model, or a `PeftModel` around one; neither its weights nor its configuration change (see
            `DepthSchedule.apply_to`).
        dataset: development data that training has not seen, as `hf_dld.data.prepare_dataset` returns it.
        processor: the model's own.
        objective: `"ctc"` (loss), `"kl"` (to the full depth; needs no transcripts) or `"wer"`, see `LayerSetScorer`.
        beam_size: sets that are kept for each count, at least 1.
        max_utterances: at most so many utterances, drawn by `seed`; None for all.
        seed: of the draw.
        batch_size: utterances in a batch.
        cache_gb: memory for what goes into the first layer, in gigabytes (10^9 bytes) on the model's device.
        resume_file: a small JSON file, written after each count. If it is there, the search goes on from it.

    Raises:
        TypeError: not a dynamic CTC model.
        ValueError: an impossible argument, a dataset in which the objective has nothing to measure, a `resume_file` of
            another search, or scores that are not numbers.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1; got {beam_size!r}.")
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # of a PeftModel: the adapters are in it
    options = {"max_utterances": max_utterances, "seed": seed, "batch_size": batch_size}
    scorer = LayerSetScorer(model, dataset, processor, objective, cache_gb=cache_gb, **options)
    num_layers = len(scorer.full_depth)
    beams: list[Beam] = []
    if resume_file is not None:
        search = {"objective": objective, "beam_size": beam_size, **options}
        search |= {"utterances": _utterances_hash(scorer, processor), "weights": _weights_hash(model)}
        if Path(resume_file).exists():
            beams, scorer.cost = _read_progress(Path(resume_file), search)
    for count in range(num_layers - len(beams), 0, -1):
        parents = [layers for _, layers in beams[-1]] if beams else []
        candidates = {layers[:out] + layers[out + 1 :] for layers in parents for out in range(len(layers))}
        if beam_size > 1 or not candidates:
            candidates.add(select_layers(count, num_layers))
        scores = scorer.score(candidates, f"Layers for {count} of {num_layers}")
        beams.append(sorted((score, layers) for layers, score in scores.items())[:beam_size])
        if math.isinf(beams[-1][0][0]):
            raise ValueError(
                f"With {count} of {num_layers} layers, no set of layers gives a finite {objective}; "
                f"the model computes in {model.dtype}, try float32."
            )
        if resume_file is not None:
            write_json(resume_file, {"search": search, "beams": beams, "cost": asdict(scorer.cost)})
    best = [beam[0] for beam in reversed(beams)]
    return DepthSchedule(
        layers=[list(layers) for _, layers in best],
        scores=[score for score, _ in best],
        objective=objective,
        beam_size=beam_size,
        utterances=len(scorer.indices),
        seed=seed,
        cost=scorer.cost,
    )


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_whole_text(path, json.dumps(content, indent=2) + "\n")


def _read_progress(path: Path, search: dict[str, Any]) -> tuple[list[Beam], SearchCost]:
    try:
        stored = read_json(path)
        earlier = stored["search"]
        beams = [[(score, tuple(layers)) for score, layers in beam] for beam in stored["beams"]]
        cost = SearchCost(**stored["cost"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the file of an interrupted search: remove it.") from error
    different = sorted(name for name in search.keys() | earlier.keys() if search.get(name) != earlier.get(name))
    if different:
        changes = ", ".join(f"{name}: {earlier.get(name)!r} then, {search.get(name)!r} now" for name in different)
        raise ValueError(
            f"{path} belongs to another search ({changes}). Remove it, or repeat that search's settings to continue it."
        )
    return beams, cost


def _utterances_hash(scorer: LayerSetScorer, processor: ProcessorMixin) -> str:
    """Of what the model hears and what was said."""
    content: list[Any] = [processor.feature_extractor.to_dict()]
    for index in scorer.indices:
        example = scorer.dataset[index]
        content.append(
            (index, example["input_length"], list(example["labels"] or []), audio_checksum(example["audio"]))
        )
    return sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]


def _weights_hash(model: PreTrainedModel) -> str:
    digest = sha256()
    hash_weights(digest, model)
    return digest.hexdigest()[:16]
