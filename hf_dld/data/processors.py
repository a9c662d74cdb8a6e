"""The processor of a checkpoint: how it hears and how it spells."""

from pathlib import Path

from transformers import AutoProcessor, ProcessorMixin


def load_processor(checkpoint: str | Path) -> ProcessorMixin:
    """The feature extractor and the tokenizer of a checkpoint, as one processor; code that it carries is not run.

    Raises:
        ValueError: it has no processor, only half of one, or one that is damaged or needs code of its own.
        OSError: as Transformers says it.
    """
    try:
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # damaged files fail in as many ways as there are
        without = " without running code of its own" if "trust_remote_code" in str(error) else ""
        raise ValueError(f"{checkpoint} has no processor that can be loaded{without}{_ADVICE}") from error
    for part in ("feature_extractor", "tokenizer"):
        if not hasattr(processor, part):
            raise ValueError(f"{checkpoint} has a {type(processor).__name__} but no {part}{_ADVICE}")
    return processor


_ADVICE = ": save the processor that it was trained with beside the model, with processor.save_pretrained."
