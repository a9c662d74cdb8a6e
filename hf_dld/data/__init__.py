"""Speech in, batches out: corpora, decoding, vocabularies, filters and the collator."""

from ..lazy import lazy_attributes

_MODULES = {
    "AudioError": "audio",
    "DataCollatorCTC": "collator",
    "DataCollatorCoLLD": "collator",
    "FilterReport": "filtering",
    "build_character_processor": "vocabulary",
    "build_subword_processor": "vocabulary",
    "check_transcripts": "vocabulary",
    "decode_audio": "audio",
    "decode_labels": "vocabulary",
    "encode_text": "vocabulary",
    "load_processor": "processors",
    "load_speech_dataset": "datasets",
    "prepare_corpus": "prepare",
    "prepare_dataset": "filtering",
    "speech_splits": "datasets",
    "training_stream": "streaming",
}
__all__ = list(_MODULES)
__getattr__ = lazy_attributes(__name__, _MODULES)
