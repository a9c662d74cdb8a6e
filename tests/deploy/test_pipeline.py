"""The pipeline: the depth of a model, of a pipeline and of a call; any audio; stock models as they always were."""

import functools
import io
import runpy
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import asdict
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import NUM_LAYERS, make_dynamic, make_stock
from huggingface_hub.utils import httpx
from transformers import AutoModelForCTC, AutoProcessor, pipeline

import hf_dld
from hf_dld.data import decode_audio
from hf_dld.evaluation import LatencyModel

TASK = "automatic-speech-recognition"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of a dynamic and of a stock model of equal weights, with their processor."""
    root = tmp_path_factory.mktemp("checkpoints")
    processor = hf_dld.build_character_processor(["abcdefghi"])
    for name, model in (("dynamic", make_dynamic("wavlm-stable")), ("stock", make_stock("wavlm-stable"))):
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def samples():
    return np.random.default_rng(0).standard_normal(24_000).astype(np.float32) * 0.1


def text_of(folder, samples, **depth):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForCTC.from_pretrained(folder)
    inputs = processor(samples, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        return processor.batch_decode(model(**inputs, **depth).logits.argmax(-1))[0]


def test_depth_of_the_pipeline_and_of_a_call(checkpoints, samples):
    folder = checkpoints / "dynamic"
    expected = {depth: text_of(folder, samples, num_active_layers=depth) for depth in range(1, NUM_LAYERS + 1)}
    assert len(set(expected.values())) > 1, "the depths must differ for this test to mean anything"
    everything = pipeline(TASK, model=str(folder))
    two = pipeline(TASK, model=str(folder), num_active_layers=2)
    from_kwargs = pipeline(TASK, model=str(folder), model_kwargs={"num_active_layers": 2})
    assert everything(samples)["text"] == expected[NUM_LAYERS]
    assert two(samples)["text"] == from_kwargs(samples)["text"] == expected[2]
    assert two(samples, num_active_layers=3)["text"] == expected[3]
    assert two(samples)["text"] == expected[2], "the depth of a call must not stay"
    layers = text_of(folder, samples, active_layers=[1, 2])
    assert everything(samples, active_layers=[1, 2])["text"] == layers
    given = pipeline(TASK, model=str(folder), active_layers=[1, 2])
    assert given(samples)["text"] == layers
    assert given(samples, num_active_layers=1)["text"] == expected[1], "the call wins over the pipeline"


def test_batches(checkpoints, samples):
    recognise = pipeline(TASK, model=str(checkpoints / "dynamic"), num_active_layers=2)
    clips = [samples, samples[:12_000], samples[:18_000]]
    alone = [recognise(clip)["text"] for clip in clips]
    assert [out["text"] for out in recognise(clips, batch_size=3)] == alone


@pytest.mark.parametrize("length", [1, 100])
def test_a_clip_shorter_than_a_frame_says_nothing(checkpoints, samples, length):
    recognise = pipeline(TASK, model=str(checkpoints / "dynamic"), num_active_layers=2)
    assert recognise(samples[:length])["text"] == ""
    assert [out["text"] for out in recognise([samples[:length], samples], batch_size=2)][0] == ""
    whole = recognise(samples[:16_000])["text"]
    assert recognise(samples[: 16_000 + length], chunk_length_s=1, stride_length_s=0)["text"] == whole


@pytest.fixture
def serve():
    """Serves a folder by HTTP on this machine and returns its address."""
    with ExitStack() as servers:

        def serve_folder(folder):
            handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
            server = servers.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield serve_folder


def test_any_audio_without_ffmpeg_or_torchaudio(checkpoints, samples, tmp_path, serve):
    recognise = pipeline(TASK, model=str(checkpoints / "dynamic"), num_active_layers=2)
    stereo = np.stack([samples, samples], axis=1)
    path = tmp_path / "talk.wav"
    soundfile.write(path, stereo, 44_100, subtype="FLOAT")
    expected = recognise(decode_audio(path, 16_000))["text"]
    buffer = io.BytesIO()
    soundfile.write(buffer, stereo, 44_100, format="WAV", subtype="FLOAT")
    for audio in (
        str(path),
        buffer.getvalue(),
        {"raw": samples, "sampling_rate": 44_100},
        {"array": samples, "sampling_rate": 44_100, "path": None},
        {"bytes": None, "path": str(path)},
        serve(tmp_path) + "/talk.wav",
    ):
        assert recognise(audio)["text"] == expected
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        recognise(serve(tmp_path) + "/gone.wav")
    assert recognise(torch.tensor(samples))["text"] == recognise(samples)["text"]


def test_timestamps_and_chunks(checkpoints, samples, tmp_path):
    recognise = pipeline(TASK, model=str(checkpoints / "dynamic"))
    for depth in (1, NUM_LAYERS):
        out = recognise(samples, num_active_layers=depth, return_timestamps="char")
        assert "".join(chunk["text"] for chunk in out["chunks"]).strip() == out["text"].strip()
        # a chunk that holds the whole clip must change nothing, stride or not
        assert recognise(samples, num_active_layers=depth, chunk_length_s=4)["text"] == out["text"]
        stride = {"raw": samples, "sampling_rate": 16_000, "stride": (0, 0)}
        assert recognise(stride, num_active_layers=depth)["text"] == out["text"]

    soundfile.write(tmp_path / "talk.wav", samples, 16_000)
    subwords = hf_dld.build_subword_processor(["ab cd ef"] * 9, 12, "bpe")
    say = pipeline(TASK, make_dynamic("wavlm"), **{name: getattr(subwords, name) for name in subwords.get_attributes()})
    with pytest.raises(ValueError, match="return_timestamps='word' needs a vocabulary of characters, .*subwords"):
        say(samples, return_timestamps="word")
    with pytest.raises(ValueError, match=r"stride=\(0, 0\) counts samples: give their sampling_rate"):
        recognise({"path": str(tmp_path / "talk.wav"), "stride": (0, 0)})


@pytest.mark.parametrize("model", ["dynamic", "stock"])
def test_a_saved_pipeline_loads_again(checkpoints, samples, tmp_path, model):
    recognise = pipeline(TASK, model=str(checkpoints / model))
    recognise.save_pretrained(tmp_path)
    assert not (tmp_path / "pipeline.py").exists() and "custom_pipelines" not in (tmp_path / "config.json").read_text()
    assert pipeline(TASK, model=str(tmp_path))(samples) == recognise(samples)


class Beams:
    """Stands for a language model decoder of pyctcdecode: the best path of what it is given."""

    def __init__(self, processor):
        self.processor = processor

    def decode_beams(self, logits):
        return [(self.processor.decode(logits.argmax(-1)), None, [])]


def test_decoding_with_a_language_model(checkpoints, samples):
    folder = str(checkpoints / "dynamic")
    decoder = Beams(AutoProcessor.from_pretrained(folder))
    recognise, plain = pipeline(TASK, model=folder, decoder=decoder), pipeline(TASK, model=folder)
    clips = [samples, samples[:7000], samples[:15_000]]
    expected = [plain(clip, num_active_layers=2) for clip in clips]
    assert [recognise(clip, num_active_layers=2) for clip in clips] == expected
    assert recognise(list(clips), num_active_layers=2, batch_size=3) == expected


def test_stock_models_are_as_before(checkpoints, samples):
    recognise = pipeline(TASK, model=str(checkpoints / "stock"))
    assert recognise(samples)["text"] == text_of(checkpoints / "stock", samples)
    for depth in ({"num_active_layers": 2}, {"active_layers": [0]}):
        with pytest.raises(ValueError, match="needs a dynamic model, and WavLMForCTC always runs all of its layers"):
            recognise(samples, **depth)
        with pytest.raises(ValueError, match="needs a dynamic model"):
            pipeline(TASK, model=str(checkpoints / "stock"), **depth)


@pytest.mark.parametrize("depth", [0, -1, 13, "six"])
def test_impossible_depths(checkpoints, samples, depth):
    message = f"num_active_layers must be an integer from 1 to 4.*; got {depth!r}"
    recognise = pipeline(TASK, model=str(checkpoints / "dynamic"))
    with pytest.raises(ValueError, match=message):
        recognise(samples, num_active_layers=depth)
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, model=str(checkpoints / "dynamic"), num_active_layers=depth)


def test_bad_audio_is_named(checkpoints, tmp_path):
    recognise = pipeline(TASK, model=str(checkpoints / "dynamic"))
    (tmp_path / "notes.wav").write_text("this is no audio")
    with pytest.raises(ValueError, match="notes.wav: not audio that libsndfile can decode"):
        recognise(str(tmp_path / "notes.wav"))
    with pytest.raises(ValueError, match="gone.wav: no such file"):
        recognise(str(tmp_path / "gone.wav"))


def test_a_fresh_process_loads_it(checkpoints, samples, tmp_path, monkeypatch):
    """Without what inference does not need, and without a folder to write to, which the metrics do without too."""
    home = tmp_path / "home"
    home.write_text("a file where a folder would be: nothing can be made under it, by root neither")
    monkeypatch.setenv("HF_HOME", str(home))
    np.save(tmp_path / "clip.npy", samples)
    code = (
        "import sys\n"
        "for name in ('onnx', 'onnxruntime', 'onnxscript'): sys.modules[name] = None\n"  # as without the extra
        "import numpy, hf_dld\n"
        "from transformers import pipeline\n"
        f"recognise = pipeline({TASK!r}, model={str(checkpoints / 'dynamic')!r}, num_active_layers=2)\n"
        "print(recognise(numpy.load('clip.npy'))['text'])\n"
        # 100 MB that inference does not need
        "assert not {'datasets', 'matplotlib', 'transformers.trainer'} & set(sys.modules)\n"
        "hf_dld.export_onnx\n"
        "from hf_dld.evaluation.metrics import WordErrorRate\n"
        "assert WordErrorRate().compute(predictions=['a b'], references=['a c']) == {'wer': 0.5}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = text_of(checkpoints / "dynamic", samples, num_active_layers=2)
    assert done.stdout.splitlines()[-1] == expected
    assert "already registered" not in done.stderr


def test_latency_budget(checkpoints, samples, monkeypatch):
    calibrations = []

    def calibrate(model, sampling_rate_hz):
        calibrations.append(sampling_rate_hz)
        one_layer_s = (0.1, 0.2)  # 0.1 s for a layer and a second of audio
        return LatencyModel(NUM_LAYERS, (1.0, 2.0), one_layer_s, tuple(s * NUM_LAYERS for s in one_layer_s), {})

    monkeypatch.setattr("hf_dld.deploy.pipeline.calibrate_latency", calibrate)
    folder = str(checkpoints / "dynamic")
    expected = {depth: text_of(folder, samples, num_active_layers=depth) for depth in range(1, NUM_LAYERS + 1)}
    recognise = pipeline(TASK, model=folder, latency_budget_s=0.35)
    assert calibrations == [16_000], "calibrated once, when the pipeline is made"
    assert recognise(samples)["text"] == expected[2], "1.5 s of audio take 0.15 s for each layer"
    half = samples[:12_000]
    assert recognise(half)["text"] == text_of(folder, half, num_active_layers=4), "the depth depends on the length"
    assert recognise(samples, latency_budget_s=0.5)["text"] == expected[3]
    assert recognise(samples, num_active_layers=1)["text"] == expected[1], "the call wins over the pipeline"
    assert recognise(samples, active_layers=[1, 2])["text"] == text_of(folder, samples, active_layers=[1, 2])
    batch = recognise([samples, samples], batch_size=2, latency_budget_s=0.7)
    assert [out["text"] for out in batch] == [expected[2]] * 2, "a batch takes as long as its utterances in turn"
    with pytest.raises(
        ValueError, match="latency_budget_s=0.1 cannot be kept for 1.50 s .* 1 active layer, takes .*0.15 s"
    ):
        recognise(samples, latency_budget_s=0.1)
    assert len(calibrations) == 1
    two = pipeline(TASK, model=folder, num_active_layers=2)
    assert two(samples, latency_budget_s=0.5)["text"] == expected[3] and two(samples)["text"] == expected[2]
    with pytest.raises(
        ValueError, match="latency_budget_s chooses the depth itself: give it without num_active_layers"
    ):
        pipeline(TASK, model=folder, num_active_layers=2, latency_budget_s=1)
    for budget in (0, -1, float("nan"), "fast", True):
        with pytest.raises(ValueError, match=f"latency_budget_s={budget!r} must be a finite number of seconds above 0"):
            recognise(samples, latency_budget_s=budget)
    with pytest.raises(ValueError, match="latency_budget_s needs a dynamic model"):
        pipeline(TASK, model=str(checkpoints / "stock"), latency_budget_s=1)


def test_latency_budget_on_this_device(checkpoints, samples, monkeypatch):
    monkeypatch.setattr("hf_dld.evaluation.latency._REPEATS", 1)
    folder = str(checkpoints / "dynamic")
    recognise = pipeline(TASK, model=folder, latency_budget_s=60)
    assert recognise(samples)["text"] == text_of(folder, samples, num_active_layers=NUM_LAYERS)


def test_under_load(samples, own_process):
    """Four threads, each call at another depth: the depth of one call never reaches another, and nothing piles up."""
    load = own_process(run_load, samples)
    assert load["calls"] >= 8 and load["wrong"] == 0
    assert load["end_mb"] < load["start_mb"] + 10


def run_load(samples):
    sys.path.insert(0, str(BENCHMARKS))
    benchmark = runpy.run_path(str(BENCHMARKS / "pipeline_load.py"))
    clips = [samples[:16_000], samples]
    return asdict(benchmark["run_load"](benchmark["make_pipeline"](), clips, threads=4, seconds=3))
