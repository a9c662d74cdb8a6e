"""Audio in, float32 mono samples out: soundfile decodes, soxr resamples (DESIGN decision 10)."""

import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import xxhash

MAX_SAMPLES = 2**30
"""The most samples of a file, all channels together, and the most after resampling: 4 GiB as float32, 18 hours of mono
speech at 16 kHz. A few bytes of compressed audio may stand for any number, so this is looked at before decoding."""
MAX_FILE_BYTES = 4 * MAX_SAMPLES + 2**20  # all of them in 32 bits, and a header
LARGEST_SAMPLE = 2.0**31  # of 32-bit integers taken for floats; more means nothing, and its square may overflow
_UNKNOWN_LENGTH = 2**63 - 1  # what libsndfile says where the header has no length
_IN_MEMORY = "audio in memory"


class AudioError(ValueError):
    """Something cannot be used as audio. The message names it; `reason` is the same for all files with that problem."""

    def __init__(self, message: str, reason: str = "unusable audio"):
        super().__init__(message)
        self.reason = reason


def decode_audio(audio: Any, sampling_rate_hz: int) -> np.ndarray:
    """Decode, mix down to mono (the mean over channels) and resample.

    Args:
        audio: what `datasets.Audio(decode=False)` gives (`{"path", "bytes"}`, bytes win), a path, the bytes of an audio
            file, `{"array" or "raw", "sampling_rate"}`, torchcodec's `AudioDecoder` (from `datasets.Audio()`, where
            that is installed), or bare samples, which are taken to be at `sampling_rate_hz`. Samples have shape
            `(samples,)`, `(samples, channels)` or `(channels, samples)`; the shorter axis is the channels. Integer
            samples, of at most 32 bits, are scaled to [-1, 1).
        sampling_rate_hz: the wanted rate.

    Returns:
        float32 samples of shape `(samples,)`, never empty and all finite.

    Raises:
        AudioError: not audio, an empty or missing file, no samples, samples that are 64-bit integers, not finite or
            beyond `LARGEST_SAMPLE`, or more than `MAX_SAMPLES`.
    """
    if isinstance(sampling_rate_hz, bool) or not isinstance(sampling_rate_hz, int) or sampling_rate_hz < 1:
        raise ValueError(f"sampling_rate_hz={sampling_rate_hz!r} must be an integer of at least 1 (samples per second)")
    name = audio_name(audio)
    samples, rate_hz = _read(audio, name, sampling_rate_hz)
    samples = _mix_down(samples, name)
    _check_values(samples, name)
    if rate_hz != sampling_rate_hz and samples.size:
        _check_length(samples.size * sampling_rate_hz // rate_hz, name)
        samples = soxr.resample(samples, rate_hz, sampling_rate_hz)
    if not samples.size:
        raise _error(name, "no samples")
    return np.ascontiguousarray(samples, dtype=np.float32)


def encode_wav(samples: np.ndarray, sampling_rate_hz: int) -> bytes:
    """The bytes of a WAV file of float32 samples `(samples,)`, exact: decoding gives back the same samples."""
    file = io.BytesIO()
    soundfile.write(file, samples, sampling_rate_hz, format="WAV", subtype="FLOAT")
    content = bytearray(file.getvalue())
    peak = content.index(b"PEAK")  # a chunk of floats' files: its name, size and version, and the time of day
    content[peak + 12 : peak + 16] = bytes(4)  # which would make other bytes of the same samples, and other keys
    return bytes(content)


def encode_flac(samples: np.ndarray, sampling_rate_hz: int) -> bytes:
    """The bytes of a FLAC file of samples `(samples,)`, rounded to 16 bits; what is beyond [-1, 1] is clipped."""
    file = io.BytesIO()
    soundfile.write(file, samples, sampling_rate_hz, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def audio_bytes(audio: Mapping[str, Any]) -> bytes:
    """The bytes of an audio file, in memory or on disk, as `datasets.Audio(decode=False)` gives it.

    Raises:
        AudioError: a missing file, or no file at all.
    """
    name = audio_name(audio)
    content, _ = _content(audio, name)
    if isinstance(content, np.ndarray):
        raise _error(name, "samples, not a file")
    return content


def audio_name(audio: Any) -> str:
    """What messages call this audio: its path where it has one."""
    path = audio.get("path") if isinstance(audio, Mapping) else audio
    return str(path) if isinstance(path, str | Path) and str(path) else _IN_MEMORY


def audio_key(audio: Any) -> str:
    """A hash of what is heard: of the file's bytes, wherever they come from, or of the samples and their rate.

    128 bits of XXH3: no proof against forgery, but quick, for training looks its batches up by it in every epoch.

    Args:
        audio: as for `decode_audio`.

    Raises:
        AudioError: not audio, or a file that cannot be read. Whether it can be decoded is not looked at.
    """
    content, rate_hz = _content(audio, audio_name(audio))
    key = xxhash.xxh3_128()
    if isinstance(content, np.ndarray):
        key.update(f"{content.dtype}{content.shape}{rate_hz}".encode())
        content = np.ascontiguousarray(content)
    key.update(content)
    return key.hexdigest()


def _error(name: str, reason: str, detail: str = "") -> AudioError:
    return AudioError(f"{name}: {reason}" + (f" ({detail})" if detail else ""), reason)


def _check_values(samples: np.ndarray, name: str) -> None:
    largest = np.abs([samples.min(), samples.max()]).max() if samples.size else 0.0
    if not np.isfinite(largest):
        raise _error(name, "samples that are not finite numbers")
    if largest > LARGEST_SAMPLE:
        raise _error(name, "samples that are no sound", f"up to {largest:.3g}, and sound is between -1 and 1")


def _check_length(samples: int, name: str) -> None:
    if samples > MAX_SAMPLES:
        raise _error(name, "too long to decode", f"{samples:,} samples, and at most {MAX_SAMPLES:,} fit; split it")


def _read(audio: Any, name: str, default_rate_hz: int) -> tuple[np.ndarray, int]:
    content, rate_hz = _content(audio, name)
    if isinstance(content, np.ndarray):
        return content, rate_hz or default_rate_hz
    return _decode(content, name)


def _content(audio: Any, name: str) -> tuple[bytes | np.ndarray, int | None]:
    """The bytes of an audio file, or samples with their rate in Hz, None where it is not said."""
    if isinstance(audio, Mapping):
        array = audio.get("array") if audio.get("array") is not None else audio.get("raw")
        if isinstance(audio.get("bytes"), bytes | bytearray):
            return audio["bytes"], None
        if array is not None:
            return _array(array, name), _rate_of(audio, name)
        if isinstance(audio.get("path"), str | Path):
            return _file_bytes(audio["path"], name), None
        raise _error(name, "no audio in it", f"needs 'bytes', 'path', 'array' or 'raw', has {sorted(map(str, audio))}")
    if isinstance(audio, str | Path):
        return _file_bytes(audio, name), None
    if isinstance(audio, bytes | bytearray):
        return audio, None
    if hasattr(audio, "__array__"):
        return _array(audio, name), None
    if hasattr(audio, "get_all_samples"):
        samples = audio.get_all_samples()
        return _array(samples.data, name), samples.sample_rate
    raise _error(name, "not an audio object", f"a {type(audio).__name__}; load the dataset with Audio(decode=False)")


def _array(samples: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(samples)
    except (ValueError, TypeError, OverflowError) as error:  # rows of several lengths, and the like
        raise _error(name, "not samples", str(error)) from None


def _rate_of(audio: Mapping, name: str) -> int:
    rate_hz = audio.get("sampling_rate")
    try:
        if 1 <= int(rate_hz) < 2**31:
            return int(rate_hz)
    except (TypeError, ValueError, OverflowError):
        pass
    raise _error(name, "samples without a usable 'sampling_rate'", f"it is {rate_hz!r}")


def _file_bytes(path: str | Path, name: str) -> bytes:
    # Opened here rather than by libsndfile: its message for a missing file is "System error", and a name that ends in
    # .raw makes soundfile ask for a sampling rate instead of looking at the content.
    try:
        status = os.stat(path)
        # a pipe would be waited for, and a device may never end; a folder says what it is when it is opened
        readable = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        if readable and status.st_size <= MAX_FILE_BYTES:
            return Path(path).read_bytes()
    except FileNotFoundError:
        raise _error(name, "no such file") from None
    except (OSError, ValueError) as error:
        raise _error(name, "cannot be opened", getattr(error, "strerror", None) or str(error)) from None
    if not readable:
        raise _error(name, "not a regular file")
    raise _error(name, "too large to read", f"{status.st_size:,} bytes, and at most {MAX_FILE_BYTES:,} are read")


def _decode(content: bytes, name: str) -> tuple[np.ndarray, int]:
    if not content:
        raise _error(name, "empty file (0 bytes)")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            if file.frames == _UNKNOWN_LENGTH:
                raise _error(name, "a header without a length", "as when written to a pipe; convert it to another file")
            _check_length(file.frames * file.channels, name)
            samples = file.read(dtype="float32", always_2d=True)
            # not the rate that the file was made from: Opus decodes to 48 kHz or a divisor
            rate_hz = file.samplerate
    except (soundfile.SoundFileError, MemoryError) as error:
        detail = getattr(error, "error_string", None) or "a header that asks for more memory than there is"
        raise _error(name, "not audio that libsndfile can decode", detail.rstrip(".")) from None
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1), rate_hz


def _mix_down(samples: np.ndarray, name: str) -> np.ndarray:
    if samples.dtype == np.int64:  # what lists of integers become; of int16 or int32 samples it would make silence
        wanted = "give int16 or int32, as they were recorded, or floats between -1 and 1"
        raise _error(name, "integers of no sample width", f"int64: {wanted}")
    if samples.dtype.kind == "i":
        samples = samples.astype(np.float32) / (np.iinfo(samples.dtype).max + 1.0)
    if samples.dtype.kind != "f" or samples.ndim not in (1, 2):
        raise _error(name, "not samples", f"an array of {samples.dtype} with shape {samples.shape}")
    samples = samples.astype(np.float32, copy=False)
    if samples.ndim == 2 and samples.size:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    return samples.reshape(-1)
