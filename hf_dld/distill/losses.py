"""The losses as pure functions. Each returns one value per utterance; the trainers average over utterances."""

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
    student = F.log_softmax(student_logits / temperature, dim=-1, dtype=torch.float32)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1, dtype=torch.float32)
    return _mean_divergence(student, teacher, frame_lengths, temperature, direction)


def truncate_posteriors(logits: torch.Tensor, top: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top` most probable tokens of each frame, and the probability of all others together.

    Args:
        logits: (..., vocab).
        top: how many tokens to keep, at least 1; no more than the vocabulary are.
        temperature: the posteriors are the softmax of logits / temperature.

    Returns:
        Log-probabilities (..., top + 1), float32, the rest's in the last column, most probable first; without that
        column where all tokens are kept. And the ids of the tokens, (..., top).
    """
    log_probs = F.log_softmax(logits / temperature, dim=-1, dtype=torch.float32)
    kept, tokens = log_probs.topk(min(top, logits.shape[-1]), dim=-1)
    return _with_rest(log_probs, kept, tokens), tokens


def truncated_kl_loss(
    student_logits: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    teacher_tokens: torch.Tensor,
    frame_lengths: torch.Tensor,
    temperature: float = 1.0,
    direction: str = "forward",
) -> torch.Tensor:
    """`kl_loss` against a teacher of whom only the most probable tokens are known, see `truncate_posteriors`.

    All other tokens count as one event, with the teacher's probability r and the student's q_rest::

        tau^2 / T * sum_t [ sum_k p_tk (log p_tk - log q_tk) + r_t (log r_t - log q_t,rest) ]

    (`"forward"`; `"reverse"` with p and q exchanged). By the data-processing inequality it is never above `kl_loss`,
    and it equals it where all tokens are kept. The teacher's probabilities are normalised here, for they may come
    rounded.

    Args:
        student_logits: (batch, frames, vocab).
        teacher_log_probs: (batch, frames, top + 1), or (batch, frames, vocab) where all tokens are kept; of the
            softmax of the teacher's logits / temperature.
        teacher_tokens: (batch, frames, top), integers.
        frame_lengths: (batch,), frames that are not padding.
        temperature, direction: as in `kl_loss`.

    Returns:
        (batch,), float32.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1, dtype=torch.float32)
    tokens = teacher_tokens.long()
    student = _with_rest(student, student.gather(-1, tokens), tokens)
    teacher = F.log_softmax(teacher_log_probs.detach(), dim=-1, dtype=torch.float32)
    return _mean_divergence(student, teacher, frame_lengths, temperature, direction)


def _with_rest(log_probs: torch.Tensor, kept: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`kept` and, where it is not all tokens, a column with the log-probability of those that are not in `tokens`."""
    if tokens.shape[-1] == log_probs.shape[-1]:
        return kept
    # over the complement and not log(1 - sum): a rest of 1e-9 beside a sum of 1 would be lost in float32
    rest = log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], dim=-1)


def _mean_divergence(
    student: torch.Tensor, teacher: torch.Tensor, frame_lengths: torch.Tensor, temperature: float, direction: str
) -> torch.Tensor:
    """The KL of log-probabilities (batch, frames, events), meaned over the frames that are not padding: (batch,)."""
    if direction not in KL_DIRECTIONS:
        raise ValueError(f"kl_direction must be one of {KL_DIRECTIONS}; got {direction!r}.")
    target, approximation = (teacher, student) if direction == "forward" else (student, teacher)
    if target is teacher:
        # a token that the teacher rules out has probability 0, and weighs nothing; 0 times infinity would be no number
        target = teacher.clamp(min=torch.finfo(teacher.dtype).min)
    divergence = F.kl_div(approximation, target, log_target=True, reduction="none").sum(-1)
    mask = frame_mask(frame_lengths, student.shape[1])
    # masked_fill and not a product: whatever stands in padding, even nan, must not leak into the value
    return temperature**2 * divergence.masked_fill(~mask, 0.0).sum(-1) / frame_lengths.clamp(min=1)


def info_nce_loss(
    predictions: torch.Tensor,
    targets: torch.Tensor,
    candidates: torch.Tensor,
    counts: torch.Tensor,
    temperature: float = 0.1,
) -> torch.Tensor:
    """InfoNCE over cosine similarities, meaned over the masked frames of an utterance.

    CoLLD (arXiv 2309.07707) says that its loss is contrastive, with positive and negative samples for each frame; the
    formula here is that of wav2vec 2.0 (arXiv 2006.11477, equation 3; InfoNCE is arXiv 1807.03748, equation 4), hence
    "CoLLD-style". For a frame i with prediction z_i, targets c, and candidates Q_i, which are i and its negatives::

        L_i = -log( exp(cos(z_i, c_i) / tau) / sum_{j in Q_i} exp(cos(z_i, c_j) / tau) )

    All similarities of an utterance come from one matrix product, of which the candidates are kept: nothing of
    (frames, negatives, width) is ever made. A frame without negatives, such as an only one, has loss 0 and no gradient.
    In float32, whatever the features are. No gradient reaches the targets.

    Args:
        predictions: (batch, masked, width), the student's, for the masked frames; what stands in padding is ignored
            as long as it is finite.
        targets: (batch, masked, width), the teacher's, likewise.
        candidates: (batch, masked, masked), true at (i, j) where frame j is frame i or one of its negatives; the
            diagonal is true, in padding too.
        counts: (batch,), masked frames of each utterance; the rest is padding.
        temperature: tau, above 0.

    Returns:
        (batch,), float32; 0 for an utterance without masked frames.
    """
    with torch.autocast(predictions.device.type, enabled=False):  # bfloat16 has 3 digits, and tau makes them 2
        predictions = F.normalize(predictions.float(), dim=-1)
        targets = F.normalize(targets.detach().float(), dim=-1)
        similarities = predictions @ targets.mT / temperature
    positives = similarities.diagonal(dim1=1, dim2=2)
    losses = similarities.masked_fill(~candidates, -torch.inf).logsumexp(-1) - positives
    return _mean_over_frames(losses, counts)


def l1_cosine_loss(
    predictions: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor, cosine_weight: float = 1.0
) -> torch.Tensor:
    """L1 distance and cosine similarity, meaned over the masked frames of an utterance: the control without negatives.

    DistilHuBERT (arXiv 2110.01900), equation 1, which USAD (arXiv 2506.18843) takes for layer-to-layer distillation.
    For a frame with prediction z and target c of width D::

        L = |z - c|_1 / D - cosine_weight * log(sigmoid(cos(z, c)))

    Both let the loss of all frames count; here masked frames do, as in `info_nce_loss`. In float32, no gradient
    reaches the targets.

    Args:
        predictions: (batch, masked, width), the student's, for the masked frames.
        targets: (batch, masked, width), the teacher's.
        counts: (batch,), masked frames of each utterance; the rest is padding.
        cosine_weight: lambda, 1 in both papers.

    Returns:
        (batch,), float32; 0 for an utterance without masked frames.
    """
    predictions, targets = predictions.float(), targets.detach().float()
    distances = (predictions - targets).abs().mean(-1)
    cosines = F.cosine_similarity(predictions, targets, dim=-1)
    return _mean_over_frames(distances - cosine_weight * F.logsigmoid(cosines), counts)


def _mean_over_frames(losses: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(batch, frames) to (batch,): the mean over the first `counts` frames, 0 where there are none."""
    mask = frame_mask(counts, losses.shape[1])
    return losses.masked_fill(~mask, 0.0).sum(-1) / counts.clamp(min=1)
