"""Speech in, batches out: corpora, decoding, vocabularies, filters and the collator."""

from .audio import AudioError, decode_audio
from .collator import DataCollatorCoLLD, DataCollatorCTC
from .datasets import load_speech_dataset
from .filtering import FilterReport, prepare_dataset
from .vocabulary import (
    build_character_processor,
    build_subword_processor,
    check_transcripts,
    decode_labels,
    encode_text,
)

__all__ = [
    "AudioError",
    "DataCollatorCTC",
    "DataCollatorCoLLD",
    "FilterReport",
    "build_character_processor",
    "build_subword_processor",
    "check_transcripts",
    "decode_audio",
    "decode_labels",
    "encode_text",
    "load_speech_dataset",
    "prepare_dataset",
]
