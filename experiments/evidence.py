"""Reproduce the claims of DLD: train every method of one experiment with equal budgets, and store what came out.

    python experiments/evidence.py experiments/evidence/digits_wavlm.yaml
    python experiments/results.py

The first command trains what is missing of the experiment and goes on where it was interrupted, run by run: a teacher
of each kind, then each method from each start with each seed. A finished run is one JSON file in
experiments/results/NAME, with the errors of every test utterance beside it. `--shard 0 --num_shards 2` takes every
second run, so that two processes share the work; `--only REGEX` those whose name matches; `--dry_run` lists what is
missing. The second command makes docs/results.md and its figures of all that is finished.

The test split is transcribed once, when a run is done. What is logged on the way there is about the validation split.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import yaml
from common import RESULTS_DIR, environment, store
from early_exit import EarlyExitTrainer
from layerwise import LayerwiseDLDTrainer
from transformers import AutoModelForCTC, AutoProcessor, TrainerCallback, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

import hf_dld
from hf_dld.distill.checkpoints import save_whole
from hf_dld.distill.faults import NonFiniteLossError
from hf_dld.evaluation import asr_metrics, evaluate_depths, search_depth_schedule
from hf_dld.models import DYNAMIC_CLASSES


@dataclass
class Experiment:
    """One YAML file (which may extend another): the data, the model, and what is compared, by the error `judged_by`.

    `teachers` maps a name to training arguments, those of `DLDTrainingArguments` where layers are to be dropped.
    `methods` maps a name to options: those of `DLDTrainingArguments`, and

    - `kind`: "dynamic" (default), "static" (a model for each depth of `layers`, the full one trained alone),
      "early_exit" (a shared CTC head after each of `depths` layers), or "cut" (the teacher, not trained);
    - `starts`: from the weights of the strong teacher ("teacher"), or random ones ("scratch"); both by default;
    - `teacher`: one of `teachers`, by default "strong", or "self";
    - `layer_selection`: "schedule" for the layers that a search on the validation split finds for the strong teacher,
      to be trained on (with `depth_sampling: selection`) and evaluated with; otherwise evenly spaced ones;
    - `share_of_steps`: 0.5 for methods whose steps cost twice as much, or for a training of half the length;
    - `learning_rate`: a number, or "own" for what the validation split finds for this method; by default the start's;
    - `colld_weight`: of the layer-to-layer loss beside DLD's (see `LayerwiseDLDTrainer`), none by default;
    - `transcribed`: the share of the training utterances whose transcripts may be used, the others being for KL alone,
      or left out with `kl_weight: 0`.
    """

    name: str
    title: str
    dataset: str
    made_by: str
    licence: str
    model_config: dict[str, Any]
    teachers: dict[str, dict[str, Any]]
    depths: list[int]
    seeds: list[int]
    training: dict[str, Any]
    starts: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    reference: str
    shown: list[str]
    sampling_rate_hz: int = 16_000
    vocabulary: str = "characters"
    vocab_size: int = 256
    max_duration_s: float = 30.0
    judged_by: Literal["wer", "cer"] = "wer"
    eval_steps: int = 250
    eval_depths: list[int] = field(default_factory=list)
    closed: bool = False  # the weights of its teachers are lost: what is finished is all that there will be
    remark: str = ""


@dataclass(frozen=True)
class Run:
    method: str
    start: str
    seed: int
    num_layers: int
    options: dict[str, Any] = field(hash=False)

    @property
    def recipe(self) -> str:
        """What all seeds have in common."""
        depth = f" {self.num_layers} layers" if self.options.get("kind") == "static" else ""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.method}{depth} from {self.start}".lower()).strip("-")

    @property
    def name(self) -> str:
        return f"{self.recipe}-seed-{self.seed}"


def read_experiment(path: str | Path) -> Experiment:
    return Experiment(**read_settings(Path(path)))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file; with `extends`, those of another one beside it where this one says nothing.

    Its `methods` come after the other one's, which it leaves out where it gives them no options (`null`).
    """
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    extended = settings.pop("extends", None)
    if extended is None:
        return settings
    inherited = read_settings(path.parent / extended)
    methods = inherited["methods"] | settings.get("methods", {})
    methods = {name: options for name, options in methods.items() if options is not None}
    return {**inherited, **settings, "methods": methods}


def plan(experiment: Experiment) -> list[Run]:
    """All runs of an experiment, seed by seed, so that what is finished can be compared at any time."""
    full, runs = experiment.model_config["num_hidden_layers"], []
    for seed in experiment.seeds:
        for method, options in experiment.methods.items():
            if options.get("kind") == "cut" and seed != experiment.seeds[0]:
                continue  # nothing is drawn
            for start in options.get("starts", list(experiment.starts)):
                for num_layers in options.get("layers", [full]):
                    runs.append(Run(method, start, seed, num_layers, options))
    return runs


def teachers_of(run: Run) -> list[str]:
    """The teachers that a run begins as, or learns from."""
    kind, teacher = run.options.get("kind", "dynamic"), run.options.get("teacher", "strong")
    if kind == "cut":
        return [teacher]
    begins = ["strong"] if run.start == "teacher" else []
    learns = kind == "dynamic" and run.options.get("kl_weight", 1.0) > 0
    return sorted({*begins, teacher} if learns and teacher != "self" else begins)


def learns_from_posteriors(run: Run) -> bool:
    """Whether a run learns from a teacher's posteriors that are computed beforehand."""
    distils = run.options.get("kind", "dynamic") == "dynamic" and run.options.get("kl_weight", 1.0) > 0
    return distils and run.options.get("teacher") != "self" and "colld_weight" not in run.options


def best_by_doubling(value: float, error: Callable[[float], float]) -> float:
    """The value doubled, or else halved, until two in a row are no better than the best: one bad training is chance."""
    for factor in (2.0, 0.5):
        best = tried = value
        while tried in (best, best * factor):
            tried *= factor
            best = tried if error(tried) < error(best) else best
        if best != value:
            return best
    return value


class Stopwatch(TrainerCallback, ExportableState):
    """CPU seconds of training, without evaluations, beside what the evaluations found; checkpoints hold them too."""

    def __init__(self) -> None:
        self.cpu_s, self.evaluations = 0.0, []

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"cpu_s": self.cpu_s, "evaluations": self.evaluations}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.last = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = time.process_time()
        self.cpu_s, self.last = self.cpu_s + now - self.last, now

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        found = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        rates = {name: value for name, value in found.items() if name.startswith(("wer", "cer"))}
        self.evaluations.append({"step": state.global_step, "cpu_s": self.cpu_s, **rates})
        self.last = time.process_time()


class Bench:
    """The data, the processor and the teachers of one experiment."""

    def __init__(self, experiment: Experiment, work: Path):
        self.experiment, self.work = experiment, work / experiment.name
        self.model_class = DYNAMIC_CLASSES[experiment.model_config["model_type"]]
        if not Path(experiment.dataset).exists():
            raise SystemExit(f"There is no {experiment.dataset} in {Path.cwd()}. It is made by: {experiment.made_by}")
        speech = {
            split: hf_dld.load_speech_dataset(experiment.dataset, split=split)
            for split in ("train", "validation", "test")
        }
        self.processor = self.make_processor(speech["train"]["text"])
        frames_of = self.fresh_model(1)._get_feat_extract_output_lengths
        self.splits = {
            split: hf_dld.prepare_dataset(
                data, self.processor, frames_of, max_duration_s=experiment.max_duration_s, decode_once=True
            )[0]
            for split, data in speech.items()
        }

    def make_processor(self, texts: Any) -> Any:
        folder = self.work / "processor"
        if folder.exists():
            return AutoProcessor.from_pretrained(folder)
        experiment = self.experiment
        masked = experiment.model_config.get("feat_extract_norm", "group") == "layer"
        options = {"sampling_rate_hz": experiment.sampling_rate_hz, "return_attention_mask": masked}
        if experiment.vocabulary == "characters":
            processor = hf_dld.build_character_processor(texts, **options)
        else:
            processor = hf_dld.build_subword_processor(texts, experiment.vocab_size, experiment.vocabulary, **options)
        save_whole(folder, processor)
        return processor

    def fresh_model(self, num_layers: int) -> Any:
        config = {name: value for name, value in self.experiment.model_config.items() if name != "model_type"}
        tokenizer = self.processor.tokenizer
        vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return self.model_class(
            self.model_class.config_class(**{**config, **vocabulary, "num_hidden_layers": num_layers})
        )

    def teacher_folder(self, name: str) -> Path:
        """The folder of a teacher beside the results, trained when it is not there yet, and what that took.

        It is stored with them because its students begin as it: trained anew on another machine, it is another one.
        """
        folder = RESULTS_DIR / self.experiment.name / "teachers" / name
        if not (folder / "config.json").exists():
            set_seed(0)
            model = self.fresh_model(self.experiment.model_config["num_hidden_layers"])
            arguments = {**self.experiment.training, **self.experiment.teachers[name], "seed": 0}
            checkpoints = self.work / "teachers" / name  # a teacher may take hours
            saved = {"output_dir": str(checkpoints), "save_strategy": "steps", "save_steps": 500, "save_total_limit": 1}
            trainer_class, arguments_class = hf_dld.CTCTrainer, hf_dld.CTCTrainingArguments
            if "depth_sampling" in arguments:
                trainer_class, arguments_class = hf_dld.DLDTrainer, hf_dld.DLDTrainingArguments
            args = arguments_class(**self.quiet(arguments | saved), restore_callback_states_from_checkpoint=True)
            trainer = self.trainer(trainer_class, model, args, self.splits["train"], Stopwatch())
            trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.exists() else None)
            [stopwatch] = [
                callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Stopwatch)
            ]
            cost = {"cpu_s": stopwatch.cpu_s, "arguments": arguments, **environment()}
            store(RESULTS_DIR / self.experiment.name / f"cost-of-teacher-{name}.json", cost)
            save_whole(folder, model, self.processor)  # last: where it is, the teacher is not trained again
            shutil.rmtree(checkpoints)
            for code in folder.glob("*.py"):  # which checkpoints carry for users who lack this package
                code.unlink()
        return folder

    def posteriors_folder(self, name: str) -> Path:
        """The folder of a teacher's posteriors of the training split, computed when it is not there yet.

        What that took on this machine is stored beside the results. Another teacher's take as long.
        """
        folder = self.work / "posteriors" / name
        if not folder.exists():
            unfinished = folder.with_name(f"{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # or it would have taken less
            arguments = self.quiet({**self.experiment.training, "teacher_cache_dir": str(unfinished)})
            trainer = self.trainer(
                hf_dld.DLDTrainer,
                self.fresh_model(1),
                hf_dld.DLDTrainingArguments(**arguments),
                self.splits["train"],
                Stopwatch(),
                teacher=self.static_teacher(name),
            )
            started = time.process_time()
            trainer.cache_teacher()
            where = environment()
            file = RESULTS_DIR / self.experiment.name / "cost-of-posteriors.json"
            known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            store(file, known | {where.pop("machine"): {"cpu_s": time.process_time() - started, **where}})
            unfinished.rename(folder)
        return folder

    def static_teacher(self, name: str) -> Any:
        return AutoModelForCTC.from_pretrained(self.teacher_folder(name)).to_static()

    def teacher_digest(self, name: str) -> str:
        with (self.teacher_folder(name) / "model.safetensors").open("rb") as weights:
            return hashlib.file_digest(weights, "sha256").hexdigest()[:12]

    def quiet(self, arguments: dict[str, Any]) -> dict[str, Any]:
        fixed = {"output_dir": str(self.work / "checkpoints"), "save_strategy": "no", "disable_tqdm": True}
        return {**fixed, "logging_steps": 250, **arguments}

    def trainer(self, trainer_class: Any, model: Any, args: Any, train: Any, stopwatch: Stopwatch, **kwargs) -> Any:
        return trainer_class(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=self.splits["validation"],
            data_collator=hf_dld.DataCollatorCTC(self.processor),
            processing_class=self.processor,
            compute_metrics=asr_metrics(self.processor.tokenizer),
            callbacks=[stopwatch],
            **kwargs,
        )

    def carry_out(self, run: Run) -> dict[str, Any]:
        """Train and evaluate one run."""
        kind = run.options.get("kind", "dynamic")
        arguments = {**self.experiment.training, **self.experiment.starts[run.start], "seed": run.seed}
        arguments |= {name: value for name, value in run.options.items() if name not in HARNESS_OPTIONS}
        arguments["max_steps"] = round(arguments["max_steps"] * run.options.get("share_of_steps", 1.0))
        if arguments.get("learning_rate") == "own":
            arguments["learning_rate"] = self.own_learning_rate(run, arguments)
        for name in teachers_of(run):
            self.teacher_folder(name)  # trained first: that draws random numbers
        set_seed(run.seed)
        model, stopwatch = self.make_student(run), Stopwatch()
        if kind != "cut":
            self.train(run, model, arguments, stopwatch)
        stem = RESULTS_DIR / self.experiment.name / run.name
        stem.parent.mkdir(parents=True, exist_ok=True)
        depths = [run.num_layers] if kind == "static" else self.experiment.depths
        selection = "first" if kind == "early_exit" else run.options.get("layer_selection", "even")
        reports = {selection: self.evaluate(model, depths, selection, stem.with_suffix(".npz"))}
        if kind != "static" and run.seed == self.experiment.seeds[0]:
            if kind != "early_exit" and selection != "schedule":
                self.search_schedule(model)
            for other in SELECTIONS:
                if other not in reports and (other != "schedule" or model.config.depth_schedule is not None):
                    reports[other] = self.evaluate(model, depths, other)
        return {
            "method": run.method,
            "start": run.start,
            "seed": run.seed,
            "num_layers": run.num_layers,
            "kind": kind,
            "arguments": arguments | {"teacher": run.options.get("teacher", "strong")},
            "teachers": {name: self.teacher_digest(name) for name in teachers_of(run)},
            **environment(),
            "threads": torch.get_num_threads(),
            "train_cpu_s": stopwatch.cpu_s,
            "evaluations": stopwatch.evaluations,
            "rates": reports,
        }

    def make_student(self, run: Run) -> Any:
        if run.start == "scratch":
            return self.fresh_model(run.num_layers)
        name = run.options.get("teacher", "strong") if run.options.get("kind") == "cut" else "strong"
        teacher = self.model_class.from_pretrained(self.teacher_folder(name))
        if run.options.get("layer_selection") == "schedule":
            self.search_schedule(teacher, resume_file=self.work / "teacher_schedule.json")
        if run.num_layers == teacher.config.num_hidden_layers:
            return teacher
        folder = self.work / "cut"
        save_whole(folder, teacher.to_static(run.num_layers))
        return self.model_class.from_pretrained(folder)

    def search_schedule(self, model: Any, resume_file: Path | None = None) -> None:
        """Make the layers that are found on the validation split the model's own."""
        validation = self.splits["validation"]
        search_depth_schedule(model, validation, self.processor, resume_file=resume_file).apply_to(model.config)

    def own_learning_rate(self, run: Run, arguments: dict[str, Any]) -> float:
        """The learning rate with which a method errs least on the validation split.

        Found once for all seeds, with a seed that is none of theirs, and stored with every rate that was tried.
        """
        file = RESULTS_DIR / self.experiment.name / f"learning-rate-of-{run.recipe}.json"
        tried = json.loads(file.read_text(encoding="utf-8"))["errors"] if file.exists() else {}

        def error(rate: float) -> float:
            if str(rate) not in tried:
                set_seed(TUNING_SEED)
                model, stopwatch = self.make_student(run), Stopwatch()
                try:
                    self.train(run, model, arguments | {"learning_rate": rate, "seed": TUNING_SEED}, stopwatch)
                    found = stopwatch.evaluations[-1]
                    unit = self.experiment.judged_by
                    tried[str(rate)] = found.get(f"{unit}_mean", found.get(unit))
                except NonFiniteLossError:
                    tried[str(rate)] = math.inf
                store(file, {"seed": TUNING_SEED, "errors": tried, **environment()})
            return tried[str(rate)]

        return best_by_doubling(self.experiment.starts[run.start]["learning_rate"], error)

    def train(self, run: Run, model: Any, arguments: dict[str, Any], stopwatch: Stopwatch) -> None:
        kind = run.options.get("kind", "dynamic")
        evaluated = {"eval_strategy": "steps", "eval_steps": self.experiment.eval_steps}
        arguments = self.quiet(arguments | evaluated)
        train = self.training_set(run.options.get("transcribed", 1.0), arguments.get("kl_weight", 1.0) > 0)
        if kind in ("static", "early_exit"):
            trainer_class, others = hf_dld.CTCTrainer, {}
            if kind == "early_exit":
                trainer_class, others = EarlyExitTrainer, {"exits": self.experiment.depths}
            args = hf_dld.CTCTrainingArguments(**arguments)
        else:
            trainer_class, others = hf_dld.DLDTrainer, {}
            teacher = run.options.get("teacher", "strong")
            if teacher == "self":
                others["teacher"] = "self"
            elif arguments.get("kl_weight", 1.0) > 0:
                others["teacher"] = self.static_teacher(teacher)
                if "colld_weight" in run.options:
                    trainer_class, others["colld_weight"] = LayerwiseDLDTrainer, run.options["colld_weight"]
                else:
                    arguments["teacher_cache_dir"] = str(self.posteriors_folder(teacher))
            arguments["eval_depths"] = self.experiment.eval_depths or None
            args = hf_dld.DLDTrainingArguments(**arguments)
        self.trainer(trainer_class, model, args, train, stopwatch, **others).train()

    def training_set(self, transcribed: float, others_too: bool) -> Any:
        """The training utterances; the transcripts of a part of them, in an order that was drawn once, taken away."""
        train = self.splits["train"]
        if transcribed == 1.0:
            return train
        train = train.shuffle(seed=0)
        count = round(transcribed * len(train))
        known = train.select(range(count))
        if not others_too:
            return known
        unknown = train.select(range(count, len(train))).map(lambda _: {"labels": []}, features=train.features)
        return datasets.concatenate_datasets([known, unknown])

    def evaluate(self, model: Any, depths: list[int], selection: str, errors: Path | None = None) -> list[dict]:
        report = evaluate_depths(
            model,
            self.splits["test"],
            self.processor,
            depths,
            selection=selection,
            draws=3,
            timed_utterances=0,
            errors_path=errors,
        )
        keys = ("num_active_layers", "wer", "wer_interval", "cer", "cer_interval", "gmac_per_s", "parameters")
        return [{key: getattr(row, key) for key in keys} for row in report.rows]


HARNESS_OPTIONS = (
    "kind", "starts", "layers", "teacher", "transcribed", "share_of_steps", "colld_weight", "layer_selection",
)  # fmt: skip
TUNING_SEED = 1000
SELECTIONS = ("even", "first", "schedule", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="YAML file")
    parser.add_argument("--work", type=Path, default=Path("outputs/evidence"), help="posteriors, unfinished teachers")
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--num_shards", type=int, default=1)
    parser.add_argument("--only", default="", help="regular expression that names of runs match")
    parser.add_argument("--dry_run", action="store_true", help="list what is missing")
    args = parser.parse_args()
    if not Path(args.experiment).is_file():
        there = ", ".join(str(path) for path in sorted(Path(__file__).parent.glob("evidence/*.yaml")))
        parser.error(f"there is no file {args.experiment}; there are {there}")

    experiment = read_experiment(args.experiment)
    if experiment.closed:
        parser.error(f"{experiment.name} is closed: the teacher of its runs is lost, and others do not compare")
    runs = [run for run in plan(experiment) if re.search(args.only, run.name)][args.shard :: args.num_shards]
    results = RESULTS_DIR / experiment.name
    missing = [run for run in runs if not (results / f"{run.name}.json").exists()]
    print(f"{len(missing)} of {len(runs)} runs are missing", flush=True)
    if args.dry_run:
        print("\n".join(run.name for run in missing))
        return
    bench = Bench(experiment, args.work)
    for run in missing:
        result = bench.carry_out(run)
        store(results / f"{run.name}.json", result)
        (rates,) = [value for value in result["rates"].values()][:1]
        shown = ", ".join(f"{row['num_active_layers']}: {100 * row['wer']:.1f}" for row in rates)
        print(f"{run.name}: WER % {shown}; {result['train_cpu_s']:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
