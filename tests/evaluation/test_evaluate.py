"""Evaluating every depth: right numbers, in bounded memory, once."""

import weakref
from dataclasses import replace

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import NUM_LAYERS, VARIANTS, make_dynamic
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

import hf_dld
from hf_dld.data import decode_labels
from hf_dld.evaluation import count_errors, evaluate_depths, paired_differences
from hf_dld.evaluation.error_counts import ERRORS, UTTERANCE
from hf_dld.evaluation.layer_sets import run_layer_sets

SCHEDULE = [[3], [1, 3], [0, 1, 3], [0, 1, 2, 3]]
UNTIMED = {"timed_utterances": 0}


@pytest.mark.parametrize("variant", ["wavlm-stable", "conformer-relative"])
def test_numbers_are_those_of_single_transcriptions(variant, dataset, processor):
    model = make_dynamic(variant)
    report = evaluate_depths(model, dataset, processor, batch_size=1, **UNTIMED)
    assert [row.num_active_layers for row in report.rows] == list(range(1, NUM_LAYERS + 1))
    for row in report.rows:
        predictions, references = [], []
        for example in dataset:
            batch = hf_dld.DataCollatorCTC(processor)([example])
            inputs = {name: batch[name] for name in ("input_values", "attention_mask")}
            with torch.no_grad():
                logits = model(**inputs, num_active_layers=row.num_active_layers).logits
            predictions.append(processor.batch_decode(logits.argmax(-1))[0])
            references.append(decode_labels(processor.tokenizer, example["labels"]))
        errors, lengths = count_errors(predictions, references, "character")
        assert row.cer == pytest.approx(errors.sum() / lengths.sum())
        assert row.cer_interval[0] <= row.cer <= row.cer_interval[1]
        static = model.to_static(row.num_active_layers)
        assert row.parameters == sum(parameter.numel() for parameter in static.parameters())
        assert row.active_layers == list(model.config.resolve_active_layers(num_active_layers=row.num_active_layers))
    assert report.audio_s == pytest.approx(sum(dataset["input_length"]) / 16_000)
    assert report.characters == lengths.sum()


@pytest.mark.parametrize("options", [{}, {"add_adapter": True, "num_adapter_layers": 1}])
def test_logits_of_many_depths_are_those_of_each(variant, batch, options):
    if options and variant.startswith("wavlm"):
        options = {**options, "adapter_stride": 2}
    model = make_dynamic(variant, **options)
    layer_sets = [(0, 3), (1,), (0, 1, 2, 3)]
    if not VARIANTS[variant][1].get("feat_extract_norm"):
        batch.pop("attention_mask")
    with torch.inference_mode():
        hidden_states, layer_inputs = model.before_layers(**batch)
        logits = {
            layers: model.ctc_logits(output)
            for layers, output in run_layer_sets(model, hidden_states, layer_inputs, layer_sets)
        }
        assert set(logits) == set(layer_sets)
        for layers in layer_sets:
            assert logits[layers].equal(model(**batch, active_layers=layers).logits)


def test_batches_do_not_matter_where_padding_does_not(dataset, processor):
    model = make_dynamic("wavlm-stable").train()
    one, many = (evaluate_depths(model, dataset, processor, [2, 4], batch_size=size, **UNTIMED) for size in (1, 3))
    assert one.rows == many.rows
    assert many.batch_policy == "batches of 3, sorted by length" and model.training


def test_a_stream_in_bounded_memory(make_dataset, processor, tmp_path):
    dataset = make_dataset(70)
    model = make_dynamic("wavlm-stable")
    whole = evaluate_depths(model, dataset, processor, [1], **UNTIMED)
    stream = evaluate_depths(model, dataset.to_iterable_dataset(), processor, [1], batch_size=2, **UNTIMED)
    assert "within chunks of 32" in stream.batch_policy
    unbatched = {"batch_policy": "", "rows": []}
    assert replace(whole, **unbatched) == replace(stream, **unbatched)
    assert whole.rows[0].wer == stream.rows[0].wer

    class Example(dict):
        pass

    class Alive:
        now = most = 0

        def __iter__(self):
            for row in dataset:
                example = Example(row)
                self.now += 1
                self.most = max(self.most, self.now)
                weakref.finalize(example, self.forget)
                yield example

        def forget(self):
            self.now -= 1

    alive = Alive()
    evaluate_depths(model, alive, processor, [1], batch_size=2, **UNTIMED)
    assert alive.most <= 2 * 32 + 1, "one chunk is read while the last batch of the one before is at work"
    assert UTTERANCE.itemsize + ERRORS.itemsize == 28, "bytes that an utterance takes while rates are computed"


class Stop(Exception):
    pass


def count_passes(model, stop_at=None):
    """Counts how often logits are computed, and stops at one, as a killed run would."""
    passes = []

    def hook(module, args):
        passes.append(1)
        if len(passes) == stop_at:
            raise Stop

    return passes, model.lm_head.register_forward_pre_hook(hook)


@pytest.mark.parametrize("streaming", [False, True])
def test_resume_after_a_killed_run(streaming, make_dataset, processor, tmp_path):
    dataset = make_dataset(20)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    model = make_dynamic("wavlm-stable")
    options = {"batch_size": 4, **UNTIMED}
    expected = evaluate_depths(model, dataset, processor, [1, 3], **options)
    options["cache_dir"] = tmp_path
    _, hook = count_passes(model, stop_at=6)  # in the third of five batches, between the depths
    with pytest.raises(Stop):
        evaluate_depths(model, dataset, processor, [1, 3], **options)
    hook.remove()
    file = next(tmp_path.glob("*/errors-0.*"))
    file.write_bytes(file.read_bytes() + b"half")
    passes, hook = count_passes(model)
    assert evaluate_depths(model, dataset, processor, [1, 3], **options) == expected
    assert len(passes) == 5
    passes.clear()
    assert evaluate_depths(model, dataset, processor, [1, 3], **options) == expected
    assert not passes
    evaluate_depths(model, dataset, processor, [1, 3, 4], **options)
    assert len(passes) == 5, "only the depth that is new"
    model.set_active_layers(2)  # every depth names its layers, so the model's own setting is no other evaluation
    passes.clear()
    evaluate_depths(model, dataset, processor, [1], **options)
    assert not passes


def test_the_cache_of_something_else_is_not_used(make_dataset, processor, tmp_path):
    model, dataset = make_dynamic("wavlm-stable"), make_dataset(4)
    options = {"batch_size": 2, "cache_dir": tmp_path, **UNTIMED}
    evaluate_depths(model, dataset, processor, [2], **options)

    def is_evaluated_anew(model, dataset, processor, **changed):
        passes, hook = count_passes(model)
        evaluate_depths(model, dataset, processor, [2], **{**options, **changed})
        hook.remove()
        return len(passes) > 0

    assert not is_evaluated_anew(model, dataset, processor)
    assert is_evaluated_anew(model, dataset, processor, batch_size=4)
    assert is_evaluated_anew(model, make_dataset(4, seed=1), processor)
    assert is_evaluated_anew(model, dataset.select([0, 1, 2]), processor)
    assert is_evaluated_anew(model, dataset, hf_dld.build_character_processor(["abcdefghi"], do_normalize=False))
    assert is_evaluated_anew(make_dynamic("wavlm-stable", layer_norm_eps=0.1), dataset, processor)
    other = make_dynamic("wavlm-stable")
    with torch.no_grad():
        other.lm_head.bias[0] += 1e-3
    assert is_evaluated_anew(other, dataset, processor)
    evaluate_depths(model, dataset.to_iterable_dataset(), processor, [2], **options)
    shorter = dataset.select(np.argsort(dataset["input_length"])[:1:-1])  # begins alike, and ends after a batch
    for another, detail in ((make_dataset(4, seed=1), "0 to 2 are others"), (shorter, "2 utterances instead of 4")):
        with pytest.raises(ValueError, match=f"not the one that the cache counted .*{detail}.*another cache_dir"):
            evaluate_depths(model, another.to_iterable_dataset(), processor, [2], **options)


def test_adapters_that_are_switched_off_or_scaled_are_evaluated_anew(dataset, processor, tmp_path):
    model = get_peft_model(make_dynamic("wavlm-stable"), hf_dld.lora_config(make_dynamic("wavlm-stable"), r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    options = {"cache_dir": tmp_path, **UNTIMED}

    def rates():
        kept = evaluate_depths(model, dataset, processor, [4], **options)
        assert kept == evaluate_depths(model, dataset, processor, [4], **UNTIMED)
        return kept.rows[0].cer

    found = [rates()]
    with model.disable_adapter():
        found.append(rates())
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 3
    found.append(rates())
    assert found[0] != found[1] and len(list(tmp_path.iterdir())) == 3


def test_audio_of_a_stream_that_changed_is_not_taken_for_what_it_was(dataset, processor, tmp_path):
    def write(seed):
        noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (3, 4000))
        for index, samples in enumerate(noise):
            soundfile.write(tmp_path / f"{index}.wav", samples, 16_000)

    rows = [{"audio": {"path": str(tmp_path / f"{index}.wav"), "bytes": None}, "input_length": 4000, "labels": [3, 4]}
            for index in range(3)]  # fmt: skip
    stream, model = datasets.Dataset.from_list(rows).to_iterable_dataset(), make_dynamic("wavlm-stable")
    options = {"cache_dir": tmp_path / "cache", **UNTIMED}
    write(0)
    evaluate_depths(model, stream, processor, [4], **options)
    evaluate_depths(model, stream, processor, [4], **options)
    write(1)
    with pytest.raises(ValueError, match="not the one that the cache counted .*0 to 3 are others"):
        evaluate_depths(model, stream, processor, [4], **options)


def test_a_dataset_without_transcripts_is_refused_before_anything_is_computed(dataset, processor):
    model = make_dynamic("wavlm-stable")
    passes, _ = count_passes(model)
    silent = dataset.remove_columns("labels").add_column("labels", [[], None] + [[]] * (len(dataset) - 2))
    with pytest.raises(ValueError, match="no word in any of the 7 references: there is nothing to compare with"):
        evaluate_depths(model, silent, processor, **UNTIMED)
    assert not passes


def test_random_subsets(dataset, processor):
    model = make_dynamic("wavlm-stable")
    options = {"selection": "random", "draws": 3, **UNTIMED}
    report = evaluate_depths(model, dataset, processor, **options, seed=1)
    assert report.layer_selection == "random"
    assert [len(row.draws) for row in report.rows] == [3, 3, 3, 0], "all four layers can only be drawn once"
    for row in report.rows[:3]:
        drawn = [tuple(draw.active_layers) for draw in row.draws]
        assert len(set(drawn)) == 3 and all(len(layers) == row.num_active_layers for layers in drawn)
        assert row.wer == pytest.approx(np.mean([draw.wer for draw in row.draws]))
        assert row.wer_deviation == pytest.approx(np.std([draw.wer for draw in row.draws], ddof=1))
    assert report.rows[3].active_layers == [0, 1, 2, 3]
    again, other = (evaluate_depths(model, dataset, processor, [2], **options, seed=seed) for seed in (1, 2))
    assert again.rows == [report.row(2)] and other.rows != again.rows
    assert "mean and standard deviation over up to 3 distinct subsets" in report.to_markdown()


def test_selections(dataset, processor):
    model = make_dynamic("wavlm-stable")
    first = evaluate_depths(model, dataset, processor, [3, 2], selection="first", **UNTIMED)
    assert [row.active_layers for row in first.rows] == [[0, 1], [0, 1, 2]]
    assert model.config.layer_selection == "even"


def test_a_pruned_model(dataset, processor, tmp_path):
    whole = make_dynamic("wavlm-stable")
    whole.save_pretrained(tmp_path)
    options = {"active_layers": [1, 3], "prune_inactive_layers": True}
    pruned = hf_dld.DLDWavLMForCTC.from_pretrained(
        tmp_path, layer_selection="schedule", depth_schedule=SCHEDULE, **options
    )
    whole.config.depth_schedule, whole.config.layer_selection = SCHEDULE, "schedule"
    expected, found = (evaluate_depths(model, dataset, processor, [1, 2], **UNTIMED) for model in (whole, pruned))
    assert found == expected
    assert evaluate_depths(pruned, dataset, processor, **UNTIMED) == found, "by default, all depths that are there"
    with pytest.raises(ValueError, match=r"were pruned when the model was loaded"):
        evaluate_depths(pruned, dataset, processor, [3], **UNTIMED)
    drawn = evaluate_depths(pruned, dataset, processor, selection="random", draws=5, **UNTIMED)
    assert [row.num_active_layers for row in drawn.rows] == [1, 2] and drawn.row(2).active_layers == [1, 3]
    assert {tuple(draw.active_layers) for draw in drawn.row(1).draws} == {(1,), (3,)}
    with pytest.raises(ValueError, match="3 layers cannot be drawn from the 2 .layers 1, 3. that were not pruned"):
        evaluate_depths(pruned, dataset, processor, [3], selection="random", **UNTIMED)
    last = hf_dld.DLDWavLMForCTC.from_pretrained(tmp_path, active_layers=[3], prune_inactive_layers=True)
    with pytest.raises(ValueError, match=r"were pruned when the model was loaded"):
        evaluate_depths(last, dataset, processor, **UNTIMED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [2, 5]}, "from 1 to 4.*; got 5"),
        ({"depths": []}, "depths is empty"),
        ({"selection": "best"}, r"selection must be one of \('even', 'first', 'schedule', 'random'\); got 'best'"),
        ({"selection": "schedule"}, "needs a depth_schedule"),
        ({"selection": "random", "draws": 0}, "draws=0 must be at least 1"),
        ({"timed_utterances": -1}, "timed_utterances=-1 must be at least 0"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_careless_arguments(options, message, dataset, processor):
    model = make_dynamic("wavlm").train()
    with pytest.raises(ValueError, match=message):
        evaluate_depths(model, dataset, processor, **options)
    assert model.training


def test_nothing_to_compare_with(dataset, processor):
    silent = dataset.map(lambda example: {"labels": []})
    with pytest.raises(ValueError, match="no word in any of the 7 references"):
        evaluate_depths(make_dynamic("wavlm"), silent, processor, [1], **UNTIMED)


def test_costs(dataset, processor):
    report = evaluate_depths(make_dynamic("wavlm-stable"), dataset, processor, [1, 4], timed_utterances=3)
    one, four = report.rows
    for row in report.rows:
        assert 0 < row.latency_p50_s <= row.latency_p90_s <= row.latency_p99_s and row.rtf > 0
    assert one.gmac_per_s < four.gmac_per_s and one.memory_mb < four.memory_mb
    assert report.conditions["threads"] == 1 and report.conditions["dtype"] == "float32"
    assert "3 forward passes at each depth" in report.to_markdown()


def test_half_precision(dataset, processor):
    model = make_dynamic("wavlm-stable").to(torch.bfloat16)
    report = evaluate_depths(model, dataset, processor, [2], timed_utterances=2)
    assert report.conditions["dtype"] == "bfloat16" and report.rows[0].latency_p50_s > 0


def test_paired_differences(make_dataset, processor, tmp_path):
    dataset = make_dataset(30)
    models = {"one": make_dynamic("wavlm-stable"), "two": make_dynamic("wavlm-stable")}
    with torch.no_grad():
        models["two"].lm_head.bias[0] += 100  # nothing but blanks: all words are missing, none is wrong
    for name, model in models.items():
        errors = tmp_path / f"{name}.errors.npz"
        report = evaluate_depths(model, dataset, processor, [1, 4], errors_path=errors, name=name, **UNTIMED)
        report.to_json(tmp_path / f"{name}.json")
    rows = {name: hf_dld.DepthReport.from_json(tmp_path / f"{name}.json").row(4) for name in models}
    difference = paired_differences(tmp_path / "one.json", tmp_path / "two.json")[1]
    assert difference.wer == pytest.approx((rows["one"].wer, rows["two"].wer))
    assert difference.difference == pytest.approx(rows["two"].wer - rows["one"].wer)
    assert rows["two"].wer == 1 and difference.verdict == "better" and difference.p_value == 0.001
    same = paired_differences(tmp_path / "one.json", tmp_path / "one.json")
    assert all(row.difference == 0 and row.interval == [0, 0] and row.p_value == 1 for row in same)
    assert same[0].verdict == "no clear difference"

    other = evaluate_depths(
        models["one"], make_dataset(30, seed=1), processor, [1], errors_path=tmp_path / "other.npz", **UNTIMED
    )
    other.to_json(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"not about the same utterances in the same order \(30 and 30\)"):
        paired_differences(tmp_path / "one.json", tmp_path / "other.json")
    stored = dict(np.load(tmp_path / "other.npz"))
    for name, array in (
        ("words", np.array([[1]], dtype=object)),  # a pickle
        ("words", np.zeros(10**6, dtype=np.int64)),  # a few bytes that unpack to many
        ("text", np.zeros(3, dtype=np.int64)),
        ("word_errors_1", np.zeros(30)),
        ("word_errors_1", stored["word_errors_1"] + 1),  # another model's
    ):
        np.savez_compressed(tmp_path / "other.npz", **{**stored, name: array})
        with pytest.raises(ValueError, match="other.npz does not hold the errors of each utterance of .*other.json: "):
            paired_differences(tmp_path / "one.json", tmp_path / "other.json")
    (tmp_path / "other.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="other.npz does not hold the errors.*not a zip file"):
        paired_differences(tmp_path / "one.json", tmp_path / "other.json")
    other.errors_file = "../secret.npz"
    other.to_json(tmp_path / "other.json")
    with pytest.raises(ValueError, match="other.json says that its errors are in '../secret.npz': they must"):
        paired_differences(tmp_path / "one.json", tmp_path / "other.json")
    other.errors_file = "other.npz"
    other.to_json(tmp_path / "other.json")
    (tmp_path / "other.npz").unlink()
    with pytest.raises(ValueError, match="other.npz is missing"):
        paired_differences(tmp_path / "one.json", tmp_path / "other.json")
    other.errors_file = None
    other.to_json(tmp_path / "other.json")
    with pytest.raises(ValueError, match="has no errors of each utterance"):
        paired_differences(tmp_path / "one.json", tmp_path / "other.json")
