"""Where a trained checkpoint goes: the pipeline, static and ONNX export, the model card, the Hub."""

from ..lazy import lazy_attributes

_MODULES = {
    "DLDAutomaticSpeechRecognitionPipeline": "pipeline",
    "OnnxExport": "onnx_export",
    "StaticExport": "static",
    "create_repository": "hub",
    "export_onnx": "onnx_export",
    "export_static": "static",
    "make_model_card": "model_card",
    "push_to_hub": "hub",
    "register_pipeline": "pipeline",
    "write_model_card": "model_card",
}
__all__ = list(_MODULES)
__getattr__ = lazy_attributes(__name__, _MODULES)
