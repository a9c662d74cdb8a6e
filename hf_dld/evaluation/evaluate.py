"""Evaluate a dynamic model at every depth."""

import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..models.depth import LAYER_SELECTIONS, check_num_active_layers, select_layers
from ..models.modeling_dld import check_dynamic
from ..whole_files import only_user_of
from .batches import batch_policy
from .cost import (
    COST_POLICY,
    count_gmac_per_s,
    count_parameters,
    describe_conditions,
    measure_latency,
    measure_memory_mb,
    noise_batch,
)
from .depth_report import DepthDraw, DepthReport, DepthRow
from .error_counts import ErrorCounts, count_at_depths, evaluation_key, join_counts, save_errors
from .intervals import CONFIDENCE, bootstrap_interval, error_rate

COST_AUDIO_S = 10.0


def evaluate_depths(
    model: PreTrainedModel,
    dataset: Any,
    processor: ProcessorMixin,
    depths: Sequence[int] | None = None,
    *,
    selection: str | None = None,
    draws: int = 5,
    seed: int = 0,
    name: str = "model",
    batch_size: int = 16,
    timed_utterances: int = 50,
    cache_dir: str | Path | None = None,
    errors_path: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> DepthReport:
    """Transcribe a dataset at every depth by greedy CTC decoding, count the errors, and measure what each depth costs.

    Memory does not grow with the dataset, but for about 50 bytes an utterance when the rates are computed: counts of
    errors lie in files, 20 bytes for an utterance and 8 for each set of layers.

    Args:
        model: a dynamic model, or a `PeftModel` around one; left at the depth and in the mode that it came in.
        dataset: as `hf_dld.data.prepare_dataset` returns it, streaming or not.
        processor: the model's own.
        depths: numbers of active layers, 1 to the model's layers; when None, all of them that were not pruned.
        selection: how a count becomes layers: `"even"`, `"first"` or `"schedule"`; the model's own when None.
            `"random"`: rates are means over random subsets of layers.
        draws: distinct random subsets for a depth, fewer where there are not so many.
        seed: of the random subsets and of the bootstrap.
        name: what tables and figures call the model.
        batch_size: utterances in a batch; they are sorted by length, so that little is padding.
        timed_utterances: how many forward passes of one utterance are timed at each depth, on noise of lengths spread
            over those of the dataset. 0: neither time nor memory is measured.
        cache_dir: where the counts of an interrupted evaluation are kept, so that the next call goes on with them.
            They are used again only for the same weights, settings, batches and dataset; more depths add to them.
        errors_path: an .npz file to write with the errors of each utterance, for `paired_differences`.
        accelerator: its processes share the utterances: all of them have to call this, each with the whole model, and
            all get the same report. The batches are those of a single process, and so are the error rates, exactly.
            Costs are those of the main process, while the others wait.

    Raises:
        TypeError: for a model that is no dynamic one with a CTC head.
        ValueError: for an impossible argument, before anything is computed; for a dataset without a reference word; and
            for a streaming dataset whose utterances are not those that `cache_dir` has counted.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # of a PeftModel: the adapters are in it
    check_dynamic(model)
    selection = selection or model.config.layer_selection
    if depths is None and selection in LAYER_SELECTIONS:
        depths = model.config.present_depths(selection) or None  # if none is left, the first one's error says so
    elif depths is None:
        depths = range(1, len(model.config.present_layers) + 1)
    depths = _check_depths(depths, model.config.num_hidden_layers)
    for argument, value, least in (
        ("draws", draws, 1),
        ("batch_size", batch_size, 1),
        ("timed_utterances", timed_utterances, 0),
    ):
        if value < least:
            raise ValueError(f"{argument}={value!r} must be at least {least}")
    if isinstance(dataset, datasets.Dataset):  # others cannot be looked at beforehand
        if not any(labels is not None and len(labels) for labels in dataset["labels"]):
            raise _nothing_to_compare(len(dataset))
    layer_sets = {depth: choose_layer_sets(model.config, depth, selection, draws, seed) for depth in depths}
    was_training = model.training
    model.eval()
    try:
        if cache_dir is None:
            place = tempfile.TemporaryDirectory(prefix="hf_dld-")
        else:
            place = nullcontext(Path(cache_dir) / evaluation_key(model, dataset, processor, batch_size))
        with place as folder, tempfile.TemporaryDirectory(prefix="hf_dld-") as joined:
            counts = _count(model, dataset, processor, layer_sets, batch_size, Path(folder), Path(joined), accelerator)
            report = None
            if accelerator is None or accelerator.is_main_process:
                report = _rates(model, counts, layer_sets, seed)
                if errors_path is not None:
                    save_errors(errors_path, counts, layer_sets)
                    report.errors_file = Path(errors_path).name
                lengths = counts.utterances.read()["input_length"].copy()
        if report is not None:
            report.name, report.layer_selection = name, selection
            report.batch_policy = batch_policy(dataset, batch_size)
            report.audio_s = float(lengths.sum(dtype=np.int64) / processor.feature_extractor.sampling_rate)
            _add_costs(report, model, processor, layer_sets, lengths, timed_utterances)
    finally:
        model.train(was_training)
    return report if accelerator is None else broadcast_object_list([report])[0]


def _count(
    model: PreTrainedModel,
    dataset: Any,
    processor: ProcessorMixin,
    layer_sets: Mapping[int, list[tuple[int, ...]]],
    batch_size: int,
    folder: Path,
    joined: Path,
    accelerator: Accelerator | None,
) -> ErrorCounts:
    """The counts of all utterances, kept in `folder`; in `joined` where several processes share the work."""
    sets = {layers for sets in layer_sets.values() for layers in sets}
    rank, num_processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    if num_processes > 1:
        folder = folder / f"part-{rank}-of-{num_processes}"
    # two evaluations would append to the same files
    with only_user_of(folder, f"another process is evaluating this model on this dataset, in {folder}"):
        counts = ErrorCounts(folder, sorted(sets))  # in an order that all processes agree on
        count_at_depths(model, dataset, processor, counts, batch_size, rank, num_processes)
    return counts if num_processes == 1 else join_counts(counts, joined, batch_size)


def choose_layer_sets(
    config: PreTrainedConfig, num_active_layers: int, selection: str, draws: int, seed: int
) -> list[tuple[int, ...]]:
    """The layers that a depth is evaluated with: one set, or for `"random"` up to `draws` distinct ones."""
    total, present = config.num_hidden_layers, config.present_layers
    if selection == "random":
        if num_active_layers > len(present):
            raise ValueError(
                f"{num_active_layers} layers cannot be drawn from the {len(present)} (layers "
                f"{', '.join(map(str, present))}) that were not pruned."
            )
        generator = random.Random(f"{seed}-{num_active_layers}")
        chosen: set[tuple[int, ...]] = set()
        while len(chosen) < min(draws, math.comb(len(present), num_active_layers)):
            chosen.add(tuple(sorted(generator.sample(present, num_active_layers))))
        return sorted(chosen)
    if selection not in LAYER_SELECTIONS:
        raise ValueError(f"selection must be one of {(*LAYER_SELECTIONS, 'random')}; got {selection!r}.")
    layers = select_layers(num_active_layers, total, selection, config.depth_schedule)
    return [config.resolve_active_layers(layers)]  # refuses layers that were pruned


def _check_depths(depths: Sequence[int] | None, num_layers: int) -> list[int]:
    depths = range(1, num_layers + 1) if depths is None else depths
    checked = sorted({check_num_active_layers(depth, num_layers) for depth in depths})
    if not checked:
        raise ValueError("depths is empty: give at least one number of active layers, or None for all")
    return checked


def _nothing_to_compare(references: int) -> ValueError:
    return ValueError(f"no word in any of the {references} references: there is nothing to compare with")


def _rates(
    model: PreTrainedModel, counts: ErrorCounts, layer_sets: Mapping[int, list[tuple[int, ...]]], seed: int
) -> DepthReport:
    words, characters = (int(counts.utterances.read()[unit].sum(dtype=np.int64)) for unit in ("words", "characters"))
    if not words:
        raise _nothing_to_compare(counts.done)
    report = DepthReport("", "", counts.done, words, "", characters=characters, confidence=CONFIDENCE)
    for depth, sets in layer_sets.items():
        rates, intervals = {}, {}
        for unit in ("word", "character"):
            pairs = counts.pairs(sets, unit)
            rates[unit] = float(error_rate(pairs.sum(axis=0)))
            intervals[unit] = bootstrap_interval(pairs, error_rate, seed=seed)
        row = DepthRow(
            num_active_layers=depth,
            active_layers=[] if len(sets) > 1 else list(sets[0]),
            parameters=count_parameters(model, sets[0]),
            wer=rates["word"],
            cer=rates["character"],
            wer_interval=intervals["word"],
            cer_interval=intervals["character"],
        )
        if len(sets) > 1:
            row.draws = [_draw(counts, layers) for layers in sets]
        report.rows.append(row)
    return report


def _draw(counts: ErrorCounts, layers: tuple[int, ...]) -> DepthDraw:
    wer, cer = (float(error_rate(counts.pairs([layers], unit).sum(axis=0))) for unit in ("word", "character"))
    return DepthDraw(list(layers), wer, cer)


def _add_costs(
    report: DepthReport,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    layer_sets: Mapping[int, list[tuple[int, ...]]],
    lengths: np.ndarray,
    timed_utterances: int,
) -> None:
    """MACs always; latency and memory, with what they were measured on, unless `timed_utterances` is 0."""
    rate_hz = processor.feature_extractor.sampling_rate
    report.cost_audio_s = COST_AUDIO_S
    for row, gmac in zip(report.rows, count_gmac_per_s(model, list(layer_sets), COST_AUDIO_S, rate_hz), strict=True):
        row.gmac_per_s = gmac
    if not timed_utterances:
        return
    report.conditions = describe_conditions(model)
    report.cost_policy = f"{timed_utterances} forward passes at each depth; {COST_POLICY}"
    some = np.quantile(lengths, (np.arange(timed_utterances) + 0.5) / timed_utterances, method="nearest")
    some_layers = [sets[0] for sets in layer_sets.values()]  # all sets of a depth cost the same
    seconds = measure_latency(model, processor, [int(length) for length in some], some_layers)
    batch = noise_batch(model, processor, round(COST_AUDIO_S * rate_hz))
    for row, times, layers in zip(report.rows, seconds.T, some_layers, strict=True):
        row.rtf = float(times.sum() / (some.sum() / rate_hz))
        row.latency_p50_s, row.latency_p90_s, row.latency_p99_s = map(float, np.quantile(times, [0.5, 0.9, 0.99]))
        row.memory_mb = measure_memory_mb(model, batch, layers)
