"""What runs. The files of this folder import nothing of the rest, so that they can travel inside a checkpoint."""

from .configuration_dld import DLDWav2Vec2ConformerConfig, DLDWavLMConfig
from .modeling_dld_wav2vec2_conformer import DLDWav2Vec2ConformerForCTC, DLDWav2Vec2ConformerModel
from .modeling_dld_wavlm import DLDWavLMForCTC, DLDWavLMModel

__all__ = [
    "DLDWav2Vec2ConformerConfig",
    "DLDWav2Vec2ConformerForCTC",
    "DLDWav2Vec2ConformerModel",
    "DLDWavLMConfig",
    "DLDWavLMForCTC",
    "DLDWavLMModel",
]
