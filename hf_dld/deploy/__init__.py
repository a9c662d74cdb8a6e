"""Where a trained checkpoint goes: the pipeline."""

from .pipeline import DLDAutomaticSpeechRecognitionPipeline, register_pipeline

__all__ = ["DLDAutomaticSpeechRecognitionPipeline", "register_pipeline"]
