"""Tiny random real speech encoders of every kind that can be distilled layer by layer, all with 50 frames a second."""

from typing import Any

import pytest
import torch
from conftest import TINY, make_dynamic, randomize
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
