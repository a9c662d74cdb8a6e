"""The losses of DLD as pure functions. Each returns one value per utterance; the trainer averages over utterances."""

import torch
from torch.nn import functional as F

KL_DIRECTIONS = ("forward", "reverse")


def frame_mask(frame_lengths: torch.Tensor, num_frames: int) -> torch.Tensor:
    """(batch, frames), true where a frame is not padding; `frame_lengths` is (batch,)."""
    return torch.arange(num_frames, device=frame_lengths.device) < frame_lengths[:, None]


def ctc_loss(logits: torch.Tensor, frame_lengths: torch.Tensor, labels: torch.Tensor, blank_id: int) -> torch.Tensor:
    """CTC divided by the length of the transcript: CTC(q, y) / |y| for each utterance.

    The first term of DLD's loss (arXiv 2601.16117; Graves et al. 2006, equation 8). In float32, whatever the logits
    are. An utterance without a transcript counts 0, and so does one whose transcript does not fit in its frames.

    Args:
        logits: (batch, frames, vocab).
        frame_lengths: (batch,), frames that are not padding.
        labels: (batch, tokens), padded with a negative number; a row of padding only has no transcript.
        blank_id: id of the CTC blank.

    Returns:
        (batch,), float32.
    """
    transcribed = labels >= 0
    target_lengths = transcribed.sum(-1)
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
    losses = F.ctc_loss(
        log_probs,
        labels[transcribed],
        frame_lengths,
        target_lengths,
        blank=blank_id,
        reduction="none",
        zero_infinity=True,
    )
    # the CTC loss of an empty transcript would teach silence
    return torch.where(target_lengths > 0, losses / target_lengths.clamp(min=1), 0.0)


def kl_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    frame_lengths: torch.Tensor,
    temperature: float = 1.0,
    direction: str = "forward",
) -> torch.Tensor:
    """Kullback-Leibler divergence of per-frame posteriors, meaned over the frames that are not padding.

    The second term of DLD's loss (arXiv 2601.16117): tau^2 / T * sum_t sum_v p_tv (log p_tv - log q_tv), where p and
    q are softmaxes of the teacher's and the student's logits / tau. Direction, temperature and masking are not
    published; the defaults are the usual ones (Hinton et al., arXiv 1503.02531). No gradient reaches the teacher.

    Args:
        student_logits: (batch, frames, vocab).
        teacher_logits: (batch, frames, vocab).
        frame_lengths: (batch,), frames that are not padding.
        temperature: tau, above 0.
        direction: `"forward"`: KL(teacher, student); `"reverse"`: KL(student, teacher).

    Returns:
        (batch,), float32.
    """
    if direction not in KL_DIRECTIONS:
        raise ValueError(f"kl_direction must be one of {KL_DIRECTIONS}; got {direction!r}.")
    student = F.log_softmax(student_logits / temperature, dim=-1, dtype=torch.float32)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1, dtype=torch.float32)
    target, approximation = (teacher, student) if direction == "forward" else (student, teacher)
    divergence = F.kl_div(approximation, target, log_target=True, reduction="none").sum(-1)
    mask = frame_mask(frame_lengths, student_logits.shape[1])
    # masked_fill and not a product: whatever stands in padding, even nan, must not leak in
    return temperature**2 * divergence.masked_fill(~mask, 0.0).sum(-1) / frame_lengths.clamp(min=1)
