"""The losses: values computed by hand, and rules that hold for all inputs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dld.distill.losses import (
    ctc_loss,
    frame_mask,
    info_nce_loss,
    kl_loss,
    l1_cosine_loss,
    truncate_posteriors,
    truncated_kl_loss,
)

VOCAB = 5


def logits_of(probabilities):
    return torch.tensor(probabilities, dtype=torch.float32).log()


def test_ctc_by_hand():
    # two frames, blank 0: the label 1 is emitted by (1, 1), (0, 1) and (1, 0)
    logits = logits_of([[[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]]])
    probability = 0.3 * 0.1 + 0.5 * 0.1 + 0.3 * 0.6
    loss = ctc_loss(logits, torch.tensor([2]), torch.tensor([[1, -100]]), blank_id=0)
    assert loss.item() == pytest.approx(-math.log(probability), rel=1e-6)
    # two labels, one path, divided by two
    loss = ctc_loss(logits, torch.tensor([2]), torch.tensor([[1, 2]]), blank_id=0)
    assert loss.item() == pytest.approx(-math.log(0.3 * 0.3) / 2, rel=1e-6)


def test_ctc_without_transcript_and_without_room_counts_nothing():
    logits = torch.randn(3, 4, VOCAB, requires_grad=True)
    labels = torch.tensor([[-100, -100, -100], [2, 2, 2], [1, -100, -100]])  # 2 2 2 needs 5 frames
    losses = ctc_loss(logits, torch.tensor([4, 4, 4]), labels, blank_id=0)
    assert losses[0] == losses[1] == 0 and losses[2] > 0
    losses.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:2].any() and logits.grad[2].any()


def test_ctc_of_a_batch_without_any_transcript():
    losses = ctc_loss(torch.randn(2, 4, VOCAB), torch.tensor([4, 3]), torch.full((2, 1), -100), blank_id=0)
    assert losses.tolist() == [0, 0]


def test_ctc_is_in_float32():
    logits = torch.randn(1, 6, VOCAB)
    labels, lengths = torch.tensor([[1, 2]]), torch.tensor([6])
    loss = ctc_loss(logits.to(torch.bfloat16), lengths, labels, blank_id=0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ctc_loss(logits.to(torch.bfloat16).float(), lengths, labels, blank_id=0))


def test_kl_by_hand():
    teacher, student = logits_of([[[0.7, 0.3], [0.2, 0.8]]]), logits_of([[[0.5, 0.5], [0.4, 0.6]]])
    forward = [0.7 * math.log(1.4) + 0.3 * math.log(0.6), 0.2 * math.log(0.5) + 0.8 * math.log(4 / 3)]
    assert kl_loss(student, teacher, torch.tensor([2])).item() == pytest.approx(sum(forward) / 2, rel=1e-5)
    assert kl_loss(student, teacher, torch.tensor([1])).item() == pytest.approx(forward[0], rel=1e-5)
    reverse = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    assert kl_loss(student, teacher, torch.tensor([1]), direction="reverse").item() == pytest.approx(reverse, rel=1e-5)
    # at temperature 2 probabilities become their normalised square roots, and the loss grows by 4
    p, q = (torch.tensor(x).sqrt() for x in ([0.7, 0.3], [0.5, 0.5]))
    p, q = p / p.sum(), q / q.sum()
    expected = 4 * (p * (p / q).log()).sum().item()
    assert kl_loss(student, teacher, torch.tensor([1]), temperature=2.0).item() == pytest.approx(expected, rel=1e-5)


def test_kl_gradients_reach_the_student_only():
    student, teacher = (torch.randn(2, 3, VOCAB, requires_grad=True) for _ in range(2))
    kl_loss(student, teacher, torch.tensor([3, 2])).sum().backward()
    assert teacher.grad is None
    assert student.grad[0].any() and not student.grad[1, 2].any()
    # at temperature 1 the gradient of the forward KL is q - p, divided by the frames
    expected = (student[0].softmax(-1) - teacher[0].softmax(-1)) / 3
    torch.testing.assert_close(student.grad[0], expected, atol=1e-6, rtol=1e-4)


def test_a_token_that_the_teacher_rules_out_weighs_nothing():
    student, teacher = torch.randn(2, 3, VOCAB, requires_grad=True), torch.randn(2, 3, VOCAB)
    lengths = torch.tensor([3, 2])
    teacher[..., 2] = -torch.inf
    loss = kl_loss(student, teacher, lengths)
    torch.testing.assert_close(loss, kl_loss(student, teacher.clamp(min=-1e4), lengths))
    loss.sum().backward()
    expected = (student[0].softmax(-1) - teacher[0].softmax(-1)) / 3
    torch.testing.assert_close(student.grad[0], expected, atol=1e-6, rtol=1e-4)


def test_unknown_direction():
    with pytest.raises(ValueError, match="kl_direction must be one of .*'forward', 'reverse'.*; got 'sideways'"):
        kl_loss(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.tensor([1]), direction="sideways")


@st.composite
def batches(draw):
    """Student and teacher logits, frame lengths and labels of up to four utterances."""
    size, frames = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    student, teacher = (3 * torch.randn(size, frames, VOCAB, generator=generator) for _ in range(2))
    lengths = torch.tensor(draw(st.lists(st.integers(1, frames), min_size=size, max_size=size)))
    rows = st.lists(st.integers(1, VOCAB - 1), max_size=4)
    labels = torch.full((size, 4), -100)
    for row in labels:
        ids = draw(rows)
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
    return student, teacher, lengths, labels


def all_losses(student, teacher, lengths, labels):
    return {
        "ctc": ctc_loss(student, lengths, labels, blank_id=0),
        "forward": kl_loss(student, teacher, lengths),
        "reverse": kl_loss(student, teacher, lengths, temperature=2.0, direction="reverse"),
    }


@given(batches(), st.integers(1, 5), st.sampled_from([0.0, 1e4, math.nan, math.inf]))
def test_padding_never_changes_a_loss(batch, extra, filler):
    student, teacher, lengths, labels = batch
    expected = all_losses(*batch)
    padded = []
    for logits in (student, teacher):
        logits = torch.nn.functional.pad(logits, (0, 0, 0, extra))
        logits[~frame_mask(lengths, logits.shape[1])] = filler
        padded.append(logits)
    wider = torch.nn.functional.pad(labels, (0, extra), value=-100)
    for name, losses in all_losses(*padded, lengths, wider).items():
        torch.testing.assert_close(losses, expected[name], msg=name)


@given(batches(), st.randoms(use_true_random=False))
def test_order_in_the_batch_never_matters(batch, random):
    order = list(range(len(batch[0])))
    random.shuffle(order)
    expected = all_losses(*batch)
    for name, losses in all_losses(*(tensor[order] for tensor in batch)).items():
        torch.testing.assert_close(losses, expected[name][order], msg=name)


@given(batches())
def test_losses_are_finite_and_kl_is_zero_only_against_itself(batch):
    student, teacher, lengths, _ = batch
    for losses in all_losses(*batch).values():
        assert torch.isfinite(losses).all() and (losses > -1e-5).all()
    torch.testing.assert_close(kl_loss(student, student, lengths), torch.zeros(len(student)), atol=1e-5, rtol=0)


def all_candidates(batch, frames):
    return torch.ones(batch, frames, frames, dtype=torch.bool)


def test_info_nce_by_hand():
    predictions = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
    targets = torch.tensor([[[5.0, 0.0], [1.0, 1.0], [0.0, 1.0]]])
    half = math.sqrt(0.5)
    similarities = [[1, half, 0], [0, half, 1], [half, 1, half]]
    losses = []
    for i, row in enumerate(similarities):
        losses.append(-math.log(math.exp(row[i] / 0.5) / sum(math.exp(value / 0.5) for value in row)))
    loss = info_nce_loss(predictions, targets, all_candidates(1, 3), torch.tensor([3]), 0.5)
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    # frame 0 with negative 1 only, frame 1 with negative 2 only, frame 2 is padding
    candidates = torch.tensor([[[True, True, False], [False, True, True], [False, False, True]]])
    losses = [-math.log(math.exp(a) / (math.exp(a) + math.exp(b))) for a, b in ((2, 2 * half), (2 * half, 2))]
    loss = info_nce_loss(predictions, targets, candidates, torch.tensor([2]), 0.5)
    assert loss.item() == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_info_nce_of_one_frame_or_none_is_zero_without_gradient():
    predictions = torch.randn(2, 1, 4, requires_grad=True)
    loss = info_nce_loss(predictions, torch.randn(2, 1, 4), all_candidates(2, 1), torch.tensor([1, 0]))
    assert loss.tolist() == [0, 0]
    loss.sum().backward()
    assert not predictions.grad.any()


def test_info_nce_temperature_limits():
    torch.manual_seed(0)
    targets = torch.randn(1, 7, 5)
    counts, candidates = torch.tensor([7]), all_candidates(1, 7)
    hot = info_nce_loss(torch.randn(1, 7, 5), targets, candidates, counts, 1e6)
    assert hot.item() == pytest.approx(math.log(7), rel=1e-4), "all candidates look alike"
    cold = info_nce_loss(targets * 3, targets, candidates, counts, 1e-3)
    assert cold.item() == pytest.approx(0, abs=1e-6), "the most similar candidate takes all"
    wrong = info_nce_loss(targets.roll(1, 1), targets, candidates, counts, 1e-3)
    assert torch.isfinite(wrong) and wrong > 100


def test_info_nce_is_the_cross_entropy_of_wav2vec2():
    """Gathered negatives, as wav2vec 2.0 computes it, give the same values and gradients."""
    torch.manual_seed(0)
    frames, negatives = 9, 3
    predictions = torch.randn(1, frames, 6, requires_grad=True)
    targets = torch.randn(1, frames, 6)
    indices = torch.stack([(torch.arange(frames) + offset) % frames for offset in (0, 2, 5, 6)], 1)
    candidates = torch.zeros(1, frames, frames, dtype=torch.bool)
    candidates[0].scatter_(1, indices, True)
    loss = info_nce_loss(predictions, targets, candidates, torch.tensor([frames]), 0.1)
    logits = torch.cosine_similarity(predictions[0].unsqueeze(1), targets[0][indices], dim=-1) / 0.1
    assert logits.shape == (frames, 1 + negatives)
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(frames, dtype=torch.long))
    torch.testing.assert_close(loss[0], expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, predictions, retain_graph=True)[0] for x in (loss, expected)))


def test_l1_cosine_by_hand():
    predictions = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    targets = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]])
    first = (1 + 1) / 2 + math.log(2)  # cosine 0
    second = 1 / 2 - math.log(1 / (1 + math.exp(-1)))  # cosine 1
    assert l1_cosine_loss(predictions, targets, torch.tensor([2])).item() == pytest.approx((first + second) / 2)
    weighted = l1_cosine_loss(predictions, targets, torch.tensor([1]), cosine_weight=0.5)
    assert weighted.item() == pytest.approx(1 + 0.5 * math.log(2))


LAYER_LOSSES = {
    "info_nce": lambda predictions, targets, counts: info_nce_loss(
        predictions, targets, torch.eye(targets.shape[1]).bool() | frame_mask(counts, targets.shape[1])[:, None], counts
    ),
    "l1_cosine": l1_cosine_loss,
}


@pytest.mark.parametrize("name", LAYER_LOSSES)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    fill=st.floats(-1e4, 1e4),
    seed=st.integers(0, 99),
)
def test_layer_losses_do_not_see_padding_nor_teach_the_teacher(name, counts, padding, fill, seed):
    torch.manual_seed(seed)
    counts = torch.tensor(counts)
    frames = max(1, int(counts.max()))
    predictions, targets = torch.randn(2, len(counts), frames, 4)
    expected = LAYER_LOSSES[name](predictions, targets, counts)
    padded = []
    for features in (predictions, targets):
        features = torch.cat([features, torch.zeros(len(counts), padding, 4)], 1)
        padded.append(features.masked_fill(~frame_mask(counts, frames + padding)[..., None], fill).requires_grad_())
    losses = LAYER_LOSSES[name](*padded, counts)
    torch.testing.assert_close(losses, expected)
    assert (losses[counts == 0] == 0).all() and (losses >= -1e-6).all()
    losses.sum().backward()
    assert torch.isfinite(padded[0].grad).all() and padded[1].grad is None
    assert not padded[0].grad[~frame_mask(counts, frames + padding)].any()


@pytest.mark.parametrize("name", LAYER_LOSSES)
def test_layer_losses_are_in_float32(name):
    torch.manual_seed(0)
    predictions, targets = torch.randn(2, 1, 6, 8).bfloat16()
    counts = torch.tensor([6])
    expected = LAYER_LOSSES[name](predictions.float(), targets.float(), counts)
    torch.testing.assert_close(LAYER_LOSSES[name](predictions, targets, counts), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(LAYER_LOSSES[name](predictions.float(), targets.float(), counts), expected)


def truncated(student, teacher, lengths, top, temperature=1.0, direction="forward"):
    log_probs, tokens = truncate_posteriors(teacher, top, temperature)
    return truncated_kl_loss(student, log_probs, tokens, lengths, temperature, direction)


def test_truncated_kl_by_hand():
    teacher, student = logits_of([[[0.1, 0.7, 0.2]]]), logits_of([[[0.3, 0.5, 0.2]]])
    forward = 0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    lengths = torch.tensor([1])
    assert truncated(student, teacher, lengths, top=1).item() == pytest.approx(forward, rel=1e-5)
    assert truncated(student, teacher, lengths, 1, direction="reverse").item() == pytest.approx(reverse, rel=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@given(seed=st.integers(0, 2**31), top=st.integers(1, 9), temperature=st.floats(0.3, 5.0), scale=st.floats(0.0, 20.0))
def test_truncated_kl_is_a_lower_bound(direction, seed, top, temperature, scale):
    """Merging events cannot make two distributions easier to tell apart; with all events kept nothing is merged."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(3, 4, VOCAB, generator=generator) * scale for _ in range(2))
    lengths = torch.tensor([4, 2, 1])
    exact = kl_loss(student, teacher, lengths, temperature, direction)
    bound = truncated(student, teacher, lengths, top, temperature, direction)
    assert (bound >= -1e-5 * temperature**2).all()
    if top >= VOCAB:
        torch.testing.assert_close(bound, exact, rtol=1e-4, atol=1e-5 * temperature**2)
    else:
        assert (bound <= exact * (1 + 1e-4) + 1e-5 * temperature**2).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("top", [1, VOCAB - 1, VOCAB])
def test_truncated_kl_of_certain_models_has_finite_gradients(direction, top):
    """The rest's probability is 1e-40 there, which 1 - sum would round to 0."""
    certain = torch.tensor([100.0, 0.0, 0.0, 0.0, 0.0])
    student = torch.stack([certain, certain.flip(0)])[None].requires_grad_()
    teacher = torch.stack([certain, certain])[None]
    loss = truncated(student, teacher, torch.tensor([2]), top, direction=direction)
    torch.testing.assert_close(
        loss, kl_loss(student, teacher, torch.tensor([2]), direction=direction), rtol=0.05, atol=0
    )
    loss.sum().backward()
    assert torch.isfinite(student.grad).all() and student.grad[0, 1].any()


def test_truncated_kl_leaves_padding_out_and_does_not_teach_the_teacher():
    student, teacher = (torch.randn(2, 6, VOCAB, requires_grad=True) for _ in range(2))
    lengths = torch.tensor([6, 3])
    log_probs, tokens = truncate_posteriors(teacher, 2)
    loss = truncated_kl_loss(student, log_probs, tokens, lengths)
    alone = truncated_kl_loss(student[1:, :3], log_probs[1:, :3], tokens[1:, :3], lengths[1:])
    torch.testing.assert_close(loss[1:], alone)
    loss.sum().backward()
    assert teacher.grad is None and not student.grad[1, 3:].any() and student.grad[1, :3].any()


def test_truncated_posteriors_sum_to_one():
    logits = torch.randn(2, 3, VOCAB) * 5
    for top in (1, 3, VOCAB, 99):
        log_probs, tokens = truncate_posteriors(logits, top)
        assert log_probs.shape[-1] == min(top + 1, VOCAB) and tokens.shape[-1] == min(top, VOCAB)
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 3))


def test_rounded_posteriors_are_normalised():
    student, teacher = torch.randn(2, 1, 4, VOCAB, generator=torch.Generator().manual_seed(0))
    log_probs, tokens = truncate_posteriors(teacher, 3)
    lengths = torch.tensor([4])
    rounded = truncated_kl_loss(student, log_probs.half(), tokens.to(torch.int16), lengths)
    torch.testing.assert_close(rounded, truncated_kl_loss(student, log_probs, tokens, lengths), rtol=2e-3, atol=1e-4)
    too_much = log_probs.half() + 0.01
    assert truncated_kl_loss(teacher, too_much, tokens, lengths).item() == pytest.approx(0, abs=1e-5)
