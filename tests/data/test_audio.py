import io
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dld.data import audio as audio_module
from hf_dld.data.audio import AudioError, decode_audio


def tone(rate_hz: int, duration_s: float = 1.0, frequency_hz: float = 440.0) -> np.ndarray:
    return np.sin(2 * np.pi * frequency_hz * np.arange(round(rate_hz * duration_s)) / rate_hz).astype(np.float32)


class AudioDecoder:
    """As much of torchcodec's as is used: its samples are a tensor (channels, samples)."""

    def __init__(self, samples: np.ndarray, rate_hz: int):
        self.samples = SimpleNamespace(data=torch.tensor(samples)[None], sample_rate=rate_hz)

    def get_all_samples(self) -> SimpleNamespace:
        return self.samples


def test_every_form_of_the_same_audio_gives_the_same_samples(write_audio):
    path = write_audio("a.wav", subtype="FLOAT")
    samples, rate_hz = soundfile.read(path, dtype="float32")
    forms = [
        path,
        str(path),
        path.read_bytes(),
        {"path": str(path), "bytes": None},
        {"path": "gone.wav", "bytes": path.read_bytes()},
        {"array": samples, "sampling_rate": rate_hz},
        {"raw": samples.tolist(), "sampling_rate": rate_hz},
        samples,
        samples[:, None],
        samples[None, :],
        AudioDecoder(samples, rate_hz),
    ]
    for form in forms:
        decoded = decode_audio(form, 16_000)
        assert decoded.dtype == np.float32 and decoded.shape == (8000,)
        np.testing.assert_array_equal(decoded, samples)


def test_44100_hz_stereo_becomes_16000_hz_mono(tmp_path):
    left = tone(44_100)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, np.zeros_like(left)], axis=1), 44_100, subtype="FLOAT")
    decoded = decode_audio(tmp_path / "stereo.wav", 16_000)
    assert decoded.shape == (16_000,)
    np.testing.assert_allclose(decoded[100:-100], tone(16_000)[100:-100] / 2, atol=1e-3)


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3", "a.opus", "a.raw"])
def test_formats_are_told_by_their_content(write_audio, tmp_path, name):
    kwargs = {"a.opus": {"format": "OGG", "subtype": "OPUS"}, "a.raw": {"format": "FLAC"}}.get(name, {})
    decoded = decode_audio(write_audio(name, 0.5, 16_000, **kwargs), 16_000)
    assert abs(len(decoded) - 8000) < 100


def test_opus_is_resampled_from_the_rate_that_comes_back(write_audio):
    path = write_audio("a.ogg", 0.5, 24_000, subtype="OPUS")
    assert abs(len(decode_audio(path, 16_000)) - 8000) < 100


def test_integer_samples_are_scaled():
    samples = np.array([-32768, 0, 16384], dtype=np.int16)
    np.testing.assert_array_equal(decode_audio(samples, 16_000), [-1.0, 0.0, 0.5])
    np.testing.assert_array_equal(decode_audio(samples.astype(np.int32) * 2**16, 16_000), [-1.0, 0.0, 0.5])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("text.wav", b"this is not audio" * 100, r"text\.wav: not audio that libsndfile can decode \(Format not"),
        ("empty.wav", b"", r"empty\.wav: empty file \(0 bytes\)"),
        ("missing.wav", None, r"missing\.wav: no such file"),
    ],
)
def test_files_that_are_not_audio(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=problem):
        decode_audio(tmp_path / name, 16_000)
    if content is not None:
        with pytest.raises(AudioError, match=problem):
            decode_audio({"path": name, "bytes": content}, 16_000)


def test_a_file_that_breaks_off(write_audio, tmp_path):
    (tmp_path / "cut.flac").write_bytes(write_audio("whole.flac", 2.0).read_bytes()[:20_000])
    with pytest.raises(AudioError, match=r"cut\.flac: not audio that libsndfile can decode \(.*lost sync"):
        decode_audio(tmp_path / "cut.flac", 16_000)


def test_a_folder(tmp_path):
    with pytest.raises(AudioError, match="cannot be opened .Is a directory"):
        decode_audio(tmp_path, 16_000)


def test_no_samples(write_audio):
    with pytest.raises(AudioError, match=r"none\.wav: no samples"):
        decode_audio(write_audio("none.wav", 0.0), 16_000)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite(tmp_path, value):
    soundfile.write(tmp_path / "bad.wav", np.array([0.0, value]), 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"bad\.wav: samples that are not finite numbers"):
        decode_audio(tmp_path / "bad.wav", 16_000)


@pytest.mark.parametrize(
    ("audio", "problem"),
    [
        ({"path": None, "bytes": None}, r"no audio in it \(needs 'bytes', 'path', 'array' or 'raw'"),
        ({"array": [0.0, 0.1]}, "samples without a usable 'sampling_rate' .it is None"),
        (None, "not an audio object .a NoneType; load the dataset with Audio.decode=False"),
        (np.array(["a"]), "not samples .an array of <U1"),
        ([-32768, 0, 16384], r"not an audio object"),
        (np.array([-32768, 0, 16384]), r"integers of no sample width .int64: give int16 or int32, .* or floats"),
        (np.zeros((2, 2, 2)), r"not samples .an array of float64 with shape \(2, 2, 2\)"),
    ],
)
def test_objects_that_are_not_audio(audio, problem):
    with pytest.raises(AudioError, match=f"audio in memory: {problem}"):
        decode_audio(audio, 16_000)


@pytest.mark.parametrize(
    ("audio", "problem"),
    [
        ({"bytes": "a.wav"}, "no audio in it"),
        ({"path": 3}, "no audio in it"),
        ({"array": [[0.0], [0.1, 0.2]], "sampling_rate": 8000}, "not samples"),
        ({"array": [0.0], "sampling_rate": "fast"}, "samples without a usable 'sampling_rate' .it is 'fast'"),
        ({"array": [0.0], "sampling_rate": np.nan}, "samples without a usable 'sampling_rate' .it is nan"),
        ({"array": [0.0], "sampling_rate": 10**400}, "samples without a usable 'sampling_rate'"),
        # finite, but neither after resampling nor when brought to unit variance
        (
            {"array": [3e38, -3e38] * 100, "sampling_rate": 44_100},
            r"samples that are no sound .up to 3e\+38",
        ),
    ],
)
def test_objects_that_are_hardly_audio(audio, problem):
    with pytest.raises(AudioError, match=problem):
        decode_audio(audio, 16_000)


def flac(samples: int, claimed: int) -> bytes:
    """Silence, of which the header says something else: 36 bits within a 64-bit field."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(samples), 16_000, format="FLAC")
    content = bytearray(file.getvalue())
    field = int.from_bytes(content[18:26], "big")
    content[18:26] = (field >> 36 << 36 | claimed).to_bytes(8, "big")
    return bytes(content)


def test_a_header_that_lies_about_its_length():
    with pytest.raises(AudioError, match=r"too long to decode \(68,719,476,735 samples, and at most 1,073,741,824 fit"):
        decode_audio(flac(4000, claimed=2**36 - 1), 16_000)
    with pytest.raises(AudioError, match="a header without a length .as when written to a pipe"):
        decode_audio(flac(4000, claimed=0), 16_000)
    with pytest.raises(AudioError, match="not audio that libsndfile can decode"):
        decode_audio(flac(4000, claimed=2**29), 16_000)
    assert len(decode_audio(flac(4000, claimed=3000), 16_000)) == 3000


def test_a_few_bytes_that_stand_for_many_samples(monkeypatch):
    bomb = flac(2**18, claimed=2**18)
    assert len(bomb) < 1000
    decode_audio(bomb, 16_000)
    monkeypatch.setattr(audio_module, "MAX_SAMPLES", 2**17)
    for audio in (bomb, {"array": np.zeros(1000), "sampling_rate": 8}):
        with pytest.raises(AudioError, match="too long to decode .* at most 131,072 fit; split it") as caught:
            decode_audio(audio, 16_000)
        assert caught.value.reason == "too long to decode"


def test_files_that_never_end(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "device.wav").symlink_to("/dev/zero")
    for name in ("pipe.wav", "device.wav"):
        with pytest.raises(AudioError, match=f"{name}: not a regular file"):
            decode_audio(tmp_path / name, 16_000)
    with open(tmp_path / "sparse.wav", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(AudioError, match=r"sparse.wav: too large to read \(1,099,511,627,776 bytes, and at most 4,29"):
        decode_audio(tmp_path / "sparse.wav", 16_000)


@pytest.mark.parametrize("rate_hz", [0, -1, 16_000.0, "16000", None])
def test_an_impossible_rate(rate_hz):
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        decode_audio(np.zeros(10), rate_hz)


def test_the_error_survives_a_process_boundary():
    copy = pickle.loads(pickle.dumps(AudioError("a.wav: no samples", "no samples")))
    assert str(copy) == "a.wav: no samples" and copy.reason == "no samples"


@settings(deadline=None, max_examples=50)
@given(rate_hz=st.sampled_from([8000, 16_000, 22_050, 44_100, 48_000]), samples=st.integers(50, 5000))
def test_resampling_keeps_the_duration(rate_hz, samples):
    decoded = decode_audio({"array": np.ones(samples, np.float32), "sampling_rate": rate_hz}, 16_000)
    assert abs(len(decoded) - samples * 16_000 / rate_hz) <= 1


@pytest.mark.data
@pytest.mark.parametrize(("corpus", "file"), [("mini_librispeech", "*.ogg"), ("spoken_digits", "*.flac")])
def test_real_files(real_speech, corpus, file):
    path = next((real_speech(corpus) / "test").glob(file))
    duration_s = soundfile.info(path).duration
    assert len(decode_audio(path, 16_000)) / 16_000 == pytest.approx(duration_s, abs=0.01)
