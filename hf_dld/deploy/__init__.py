"""Where a trained checkpoint goes: the pipeline, stock checkpoints of one depth, its model card, the Hub."""

from .hub import create_repository, push_to_hub
from .model_card import make_model_card, write_model_card
from .pipeline import DLDAutomaticSpeechRecognitionPipeline, register_pipeline
from .static import StaticExport, export_static

__all__ = [
    "DLDAutomaticSpeechRecognitionPipeline",
    "StaticExport",
    "create_repository",
    "export_static",
    "make_model_card",
    "push_to_hub",
    "register_pipeline",
    "write_model_card",
]
