"""The losses: values computed by hand, and rules that hold for all inputs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dld.distill.losses import ctc_loss, frame_mask, kl_loss

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
