import itertools
import logging
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor, AutoTokenizer, ParakeetTokenizer, Wav2Vec2CTCTokenizer, WavLMConfig, WavLMForCTC
from transformers import pipeline as make_pipeline

from hf_dld.data.vocabulary import (
    build_character_processor,
    build_subword_processor,
    check_transcripts,
    decode_labels,
    encode_text,
    unknown_characters,
)

TEXTS = ["HELLO WORLD", "ALL'S WELL THAT ENDS WELL", "THE HILL", None, "", "HELLO HELLO THE WORLD"]
LETTERS = sorted(set("".join(filter(None, TEXTS))) - {" "})
PROCESSORS = {
    "characters": build_character_processor(TEXTS),
    "bpe": build_subword_processor(TEXTS, 24, "bpe"),
    "unigram": build_subword_processor(TEXTS, 18, "unigram"),
}


@pytest.fixture(params=PROCESSORS)
def processor(request):
    return PROCESSORS[request.param]


def with_blanks_and_repeats(labels: list[int], seed: int) -> list[int]:
    """A frame sequence that CTC collapses to the labels: repeats, a blank between equal neighbours, other blanks."""
    draw, frames = random.Random(seed), []
    for label in labels:
        needs_blank = frames and frames[-1] == label
        frames += [0] * draw.randint(1 if needs_blank else 0, 2) + [label] * draw.randint(1, 3)
    return frames + [0] * draw.randint(0, 2)


def test_the_blank_is_id_0_and_ids_have_no_gaps(processor):
    tokenizer = processor.tokenizer
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.unk_token_id) == ("<pad>", 0, 1)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.bos_token is None and tokenizer.eos_token is None


def test_characters_are_in_a_fixed_order_and_keep_their_case():
    vocabulary = build_character_processor(["ba AB", "é"]).tokenizer.get_vocab()
    assert sorted(vocabulary, key=vocabulary.get) == ["<pad>", "<unk>", "|", "A", "B", "a", "b", "é"]
    assert build_character_processor(["é", "AB ba"]).tokenizer.get_vocab() == vocabulary


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_the_same_transcripts_give_the_same_subwords(algorithm):
    texts = [" ".join(words) for words in itertools.permutations("ONE TWO THREE FOUR FIVE".split(), 3)]
    first, *others = (build_subword_processor(texts, 25, algorithm).tokenizer for _ in range(5))
    assert all(other.get_vocab() == first.get_vocab() for other in others)
    assert all(encode_text(other, "FIVE TWO") == encode_text(first, "FIVE TWO") for other in others)


def test_repeated_letters_across_a_blank(processor):
    tokenizer = processor.tokenizer
    letter = encode_text(tokenizer, "HELL")[-1]
    assert tokenizer.decode([letter, letter, 0, letter]).strip() == decode_labels(tokenizer, [letter, letter])
    characters = PROCESSORS["characters"].tokenizer
    h, e, l1, l2, o = encode_text(characters, "HELLO")
    assert characters.decode([h, h, 0, e, l1, l1, 0, l2, o, 0]) == "HELLO"
    assert characters.decode([h, e, l1, l2, o]) == "HELO"
    assert decode_labels(characters, [h, e, l1, l2, o]) == "HELLO"


texts_of_known_words = st.lists(st.text(LETTERS, min_size=1, max_size=6), max_size=5)


@settings(deadline=None)
@given(words=texts_of_known_words, space=st.sampled_from([" ", "  ", "\t", " \n"]), kind=st.sampled_from([*PROCESSORS]))
def test_labels_give_the_text_back(words, space, kind):
    tokenizer = PROCESSORS[kind].tokenizer
    labels = encode_text(tokenizer, space + space.join(words) + space)
    assert decode_labels(tokenizer, labels) == " ".join(words)
    assert decode_labels(tokenizer, np.array([*labels, -100, -100])) == " ".join(words)
    assert 0 not in labels and 1 not in labels


@settings(deadline=None)
@given(words=texts_of_known_words, seed=st.integers(0, 1000), kind=st.sampled_from([*PROCESSORS]))
def test_any_ctc_path_of_the_labels_decodes_to_the_text(words, seed, kind):
    tokenizer = PROCESSORS[kind].tokenizer
    frames = with_blanks_and_repeats(encode_text(tokenizer, " ".join(words)), seed)
    assert tokenizer.decode(frames) == " ".join(words)
    assert tokenizer.batch_decode(np.array([frames, frames])) == [" ".join(words)] * 2


@pytest.mark.parametrize("model_type", [None, "wavlm", "wav2vec2-conformer", "not-registered"])
def test_saved_and_loaded(processor, tmp_path, model_type):
    processor.save_pretrained(tmp_path)
    if model_type is not None:
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    frames = with_blanks_and_repeats(encode_text(processor.tokenizer, "HELLO ALL"), seed=0)
    loaded = [AutoProcessor.from_pretrained(tmp_path)]
    if model_type != "not-registered":
        loaded.append(AutoTokenizer.from_pretrained(tmp_path))
    for again in loaded:
        tokenizer = getattr(again, "tokenizer", again)
        assert type(tokenizer) is type(processor.tokenizer)
        assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert tokenizer.decode(frames) == "HELLO ALL"
        assert encode_text(tokenizer, "HELLO ALL") == encode_text(processor.tokenizer, "HELLO ALL")
    assert loaded[0].feature_extractor.to_dict() == processor.feature_extractor.to_dict()


def test_the_stock_pipeline_decodes_every_vocabulary(processor, tmp_path):
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (5, 8), "num_conv_pos_embeddings": 8}
    config = WavLMConfig(**tiny, **convolutions, num_conv_pos_embedding_groups=2, vocab_size=len(processor.tokenizer))
    model = WavLMForCTC(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=5.0)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    wave = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    with torch.no_grad():
        logits = model(**processor.feature_extractor(wave, sampling_rate=16_000, return_tensors="pt")).logits
    collapsed = [label for label, _ in itertools.groupby(logits[0].argmax(-1).tolist()) if label != 0]
    assert len(collapsed) > 3
    text = make_pipeline("automatic-speech-recognition", str(tmp_path))(wave)["text"]
    assert text == decode_labels(processor.tokenizer, collapsed)


def test_the_extractor_is_as_asked():
    processor = build_character_processor(["A"], sampling_rate_hz=8000, do_normalize=False, return_attention_mask=False)
    extractor = processor.feature_extractor
    assert (extractor.sampling_rate, extractor.do_normalize, extractor.return_attention_mask) == (8000, False, False)
    assert isinstance(processor.tokenizer, Wav2Vec2CTCTokenizer)
    subwords = build_subword_processor(["A"], 4, sampling_rate_hz=8000, do_normalize=False)
    extractor = subwords.feature_extractor
    assert (extractor.sampling_rate, extractor.do_normalize, extractor.return_attention_mask) == (8000, False, True)
    assert isinstance(subwords.tokenizer, ParakeetTokenizer)


def test_characters_outside_the_vocabulary(processor):
    tokenizer = processor.tokenizer
    assert unknown_characters(tokenizer, "HELLO") == []
    assert unknown_characters(tokenizer, "HÉLLO 9") == ["9", "É"]
    assert unknown_characters(tokenizer, None) == []
    texts = ["HELLO", "É 9", None, "HÉ É"]
    assert check_transcripts(tokenizer, texts) == {"9": (1, "É 9"), "É": (2, "É 9")}


@pytest.mark.parametrize("build", [build_character_processor, lambda texts: build_subword_processor(texts, 9)])
def test_special_tokens_in_transcripts_are_not_taught(build):
    tokenizer = build(["AB <unk> BA", "A <pad> B"]).tokenizer
    assert set("<>unkpad").isdisjoint(tokenizer.get_vocab())
    assert unknown_characters(tokenizer, "AB <unk>") != [] != unknown_characters(tokenizer, "AB <pad>")


def test_a_special_token_spelt_with_known_characters():
    tokenizer = build_character_processor(["< u n k p a d >"]).tokenizer
    assert unknown_characters(tokenizer, "<unk>") == ["<unk> or <pad> itself"]


@pytest.mark.parametrize("build", [build_character_processor, lambda texts: build_subword_processor(texts, 99)])
@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ([], "no transcript with a character in it"),
        ([None, "", "  "], "no transcript with a character in it"),
        (["<unk>"], "no transcript with a character in it"),
        ("HELLO", "texts must be a list of transcripts, not one string: 'HELLO'"),
    ],
)
def test_texts_without_a_vocabulary(build, texts, problem):
    with pytest.raises(ValueError, match=problem):
        build(texts)


def test_reserved_characters():
    with pytest.raises(ValueError, match=r"the character '\|' marks words in this vocabulary; remove it from 'A\|B'"):
        build_character_processor(["A|B"])
    with pytest.raises(ValueError, match="the character '▁' marks words in this vocabulary; remove it from 'A▁B'"):
        build_subword_processor(["A▁B"], 50)
    assert "|" in build_subword_processor(["A|B"], 8).tokenizer.get_vocab()


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_a_vocabulary_smaller_than_the_alphabet(algorithm):
    with pytest.raises(ValueError, match="vocab_size=5 is too small: .* need at least 6"):
        build_subword_processor(["ABC CBA"], 5, algorithm)
    assert len(build_subword_processor(["ABC CBA"], 6, algorithm).tokenizer) == 6


def test_an_unknown_algorithm():
    with pytest.raises(ValueError, match="algorithm='wordpiece' must be one of 'bpe', 'unigram'"):
        build_subword_processor(["A"], 10, "wordpiece")


def test_fewer_subwords_than_asked_for_are_logged(caplog):
    with caplog.at_level(logging.WARNING):
        processor = build_subword_processor(["AB AB"], 100)
    assert f"gave only {len(processor.tokenizer)} of the 100 bpe tokens asked for" in caplog.text


@pytest.mark.data
def test_real_transcripts(real_speech):
    from hf_dld.data.datasets import load_speech_dataset

    folder = real_speech("mini_librispeech")
    train, test = (load_speech_dataset(folder, split=split)["text"][:] for split in ("train", "test"))
    processors = [
        build_character_processor(train),
        *(build_subword_processor(train, 200, a) for a in ("bpe", "unigram")),
    ]
    assert [len(processor.tokenizer) for processor in processors] == [30, 200, 200]
    for processor in processors:
        assert check_transcripts(processor.tokenizer, test) == {}
        labels = [encode_text(processor.tokenizer, text) for text in test]
        assert [decode_labels(processor.tokenizer, row) for row in labels] == test
