import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dld.evaluation.metrics import CharacterErrorRate, WordErrorRate, count_errors

PREDICTIONS = ["the cat sat", "hello", "a b c"]
REFERENCES = ["the cat sat down", "hello", "a x"]


def test_rates_by_hand():
    # 1 deletion in 4 words, none in 1, 1 substitution and 1 insertion in 2
    assert WordErrorRate().compute(predictions=PREDICTIONS, references=REFERENCES) == {"wer": 3 / 7}
    # " down" is missing: 5 of 16; none of 5; "x" for "b" and " c" too many: 3 of 3
    assert CharacterErrorRate().compute(predictions=PREDICTIONS, references=REFERENCES) == {"cer": 8 / 24}


def test_errors_of_each_utterance():
    errors, lengths = count_errors(PREDICTIONS, REFERENCES)
    assert (errors.tolist(), lengths.tolist()) == ([1, 0, 2], [4, 1, 2])
    errors, lengths = count_errors(PREDICTIONS, REFERENCES, unit="character")
    assert (errors.tolist(), lengths.tolist()) == ([5, 0, 3], [16, 5, 3])
    assert errors.dtype == lengths.dtype == np.int64


def test_white_space_is_not_an_error():
    assert WordErrorRate().compute(predictions=[" a\tb \n"], references=["a  b"]) == {"wer": 0.0}
    assert CharacterErrorRate().compute(predictions=[" a\tb \n"], references=["a  b"]) == {"cer": 0.0}


@pytest.mark.parametrize("unit", ["word", "character"])
def test_what_is_said_over_an_empty_reference_is_inserted(unit):
    errors, lengths = count_errors(["a b", "", "c"], ["", "", "c"], unit)
    assert errors.tolist() == [2 if unit == "word" else 3, 0, 0]
    assert lengths.tolist() == [0, 0, 1]


def test_a_rate_may_be_above_one():
    assert WordErrorRate().compute(predictions=["a b c", "x"], references=["", "x"]) == {"wer": 3.0}


@pytest.mark.parametrize(("metric", "unit"), [(WordErrorRate, "word"), (CharacterErrorRate, "character")])
@pytest.mark.parametrize("references", [[], [""], ["", "  "]])
def test_only_empty_references(metric, unit, references):
    with pytest.raises(ValueError, match=f"no {unit} in any of the {len(references)} references"):
        metric().compute(predictions=["a"] * len(references), references=references)


def test_not_as_many_predictions_as_references():
    with pytest.raises(ValueError, match="Mismatch in the number of predictions .2. and references .1."):
        WordErrorRate().compute(predictions=["a", "b"], references=["a"])
    with pytest.raises(ValueError, match="2 predictions for 1 references: there must be as many"):
        count_errors(["a", "b"], ["a"])


def test_an_unknown_unit():
    with pytest.raises(ValueError, match="unit='phone' must be 'word' or 'character'"):
        count_errors(["a"], ["a"], unit="phone")


def test_batches_add_up():
    metric = WordErrorRate()
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute() == {"wer": 3 / 7}
    assert metric.compute(predictions=["a"], references=["a"]) == {"wer": 0.0}  # nothing is left from before


words = st.text("ab ", max_size=12)


@settings(deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=5), st.sampled_from(["word", "character"]))
def test_properties(pairs, unit):
    predictions, references = zip(*pairs, strict=True)
    errors, lengths = count_errors(predictions, references, unit)
    assert (errors >= 0).all() and (lengths >= 0).all()
    assert not count_errors(references, references, unit)[0].any()
    backwards, prediction_lengths = count_errors(references, predictions, unit)
    assert (errors == backwards).all()
    assert (errors <= np.maximum(lengths, prediction_lengths)).all()
    assert (errors >= abs(lengths - prediction_lengths)).all()
