"""Dynamic-depth speech recognition for Hugging Face Transformers: one CTC checkpoint, every depth.

Importing the package registers the dynamic models with the Auto classes and the pipeline with its task, so that
`AutoModelForCTC.from_pretrained` and `pipeline("automatic-speech-recognition", num_active_layers=6)` work.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCTC

from .deploy.pipeline import DLDAutomaticSpeechRecognitionPipeline, register_pipeline
from .lazy import lazy_attributes
from .models import (
    CheckpointError,
    DLDWav2Vec2ConformerConfig,
    DLDWav2Vec2ConformerForCTC,
    DLDWav2Vec2ConformerModel,
    DLDWavLMConfig,
    DLDWavLMForCTC,
    DLDWavLMModel,
)
from .models.configuration_dld import VERSION

__version__ = VERSION
# what running a model does not need is imported when it is used
_MODULES = {
    "CTCTrainer": "distill",
    "CTCTrainingArguments": "distill",
    "CoLLDTrainer": "distill",
    "CoLLDTrainingArguments": "distill",
    "DLDTrainer": "distill",
    "DLDTrainingArguments": "distill",
    "DataCollatorCTC": "data",
    "DataCollatorCoLLD": "data",
    "DepthReport": "evaluation",
    "build_character_processor": "data",
    "build_subword_processor": "data",
    "evaluate_depths": "evaluation",
    "export_onnx": "deploy",
    "export_static": "deploy",
    "load_speech_dataset": "data",
    "lora_config": "distill",
    "make_model_card": "deploy",
    "make_student": "distill",
    "prepare_dataset": "data",
    "push_to_hub": "deploy",
    "search_depth_schedule": "evaluation",
}
__all__ = [
    "CheckpointError",
    "DLDAutomaticSpeechRecognitionPipeline",
    "DLDWav2Vec2ConformerConfig",
    "DLDWav2Vec2ConformerForCTC",
    "DLDWav2Vec2ConformerModel",
    "DLDWavLMConfig",
    "DLDWavLMForCTC",
    "DLDWavLMModel",
    *_MODULES,
]
__getattr__ = lazy_attributes(__name__, _MODULES)

for _config, _model, _ctc_model in (
    (DLDWavLMConfig, DLDWavLMModel, DLDWavLMForCTC),
    (DLDWav2Vec2ConformerConfig, DLDWav2Vec2ConformerModel, DLDWav2Vec2ConformerForCTC),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCTC.register(_config, _ctc_model, exist_ok=True)
    # saved checkpoints carry their code, so that they load with trust_remote_code where this package is not installed
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _ctc_model.register_for_auto_class("AutoModelForCTC")
register_pipeline()
