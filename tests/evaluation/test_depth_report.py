"""The depth report: its numbers, its files and its figure."""

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, make_dynamic

from hf_dld import build_character_processor
from hf_dld.data import decode_labels
from hf_dld.evaluation import DepthReport, compare_markdown, count_errors, evaluate_depths, plot_depths


class Rows(list):
    """A list of examples that gives columns by name, as `datasets.Dataset` does."""

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.fixture(scope="module")
def processor():
    return build_character_processor(["abcdefghi"])


@pytest.fixture(scope="module")
def dataset():
    generator = np.random.default_rng(0)
    lengths = (4000, 9000, 6000, 5000, 7000)
    return Rows(
        {
            "audio": generator.standard_normal(length).astype(np.float32),
            "input_length": length,
            "labels": generator.integers(2, 12, 4).tolist(),
        }
        for length in lengths
    )


@pytest.mark.parametrize("variant", ["wavlm-stable", "conformer-relative"])
def test_numbers_are_those_of_single_transcriptions(variant, dataset, processor):
    model = make_dynamic(variant)
    report = evaluate_depths(model, dataset, processor, batch_size=1)
    assert [row.num_active_layers for row in report.rows] == list(range(1, NUM_LAYERS + 1))
    for row in report.rows:
        predictions, references = [], []
        for example in dataset:
            inputs = processor.feature_extractor(example["audio"], sampling_rate=16_000, return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs, num_active_layers=row.num_active_layers).logits
            predictions.append(processor.batch_decode(logits.argmax(-1))[0])
            references.append(decode_labels(processor.tokenizer, example["labels"]))
        errors, lengths = count_errors(predictions, references, "character")
        assert row.cer == pytest.approx(errors.sum() / lengths.sum())
        static = model.to_static(row.num_active_layers)
        assert row.parameters == sum(parameter.numel() for parameter in static.parameters())
        assert row.active_layers == list(model.config.resolve_active_layers(num_active_layers=row.num_active_layers))


def test_batches_do_not_matter_where_padding_does_not(dataset, processor):
    model = make_dynamic("wavlm-stable").train()
    one, many = (evaluate_depths(model, dataset, processor, [2, 4], batch_size=size) for size in (1, 3))
    assert one.rows == many.rows
    assert "3, sorted by length" in many.batch_policy and model.training


def test_impossible_depth(dataset, processor):
    with pytest.raises(ValueError, match="from 1 to 4.*; got 5"):
        evaluate_depths(make_dynamic("wavlm"), dataset, processor, [2, 5])


def test_files(dataset, processor, tmp_path):
    report = evaluate_depths(make_dynamic("wavlm-stable"), dataset, processor, [1, 4], name="tiny")
    report.to_json(tmp_path / "report.json")
    assert DepthReport.from_json(tmp_path / "report.json") == report
    table = compare_markdown([report, report]).splitlines()
    assert table[0] == "| active layers | parameters | tiny: WER | tiny: CER | tiny: WER | tiny: CER |"
    assert len(table) == 4 and table[3].startswith("| 4 | 0.0")
    for suffix in ("png", "svg"):
        plot_depths([report, report], tmp_path / f"plot.{suffix}", "title")
        assert (tmp_path / f"plot.{suffix}").stat().st_size > 5000
