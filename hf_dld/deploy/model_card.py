"""Model cards: what a checkpoint's folder says of itself, as the README.md that the Hub shows."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

from ..data.datasets import public_name
from ..distill.checkpoints import RUN_FILE
from ..evaluation import DepthReport, compare_markdown
from ..models import DYNAMIC_CLASSES
from ..whole_files import whole_file

CARD_FILE = "README.md"
CARD_TAG = "hf_dld"
REPORT_FILE = "depth_report.json"
TEACHER_REPORT_FILE = "teacher_depth_report.json"
PLOT_FILE = "depth_report.png"

ARCHITECTURES = {"wavlm": "WavLM", "wav2vec2-conformer": "Wav2Vec2-Conformer"}
PAPERS = {
    "dld": ("Distillation-based Layer Dropping (DLD)", "2601.16117", 2026),
    "wavlm": ("WavLM: Large-Scale Self-Supervised Pre-Training for Full Stack Speech Processing", "2110.13900", 2021),
    "wav2vec2-conformer": ("fairseq S2T: Fast Speech-to-Text Modeling with fairseq", "2010.05171", 2020),
    "conformer": ("Conformer: Convolution-augmented Transformer for Speech Recognition", "2005.08100", 2020),
}
SELECTIONS = {
    "even": "k active layers are spread evenly over all N of them: `round(linspace(0, N - 1, k))`, layer 0 for k = 1.",
    "first": "k active layers are the first k.",
    "schedule": "The layers of each count were chosen on data; they are stored in `config.json` as `depth_schedule`.",
}


def make_model_card(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    language: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] | None = None,
    dataset_license: str | None = None,
) -> ModelCard:
    """The card of a dynamic checkpoint, from the files of its folder; the same folder always gives the same card.

    Read are `config.json`, and where they are there: the depth reports of the model and of its teacher
    (`depth_report.json`, `teacher_depth_report.json`), their plot and the arguments of the run (`run.json`). What no
    file tells has to be given. What is not given is taken from the metadata of the folder's present card, and is
    otherwise left out or said to be unknown.

    Args:
        folder: what `save_pretrained` wrote.
        repo_id: the repository that the snippets load from; default: the name of the folder.
        language: ISO 639 code of the speech, such as "en", or "multilingual".
        license: identifier of the model's licence as the Hub knows it, such as "apache-2.0".
        base_model: Hub id of the model whose weights this one started from.
        datasets: Hub ids of the training data.
        dataset_license: licence of the training data, in words.

    Raises:
        ValueError: the folder holds no dynamic checkpoint, a file that cannot be read, or a depth report of other
            layers than the configuration selects; a language that is no code; an id that no repository can have.
    """
    folder = Path(folder)
    config = _read_config(folder)
    run = _read_json(folder / RUN_FILE)
    report = _read_report(folder / REPORT_FILE)
    if report is not None:
        _check_report(report, config, folder)
    teacher_report = _read_report(folder / TEACHER_REPORT_FILE)
    if report is None or teacher_report is None or not report.is_of_the_dataset_of(teacher_report):
        teacher_report = None  # rates of another test set do not compare

    present = ModelCard.load(folder / CARD_FILE).data if (folder / CARD_FILE).exists() else ModelCardData()
    name = repo_id or present.model_name or folder.resolve().name
    language = language or present.language
    datasets = [datasets] if isinstance(datasets, str) else list(datasets or present.datasets or [])
    base_model = base_model or present.base_model
    check_facts(language, [repo_id, base_model, *datasets])

    architecture = config.stock_config_class.model_type
    data = ModelCardData(
        language=language,
        license=license or present.license,
        library_name="transformers",
        base_model=base_model,
        datasets=datasets or None,
        dataset_license=dataset_license or present.get("dataset_license"),
        metrics=["wer", "cer"],
        pipeline_tag="automatic-speech-recognition",
        tags=[CARD_TAG, "dynamic-depth", "layer-dropping", "ctc", "speech", architecture],
        model_name=name,
        eval_results=_eval_results(report, run, datasets, config.num_hidden_layers) if report is not None else None,
    )
    sections = [
        f"# {name}",
        _introduction(config),
        _facts(data, run),
        _usage(config, name, _sampling_rate_hz(folder)),
        _error_rates(report, teacher_report, run, (folder / PLOT_FILE).exists()),
        _layers(config),
        _training(config, run),
        _limits(config, report, teacher_report),
        _citations(architecture),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def check_facts(language: str | list[str] | None, hub_ids: Sequence[str | list[str] | None]) -> None:
    """Raise `ValueError` for a language that is no code, or an id that nothing on the Hub can have."""
    for code in [language] if isinstance(language, str) else language or []:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual", code):
            raise ValueError(f"language must be an ISO 639 code such as 'en', or 'multilingual'; got {code!r}.")
    for hub_id in hub_ids:
        if isinstance(hub_id, str):
            validate_repo_id(hub_id)


def write_model_card(folder: str | Path, repo_id: str | None = None, **facts: Any) -> ModelCard:
    """Write the card of `make_model_card` to the folder's README.md.

    Raises:
        ValueError: as `make_model_card`; or a README.md is there that this function did not write.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and not is_own_card(path):
        raise ValueError(f"{path} was not written by hf_dld, so it stays as it is; move it away to have a card made.")
    card = make_model_card(folder, repo_id, **facts)
    with whole_file(path) as beside:
        card.save(beside)
    return card


def is_own_card(path: str | Path) -> bool:
    """Whether a card is one of `make_model_card`, or a draft of `DLDTrainer`; perhaps edited since."""
    return CARD_TAG in (ModelCard.load(path).data.tags or [])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); mend or remove it.") from error


def _read_config(folder: Path) -> Any:
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type is None:
        raise ValueError(f"{folder} holds no model: there is no config.json with a model_type in it.")
    dynamic_types = [class_.config_class.model_type for class_ in DYNAMIC_CLASSES.values()]
    if model_type not in dynamic_types:
        raise ValueError(f"{folder} holds a {model_type} model; cards are for {sorted(set(dynamic_types))}.")
    return AutoConfig.from_pretrained(folder)


def _read_report(path: Path) -> DepthReport | None:
    return DepthReport.from_json(path) if _read_json(path) else None


def _check_report(report: DepthReport, config: Any, folder: Path) -> None:
    """A table of other layers than those that run would be silently wrong."""
    for row in report.rows:
        layers = config.resolve_active_layers(num_active_layers=row.num_active_layers)
        if tuple(row.active_layers) != layers:
            raise ValueError(
                f"{folder / REPORT_FILE} was measured with layers {list(row.active_layers)} for "
                f"{row.num_active_layers} active layers, but config.json now selects {list(layers)}: evaluate again."
            )


def _sampling_rate_hz(folder: Path) -> int | None:
    processor = _read_json(folder / "processor_config.json").get("feature_extractor")
    return (processor or _read_json(folder / "preprocessor_config.json")).get("sampling_rate")


@dataclass(frozen=True)
class _TestSet:
    """What a depth report was measured on; of a report that does not say, what its run was tested on."""

    dataset: str | None
    config: str | None
    split: str | None

    @classmethod
    def of(cls, report: DepthReport, run: dict[str, Any]) -> "_TestSet":
        if report.dataset is not None:
            return cls(report.dataset, report.dataset_config, report.split)
        data = run.get("data", {})
        dataset = public_name(data["dataset"]) if "dataset" in data else None
        return cls(dataset, data.get("dataset_config"), data.get("test_split"))


def _eval_results(report: DepthReport, run: dict[str, Any], datasets: list[str], num_layers: int) -> list[EvalResult]:
    test, trained_on = _TestSet.of(report, run), run.get("data", {}).get("dataset")
    name = test.dataset or "unknown"
    own = trained_on is None or test.dataset in (None, public_name(trained_on))
    return [
        EvalResult(
            task_type="automatic-speech-recognition",
            task_name="Automatic Speech Recognition",
            dataset_type=datasets[0] if own and len(datasets) == 1 else name,
            dataset_name=name,
            dataset_config=test.config,
            dataset_split=test.split,
            metric_type=metric,
            metric_name=f"{metric.upper()} (%), {row.num_active_layers} of {num_layers} layers",
            metric_value=round(100 * getattr(row, metric), 2),
            metric_args={"num_active_layers": row.num_active_layers},
        )
        for row in report.rows
        for metric in ("wer", "cer")
    ]


def _introduction(config: Any) -> str:
    layers, present = config.num_hidden_layers, config.present_layers
    which = f"any number of its {layers} encoder layers"
    if config.pruned_layers:
        which = (
            f"layers {', '.join(map(str, present))} of its {layers} encoder layers; the others were left out (pruned)"
        )
    text = (
        f"A {ARCHITECTURES[config.stock_config_class.model_type]} model for speech recognition (CTC) that runs with "
        f"{which}{'' if config.pruned_layers else ', chosen when it is loaded or at any call'}. A skipped layer is the "
        "identity: it costs nothing, and each depth is exactly a smaller stock model of Transformers."
    )
    active = config.resolve_active_layers()
    if len(active) < len(present):
        text += f"\n\nUnless told otherwise it runs {len(active)} of them: {', '.join(map(str, active))}."
    return text


def _facts(data: ModelCardData, run: dict[str, Any]) -> str:
    def listed(value: Any) -> str:
        return ", ".join(value) if isinstance(value, list) else value or "unknown"

    dataset = run.get("data", {}).get("dataset")
    model = run.get("model", {})
    teacher_from_scratch = model.get("train_teacher") and not model.get("teacher_start")
    from_scratch = model.get("student") == "config" or (teacher_from_scratch and not model.get("student"))
    base_model = "none, trained from scratch" if from_scratch else data.base_model
    return _table(
        ["", ""],
        [
            ["language", listed(data.language)],
            ["licence of the model", listed(data.license)],
            ["base model", listed(base_model)],
            ["training data", listed(data.datasets or (dataset and public_name(dataset)))],
            ["licence of the training data", listed(data.dataset_license)],
        ],
    )


def _usage(config: Any, name: str, sampling_rate_hz: int | None) -> str:
    depths, total = config.present_depths(), config.num_hidden_layers
    if depths:
        argument, depth = "num_active_layers", depths[-1] if config.pruned_layers else max(total // 2, 1)
        count = depth
    else:  # pruned to layers that no count selects
        argument, depth = "active_layers", list(config.present_layers)
        count = len(depth)
    other = ""
    if depths and depths[0] != depth:
        call = f'asr("audio.flac", num_active_layers={depths[0]})["text"]'
        other = f"\nprint({call})  # {_count_layers(depths[0])}, this call only"
    rate = f"{sampling_rate_hz} Hz" if sampling_rate_hz else "the model's sampling rate"
    dynamic_class, size = DYNAMIC_CLASSES[config.model_type], _count_layers(count)
    remote = _remote_code_usage(name, f'{{"{argument}": {depth}}}', rate) if getattr(config, "auto_map", None) else ""
    return f"""## Use

With [hf_dld](#citations), from any audio file that soundfile reads:

```python
import hf_dld
from transformers import pipeline

asr = pipeline("automatic-speech-recognition", model="{name}", {argument}={depth})
print(asr("audio.flac")["text"])  # {count} of {total} layers{other}
```

{remote}As a stock model of {size}, a {dynamic_class.stock_class.__name__} which then needs neither hf_dld nor this
repository's code:

```python
import hf_dld

hf_dld.export_static("{name}", "static", {depth})
```

As an ONNX file of {size}, for onnxruntime alone (the export needs `pip install "hf_dld[onnx]"`):

```python
import hf_dld

hf_dld.export_onnx("{name}", "onnx", {depth})
```"""


def _remote_code_usage(name: str, depth: str, rate: str) -> str:
    return f"""Without hf_dld, by the code that this repository carries; here the samples have to be mono and at {rate}:

```python
import soundfile
from transformers import pipeline

asr = pipeline(
    "automatic-speech-recognition",
    model="{name}",
    trust_remote_code=True,
    model_kwargs={depth},
)
samples, sampling_rate_hz = soundfile.read("audio.flac", dtype="float32")
print(asr(samples)["text"])
```

"""


def _error_rates(
    report: DepthReport | None, teacher_report: DepthReport | None, run: dict[str, Any], plotted: bool
) -> str:
    if report is None:
        return "## Error rates\n\nUnknown: no depth report was made of this checkpoint."
    reports = [report] if teacher_report is None else [teacher_report, report]
    parts = ["## Error rates at each depth", compare_markdown(reports).rstrip()]
    if plotted:
        parts.append(f"![Word error rate at each depth]({PLOT_FILE})")
    test = _TestSet.of(report, run)
    where = f"the split `{test.split}` of {test.dataset}" if test.dataset else "an unknown test set"
    parts.append(
        f"Measured on {where}: {report.utterances} utterances, {report.words} words; greedy CTC decoding without a "
        f"language model, in {report.batch_policy}."
    )
    return "\n\n".join(parts)


def _layers(config: Any) -> str:
    chosen = [config.resolve_active_layers(num_active_layers=count) for count in config.present_depths()]
    rows = [[str(len(layers)), ", ".join(map(str, layers))] for layers in chosen]
    return (
        "## Which layers run\n\n"
        f"`layer_selection` is `{config.layer_selection}`: {SELECTIONS[config.layer_selection]} Counted from 0"
        + (f"; other counts need some of the pruned layers {config.pruned_layers}" if config.pruned_layers else "")
        + ":\n\n"
        + _table(["active layers", "which"], rows)
    )


def _count_layers(count: int) -> str:
    return f"{count} layer" + "s" * (count > 1)


def _training(config: Any, run: dict[str, Any]) -> str:
    if not run:
        return "## Training\n\nUnknown: the arguments of the run are not stored beside this checkpoint."
    model, data, training = (run.get(part, {}) for part in ("model", "data", "training"))
    rows = [["method", _method(model, training)], ["student starts from", _start(model)]]
    if _has_teacher(training):
        teacher = model.get("teacher")
        if model.get("train_teacher"):
            teacher = "trained first, on the same data"
            if model.get("teacher_start"):
                teacher += f", from {public_name(model['teacher_start'])}"
            if model.get("teacher_depth_sampling"):
                teacher += f", with layers dropped ({model['teacher_depth_sampling']})"
        teacher = "the weights under the adapters" if teacher == "base" else public_name(teacher or "unknown")
        rows.append(["teacher", teacher])
    if model.get("lora_r"):
        rows.append(["trained", f"LoRA adapters of rank {model['lora_r']}, merged into the weights"])
    if "dataset" in data:
        rows.append(["data", f"split `{data.get('train_split')}` of {public_name(data['dataset'])}"])
    names = ["depth_sampling", "ctc_weight", "kl_weight", "kl_weight_end", "kl_temperature", "kl_direction"]
    if training.get("depth_sampling") == "bernoulli":
        names.insert(1, "layerdrop")
    if "conformer" in config.model_type:
        names += ["batch_norm", "batch_norm_freeze_at"]
    names.append("max_steps" if training.get("max_steps", -1) > 0 else "num_train_epochs")
    names += ["learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "per_device_train_batch_size"]
    names += ["gradient_accumulation_steps", "seed"]
    rows += [[f"`{name}`", str(training[name])] for name in names if training.get(name) is not None]
    versions = ", ".join(f"{library} {version}" for library, version in run.get("versions", {}).items())
    rows.append(["versions", versions or "unknown"])
    return "## Training\n\n" + _table(["", ""], rows)


def _has_teacher(training: dict[str, Any]) -> bool:
    return bool(training.get("kl_weight") or training.get("kl_weight_end"))


def _method(model: dict[str, Any], training: dict[str, Any]) -> str:
    if not _has_teacher(training):
        return "layer dropping, without a teacher"
    if model.get("teacher") == "self":
        return "layer dropping; in each step the full depth teaches the drawn one"
    return "distillation-based layer dropping (DLD)"


def _start(model: dict[str, Any]) -> str:
    if model.get("student") == "config":
        return "random weights"
    return public_name(model["student"]) if model.get("student") else "the teacher's weights"


def _limits(config: Any, report: DepthReport | None, teacher_report: DepthReport | None) -> str:
    limits = [
        "It writes only what its training transcripts wrote: their language, characters and spelling.",
        "Error rates hold for speech like the test set's; other speakers, rooms, noise and accents were not measured."
        if report is not None
        else "How well it works is not known for any speech, and no depth is known to be useful.",
    ]
    deepest = config.num_hidden_layers
    if report is not None and teacher_report is not None and {deepest} <= _depths(report) & _depths(teacher_report):
        loss = 100 * (report.row(deepest).wer - teacher_report.row(deepest).wer)
        limits.append(
            f"At full depth its word error rate is {abs(loss):.1f} points {'above' if loss > 0 else 'below'} its "
            "teacher's on this test set."
        )
    if config.feat_extract_norm == "group" or "conformer" in config.model_type:
        limits.append(
            "Padding changes its outputs slightly, so a batch may be transcribed otherwise than its utterances alone."
        )
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _depths(report: DepthReport) -> set[int]:
    return {row.num_active_layers for row in report.rows}


def _citations(architecture: str) -> str:
    keys = ["dld", architecture] + (["conformer"] if architecture == "wav2vec2-conformer" else [])
    entries = []
    for key in keys:
        title, arxiv_id, year = PAPERS[key]
        entries.append(
            f"@misc{{{key},\n  title = {{{title}}},\n  year = {{{year}}},\n  eprint = {{{arxiv_id}}},\n"
            "  archivePrefix = {arXiv}\n}"
        )
    entries.append(
        "@software{hf_dld,\n  title = {hf_dld: dynamic-depth speech recognition for Hugging Face Transformers},\n"
        "  author = {The hf_dld developers}\n}"
    )
    return (
        "## Citations\n\nThe method (an independent implementation of it), the architecture, and the software:\n\n"
        "```bibtex\n" + "\n\n".join(entries) + "\n```"
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
