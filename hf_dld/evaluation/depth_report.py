"""What each depth gives: error rates and size of a dynamic model at every number of active layers."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from ..data import DataCollatorCTC
from ..data.vocabulary import decode_labels
from ..models.depth import check_num_active_layers
from .metrics import count_errors


@dataclass
class DepthRow:
    """One depth: rates are fractions (0.1 is 10 %), `parameters` are those of the layers that run and of the rest."""

    num_active_layers: int
    active_layers: list[int]
    parameters: int
    wer: float
    cer: float


@dataclass
class DepthReport:
    """Error rates at every depth, with what they depend on."""

    name: str
    layer_selection: str
    utterances: int
    words: int
    batch_policy: str
    rows: list[DepthRow] = field(default_factory=list)

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "DepthReport":
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**fields, "rows": [DepthRow(**row) for row in fields["rows"]]})

    def row(self, num_active_layers: int) -> DepthRow:
        return next(row for row in self.rows if row.num_active_layers == num_active_layers)


def evaluate_depths(
    model: PreTrainedModel,
    dataset: Any,
    processor: ProcessorMixin,
    depths: Sequence[int] | None = None,
    *,
    name: str = "model",
    batch_size: int = 16,
) -> DepthReport:
    """Transcribe a dataset at every depth by greedy CTC decoding, and count the errors.

    Args:
        model: a dynamic model, or a `PeftModel` around one; left at the depth and in the mode that it came in.
        dataset: as `hf_dld.data.prepare_dataset` returns it.
        processor: the model's own.
        depths: numbers of active layers, 1 to the model's layers; all of them when None. Which layers they are is
            decided by `model.config.layer_selection`.
        name: what tables and figures call the model.
        batch_size: utterances in a batch; they are sorted by length, so that little is padding.

    Raises:
        ValueError: for an impossible depth, before anything is computed.
    """
    num_layers = model.config.num_hidden_layers
    depths = [check_num_active_layers(depth, num_layers) for depth in depths or range(1, num_layers + 1)]
    layers = {depth: model.config.resolve_active_layers(num_active_layers=depth) for depth in depths}
    predictions: dict[int, list[str]] = {depth: [] for depth in depths}
    references: list[str] = []
    was_training = model.training
    model.eval()
    for batch in length_sorted_batches(dataset, processor, batch_size):
        references += [decode_labels(processor.tokenizer, labels) for labels in batch.pop("labels")]
        frames = model._get_feat_extract_output_lengths(batch.pop("input_lengths"))
        batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
        for depth in depths:
            with torch.inference_mode():
                tokens = model(**batch, active_layers=layers[depth]).logits.argmax(-1).cpu()
            for utterance, length in zip(tokens, frames, strict=True):
                predictions[depth].append(processor.tokenizer.decode(utterance[:length]))
    model.train(was_training)
    report = DepthReport(
        name=name,
        layer_selection=model.config.layer_selection,
        utterances=len(references),
        words=int(count_errors(references, references)[1].sum()),
        batch_policy=f"batches of {batch_size}, sorted by length",
    )
    for depth in depths:
        rates = []
        for unit in ("word", "character"):
            errors, lengths = count_errors(predictions[depth], references, unit)
            rates.append(float(errors.sum() / max(lengths.sum(), 1)))
        parameters = count_parameters(model, layers[depth])
        report.rows.append(DepthRow(depth, list(layers[depth]), parameters, *rates))
    return report


def length_sorted_batches(
    dataset: Any, processor: ProcessorMixin, batch_size: int
) -> Iterable[dict[str, torch.Tensor]]:
    """Batches of the collator, the longest utterances first: what does not fit in memory fails at once."""
    collate = DataCollatorCTC(processor)
    lengths = dataset["input_length"]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    starts = range(0, len(order), batch_size)
    for start in logging.tqdm(starts, desc="Evaluating", unit="batch"):
        yield collate([dataset[index] for index in order[start : start + batch_size]])


def count_parameters(model: PreTrainedModel, active_layers: Iterable[int]) -> int:
    """Parameters that take part when only `active_layers` run: those of a static model of these layers."""
    dynamic_model = model.get_base_model() if isinstance(model, PeftModel) else model
    encoder_layers = dynamic_model.base_model.encoder.layers
    skipped = set(range(len(encoder_layers))) - set(active_layers)
    unused = {
        id(parameter)
        for index in skipped
        for name, parameter in encoder_layers[index].named_parameters()
        if not name.endswith("rel_attn_embed.weight")  # WavLM's layer 0 owns it, and every depth uses it
    }
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in unused)


def compare_markdown(reports: Sequence[DepthReport]) -> str:
    """A Markdown table: a line for each depth, and for each report its error rates in percent."""
    depths = sorted({row.num_active_layers for report in reports for row in report.rows})
    header = ["active layers", "parameters"] + [
        f"{report.name}: {rate}" for report in reports for rate in ("WER", "CER")
    ]
    lines = [header, ["---:"] * len(header)]
    for depth in depths:
        rows = [report.row(depth) for report in reports]
        rates = [f"{100 * rate:.1f} %" for row in rows for rate in (row.wer, row.cer)]
        lines.append([str(depth), f"{rows[-1].parameters / 1e6:.2f} M", *rates])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
