"""`prune_inactive_layers`: layers that do not run are neither built nor read; the others keep their indices."""

import json

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, make_dynamic, make_stock
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCTC, pipeline

from hf_dld import (
    CTCTrainer,
    CTCTrainingArguments,
    DataCollatorCTC,
    DLDTrainer,
    DLDTrainingArguments,
    build_character_processor,
)

DEPTHS = {"num_active_layers": 2}, {"active_layers": [1, 2]}
ABSENT = (
    r"Layers \[0, 1, 2, 3\] cannot run: \[1, 2\] were pruned when the model was loaded with "
    r"prune_inactive_layers=True, which left \[0, 3\] of 4 layers. Load the whole checkpoint without"
)


@pytest.fixture
def checkpoint(variant, tmp_path):
    make_dynamic(variant).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def load_pruned(checkpoint, **options):
    options = {"num_active_layers": 2, **options}
    return AutoModelForCTC.from_pretrained(checkpoint, prune_inactive_layers=True, **options)


def outputs_of(model, batch, **kwargs):
    with torch.no_grad():
        return model(**batch, **kwargs)


@pytest.mark.parametrize("depth", DEPTHS, ids=str)
def test_it_is_the_static_model_under_the_old_indices(variant, checkpoint, depth, batch, capfd):
    whole = make_dynamic(variant)
    capfd.readouterr()
    pruned, loading = AutoModelForCTC.from_pretrained(
        checkpoint, prune_inactive_layers=True, output_loading_info=True, **depth
    )
    assert not any(loading.values()), loading
    assert "REPORT" not in capfd.readouterr().err, "what was left out on purpose is nothing to warn of"
    layers = whole.config.resolve_active_layers(depth.get("active_layers"), depth.get("num_active_layers"))
    assert pruned.active_layers == layers == pruned.config.present_layers
    assert pruned.num_parameters() == whole.to_static(layers).num_parameters()
    assert set(pruned.state_dict()) <= set(whole.state_dict())
    expected = outputs_of(whole, batch, active_layers=layers, output_hidden_states=True)
    ours = outputs_of(pruned, batch, output_hidden_states=True)
    torch.testing.assert_close(ours.logits, expected.logits, atol=0, rtol=0)
    for state, wanted in zip(ours.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, wanted, atol=0, rtol=0)
    first, last = layers
    single = outputs_of(whole, batch, active_layers=[last]).logits
    torch.testing.assert_close(outputs_of(pruned, batch, active_layers=[last]).logits, single, atol=0, rtol=0)
    static, expected = pruned.to_static([last]), whole.to_static([last])
    for name, tensor in expected.state_dict().items():
        assert torch.equal(static.state_dict()[name], tensor), name


def test_a_pruned_layer_is_asked_for(variant, checkpoint, batch):
    pruned = load_pruned(checkpoint)
    for ask in (
        lambda: pruned.set_active_layers(None),
        lambda: pruned.set_active_layers(NUM_LAYERS),
        lambda: pruned.set_active_layers([0, 1, 2, 3]),
        lambda: outputs_of(pruned, batch, num_active_layers=NUM_LAYERS),
        lambda: outputs_of(pruned, batch, active_layers=[0, 1, 2, 3]),
        lambda: pruned.to_static(NUM_LAYERS),
    ):
        with pytest.raises(ValueError, match=ABSENT):
            ask()
    assert pruned.active_layers == (0, 3)
    pruned.set_active_layers(1)
    assert pruned.active_layers == (0,)
    with pytest.raises(ValueError, match="active_layers must be strictly ascending layer indices from 0 to 3"):
        pruned.set_active_layers([4])


def test_saved_and_loaded_again(variant, checkpoint, batch, tmp_path):
    pruned = load_pruned(checkpoint, num_active_layers=3)
    pruned.save_pretrained(tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["pruned_layers"] == [1]
    again, loading = type(pruned).from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(loading.values()), loading
    assert again.config.present_layers == again.active_layers == (0, 2, 3)
    expected = outputs_of(pruned, batch).logits
    torch.testing.assert_close(outputs_of(again, batch).logits, expected, atol=0, rtol=0)
    fewer = type(pruned).from_pretrained(tmp_path / "pruned", num_active_layers=2, prune_inactive_layers=True)
    assert fewer.config.pruned_layers == [1, 2] and fewer.num_parameters() < again.num_parameters()
    with pytest.raises(ValueError, match=r"Layers \[0, 1, 2, 3\] cannot run: \[1\] were pruned"):
        type(pruned).from_pretrained(tmp_path / "pruned", num_active_layers=None)


@pytest.mark.parametrize("variant", ["wavlm", "conformer-relative"])
def test_every_way_in(variant, tmp_path, batch):
    whole, stock = make_dynamic(variant), make_stock(variant)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    stock.save_pretrained(tmp_path / "stock")
    build_character_processor(["abcdefghi"]).save_pretrained(tmp_path / "sharded")
    depth = {"num_active_layers": 2, "prune_inactive_layers": True}
    config = type(whole.config).from_pretrained(tmp_path / "stock", num_active_layers=2)
    models = [
        AutoModelForCTC.from_pretrained(tmp_path / "sharded", **depth),
        type(whole).from_pretrained(tmp_path / "stock", **depth),
        type(whole).from_pretrained(tmp_path / "stock", config=config, prune_inactive_layers=True),
        type(whole).from_pretrained(tmp_path / "stock", config=stock.config, **depth),
        pipeline("automatic-speech-recognition", model=str(tmp_path / "sharded"), model_kwargs=depth).model,
        type(whole)(type(whole.config)(**{**config.to_dict(), "pruned_layers": [1, 2]})).eval(),
    ]
    assert config.pruned_layers is None, "the caller's configuration must stay as it is"
    models[-1].load_state_dict(models[0].state_dict())
    expected = outputs_of(whole, batch, num_active_layers=2).logits
    for model in models:
        assert model.config.pruned_layers == [1, 2]
        torch.testing.assert_close(outputs_of(model, batch).logits, expected, atol=0, rtol=0)
    base = AutoModel.from_pretrained(tmp_path / "sharded", **depth)
    assert base.config.pruned_layers == [1, 2] and base.num_parameters() < whole.base_model.num_parameters()
    everything = AutoModelForCTC.from_pretrained(tmp_path / "sharded", prune_inactive_layers=True)
    assert everything.config.pruned_layers is None and everything.num_active_layers == NUM_LAYERS


def test_tensors_of_pruned_layers_are_not_read(tmp_path, batch):
    """They are not numbers here, and of a shape that would fail if they were wanted."""
    whole = make_dynamic("wavlm")
    whole.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        if ".layers.0." in name and "rel_attn_embed" not in name:
            tensors[name] = torch.full((1, 2, 3), torch.nan)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    pruned, loading = type(whole).from_pretrained(
        tmp_path, active_layers=[2], prune_inactive_layers=True, output_loading_info=True
    )
    assert not any(loading.values()), loading
    expected = outputs_of(whole, batch, active_layers=[2]).logits
    torch.testing.assert_close(outputs_of(pruned, batch).logits, expected, atol=0, rtol=0)


def test_missing_and_unexpected_tensors_are_still_reported(tmp_path):
    whole = make_dynamic("wavlm")
    whole.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["wavlm.encoder.surprise"] = tensors.pop("lm_head.bias")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, loading = type(whole).from_pretrained(
        tmp_path, num_active_layers=2, prune_inactive_layers=True, output_loading_info=True
    )
    assert loading["missing_keys"] == {"lm_head.bias"}
    assert loading["unexpected_keys"] == {"wavlm.encoder.surprise"}


def test_gradients_and_flops_are_those_of_the_static_model(variant, checkpoint, batch):
    pruned = load_pruned(checkpoint, active_layers=[1, 2]).train()
    if hasattr(pruned, "freeze_batch_norm"):
        pruned.freeze_batch_norm()
    pruned(**batch).logits.sum().backward()
    # `pos_conv_embed` of the Conformer and SpecAugment's mask are there but unused, in the stock models too
    without = [name for name, parameter in pruned.named_parameters() if parameter.grad is None]
    assert all("pos_conv_embed" in name or "masked_spec_embed" in name for name in without), without
    static = make_dynamic(variant).to_static([1, 2])
    counts = []
    for model in (pruned.eval(), static):
        model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
        with FlopCounterMode(display=False) as counter:
            outputs_of(model, batch)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_training(tmp_path):
    make_dynamic("wavlm-stable").save_pretrained(tmp_path / "whole")
    pruned = load_pruned(tmp_path / "whole")
    message = r"DLD trains every layer, and \[1, 2\] of the student were pruned.*with CTCTrainer"
    with pytest.raises(ValueError, match=message):
        DLDTrainer(pruned, DLDTrainingArguments(str(tmp_path), use_cpu=True, kl_weight=0.0))
    samples = np.random.default_rng(0).standard_normal(6000).astype(np.float32)
    processor = build_character_processor(["abcdefghi"])
    trainer = CTCTrainer(
        model=pruned,
        args=CTCTrainingArguments(
            str(tmp_path / "out"), use_cpu=True, max_steps=2, learning_rate=1e-2, train_sampling_strategy="random"
        ),
        train_dataset=[{"audio": samples, "labels": [3, 4], "input_length": 6000}] * 4,
        data_collator=DataCollatorCTC(processor),
        processing_class=processor,
    )
    before = pruned.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(pruned.lm_head.weight, before)
    saved = sorted((tmp_path / "out").glob("checkpoint-*"))[-1]
    again = type(pruned).from_pretrained(saved)
    assert again.config.present_layers == (0, 3) and torch.equal(again.lm_head.weight, pruned.lm_head.weight)


@pytest.mark.parametrize("wrong", [[], [4], [2, 1], "12", 3])
def test_impossible_pruned_layers(wrong):
    with pytest.raises(ValueError, match="pruned_layers must be strictly ascending layer indices from 0 to 3, at le"):
        make_dynamic("wavlm", pruned_layers=wrong)
