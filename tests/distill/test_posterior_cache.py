"""The cached teacher: nothing stale, nothing lost, and the training that a live teacher would have given."""

import gc
import pickle
import weakref
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import make_dynamic, make_stock
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import TrainerCallback

from hf_dld import DataCollatorCTC, DLDTrainer, lora_config
from hf_dld.data.audio import audio_key
from hf_dld.distill.losses import truncate_posteriors
from hf_dld.distill.posterior_cache import (
    CachedTeacherCollator,
    PosteriorCache,
    fill_posterior_cache,
    teacher_fingerprint,
)

from .test_trainer import NO_DROPOUT, arguments, assert_same, make_trainer, weights


@pytest.fixture(scope="module")
def teacher():
    return make_stock("wavlm-stable", **NO_DROPOUT)


def fill(cache, examples, processor, teacher, top=4, **kwargs):
    options = {"top": top, "progress_bar": False, **kwargs}
    return fill_posterior_cache(
        cache, examples, processor, teacher, teacher._get_feat_extract_output_lengths, **options
    )


def shards(cache):
    return sorted(cache.folder.iterdir())


def test_the_posteriors_of_each_utterance_alone(tmp_path, processor, dataset, teacher):
    cache = PosteriorCache(tmp_path)
    assert fill(cache, dataset, processor, teacher, temperature=2.0) == 12
    for example in dataset:
        batch = DataCollatorCTC(processor)([example])
        logits = teacher(batch["input_values"], batch["attention_mask"]).logits[0]
        expected, tokens = truncate_posteriors(logits, 4, temperature=2.0)
        log_probs, stored = cache[audio_key(example["audio"])]
        assert log_probs.dtype == torch.float16 and stored.dtype == torch.int16
        assert log_probs.shape == (len(logits), 5) and stored.shape == (len(logits), 4)
        assert torch.equal(stored.long(), tokens)
        torch.testing.assert_close(log_probs.float(), expected, rtol=1e-3, atol=1e-4)


def test_batches_give_the_posteriors_of_each_utterance_alone(tmp_path, processor, dataset, teacher):
    shapes = []

    def counted(**inputs):
        shapes.append(inputs["input_values"].shape[0])
        return teacher(**inputs)

    counted._get_feat_extract_output_lengths = teacher._get_feat_extract_output_lengths
    alone, batched = PosteriorCache(tmp_path / "alone"), PosteriorCache(tmp_path / "batched")
    fill(alone, dataset, processor, teacher)
    assert fill(batched, [*dataset, dataset[3]], processor, counted, batch_size=5) == 12
    assert shapes == [5, 5, 2], "an utterance that occurs twice is computed once"
    for example in dataset:
        key = audio_key(example["audio"])
        for expected, found in zip(alone[key], batched[key], strict=True):
            torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("table", [True, False], ids=["table", "list"])
@pytest.mark.parametrize(
    ("variant", "calls"), [("wavlm-stable", 3), ("wavlm", 12), ("conformer-relative", 5), ("conformer-rotary", 12)]
)
def test_no_teacher_hears_the_padding_of_a_batch(tmp_path, processor, variant, calls, table):
    """Of 12 utterances of 5 lengths in frames, and each of another one in samples, up to 4 are run together."""
    noise = np.random.default_rng(1).standard_normal(6000).astype(np.float32)
    lengths = [4040 + 320 * (index % 5) + 20 * (index // 5) for index in range(12)]
    examples = [{"audio": noise[-length:], "labels": [3, 4], "input_length": length} for length in lengths]
    if table:
        examples = datasets.Dataset.from_list(examples).with_format("numpy", columns=["audio"], output_all_columns=True)
    trainer = make_trainer(tmp_path, processor, examples, variant, teacher_cache_dir=str(tmp_path / "cache"))
    frames = trainer.model._get_feat_extract_output_lengths(torch.tensor(lengths))
    assert len(set(lengths)) == 12 and len(frames.unique()) == 5
    teacher, seen = trainer.teacher, []
    alone = PosteriorCache(tmp_path / "alone")
    fill(alone, examples, processor, teacher, top=8)
    teacher.register_forward_pre_hook(lambda *_: seen.append(1))
    cache = trainer.cache_teacher()
    assert len(seen) == calls
    for example in examples:
        key = audio_key(example["audio"])
        for expected, found in zip(alone[key], cache[key], strict=True):
            torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-3)


def test_an_interrupted_filling_goes_on(tmp_path, processor, dataset, teacher):
    calls = []

    def dies_at_the_fifth(**inputs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return teacher(**inputs)

    dies_at_the_fifth._get_feat_extract_output_lengths = teacher._get_feat_extract_output_lengths
    with pytest.raises(KeyboardInterrupt):
        fill(PosteriorCache(tmp_path), dataset, processor, dies_at_the_fifth, shard_s=0)
    cache = PosteriorCache(tmp_path)
    assert len(cache.shards) == len(shards(cache)) == 4
    assert fill(cache, dataset, processor, teacher) == 8
    assert fill(cache, dataset, processor, teacher) == 0
    assert len(cache.shards) == 12 and len(shards(cache)) == 5


def test_processes_share_the_work(tmp_path, processor, dataset, teacher):
    """Each with its own view of the folder, as processes have; an utterance that occurs twice is computed once."""
    caches = [PosteriorCache(tmp_path) for _ in range(3)]
    done = [
        fill(cache, [*dataset, dataset[0]], processor, teacher, rank=rank, num_processes=3)
        for rank, cache in enumerate(caches)
    ]
    assert done == [4, 4, 4]
    assert not list(tmp_path.glob("*.tmp*"))
    assert len(PosteriorCache(tmp_path).shards) == 12


def test_the_key_is_the_content(tmp_path):
    samples = np.sin(np.arange(4000) * 0.1).astype(np.float32)
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, samples, 16_000)
    soundfile.write(tmp_path / "c.wav", samples * 0.5, 16_000)
    first, second, other = (tmp_path / name for name in ("a.wav", "b.wav", "c.wav"))
    same = [first, str(second), {"path": str(first), "bytes": None}, {"path": None, "bytes": second.read_bytes()}]
    assert len({audio_key(audio) for audio in same}) == 1
    rates = [{"array": samples, "sampling_rate": rate} for rate in (8_000, 16_000)]
    assert len({audio_key(audio) for audio in (first, other, samples, samples[:-1], samples * 0.5, *rates)}) == 7
    with pytest.raises(ValueError, match="gone.wav: no such file"):
        audio_key(tmp_path / "gone.wav")


def test_the_fingerprint_changes_with_what_changes_the_posteriors(processor, teacher):
    settings = {"top": 4, "temperature": 1.0}
    before = teacher_fingerprint(teacher, processor, **settings)
    again = make_stock("wavlm-stable", **NO_DROPOUT)
    again.config._name_or_path = "moved/elsewhere"
    assert teacher_fingerprint(again, processor, **settings) == before
    seen = {before, teacher_fingerprint(teacher, processor, top=4, temperature=2.0)}
    with torch.no_grad():
        again.lm_head.bias[3] += 1e-6
    seen.add(teacher_fingerprint(again, processor, **settings))
    seen.add(teacher_fingerprint(make_stock("wavlm-stable", layer_norm_eps=1e-4, **NO_DROPOUT), processor, **settings))
    extractor = type(processor.feature_extractor)(do_normalize=False, return_attention_mask=True)
    seen.add(teacher_fingerprint(teacher, SimpleNamespace(feature_extractor=extractor), **settings))
    assert len(seen) == 5


def test_the_fingerprint_changes_with_the_adapters_that_are_on(processor):
    model = get_peft_model(make_dynamic("wavlm-stable"), lora_config(make_dynamic("wavlm-stable"), r=2))
    on = teacher_fingerprint(model, processor)
    with model.disable_adapter():
        assert teacher_fingerprint(model, processor) != on
    assert teacher_fingerprint(model, processor) == on


def test_posteriors_that_are_no_numbers_are_not_kept(tmp_path, processor, dataset, teacher):
    calls = []

    def breaks_at_the_third(**inputs):
        calls.append(1)
        output = teacher(**inputs)
        output.logits[0, 1] = float("nan") if len(calls) == 3 else output.logits[0, 1]
        return output

    breaks_at_the_third._get_feat_extract_output_lengths = teacher._get_feat_extract_output_lengths
    with pytest.raises(ValueError, match=r"posteriors of an utterance of .* frames .key .* are not numbers; .*float32"):
        fill(PosteriorCache(tmp_path), dataset, processor, breaks_at_the_third, shard_s=0)
    assert len(calls) == 3 and len(PosteriorCache(tmp_path).shards) == 2


@pytest.mark.parametrize(("direction", "sampling"), [("forward", "selection"), ("reverse", "sandwich")])
def test_a_complete_cache_trains_as_the_live_teacher(tmp_path, processor, dataset, direction, sampling):
    """Shuffled, with dropout and SpecAugment, which the filling must not disturb; all tokens in float32."""
    noisy = {"hidden_dropout": 0.1, "mask_time_prob": 0.2, "mask_time_length": 2}
    options = {"kl_direction": direction, "kl_temperature": 1.5, "depth_sampling": sampling}
    cached = {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_cache_top": 12, "teacher_cache_dtype": "float32"}
    trainers, trained = [], []
    for name, cache in (("live", {}), ("cached", cached)):
        model = make_dynamic("wavlm-stable", **{**NO_DROPOUT, **noisy})
        trainers.append(make_trainer(tmp_path / name, processor, dataset, model=model, **options, **cache))
        trainers[-1].train()
        # a bias of the keys adds the same to all scores of a frame: its gradient is rounding, which Adam makes large
        trained.append({name: tensor for name, tensor in weights(trainers[-1]).items() if "k_proj.bias" not in name})
    assert_same(*trained, atol=2e-5, rtol=1e-4)
    losses = [[log["kl_loss"] for log in trainer.state.log_history if "kl_loss" in log] for trainer in trainers]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_truncated_cache_bounds_the_loss_from_below(tmp_path, processor, dataset):
    losses = []
    for top in (1, 4, 12):
        cache = {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_cache_top": top}
        trainer = make_trainer(tmp_path / str(top), processor, dataset, max_steps=1, logging_steps=1, **cache)
        trainer.train()
        losses.append(trainer.state.log_history[0]["kl_loss"])
    live = make_trainer(tmp_path / "live", processor, dataset, max_steps=1)
    live.train()
    assert losses[0] < losses[1] < losses[2] == pytest.approx(live.state.log_history[0]["kl_loss"], rel=1e-3)


def test_a_resumed_run_with_a_cache_ends_with_equal_weights(tmp_path, processor, dataset):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    def run(folder, resume=None, *callbacks):
        options = {"teacher_cache_dir": str(tmp_path / "cache"), "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(tmp_path / folder, processor, dataset, max_steps=4, **options)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run("straight")
    run("stopped", None, Stop())
    assert_same(weights(straight), weights(run("stopped", True)))


def test_the_teacher_is_let_go(tmp_path, processor, dataset):
    trainer = make_trainer(tmp_path, processor, dataset, max_steps=1, teacher_cache_dir=str(tmp_path / "cache"))
    teacher = weakref.ref(trainer.teacher)
    trainer.train()
    gc.collect()
    assert trainer.teacher is None and teacher() is None
    trainer.train()  # again, from the cache
    assert trainer.evaluate()["eval_loss"] > 0


def test_worker_processes_groups_by_length_and_untranscribed_speech(tmp_path, processor, dataset):
    table = datasets.Dataset.from_list(
        [
            {"audio": {"array": example["audio"].tolist(), "sampling_rate": 16_000}, "labels": [], "input_length": n}
            for n, example in ((len(example["audio"]), example) for example in dataset[:6])
        ]
    )
    trainer = make_trainer(
        tmp_path,
        processor,
        dataset,
        teacher_cache_dir=str(tmp_path / "cache"),
        dataloader_num_workers=2,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=2,
    )
    trainer.train_dataset = table
    trainer.train()
    assert all(log["ctc_loss"] == 0 and log["kl_loss"] > 0 for log in trainer.state.log_history if "ctc_loss" in log)


def test_a_batch_holds_padded_posteriors(tmp_path, processor, dataset, teacher):
    cache = PosteriorCache(tmp_path)
    fill(cache, dataset, processor, teacher)
    collator = pickle.loads(pickle.dumps(CachedTeacherCollator(DataCollatorCTC(processor), cache)))
    batch = collator(dataset[:3])
    frames = teacher._get_feat_extract_output_lengths(batch["input_lengths"])
    assert batch["teacher_log_probs"].shape == (3, frames.max(), 5)
    assert batch["teacher_tokens"].shape == (3, frames.max(), 4)
    assert not batch["teacher_log_probs"][0, frames[0] :].any()


def test_extra_padding_is_no_frame_of_the_teacher(tmp_path, processor, dataset):
    trainer = make_trainer(tmp_path, processor, dataset, max_steps=2, teacher_cache_dir=str(tmp_path / "cache"))
    trainer.data_collator = DataCollatorCTC(processor, pad_to_multiple_of=16_000)
    trainer.train()
    assert all(np.isfinite(log["kl_loss"]) for log in trainer.state.log_history if "kl_loss" in log)


class TestBadInput:
    def test_changed_audio(self, tmp_path, processor, dataset, teacher):
        cache = PosteriorCache(tmp_path)
        fill(cache, dataset, processor, teacher)
        changed = {**dataset[0], "audio": dataset[0]["audio"] * 0.9}
        with pytest.raises(ValueError, match="audio in memory: no teacher posteriors in .*the audio has changed since"):
            CachedTeacherCollator(DataCollatorCTC(processor), cache)([changed])

    def test_a_broken_shard(self, tmp_path, processor, dataset, teacher):
        cache = PosteriorCache(tmp_path)
        fill(cache, dataset, processor, teacher)
        [shard] = shards(cache)
        shard.write_bytes(shard.read_bytes()[:100])
        with pytest.raises(ValueError, match=f"{shard} is not a whole file of teacher posteriors .*: remove it and"):
            PosteriorCache(tmp_path)

    @pytest.mark.parametrize(
        "tensors",
        [
            {"key.tokens": torch.ones(5, 2)},
            {"key.log_probs": torch.zeros(5, 4), "key.tokens": torch.ones(5, 2, dtype=torch.int16)},
            {"key.log_probs": torch.zeros(5, 3), "key.tokens": -torch.ones(5, 2, dtype=torch.int16)},
            {"key.log_probs": torch.full((5, 3), torch.nan), "key.tokens": torch.ones(5, 2, dtype=torch.int16)},
        ],
    )
    def test_a_shard_of_something_else(self, tmp_path, tensors):
        save_file(tensors, tmp_path / "shard.safetensors")
        with pytest.raises(ValueError, match="shard.safetensors is not a whole file of teacher posteriors .*key"):
            PosteriorCache(tmp_path)["key"]

    def test_no_room(self, tmp_path, processor, dataset, teacher):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="Could not write teacher posteriors to .*file/cache: .*start again"):
            fill(PosteriorCache(tmp_path / "file" / "cache"), dataset, processor, teacher)

    @pytest.mark.parametrize("teacher", ["self", None])
    def test_no_teacher_to_cache(self, tmp_path, processor, dataset, teacher):
        options = {"teacher_cache_dir": str(tmp_path / "cache"), "kl_weight": 0.0}
        with pytest.raises(ValueError, match=f"keeps the posteriors of a frozen teacher.*teacher={teacher!r}"):
            make_trainer(tmp_path, processor, dataset, teacher=teacher, **options)

    def test_a_streamed_training_set(self, tmp_path, processor, dataset):
        streamed = datasets.IterableDataset.from_generator(lambda: iter(dataset))
        with pytest.raises(ValueError, match="this one is streamed .IterableDataset.*without streaming"):
            DLDTrainer(
                model=make_dynamic("wavlm-stable"),
                teacher=make_stock("wavlm-stable"),
                args=arguments(tmp_path, teacher_cache_dir=str(tmp_path / "cache")),
                train_dataset=streamed,
            )

    def test_an_unknown_feature_extractor(self, tmp_path, dataset, teacher):
        trainer = DLDTrainer(
            model=make_dynamic("wavlm-stable"),
            teacher=teacher,
            args=arguments(tmp_path, teacher_cache_dir=str(tmp_path / "cache")),
            train_dataset=dataset,
            data_collator=lambda examples: examples,
        )
        with pytest.raises(ValueError, match="needs to know the feature extractor"):
            trainer.train()

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"teacher_cache_top": 0}, "teacher_cache_top must be at least 1.*; got 0"),
            ({"teacher_cache_dtype": "int8"}, "teacher_cache_dtype must be one of .*; got 'int8'"),
        ],
    )
    def test_impossible_options(self, tmp_path, option, message):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **option)
