"""Dynamic-depth speech recognition for Hugging Face Transformers: one CTC checkpoint, every depth.

Importing the package registers the dynamic models with the Auto classes and the pipeline with its task, so that
`AutoModelForCTC.from_pretrained` and `pipeline("automatic-speech-recognition", num_active_layers=6)` work.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCTC

from .data import (
    DataCollatorCoLLD,
    DataCollatorCTC,
    build_character_processor,
    build_subword_processor,
    load_speech_dataset,
    prepare_dataset,
)
from .deploy import DLDAutomaticSpeechRecognitionPipeline, make_model_card, push_to_hub, register_pipeline
from .distill import (
    CoLLDTrainer,
    CoLLDTrainingArguments,
    CTCTrainer,
    CTCTrainingArguments,
    DLDTrainer,
    DLDTrainingArguments,
    make_student,
)
from .models import (
    DLDWav2Vec2ConformerConfig,
    DLDWav2Vec2ConformerForCTC,
    DLDWav2Vec2ConformerModel,
    DLDWavLMConfig,
    DLDWavLMForCTC,
    DLDWavLMModel,
)

__version__ = "0.1.0"
__all__ = [
    "CTCTrainer",
    "CTCTrainingArguments",
    "CoLLDTrainer",
    "CoLLDTrainingArguments",
    "DLDAutomaticSpeechRecognitionPipeline",
    "DLDTrainer",
    "DLDTrainingArguments",
    "DLDWav2Vec2ConformerConfig",
    "DLDWav2Vec2ConformerForCTC",
    "DLDWav2Vec2ConformerModel",
    "DLDWavLMConfig",
    "DLDWavLMForCTC",
    "DLDWavLMModel",
    "DataCollatorCTC",
    "DataCollatorCoLLD",
    "build_character_processor",
    "build_subword_processor",
    "load_speech_dataset",
    "make_model_card",
    "make_student",
    "prepare_dataset",
    "push_to_hub",
]

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
