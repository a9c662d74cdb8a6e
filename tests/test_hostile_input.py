"""Hostile input: whatever is in a file, an answer or a clear error, in bounded time and memory, and none of it runs.

500 generated cases, the same in every run of the suite. The long run draws new ones each time:

    HF_DLD_HOSTILE_CASES=10000 python -m pytest tests/test_hostile_input.py
"""

import io
import json
import math
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_dynamic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hf_dld import CheckpointError, DataCollatorCTC, build_character_processor, load_speech_dataset
from hf_dld.data import AudioError, decode_audio, load_processor
from hf_dld.data.audio import audio_key
from hf_dld.data.filtering import _measure_text
from hf_dld.data.manifests import path_within
from hf_dld.distill.posterior_cache import PosteriorCache
from hf_dld.evaluation import DepthReport, DepthRow, DepthSchedule
from hf_dld.evaluation.layer_sets import SearchCost
from hf_dld.models import DLDWav2Vec2ConformerConfig, DLDWavLMConfig, DLDWavLMForCTC

IN_THE_SUITE = 500
CASES = int(os.environ.get("HF_DLD_HOSTILE_CASES", IN_THE_SUITE))
MEMORY_BYTES = 3 * 2**30  # that a case may take
SECONDS = 30
PROCESSOR = build_character_processor(["abcdefghi"])


def share(percent: int) -> settings:
    return settings(
        max_examples=math.ceil(CASES * percent / 100),
        derandomize=CASES == IN_THE_SUITE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def bounded():
    """A case that hangs or that takes gigabytes fails."""

    def hangs(*_):
        raise AssertionError(f"more than {SECONDS} s")

    address_space = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, address_space[1]))
    handler = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, address_space)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """What a broken disk or an attacker makes of a file: bytes changed, left out, doubled, or cut off."""
    places, size = st.integers(0, max(len(content) - 1, 0)), st.sampled_from([1, 2, 4, 8])
    headers = st.integers(0, min(len(content), 100))  # where most of the meaning is
    patch = st.tuples(places | headers, st.binary(min_size=1, max_size=8) | size.map(lambda n: b"\xff" * n))

    def apply(patches, end, start_of_double):
        changed = bytearray(content)
        for place, new in patches:
            changed[place : place + len(new)] = new
        changed = bytes(changed[:end])
        return changed if start_of_double is None else changed + changed[start_of_double:]

    return st.builds(apply, st.lists(patch, max_size=4), st.none() | places, st.none() | places)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
# what changes little, or is at the border of what is allowed, gets further than noise
near_values = json_values | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400, 1e308, "", "4", [], {}, [0], [[0]], [[]]])


def audio_files() -> dict[str, bytes]:
    samples = 0.3 * np.sin(np.arange(1600) * 0.2)
    files = {}
    for file_format, subtype in (
        ("WAV", None), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"),
        ("MP3", None), ("AIFF", None), ("W64", None), ("CAF", "ALAC_16"), ("AU", None), ("NIST", None), ("VOC", None),
    ):  # fmt: skip
        file = io.BytesIO()
        soundfile.write(file, samples, 16_000, format=file_format, subtype=subtype)
        files[f"{file_format} {subtype}"] = file.getvalue()
    return files


AUDIO_FILES = audio_files()


def check_audio(audio, rate_hz=16_000):
    with bounded():
        try:
            samples = decode_audio(audio, rate_hz)
        except AudioError as error:
            assert error.reason and str(error)
        else:
            assert samples.dtype == np.float32 and samples.ndim == 1 and samples.size and np.isfinite(samples).all()
            audio_key(audio)


@share(30)
@given(content=st.sampled_from([*AUDIO_FILES.values()]).flatmap(damaged))
def test_damaged_audio(content):
    check_audio(content)


@share(10)
@given(
    audio=st.dictionaries(st.sampled_from(["bytes", "path", "array", "raw", "sampling_rate"]), near_values)
    | arrays.arrays(arrays.scalar_dtypes(), arrays.array_shapes(min_dims=0, min_side=0, max_side=30))
    | st.fixed_dictionaries(
        {"array": st.lists(st.floats(width=32), max_size=50), "sampling_rate": st.integers(1, 2**32) | near_values}
    )
    | near_values
)
def test_objects_that_may_be_audio(audio):
    check_audio(audio)


MANIFESTS = {
    "m.csv": b'audio,text\na.wav,"ONE, TWO"\nb.wav,007\n',
    "m.tsv": b"path\tspeaker\tsentence\na.wav\t1\tONE\nb.wav\t1\t007\n",
    "m.jsonl": b'{"audio_filepath": "a.wav", "text": "ONE"}\n{"audio_filepath": "b.wav", "text": "007"}\n',
    "m.json": b'[{"path": "a.wav", "sentence": "ONE"}, {"path": "b.wav", "sentence": "007"}]',
}
rows = st.lists(
    st.fixed_dictionaries({}, optional={name: near_values for name in ("audio", "path", "text")}), min_size=1
)
manifests = st.one_of(
    *(st.tuples(st.just(name), damaged(content)) for name, content in MANIFESTS.items()),
    st.tuples(st.sampled_from([*MANIFESTS]), st.binary(max_size=100)),
    st.tuples(st.just("m.json"), rows.map(lambda some: json.dumps(some).encode())),
    st.tuples(st.just("m.jsonl"), rows.map(lambda some: "\n".join(map(json.dumps, some)).encode())),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@share(20)
@given(manifest=manifests)
def test_manifests(folder, manifest):
    name, content = manifest
    (folder / name).write_bytes(content)
    with bounded():
        try:
            found = list(load_speech_dataset(folder / name, streaming=True))
        except ValueError as error:
            assert str(folder / name) in str(error), error
            assert not isinstance(error, UnicodeError), error
        else:
            assert found
            for row in found:
                assert row["audio"]["path"].startswith(f"{folder}/")
                assert row["text"] is None or row["text"].encode()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with links within it and out of it, beside a secret."""
    root = tmp_path_factory.mktemp("world")
    (root / "corpus" / "clips").mkdir(parents=True)
    (root / "secret").mkdir()
    for file in (root / "corpus" / "clips" / "a.wav", root / "secret" / "a.wav"):
        file.write_bytes(AUDIO_FILES["WAV None"])
    (root / "corpus" / "inside").symlink_to("clips")
    (root / "corpus" / "outside").symlink_to("../secret")
    (root / "corpus" / "a_inside.wav").symlink_to("clips/a.wav")
    (root / "corpus" / "a_outside.wav").symlink_to(root / "secret" / "a.wav")
    (root / "corpus" / "circle").symlink_to("circle")
    return root / "corpus"


NAMES = [
    "..",
    ".",
    "",
    "clips",
    "inside",
    "outside",
    "a.wav",
    "a_inside.wav",
    "a_outside.wav",
    "circle",
    "secret",
    "~",
    "\0",
]


@share(6)
@given(names=st.lists(st.sampled_from(NAMES) | st.text(max_size=5), min_size=1), absolute=st.booleans())
def test_no_path_leaves_the_corpus(corpus, names, absolute):
    path = os.path.join(str(corpus), *names) if absolute else "/".join(names)
    with bounded():
        try:
            found = path_within(str(corpus), path, "line 3")
        except ValueError as error:
            assert "line 3" in str(error) and "leaves the corpus folder" in str(error)
        else:
            assert "\0" in found or os.path.realpath(found).startswith(f"{corpus}/")


CONFIGS = {
    kind: kind(num_hidden_layers=4, hidden_size=16).to_dict() for kind in (DLDWavLMConfig, DLDWav2Vec2ConformerConfig)
}
DEPTH = [
    "num_active_layers",
    "active_layers",
    "layer_selection",
    "depth_schedule",
    "pruned_layers",
    "num_hidden_layers",
]
small_lists = st.lists(st.integers(-1, 5), max_size=5)
configs = st.sampled_from([*CONFIGS]).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.dictionaries(st.sampled_from([*CONFIGS[kind], "hf_dld_version"]), near_values, max_size=2),
        st.dictionaries(
            st.sampled_from(DEPTH),
            near_values
            | small_lists
            | st.lists(small_lists, max_size=5)
            | st.sampled_from(["even", "first", "schedule"]),
        ),
    )
)


@share(15)
@given(config=configs)
def test_configurations(config):
    kind, fields, depth = config
    with bounded():
        try:
            made = kind.from_dict({**CONFIGS[kind], **fields, **depth})
        except ValueError as error:
            assert str(error)
        else:
            layers = made.resolve_active_layers()
            assert layers and set(layers) <= set(made.present_layers)
            made.to_static(len(layers))


REPORT = DepthReport(
    "tiny", "even", 5, 20, "batches of 1", [DepthRow(k, list(range(k)), 1000, 0.5, 0.2, [0.4, 0.6]) for k in (1, 2)],
    conditions={"device": "cpu"},
)  # fmt: skip
SCHEDULE = DepthSchedule([[1], [0, 1]], [2.0, 1.0], "ctc", 1, 5, 0, SearchCost())
STORED = {DepthReport: asdict(REPORT), DepthSchedule: asdict(SCHEDULE)}


def changed_json(value):
    """A JSON object with some of its fields replaced, at any depth."""
    if not isinstance(value, dict | list) or not value:
        return near_values
    keys = [*value] if isinstance(value, dict) else [*range(len(value))]

    def replace(key, item):
        items = dict(value) if isinstance(value, dict) else list(value)
        items[key] = item
        return items

    return st.sampled_from(keys).flatmap(
        lambda key: (changed_json(value[key]) | near_values).map(lambda item: replace(key, item))
    )


stored_files = st.one_of(
    *(
        st.tuples(
            st.just(kind), damaged(json.dumps(value).encode()) | changed_json(value).map(json.dumps).map(str.encode)
        )
        for kind, value in STORED.items()
    ),
    st.tuples(st.sampled_from([*STORED]), st.sampled_from([b"[" * 100_000, b"", b"null", b"\xff", b"1" * 5000])),
)


@share(8)
@given(file=stored_files)
def test_reports_and_schedules(folder, file):
    kind, content = file
    (folder / "stored.json").write_bytes(content)
    with bounded():
        try:
            stored = kind.from_json(folder / "stored.json")
        except ValueError as error:
            assert str(folder / "stored.json") in str(error)
        else:
            if kind is DepthReport:
                stored.to_markdown()
            else:
                stored.apply_to(DLDWavLMConfig(num_hidden_layers=len(stored.layers)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_dynamic("wavlm").save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}


def with_one_damaged(data, checkpoint, folder, name):
    """The files of a checkpoint in a folder, one of them damaged, which is drawn."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    changes = damaged(checkpoint[name])
    if name.endswith(".json"):
        changes |= changed_json(json.loads(checkpoint[name])).map(lambda value: json.dumps(value).encode())
    for other, content in {**checkpoint, name: data.draw(changes)}.items():
        (folder / other).write_bytes(content)


@share(4)
@given(data=st.data(), name=st.sampled_from(["config.json", "model.safetensors"]))
def test_checkpoints(checkpoint, folder, data, name):
    with_one_damaged(data, checkpoint, folder / "model", name)
    with bounded():
        try:
            model = DLDWavLMForCTC.from_pretrained(folder / "model")
        except (CheckpointError, ValueError, OSError, MemoryError) as error:
            assert str(error)
        else:
            assert model.active_layers


@share(4)
@given(data=st.data(), name=st.sampled_from(["processor_config.json", "tokenizer_config.json", "vocab.json"]))
def test_processors(checkpoint, folder, data, name):
    with_one_damaged(data, checkpoint, folder / "model", name)
    with bounded():
        try:
            processor = load_processor(folder / "model")
        except (ValueError, OSError) as error:
            assert str(error)
        else:
            assert processor.tokenizer and processor.feature_extractor


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    cache = PosteriorCache(tmp_path_factory.mktemp("posteriors"))
    cache.write_shard({"key": (torch.zeros(6, 4, dtype=torch.float16), torch.ones(6, 3, dtype=torch.int16))})
    return next(cache.folder.iterdir()).read_bytes()


@share(4)
@given(data=st.data())
def test_cached_posteriors(shard, folder, data):
    (folder / "shard.safetensors").write_bytes(data.draw(damaged(shard)))
    with bounded():
        try:
            cache = PosteriorCache(folder)
            for key in cache.shards:
                log_probs, tokens = cache[key]
                assert len(log_probs) == len(tokens) and log_probs.shape[1] - tokens.shape[1] in (0, 1)
                assert not log_probs.isnan().any() and (tokens >= 0).all()
        except ValueError as error:
            assert "shard.safetensors is not a whole file of teacher posteriors" in str(error)


@share(4)
@given(
    examples=st.lists(
        st.fixed_dictionaries(
            {
                "audio": arrays.arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32)),
                "labels": st.none() | st.lists(st.integers(0, 11), max_size=5),
            }
        ),
        min_size=1,
        max_size=4,
    ),
    text=st.none() | st.text(),
)
def test_batches_and_transcripts(examples, text):
    with bounded():
        try:
            batch = DataCollatorCTC(PROCESSOR)(examples)
        except AudioError as error:
            assert error.reason == "no samples" or error.reason.startswith("samples that are no")
        else:
            longest = max(len(example["audio"]) for example in examples)
            assert batch["input_values"].shape == (len(examples), longest)
            assert torch.isfinite(batch["input_values"]).all()
            assert batch["labels"].shape == (len(examples), max(1, *(len(e["labels"] or []) for e in examples)))
        measured = _measure_text(text, PROCESSOR.tokenizer)
        assert measured["frames_needed"] >= len(measured["labels"])
