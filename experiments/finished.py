"""The finished runs of an experiment, and how two of its methods compare: what the page of results is made of."""

import json
from typing import Any, Literal

import numpy as np
from common import RESULTS_DIR
from evidence import Experiment, learns_from_posteriors, plan, teachers_of

from hf_dld.evaluation.intervals import bootstrap_interval

COUNTED = {"wer": "word", "cer": "character"}
OWN_RATE = ", own learning rate"
Counted = Literal["training", "posteriors", "teachers"]


def rival(method: str, reference: str) -> str:
    """What a method is compared with: the reference, with its own learning rate where the method has its own."""
    return reference + OWN_RATE if method.endswith(OWN_RATE) else reference


class Finished:
    """The finished runs of one experiment."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.folder = experiment, RESULTS_DIR / experiment.name
        finished = [(run, path) for run in plan(experiment) if (path := self.folder / f"{run.name}.json").exists()]
        self.runs = [
            json.loads(path.read_text(encoding="utf-8"))
            | {"path": path, "taught_by": teachers_of(run), "learns_from_posteriors": learns_from_posteriors(run)}
            for run, path in finished
        ]
        self.teacher_costs = {
            path.stem.removeprefix("cost-of-teacher-"): json.loads(path.read_text(encoding="utf-8"))["cpu_s"]
            for path in sorted(self.folder.glob("cost-of-teacher-*.json"))
        }
        for name in experiment.teachers:
            taught = [run for run in self.runs if name in run["taught_by"]]
            digests = {run.get("teachers", {}).get(name, "not stored") for run in taught}
            if len(digests) > 1:
                raise ValueError(
                    f"{experiment.name}: students of different teachers ({', '.join(sorted(digests))}) do not compare. "
                    "Give those of one teacher an experiment of their own, as digits_wavlm_first_teacher.yaml is."
                )
        self.rates_tried = {
            path.stem.removeprefix("learning-rate-of-"): json.loads(path.read_text(encoding="utf-8"))["errors"]
            for path in sorted(self.folder.glob("learning-rate-of-*.json"))
        }
        for recipe, errors in self.rates_tried.items():
            for rate in self.rates_used(recipe):
                if errors[str(rate)] > min(errors.values()):
                    raise ValueError(
                        f"{experiment.name}: {recipe} was trained with the learning rate {rate}, and errs least with "
                        f"{min(errors, key=errors.get)}: remove those runs, and train them anew."
                    )
        posteriors = self.folder / "cost-of-posteriors.json"
        costs = json.loads(posteriors.read_text(encoding="utf-8")) if posteriors.exists() else {}
        self.posteriors_cpu_s: dict[str, float] = {machine: cost["cpu_s"] for machine, cost in costs.items()}
        self.num_layers = experiment.model_config["num_hidden_layers"]
        self.unit = experiment.judged_by
        self.heard: np.ndarray | None = None  # hashes of the test transcripts, of the first run that is looked at

    def rates_used(self, recipe: str) -> set[float]:
        """The learning rate of all finished runs of a recipe; empty where none is finished."""
        runs = [run for run in self.runs if run["path"].stem.startswith(f"{recipe}-seed-")]
        return {run["arguments"]["learning_rate"] for run in runs}

    def of(self, method: str, start: str, num_layers: int | None = None) -> list[dict[str, Any]]:
        return [
            run
            for run in self.runs
            if (run["method"], run["start"]) == (method, start) and num_layers in (None, run["num_layers"])
        ]

    def rates(self, method: str, start: str, depth: int, unit: str | None = None) -> dict[int, float]:
        """Error rates by seed, of what the experiment is judged by unless another `unit` is asked for.

        With the layers that the method itself uses; a static model has its own depth alone.
        """
        rates = {}
        for run in self.of(method, start):
            own = next(iter(run["rates"].values()))
            for row in own:
                if row["num_active_layers"] == depth:
                    rates[run["seed"]] = row[unit or self.unit]
        return rates

    def changes(self, method: str, reference: str, start: str, depth: int) -> list[float]:
        """Relative changes of the error rate, a seed each."""
        ours, theirs = (self.rates(name, start, depth) for name in (method, reference))
        return [ours[seed] / theirs[seed] - 1 for seed in sorted(ours.keys() & theirs.keys())]

    def errors(self, method: str, start: str, depth: int) -> dict[int, np.ndarray]:
        """Word or character errors of each test utterance, by seed; all runs must have transcribed the same ones."""
        errors, name = {}, COUNTED[self.unit] + f"_errors_{depth}"
        for run in self.of(method, start):
            with np.load(run["path"].with_suffix(".npz")) as stored:
                if name in stored:
                    self.heard = stored["text"] if self.heard is None else self.heard
                    if not np.array_equal(stored["text"], self.heard):
                        raise ValueError(f"{run['path'].stem} transcribed other utterances than the runs beside it.")
                    errors[run["seed"]] = stored[name].astype(np.int64)
        return errors

    def interval(self, method: str, reference: str, start: str, depth: int) -> str:
        """Of the relative change of all seeds' errors together: a paired bootstrap over utterances."""
        ours, theirs = (self.errors(name, start, depth) for name in (method, reference))
        seeds = ours.keys() & theirs.keys()
        counts = np.stack([sum(errors[seed] for seed in seeds) for errors in (ours, theirs)], axis=1)
        low, high = bootstrap_interval(counts, lambda totals: totals[..., 0] / totals[..., 1] - 1)
        return f"{100 * low:+.1f} to {100 * high:+.1f} %"


def budget_ratios(
    done: Finished, method: str, start: str, budget: Literal["cpu_s", "step"], counted: Counted = "training"
) -> list[float | None]:
    """What it takes to reach the reference's final error on validation, over its whole training; None if never.

    CPU seconds may count, beside the student's training, the teacher's posteriors of the training split, computed once,
    and also the training of the teachers that a run begins as or learns from. Only those of one machine are compared.
    """
    ratios, rate = [], f"{done.unit}_mean"
    for run in done.of(rival(method, done.experiment.reference), start):
        twin = [other for other in done.of(method, start) if other["seed"] == run["seed"]]
        if not twin or not run["evaluations"] or rate not in run["evaluations"][-1]:
            continue
        if budget == "cpu_s" and twin[0]["machine"] != run["machine"]:
            continue
        target = run["evaluations"][-1][rate]
        reached = [point[budget] for point in twin[0]["evaluations"] if point[rate] <= target]
        whole = run["train_cpu_s"] if budget == "cpu_s" else run["arguments"]["max_steps"]
        before = [cpu_s_before(done, each, counted) if budget == "cpu_s" else 0.0 for each in (twin[0], run)]
        ratios.append((before[0] + reached[0]) / (before[1] + whole) if reached else None)
    return ratios


def cpu_s_before(done: Finished, run: dict[str, Any], counted: Counted) -> float:
    """CPU seconds that a run needs before its own training."""
    learns = counted != "training" and run["learns_from_posteriors"]
    posteriors = done.posteriors_cpu_s[run["machine"]] if learns else 0.0
    return posteriors + (sum(done.teacher_costs[name] for name in run["taught_by"]) if counted == "teachers" else 0.0)
