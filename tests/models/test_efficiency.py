"""What the speed rests on, by count: operations that run and bytes that live, on any machine."""

from collections import Counter
from itertools import product

import pytest
import torch
from conftest import NUM_LAYERS, make_dynamic, make_stock
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import set_seed

from hf_dld.evaluation.cost import PeakTensorMemory
from hf_dld.models import pieces
from hf_dld.models.attention import shift_relative

WAVLM = ["wavlm", "wavlm-stable"]


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations(model, batch, **kwargs) -> Counter[str]:
    with torch.inference_mode():
        model(**batch, **kwargs)  # the Conformer keeps the rotary embedding of the length that it has seen last
        with Operations() as mode:
            model(**batch, **kwargs)
    return mode.counts


def peak_bytes(model, batch, training: bool = False) -> int:
    with torch.set_grad_enabled(training), PeakTensorMemory() as memory:
        model.train(training)(**batch)
    return memory.peak


def speech(seconds: float, batch_size: int = 2) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch_size, int(seconds * 16_000), generator=torch.Generator().manual_seed(0))}


def test_a_skipped_layer_launches_nothing(variant, batch):
    model = make_dynamic(variant)
    for layers in [(0,), (1, 3), (0, 1, 2)]:
        alone = make_dynamic(variant, num_hidden_layers=len(layers))
        assert operations(model, batch, active_layers=layers) == operations(alone, batch)


def test_a_change_of_depth_computes_nothing(variant):
    model = make_dynamic(variant)
    with Operations() as mode:
        for depth in range(1, NUM_LAYERS + 1):
            model.set_active_layers(depth)
    assert not mode.counts


@pytest.mark.parametrize("variant", WAVLM)
def test_the_position_bias_is_made_once(variant, batch):
    model = make_dynamic(variant)
    buckets = {depth: operations(model, batch, num_active_layers=depth)["aten.embedding.default"] for depth in (1, 4)}
    assert buckets == {1: 1, 4: 1}


class AttentionMasks(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.strides: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.scaled_dot_product_attention.default:
            self.strides.append(args[3].stride(-1))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", WAVLM)
def test_attention_need_not_copy_the_gated_bias(variant, batch):
    """The kernel copies a mask whose rows are not dense, a fifth of a pass at 20 s of audio, where no count sees it."""
    with torch.inference_mode(), AttentionMasks() as masks:
        make_dynamic(variant)(**batch)
    assert masks.strides == NUM_LAYERS * [1]


@pytest.mark.parametrize("variant", WAVLM)
@pytest.mark.parametrize("training", [False, True])
def test_wavlm_holds_less_than_stock(variant, training):
    options = {"mask_time_prob": 0.0, "layerdrop": 0.0}
    for seconds in (1.0, 4.0):
        batch = speech(seconds)
        ours = peak_bytes(make_dynamic(variant, **options), batch, training)
        stock = peak_bytes(make_stock(variant, **options), batch, training)
        assert ours < stock, (seconds, ours, stock)


@pytest.mark.parametrize("variant", WAVLM)
def test_no_attention_weights_are_kept(variant):
    """A layer's gated bias has a place for each pair of frames and head; weights would be as many again."""
    model = make_dynamic(variant, num_attention_heads=8)
    frames = int(model._get_feat_extract_output_lengths(4 * 16_000))
    square = 2 * 8 * frames**2 * 4  # bytes of (batch, heads, frames, frames)
    peaks = [peak_bytes(model, speech(seconds)) for seconds in (4.0, 8.0)]
    growth = (peaks[1] - peaks[0]) / (3 * square)  # four times the square, less the one before
    assert growth < 2, growth


@pytest.mark.parametrize("variant", WAVLM)
def test_long_audio_is_attended_to_a_few_heads_at_a_time(variant, monkeypatch):
    """The whole gated bias would be new memory in every layer, and out of the caches before it is used."""
    model, batch = make_dynamic(variant, num_attention_heads=4), speech(4.0)
    batch["attention_mask"] = torch.ones_like(batch["input_values"], dtype=torch.long)
    batch["attention_mask"][1, 40_000:] = 0
    frames = int(model._get_feat_extract_output_lengths(4 * 16_000))
    head = 2 * frames**2 * 4  # bytes of (batch, 1, frames, frames)
    calls, peaks, logits, weights = [], [], [], []
    for size in (4 * head, 3 * head, head):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        with torch.inference_mode(), AttentionMasks() as masks, PeakTensorMemory() as memory:
            logits.append(model(**batch).logits)
        calls.append(len(masks.strides) // NUM_LAYERS)
        peaks.append(memory.peak)
    assert calls == [1, 2, 4]
    assert peaks[2] < peaks[0] - 2 * head
    model.set_attn_implementation("eager")
    for size in (4 * head, 3 * head):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        with torch.inference_mode():
            weights.append(torch.stack(model(**batch, output_attentions=True).attentions))
    torch.testing.assert_close(logits[1:], logits[:1] * 2)
    torch.testing.assert_close(weights[1], weights[0])


def test_bfloat16_is_attended_to_by_products(variant, monkeypatch):
    """torch's fused kernel for CPUs takes as long in bfloat16 as in float32, or longer; products take half."""
    model, batch = make_dynamic(variant).to(torch.bfloat16), speech(2.0)
    batch["input_values"] = batch["input_values"].to(torch.bfloat16)
    logits = []
    for size in (pieces.PIECE_BYTES, 1):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        with torch.inference_mode(), Operations() as mode:
            logits.append(model(**batch).logits)
        assert not any("attention" in name for name in mode.counts)
    torch.testing.assert_close(logits[0], logits[1])
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        eager = model(**batch).logits
    assert (logits[0] - eager).norm() < 0.02 * eager.norm()
    with torch.inference_mode():
        attentions = model(**batch, output_attentions=True).attentions
    assert len(attentions) == NUM_LAYERS


def test_a_gradient_is_taken_through_products(variant):
    """torch's fused kernel for CPUs has none for a mask, and what it falls back to looks for rows without any key."""
    model, batch = make_dynamic(variant, attention_dropout=0.0), speech(1.0)
    batch["attention_mask"] = torch.ones_like(batch["input_values"], dtype=torch.long)
    batch["attention_mask"][1, 10_000:] = 0
    gradients = {}
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        with Operations() as mode:
            model(**batch).logits.sum().backward()
        assert not any("safe_softmax" in name or "attention" in name for name in mode.counts)
        gradients[attention] = {
            name: weight.grad
            for name, weight in model.named_parameters()
            if not name.endswith(("k_proj.bias", "linear_k.bias"))  # the softmax cancels them
        }
    torch.testing.assert_close(gradients["sdpa"], gradients["eager"], rtol=1e-4, atol=1e-4)


def test_dropout_of_attention_is_drawn_for_gradients(variant):
    model, batch = make_dynamic(variant, attention_dropout=0.5), speech(1.0)
    model.train()
    logits = {}
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        set_seed(0)
        logits[attention] = model(**batch).logits
    torch.testing.assert_close(logits["sdpa"], logits["eager"])
    assert (logits["sdpa"] - model.eval()(**batch).logits).norm() > 0.01 * logits["sdpa"].norm()


@given(frames=st.integers(1, 9), seed=st.integers(0, 99))
def test_scores_of_distances_become_those_of_keys_without_a_copy(frames, seed):
    distances = torch.randn(2, 3, frames, 2 * frames - 1, generator=torch.Generator().manual_seed(seed))
    wider = torch.nn.functional.pad(distances, (1, 1))
    for scores in (distances, wider[..., 1:-1]):  # a slice has another offset and other strides
        keys = shift_relative(scores)
        assert keys.untyped_storage().data_ptr() == scores.untyped_storage().data_ptr()
        for query, key in product(range(frames), repeat=2):
            assert keys[:, :, query, key].equal(distances[:, :, query, key - query + frames - 1])


@pytest.mark.parametrize("variant", WAVLM)
def test_a_gradient_or_an_exporter_sees_all_heads_at_once(variant, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    model, batch = make_dynamic(variant), speech(1.0)
    with Operations() as mode:
        model(**batch)
    assert sum(count for name, count in mode.counts.items() if "softmax" in name) == NUM_LAYERS
    with torch.no_grad():
        program = torch.export.export(model, (batch["input_values"],))
    attended = [node for node in program.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert len(attended) == NUM_LAYERS


def test_the_feature_encoder_holds_one_copy_of_its_longest_activation(variant):
    """Beside it there are the next convolution's output and small pieces, not a normalized and an activated one."""
    options = {"conv_dim": (64, 8, 8)}
    samples = speech(20.0, batch_size=1)["input_values"]
    longest = 64 * ((samples.shape[1] - 10) // 5 + 1) * 4  # bytes

    def peak(model):
        with torch.no_grad(), PeakTensorMemory() as memory:
            model.base_model.feature_extractor(samples)
        return memory.peak / longest

    assert peak(make_dynamic(variant, **options)) < 1.5
    assert peak(make_stock(variant, **options)) > 1.9


def test_norms_and_activations_overwrite_only_what_no_gradient_needs(variant):
    model = make_dynamic(variant)
    batch = speech(1.0)
    with torch.no_grad():
        expected = model(**batch).logits
    logits = model(**batch).logits
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()  # an overwritten input raises here
    assert all(parameter.grad is not None for parameter in model.base_model.feature_extractor.parameters())


def test_no_gradient_of_the_samples_is_computed_unless_asked_for(variant):
    """Stock feature encoders ask for it always, for checkpoints that are re-entered; it takes a twelfth of a step."""
    model, batch = make_dynamic(variant, mask_time_prob=0.0).train(), speech(1.0)
    parameters = {id(parameter) for parameter in model.parameters()}
    leaves, nodes = set(), [model(**batch).logits.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
        found = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= found
        nodes += found
    assert len(leaves) > 10 and leaves <= parameters
    batch["input_values"].requires_grad_()
    model(**batch).logits.sum().backward()
    assert batch["input_values"].grad.norm() > 0


def test_an_exporter_sees_plain_convolutions(variant):
    """Windows of samples and pieces of activations would be loops in a graph, or the length of the example."""
    encoder = make_dynamic(variant).base_model.feature_extractor
    with torch.no_grad():
        program = torch.export.export(encoder, (speech(1.0)["input_values"],))
    operations = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert sum(count for name, count in operations.items() if "conv" in name) == len(encoder.conv_layers)
    assert not any("copy_" in name or "unfold" in name for name in operations)
