"""What trainers are tested with: settings, a dataset of noise, and tiny random real speech encoders of every kind.

The encoders can be distilled layer by layer; all have 50 frames a second.
"""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, VOCAB_SIZE, make_dynamic, randomize
from transformers import (
    FeatureExtractionMixin,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from hf_dld import build_character_processor

# quick, the same everywhere, and nothing drawn that a test does not ask for
TRAINING = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
    "train_sampling_strategy": "random",
    "use_cpu": True,
}
STOCK = {
    "wavlm": (WavLMModel, WavLMConfig),
    "hubert": (HubertModel, HubertConfig),
    "wav2vec2": (Wav2Vec2Model, Wav2Vec2Config),
    "conformer": (Wav2Vec2ConformerModel, Wav2Vec2ConformerConfig),
    "bert": (Wav2Vec2BertModel, Wav2Vec2BertConfig),
}
DYNAMIC = {"dld_wavlm": "wavlm-stable", "dld_conformer": "conformer-relative"}
KINDS = [*STOCK, *DYNAMIC]
OPTIONS = {
    **{name: value for name, value in TINY.items() if name not in ("vocab_size", "num_buckets", "max_bucket_distance")},
    "conv_kernel": (10, 8, 8),
    "conv_stride": (5, 8, 8),
    "conv_depthwise_kernel_size": 5,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "layerdrop": 0.0,
    "mask_time_prob": 0.05,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "conformer_conv_dropout": 0.0,
}


def make_encoder(kind: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A tiny encoder without a head, in eval mode; the dynamic ones without theirs."""
    if kind in DYNAMIC:
        return make_dynamic(DYNAMIC[kind], **{**OPTIONS, **config}).base_model
    model_class, config_class = STOCK[kind]
    options = {**OPTIONS, **config}
    known = set(config_class().to_dict())
    torch.manual_seed(seed)
    return randomize(model_class(config_class(**{k: v for k, v in options.items() if k in known})), seed).eval()


def make_extractor(kind: str) -> FeatureExtractionMixin:
    if kind == "bert":
        return SeamlessM4TFeatureExtractor()
    return Wav2Vec2FeatureExtractor(return_attention_mask=True)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def processor():
    return build_character_processor(["abcdefghi"])  # 12 tokens with blank, unknown and word delimiter


@pytest.fixture(scope="module")
def dataset():
    """Twelve utterances of noise, 0.25 to 0.5 s, one of them without a transcript."""
    generator = np.random.default_rng(0)
    examples = []
    for index in range(12):
        samples = generator.standard_normal(4000 + 300 * index).astype(np.float32)
        labels = [] if index == 5 else generator.integers(3, VOCAB_SIZE, 3).tolist()
        lengths = {"input_length": len(samples), "duration_s": len(samples) / 16_000}
        examples.append({"audio": samples, "labels": labels, **lengths})
    return examples
