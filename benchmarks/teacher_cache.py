"""What the teacher's posterior cache costs on disk, and what its truncation does to the KL.

    python benchmarks/teacher_cache.py --teacher outputs/quickstart/teacher --dataset examples/corpora/spoken_commands

For several numbers of kept tokens: bytes for an hour of speech (measured on the files, scaled to 20 ms frames, and by
the formula), and the KL of a student at several depths against the exact one, meaned over utterances. The student is
the teacher, merely cut, or --student. Prints one Markdown table.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoProcessor

from hf_dld.data import DataCollatorCTC, load_speech_dataset, prepare_dataset
from hf_dld.data.audio import audio_key
from hf_dld.distill.losses import kl_loss, truncated_kl_loss
from hf_dld.distill.posterior_cache import PosteriorCache, fill_posterior_cache
from hf_dld.distill.teacher import freeze
from hf_dld.models import DYNAMIC_CLASSES

FRAMES_PER_HOUR = 3600 * 50  # at 20 ms


def load(checkpoint: str) -> torch.nn.Module:
    return freeze(DYNAMIC_CLASSES[AutoConfig.from_pretrained(checkpoint).model_type].from_pretrained(checkpoint))


def exact_and_truncated(teacher, student, processor, examples, caches) -> torch.Tensor:
    """The KL of each utterance, depth, and way to compute it: (utterances, depths, 1 + caches)."""
    num_layers = student.config.num_hidden_layers
    collator = DataCollatorCTC(processor)
    rows = []
    for example in examples:
        batch = collator([example])
        frames = teacher._get_feat_extract_output_lengths(batch["input_lengths"])
        inputs = {name: batch[name] for name in batch if name not in ("labels", "input_lengths")}
        posteriors = [cache[audio_key(example["audio"])] for cache in caches]
        depths = []
        for depth in sorted({1, -(-num_layers // 3), num_layers // 2}):
            logits = student(**inputs, num_active_layers=depth).logits
            exact = kl_loss(logits, teacher(**inputs).logits, frames)
            bounds = [truncated_kl_loss(logits, p[None], tokens[None], frames) for p, tokens in posteriors]
            depths.append(torch.cat([exact, *bounds]))
        rows.append(torch.stack(depths))
    return torch.stack(rows)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", help="default: the teacher, cut")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--utterances", type=int, default=60)
    parser.add_argument("--top", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    args = parser.parse_args()
    teacher, student = load(args.teacher), load(args.student or args.teacher)
    processor = AutoProcessor.from_pretrained(args.teacher)
    dataset = load_speech_dataset(args.dataset, split=args.split)
    dataset = dataset.select(range(min(args.utterances, len(dataset))))
    dataset, _ = prepare_dataset(dataset, processor, teacher._get_feat_extract_output_lengths)
    frames = int(teacher._get_feat_extract_output_lengths(torch.tensor(dataset["input_length"])).sum())
    vocab = teacher.config.vocab_size
    tops = sorted({min(top, vocab) for top in [*args.top, vocab]})
    with tempfile.TemporaryDirectory() as folder:
        caches = [PosteriorCache(Path(folder) / str(top)) for top in tops]
        for top, cache in zip(tops, caches, strict=True):
            fill_posterior_cache(
                cache,
                dataset,
                processor,
                teacher,
                teacher._get_feat_extract_output_lengths,
                top=top,
                progress_bar=False,
            )
        kl = exact_and_truncated(teacher, student, processor, dataset, caches)
        sizes = [sum(path.stat().st_size for path in cache.folder.iterdir()) for cache in caches]
    exact, bounds = kl[..., 0], kl[..., 1:]
    print(f"{len(dataset)} utterances, {frames} frames, {vocab} tokens; exact KL by depth: ", end="")
    print(", ".join(f"{value:.4f}" for value in exact.mean(0).tolist()))
    print("| kept tokens | MB an hour, measured | MB an hour, formula | KL missing, mean by depth | worst utterance |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for index, (top, size) in enumerate(zip(tops, sizes, strict=True)):
        formula = FRAMES_PER_HOUR * (2 * min(top + 1, vocab) + 2 * top) / 1e6
        measured = size / frames * FRAMES_PER_HOUR / 1e6
        means = 100 * (1 - bounds[..., index].mean(0) / exact.mean(0))
        worst = 100 * (1 - bounds[..., index] / exact).max().item()
        by_depth = ", ".join(f"{value:.2f} %" for value in means.tolist())
        print(f"| {top} | {measured:.2f} | {formula:.2f} | {by_depth} | {worst:.2f} % |")


if __name__ == "__main__":
    main()
