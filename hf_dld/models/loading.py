"""Checkpoints that cannot be used say so, and why, before anything is computed with them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
# what a pretrained encoder lacks, and fine-tuning adds
_NEW = re.compile(r"(\w+\.)?(lm_head|masked_spec_embed|adapter)\b")


class CheckpointError(Exception):
    """A checkpoint cannot be used.

    Not an `OSError`, `ValueError` or `RuntimeError`: after those, `pipeline` tries other classes and buries the reason.
    """


@contextmanager
def explained_errors(checkpoint: Any, subfolder: str = "", *, pickle_refused: bool = False) -> Iterator[None]:
    """Turn the loader's errors about damaged files, and about pickles that nobody asked for, into `CheckpointError`."""
    folder = Path(str(checkpoint), subfolder)
    try:
        yield
    except SafetensorError as error:
        damaged = ", ".join(_damaged_files(folder)) or "A weight file"
        raise CheckpointError(
            f"{damaged} of {checkpoint} is not a whole safetensors file ({error}): it was cut short, or is a Git LFS "
            "pointer or a file of another kind under this name. Copy it again, or download it with force_download=True."
        ) from error
    except OSError as error:
        local = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        if not pickle_refused or not (local or "use_safetensors=True" in str(error)):
            raise
        raise CheckpointError(
            f"{checkpoint} has its weights in {local[0] if local else 'pytorch_model.bin'}, a pickle, and none in "
            "safetensors. Pickles are only loaded when asked for, because they can hold more than weights: if you "
            "trust their source, pass use_safetensors=False, and save_pretrained() then writes model.safetensors."
        ) from error
    except (ValueError, ImportError, CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config.json that was damaged fails in as many ways as it has fields
        raise CheckpointError(
            f"{checkpoint} cannot be loaded ({type(error).__name__}: {error}). Without a mistake in the arguments, its "
            "config.json is damaged or of another kind of model."
        ) from error


def _damaged_files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            yield f"{path.name} ({path.stat().st_size} bytes)"


def check_loading(checkpoint: Any, loading: dict[str, Any], *, ignore_mismatched_sizes: bool) -> None:
    """Raise `CheckpointError` for what Transformers only reports in its log.

    Args:
        checkpoint: what the error calls it.
        loading: as `from_pretrained(..., output_loading_info=True)` returns it.
        ignore_mismatched_sizes: allow tensors of the wrong shape, which start from random values.
    """
    wrong = sorted(loading["mismatched_keys"])
    if wrong and not ignore_mismatched_sizes:
        name, stored, wanted = wrong[0]
        raise CheckpointError(
            f"{checkpoint} has {len(wrong)} tensors of another shape than its config.json asks for: {name} is "
            f"{list(stored)}, not {list(wanted)}{', ...' if len(wrong) > 1 else ''}. Weights and configuration are of "
            "different models. To start these tensors from random values, pass ignore_mismatched_sizes=True."
        )
    missing = sorted(name for name in loading["missing_keys"] if _LAYER.search(name))
    if missing:
        layers = sorted({int(_LAYER.search(name).group(1)) for name in missing})
        raise CheckpointError(
            f"{checkpoint} lacks tensors of encoder layers {layers}, which its configuration asks for: {missing[0]}"
            f"{', ...' if len(missing) > 1 else ''}. They would run with random values."
        )
    missing = sorted(name for name in loading["missing_keys"] if not _NEW.match(name))
    if missing:
        raise CheckpointError(
            f"{checkpoint} lacks {len(missing)} tensors that its configuration asks for: {missing[0]}"
            f"{', ...' if len(missing) > 1 else ''}. They would run with random values."
        )
