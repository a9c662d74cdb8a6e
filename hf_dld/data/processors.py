"""The processor of a checkpoint: how it hears and how it spells."""

from pathlib import Path

from transformers import AutoProcessor, ProcessorMixin


def load_processor(checkpoint: str | Path) -> ProcessorMixin:
    """The feature extractor and the tokenizer of a checkpoint, as one processor.

    Raises:
        ValueError: it has no processor, or only half of one.
    """
    try:
        processor = AutoProcessor.from_pretrained(checkpoint)
    except ValueError as error:
        raise ValueError(f"{checkpoint} has no processor that can be loaded{_ADVICE}") from error
    for part in ("feature_extractor", "tokenizer"):
        if not hasattr(processor, part):
            raise ValueError(f"{checkpoint} has a {type(processor).__name__} but no {part}{_ADVICE}")
    return processor


_ADVICE = ": save the processor that it was trained with beside the model, with processor.save_pretrained."
