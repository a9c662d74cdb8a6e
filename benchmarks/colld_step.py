"""What does the contrastive loss of CoLLD cost? CPU seconds of a training step with InfoNCE and with L1-cosine.

    python benchmarks/colld_step.py

Random weights and noise. Teacher forward, masked student forward, loss and backward of the same batch, the two
objectives in turn, so that a change of the machine's load meets both. Also InfoNCE as wav2vec 2.0 computes it, with
gathered negatives of (frames, negatives, width), for the loss alone. Prints Markdown tables; the target is a ratio of
at most 1.25 for a step.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from measure import DEVICE, conditions, print_table, ratio, time_interleaved
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

import hf_dld
from hf_dld.distill.losses import info_nce_loss, l1_cosine_loss
from hf_dld.distill.masking import draw_masked_frames


def gathered_info_nce(predictions, targets, candidates, counts, temperature=0.1):
    """The same loss with a copy of each frame's candidates, (frames, 1 + negatives, width), to compare with."""
    losses = []
    for z, c, allowed, count in zip(predictions, targets, candidates, counts.tolist(), strict=True):
        order = allowed[:count, :count].nonzero()[:, 1].view(count, -1)
        positives = (order == torch.arange(count)[:, None]).int().argmax(1)
        logits = torch.cosine_similarity(z[:count, None], c[order], dim=-1) / temperature
        losses.append(torch.nn.functional.cross_entropy(logits, positives))
    return torch.stack(losses)


def report(title: str, calls: dict, runs: int, reference: str) -> None:
    times = time_interleaved(calls, runs, clock=time.process_time)
    print(f"{title}\n")
    print_table(
        ["", "median CPU s", "range", f"ratio to {reference} (quartiles)"],
        (
            [name, f"{statistics.median(s):.4f}", f"{min(s):.4f} to {max(s):.4f}", ratio(times, name, reference)]
            for name, s in times.items()
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--teacher_layers", type=int, default=12)
    parser.add_argument("--student_layers", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio in each utterance")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()

    torch.manual_seed(0)
    width = args.hidden_size
    teacher = WavLMModel(
        WavLMConfig(
            hidden_size=width,
            num_hidden_layers=args.teacher_layers,
            num_attention_heads=max(width // 64, 1),
            intermediate_size=4 * width,
            conv_dim=(width // 2,) * 7,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            layerdrop=0.0,
        )
    )
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    student = hf_dld.make_student(teacher, args.student_layers)
    rng = np.random.default_rng(0)
    examples = [
        {"audio": rng.standard_normal(round(args.seconds * 16_000)).astype(np.float32)} for _ in range(args.batch_size)
    ]
    trainers = {
        objective: hf_dld.CoLLDTrainer(
            model=student,
            teacher=teacher,
            args=hf_dld.CoLLDTrainingArguments(f"outputs/colld_step_{objective}", objective=objective),
            data_collator=hf_dld.DataCollatorCoLLD(extractor),
        )
        for objective in ("l1_cosine", "info_nce")
    }
    batch = trainers["info_nce"]._prepare_inputs(trainers["info_nce"].data_collator(examples))

    def step(trainer):
        trainer.model.train()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        trainer.model.zero_grad()

    masked = trainers["info_nce"].draw_masked_frames(batch)
    print(
        f"WavLM, width {width}, {args.teacher_layers} to {args.student_layers} layers, {args.batch_size} utterances of "
        f"{args.seconds:g} s, {masked.counts.tolist()} masked frames, 100 negatives, {args.runs} runs.\n"
        f"{conditions()}\n"
    )
    steps = {name: lambda trainer=trainer: step(trainer) for name, trainer in trainers.items()}
    report("A step (teacher forward, student forward and backward)", steps, args.runs, "l1_cosine")

    shape = (args.batch_size, masked.indices.shape[1], width)
    predictions, targets = torch.randn(shape, device=DEVICE, requires_grad=True), torch.randn(shape, device=DEVICE)
    calls = {
        "l1_cosine": lambda: l1_cosine_loss(predictions, targets, masked.counts),
        "info_nce": lambda: info_nce_loss(predictions, targets, masked.candidates, masked.counts),
        "info_nce, gathered": lambda: gathered_info_nce(predictions, targets, masked.candidates, masked.counts),
    }
    torch.testing.assert_close(calls["info_nce"](), calls["info_nce, gathered"]())
    losses = {name: lambda call=call: call().sum().backward() for name, call in calls.items()}
    report("The loss of one layer (forward and backward)", losses, args.runs, "l1_cosine")

    lengths = [int(args.seconds * 50) - 1] * args.batch_size
    draw = {"draw": lambda: draw_masked_frames(lengths, lengths[0], range(args.batch_size), seed=0, step=1)}
    report("Drawing masks and negatives, once a step", draw, args.runs, "draw")


if __name__ == "__main__":
    main()
