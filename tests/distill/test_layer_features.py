"""Layer maps, and features collected by layer index."""

import pytest
import torch
from conftest import NUM_LAYERS, make_stock
from torch import nn
from transformers import WhisperConfig, WhisperModel

from hf_dld.distill.layer_features import collect_features, encoder_layers, feed_forward, map_layers

from .conftest import DYNAMIC, OPTIONS, make_encoder


@pytest.mark.parametrize("num_student_layers", range(1, 49))
def test_map_for_all_pairs_up_to_48_layers(num_student_layers):
    for num_teacher_layers in range(1, 49):
        layers = map_layers(num_student_layers, num_teacher_layers)
        assert list(layers) == list(range(num_student_layers))
        assert list(layers.values()) == sorted(layers.values())
        assert layers[num_student_layers - 1] == num_teacher_layers - 1, "the last predicts the last"
        assert all(0 <= target < num_teacher_layers for target in layers.values())
        if num_student_layers <= num_teacher_layers:
            assert len(set(layers.values())) == num_student_layers, "no teacher layer twice"
        for index, target in layers.items():
            exact = (index + 1) * num_teacher_layers / num_student_layers
            assert abs(target + 1 - exact) <= 0.5 or target == 0
        for num_distilled in {1, num_student_layers // 2 or 1, num_student_layers}:
            some = map_layers(num_student_layers, num_teacher_layers, num_distilled)
            assert len(some) == num_distilled and some.items() <= layers.items()
            assert num_student_layers - 1 in some


def test_map_by_hand():
    assert map_layers(12, 24, 4) == {2: 5, 5: 11, 8: 17, 11: 23}, "USAD's example, counted from 0"
    assert map_layers(4, 12) == {0: 2, 1: 5, 2: 8, 3: 11}
    assert map_layers(3, 4) == {0: 0, 1: 2, 2: 3}
    assert map_layers(6, 12, 1) == {5: 11}


@pytest.mark.parametrize("num_distilled", [0, -1, 5])
def test_impossible_number_of_distilled_layers(num_distilled):
    message = f"num_distilled_layers must be from 1 to 4, because the student has 4 layers.*; got {num_distilled}"
    with pytest.raises(ValueError, match=message):
        map_layers(4, 12, num_distilled)


def run(model, **kwargs):
    torch.manual_seed(0)
    name = model.main_input_name
    shape = (2, 30, 160) if name == "input_features" else (2, 8000)
    return model(**{name: torch.randn(shape)}, **kwargs)


def test_hidden_features_are_the_hidden_states(kind):
    model = make_encoder(kind)
    with torch.no_grad(), collect_features(model, range(NUM_LAYERS)) as features:
        output = run(model, output_hidden_states=True)
    assert sorted(features) == list(range(NUM_LAYERS))
    for index in range(NUM_LAYERS - 1):  # what follows the last layer may be normalised
        torch.testing.assert_close(features[index], output.hidden_states[index + 1], rtol=0, atol=0)


def test_ffn_features_come_before_the_residual(kind):
    model = make_encoder(kind)
    layer = encoder_layers(model)[2]
    with torch.no_grad():
        with collect_features(model, [2], "ffn") as features:
            before = run(model).last_hidden_state
        last = [module for module in feed_forward(layer).modules() if isinstance(module, nn.Linear)][-1]
        for parameter in (last.weight, last.bias):
            parameter.zero_()
        with collect_features(model, [2], "ffn") as zeroed:
            after = run(model).last_hidden_state
    assert features[2].shape == before.shape and features[2].any() and not zeroed[2].any()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("kind", DYNAMIC)
def test_a_skipped_layer_has_no_entry_and_shifts_nothing(kind):
    model = make_encoder(kind)
    with torch.no_grad(), collect_features(model, [0, 1, 3]) as features:
        output = run(model, active_layers=[0, 2, 3], output_hidden_states=True)
    assert sorted(features) == [0, 3]
    torch.testing.assert_close(features[0], output.hidden_states[1], rtol=0, atol=0)


def test_stock_layerdrop_leaves_no_entry():
    model = make_encoder("wavlm", layerdrop=0.9).train()
    counts = set()
    for seed in range(5):
        torch.manual_seed(seed)
        with collect_features(model, range(NUM_LAYERS)) as features:
            model(torch.randn(1, 8000))
        counts.add(len(features))
    assert counts != {NUM_LAYERS}


def test_hooks_are_removed_even_after_an_error():
    model = make_encoder("hubert")
    with pytest.raises(RuntimeError, match="stop"), collect_features(model, [0], "ffn"):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())


def test_a_head_on_top_changes_nothing():
    assert encoder_layers(make_stock("wavlm", **OPTIONS)) is not None


def test_no_speech_encoder():
    config = WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                           decoder_attention_heads=2, vocab_size=9, pad_token_id=0, encoder_ffn_dim=8,
                           decoder_ffn_dim=8, num_mel_bins=8, max_source_positions=8, max_target_positions=8,
                           bos_token_id=0, eos_token_id=0, decoder_start_token_id=0)  # fmt: skip
    with pytest.raises(ValueError, match="WhisperModel .whisper. cannot be distilled layer by layer"):
        encoder_layers(WhisperModel(config))
