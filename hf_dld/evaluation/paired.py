"""Is one model better than another at a depth, on the same utterances? A paired bootstrap."""

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .depth_report import DepthReport
from .intervals import CONFIDENCE, RESAMPLES, bootstrap_interval, resampled_totals


@dataclass
class PairedDifference:
    """WER of the second report minus that of the first at one depth, as a fraction: below 0 the second is better.

    `interval` is its 95 % bootstrap interval over utterances. `p_value` is twice the smaller share of the resamples on
    one side of 0, never below 1 / resamples.
    """

    num_active_layers: int
    wer: tuple[float, float]
    difference: float
    interval: list[float]
    p_value: float

    @property
    def verdict(self) -> str:
        if self.interval[0] <= 0 <= self.interval[1]:
            return "no clear difference"
        return "better" if self.difference < 0 else "worse"


def paired_differences(first: str | Path, second: str | Path, seed: int = 0) -> list[PairedDifference]:
    """Compare two reports, given as JSON files, at every depth that both have.

    Both models must have been evaluated on the same utterances, and the errors of each utterance must lie beside the
    JSON (`evaluate_depths(errors_path=...)`): resampling the utterances of both at once leaves out what makes
    utterances hard, which the two models' own intervals contain.

    Raises:
        ValueError: a report without errors of each utterance, other utterances, or no depth in common.
    """
    reports = [DepthReport.from_json(path) for path in (first, second)]
    depths = sorted({row.num_active_layers for row in reports[0].rows} & {r.num_active_layers for r in reports[1].rows})
    errors, other = (_load_errors(path, report, depths) for path, report in zip((first, second), reports, strict=True))
    if not np.array_equal(errors["text"], other["text"]):
        raise ValueError(
            f"{first} and {second} are not about the same utterances in the same order ({len(errors['text'])} and "
            f"{len(other['text'])}): their errors cannot be compared one by one"
        )
    if not depths:
        raise ValueError(f"{first} and {second} have no depth in common")
    differences = []
    for depth in depths:
        draws = [max(1, len(report.row(depth).draws)) for report in reports]
        name = f"word_errors_{depth}"
        counts = np.stack([errors[name], other[name], errors["words"]], axis=1).astype(np.int64)
        differences.append(_difference(depth, counts, draws, seed))
    return differences


def _load_errors(path: str | Path, report: DepthReport, depths: Sequence[int]) -> dict[str, np.ndarray]:
    """The checksums of the references, their words, and the word errors at each depth, a number for each utterance."""
    if report.errors_file is None:
        raise ValueError(f"{path} has no errors of each utterance: evaluate again with errors_path")
    file = Path(path).parent / report.errors_file
    if file.name != report.errors_file:
        raise ValueError(f"{path} says that its errors are in {report.errors_file!r}: they must be in a file beside it")
    if not file.is_file():
        raise ValueError(f"{file} is missing, which holds the errors of each utterance of {path}")
    names = ("text", "words", *(f"word_errors_{depth}" for depth in depths))
    try:
        with zipfile.ZipFile(file) as archive:
            # a few bytes may unpack to any number: 8 for each utterance, and a header, are the most there can be
            largest = max(archive.getinfo(f"{name}.npy").file_size for name in names)
        if largest > 8 * report.utterances + 4096:
            raise ValueError(f"{largest:,} bytes for {report.utterances:,} utterances")
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in names}
        for name, array in arrays.items():
            if array.shape != (report.utterances,) or array.dtype.kind not in "iu":
                raise ValueError(f"{name} is {array.dtype} {array.shape} for {report.utterances:,} utterances")
        for depth in depths:
            row, errors = report.row(depth), arrays[f"word_errors_{depth}"].sum(dtype=np.int64)
            wer = errors / max(1, len(row.draws)) / max(1, arrays["words"].sum(dtype=np.int64))
            if not math.isclose(wer, row.wer, rel_tol=1e-6, abs_tol=1e-9):
                raise ValueError(
                    f"with {depth} layers they come to a WER of {wer:.2%}, and the report says {row.wer:.2%}"
                )
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} does not hold the errors of each utterance of {path}: {error}") from None
    return arrays


def _difference(depth: int, counts: np.ndarray, draws: Sequence[int], seed: int) -> PairedDifference:
    def difference(totals: np.ndarray) -> np.ndarray:
        return (totals[..., 1] / draws[1] - totals[..., 0] / draws[0]) / np.maximum(totals[..., 2], 1)

    totals = counts.sum(axis=0)
    sampled = difference(resampled_totals(counts, seed=seed))
    one_sided = min((sampled <= 0).mean(), (sampled >= 0).mean())
    return PairedDifference(
        num_active_layers=depth,
        wer=tuple(float(totals[i] / draws[i] / max(totals[2], 1)) for i in range(2)),
        difference=float(difference(totals)),
        interval=bootstrap_interval(counts, difference, seed=seed),
        p_value=float(min(1.0, max(2 * one_sided, 1 / RESAMPLES))),
    )


def paired_markdown(differences: Sequence[PairedDifference], first: str, second: str) -> str:
    """A Markdown table of the differences; `first` and `second` are what the models are called."""
    lines = [
        f"| active layers | {first}: WER | {second}: WER | difference ({CONFIDENCE:.0%} interval) | p | {second} is |",
        "| ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in differences:
        low, high = (100 * end for end in row.interval)
        lines.append(
            f"| {row.num_active_layers} | {row.wer[0]:.1%} | {row.wer[1]:.1%} | {100 * row.difference:+.1f} points "
            f"({low:+.1f} to {high:+.1f}) | {row.p_value:.3f} | {row.verdict} |"
        )
    return "\n".join(lines) + "\n"
