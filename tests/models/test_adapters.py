"""LoRA with PEFT on the dynamic models, attention included: gradients, merging, depths, saving and loading."""

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, make_dynamic, make_stock
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCTC, pipeline

from hf_dld import build_character_processor, lora_config
from hf_dld.evaluation.cost import count_parameters

ALL = tuple(range(NUM_LAYERS))
TASK = "automatic-speech-recognition"
TWO_VARIANTS = pytest.mark.parametrize("variant", ["wavlm-stable", "conformer-relative"])


def adapted(model, **options):
    """In eval mode, with adapters that do something: PEFT starts them at zero."""
    torch.manual_seed(1)
    model = get_peft_model(model, lora_config(model, r=3, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model, batch, **depth):
    return model(**batch, **depth).logits


@pytest.fixture
def saved(variant, tmp_path):
    """The folder of an adapter whose base is saved as a dynamic checkpoint, with its model and both bases."""
    processor = build_character_processor(["abcdefghi"])
    model = make_dynamic(variant)
    model.save_pretrained(tmp_path / "base")
    make_stock(variant).save_pretrained(tmp_path / "stock")
    model = adapted(type(model).from_pretrained(tmp_path / "base"))
    for folder in ("base", "stock", "adapter"):
        processor.save_pretrained(tmp_path / folder)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model


@pytest.mark.parametrize("layers", [ALL, (1, 3)])
def test_every_adapter_of_an_active_layer_learns(variant, batch, layers):
    model = adapted(make_dynamic(variant))
    targets = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(targets) == NUM_LAYERS * 4 * 2, "query, key, value and output of each layer, two matrices each"
    model(**batch, active_layers=layers).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name and any(f".layers.{index}." in name for index in layers):
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_merging_changes_nothing_but_the_base_does_not_answer(variant, batch):
    base = logits(make_dynamic(variant), batch)
    model = adapted(make_dynamic(variant))
    expected = {layers: logits(model, batch, active_layers=layers) for layers in (ALL, (0, 2), (3,))}
    assert (expected[ALL] - base).abs().max() > 1e-2
    model.set_active_layers((0, 2))
    merged = model.merge_and_unload()
    assert type(merged) is type(make_dynamic(variant)) and merged.active_layers == (0, 2)
    assert not any("lora" in name for name in merged.state_dict())
    for layers, wanted in expected.items():
        torch.testing.assert_close(logits(merged, batch, active_layers=layers), wanted, atol=2e-5, rtol=1e-4)
    static = merged.to_static()
    torch.testing.assert_close(logits(static, batch), expected[0, 2], atol=2e-5, rtol=1e-4)


def test_depth_through_the_wrapper(variant, batch):
    model = adapted(make_dynamic(variant))
    expected = logits(model, batch, active_layers=[0, 3])
    assert not torch.allclose(expected, logits(model, batch), atol=1e-3)
    assert logits(model, batch, num_active_layers=2).equal(expected)
    model.set_active_layers(2)
    assert model.active_layers == model.get_base_model().active_layers == (0, 3) and model.num_active_layers == 2
    assert logits(model, batch).equal(expected)
    with pytest.raises(ValueError, match="from 1 to 4.*; got 5"):
        model(**batch, num_active_layers=5)
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    plain = count_parameters(make_dynamic(variant), (0, 3))
    assert count_parameters(model.get_base_model(), (0, 3)) == plain + adapters // 2


def test_saved_adapters_load_again(saved, batch):
    folder, model = saved
    expected = {depth: logits(model, batch, num_active_layers=depth) for depth in (2, 4)}
    model_class, adapter = type(model.get_base_model()), folder / "adapter"
    assert {path.name for path in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    integrated = model_class.from_pretrained(folder / "base")
    integrated.load_adapter(str(adapter))
    loaded = {
        "PEFT": PeftModel.from_pretrained(model_class.from_pretrained(folder / "base"), adapter),
        "PEFT on stock": PeftModel.from_pretrained(model_class.from_pretrained(folder / "stock"), adapter),
        "load_adapter": integrated,
        "the class": model_class.from_pretrained(adapter, num_active_layers=4),
        "the Auto class": AutoModelForCTC.from_pretrained(adapter),
    }
    for how, other in loaded.items():
        for depth, wanted in expected.items():
            torch.testing.assert_close(
                logits(other.eval(), batch, num_active_layers=depth), wanted, msg=lambda m, h=how: f"{h}: {m}"
            )


@TWO_VARIANTS
def test_pipelines(saved):
    folder, model = saved
    samples = np.random.default_rng(0).standard_normal(12_000).astype(np.float32)
    processor = build_character_processor(["abcdefghi"])
    options = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    recognisers = [
        pipeline(TASK, model=str(folder / "adapter"), num_active_layers=2),
        pipeline(TASK, model=model, num_active_layers=2, **options),
    ]
    texts = [recognise(samples)["text"] for recognise in recognisers]
    deep = recognisers[0](samples, num_active_layers=4)["text"]
    merged = pipeline(TASK, model=model.merge_and_unload(), num_active_layers=2, **options)
    assert len({*texts, merged(samples)["text"]}) == 1
    assert merged(samples, num_active_layers=4)["text"] == deep != texts[0]
    plain = pipeline(TASK, model=str(folder / "base"), num_active_layers=2)(samples)["text"]
    assert plain != texts[0], "the adapters were heard"


@TWO_VARIANTS
def test_pipeline_of_an_adapter_on_a_stock_checkpoint(saved):
    """Transformers loads a stock base as the stock class, whose attention bypasses the adapters: not here."""
    folder, model = saved
    samples = np.random.default_rng(0).standard_normal(12_000).astype(np.float32)
    expected = pipeline(TASK, model=str(folder / "adapter"))(samples, num_active_layers=2)["text"]
    base = type(model.get_base_model()).from_pretrained(folder / "stock")
    adapted(base).save_pretrained(folder / "adapter")
    recognise = pipeline(TASK, model=str(folder / "adapter"), num_active_layers=2)
    assert recognise(samples)["text"] == expected
    assert type(recognise.model) is type(base)
    assert type(pipeline(TASK, model=str(folder / "stock")).model) is base.stock_class


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"r": 0}, "lora_r must be an integer of at least 1.*; got 0"),
            ({"r": -1}, "lora_r must be an integer of at least 1.*; got -1"),
            ({"r": True}, "lora_r must be an integer of at least 1.*; got True"),
            ({"lora_alpha": 0}, "lora_alpha must be above 0.*; got 0"),
            ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1; got 1.0"),
            (
                {"target_modules": ["q_proj", "linear_q"]},
                "DLDWavLMForCTC has no module called linear_q; its encoder layers have gru_rel_pos_linear.*q_proj",
            ),
            ({"target_modules": ["attention"]}, "has no module called attention"),
            ({"target_modules": ["proj"]}, "has no module called proj;"),
            ({"target_modules": []}, "has no module called nothing"),
        ],
    )
    def test_lora_config(self, options, message):
        with pytest.raises(ValueError, match=message):
            lora_config(make_dynamic("wavlm"), **options)

    def test_what_it_makes(self):
        config = lora_config(make_dynamic("conformer-rotary"), r=4, modules_to_save=["lm_head"])
        assert isinstance(config, LoraConfig) and (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)
        assert config.target_modules == {"linear_q", "linear_k", "linear_v", "linear_out"}
        targets = ["attention.q_proj", "output_dense"]
        assert lora_config(make_dynamic("wavlm"), target_modules=targets).target_modules == set(targets)
