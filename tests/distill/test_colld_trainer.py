"""CoLLDTrainer on tiny real models: what counts, for every pair, and that splitting or stopping changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, make_stock, randomize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel, TrainerCallback, Wav2Vec2FeatureExtractor

from hf_dld import CoLLDTrainer, CoLLDTrainingArguments, DataCollatorCoLLD, DLDWavLMModel, make_student
from hf_dld.distill.colld_trainer import num_encoder_frames, split_inputs
from hf_dld.distill.layer_features import collect_features
from hf_dld.distill.losses import info_nce_loss

from .conftest import DYNAMIC, KINDS, OPTIONS, TRAINING, make_encoder, make_extractor


@pytest.fixture(scope="module")
def dataset():
    """Twelve utterances of noise, 0.4 to 0.95 s, without transcripts."""
    generator = np.random.default_rng(0)
    lengths = [6400 + 800 * index for index in range(12)]
    noise = [generator.standard_normal(length).astype(np.float32) for length in lengths]
    return [{"audio": wave, "input_length": len(wave)} for wave in noise]


def make_trainer(tmp_path, dataset, teacher="wavlm", student=None, collator=None, **kwargs):
    teacher = make_encoder(teacher, seed=1) if isinstance(teacher, str) else teacher
    student = student or randomize(make_student(teacher, 2))
    options = {"output_dir": str(tmp_path / "run"), **TRAINING, "mask_time_length": 4, "num_negatives": 5}
    return CoLLDTrainer(
        model=student,
        teacher=teacher,
        args=CoLLDTrainingArguments(**{**options, **kwargs}),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=collator or DataCollatorCoLLD(make_extractor("wavlm")),
        processing_class=(collator or DataCollatorCoLLD(make_extractor("wavlm"))).feature_extractor,
    )


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first, second, atol=0.0, rtol=0.0):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def step_loss(trainer, batch):
    trainer.model.train()
    return trainer.compute_loss(
        trainer.model, dict(batch), num_items_in_batch=torch.tensor(len(batch["input_lengths"]))
    )


@pytest.mark.parametrize("teacher_kind", KINDS)
@pytest.mark.parametrize("student_kind", KINDS)
def test_every_pair(tmp_path, dataset, teacher_kind, student_kind):
    teacher = make_encoder(teacher_kind, seed=1, num_hidden_layers=6)
    student = make_encoder(student_kind)
    collator = DataCollatorCoLLD(make_extractor(student_kind), make_extractor(teacher_kind))
    trainer = make_trainer(tmp_path, dataset, teacher, student, collator, depth_sampling="sandwich")
    loss = step_loss(trainer, collator(dataset[:3]))
    loss.backward()
    assert 0 < loss.item() < 10
    assert trainer.layer_map == {0: 1, 1: 2, 2: 3, 3: 5}  # 1.5 and 4.5 round to even
    assert all(p.grad is None and not p.requires_grad for p in trainer.teacher.parameters())
    assert student.masked_spec_embed.grad.any()
    for head in trainer.model.heads.values():
        assert head.weight.grad.any() and head.weight.shape == (16, 16)
    first = "feature_projection.projection.weight"
    assert dict(student.named_parameters())[first].grad.any()


@pytest.mark.parametrize("half", ["teacher", "student"])
def test_a_checkpoint_in_half_precision(tmp_path, dataset, half):
    """It loads as such, and features come in float32."""
    models = {"teacher": make_encoder("wavlm", seed=1), "student": make_encoder("dld_conformer")}
    collator = DataCollatorCoLLD(make_extractor("wavlm"))
    whole = make_trainer(tmp_path, dataset, models["teacher"], models["student"], collator)
    expected = step_loss(whole, collator(dataset[:3])).item()
    models[half] = models[half].to(torch.bfloat16)
    trainer = make_trainer(tmp_path, dataset, models["teacher"], models["student"], collator, max_steps=1)
    trainer.model.heads.load_state_dict(whole.model.heads.state_dict())
    assert step_loss(trainer, collator(dataset[:3])).item() == pytest.approx(expected, rel=0.05)
    trainer.train()
    assert trainer.student.dtype == models["student"].dtype, "as it was given"


def test_one_step_is_the_documented_loss(tmp_path, dataset):
    trainer = make_trainer(
        tmp_path, dataset, num_distilled_layers=1, distill_target="hidden", contrastive_temperature=0.3
    )
    batch = trainer.data_collator(dataset[3:7])
    loss = step_loss(trainer, batch)
    masked = trainer.draw_masked_frames(batch)
    inputs, _ = split_inputs(batch)
    with collect_features(trainer.teacher, [3]) as targets:
        trainer.teacher(**inputs)
    with collect_features(trainer.student, [1]) as features:
        trainer.student(**inputs, mask_time_indices=masked.time_mask)
    expected = 0.0
    for row in range(4):
        frames = masked.time_mask[row]
        z = trainer.model.heads["1"](features[1][row, frames])
        candidates = masked.candidates[row, : len(z), : len(z)]
        terms = info_nce_loss(z[None], targets[3][row, frames][None], candidates[None], torch.tensor([len(z)]), 0.3)
        expected += terms[0] / 4
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("objective", ["info_nce", "l1_cosine"])
@pytest.mark.parametrize("target", ["ffn", "hidden"])
def test_it_learns(tmp_path, dataset, objective, target):
    trainer = make_trainer(
        tmp_path, dataset, objective=objective, distill_target=target, max_steps=12, learning_rate=5e-3
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    log = trainer.state.log_history[-2]
    assert {"loss", "loss_layer_0", "loss_layer_1"} <= log.keys() or "loss_layer_0" in trainer.state.log_history[0]
    first = trainer.state.log_history[1]
    assert first["loss"] == pytest.approx((first["loss_layer_0"] + first["loss_layer_1"]) / 2, rel=1e-3)


def test_batch_1_with_4_steps_equals_batch_4(tmp_path, dataset):
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = make_trainer(
            tmp_path,
            dataset,
            teacher=make_encoder("wavlm", seed=1),  # layer norms and a mask: outputs do not depend on padding
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.01,
        )
        torch.manual_seed(0)
        randomize(trainer.model.heads)
        trainer.train()
        results.append((weights(trainer), [log["loss"] for log in trainer.state.log_history if "loss" in log]))
    for state, losses in results[1:]:
        assert_same(results[0][0], state, atol=2e-5, rtol=1e-4)
        assert losses == pytest.approx(results[0][1], rel=1e-4)


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(padding=st.integers(0, 4000), rows=st.lists(st.integers(0, 11), min_size=1, max_size=3), noise=st.booleans())
def test_padding_never_changes_the_loss(tmp_path, dataset, padding, rows, noise):
    trainer = make_trainer(tmp_path, dataset)
    trainer.model.eval()
    batch = trainer.data_collator([dataset[row] for row in rows])
    expected = trainer.compute_loss(trainer.model, dict(batch))
    more = dict(batch)
    extra = torch.randn(len(rows), padding) * noise
    more["input_values"] = torch.cat([batch["input_values"], extra], 1)
    more["attention_mask"] = torch.cat([batch["attention_mask"], torch.zeros(len(rows), padding, dtype=torch.int)], 1)
    # a frame whose window reaches into the padding sees it in any convolutional encoder: noise there may change it
    tolerance = 0.2 if noise else 1e-4
    torch.testing.assert_close(trainer.compute_loss(trainer.model, more), expected, rtol=tolerance, atol=1e-4)


def test_unmasked_frames_are_no_targets_and_predict_nothing(tmp_path, dataset):
    """Noise in the features of unmasked and padded frames, of both models, leaves the loss as it is."""
    trainer = make_trainer(tmp_path, dataset)
    trainer.model.eval()
    batch = trainer.data_collator(dataset[:3])
    mask = trainer.draw_masked_frames(batch).time_mask.unsqueeze(-1)
    expected = trainer.compute_loss(trainer.model, dict(batch))
    gather = type(trainer.draw_masked_frames(batch)).gather

    def disturbed(self, features):
        return gather(self, torch.where(mask, features, torch.full_like(features, torch.nan)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.draw_masked_frames(batch)), "gather", disturbed)
        assert torch.equal(trainer.compute_loss(trainer.model, dict(batch)), expected)


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_resumed_run_ends_with_equal_weights(tmp_path, dataset, stop, dynamic):
    """With dropout, LayerDrop and shuffled batches: five steps are nearly two epochs."""
    noisy = {"hidden_dropout": 0.1, "layerdrop": 0.3}

    def run(folder, resume=None, stop_at=None):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop = state.global_step == stop_at

        student = make_encoder("dld_wavlm" if dynamic else "wav2vec2", **noisy)
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path / folder, dataset, student=student, max_steps=5, save_steps=1, save_strategy="steps"
        )
        if stop_at:
            trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run("straight")
    run("stopped", stop_at=stop)
    resumed = run("stopped", resume=True)
    assert resumed.state.global_step == 5
    assert_same(weights(straight), weights(resumed))
    assert straight.evaluate()["eval_loss"] == resumed.evaluate()["eval_loss"]


def test_masks_differ_between_steps_and_not_between_evaluations(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset)
    batch = trainer.data_collator(dataset[:4])
    masks = []
    for training, step in ((True, 0), (True, 1), (False, 0), (False, 1)):
        trainer.model.train(training)
        trainer.state.global_step = step
        masks.append(trainer.draw_masked_frames(batch).time_mask)
    assert not torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_the_teacher_hears_everything_and_the_student_does_not(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset)
    calls = {}
    for name, model in (("teacher", trainer.teacher), ("student", trainer.student)):
        model.register_forward_pre_hook(lambda m, args, kwargs, n=name: calls.update({n: kwargs}), with_kwargs=True)
    step_loss(trainer, trainer.data_collator(dataset[:2]))
    assert "mask_time_indices" not in calls["teacher"] and calls["student"]["mask_time_indices"].any()
    assert not trainer.teacher.training


@pytest.mark.parametrize("kind", DYNAMIC)
def test_a_dynamic_student_with_dropped_layers(tmp_path, dataset, kind):
    student = make_encoder(kind)
    trainer = make_trainer(tmp_path, dataset, student=student, depth_sampling="uniform", max_steps=6)
    trainer.train()
    for step, log in enumerate(trainer.state.log_history[:6]):
        [drawn] = trainer.args.draw_layers(student.config, step)
        logged = {int(name.rpartition("_")[2]) for name in log if name.startswith("loss_layer_")}
        assert logged == set(drawn)
        assert log["loss"] == pytest.approx(np.mean([log[f"loss_layer_{index}"] for index in drawn]), rel=1e-3)


def test_a_step_in_which_no_predicting_layer_ran(tmp_path, dataset):
    student = make_encoder("dld_wavlm")
    trainer = make_trainer(tmp_path, dataset, student=student, num_distilled_layers=1, depth_sampling="uniform")
    steps = range(99)
    trainer.state.global_step = next(s for s in steps if 3 not in trainer.args.draw_layers(student.config, s)[0])
    loss = step_loss(trainer, trainer.data_collator(dataset[:2]))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_too_short_to_be_masked(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset, mask_time_length=40)
    loss = step_loss(trainer, trainer.data_collator(dataset[:2]))
    loss.backward()
    assert loss.item() == 0


def test_heads_are_in_checkpoints_and_never_in_the_saved_student(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded, loading = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(loading.values()) and type(loaded) is type(trainer.student)
    assert_same(trainer.student.state_dict(), loaded.state_dict())
    assert Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "saved").sampling_rate == 16_000
    assert (tmp_path / "run" / "checkpoint-4" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "checkpoint-4" / "config.json").exists(), "no one takes it for a model"


def test_a_card_of_the_student(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset)
    trainer.train()
    trainer.create_model_card(model_name="mine")
    assert "# mine" in (Path(trainer.args.output_dir) / "README.md").read_text()
    assert trainer.model is not trainer.student


def test_best_checkpoint(tmp_path, dataset):
    trainer = make_trainer(
        tmp_path, dataset, eval_strategy="steps", eval_steps=1, save_strategy="best",
        metric_for_best_model="loss", load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


def test_activation_checkpointing_trains_the_same(tmp_path, dataset):
    states = []
    for checkpointing in (False, True):
        student = make_encoder("conformer")
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, dataset, student=student, activation_checkpointing=checkpointing)
        trainer.train()
        states.append(
            {name: t for name, t in weights(trainer).items() if "running" not in name and "num_batches" not in name}
        )
    assert_same(*states, atol=1e-5, rtol=1e-4)


def test_adapters_and_heads_do_not_count(tmp_path, dataset):
    """The encoder's frames are compared, not those of an adapter after it; a CTC head on the teacher is no trouble."""
    teacher = make_stock("wavlm-stable", **OPTIONS, add_adapter=True, num_adapter_layers=1)
    assert num_encoder_frames(teacher, 16_000) == 49
    trainer = make_trainer(tmp_path, dataset, teacher, make_encoder("hubert"))
    assert step_loss(trainer, trainer.data_collator(dataset[:2])).item() > 0


class TestBadInput:
    def test_another_frame_rate(self, tmp_path, dataset):
        teacher = make_encoder("wavlm", conv_stride=(5, 8, 4))
        with pytest.raises(
            ValueError, match=r"same frame rate.*: the same utterances are \[.*99.*\] frames for the te"
        ):
            make_trainer(tmp_path, dataset, teacher, make_encoder("hubert"))

    def test_another_frame_rate_through_log_mel(self, tmp_path, dataset):
        collator = DataCollatorCoLLD(make_extractor("bert"), make_extractor("wavlm"))
        with pytest.raises(ValueError, match="Teacher and student must have the same frame rate"):
            make_trainer(
                tmp_path, dataset, make_encoder("wavlm", conv_stride=(5, 8, 4)), make_encoder("bert"), collator
            )

    def test_one_extractor_for_two_kinds_of_input(self, tmp_path, dataset):
        with pytest.raises(ValueError, match="The teacher, a wav2vec2-bert model, needs input_features, .*both models"):
            make_trainer(tmp_path, dataset, make_encoder("bert"), make_encoder("wavlm"))

    def test_a_student_without_a_mask_vector(self, tmp_path, dataset):
        for options in ({"mask_time_prob": 0.0}, {"apply_spec_augment": False}):
            with pytest.raises(ValueError, match="The student cannot be masked: .*make_student sees to it"):
                make_trainer(tmp_path, dataset, "wavlm", make_encoder("wavlm", **options))

    def test_teacher_is_student(self, tmp_path, dataset):
        model = make_encoder("wavlm")
        with pytest.raises(ValueError, match="share weights, and the teacher's are frozen: load the teacher apart"):
            make_trainer(tmp_path, dataset, model, model)

    def test_a_pruned_student(self, tmp_path, dataset):
        make_encoder("dld_wavlm").save_pretrained(tmp_path / "whole")
        options = {"num_active_layers": 2, "prune_inactive_layers": True}
        student = DLDWavLMModel.from_pretrained(tmp_path / "whole", **options)
        with pytest.raises(ValueError, match=r"Every layer of the student learns, and .1, 2. were pruned"):
            make_trainer(tmp_path, dataset, "wavlm", student)

    def test_a_dynamic_teacher_that_skips_layers(self, tmp_path, dataset):
        teacher = make_encoder("dld_wavlm")
        teacher.set_active_layers(2)
        with pytest.raises(ValueError, match="skips layers that the student should copy: 2 of 4 run"):
            make_trainer(tmp_path, dataset, teacher, make_encoder("wavlm"))

    def test_too_many_distilled_layers(self, tmp_path, dataset):
        with pytest.raises(ValueError, match="num_distilled_layers must be from 1 to 2"):
            make_trainer(tmp_path, dataset, num_distilled_layers=NUM_LAYERS)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"objective": "mse"}, "objective must be one of .*; got 'mse'"),
            ({"distill_target": "logits"}, "distill_target must be one of .*; got 'logits'"),
            ({"contrastive_temperature": 0.0}, "contrastive_temperature must be above 0.*; got 0.0"),
            ({"mask_time_prob": 0.0}, "mask_time_prob must be above 0.*; got 0.0"),
            ({"mask_time_prob": 1.5}, "mask_time_prob .* at most 1; got 1.5"),
            ({"mask_time_length": 0}, "mask_time_length must be at least 1; got 0"),
            ({"num_negatives": 0}, "num_negatives must be at least 1; got 0"),
            ({"num_distilled_layers": 0}, "num_distilled_layers must be at least 1; got 0"),
            ({"depth_sampling": "all"}, "depth_sampling must be one of .*; got 'all'"),
        ],
    )
    def test_impossible_options(self, tmp_path, option, message):
        with pytest.raises(ValueError, match=message):
            CoLLDTrainingArguments(str(tmp_path), **option)
