"""The search for the layers of every count: against naive references, in its cost, resumed, and on bad input."""

import itertools
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, VARIANTS, make_dynamic, make_stock, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from hf_dld import DataCollatorCTC, build_character_processor, lora_config, search_depth_schedule
from hf_dld.data import decode_labels
from hf_dld.distill.losses import ctc_loss, kl_loss
from hf_dld.evaluation import DepthSchedule, LayerSetScorer, count_errors, run_layer_sets
from hf_dld.evaluation.layer_sets import count_layer_calls
from hf_dld.models.depth import select_layers

ALL = tuple(range(NUM_LAYERS))
ALL_SETS = [layers for count in range(1, NUM_LAYERS + 1) for layers in itertools.combinations(ALL, count)]
EMPTY = '{"layers": [], "scores": [], "objective": "", "beam_size": 1, "utterances": 1, "seed": 0, "cost": {}}'
PROCESSOR = build_character_processor(["abcdefghi"])


class Rows(list):
    """A list of examples that gives columns by name, as `datasets.Dataset` does."""

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def make_rows(utterances=5, transcribed=True):
    generator = np.random.default_rng(0)
    lengths = generator.permutation(np.linspace(4000, 8000, utterances).astype(int)).tolist()
    return Rows(
        {
            "audio": generator.standard_normal(length).astype(np.float32),
            "input_length": length,
            "labels": generator.integers(2, 12, 4).tolist() if transcribed else [],
        }
        for length in lengths
    )


@pytest.fixture
def dataset():
    return make_rows()


def naive_score(model, dataset, layers, objective, batch_size):
    """Each set on its own, through the model's forward."""
    order = sorted(range(len(dataset)), key=lambda index: -dataset[index]["input_length"])
    total = amount = 0
    for start in range(0, len(order), batch_size):
        batch = DataCollatorCTC(PROCESSOR)([dataset[index] for index in order[start : start + batch_size]])
        labels, frames = batch.pop("labels"), model._get_feat_extract_output_lengths(batch.pop("input_lengths"))
        with torch.no_grad():
            logits, full = (model(**batch, active_layers=some).logits for some in (layers, ALL))
        if objective == "wer":
            said = [PROCESSOR.decode(row[:length]) for row, length in zip(logits.argmax(-1), frames, strict=True)]
            errors, words = count_errors(said, [decode_labels(PROCESSOR.tokenizer, row) for row in labels])
            total, amount = total + errors.sum(), amount + words.sum()
        else:
            losses = kl_loss(logits, full, frames) if objective == "kl" else ctc_loss(logits, frames, labels, 0)
            total, amount = total + losses.sum(dtype=torch.float64).item(), amount + len(losses)
    return float(total / amount)


def count_calls(modules, run):
    calls = []
    hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in modules]
    result = run()
    for hook in hooks:
        hook.remove()
    return len(calls), result


@pytest.mark.parametrize("masked", [False, True])
def test_shared_beginnings_change_nothing(variant, batch, masked):
    if not masked:
        batch.pop("attention_mask")
    model = make_dynamic(variant)
    with torch.no_grad():
        start, layer_inputs = model.before_layers(**batch)
        outputs = {
            layers: model.ctc_logits(output) for layers, output in run_layer_sets(model, start, layer_inputs, ALL_SETS)
        }
        assert outputs.keys() == set(ALL_SETS)
        for layers, logits in outputs.items():
            assert torch.equal(logits, model(**batch, active_layers=layers).logits)


@pytest.fixture(scope="module")
def tiny_wavlm():
    return make_dynamic("wavlm")


@settings(max_examples=25, deadline=None)
@given(layer_sets=st.lists(st.sampled_from(ALL_SETS), max_size=8))
def test_no_beginning_is_computed_twice(tiny_wavlm, layer_sets):
    model = tiny_wavlm
    with torch.no_grad():
        start, layer_inputs = model.before_layers(torch.ones(1, 2000))
        calls, outputs = count_calls(
            model.wavlm.encoder.layers, lambda: list(run_layer_sets(model, start, layer_inputs, layer_sets))
        )
    assert [layers for layers, _ in outputs] == sorted(set(layer_sets))
    assert calls == count_layer_calls(layer_sets) <= sum(map(len, set(layer_sets)))


@pytest.mark.parametrize("objective", ["ctc", "kl", "wer"])
@pytest.mark.parametrize("variant", ["wavlm-stable", "conformer-relative"])
def test_greedy_equals_a_naive_reference(variant, objective, dataset):
    model = make_dynamic(variant)
    schedule = search_depth_schedule(model, dataset, PROCESSOR, objective, batch_size=2)
    layers = ALL
    for count in range(NUM_LAYERS, 0, -1):
        if count < NUM_LAYERS:
            candidates = [tuple(layer for layer in layers if layer != out) for out in layers]
            layers = min(candidates, key=lambda some: (naive_score(model, dataset, some, objective, 2), some))
        assert schedule.layers[count - 1] == list(layers)
        assert schedule.scores[count - 1] == naive_score(model, dataset, layers, objective, 2)
    assert (schedule.objective, schedule.utterances, schedule.beam_size) == (objective, 5, 1)


@pytest.mark.parametrize("objective", ["ctc", "wer"])
def test_widest_beam_is_the_exhaustive_search(objective, dataset):
    model = make_dynamic("wavlm")
    schedule = search_depth_schedule(model, dataset, PROCESSOR, objective, beam_size=6)
    scores = {layers: naive_score(model, dataset, layers, objective, 16) for layers in ALL_SETS}
    for count, layers in enumerate(schedule.layers, start=1):
        best = min((layers for layers in ALL_SETS if len(layers) == count), key=lambda some: (scores[some], some))
        assert layers == list(best)


@settings(max_examples=10, deadline=None)
@given(
    weights=st.integers(0, 1000), objective=st.sampled_from(["ctc", "kl", "wer"]), variant=st.sampled_from([*VARIANTS])
)
def test_greedy_sets_are_nested(weights, objective, variant):
    model = randomize(make_dynamic(variant), weights)
    schedule = search_depth_schedule(model, make_rows(3), PROCESSOR, objective)
    for fewer, more in itertools.pairwise(schedule.layers):
        assert len(fewer) + 1 == len(more) and set(fewer) < set(more)


def test_a_beam_looks_at_evenly_spaced_layers_too(dataset, monkeypatch):
    """The two best sets of three layers lead to others than the best of two, which training may have used."""
    scores = {(0, 1, 2): 1.0, (1, 2, 3): 2.0, select_layers(2, NUM_LAYERS): 0.0}

    def score(scorer, sets, title):
        return {layers: scores.get(layers, 3.0) for layers in sets}

    monkeypatch.setattr(LayerSetScorer, "score", score)
    found = [search_depth_schedule(make_dynamic("wavlm"), dataset, PROCESSOR, beam_size=size) for size in (1, 2)]
    assert [schedule.layers[1] for schedule in found] == [[0, 1], [0, 3]]


@pytest.mark.parametrize("objective", ["ctc", "kl"])
def test_cost_is_what_the_formula_says_and_what_was_run(objective, dataset):
    model = make_dynamic("wavlm")
    feature_calls, (layer_calls, schedule) = count_calls(
        [model.wavlm.feature_extractor],
        lambda: count_calls(
            model.wavlm.encoder.layers,
            lambda: search_depth_schedule(model, dataset, PROCESSOR, objective, batch_size=2),
        ),
    )
    batches, n, teacher = 3, NUM_LAYERS, NUM_LAYERS if objective == "kl" else 0
    assert schedule.cost.batches == schedule.cost.feature_encoder_calls == feature_calls == batches
    assert schedule.cost.layer_sets == n * (n + 1) // 2
    assert schedule.cost.layer_calls == layer_calls == batches * (n * (n + 1) * (n + 2) // 6 + teacher)
    assert schedule.cost.layer_calls_without_reuse == batches * (n * (n * n + 2) // 3 + teacher)


def test_what_does_not_fit_into_the_cache_is_computed_again(dataset):
    model = make_dynamic("wavlm")
    schedules = [
        search_depth_schedule(model, dataset, PROCESSOR, "kl", batch_size=2, cache_gb=size) for size in (2.0, 0.0)
    ]
    assert schedules[0].layers == schedules[1].layers and schedules[0].scores == schedules[1].scores
    assert schedules[1].cost.feature_encoder_calls == NUM_LAYERS * schedules[1].cost.batches
    scorer = LayerSetScorer(model, dataset, PROCESSOR, batch_size=2, cache_gb=0.0)
    scorer.score([ALL])
    assert scorer.kept == []


@pytest.mark.parametrize("variant", ["wavlm", "conformer-relative"])
def test_model_is_scored_in_eval_mode_and_left_as_it_was(variant, dataset):
    model = make_dynamic(variant, hidden_dropout=0.5)
    expected = LayerSetScorer(model, dataset, PROCESSOR).score(ALL_SETS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train().set_active_layers([1])
    assert LayerSetScorer(model, dataset, PROCESSOR).score(ALL_SETS) == expected
    assert model.training and model.active_layers == (1,) and model.config.depth_schedule is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules() if isinstance(module, nn.BatchNorm1d))


def test_schedule_becomes_the_default_choice_of_a_checkpoint(dataset, batch, tmp_path):
    model = make_dynamic("wavlm")
    schedule = search_depth_schedule(model, dataset, PROCESSOR)
    schedule.to_json(tmp_path / "schedule.json")
    assert DepthSchedule.from_json(tmp_path / "schedule.json") == schedule
    schedule.apply_to(model.config)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, num_active_layers=2)
    assert loaded.active_layers == tuple(schedule.layers[1])
    with pytest.raises(ValueError, match="one for 4 layers, and the encoder has 3"):
        schedule.apply_to(make_dynamic("wavlm", num_hidden_layers=3).config)
    schedule.layers[0], config = [7], make_dynamic("wavlm").config
    with pytest.raises(ValueError, match="strictly ascending layer indices from 0 to 3"):
        schedule.apply_to(config)
    assert config.layer_selection == "even" and config.depth_schedule is None
    schedule.to_json(tmp_path / "schedule.json")
    for content in ((tmp_path / "schedule.json").read_text(), "{", "[]", '{"layers": 3}', EMPTY):
        (tmp_path / "schedule.json").write_text(content)
        with pytest.raises(ValueError, match="schedule.json holds no depth schedule: "):
            DepthSchedule.from_json(tmp_path / "schedule.json")


@pytest.mark.parametrize("objective", ["ctc", "kl", "wer"])
def test_half_precision_and_adapters(objective, dataset):
    model = make_dynamic("wavlm-stable")
    expected = search_depth_schedule(model, dataset, PROCESSOR, objective)
    # adapters start without effect, but products round by where tensors lie in memory
    adapted = search_depth_schedule(get_peft_model(model, lora_config(model, r=2)), dataset, PROCESSOR, objective)
    assert adapted.scores == pytest.approx(expected.scores, rel=1e-5, abs=1e-6)
    assert replace(adapted, scores=expected.scores) == expected
    half = search_depth_schedule(make_dynamic("wavlm-stable").to(torch.bfloat16), dataset, PROCESSOR, objective)
    assert [len(layers) for layers in half.layers] == list(range(1, NUM_LAYERS + 1))


def test_sample_is_seeded(dataset):
    model = make_dynamic("wavlm")
    samples = [
        LayerSetScorer(model, dataset, PROCESSOR, max_utterances=2, seed=seed).indices for seed in (0, 0, 1, 2, 3)
    ]
    assert samples[0] == samples[1] and len(samples[0]) == 2 and len(set(map(tuple, samples))) > 1
    assert search_depth_schedule(model, dataset, PROCESSOR, max_utterances=2).utterances == 2


def test_speech_without_transcripts():
    model, mixed = make_dynamic("wavlm"), make_rows()
    mixed[1]["labels"], mixed[3]["labels"] = [], []
    assert search_depth_schedule(model, mixed, PROCESSOR, "kl").utterances == 5
    assert search_depth_schedule(model, mixed, PROCESSOR, "ctc").utterances == 3
    for objective in ("ctc", "wer"):
        message = f"objective='{objective}' needs transcripts, and none of the 5 .*; objective='kl' needs none"
        with pytest.raises(ValueError, match=message):
            search_depth_schedule(model, make_rows(transcribed=False), PROCESSOR, objective)
    assert search_depth_schedule(model, make_rows(transcribed=False), PROCESSOR, "kl").scores[-1] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "cer"}, r"objective must be one of \('ctc', 'kl', 'wer'\); got 'cer'"),
        ({"beam_size": 0}, "beam_size must be at least 1; got 0"),
        ({"max_utterances": 0}, "max_utterances must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"cache_gb": -1.0}, r"cache_gb must be at least 0; got -1\.0"),
    ],
)
def test_impossible_arguments(options, message, dataset):
    with pytest.raises(ValueError, match=message):
        search_depth_schedule(make_dynamic("wavlm"), dataset, PROCESSOR, **options)


def test_nothing_to_search(dataset):
    with pytest.raises(TypeError, match="WavLMForCTC cannot run with some of its layers"):
        search_depth_schedule(make_stock("wavlm"), dataset, PROCESSOR)
    with pytest.raises(ValueError, match="no utterance"):
        search_depth_schedule(make_dynamic("wavlm"), make_rows(0), PROCESSOR)
    with pytest.raises(TypeError, match="a dataset that is not streamed, .* got IterableDataset"):
        search_depth_schedule(
            make_dynamic("wavlm"), datasets.IterableDataset.from_generator(lambda: iter(dataset)), PROCESSOR
        )
    broken = make_dynamic("wavlm")
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="With 4 of 4 layers, no set of layers gives a finite ctc"):
        search_depth_schedule(broken, dataset, PROCESSOR)


@pytest.mark.parametrize("beam_size", [1, 2])
def test_interrupted_search_goes_on(beam_size, dataset, tmp_path, monkeypatch):
    model, file = make_dynamic("wavlm-stable"), tmp_path / "partial.json"
    options = {"beam_size": beam_size, "batch_size": 2}
    straight = search_depth_schedule(model, dataset, PROCESSOR, **options)
    score, calls = LayerSetScorer.score, []

    def interrupted(self, layer_sets, description):
        calls.append(description)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, layer_sets, description)

    monkeypatch.setattr(LayerSetScorer, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search_depth_schedule(model, dataset, PROCESSOR, resume_file=file, **options)
    assert len(json.loads(file.read_text())["beams"]) == 2 and list(tmp_path.iterdir()) == [file]
    resumed = search_depth_schedule(model, dataset, PROCESSOR, resume_file=file, **options)
    assert calls[2:] == ["Layers for 2 of 4", "Layers for 2 of 4", "Layers for 1 of 4"]
    assert resumed.cost.feature_encoder_calls == 2 * straight.cost.feature_encoder_calls
    resumed.cost = straight.cost
    assert resumed == straight


def test_progress_of_another_search_is_not_taken(dataset, tmp_path):
    model, file = make_dynamic("wavlm"), tmp_path / "partial.json"
    search_depth_schedule(model, dataset, PROCESSOR, resume_file=file)
    with pytest.raises(ValueError, match=r"another search \(objective: 'ctc' then, 'kl' now\). Remove it"):
        search_depth_schedule(model, dataset, PROCESSOR, "kl", resume_file=file)
    with pytest.raises(ValueError, match=r"another search \(utterances: "):
        search_depth_schedule(model, make_rows(4), PROCESSOR, resume_file=file)
    louder = [{**row, "audio": 0.5 * row["audio"] + 0.1} for row in dataset]
    with pytest.raises(ValueError, match=r"another search \(utterances: "):
        search_depth_schedule(model, Rows(louder), PROCESSOR, resume_file=file)
    plain = build_character_processor(["abcdefghi"], do_normalize=False)
    with pytest.raises(ValueError, match=r"another search \(utterances: "):
        search_depth_schedule(model, dataset, plain, resume_file=file)
    with pytest.raises(ValueError, match=r"another search \(weights: "):
        search_depth_schedule(randomize(model), dataset, PROCESSOR, resume_file=file)
    for text in ("{", "{}", "[]"):
        file.write_text(text)
        with pytest.raises(ValueError, match="not the file of an interrupted search: remove it"):
            search_depth_schedule(model, dataset, PROCESSOR, resume_file=file)
