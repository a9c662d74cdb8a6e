"""Vocabularies for CTC from the training transcripts, as processors that Transformers' own classes load and decode.

The blank of CTC is `<pad>`, id 0, which is what `ForCTC` models and their tokenizers take it to be.
"""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    ParakeetTokenizer,
    PreTrainedTokenizerBase,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)
from transformers.utils import logging

logger = logging.get_logger(__name__)

PAD, UNKNOWN = "<pad>", "<unk>"
WORD_DELIMITER = "|"  # between words in a character vocabulary
WORD_START = "\u2581"  # before the first piece of a word in a subword vocabulary


def build_character_processor(
    texts: Iterable[str | None],
    *,
    sampling_rate_hz: int = 16_000,
    do_normalize: bool = True,
    return_attention_mask: bool = True,
) -> Wav2Vec2Processor:
    """A processor whose tokens are the characters of the transcripts, upper and lower case as they are.

    Args:
        texts: the training transcripts; None and blank ones are passed over.
        sampling_rate_hz: the rate that the model hears.
        do_normalize: bring each utterance to zero mean and unit variance (as the model was pretrained).
        return_attention_mask: whether batches carry the mask that tells speech from padding. Without it the model
            and the losses count padding as speech; group-norm models were pretrained without it.

    Raises:
        ValueError: no transcript holds a character, or one holds "|", the mark between words.
    """
    alphabet = _alphabet(_clean(texts), reserved=WORD_DELIMITER)
    vocabulary = {token: index for index, token in enumerate([PAD, UNKNOWN, WORD_DELIMITER, *alphabet])}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocab.json")
        file.write_text(json.dumps(vocabulary), encoding="utf-8")
        tokenizer = Wav2Vec2CTCTokenizer(
            str(file), bos_token=None, eos_token=None, pad_token=PAD, unk_token=UNKNOWN,
            word_delimiter_token=WORD_DELIMITER,
        )  # fmt: skip
    return _processor(tokenizer, sampling_rate_hz, do_normalize, return_attention_mask)


def build_subword_processor(
    texts: Iterable[str | None],
    vocab_size: int,
    algorithm: Literal["bpe", "unigram"] = "bpe",
    *,
    sampling_rate_hz: int = 16_000,
    do_normalize: bool = True,
    return_attention_mask: bool = True,
) -> Wav2Vec2Processor:
    """A processor whose tokens are pieces of words, learnt from the transcripts.

    `ParakeetTokenizer` is Transformers' own tokenizer for CTC over subwords: its `decode` merges repeats and drops the
    blank, so the stock pipeline works. It has no character offsets: `return_timestamps` needs a character vocabulary.

    Args:
        vocab_size: the number of tokens, `<pad>` and `<unk>` among them; a small corpus may give fewer (logged).
        algorithm: "bpe" or "unigram".
        texts, sampling_rate_hz, do_normalize, return_attention_mask: as in `build_character_processor`.

    Raises:
        ValueError: an unknown algorithm, a `vocab_size` that cannot hold the alphabet, transcripts without a
            character, or with "\u2581", the mark where words begin.
    """
    if algorithm not in _TRAINERS:
        raise ValueError(f"algorithm={algorithm!r} must be one of {', '.join(map(repr, _TRAINERS))}")
    texts = _clean(texts)
    smallest = len(_alphabet(texts, reserved=WORD_START)) + len((PAD, UNKNOWN, WORD_START))
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the characters of these transcripts, {PAD}, {UNKNOWN} and the mark "
            f"where words begin need at least {smallest}"
        )
    backend = _TRAINERS[algorithm](texts, vocab_size)
    if backend.get_vocab_size() < vocab_size:
        logger.warning(
            f"the transcripts gave only {backend.get_vocab_size()} of the {vocab_size} {algorithm} tokens asked for"
        )
    tokenizer = ParakeetTokenizer(tokenizer_object=backend, pad_token=PAD, unk_token=UNKNOWN)
    return _processor(tokenizer, sampling_rate_hz, do_normalize, return_attention_mask)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str | None) -> list[int]:
    """Token ids of a transcript; any run of white space is one space. [] for None and for blank text."""
    text = _normalize_spaces(text or "")
    return tokenizer(text, add_special_tokens=False).input_ids if text else []


def decode_labels(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """The text of label ids. Equal neighbours are kept, unlike in model output; -100 (padding) is left out."""
    return tokenizer.decode([int(index) for index in ids if index >= 0], group_tokens=False)


def unknown_characters(tokenizer: PreTrainedTokenizerBase, text: str | None) -> list[str]:
    """The characters of a text that the vocabulary lacks, sorted."""
    unusable = {tokenizer.unk_token_id, tokenizer.pad_token_id}
    if unusable.isdisjoint(encode_text(tokenizer, text)):
        return []
    unknown = sorted(char for char in set(text) if not unusable.isdisjoint(encode_text(tokenizer, char)))
    return unknown or [f"{tokenizer.unk_token} or {tokenizer.pad_token} itself"]


def check_transcripts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str | None]) -> dict[str, tuple[int, str]]:
    """What the vocabulary lacks: each such character with the number of transcripts it is in and the first of them."""
    lacking: dict[str, tuple[int, str]] = {}
    for text in _checked(texts):
        for char in unknown_characters(tokenizer, text):
            count, first = lacking.get(char, (0, text))
            lacking[char] = (count + 1, first)
    return lacking


def _checked(texts: Iterable[str | None]) -> Iterable[str | None]:
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of transcripts, not one string: {texts[:40]!r}")
    return texts


def _normalize_spaces(text: str) -> str:
    return " ".join(text.split())


def _clean(texts: Iterable[str | None]) -> list[str]:
    # Corpora write <unk> for what was not understood. Spelt out it would be taught; left out of the vocabulary, the
    # utterances that have it are counted and dropped with the other unknown characters.
    return [_normalize_spaces((text or "").replace(PAD, "").replace(UNKNOWN, "")) for text in _checked(texts)]


def _alphabet(texts: list[str], reserved: str) -> list[str]:
    for text in texts:
        if reserved in text:
            raise ValueError(f"the character {reserved!r} marks words in this vocabulary; remove it from {text!r}")
    characters = set().union(*texts) - {" "}
    if not characters:
        raise ValueError("no transcript with a character in it: a vocabulary needs at least one")
    return sorted(characters)


def _processor(tokenizer, sampling_rate_hz: int, do_normalize: bool, return_attention_mask: bool) -> Wav2Vec2Processor:
    feature_extractor = Wav2Vec2FeatureExtractor(
        sampling_rate=sampling_rate_hz, do_normalize=do_normalize, return_attention_mask=return_attention_mask
    )
    return Wav2Vec2Processor(feature_extractor, tokenizer)


def _train_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, UNKNOWN], show_progress=False)
    return _train(_word_pieces(models.BPE(unk_token=UNKNOWN)), trainer, texts)


def _train_unigram(texts: list[str], vocab_size: int) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, UNKNOWN], unk_token=UNKNOWN, show_progress=False
    )
    trained = json.loads(_train(_word_pieces(models.Unigram()), trainer, texts).to_str())["model"]["vocab"]
    # Training sums in hash order: the last digits of the scores, and with them the ids, differ from run to run.
    pieces = sorted(((round(score, 6), piece) for piece, score in trained[2:]), key=lambda item: (-item[0], item[1]))
    vocabulary = [(PAD, 0.0), (UNKNOWN, 0.0), *((piece, score) for score, piece in pieces)]
    backend = _word_pieces(models.Unigram(vocabulary, unk_id=1))
    backend.add_special_tokens([PAD, UNKNOWN])
    return backend


def _word_pieces(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(WORD_START)
    tokenizer.decoder = decoders.Metaspace(WORD_START)
    return tokenizer


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer, texts: list[str]) -> Tokenizer:
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


_TRAINERS = {"bpe": _train_bpe, "unigram": _train_unigram}
