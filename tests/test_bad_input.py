"""What a careless user meets: each case is tried, its answer asserted, and the table in docs/bad_input.md made of them.

To write the table anew: python tests/test_bad_input.py
"""

import json
import os
import re
import resource
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_dynamic, make_stock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCTC, pipeline

from hf_dld import (
    CheckpointError,
    CTCTrainer,
    CTCTrainingArguments,
    DLDTrainer,
    DLDTrainingArguments,
    build_character_processor,
    export_static,
    load_speech_dataset,
    prepare_dataset,
)
from hf_dld.data import decode_audio, load_processor
from hf_dld.distill.checkpoints import claim_output_dir, save_whole

TABLE = Path(__file__).parents[1] / "docs" / "bad_input.md"
INTRODUCTION = """# Bad input, and what it leads to

Every line is tried by `tests/test_bad_input.py`, which also makes this table. "Left out" means: the utterance is
dropped before training, counted by reason, and the report is logged; all others are used. What is promised for
input that somebody made to do harm stands in [hostile_input.md](hostile_input.md).

| input | outcome | answer |
| --- | --- | --- |
"""


def beep(folder: Path, name: str, seconds: float = 0.5, rate_hz: int = 16_000, channels: int = 1) -> Path:
    samples = 0.3 * np.sin(np.arange(int(seconds * rate_hz)) * 0.2)
    soundfile.write(folder / name, np.stack([samples] * channels, axis=1), rate_hz)
    return folder / name


def prepared(folder: Path, *bad_rows: str, good: int = 3) -> str:
    """The report of a corpus with some good utterances and these rows of its manifest."""
    beep(folder, "good.wav")
    rows = ["file_name,text", *["good.wav,abc"] * good, *bad_rows]
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    processor = build_character_processor(["abc"])
    dataset = load_speech_dataset(folder / "manifest.csv", cache_dir=str(folder / "cache"))
    _, report = prepare_dataset(dataset, processor, lambda samples: samples // 160 - 1)
    return str(report)


def trainer(folder: Path, teacher_options: dict, **options) -> None:
    DLDTrainer(
        model=make_dynamic("wavlm-stable"),
        teacher=make_stock("wavlm-stable", **teacher_options),
        args=DLDTrainingArguments(str(folder), use_cpu=True, **options),
    )


def stock_student(folder):
    arguments = DLDTrainingArguments(str(folder), use_cpu=True)
    DLDTrainer(model=make_stock("wavlm"), teacher=make_stock("wavlm"), args=arguments)


def another_blank(folder):
    model = make_dynamic("wavlm", pad_token_id=3)
    arguments = CTCTrainingArguments(str(folder), use_cpu=True)
    CTCTrainer(model=model, args=arguments, processing_class=build_character_processor(["abc"]))


def not_audio(folder):
    (folder / "notes.wav").write_text("not audio at all")
    return prepared(folder, "notes.wav,abc")


def empty_file(folder):
    (folder / "empty.wav").touch()
    return prepared(folder, "empty.wav,abc")


def too_short(folder):
    beep(folder, "click.wav", seconds=0.01)
    return prepared(folder, "click.wav,abc")


def pipe(folder):
    os.mkfifo(folder / "pipe.wav")
    return prepared(folder, "pipe.wav,abc")


def bomb(folder):
    content = bytearray(beep(folder, "bomb.flac").read_bytes())
    # the last 36 bits of this field are the number of samples
    content[18:26] = (int.from_bytes(content[18:26], "big") | 2**36 - 1).to_bytes(8, "big")
    (folder / "bomb.flac").write_bytes(content)
    return prepared(folder, "bomb.flac,abc")


def path_out(folder):
    return prepared(folder, "../secret.wav,abc")


def link_out(folder):
    (folder / "link.wav").symlink_to("/etc/hostname")
    return prepared(folder, "link.wav,abc")


def archive(folder):
    with zipfile.ZipFile(folder / "clips.zip", "w", zipfile.ZIP_DEFLATED) as clips:
        clips.writestr("a.wav", bytes(10_000_000))
    load_speech_dataset(folder)


def stereo(folder):
    samples = decode_audio(beep(folder, "stereo.wav", rate_hz=44_100, channels=2), 16_000)
    return f"{len(samples)} samples at 16000 Hz"


def full_disk(folder):
    model = make_dynamic("wavlm")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        save_whole(folder / "model", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def another_run(folder):
    claim_output_dir(folder / "out", {"seed": 1})
    (folder / "out" / "model.safetensors").touch()
    claim_output_dir(folder / "out", {"seed": 2})


def checkpoint(folder):
    make_dynamic("wavlm").save_pretrained(folder / "model")
    build_character_processor(["abc"]).save_pretrained(folder / "model")
    return folder / "model"


def truncated(folder):
    weights = checkpoint(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    AutoModelForCTC.from_pretrained(weights.parent)


def other_shapes(folder):
    config = checkpoint(folder) / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 12', '"vocab_size": 40'))
    AutoModelForCTC.from_pretrained(config.parent)


def more_layers(folder):
    AutoModelForCTC.from_pretrained(checkpoint(folder), num_hidden_layers=6)


def weights_in_a_pickle(folder):
    weights = checkpoint(folder) / "model.safetensors"
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    AutoModelForCTC.from_pretrained(weights.parent)


def newer_version(folder):
    config = checkpoint(folder) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hf_dld_version": "9.1.0", "exit_layers": [2]}))
    AutoModelForCTC.from_pretrained(config.parent)


def no_tokenizer(folder):
    model = checkpoint(folder)
    (model / "tokenizer_config.json").unlink()
    (model / "vocab.json").unlink()
    pipeline("automatic-speech-recognition", model=str(model))


def processor_with_code(folder):
    config = checkpoint(folder) / "processor_config.json"
    code = {"processor_class": "Mine", "auto_map": {"AutoProcessor": "code.Mine"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **code}))
    load_processor(config.parent)


def pruned_layer(folder):
    pruned = AutoModelForCTC.from_pretrained(checkpoint(folder), num_active_layers=2, prune_inactive_layers=True)
    pruned.set_active_layers(3)


def no_feature_projection(folder):
    weights = checkpoint(folder) / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(weights).items() if "feature_projection" not in name}
    save_file(tensors, weights, {"format": "pt"})
    AutoModelForCTC.from_pretrained(weights.parent)


def export_without_a_head(folder):
    model = checkpoint(folder)
    make_dynamic("wavlm").base_model.save_pretrained(model)
    export_static(model, folder / "out", 2)


def export_over_something(folder):
    export_static(checkpoint(folder), folder / "model", 2)


def depth(count):
    return lambda folder: make_dynamic("wavlm").set_active_layers(count)


LEFT_OUT, ERROR, WORKS = "left out", "error", "works"
CASES: list[tuple[str, str, Callable[[Path], str | None], str]] = [
    ("a file that is not audio", LEFT_OUT, not_audio, r"not audio that libsndfile can decode +1 +FOLDER/notes.wav"),
    ("an empty file", LEFT_OUT, empty_file, r"empty file \(0 bytes\) +1 +FOLDER/empty.wav"),
    ("0.01 s of audio", LEFT_OUT, too_short, r"shorter than 0.25 s +1 +FOLDER/click.wav"),
    ("a pipe or a device in place of a file", LEFT_OUT, pipe, r"not a regular file +1 +FOLDER/pipe.wav"),
    ("a file that claims 68 billion samples", LEFT_OUT, bomb, r"too long to decode +1 +FOLDER/bomb.flac"),
    ("a path that leaves the corpus folder", ERROR, path_out, r"line 5: audio path '../secret.wav' leaves the corpus"),
    ("a link that leads out of the corpus folder", ERROR, link_out, r"audio path 'link.wav' leaves the corpus folder"),
    (
        "a ZIP archive that unpacks to a thousand times its size",
        ERROR,
        archive,
        r"clips.zip .* would unpack to",
    ),
    (
        "a quotation mark in a CSV file that is never closed",
        ERROR,
        lambda folder: prepared(folder, 'good.wav,"abc'),
        r"line 5: not a table .unexpected end of data.; it may lack a quotation mark",
    ),
    (
        "16-bit samples as a list of numbers",
        ERROR,
        lambda folder: decode_audio(np.array([0, 16384, -16384]), 16_000),
        "integers of no sample width .int64: give int16 or int32",
    ),
    ("44.1 kHz stereo", WORKS, stereo, r"8000 samples at 16000 Hz"),
    (
        "a missing file among a thousand",
        LEFT_OUT,
        lambda folder: prepared(folder, "gone.wav,abc", good=1000),
        r"no such file +1 +FOLDER/gone.wav",
    ),
    (
        "an empty transcript",
        LEFT_OUT,
        lambda folder: prepared(folder, "good.wav,"),
        r"no transcript +1 +FOLDER/good.wav",
    ),
    (
        "characters outside the vocabulary",
        LEFT_OUT,
        lambda folder: prepared(folder, "good.wav,a7b"),
        r"characters outside the vocabulary +1 +FOLDER/good.wav \(7\)",
    ),
    (
        "a transcript longer than its frames",
        LEFT_OUT,
        lambda folder: prepared(folder, "good.wav," + "abc" * 20),
        r"target longer than its frames +1 +FOLDER/good.wav",
    ),
    (
        "a stock model as the student",
        ERROR,
        stock_student,
        r"A WavLMForCTC cannot run with some of its layers; load the checkpoint with hf_dld.DLDWavLMForCTC or .*",
    ),
    (
        "a teacher with another vocabulary",
        ERROR,
        lambda folder: trainer(folder, {"vocab_size": 40}),
        r"Teacher and student must share the vocabulary.*vocab_size is 40 for the teacher and 12 for the student",
    ),
    (
        "a teacher with another frame rate",
        ERROR,
        lambda folder: trainer(folder, {"conv_stride": (5, 8, 2)}),
        r"Teacher and student must have the same frame rate.*",
    ),
    (
        "a model whose blank is not the tokenizer's",
        ERROR,
        another_blank,
        r"The CTC blank of the model, config.pad_token_id, is 3, and the tokenizer's is 0",
    ),
    *(
        (
            f"`num_active_layers={count!r}`",
            ERROR,
            depth(count),
            rf"num_active_layers must be an integer from 1 to 4.*{count!r}",
        )
        for count in (0, -1, 13, "six")
    ),
    ("an output directory of another run", ERROR, another_run, r"FOLDER/out holds another run.*seed: 1 then, 2 now"),
    ("a truncated model.safetensors", ERROR, truncated, r"model.safetensors \(1000 bytes\) of FOLDER/model is not a"),
    (
        "weights of other shapes than config.json says",
        ERROR,
        other_shapes,
        r"2 tensors of another shape than its config.json",
    ),
    ("fewer layers than config.json says", ERROR, more_layers, r"lacks tensors of encoder layers \[4, 5\]"),
    (
        "no feature projection among the weights",
        ERROR,
        no_feature_projection,
        r"lacks 4 tensors.*run with random values",
    ),
    ("weights in a pickle", ERROR, weights_in_a_pickle, r"pytorch_model.bin, a pickle.*pass use_safetensors=False"),
    ("a checkpoint of a newer hf_dld", ERROR, newer_version, r"saved by hf_dld 9.1.0.*does not know its exit_layers"),
    ("a checkpoint without its tokenizer", ERROR, no_tokenizer, r"FOLDER/model has no tokenizer that can be loaded"),
    (
        "a processor with code of its own",
        ERROR,
        processor_with_code,
        r"processor that can be loaded without running",
    ),
    ("a layer that was pruned", ERROR, pruned_layer, r"Layers \[0, 2, 3\] cannot run: \[2\] were pruned"),
    ("an export of an encoder without a head", ERROR, export_without_a_head, r"FOLDER/model has no CTC head"),
    ("an export over something else", ERROR, export_over_something, r"FOLDER/model is there already and not an empty"),
    ("a full disk while saving", ERROR, full_disk, r"Could not save to FOLDER/model.*as they were: free some space"),
]


@cache
def answer(attempt: Callable[[Path], str | None]) -> tuple[bool, str]:
    """Whether it was an error, and what the user reads, with the folder's name replaced."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            failed, text = False, attempt(Path(folder)) or ""
        except (ValueError, TypeError, OSError, CheckpointError) as error:
            failed, text = True, str(error)
    return failed, re.sub(re.escape(folder), "FOLDER", text)


def table() -> str:
    lines = []
    for what, outcome, attempt, expected in CASES:
        _, text = answer(attempt)
        shown = re.search(expected, text, re.DOTALL)
        text = shown.group() if outcome == LEFT_OUT and shown else text
        lines.append(f"| {what} | {outcome} | `{re.sub(' +', ' ', text)}` |\n")
    return INTRODUCTION + "".join(lines)


@pytest.mark.parametrize(("what", "outcome", "attempt", "expected"), CASES, ids=[case[0] for case in CASES])
def test_case(what, outcome, attempt, expected):
    failed, text = answer(attempt)
    assert failed == (outcome == ERROR), text
    assert re.search(expected, text, re.DOTALL), text
    if outcome == LEFT_OUT:
        assert re.search(r"kept +(3|1,000) of (4|1,001)", text), text
        assert "reason" not in text


def test_the_table_in_the_docs_is_this_one():
    assert TABLE.read_text(encoding="utf-8") == table(), "write it anew: python tests/test_bad_input.py"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    sys.exit()
