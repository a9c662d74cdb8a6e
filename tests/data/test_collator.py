import numpy as np
import pytest
import torch
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from hf_dld.data.audio import AudioError, decode_audio
from hf_dld.data.collator import DataCollatorCoLLD, DataCollatorCTC, pad_labels
from hf_dld.data.vocabulary import build_character_processor

TEXTS = ["HELLO", "WORLD"]


@pytest.fixture
def examples(write_audio):
    return [
        {"audio": {"path": str(write_audio("a.wav", 0.5)), "bytes": None}, "labels": [3, 4, 5]},
        {"audio": {"path": str(write_audio("b.wav", 0.3, 44_100, channels=2)), "bytes": None}, "labels": [5]},
        {"audio": {"path": "c.wav", "bytes": write_audio("c.wav", 0.4).read_bytes()}, "labels": None},
    ]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_a_batch(examples, mask, do_normalize):
    processor = build_character_processor(TEXTS, return_attention_mask=mask, do_normalize=do_normalize)
    batch = DataCollatorCTC(processor)(examples)
    assert set(batch) == {"input_values", "input_lengths", "labels"} | ({"attention_mask"} if mask else set())
    assert batch["input_values"].shape == (3, 8000) and batch["input_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [[3, 4, 5], [5, -100, -100], [-100, -100, -100]]
    if mask:
        assert batch["attention_mask"].sum(-1).tolist() == [8000, 4800, 6400]
    for row, example, length in zip(batch["input_values"], examples, [8000, 4800, 6400], strict=True):
        wave = decode_audio(example["audio"], 16_000)
        expected = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7) if do_normalize else wave
        np.testing.assert_allclose(row[:length], expected, atol=1e-5)
        assert not row[length:].any()


@pytest.mark.parametrize("mask", [True, False])
def test_neighbours_never_change_an_utterance(examples, mask):
    collate = DataCollatorCTC(build_character_processor(TEXTS, return_attention_mask=mask))
    together, backwards = collate(examples), collate(examples[::-1])
    for name, values in together.items():
        assert torch.equal(values, collate(examples)[name])
        assert torch.equal(values, backwards[name].flip(0))
    alone = collate(examples[1:2])["input_values"]
    assert torch.equal(together["input_values"][1:2, : alone.shape[1]], alone)


def test_pad_to_multiple_of(examples):
    batch = DataCollatorCTC(build_character_processor(TEXTS), pad_to_multiple_of=3000)(examples)
    assert batch["input_values"].shape == batch["attention_mask"].shape == (3, 9000)


def test_a_batch_without_any_transcript(examples):
    batch = DataCollatorCTC(build_character_processor(TEXTS))([{**example, "labels": []} for example in examples])
    assert batch["labels"].tolist() == [[-100], [-100], [-100]]


def test_an_extractor_of_filterbanks(examples):
    tokenizer = build_character_processor(TEXTS).tokenizer
    extractor = SeamlessM4TFeatureExtractor()
    batch = DataCollatorCTC(Wav2Vec2Processor(extractor, tokenizer))(examples)
    assert set(batch) == {"input_features", "attention_mask", "input_lengths", "labels"}
    waves = [decode_audio(example["audio"], 16_000) for example in examples]
    expected = extractor(waves, sampling_rate=16_000, padding=True, return_tensors="pt")
    for name in ("input_features", "attention_mask"):
        assert torch.equal(batch[name], expected[name])


def test_a_file_that_went_missing_is_named(examples):
    examples[0]["audio"] = {"path": "gone.wav", "bytes": None}
    with pytest.raises(AudioError, match="gone.wav: no such file"):
        DataCollatorCTC(build_character_processor(TEXTS))(examples)


@pytest.mark.parametrize("form", [np.array, torch.tensor, tuple])
def test_labels_in_any_form(form):
    batch = pad_labels([form([3, 4]), form([0]), None, []])
    assert batch.tolist() == [[3, 4], [0, -100], [-100, -100], [-100, -100]]


def test_examples_without_labels_are_not_taken_for_untranscribed(examples):
    with pytest.raises(KeyError, match="labels"):
        DataCollatorCTC(build_character_processor(TEXTS))([{"audio": examples[0]["audio"]}])


class TestCoLLD:
    WAVES = [np.random.default_rng(0).standard_normal(length).astype(np.float32) for length in (16_000, 9_000, 12_345)]

    def examples(self):
        return [{"audio": wave} for wave in self.WAVES]

    def test_one_extractor_makes_one_set_of_features(self):
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
        for teacher in (None, Wav2Vec2FeatureExtractor(return_attention_mask=True)):
            batch = DataCollatorCoLLD(extractor, teacher)(self.examples())
            assert batch.keys() == {"input_values", "attention_mask", "input_lengths", "utterance_ids"}
            assert batch["input_lengths"].tolist() == [16_000, 9_000, 12_345]

    def test_two_extractors_make_two(self):
        collator = DataCollatorCoLLD(Wav2Vec2FeatureExtractor(), SeamlessM4TFeatureExtractor())
        batch = collator(self.examples())
        assert batch["input_values"].shape == (3, 16_000) and batch["teacher_input_features"].shape == (3, 49, 160)
        assert batch["teacher_attention_mask"].sum(1).tolist() == batch["teacher_input_lengths"].tolist()
        # 9000 samples are 54 log-mel frames, 12345 are 75: the half-filled last pair is no frame
        assert batch["teacher_input_lengths"].tolist() == [49, 27, 37]

    def test_an_utterance_has_the_same_features_and_id_in_any_batch(self):
        collator = DataCollatorCoLLD(Wav2Vec2FeatureExtractor(), SeamlessM4TFeatureExtractor())
        together = collator(self.examples())
        for index, example in enumerate(self.examples()):
            alone = collator([example])
            assert alone["utterance_ids"][0] == together["utterance_ids"][index]
            length = alone["teacher_input_lengths"][0]
            assert torch.equal(alone["teacher_input_features"][0], together["teacher_input_features"][index, :length])
        assert len(set(together["utterance_ids"].tolist())) == 3

    def test_each_hears_its_own_rate(self):
        collator = DataCollatorCoLLD(Wav2Vec2FeatureExtractor(sampling_rate=8_000), Wav2Vec2FeatureExtractor())
        batch = collator([{"audio": {"array": self.WAVES[0], "sampling_rate": 16_000}}])
        assert batch["input_lengths"].tolist() == [8_000] and batch["teacher_input_lengths"].tolist() == [16_000]
