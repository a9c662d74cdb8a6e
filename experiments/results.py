"""Turn the finished runs of experiments/evidence.py into docs/results.md and its figures.

    python experiments/results.py

Every number on the page is computed here from the JSON files in experiments/results/NAME; nothing is typed in but the
paper's own figures.
"""

import json
import statistics
from collections.abc import Iterable
from itertools import pairwise, product
from pathlib import Path

import colld
import matplotlib
from common import ROOT, spread
from evidence import SELECTIONS, Experiment, plan, read_experiment
from finished import COUNTED, OWN_RATE, Counted, Finished, budget_ratios, cpu_s_before, rival
from matplotlib.figure import Figure

from hf_dld.evaluation.plots import COLOURS, MARKERS

PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"
SHIPPED, PAPER, STATIC = "DLD, balanced (shipped)", "DLD, Bernoulli 0.5 (the paper)", "static, trained alone"
LONGER = "DLD, balanced, 1.3 times the steps"  # a step of what is shipped costs less than one of layer dropping
BETTER_TAUGHT = "DLD, balanced, better teacher"  # which teacher is taken is not shipped
TUNED = "each at its own learning rate"
HALF = ", half the steps"
COMMON_RATE = ", common learning rate"
JUDGED = {
    "here": SHIPPED,
    "in 1.3 times the steps": LONGER,
    "with a better teacher": BETTER_TAUGHT,
    TUNED: SHIPPED + OWN_RATE,
    f"in 1.3 times the steps, {TUNED}": LONGER + OWN_RATE,
    f"in half the steps, {TUNED}": SHIPPED + HALF + OWN_RATE,
    f"with a better teacher, {TUNED}": BETTER_TAUGHT + OWN_RATE,
}
PUBLISHED = {PAPER: "", PAPER + OWN_RATE: f", {TUNED}", PAPER + HALF + OWN_RATE: f", in half the steps, {TUNED}"}
OVERVIEW = (*PUBLISHED, SHIPPED, LONGER, SHIPPED + OWN_RATE, LONGER + OWN_RATE, SHIPPED + HALF + OWN_RATE)
# a teacher changes nothing of what a step costs, and its students ran in other hours than layer dropping
TIMED = [label for label, method in JUDGED.items() if not method.startswith(BETTER_TAUGHT)]
INTERVAL = "95 % interval"
BESIDES: dict[Counted, str] = {
    "training": "",
    "posteriors": ", the teacher's posteriors counted",
    "teachers": ", the teacher's training counted too",
}
STARTS = {"teacher": "from the teacher's weights", "scratch": "from scratch"}
INTRODUCTION = """# Results

Made by `python experiments/results.py` from the stored runs in [experiments/results](../experiments/results); each
experiment is one YAML file, and one command trains what is missing of it:

    python experiments/evidence.py experiments/evidence/digits_wavlm.yaml
    python experiments/results.py

Methods of one table have the same model, data, batches and number of steps. Their learning rate is the same too, but
for those "own learning rate": that is the one with which the method erred least on the validation split, with a seed
that is not reported, and what it is compared with has its own as well. Error rates are those of the test split, which
each run transcribes once, at its end; "mean (lowest to highest)" is over seeds, and a table says how many are finished:
what is not finished is not shown. Intervals come from a paired bootstrap over test utterances, with the errors of all
seeds together: they hold for these seeds, whose spread stands beside them and is often wider. Times are CPU seconds of
one thread and leave evaluations out. The time to layer dropping's final error is that after which the validation split,
with the two depths that are looked at every 250 steps (200 of the commands), shows the error that layer dropping ends
with there. Searches for a learning rate are in no time. A teacher's posteriors are computed once and serve all of its
students: times are given without and with them, as measured on the machine of the runs. Between commits 51fdfb2 and
75c65b8 steps became a quarter cheaper, and from 22a60b1 on they ran on another processor, twice as fast, on which the
same step took 85 to 111 ms in different hours; those of 9c2df32 and from 1890682 on are of a third, slower one. Times
compare roughly, and on one processor; steps always.
"""


def table(header: list[str], rows: Iterable[list[str]], left: int = 1) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "| --- " * left + "| ---: " * (len(header) - left) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def count_layers(depth: int) -> str:
    return f"{depth} layer" + "s" * (depth > 1)


def overview(everything: list[Finished]) -> list[str]:
    """What became of the paper's recipe and of what is shipped in every experiment: the means over seeds."""
    rows = [["published, on other data", "", PAPER, "", "-9.32", "-2.25", "-33.3", ""]]
    for done in everything:
        quarter = [depth for depth in done.experiment.depths if depth <= done.num_layers / 4]
        for start in STARTS:
            for method in OVERVIEW:
                compared = (method, rival(method, done.experiment.reference), start)
                changes = [done.changes(*compared, depth) for depth in (quarter[0], quarter[-1], done.num_layers)]
                if not changes[0]:
                    continue
                ratios = budget_ratios(done, method, start, "cpu_s", "posteriors")
                times = [ratio - 1 for ratio in ratios if ratio is not None]
                time = f"{100 * statistics.mean(times):+.1f}" if times else ""  # measured on different machines
                time = "not by every seed" if len(times) < len(ratios) else time
                means = [f"{100 * statistics.mean(change):+.1f}" for change in changes]
                rows.append([done.experiment.title, STARTS[start], method, *means, time, str(len(changes[0]))])
    for above, row in reversed(list(pairwise(rows))):  # what a row shares with the one above is not repeated
        row[0], row[1] = "" if row[0] == above[0] else row[0], "" if row[:2] == above[:2] else row[1]
    header = ["errors and time against plain layer dropping's, %", "start", "method", "one layer", "a quarter of them"]
    return table([*header, "all", "time to its error, posteriors counted", "seeds"], rows, left=3)


def error_table(done: Finished, start: str, unit: str) -> list[str]:
    rows = []
    for method, options in done.experiment.methods.items():
        runs = done.of(method, start)
        if not runs:
            continue
        cells = [spread(done.rates(method, start, depth, unit).values()) for depth in done.experiment.depths]
        seeds = "" if options.get("kind") == "cut" else str(len({run["seed"] for run in runs}))
        rows.append([method, *cells, seeds])
    header = [f"{unit.upper()} %, {STARTS[start]}", *map(count_layers, done.experiment.depths), "seeds"]
    return table(header, rows) if rows else []


def verdict(changes: list[float], wanted: float) -> str:
    """Whether the mean change is as low as wanted, and whether every seed is."""
    if statistics.mean(changes) > wanted:
        return "missed"
    return "holds" if max(changes) <= wanted else "holds on the mean, not for every seed"


def claims_table(done: Finished) -> list[str]:
    """The paper's three claims: method, our figure, whether it holds."""
    rows, unit = [], done.unit.upper()
    high = max(depth for depth in done.experiment.depths if depth <= done.num_layers / 4)
    for start, (method, tuned) in product(STARTS, PUBLISHED.items()):
        for what, depth, claimed in (
            (f"{unit} at high dropping ({high} of {done.num_layers} layers)", high, -0.0932),
            (f"{unit} without dropping", done.num_layers, -0.0225),
        ):
            compared = (method, rival(method, done.experiment.reference), start, depth)
            if changes := done.changes(*compared):
                ours = [spread(changes, sign="+") + " %", done.interval(*compared), verdict(changes, claimed)]
                rows.append([f"{what}, {STARTS[start]}{tuned}", f"{100 * claimed:+.2f} %", *ours])
        for counted, besides in BESIDES.items():
            if change := time_change(done, method, start, -0.333, counted):
                what = f"training time to layer dropping's final {unit}, {STARTS[start]}{tuned}{besides}"
                rows.append([what, "-33.3 %", change[0], "", change[1]])
    header = ["the paper's claim, against plain layer dropping", "paper", "here", INTERVAL, "verdict"]
    return table(header, rows) if rows else []


def time_change(
    done: Finished, method: str, start: str, wanted: float, counted: Counted = "training"
) -> tuple[str, str] | None:
    """The time to the reference's error, and its verdict; None where nothing is finished that could be compared."""
    ratios = budget_ratios(done, method, start, "cpu_s", counted)
    if not ratios:
        return None
    changes = [ratio - 1 for ratio in ratios if ratio is not None]
    missing = len(ratios) - len(changes)
    ours = spread(changes, sign="+") + " %" if changes else ""
    if missing:
        ours += f" ({missing} of {len(ratios)} seeds never reached it)"
    return ours, "missed" if missing else verdict(changes, wanted)


def goals_table(done: Finished) -> list[str]:
    """What this project wants of what it ships, in as many steps as layer dropping; and longer, or better taught."""
    rows, full, reference = [], done.num_layers, done.experiment.reference
    finished = {SHIPPED, *(run["method"] for run in done.runs)}
    judged = {label: method for label, method in JUDGED.items() if method in finished}
    quarter = [depth for depth in done.experiment.depths if depth <= full / 4]
    for start, (low, high) in {"scratch": (-0.25, -0.15), "teacher": (-0.18, -0.06)}.items():
        for depths, wanted in ((quarter, low), ([full], high)):
            for depth in depths:
                what = f"{count_layers(depth)}, {STARTS[start]}, against plain layer dropping"
                rows += goal_row(done, judged, what, reference, start, depth, wanted)
        what = f"{full} layers, {STARTS[start]}, against a static model trained as long"
        rows += goal_row(done, judged, what, STATIC, start, full, 0.0)
        for counted in ("training", "posteriors"):
            what = f"time to plain layer dropping's final {done.unit.upper()}, {STARTS[start]}{BESIDES[counted]}"
            timed = [
                time_change(done, judged[label], start, -0.5, counted) if label in TIMED else None for label in judged
            ]
            if timed[0]:
                rows.append([what, "-50 %", *(": ".join(change) if change else "" for change in timed), ""])
            rows += cost_row(done, judged, start, counted)
    for depth in done.experiment.depths:
        if depth >= full / 3:
            what = f"{depth} layers, from scratch, against a static model of that depth"
            alone = STATIC if depth == full else "static, each depth alone"
            rows += goal_row(done, judged, what, alone, "scratch", depth, 0.1)
    header = ["our goal for DLD as shipped", "wanted", *judged, f"{INTERVAL} of the first"]
    return table(header, rows) if rows else []


def goal_row(
    done: Finished, judged: dict[str, str], what: str, reference: str, start: str, depth: int, wanted: float
) -> list[list[str]]:
    """One row of `goals_table`; none where nothing is finished that could be compared."""
    changed = [done.changes(method, rival(method, reference), start, depth) for method in judged.values()]
    if not changed[0]:
        return []
    cells = [f"{spread(changes, sign='+')} %: {verdict(changes, wanted)}" if changes else "" for changes in changed]
    return [[what, f"{100 * wanted:+.0f} %", *cells, done.interval(SHIPPED, reference, start, depth)]]


def cost_row(done: Finished, judged: dict[str, str], start: str, counted: Counted) -> list[list[str]]:
    """What the trainings behind the columns of `goals_table` cost, where they were made on one machine."""

    def costs(method: str) -> dict[tuple[int, str], float]:
        runs = done.of(method, start)
        return {(run["seed"], run["machine"]): run["train_cpu_s"] + cpu_s_before(done, run, counted) for run in runs}

    cells = []
    for label, method in judged.items():
        ours, theirs = costs(method), costs(rival(method, done.experiment.reference))
        changes = [ours[run] / theirs[run] - 1 for run in sorted(ours.keys() & theirs.keys())]
        cells.append(spread(changes, sign="+") + " %" if changes and label in TIMED else "")
    what = f"CPU seconds of the whole training, {STARTS[start]}{BESIDES[counted]}, against plain layer dropping's"
    return [[what, "", *cells, ""]] if cells[0] else []


def rates_table(done: Finished) -> list[str]:
    """The learning rates that were tried for a method, and which it got."""
    rows = []
    for recipe, tried in done.rates_tried.items():
        cells = [f"{rate}: {100 * tried[rate]:.1f}" for rate in sorted(tried, key=float)]
        rows += [[recipe, str(chosen), ", ".join(cells)] for chosen in done.rates_used(recipe)]
    header = ["method", "its own learning rate", f"validation {done.unit.upper()} % at each that was tried"]
    return table(header, rows, left=3) if rows else []


def times_table(done: Finished) -> list[str]:
    rows = []
    for start in STARTS:
        for method, options in done.experiment.methods.items():
            runs = done.of(method, start, done.num_layers)
            if not runs or options.get("kind") == "cut":
                continue
            steps = runs[0]["arguments"]["max_steps"]
            # the others are evaluated at their full depth alone
            if runs[0]["kind"] == "dynamic":
                counted = (("step", "training"), ("cpu_s", "training"), ("cpu_s", "posteriors"), ("cpu_s", "teachers"))
                reached = [reached_after(budget_ratios(done, method, start, *budget)) for budget in counted]
            else:
                reached = [""] * 4
            usual = statistics.mode(run["machine"] for run in done.runs)
            per_step = [run["train_cpu_s"] / steps for run in runs if run["machine"] == usual]
            commits = ", ".join(sorted({run["commit"][:7] for run in runs}))
            rows.append([method, STARTS[start], commits, spread(per_step, 1000), *reached])
    header = ["method", "start", "commit", "CPU ms a step"]
    header.append(f"steps to plain layer dropping's final {done.unit.upper()}, % of its")
    header.append("CPU seconds to that, % of its")
    header += ["the same with the teacher's posteriors", "and with its training"]
    known = [f"{name}: {cost:.0f} s" for name, cost in done.teacher_costs.items()]
    posteriors = " or ".join(f"{cost:.0f} s" for cost in done.posteriors_cpu_s.values()) or "not computed"
    note = f"The training of the teacher ({', '.join(known)}) is counted in the last column alone; its posteriors of "
    note += f"the training split ({posteriors} on each machine, once for all students) in the last two. Steps are "
    note += "timed on the machine of most runs, and times compared on one."
    return [*table(header, rows, left=3), note, ""] if rows else []


def reached_after(ratios: list[float | None]) -> str:
    """Their mean and range in percent, and how many never got there."""
    never = sum(ratio is None for ratio in ratios)
    reached = spread(ratio for ratio in ratios if ratio is not None)
    return f"{reached} (never: {never} of {len(ratios)} seeds)".strip() if never else reached


def selections_table(done: Finished) -> list[str]:
    rows = []
    for start in STARTS:
        for method in done.experiment.methods:
            run = next((run for run in done.of(method, start) if len(run["rates"]) > 1), None)
            if run is None:
                continue
            for selection in SELECTIONS:
                if selection in run["rates"]:
                    cells = [f"{100 * row[done.unit]:.1f}" for row in run["rates"][selection]]
                    rows.append([f"{method}, {STARTS[start]}", selection, *cells])
    header = [f"{done.unit.upper()} %, one seed", "layers", *(str(depth) for depth in done.experiment.depths)]
    return table(header, rows, left=2) if rows else []


def draw(done: Finished, path: Path) -> bool:
    """Errors against active layers for the methods of `shown`, an axis for each start; False if nothing is finished.

    Where the reference was trained at its own learning rate, so is what it is drawn with, or that is said.
    """
    starts = [start for start in STARTS if any(done.of(method, start) for method in done.experiment.shown)]
    if not starts:
        return False
    figure = Figure(figsize=(5.2 * len(starts), 4.8), layout="constrained")
    axes = figure.subplots(1, len(starts), sharey=True, squeeze=False)
    for axis, start in zip(axes[0], starts, strict=True):
        tuned = bool(done.of(done.experiment.reference + OWN_RATE, start))
        for place, method in enumerate(done.experiment.shown):
            own_rate = bool(done.of(method + OWN_RATE, start))
            compared = method + OWN_RATE if own_rate else method
            points = {d: rates.values() for d in done.experiment.depths if (rates := done.rates(compared, start, d))}
            if not points:
                continue
            untuned = tuned and not own_rate and done.experiment.methods[method].get("kind") != "cut"
            label = method + COMMON_RATE if untuned else method
            means = [100 * statistics.mean(rates) for rates in points.values()]
            style = {"color": COLOURS[place], "marker": MARKERS[place]}
            line = "none" if len(points) == 1 else "--" if untuned else "-"
            axis.plot(list(points), means, label=label, linestyle=line, **style)
            lows, highs = ([100 * f(rates) for rates in points.values()] for f in (min, max))
            axis.fill_between(list(points), lows, highs, color=COLOURS[place], alpha=0.2, linewidth=0)
        axis.set_title(f"{STARTS[start]}, {TUNED}" if tuned else STARTS[start], fontsize=10)
        axis.set_xlabel("active encoder layers")
        axis.set_xticks(done.experiment.depths)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"{COUNTED[done.unit]} error rate (%), mean and range over seeds")
    axes[0][0].set_ylim(0, min(axes[0][0].get_ylim()[1], 105))  # beyond there are more errors than words
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    shown = [label for name in done.experiment.shown for label in (name, name + COMMON_RATE) if label in lines]
    # below the panels: within one it would lie on curves
    columns = 3 if len(starts) > 1 else 2
    handles = [lines[method] for method in shown]
    figure.legend(handles, shown, frameon=False, fontsize=8, loc="outside lower center", ncols=columns)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": path.name}):  # the same figure is the same file
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return True


def page(experiments: Iterable[Experiment]) -> str:
    """All experiments that have finished runs, those with the most first."""
    everything = sorted(map(Finished, experiments), key=lambda done: len(done.runs), reverse=True)
    lines = [INTRODUCTION, *overview(everything)]
    for done in everything:
        experiment = done.experiment
        if not done.runs:
            continue
        lines += [f"## {experiment.title}", ""]
        lines += [f"Data: {experiment.licence}; made by `{experiment.made_by.strip()}`.", ""]
        if draw(done, IMAGES / f"results_{experiment.name}"):
            lines += [f"![{done.unit.upper()} against active layers](images/results_{experiment.name}.png)", ""]
        lines += [experiment.remark.strip(), ""] if experiment.remark else []
        lines += [*claims_table(done), *goals_table(done)]
        for unit in ("wer", "cer") if done.unit == "wer" else ("cer", "wer"):
            for start in STARTS:
                lines += error_table(done, start, unit)
        lines += [*rates_table(done), *times_table(done), *selections_table(done)]
        lines += [provenance(done), ""]
    return "\n".join(lines)


def provenance(done: Finished) -> str:
    machines = {f"{run['machine']}, torch {run['torch']}, transformers {run['transformers']}" for run in done.runs}
    commits = {run["commit"][:10] for run in done.runs}
    planned = f"{len(done.runs)} of {len(plan(done.experiment))} runs are finished."
    finished = f"{len(done.runs)} runs; no more can be added." if done.experiment.closed else planned
    teachers = sorted({" ".join(teacher) for run in done.runs for teacher in run.get("teachers", {}).items()})
    stored = f" Teachers, by the SHA-256 of their weights: {', '.join(teachers)}." if teachers else ""
    return f"{finished}{stored} Commits {', '.join(sorted(commits))}; {'; '.join(sorted(machines))}."


def colld_section() -> list[str]:
    """The table of experiments/colld.py, and what its goal asks for."""
    if not colld.RESULTS.exists():
        return []
    stored = json.loads(colld.RESULTS.read_text(encoding="utf-8"))
    runs, settings = stored["runs"], stored["settings"]
    (teacher,) = (run for run in runs if run["method"] == "teacher")
    kept = [(1 - run["wer"]) / (1 - teacher["wer"]) for run in runs if run["method"] == next(iter(colld.METHODS))]
    lines = [
        "## Half the depth by layer-to-layer distillation (CoLLD)",
        "",
        "    python experiments/colld.py --dataset outputs/connected_digits",
        "",
        "Connected digits without babble (Free Spoken Digit Dataset, CC BY-SA 4.0); a WavLM teacher of 12 layers, "
        f"trained by CTC for {settings['teacher_steps']} steps; {settings['distill_steps']} steps of distillation, "
        f"which sees no transcript, then {settings['tune_steps']} steps of CTC with a new head, for every student.",
        "",
        colld.markdown(runs),
        "",
        f"Of the teacher's accuracy (100 % minus the WER) CoLLD's student keeps {spread(kept)} %; the goal was 95 % at "
        "least.",
        "",
        f"Commit {stored['commit'][:10]}; {stored['machine']}, torch {stored['torch']}, transformers "
        f"{stored['transformers']}.",
        "",
    ]
    return lines


def main() -> None:
    experiments = [read_experiment(path) for path in sorted((ROOT / "experiments" / "evidence").glob("*.yaml"))]
    PAGE.write_text("\n".join([page(experiments), *colld_section()]), encoding="utf-8")


if __name__ == "__main__":
    main()
