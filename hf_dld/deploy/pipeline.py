"""The speech recognition pipeline with a depth: Transformers' own, plus `num_active_layers` and `active_layers`."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.utils import httpx
from torch import nn
from transformers import AutoFeatureExtractor, AutomaticSpeechRecognitionPipeline, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.automatic_speech_recognition import rescale_stride

from ..data.audio import decode_audio
from ..evaluation.latency import LatencyModel, calibrate_latency, check_latency_budget
from ..models import DYNAMIC_CLASSES
from ..models.feature_encoder import samples_of_a_frame

TASK = "automatic-speech-recognition"
_CALIBRATING = threading.Lock()  # threads that did it at once would measure each other


def why_not_loaded(name_or_path: str, part: str) -> Exception | None:
    """What loading a part of the processor raises, which Transformers' pipelines do not tell; None where it loads."""
    loader = {"tokenizer": AutoTokenizer, "feature_extractor": AutoFeatureExtractor}[part]
    try:
        loader.from_pretrained(name_or_path)
    except Exception as error:  # as many kinds as there are files
        return error
    return None


class DLDAutomaticSpeechRecognitionPipeline(AutomaticSpeechRecognitionPipeline):
    """`pipeline("automatic-speech-recognition")` for dynamic models; stock models behave as they always did.

    `num_active_layers=` (a count) and `active_layers=` (ascending 0-based indices) work as keywords of `pipeline(...)`,
    for all calls, and of a call, for that call only; they are an error for a stock model. So does `latency_budget_s=`
    instead: the device is calibrated once (see `hf_dld.evaluation.calibrate_latency`), and each forward pass, of an
    utterance or of a chunk with `chunk_length_s`, runs the deepest model that is predicted to keep so many seconds for
    audio of its length. Decoding audio is not in the budget. A budget that no depth keeps is an error.

    Threads may share a pipeline, each call with its own depth: nothing of a call stays in the pipeline or the model.

    Audio is decoded with soundfile and resampled with soxr: paths, URLs, bytes, arrays and dicts at any sampling rate
    need neither ffmpeg nor torchaudio.
    """

    latency_model: LatencyModel | None = None
    # loaded if they are there, so that a missing one can be named here: Transformers' own error says nothing of it
    _load_tokenizer = None
    _load_feature_extractor = None

    def __init__(self, model: Any, feature_extractor: Any = None, tokenizer: Any = None, **kwargs: Any):
        parts = {"feature_extractor": feature_extractor, "tokenizer": tokenizer}
        missing = [name for name, part in parts.items() if part is None]
        if missing:
            raise ValueError(
                f"{model.name_or_path or type(model).__name__} has no {' and no '.join(missing)} that can be loaded, "
                "and speech recognition needs both: save the model's processor beside it with "
                f"processor.save_pretrained, or pass {' and '.join(f'{name}=' for name in missing)} to pipeline()."
            ) from why_not_loaded(model.name_or_path, missing[0])
        model = dynamic_where_trained(model)
        super().__init__(model, feature_extractor=feature_extractor, tokenizer=tokenizer, **kwargs)

    @property
    def is_dynamic(self) -> bool:
        return hasattr(self.model.config, "resolve_active_layers")

    def _sanitize_parameters(
        self,
        num_active_layers: int | None = None,
        active_layers: Sequence[int] | None = None,
        latency_budget_s: float | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        wanted = kwargs.get("return_timestamps")
        if wanted and self.is_dynamic and not hasattr(self.tokenizer, "word_delimiter_token"):
            raise ValueError(
                f"return_timestamps={wanted!r} needs a vocabulary of characters, and this model's is one of subwords: "
                f"a {type(self.tokenizer).__name__} does not tell where its tokens are."
            )
        depth = {
            "num_active_layers": num_active_layers,
            "active_layers": active_layers,
            "latency_budget_s": latency_budget_s,
        }
        depth = [name for name, value in depth.items() if value is not None]
        if not depth:
            return preprocess_params, forward_params, postprocess_params
        if not self.is_dynamic:
            raise ValueError(
                f"{' and '.join(depth)} needs a dynamic model, and {type(self.model).__name__} always runs all of its "
                "layers. Load the checkpoint with hf_dld.DLDWavLMForCTC or hf_dld.DLDWav2Vec2ConformerForCTC."
            )
        if latency_budget_s is None:
            # one set of layers, so that a call's count is not overruled by layers given to the pipeline
            forward_params["active_layers"] = self.model.config.resolve_active_layers(active_layers, num_active_layers)
        elif len(depth) > 1:
            raise ValueError(f"latency_budget_s chooses the depth itself: give it without {depth[0]}")
        else:
            check_latency_budget(latency_budget_s)
            with _CALIBRATING:
                if self.latency_model is None:
                    self.latency_model = calibrate_latency(self.model, self.feature_extractor.sampling_rate)
            forward_params["active_layers"] = None
        forward_params["latency_budget_s"] = latency_budget_s
        return preprocess_params, forward_params, postprocess_params

    def preprocess(self, inputs: Any, **kwargs: Any) -> Any:
        if self.is_dynamic:
            if isinstance(inputs, str) and inputs.startswith(("http://", "https://")):
                inputs = httpx.get(inputs, follow_redirects=True).raise_for_status().content
            inputs = self.decode(inputs)
        yield from super().preprocess(inputs, **kwargs)

    def decode(self, inputs: Any) -> dict[str, Any]:
        """Any audio as mono samples at the model's sampling rate, with a `stride` in samples scaled to that rate."""
        rate_hz = self.feature_extractor.sampling_rate
        if isinstance(inputs, torch.Tensor):
            inputs = inputs.cpu().numpy()
        decoded = {"raw": decode_audio(inputs, rate_hz), "sampling_rate": rate_hz}
        if isinstance(inputs, dict):
            audio_keys = ("raw", "array", "bytes", "path", "sampling_rate")
            decoded = {**{name: value for name, value in inputs.items() if name not in audio_keys}, **decoded}
            if "stride" in inputs:
                if "sampling_rate" not in inputs:
                    raise ValueError(f"stride={inputs['stride']} counts samples: give their sampling_rate with it")
                ratio = rate_hz / inputs["sampling_rate"]
                decoded["stride"] = tuple(round(samples * ratio) for samples in inputs["stride"])
        return decoded

    def _forward(
        self,
        model_inputs: dict[str, Any],
        active_layers: tuple[int, ...] | None = None,
        latency_budget_s: float | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if not self.is_dynamic:
            return super()._forward(model_inputs, **kwargs)
        # the stock CTC branch calls the model with its input and mask alone, and transcribes the padding of a batch
        stride, is_last = model_inputs.pop("stride", None), model_inputs.pop("is_last")
        mask = model_inputs.pop("attention_mask")
        inputs = model_inputs.pop(self.model.main_input_name)
        frame_samples = samples_of_a_frame(self.model.config)
        if (lacking := frame_samples - inputs.shape[1]) > 0:
            inputs, mask = (nn.functional.pad(values, (0, lacking)) for values in (inputs, mask))
        heard = mask.clone()
        heard[:, :frame_samples] = 1  # a model cannot run on nothing, but what it makes of that is not transcribed
        if latency_budget_s is not None:
            active_layers = self.layers_within(latency_budget_s, *inputs.shape)
        logits = self.model(inputs, attention_mask=heard, active_layers=active_layers).logits
        frame_lengths = self.model._get_feat_extract_output_lengths(mask.sum(-1))
        padding = torch.arange(logits.shape[1], device=logits.device) >= frame_lengths[:, None]
        blank = self.model.config.pad_token_id
        if self.type == "ctc_with_lm":
            silence = torch.full_like(logits[0, 0], torch.finfo(logits.dtype).min)
            silence[blank] = 0.0
            outputs = {"logits": torch.where(padding[..., None], silence, logits)}
        else:
            outputs = {"tokens": logits.argmax(-1).masked_fill(padding, blank)}
        if stride is not None:
            strides = rescale_stride(stride if isinstance(stride, list) else [stride], 1 / self._align_to)
            outputs["stride"] = strides if isinstance(stride, list) else strides[0]
        return {"is_last": is_last, **outputs, **model_inputs}

    def layers_within(self, latency_budget_s: float, utterances: int, samples: int) -> tuple[int, ...]:
        """The layers of the deepest model that keeps the budget for a batch; its utterances count one after another."""
        audio_s = samples / self.feature_extractor.sampling_rate
        depth = self.latency_model.deepest(audio_s, latency_budget_s / utterances)
        return self.model.config.resolve_active_layers(num_active_layers=depth)


def dynamic_where_trained(model: Any) -> Any:
    """The model, but the dynamic one with its adapters where a stock one carries those of a dynamic one.

    An adapter directory names its base checkpoint, and where that is a stock one, Transformers loads the stock class:
    without a depth, and WavLM's attention then bypasses the adapters in silence.
    """
    dynamic_classes = {model_class.__name__: model_class for model_class in DYNAMIC_CLASSES.values()}
    for name, adapter in getattr(model, "peft_config", {}).items():
        model_class = dynamic_classes.get((adapter.auto_mapping or {}).get("base_model_class"))
        if model_class is not None and not hasattr(model.config, "resolve_active_layers"):
            dynamic = model_class.from_pretrained(
                adapter.base_model_name_or_path, revision=adapter.revision, dtype=model.dtype
            )
            dynamic.load_adapter(adapter_state_dict=model.get_adapter_state_dict(name), peft_config=adapter)
            return dynamic.to(model.device)
    return model


def register_pipeline() -> None:
    """Make `pipeline("automatic-speech-recognition")` this one; what the task's defaults are stays."""
    stock = PIPELINE_REGISTRY.supported_tasks.pop(TASK)
    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        DLDAutomaticSpeechRecognitionPipeline,
        pt_model=stock["pt"],
        default=stock["default"],
        type=stock["type"],
    )
    # or its save_pretrained would copy this file into checkpoints, as code that cannot run outside of this package
    del DLDAutomaticSpeechRecognitionPipeline._registered_impl
