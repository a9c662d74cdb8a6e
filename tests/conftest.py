"""Tiny random real models of every architecture variant, made here: no test needs the network, a GPU or a download."""

import gc
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# no test may reach a hub, and a mistyped name should fail at once instead of after retries
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, HubServer
from transformers import (
    PreTrainedModel,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
    WavLMConfig,
    WavLMForCTC,
)

from hf_dld.models import DLDWav2Vec2ConformerForCTC, DLDWavLMForCTC

torch.set_num_threads(1)

NUM_LAYERS = 4
VOCAB_SIZE = 12
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 8, 4),
    "conv_stride": (5, 8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": VOCAB_SIZE,
    "num_buckets": 32,
    "max_bucket_distance": 64,
    "output_hidden_size": 16,
    "pad_token_id": 0,
}
WAVLM = (WavLMForCTC, WavLMConfig, DLDWavLMForCTC)
CONFORMER = (Wav2Vec2ConformerForCTC, Wav2Vec2ConformerConfig, DLDWav2Vec2ConformerForCTC)
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "wavlm": (WAVLM, {}),
    "wavlm-stable": (WAVLM, {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "conformer-relative": (CONFORMER, {"position_embeddings_type": "relative", "feat_extract_norm": "layer"}),
    "conformer-rotary": (CONFORMER, {"position_embeddings_type": "rotary"}),
    "conformer-no-position": (CONFORMER, {"position_embeddings_type": None}),
}
LONGEST = [
    "test_onnx.py",
    "test_run_dld_ctc.py",
    "test_behaviour.py",
    "test_distributed.py",
    "test_trainer.py",
    "test_kills.py",
    "test_colld_trainer.py",
    "test_faults.py",
    "test_lora.py",
    "test_model_card.py",
    "test_hostile_input.py",
    "test_readme.py",
    "test_adapters.py",
    "test_without_the_package.py",
    "test_recipes.py",
]
STOCK_WEIGHTS: dict[str, dict[str, torch.Tensor]] = {}  # made once: building a model takes longer than loading it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """Garbage is not looked for among what was imported: trainers look so often that it took 40 % of their tests."""
    gc.freeze()


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Fill every parameter and running statistic with noise, so that no path is hidden by a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and name.rsplit(".", 1)[-1] not in ("pe", "inv_freq"):
            noise = torch.rand(tensor.shape, generator=generator) if "running_var" in name else None
            noise = torch.randn(tensor.shape, generator=generator) * 0.1 if noise is None else noise + 0.5
            tensor.data = tensor.data + noise if "running_var" not in name else noise
    return model


def make_stock(variant: str, **config: Any) -> PreTrainedModel:
    """A tiny stock CTC model of the variant, in eval mode."""
    (stock_class, config_class, _), options = VARIANTS[variant]
    torch.manual_seed(0)
    return randomize(stock_class(config_class(**{**TINY, **options, **config}))).eval()


def make_dynamic(variant: str, **config: Any) -> PreTrainedModel:
    """The dynamic model with the weights of `make_stock`, in eval mode."""
    (_, _, dynamic_class), options = VARIANTS[variant]
    torch.manual_seed(0)
    model = dynamic_class(dynamic_class.config_class(**{**TINY, **options, **config})).eval()
    stock_config = {name: value for name, value in config.items() if "active" not in name}
    key = f"{variant} {sorted(stock_config.items())}"
    if key not in STOCK_WEIGHTS:
        STOCK_WEIGHTS[key] = make_stock(variant, **stock_config).state_dict()
    model.load_state_dict(STOCK_WEIGHTS[key])
    return model


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two utterances, the second one padded: input_values (2, 8000) and attention_mask."""
    generator = torch.Generator().manual_seed(1)
    input_values = torch.randn(2, 8000, generator=generator)
    attention_mask = torch.ones(2, 8000, dtype=torch.long)
    attention_mask[1, 5000:] = 0
    input_values[1, 5000:] = 0.0
    return {"input_values": input_values, "attention_mask": attention_mask}


@pytest.fixture(scope="module")
def own_process():
    """Calls functions in a process without other tests' memory, where lines are not counted: the marks of slipcover in
    them cannot be compiled.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine, which `HfApi()` made in this process uses, logged in; for processes, its `environment`."""
    constants = huggingface_hub.constants
    with HubServer() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="session")
def real_speech():
    """Folder of a corpus in ../shared/data, or a skip."""

    def find(corpus: str) -> Path:
        folder = Path(__file__).parents[2] / "shared" / "data" / corpus
        if not folder.is_dir():
            pytest.skip(f"needs {folder}")
        return folder

    return find
