"""One matrix of behaviours over every architecture variant."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, VOCAB_SIZE, make_dynamic, make_stock
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from hf_dld import DLDWavLMConfig, DLDWavLMForCTC

ALL_SUBSETS = [
    layers for count in range(1, NUM_LAYERS + 1) for layers in itertools.combinations(range(NUM_LAYERS), count)
]


def logits_of(model, batch, **kwargs):
    with torch.no_grad():
        return model(**batch, **kwargs).logits


@pytest.mark.parametrize("masked", [False, True])
def test_full_depth_equals_stock(variant, batch, masked):
    if not masked:
        batch.pop("attention_mask")
    stock, dynamic = make_stock(variant), make_dynamic(variant)
    torch.testing.assert_close(logits_of(dynamic, batch), logits_of(stock, batch), atol=1e-5, rtol=0)


def test_gradients_equal_stock(variant, batch):
    gradients = []
    for model in (make_stock(variant, ctc_zero_infinity=True), make_dynamic(variant)):
        model(**batch, labels=torch.tensor([[1, 2, 3], [4, 5, -100]])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # the gradient of a key's bias is 0 but for rounding: softmax does not see it
        error, size = (gradients[1][name] - gradient).norm(), gradient.norm()
        assert error < 1e-4 * size + 1e-7, f"{name}: {error} of {size}"


def test_stock_checkpoint_loads_and_round_trips(variant, batch, tmp_path):
    stock = make_stock(variant)
    stock.save_pretrained(tmp_path / "stock")
    dynamic_class = type(make_dynamic(variant))
    dynamic, loading = dynamic_class.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(loading.values()), loading
    expected = logits_of(stock, batch)
    torch.testing.assert_close(logits_of(dynamic, batch), expected, atol=1e-5, rtol=0)

    dynamic.save_pretrained(tmp_path / "dynamic")
    reloaded = dynamic_class.from_pretrained(tmp_path / "dynamic")
    torch.testing.assert_close(logits_of(reloaded, batch), logits_of(dynamic, batch), atol=0, rtol=0)
    back, loading = type(stock).from_pretrained(tmp_path / "dynamic", output_loading_info=True)
    assert not any(loading.values()), loading
    torch.testing.assert_close(logits_of(back, batch), expected, atol=0, rtol=0)


def test_loading_a_stock_checkpoint_warns_of_nothing(variant, tmp_path, capfd):
    make_stock(variant).save_pretrained(tmp_path)
    capfd.readouterr()
    type(make_dynamic(variant)).from_pretrained(tmp_path)
    assert "model of type" not in capfd.readouterr().err


def test_old_weight_norm_names_load(variant, batch, tmp_path):
    """Checkpoints from before torch 2.1 name the weight norm of the position convolution weight_g and weight_v."""
    stock = make_stock(variant)
    stock.config.save_pretrained(tmp_path)
    old_names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state_dict = {}
    for name, tensor in stock.state_dict().items():
        for new, old in old_names.items():
            name = name.replace(new, old)
        state_dict[name] = tensor
    assert any("weight_g" in name for name in state_dict)
    save_file(state_dict, tmp_path / "model.safetensors", metadata={"format": "pt"})
    dynamic, loading = type(make_dynamic(variant)).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    torch.testing.assert_close(logits_of(dynamic, batch), logits_of(stock, batch), atol=1e-5, rtol=0)


def test_every_subset_equals_the_stock_model_of_those_layers(variant, batch):
    dynamic, stock_class = make_dynamic(variant), type(make_stock(variant))
    for layers in ALL_SUBSETS:
        static = dynamic.to_static(layers)
        assert type(static) is stock_class
        assert static.config.num_hidden_layers == len(layers)
        torch.testing.assert_close(
            logits_of(dynamic, batch, active_layers=layers), logits_of(static, batch), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("options", [{}, {"add_adapter": True}])
@pytest.mark.parametrize("masked", [False, True])
def test_layers_run_in_pieces_give_the_same_logits(variant, batch, masked, options):
    if not masked:
        batch.pop("attention_mask")
    model = make_dynamic(variant, **options)
    run_layers = model.base_model.encoder.run_layers
    with torch.no_grad():
        start, layer_inputs = model.before_layers(**batch)
        first = run_layers(start, (0, 2), **layer_inputs)
        for rest in ((), (3,)):
            logits = model.ctc_logits(run_layers(first, rest, **layer_inputs))
            assert torch.equal(logits, logits_of(model, batch, active_layers=(0, 2, *rest)))


def test_layers_run_in_pieces_are_masked_in_training_alike(variant, batch):
    model = make_dynamic(variant, mask_time_prob=0.5, mask_time_length=2, hidden_dropout=0.2).train()
    logits = []
    for in_pieces in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        if in_pieces:
            start, layer_inputs = model.before_layers(**batch)
            logits.append(model.ctc_logits(model.base_model.encoder.run_layers(start, (1, 2), **layer_inputs)))
        else:
            logits.append(model(**batch, active_layers=(1, 2)).logits)
    assert torch.equal(*logits)


def test_static_model_owns_its_weights(variant):
    dynamic = make_dynamic(variant)
    static = dynamic.to_static(2)
    before = {name: tensor.clone() for name, tensor in static.state_dict().items()}
    with torch.no_grad():
        for parameter in dynamic.parameters():
            parameter.zero_()
    for name, tensor in static.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)


def test_skipped_layers_get_no_gradient(variant, batch):
    model = make_dynamic(variant).train()
    model(**batch, active_layers=[1, 3]).logits.sum().backward()
    for name, parameter in model.named_parameters():
        if ".layers.0." in name or ".layers.2." in name:
            # WavLM's relative position embedding lives in layer 0 and serves them all
            assert (parameter.grad is not None) == name.endswith("rel_attn_embed.weight"), name


def flops(model, batch, **kwargs):
    with FlopCounterMode(display=False) as counter:
        logits_of(model, batch, **kwargs)
    return counter.get_total_flops()


def test_skipping_saves_exactly_its_share_of_the_flops(variant, batch):
    model = make_dynamic(variant)
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    static = {}
    for count in range(1, NUM_LAYERS + 1):
        stock = model.to_static(count)
        stock.set_attn_implementation("eager")
        static[count] = flops(stock, batch)
    layer = (static[NUM_LAYERS] - static[1]) / (NUM_LAYERS - 1)
    assert layer > 0
    for layers in ALL_SUBSETS:
        counted = flops(model, batch, active_layers=layers)
        assert counted == static[len(layers)] == static[NUM_LAYERS] - layer * (NUM_LAYERS - len(layers))


def test_hidden_states_keep_their_indices(variant, batch):
    model = make_dynamic(variant)
    with torch.no_grad():
        full = model(**batch, output_hidden_states=True).hidden_states
        states = model(**batch, active_layers=[0, 2], output_hidden_states=True).hidden_states
        stock = make_stock(variant)(**batch, output_hidden_states=True).hidden_states
        last = model(**batch, active_layers=[0, 2], output_hidden_states=[-1]).hidden_states
    assert len(states) == len(full) == len(stock) == NUM_LAYERS + 1
    for ours, theirs in zip(full, stock, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(states[1], full[1], atol=0, rtol=0)
    torch.testing.assert_close(states[2], states[1], atol=0, rtol=0)
    assert not torch.equal(states[3], states[2])
    torch.testing.assert_close(states[4], states[3], atol=0, rtol=0)
    torch.testing.assert_close(last[-1], states[-1], atol=0, rtol=0)


def test_precedence_call_over_setting(variant, batch):
    model = make_dynamic(variant, num_active_layers=2)
    assert model.active_layers == (0, 3) and model.num_active_layers == 2
    two, one, three = (logits_of(model, batch, num_active_layers=k) for k in (2, 1, 3))
    torch.testing.assert_close(logits_of(model, batch), two, atol=0, rtol=0)
    model.set_active_layers(1)
    torch.testing.assert_close(logits_of(model, batch), one, atol=0, rtol=0)
    torch.testing.assert_close(logits_of(model, batch, num_active_layers=3), three, atol=0, rtol=0)
    chosen = logits_of(model, batch, active_layers=[1, 2], num_active_layers=3)
    model.set_active_layers([1, 2])
    torch.testing.assert_close(logits_of(model, batch), chosen, atol=0, rtol=0)
    model.set_active_layers(None)
    assert model.active_layers == tuple(range(NUM_LAYERS))


def test_setting_is_saved_and_overridden_at_load(variant, batch, tmp_path):
    model = make_dynamic(variant)
    model.set_active_layers([1, 2])
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).active_layers == (1, 2)
    assert type(model).from_pretrained(tmp_path, num_active_layers=2).active_layers == (0, 3)
    assert type(model).from_pretrained(tmp_path, active_layers=[0, 1, 2]).num_active_layers == 3
    assert type(model).from_pretrained(tmp_path, num_active_layers=None).num_active_layers == NUM_LAYERS


@pytest.mark.parametrize("wrong", [0, -1, NUM_LAYERS + 1, "six", 2.5, True])
def test_impossible_counts(variant, batch, wrong, tmp_path):
    model = make_dynamic(variant)
    message = f"num_active_layers must be an integer from 1 to {NUM_LAYERS}, because .*; got {wrong!r}"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        logits_of(model, batch, num_active_layers=wrong)
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path, num_active_layers=wrong)
    with pytest.raises(ValueError, match=message):
        type(model.config)(num_hidden_layers=NUM_LAYERS, num_active_layers=wrong)
    with pytest.raises(ValueError, match=message):
        model.set_active_layers(wrong)
    assert model.num_active_layers == NUM_LAYERS, "a refused setting must change nothing"


@pytest.mark.parametrize("count", [np.int64(3), torch.tensor(3)])
def test_counts_of_other_libraries(variant, count):
    """As they come out of a table or a tensor."""
    model = make_dynamic(variant)
    model.set_active_layers(count)
    assert model.active_layers == (0, 2, 3) == model.config.resolve_depth(count)
    assert model.to_static(count).config.num_hidden_layers == 3
    json.loads(model.config.to_json_string())
    model.set_active_layers(torch.tensor([3]))
    assert model.active_layers == (3,), "which ones, even if it is one"


@pytest.mark.parametrize(
    "depth, expected",
    [
        ({"num_active_layers": np.int64(3)}, (0, 2, 3)),
        ({"active_layers": range(0, 4, 2)}, (0, 2)),
        ({"active_layers": np.array([0, 2])}, (0, 2)),
        ({"active_layers": torch.tensor([0, 2])}, (0, 2)),
        ({"layer_selection": "schedule", "depth_schedule": [np.arange(k) for k in (1, 2, 3, 4)]}, (0, 1, 2, 3)),
    ],
)
def test_depths_of_other_libraries_are_loaded_and_saved(tmp_path, depth, expected):
    make_dynamic("wavlm").save_pretrained(tmp_path)
    model = DLDWavLMForCTC.from_pretrained(tmp_path, **depth)
    model.save_pretrained(tmp_path / "again")
    assert DLDWavLMForCTC.from_pretrained(tmp_path / "again").active_layers == model.active_layers == expected
    json.loads(DLDWavLMConfig(**{**model.config.to_dict(), **depth}).to_json_string())


def test_a_set_names_layers(variant):
    model = make_dynamic(variant)
    model.set_active_layers({0, 3})
    assert model.active_layers == (0, 3)


def test_rotary_positions_of_another_pass_are_not_used(batch):
    """Stock encoders keep those of the last length, in the precision that it had and without a gradient."""
    model = make_dynamic("conformer-rotary")
    expected = logits_of(model, batch)
    halved = {**batch, "input_values": batch["input_values"].bfloat16()}
    model.bfloat16()
    with torch.inference_mode():
        model(**halved)
    model.float().load_state_dict(make_dynamic("conformer-rotary").state_dict())
    logits = model(**batch).logits
    torch.testing.assert_close(logits.detach(), expected, atol=1e-5, rtol=0)
    logits.sum().backward()


@pytest.mark.parametrize("wrong", [[], [NUM_LAYERS], [-1, 2], [2, 1], [1, 1], ["a"], [0.5], "12", 3.0])
def test_impossible_layers(variant, batch, wrong):
    model = make_dynamic(variant)
    message = rf"active_layers must be strictly ascending layer indices from 0 to {NUM_LAYERS - 1}, at least one"
    with pytest.raises(ValueError, match=message):
        logits_of(model, batch, active_layers=wrong)


def test_repr_tells_the_active_layers(variant):
    model = make_dynamic(variant, num_active_layers=2)
    assert "active layers: 0, 3 (2 of 4)" in repr(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(variant, batch, dtype, tmp_path):
    """Equal to the stock model in the same precision (torch's CPU kernels for it are not always close to float32)."""
    model = make_dynamic(variant)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=dtype)
    # short: on some CPUs torch 2.13 never comes back from a float16 depthwise convolution over 49 frames
    batch = {
        "input_values": batch["input_values"][:, :3200].to(dtype),
        "attention_mask": batch["attention_mask"][:, :3200],
    }
    logits, expected = logits_of(half, batch, active_layers=[1, 3]), logits_of(half.to_static([1, 3]), batch)
    assert logits.dtype == expected.dtype == dtype
    assert (logits.float() - expected.float()).norm() < 0.02 * expected.float().norm()


def test_bfloat16_autocast_trains(variant, batch):
    model = make_dynamic(variant).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch, active_layers=[0, 2], labels=torch.tensor([[1, 2], [3, -100]])).loss
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(model.lm_head.weight.grad).all()


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1, 3], [2]])
def test_activation_checkpointing_changes_nothing(variant, batch, layers):
    gradients = []
    for checkpointing in (False, True):
        # batch statistics would be gathered twice, so the Conformer's are frozen, as they are by default in training
        model = make_dynamic(variant, hidden_dropout=0.1, attention_dropout=0.1).train()
        if hasattr(model, "freeze_batch_norm"):
            model.freeze_batch_norm()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        np.random.seed(3)  # SpecAugment draws from numpy
        model(**batch, active_layers=layers).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_add_adapter(variant, batch):
    stock, dynamic = (make(variant, add_adapter=True, num_adapter_layers=2) for make in (make_stock, make_dynamic))
    expected = logits_of(stock, batch)
    torch.testing.assert_close(logits_of(dynamic, batch), expected, atol=1e-5, rtol=0)
    random.seed(0)
    dynamic.train()  # stock adapters drop layers at random here, and with them half of the frames
    shapes = {tuple(dynamic(**batch, num_active_layers=2).logits.shape) for _ in range(20)}
    assert shapes == {tuple(expected.shape)}


def test_attentions_of_the_active_layers(variant, batch):
    model = make_dynamic(variant)
    model.set_attn_implementation("eager")
    stock = make_stock(variant, attn_implementation="eager")
    with torch.no_grad():
        output = model(**batch, active_layers=[0, 2], output_attentions=True)
        full = model(**batch, output_attentions=True)
        expected = stock(**batch, output_attentions=True)
    frames = output.logits.shape[1]
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, frames, frames)] * 2
    for ours, theirs in zip(full.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours.sum(-1), torch.ones(2, 2, frames), atol=1e-5, rtol=0)
        # stock WavLM gives every head the mean over the heads
        torch.testing.assert_close(ours.mean(1), theirs.mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(full.logits, expected.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("probabilities", [(0.3, 0.0), (0.0, 0.3), (0.3, 0.3)])
def test_spec_augment(variant, batch, probabilities):
    time, feature = probabilities
    model = make_dynamic(
        variant,
        mask_time_prob=time,
        mask_time_length=2,
        mask_feature_prob=feature,
        mask_feature_length=2,
        hidden_dropout=0.0,
    )
    plain = logits_of(model, batch, num_active_layers=2)
    augmented = logits_of(model.train(), batch, num_active_layers=2)
    assert torch.isfinite(augmented).all() and not torch.allclose(plain, augmented, atol=1e-3)


def test_stock_layerdrop_is_never_applied(variant, batch):
    model = make_dynamic(
        variant,
        layerdrop=1.0,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        conformer_conv_dropout=0.0,
        mask_time_prob=0.0,
    )
    expected = logits_of(model, batch)
    if hasattr(model, "freeze_batch_norm"):
        model.freeze_batch_norm()
    torch.testing.assert_close(logits_of(model.train(), batch), expected, atol=1e-5, rtol=0)


def test_compile_at_a_fixed_depth_without_graph_breaks(variant, batch, own_process):
    own_process(compile_at_a_fixed_depth, variant, batch)


def compile_at_a_fixed_depth(variant, batch):
    model = make_dynamic(variant)
    expected = logits_of(model, batch, active_layers=(0, 2))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits_of(compiled, batch, active_layers=(0, 2)), expected, atol=1e-5, rtol=0)


def test_padding_is_not_attended_to(batch):
    """Only layer-norm WavLM is independent of padding in stock Transformers, so it must stay so here."""
    model = make_dynamic("wavlm-stable")
    alone = {name: tensor[1:, :5000] for name, tensor in batch.items()}
    frames = model._get_feat_extract_output_lengths(5000)
    for layers in ALL_SUBSETS:
        together = logits_of(model, batch, active_layers=layers)[1:, :frames]
        torch.testing.assert_close(together, logits_of(model, alone, active_layers=layers), atol=1e-5, rtol=0)


@pytest.mark.parametrize("headless", [False, True])
def test_a_model_is_made_of_the_stock_configuration_too(variant, headless):
    stock, dynamic = make_stock(variant), make_dynamic(variant)
    model_class = type(dynamic.base_model if headless else dynamic)
    made = model_class(stock.config)
    assert type(made.config) is type(dynamic.config) and type(stock.config) is not type(dynamic.config)
    assert made.config.num_active_layers is None and made.num_active_layers == NUM_LAYERS
    names = (dynamic.base_model if headless else dynamic).state_dict().keys()
    assert made.state_dict().keys() == names


@pytest.mark.parametrize("wrong", ["stock", "dynamic"])
def test_a_model_of_another_kind_of_configuration(variant, wrong):
    ours, theirs = make_dynamic(variant), "wavlm" if "conformer" in variant else "conformer-relative"
    config = (make_stock if wrong == "stock" else make_dynamic)(theirs).config
    name = type(ours.config).__name__
    stock = name.removeprefix("DLD")
    message = f"{type(ours).__name__} is made from a {name} or {stock}; got a {type(config).__name__}."
    with pytest.raises(TypeError, match=message):
        type(ours)(config)


def test_vocabulary_size_is_needed():
    with pytest.raises(ValueError, match="A CTC model needs config.vocab_size"):
        make_dynamic("conformer-relative", vocab_size=None)
    assert make_dynamic("conformer-relative").lm_head.out_features == VOCAB_SIZE


def test_features_in_place_of_samples(variant, batch):
    model = make_dynamic(variant)
    features = model.extract_features(batch["input_values"])
    assert features.shape[:2] == (2, 8)
    for layers in ([0], [1, 3]):
        expected = model(**batch, active_layers=layers).logits
        given = model(**batch | {"input_values": features}, active_layers=layers).logits
        assert torch.equal(given, expected)
