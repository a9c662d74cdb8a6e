"""What does a student of half the depth gain from layer-to-layer distillation, before it is fine-tuned with CTC?

    python examples/corpora/join_digits.py --source ../shared/data/spoken_digits --output outputs/connected_digits \\
      --utterances 4000 200 800
    python experiments/colld.py --dataset outputs/connected_digits

Trains one 12-layer WavLM teacher with CTC, then 6-layer students by five methods and three seeds, all from the same
evenly spaced teacher layers but the random one: CoLLD-style (InfoNCE, every layer), L1-cosine (every layer), L1-cosine
of the last layer's output alone (DistilHuBERT's loss; masked as the others are), the cut teacher without distillation,
and a random start. Distillation sees no transcript. Each student then gets a new CTC head and the same fine-tuning.

Every finished run is written to experiments/results/colld.json at once, and one that is there is not repeated: the same
command goes on where it was interrupted. Prints a Markdown table of word error rates (a word is a digit), mean over
seeds and their range.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from common import RESULTS_DIR, environment, spread, store
from transformers import AutoFeatureExtractor, AutoProcessor, WavLMConfig, WavLMModel, set_seed

import hf_dld
from hf_dld.distill.checkpoints import save_whole
from hf_dld.distill.student import save_student
from hf_dld.evaluation import evaluate_depths

RESULTS = RESULTS_DIR / "colld.json"
METHODS: dict[str, dict[str, Any] | None] = {
    "CoLLD-style: InfoNCE, all layers": {"objective": "info_nce"},
    "L1-cosine, all layers": {"objective": "l1_cosine"},
    "L1-cosine, last layer's output": {"objective": "l1_cosine", "num_distilled_layers": 1, "distill_target": "hidden"},
    "cut teacher, not distilled": None,
    "random start": None,
}
MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "intermediate_size": 192,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_dim": [64, 96, 96, 96],
    "conv_kernel": [200, 5, 5, 5],
    "conv_stride": [80, 3, 1, 1],
    "conv_bias": True,
    "initializer_range": 0.08,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 8,
    "mask_time_prob": 0.05,
    "mask_time_length": 3,
    "mask_time_min_masks": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--work", type=Path, default=Path("outputs/colld_experiment"), help="teacher and students")
    parser.add_argument("--student_layers", type=int, default=6)
    parser.add_argument("--teacher_steps", type=int, default=2500)
    parser.add_argument("--distill_steps", type=int, default=1000)
    parser.add_argument("--tune_steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    settings = {name: value for name, value in vars(args).items() if name not in ("work", "seeds")}
    stored = read_results(settings)
    speech = {split: hf_dld.load_speech_dataset(args.dataset, split=split) for split in ("train", "test")}
    processor = make_processor(args.work / "teacher", speech["train"])
    frames_of = WavLMModel(WavLMConfig(**{**MODEL, "num_hidden_layers": 1}))._get_feat_extract_output_lengths
    splits = {split: hf_dld.prepare_dataset(data, processor, frames_of)[0] for split, data in speech.items()}

    teacher_folder = args.work / "teacher"
    if not (teacher_folder / "config.json").exists():
        set_seed(0)
        options = {**MODEL, "vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
        model = hf_dld.DLDWavLMForCTC(hf_dld.DLDWavLMConfig(**options))
        train_ctc(model, args.teacher_steps, 3e-3, 0, splits["train"], processor, args.work / "checkpoints")
        save_whole(teacher_folder, model.to_static(), processor)
    if not any(run["method"] == "teacher" for run in stored["runs"]):
        teacher = hf_dld.DLDWavLMForCTC.from_pretrained(teacher_folder)
        add_run(stored, {"method": "teacher", "seed": 0, **evaluate(teacher, splits["test"], processor)})

    for seed in args.seeds:
        for method in METHODS:
            if any((run["method"], run["seed"]) == (method, seed) for run in stored["runs"]):
                continue
            add_run(stored, {"method": method, "seed": seed, **run_method(method, seed, args, splits, processor)})
    print(markdown(stored["runs"]))


def run_method(method: str, seed: int, args: Any, splits: dict[str, Any], processor: Any) -> dict[str, Any]:
    """Make, distil and fine-tune one student; what came of it."""
    set_seed(seed)
    teacher = WavLMModel.from_pretrained(args.work / "teacher")
    student = hf_dld.make_student(teacher, args.student_layers)
    if method == "random start":
        student = WavLMModel(student.config)
    started = time.process_time()
    if METHODS[method] is not None:
        distill(student, teacher, METHODS[method], seed, args, splits["train"])
    distill_s = time.process_time() - started
    folder = args.work / "student"
    save_student(folder, student, AutoFeatureExtractor.from_pretrained(args.work / "teacher"))

    set_seed(seed)  # the same head and the same batches for every method
    vocabulary = {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
    tuned = hf_dld.DLDWavLMForCTC.from_pretrained(folder, **vocabulary)
    started = time.process_time()
    train_ctc(tuned, args.tune_steps, args.learning_rate, seed, splits["train"], processor, args.work / "checkpoints")
    tune_s = time.process_time() - started
    return {**evaluate(tuned, splits["test"], processor), "distill_cpu_s": distill_s, "tune_cpu_s": tune_s}


def distill(student: Any, teacher: Any, options: dict[str, Any], seed: int, args: Any, train: Any) -> None:
    extractor = AutoFeatureExtractor.from_pretrained(args.work / "teacher")
    training = hf_dld.CoLLDTrainingArguments(
        **shared_arguments(args.work / "checkpoints", args.distill_steps, args.learning_rate, seed),
        mask_time_length=7,  # 0.2 s at the 33 frames a second of this model, as 10 frames are elsewhere
        **options,
    )
    trainer = hf_dld.CoLLDTrainer(
        model=student,
        teacher=teacher,
        args=training,
        train_dataset=train,
        data_collator=hf_dld.DataCollatorCoLLD(extractor),
    )
    trainer.train()


def train_ctc(
    model: Any, steps: int, learning_rate: float, seed: int, train: Any, processor: Any, folder: Path
) -> None:
    trainer = hf_dld.CTCTrainer(
        model=model,
        args=hf_dld.CTCTrainingArguments(**shared_arguments(folder, steps, learning_rate, seed)),
        train_dataset=train,
        data_collator=hf_dld.DataCollatorCTC(processor),
        processing_class=processor,
    )
    trainer.train()


def shared_arguments(folder: Path, steps: int, learning_rate: float, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": 8,
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "save_strategy": "no",
        "logging_steps": 250,
        "disable_tqdm": True,
        "seed": seed,
    }


def evaluate(model: Any, test: Any, processor: Any) -> dict[str, Any]:
    row = evaluate_depths(model, test, processor, [model.config.num_hidden_layers]).rows[0]
    return {"wer": row.wer, "parameters": row.parameters, "layers": row.num_active_layers}


def make_processor(folder: Path, train: Any) -> Any:
    if (folder / "config.json").exists():
        return AutoProcessor.from_pretrained(folder)
    # large enough for every digit to be one token
    options = {"sampling_rate_hz": 8_000, "return_attention_mask": True}
    return hf_dld.build_subword_processor(train["text"], 53, "bpe", **options)


def read_results(settings: dict[str, Any]) -> dict[str, Any]:
    """What is stored of this experiment; an error if it was made with other settings."""
    if not RESULTS.exists():
        return {"settings": settings, **environment(), "runs": []}
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    if stored["settings"] != settings:
        raise ValueError(f"{RESULTS} holds runs with other settings, {stored['settings']}: move it away first.")
    return stored


def add_run(stored: dict[str, Any], run: dict[str, Any]) -> None:
    stored["runs"].append(run)
    store(RESULTS, stored)
    print(json.dumps(run), flush=True)


def markdown(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| student | layers | parameters | WER % (range) | seeds | distillation, CPU s | fine-tuning, CPU s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method in ("teacher", *METHODS):
        chosen = [run for run in runs if run["method"] == method]
        if not chosen:
            continue
        spent = [statistics.mean(run.get(name, 0.0) for run in chosen) for name in ("distill_cpu_s", "tune_cpu_s")]
        lines.append(
            f"| {method} | {chosen[0]['layers']} | {chosen[0]['parameters'] / 1e6:.2f} M "
            f"| {spread(run['wer'] for run in chosen)} | {len(chosen)} "
            f"| {spent[0]:.0f} | {spent[1]:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
