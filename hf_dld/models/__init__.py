"""What runs. The files of this folder import nothing of the rest, so that they can travel inside a checkpoint."""

from .configuration_dld import DLDWav2Vec2ConformerConfig, DLDWavLMConfig
from .loading import CheckpointError
from .modeling_dld_wav2vec2_conformer import DLDWav2Vec2ConformerForCTC, DLDWav2Vec2ConformerModel
from .modeling_dld_wavlm import DLDWavLMForCTC, DLDWavLMModel

DYNAMIC_CLASSES = {
    config_class.model_type: model_class
    for model_class in (DLDWavLMForCTC, DLDWav2Vec2ConformerForCTC)
    for config_class in (model_class.config_class, model_class.config_class.stock_config_class)
}
"""The dynamic CTC class for a `model_type`, stock or dynamic."""

__all__ = [
    "DYNAMIC_CLASSES",
    "CheckpointError",
    "DLDWav2Vec2ConformerConfig",
    "DLDWav2Vec2ConformerForCTC",
    "DLDWav2Vec2ConformerModel",
    "DLDWavLMConfig",
    "DLDWavLMForCTC",
    "DLDWavLMModel",
]
