"""What each depth gives, as data, JSON, CSV and Markdown: error rates, size, time and memory at each depth."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..whole_files import whole_file, write_whole_text
from .stored import parse, read_json


@dataclass
class DepthDraw:
    """One random subset of layers and its rates, which are fractions."""

    active_layers: list[int]
    wer: float
    cer: float


@dataclass
class DepthRow:
    """One depth. Rates are fractions (0.1 is 10 %); None stands for what was not measured.

    Args:
        num_active_layers: how many layers ran.
        active_layers: which ones; empty for random subsets, which are in `draws`.
        parameters: those of a static model of these layers.
        wer, cer: word and character error rate; for random subsets their means over the draws.
        wer_interval, cer_interval: low and high end of a bootstrap confidence interval over utterances.
        gmac_per_s: billions of multiply-accumulates for a second of audio, in an utterance of `report.cost_audio_s`.
        rtf: real-time factor, seconds of computing for a second of audio.
        latency_p50_s, latency_p90_s, latency_p99_s: percentiles of the seconds that one utterance takes.
        memory_mb: peak memory of the model in megabytes (10^6 bytes), see `report.cost_policy`.
        draws: the random subsets.
    """

    num_active_layers: int
    active_layers: list[int]
    parameters: int
    wer: float
    cer: float
    wer_interval: list[float] | None = None
    cer_interval: list[float] | None = None
    gmac_per_s: float | None = None
    rtf: float | None = None
    latency_p50_s: float | None = None
    latency_p90_s: float | None = None
    latency_p99_s: float | None = None
    memory_mb: float | None = None
    draws: list[DepthDraw] = field(default_factory=list)

    @property
    def wer_deviation(self) -> float | None:
        """Standard deviation of the WER over random subsets; None unless there are two."""
        return float(np.std([draw.wer for draw in self.draws], ddof=1)) if len(self.draws) > 1 else None


@dataclass
class DepthReport:
    """Error rates and costs at every depth, with what they depend on.

    Args:
        name: what tables and figures call the model.
        layer_selection: `"even"`, `"first"`, `"schedule"` or `"random"`.
        utterances, words, characters, audio_s: the size of the dataset.
        dataset, dataset_config, split: what whoever evaluated calls it; None where it was not said.
        batch_policy: how utterances were batched for the error rates.
        confidence: of the intervals.
        conditions: device, threads, dtype, attention and versions.
        cost_audio_s: seconds of audio for which MACs and memory were taken; attention is quadratic in it.
        cost_policy: what latency and memory mean.
        errors_file: the file beside the JSON with the errors of each utterance, for `paired_differences`.
    """

    name: str
    layer_selection: str
    utterances: int
    words: int
    batch_policy: str
    rows: list[DepthRow] = field(default_factory=list)
    characters: int | None = None
    audio_s: float | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    confidence: float | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    cost_audio_s: float | None = None
    cost_policy: str | None = None
    errors_file: str | None = None

    def to_json(self, path: str | Path) -> None:
        write_whole_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> "DepthReport":
        """Read what `to_json` of this or an earlier version wrote; a file that holds no report is a ValueError."""
        try:
            return parse(read_json(path), cls, "the report")
        except ValueError as error:
            raise ValueError(f"{path} holds no depth report: {error}") from None

    def to_csv(self, path: str | Path) -> None:
        """A line for each depth; intervals take two columns, lists of layers are joined by blanks."""
        lines = [_csv_line(row) for row in self.rows]
        with whole_file(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["name", "layer_selection", *_csv_line(DepthRow(1, [], 0, 0.0, 0.0))])
            writer.writeheader()
            writer.writerows({"name": self.name, "layer_selection": self.layer_selection, **line} for line in lines)

    def to_markdown(self) -> str:
        """A table with a line for each depth and only the columns that were measured, and under it the conditions."""
        columns = {title: cells for title, cell in _COLUMNS.items() if any(cells := [cell(row) for row in self.rows])}
        lines = [list(columns), ["---:"] * len(columns), *map(list, zip(*columns.values(), strict=True))]
        return _table(lines) + "\n" + "".join(f"- {note}\n" for note in self.notes())

    def notes(self) -> list[str]:
        """What the figures depend on, a sentence each."""
        size = f"{self.utterances} utterances, {self.words} words"
        notes = [size if self.audio_s is None else f"{size}, {self.audio_s / 3600:.2f} h", self.batch_policy]
        if any(row.draws for row in self.rows):
            draws = max(len(row.draws) for row in self.rows)
            notes.append(f"random layers: mean and standard deviation over up to {draws} distinct subsets")
        else:
            notes.append(f"layers: {self.layer_selection!r} selection")
        if self.confidence is not None:
            notes.append(f"in brackets: {self.confidence:.0%} intervals, bootstrap over utterances")
        if self.cost_audio_s is not None:
            notes.append(f"GMAC: for 1 s of audio within an utterance of {self.cost_audio_s:g} s")
        if self.cost_policy is not None:
            notes.append(self.cost_policy)
        if self.conditions:
            notes.append(", ".join(f"{name}: {value}" for name, value in self.conditions.items()))
        return notes

    def is_of_the_dataset_of(self, other: "DepthReport") -> bool:
        """Whether both were measured on the same speech, as far as they say."""
        facts = ["utterances", "words", "characters"]
        if None not in (self.dataset, other.dataset):
            facts += ["dataset", "dataset_config", "split"]
        return all(getattr(self, fact) == getattr(other, fact) for fact in facts)

    def row(self, num_active_layers: int) -> DepthRow:
        """The row of a depth; `ValueError` where the report has none."""
        for row in self.rows:
            if row.num_active_layers == num_active_layers:
                return row
        depths = [row.num_active_layers for row in self.rows]
        raise ValueError(f"the report {self.name!r} has no depth {num_active_layers!r}; it has {depths}")


def compare_markdown(reports: Sequence[DepthReport]) -> str:
    """A Markdown table: a line for each depth, and for each report its error rates in percent."""
    depths = sorted({row.num_active_layers for report in reports for row in report.rows})
    header = ["active layers", "parameters"] + [
        f"{report.name}: {rate}" for report in reports for rate in ("WER", "CER")
    ]
    lines = [header, ["---:"] * len(header)]
    for depth in depths:
        rows = [{row.num_active_layers: row for row in report.rows}.get(depth) for report in reports]
        rates = [f"{100 * rate:.1f} %" if row else "" for row in rows for rate in (row and row.wer, row and row.cer)]
        parameters = [row.parameters for row in rows if row][-1]
        lines.append([str(depth), f"{parameters / 1e6:.2f} M", *rates])
    return _table(lines)


def _table(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _csv_line(row: DepthRow) -> dict[str, Any]:
    line = {item.name: getattr(row, item.name) for item in fields(row) if item.name != "draws"}
    for rate in ("wer", "cer"):
        line[f"{rate}_low"], line[f"{rate}_high"] = line.pop(f"{rate}_interval") or (None, None)
    line["active_layers"] = " ".join(map(str, row.active_layers))
    return {**line, "wer_deviation": row.wer_deviation, "draws": len(row.draws)}


def _rate(rate: float, interval: list[float] | None) -> str:
    return f"{100 * rate:.1f} %" + (f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else "")


def _number(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _latency(row: DepthRow) -> str:
    percentiles = (row.latency_p50_s, row.latency_p90_s, row.latency_p99_s)
    return "" if None in percentiles else " / ".join(f"{seconds:.3g} s" for seconds in percentiles)


_COLUMNS: dict[str, Callable[[DepthRow], str]] = {
    "active layers": lambda row: str(row.num_active_layers),
    "which": lambda row: " ".join(map(str, row.active_layers)),
    "parameters": lambda row: f"{row.parameters / 1e6:.2f} M",
    "GMAC": lambda row: _number("{:.3g}", row.gmac_per_s),
    "WER": lambda row: _rate(row.wer, row.wer_interval),
    "WER deviation": lambda row: _number("{:.1%}", row.wer_deviation),
    "CER": lambda row: _rate(row.cer, row.cer_interval),
    "RTF": lambda row: _number("{:.3g}", row.rtf),
    "latency p50 / p90 / p99": _latency,
    "memory": lambda row: _number("{:.0f} MB", row.memory_mb),
}
