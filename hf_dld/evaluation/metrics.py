"""Word and character error rates over jiwer, as `evaluate` metrics that need neither the Hub nor a writable home."""

from collections.abc import Callable, Sequence
from typing import Literal

import datasets
import evaluate
import jiwer
import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..data.vocabulary import decode_labels

_DESCRIPTION = (
    "Errors (substitutions, deletions and insertions) over all utterances, divided by the {unit}s of all references. "
    "What is said where a reference is empty counts as insertions. White space at the ends is ignored, and any run of "
    "it is one space."
)
_INPUTS = "predictions: list of transcripts; references: list of correct transcripts, as many."
_CITATION = "https://github.com/jitsi/jiwer"


def count_errors(
    predictions: Sequence[str], references: Sequence[str], unit: Literal["word", "character"] = "word"
) -> tuple[np.ndarray, np.ndarray]:
    """Errors and reference lengths of each utterance, two integer arrays of shape `(utterances,)`.

    The rate of any set of utterances is `errors.sum() / lengths.sum()`, which is what bootstrap intervals resample.
    An empty reference has length 0 and as many errors as its prediction has units.

    Raises:
        ValueError: an unknown unit, or not as many predictions as references.
    """
    if unit not in ("word", "character"):
        raise ValueError(f"unit={unit!r} must be 'word' or 'character'")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: there must be as many")
    align = jiwer.process_words if unit == "word" else jiwer.process_characters
    errors, lengths = [], []
    for prediction, reference in zip(predictions, references, strict=True):
        result = align(" ".join(reference.split()), " ".join(prediction.split()))
        errors.append(result.substitutions + result.deletions + result.insertions)
        lengths.append(result.hits + result.substitutions + result.deletions)
    return np.array(errors, dtype=np.int64), np.array(lengths, dtype=np.int64)


def _error_rate(predictions: Sequence[str], references: Sequence[str], unit: Literal["word", "character"]) -> float:
    errors, lengths = count_errors(predictions, references, unit)
    if not lengths.sum():
        raise ValueError(f"no {unit} in any of the {len(lengths)} references: an error rate would divide by zero")
    return float(errors.sum() / lengths.sum())


class _ErrorRate(evaluate.Metric):
    unit: Literal["word", "character"]

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs):
        super().__init__(config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        # The base class makes a folder in HF_HOME even when nothing will be written to it.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION.format(unit=self.unit),
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )


def asr_metrics(tokenizer: PreTrainedTokenizerBase) -> Callable[..., dict[str, float]]:
    """`compute_metrics` for the trainers of `hf_dld.distill`: `wer` and `cer` of greedy CTC decoding.

    Takes predictions that are token ids, (utterances, frames), and labels, (utterances, tokens); -100 is padding. With
    `eval_do_concat_batches=False` they are lists, of a batch each. With `batch_eval_metrics=True` it is called for
    every batch, and keeps its texts until the last. The result is empty where no utterance has a transcript, as in
    `Trainer.predict` on new speech.
    """
    predictions: list[str] = []
    references: list[str] = []
    labelled: list[bool] = []

    def compute(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        tokens, labels = prediction.predictions, prediction.label_ids
        batches = zip(tokens, labels, strict=True) if isinstance(labels, list) else [(tokens, labels)]
        for batch_tokens, batch_labels in batches:
            batch_tokens, batch_labels = np.asarray(batch_tokens), np.asarray(batch_labels)
            predictions.extend(tokenizer.batch_decode(np.where(batch_tokens < 0, tokenizer.pad_token_id, batch_tokens)))
            references.extend(decode_labels(tokenizer, row) for row in batch_labels)
            labelled.append(bool((batch_labels >= 0).any()))
        if not compute_result:
            return {}
        texts, known = {"predictions": predictions[:], "references": references[:]}, any(labelled)
        for kept in (predictions, references, labelled):
            kept.clear()
        return {**WordErrorRate().compute(**texts), **CharacterErrorRate().compute(**texts)} if known else {}

    return compute


class WordErrorRate(_ErrorRate):
    """`WordErrorRate().compute(predictions=[...], references=[...])` gives `{"wer": float}`.

    0.1 is 10 %; a rate may be above 1. Raises ValueError when the numbers of predictions and references differ, and
    when no reference holds a word.
    """

    unit = "word"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"wer": _error_rate(predictions, references, self.unit)}


class CharacterErrorRate(_ErrorRate):
    """As `WordErrorRate`, over characters, the spaces between words among them; gives `{"cer": float}`."""

    unit = "character"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"cer": _error_rate(predictions, references, self.unit)}
