"""DLDTrainer on tiny real models: what it draws, what it weighs, and that splitting or stopping changes nothing."""

import json
import math
import shutil

import datasets
import pytest
import torch
from conftest import NUM_LAYERS, make_dynamic, make_stock
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import TrainerCallback

import hf_dld
from hf_dld import (
    CTCTrainer,
    CTCTrainingArguments,
    DataCollatorCTC,
    DLDTrainer,
    DLDTrainingArguments,
    DLDWav2Vec2ConformerForCTC,
    lora_config,
)
from hf_dld.deploy import write_model_card
from hf_dld.distill.losses import ctc_loss, kl_loss
from hf_dld.evaluation.metrics import asr_metrics
from hf_dld.models.depth import sample_layers

from .conftest import TRAINING

NO_DROPOUT = {
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "conformer_conv_dropout": 0.0,
    "mask_time_prob": 0.0,
}


def arguments(tmp_path, **kwargs):
    return DLDTrainingArguments(**{"output_dir": str(tmp_path / "run"), **TRAINING, **kwargs})


def make_trainer(
    tmp_path, processor, dataset, variant="wavlm-stable", teacher="stock", model=None, compute_metrics=None, **kwargs
):
    model = model or make_dynamic(variant, **NO_DROPOUT)
    if teacher == "stock":
        teacher = make_stock(variant, **NO_DROPOUT)
        with torch.no_grad():
            teacher.lm_head.weight.mul_(1.5)
    return DLDTrainer(
        model=model,
        teacher=teacher,
        args=arguments(tmp_path, **kwargs),
        train_dataset=dataset,
        eval_dataset=[example for example in dataset if example["labels"]],
        data_collator=DataCollatorCTC(processor),
        processing_class=processor,
        compute_metrics=compute_metrics or asr_metrics(processor.tokenizer),
    )


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first, second, atol=0.0, rtol=0.0):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def test_one_step_is_the_published_loss(tmp_path, processor, dataset):
    """L = ctc_weight CTC / |y| + kl_weight KL / T, meaned over utterances, on the drawn layers."""
    trainer = make_trainer(tmp_path, processor, dataset, ctc_weight=0.7, kl_weight=2.5)
    batch = DataCollatorCTC(processor)(dataset[3:7])
    inputs = {name: batch[name] for name in ("input_values", "attention_mask")}
    lengths = trainer.model._get_feat_extract_output_lengths(batch["input_lengths"])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(4))
    [layers] = sample_layers(NUM_LAYERS, "balanced", seed=3, step=0)
    student = trainer.model(**inputs, active_layers=layers).logits
    teacher = trainer.teacher(**inputs).logits
    ctc = ctc_loss(student, lengths, batch["labels"], 0)
    assert (ctc == 0).tolist() == [False, False, True, False]
    expected = (0.7 * ctc + 2.5 * kl_loss(student, teacher, lengths)).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("variant", ["wavlm-stable", "conformer-relative"])
@pytest.mark.parametrize("sampling", ["selection", "sandwich"])
def test_batch_1_with_4_steps_equals_batch_4(tmp_path, processor, dataset, variant, sampling):
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = make_trainer(
            tmp_path,
            processor,
            dataset,
            variant,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            depth_sampling=sampling,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.01,
        )
        trainer.train()
        results.append((weights(trainer), [log["loss"] for log in trainer.state.log_history if "loss" in log]))
    for state, losses in results[1:]:
        if variant == "wavlm-stable":  # the only one whose output does not depend on the padding, stock ones included
            assert_same(results[0][0], state, atol=2e-5, rtol=1e-4)
            assert losses == pytest.approx(results[0][1], rel=1e-4)
        else:
            assert losses == pytest.approx(results[0][1], rel=0.05)


def test_conformer_accumulation_is_exact_without_padding(tmp_path, processor, dataset):
    """Stock Conformers see padding through their convolutions; utterances of one length leave only the split."""
    equal = [{**example, "audio": example["audio"][:4000], "input_length": 4000} for example in dataset]
    states = []
    for batch_size in (4, 1):
        trainer = make_trainer(
            tmp_path,
            processor,
            equal,
            "conformer-relative",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.01,
        )
        trainer.train()
        states.append(weights(trainer))
    assert_same(*states, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("stop", "batches"), [(1, {}), (3, {}), (4, {"max_batch_seconds": 1.6})])
def test_a_resumed_run_ends_with_equal_weights(tmp_path, processor, dataset, stop, batches):
    """With dropout and SpecAugment on, in shuffled batches: five steps are nearly two epochs."""
    noisy = {"hidden_dropout": 0.1, "mask_time_prob": 0.2, "mask_time_length": 2, "layerdrop": 0.0}

    def run(folder, resume=None, stop_at=None, **kwargs):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop = state.global_step == stop_at

        model = make_dynamic("wavlm-stable", **{**NO_DROPOUT, **noisy})
        teacher = make_stock("wavlm-stable", **noisy)
        trainer = make_trainer(
            tmp_path / folder,
            processor,
            dataset,
            model=model,
            teacher=teacher,
            max_steps=5,
            save_steps=1,
            **batches,
            **kwargs,
        )
        if stop_at:
            trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run("straight", save_strategy="steps")
    run("stopped", stop_at=stop, save_strategy="steps")
    resumed = run("stopped", resume=True, save_strategy="steps")
    assert resumed.state.global_step == 5
    assert_same(weights(straight), weights(resumed))
    drawn = [log["num_active_layers"] for log in straight.state.log_history if "num_active_layers" in log]
    assert drawn == [log["num_active_layers"] for log in resumed.state.log_history if "num_active_layers" in log]


def test_a_stream_can_be_resumed_beyond_its_first_pass(tmp_path, processor, dataset):
    """Five steps of 2 x 2 utterances are nearly two passes."""

    def run(folder, steps, resume=None):
        stream = datasets.IterableDataset.from_generator(lambda: iter(dataset)).repeat(None)
        stream = stream.shuffle(seed=1, buffer_size=5)
        options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
        trainer = make_trainer(
            tmp_path / folder, processor, dataset, max_steps=5, gradient_accumulation_steps=2, **options
        )
        trainer.train_dataset = stream

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop = state.global_step == steps

        trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == steps
        return weights(trainer)

    assert arguments(tmp_path).accelerator_config.dispatch_batches is False, "processes pad their own batches"
    straight = run("straight", 5)
    run("stopped", 4)
    assert_same(straight, run("stopped", 5, resume=True))


def test_memory_is_pinned_for_an_accelerator_alone(tmp_path):
    """Without one torch warns of it at every loader, and does not pin."""
    assert arguments(tmp_path, use_cpu=False).dataloader_pin_memory is torch.accelerator.is_available()
    assert arguments(tmp_path, use_cpu=False, dataloader_pin_memory=False).dataloader_pin_memory is False


def test_the_draw_is_the_logged_one(tmp_path, processor, dataset):
    trainer = make_trainer(tmp_path, processor, dataset, depth_sampling="uniform", max_steps=6)
    trainer.train()
    logged = [log["num_active_layers"] for log in trainer.state.log_history if "num_active_layers" in log]
    drawn = [len(sample_layers(NUM_LAYERS, "uniform", seed=3, step=step)[0]) for step in range(6)]
    assert logged == drawn
    for log in trainer.state.log_history[:6]:
        assert 0 < log["padding"] < 0.4
        assert log["loss"] == pytest.approx(log["ctc_loss"] + log["kl_loss"], rel=1e-4)


def test_batches_of_seconds(tmp_path, processor, dataset):
    """Each epoch sees every utterance once, in other batches, all within the limit; and the loss is per utterance."""
    trainer = make_trainer(tmp_path, processor, dataset, max_batch_seconds=1.0, max_steps=20, logging_steps=5)
    loader, batches = trainer.get_train_dataloader(), []
    assert len(loader) == len(trainer.get_train_dataloader())
    for epoch in (0, 1, 1.5):
        trainer.state.epoch = epoch
        batches.append([batch["input_values"].shape + tuple(batch["input_lengths"].tolist()) for batch in loader])
        assert sum(shape[0] for shape in batches[-1]) == 12
        assert all(shape[0] * shape[1] <= 16_000 for shape in batches[-1])
    assert batches[0] != batches[1] == batches[2]
    trainer.state.epoch = None
    trainer.train()
    assert trainer.state.global_step == 20
    assert all(0 <= log["padding"] < 0.2 for log in trainer.state.log_history if "padding" in log)


def test_plain_layer_dropping_needs_no_teacher(tmp_path, processor, dataset):
    trainer = make_trainer(tmp_path, processor, dataset, teacher=None, kl_weight=0.0, depth_sampling="bernoulli")
    trainer.train()
    assert all(log["kl_loss"] == 0 for log in trainer.state.log_history if "kl_loss" in log)


def test_self_teaching_runs_full_depth_and_one_drawn_depth(tmp_path, processor, dataset):
    trainer = make_trainer(tmp_path, processor, dataset, teacher="self", ctc_weight=0.0)
    assert trainer.draw_layers()[-1] == tuple(range(NUM_LAYERS))
    batch = DataCollatorCTC(processor)(dataset[:4])
    trainer.model.train()
    trainer.state.global_step = next(step for step in range(99) if sampled_count(step) == 1)
    trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(4)).backward()
    # without CTC only the drawn layer, 0, learns: the full depth teaches and is detached
    gradients = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    for index in range(1, NUM_LAYERS):
        moved = [n for n in gradients if f".layers.{index}." in n]
        assert all(not dict(trainer.model.named_parameters())[n].grad.any() for n in moved)
    assert any(".layers.0." in name for name in gradients)
    trainer.train()
    assert all(math.isfinite(log["kl_loss"]) for log in trainer.state.log_history if "kl_loss" in log)


def sampled_count(step):
    return len(sample_layers(NUM_LAYERS, "balanced", seed=3, step=step)[0])


def test_kl_weight_fades(tmp_path, processor, dataset):
    trainer = make_trainer(tmp_path, processor, dataset, kl_weight=2.0, kl_weight_end=0.5, max_steps=4)
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            seen.append(trainer.current_kl_weight())

    trainer.add_callback(Watch())
    trainer.train()
    assert seen == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_teacher_is_frozen_and_stays_outside(tmp_path, processor, dataset):
    trainer = make_trainer(tmp_path, processor, dataset)
    before = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    trainer.train()
    assert not trainer.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in trainer.teacher.parameters())
    assert_same(before, trainer.teacher.state_dict())
    trainer.save_model(str(tmp_path / "saved"))
    assert_same(trainer.model.state_dict(), type(trainer.model).from_pretrained(tmp_path / "saved").state_dict())
    assert not any("teacher" in name for name in trainer.model.state_dict())


def test_a_blank_that_is_not_the_tokenizers(tmp_path, processor, dataset):
    """Transformers makes the tokenizer's the model's when training starts; the loss would go on with the other."""
    model = make_dynamic("wavlm")
    model.config.pad_token_id = 3
    message = r"The CTC blank of the model, config.pad_token_id, is 3, and the tokenizer's is 0 \('<pad>'\)"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, processor, dataset, model=model, teacher=None, kl_weight=0.0)


def test_labels_beyond_the_vocabulary(tmp_path, processor, dataset):
    """torch's CTC reads past the row then, and makes a loss that looks like one."""
    others = [{**example, "labels": [40, 57]} for example in dataset]
    trainer = make_trainer(tmp_path, processor, others)
    message = f"The labels hold token 57, and the model's vocabulary ends at {trainer.model.config.vocab_size - 1}"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    with pytest.raises(ValueError, match=message):
        trainer.evaluate()


def test_a_student_made_by_model_init(tmp_path, processor, dataset):
    """As a search for hyperparameters needs it: each training begins with a new one, checked and frozen alike."""
    made = []

    def model_init():
        made.append(make_dynamic("conformer-relative", **NO_DROPOUT))
        return made[-1]

    states = []
    trainer = DLDTrainer(
        model_init=model_init,
        teacher=make_stock("conformer-relative", **NO_DROPOUT),
        args=arguments(tmp_path),
        train_dataset=dataset,
        data_collator=DataCollatorCTC(processor),
        processing_class=processor,
    )
    for _ in range(2):
        trainer.train()
        states.append(weights(trainer))
    assert len(made) == 3 and all(model.base_model.batch_norm_frozen for model in made)
    assert_same(*states)
    args = arguments(tmp_path, eval_depths=[9])
    with pytest.raises(ValueError, match="num_active_layers"):
        DLDTrainer(model_init=model_init, teacher="self", args=args)


def test_speech_without_transcripts_is_predicted(tmp_path, processor, dataset):
    trainer = make_trainer(tmp_path, processor, dataset)
    untranscribed = [{"audio": example["audio"], "labels": None} for example in dataset]
    output = trainer.predict(untranscribed)
    assert not any("wer" in name for name in output.metrics)
    assert (output.predictions == trainer.predict(dataset).predictions).all()


def test_a_finished_run_that_is_resumed_takes_no_step(tmp_path, processor, dataset):
    """One that ended within an epoch: it would learn once more, and its KL weight fade beyond its end."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "kl_weight_end": 0.0}
    trainer = make_trainer(tmp_path, processor, dataset, **options)
    trainer.train()
    before = weights(trainer)
    again = make_trainer(tmp_path, processor, dataset, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert_same(before, weights(again))


def test_untranscribed_speech_alone_trains_by_kl(tmp_path, processor, dataset):
    untranscribed = [{**example, "labels": []} for example in dataset]
    trainer = make_trainer(tmp_path, processor, untranscribed)
    before = weights(trainer)
    trainer.train()
    assert all(log["ctc_loss"] == 0 and log["kl_loss"] > 0 for log in trainer.state.log_history if "ctc_loss" in log)
    assert not torch.equal(before["lm_head.weight"], trainer.model.lm_head.weight)


@pytest.mark.parametrize("policy", ["frozen", "updated"])
def test_batch_norm_policies(tmp_path, processor, dataset, policy):
    trainer = make_trainer(tmp_path, processor, dataset, "conformer-relative", batch_norm=policy)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert any(name.endswith("running_mean") for name in moved) == (policy == "updated")
    assert any(name.endswith("batch_norm.weight") for name in moved)


def test_statistics_that_are_frozen_halfway(tmp_path, processor, dataset):
    """The same after resuming, on either side of the half."""

    def statistics(trainer):
        return {name: tensor for name, tensor in weights(trainer).items() if "running" in name}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen.append(statistics(trainer))

    options = {"batch_norm": "updated", "batch_norm_freeze_at": 0.5, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 3}
    trainer, seen = make_trainer(tmp_path, processor, dataset, "conformer-relative", **options), []
    trainer.add_callback(Watch())
    trainer.train()
    assert not torch.equal(*(next(iter(kept.values())) for kept in seen[:2]))
    assert_same(seen[1], seen[2])
    assert_same(seen[1], seen[3])
    whole = weights(trainer)
    for step in (1, 3):
        trainer = make_trainer(tmp_path, processor, dataset, "conformer-relative", **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert_same(whole, weights(trainer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_norm_freeze_at": 0.0},
            "batch_norm_freeze_at must be above 0 and at most 1, a share of the steps; got 0",
        ),
        (
            {"batch_norm_freeze_at": 0.5},
            "batch_norm_freeze_at is 0.5, but the statistics are frozen from the start: ch",
        ),
    ],
)
def test_impossible_times_to_freeze_statistics(tmp_path, processor, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, processor, dataset, "conformer-relative", **options)


def test_a_student_without_statistics_gathers_them(tmp_path, processor, dataset):
    """Those of a new model, means of 0 and variances of 1, normalise nothing when they are frozen."""
    config = make_dynamic("conformer-relative").config
    for variant, new, policy in (
        ("conformer-relative", DLDWav2Vec2ConformerForCTC(config), "updated"),
        ("conformer-relative", make_dynamic("conformer-relative"), "frozen"),
        ("wavlm", make_dynamic("wavlm"), None),  # which has none
    ):
        trainer = make_trainer(tmp_path, processor, dataset, variant, model=new)
        assert trainer.args.batch_norm == policy
        before = weights(trainer)
        trainer.train()
        moved = [name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])]
        assert any("running_mean" in name for name in moved) == (policy == "updated")


def test_synchronized_batch_norm_needs_an_accelerator(tmp_path, processor, dataset):
    with pytest.raises(
        ValueError, match='batch_norm="synchronized" is torch.s SyncBatchNorm, which does not run on cpu'
    ):
        make_trainer(tmp_path, processor, dataset, "conformer-relative", batch_norm="synchronized")
    make_trainer(tmp_path, processor, dataset, "wavlm", batch_norm="synchronized")  # which has none


@pytest.mark.parametrize("variant", ["wavlm", "conformer-relative"])
def test_a_frozen_feature_encoder_runs_once_a_step(tmp_path, processor, dataset, variant):
    """And gives exactly what it gives the teacher and each pass of the student on their own."""
    states, runs = [], []
    for shared in (False, True):
        masked = {**NO_DROPOUT, "feat_proj_dropout": 0.1, "mask_time_prob": 0.2, "mask_time_length": 2}
        student, teacher = (make_dynamic(variant, **masked) for _ in range(2))
        student.freeze_feature_encoder()
        trainer = make_trainer(
            tmp_path, processor, dataset, model=student, teacher=teacher, depth_sampling="sandwich", max_steps=2
        )
        if not shared:
            trainer.share_features = lambda model_inputs: model_inputs
        calls = []
        for model in (student, teacher):
            model.base_model.feature_extractor.conv_layers[0].register_forward_hook(lambda *_, c=calls: c.append(1))
        trainer.train()
        states.append(weights(trainer))
        runs.append(len(calls))
    assert_same(*states)
    assert runs[1] == 2 < runs[0]


def test_adapters_share_the_feature_encoder_with_the_weights_under_them(tmp_path, processor, dataset):
    student = make_dynamic("wavlm-stable", **NO_DROPOUT)
    calls = []
    student.wavlm.feature_extractor.conv_layers[0].register_forward_hook(lambda *_: calls.append(1))
    adapted = get_peft_model(student, lora_config(student, r=2))
    make_trainer(tmp_path, processor, dataset, model=adapted, teacher="base", max_steps=2).train()
    assert len(calls) == 2


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("make_teacher", [make_stock, make_dynamic])
def test_a_teacher_hears_in_its_own_precision(tmp_path, processor, dataset, make_teacher, cached):
    """A checkpoint in bfloat16 loads as such; the student stays in float32, and its features serve both."""
    cache = {"teacher_cache_dir": str(tmp_path / "cache")} if cached else {}
    losses, runs = [], []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = make_dynamic("wavlm-stable", **NO_DROPOUT), make_teacher("wavlm-stable", **NO_DROPOUT)
        student.freeze_feature_encoder()
        calls = []
        teacher.wavlm.feature_extractor.conv_layers[0].register_forward_hook(lambda *_, c=calls: c.append(1))
        options = {"model": student, "teacher": teacher.to(dtype), "max_steps": 1, **cache}
        trainer = make_trainer(tmp_path / str(dtype), processor, dataset, **options)
        trainer.train()
        losses.append(trainer.state.log_history[0]["kl_loss"])
        runs.append(len(calls))
    assert 0 < abs(losses[1] - losses[0]) < 0.02 * losses[0]
    batches = 3  # of 4 utterances, for this teacher does not hear padding
    assert runs[0] == runs[1] == (batches if cached else make_teacher is make_stock)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_student_in_half_precision_trains(tmp_path, processor, dataset, adapted):
    student = make_dynamic("wavlm-stable", **NO_DROPOUT).to(torch.bfloat16)
    model, teacher = (get_peft_model(student, lora_config(student, r=2)), "base") if adapted else (student, "stock")
    trainer = make_trainer(tmp_path, processor, dataset, model=model, teacher=teacher, max_steps=2)
    before = weights(trainer)
    trainer.train()
    moved = [name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])]
    assert moved and all(("lora" in name) == adapted for name in moved)
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert trainer.evaluate()["eval_loss"] > 0


def test_feature_encoders_that_differ_are_not_shared(tmp_path, processor, dataset):
    batch = {"input_values": torch.zeros(1, 4000)}
    for what in ("trained", "another", "stock", "settings"):
        student = make_dynamic("wavlm-stable", **NO_DROPOUT)
        if what != "trained":
            student.freeze_feature_encoder()
        teacher = (make_stock if what == "stock" else make_dynamic)("wavlm-stable", **NO_DROPOUT)
        if what == "another":
            with torch.no_grad():
                teacher.wavlm.feature_extractor.conv_layers[2].conv.weight[0, 0, 0] += 1e-6
        if what == "settings":
            teacher.config.feat_extract_activation = "relu"
        trainer = make_trainer(tmp_path, processor, dataset, model=student, teacher=teacher)
        assert trainer.share_features(batch) is batch, what


def test_activation_checkpointing_trains_the_same(tmp_path, processor, dataset):
    states = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, processor, dataset, gradient_checkpointing=checkpointing)
        trainer.train()
        states.append(weights(trainer))
    assert_same(*states, atol=1e-5, rtol=1e-4)


def test_evaluation_at_a_list_of_depths(tmp_path, processor, dataset):
    trainer = make_trainer(tmp_path, processor, dataset, eval_depths=[1, 4])
    metrics = trainer.evaluate()
    assert {"eval_wer_1", "eval_cer_4", "eval_wer_mean", "eval_loss_1", "eval_loss"} <= metrics.keys()
    assert metrics["eval_wer_mean"] == pytest.approx((metrics["eval_wer_1"] + metrics["eval_wer_4"]) / 2)
    assert metrics["eval_loss"] == pytest.approx((metrics["eval_loss_1"] + metrics["eval_loss_4"]) / 2)
    alone = make_trainer(tmp_path, processor, dataset, eval_depths=[4]).evaluate()
    assert alone["eval_wer_4"] == metrics["eval_wer_4"]
    # what is kept of a batch are token ids, not logits
    predictions = trainer.predict(trainer.eval_dataset)
    assert predictions.predictions.ndim == 2 and predictions.predictions.dtype.kind == "i"
    assert (predictions.predictions == -100).any(), "frames in padding predict nothing"
    assert trainer.evaluated_depth is None


def test_default_depths_are_thirds(tmp_path, processor, dataset):
    assert make_trainer(tmp_path, processor, dataset).eval_depths == [2, 3, 4]


def test_best_checkpoint_by_a_chosen_depth(tmp_path, processor, dataset):
    trainer = make_trainer(
        tmp_path,
        processor,
        dataset,
        eval_depths=[2, 4],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="loss_2",
        greater_is_better=False,
        load_best_model_at_end=True,
    )
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss_2" in log]
    best = min(evaluations, key=lambda log: log["eval_loss_2"])
    assert trainer.state.best_metric == best["eval_loss_2"]
    assert trainer.evaluate()["eval_loss_2"] == pytest.approx(best["eval_loss_2"])


def test_a_static_model_trains_by_ctc(tmp_path, processor, dataset):
    args = CTCTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=30, learning_rate=5e-3, disable_tqdm=True,
        save_strategy="no", train_sampling_strategy="random", use_cpu=True, logging_steps=1,
    )  # fmt: skip
    transcribed = [example for example in dataset if example["labels"]]
    trainer = CTCTrainer(
        model=make_stock("wavlm-stable", **NO_DROPOUT),
        args=args,
        train_dataset=transcribed,
        data_collator=DataCollatorCTC(processor),
        compute_metrics=asr_metrics(processor.tokenizer),
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.7 * losses[0]
    assert 0 <= trainer.evaluate(transcribed)["eval_cer"]


def test_checkpoints_hold_the_processor(tmp_path, processor, dataset):
    trainer = make_trainer(tmp_path, processor, dataset)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "vocab.json").exists()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "dld_wavlm"
    shutil.rmtree(tmp_path / "saved")


class TestBadInput:
    def test_teacher_with_another_vocabulary(self, tmp_path, processor, dataset):
        teacher = make_stock("wavlm-stable", vocab_size=40)
        with pytest.raises(ValueError, match="share the vocabulary.*vocab_size is 40 for the teacher and 12"):
            make_trainer(tmp_path, processor, dataset, teacher=teacher)

    def test_teacher_with_another_blank(self, tmp_path, processor, dataset):
        teacher = make_stock("wavlm-stable", pad_token_id=3)
        with pytest.raises(ValueError, match="share the CTC blank.*pad_token_id is 3 for the teacher and 0"):
            make_trainer(tmp_path, processor, dataset, teacher=teacher)

    def test_teacher_with_another_frame_rate(self, tmp_path, processor, dataset):
        teacher = make_stock("wavlm-stable", conv_stride=(5, 8, 2))
        with pytest.raises(ValueError, match="same frame rate.* frames for the teacher and .* for the student"):
            make_trainer(tmp_path, processor, dataset, teacher=teacher)

    def test_no_teacher(self, tmp_path, processor, dataset):
        with pytest.raises(ValueError, match="kl_weight is 1.0, but there is no teacher"):
            make_trainer(tmp_path, processor, dataset, teacher=None)
        with pytest.raises(ValueError, match="kl_weight_end is 0.5, but there is no teacher"):
            make_trainer(tmp_path, processor, dataset, teacher=None, kl_weight=0.0, kl_weight_end=0.5)
        with pytest.raises(ValueError, match='teacher must be a model, "self", "base" or None; got \'you\''):
            make_trainer(tmp_path, processor, dataset, teacher="you")

    def test_batches_of_unknown_seconds(self, tmp_path, processor, dataset):
        lengthless = [{"audio": example["audio"], "labels": example["labels"]} for example in dataset]
        with pytest.raises(ValueError, match="needs the column duration_s.*there are: .'audio', 'labels'"):
            make_trainer(tmp_path, processor, lengthless, max_batch_seconds=1.0)
        streamed = datasets.IterableDataset.from_generator(lambda: iter(dataset))
        options = {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 1, "max_batch_seconds": 1.0}
        with pytest.raises(ValueError, match="needs to know all lengths beforehand.*streamed .IterableDataset"):
            CTCTrainer(make_dynamic("wavlm"), CTCTrainingArguments(**options), train_dataset=streamed)

    @pytest.mark.parametrize("depth", [0, -1, 13])
    def test_impossible_depth(self, tmp_path, processor, dataset, depth):
        with pytest.raises(ValueError, match=f"num_active_layers must be an integer from 1 to 4.*; got {depth}"):
            make_trainer(tmp_path, processor, dataset, eval_depths=[2, depth])

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"depth_sampling": "all"}, "depth_sampling must be one of .*; got 'all'"),
            ({"kl_direction": "up"}, "kl_direction must be one of .*; got 'up'"),
            ({"batch_norm": "none"}, "batch_norm must be one of .*; got 'none'"),
            ({"layerdrop": 1.0}, "layerdrop must be at least 0 and below 1.*; got 1.0"),
            ({"kl_weight": -1.0}, "kl_weight must be at least 0.*; got -1.0"),
            ({"max_batch_seconds": 0.0}, "max_batch_seconds must be above 0.*; got 0.0"),
            ({"kl_temperature": 0.0}, "kl_temperature must be above 0.*; got 0.0"),
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, but .* no loss here is one"),
            ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is 5.0, but .* models of speech have none"),
            ({"remove_unused_columns": True}, "remove_unused_columns must stay off: no model takes audio"),
        ],
    )
    def test_impossible_options(self, tmp_path, option, message):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **option)

    def test_a_loss_of_others(self, tmp_path):
        args = CTCTrainingArguments(str(tmp_path), use_cpu=True)
        with pytest.raises(ValueError, match="compute_loss_func is not called.*override its compute_utterance_terms"):
            CTCTrainer(make_dynamic("wavlm"), args, compute_loss_func=lambda outputs, labels, num_items_in_batch: 0)


def test_batches_of_somebody_else_s_making(tmp_path, processor, dataset):
    """What trains need not be audio any more; `input_lengths` is all that the trainers ask for."""
    rows = [{"samples": row["audio"], "labels": row["labels"]} for row in dataset]
    collator = DataCollatorCTC(processor)
    args = CTCTrainingArguments(str(tmp_path), **{**TRAINING, "max_steps": 1})
    model = make_dynamic("wavlm", **NO_DROPOUT)
    trainer = CTCTrainer(
        model,
        args,
        train_dataset=rows,
        data_collator=lambda rows: collator([{"audio": row["samples"], "labels": row["labels"]} for row in rows]),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_model_card(tmp_path, processor, dataset):
    trainer = make_trainer(
        tmp_path, processor, dataset, max_steps=1, kl_weight=0.5, eval_depths=[2], eval_strategy="steps"
    )
    trainer.train()
    trainer.save_model()
    card_file = tmp_path / "run" / "README.md"
    trainer.create_model_card(language="en", tags="beeps")
    draft = ModelCard.load(card_file)
    assert {"beeps", "hf_dld", "generated_from_trainer"} <= set(draft.data.tags) and draft.data.language == ["en"]
    assert draft.data.pipeline_tag == "automatic-speech-recognition" and draft.data.metrics == ["wer", "cer"]
    assert "- depth_sampling: balanced\n" in draft.text and "- kl_weight: 0.5\n" in draft.text
    assert "Wer 2" in draft.text, "the Trainer's own table of results"
    trainer.create_model_card(language="de")
    assert ModelCard.load(card_file).data.language == ["de"], "a draft is made anew"
    card = str(write_model_card(tmp_path / "run"))
    trainer.create_model_card()
    assert card_file.read_text() == card, "hf_dld's own card stays"


@pytest.mark.parametrize("batch_eval_metrics", [False, True])
def test_predictions_are_in_the_order_of_the_dataset(tmp_path, processor, dataset, batch_eval_metrics):
    options = {"train_sampling_strategy": "group_by_length", "eval_depths": [2, 4]}
    trainer = make_trainer(tmp_path, processor, dataset, **options)
    trainer.args.batch_eval_metrics = batch_eval_metrics
    trainer.compute_metrics = lambda prediction, compute_result=True: {}
    predicted = trainer.predict(trainer.eval_dataset)
    labels = [row["labels"] for row in trainer.eval_dataset]
    assert [[token for token in row if token >= 0] for row in predicted.label_ids.tolist()] == labels
    assert len(predicted.predictions) == len(labels)


class Endless(torch.utils.data.Dataset):
    """Answers every index, and raises no `IndexError` behind the last example."""

    def __init__(self, examples):
        self.examples, self.read = examples, []

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        assert index < 3 * len(self), "read on and on"
        return self.examples[index % len(self)]


@pytest.mark.parametrize("options", [{"train_sampling_strategy": "group_by_length"}, {"max_batch_seconds": 2.0}])
def test_a_dataset_that_answers_every_index(tmp_path, processor, dataset, options):
    trainer = make_trainer(tmp_path, processor, dataset, max_steps=2, **options)
    trainer.train_dataset = Endless(dataset)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("variant", ["wavlm-stable", "conformer-relative"])
def test_a_stock_student_is_refused(tmp_path, processor, dataset, variant):
    model = make_stock(variant)
    message = f"A {type(model).__name__} cannot run with some of its layers; load the checkpoint with hf_dld.DLDWavLM"
    for refuses in (
        lambda: make_trainer(tmp_path, processor, dataset, model=model),
        lambda: hf_dld.evaluate_depths(model, dataset, processor),
        lambda: lora_config(model),
    ):
        with pytest.raises(TypeError, match=message):
            refuses()
    assert lora_config(make_dynamic(variant).base_model).target_modules, "an encoder alone can be adapted"
    with pytest.raises(TypeError, match="A DLD.*Model has no CTC head; load the checkpoint with hf_dld.DLDWavLMForCTC"):
        make_trainer(tmp_path, processor, dataset, model=make_dynamic(variant).base_model)


def test_metrics_that_are_no_numbers(tmp_path, processor, dataset):
    def compute_metrics(_):
        found = {"wer": 0.1, "by_speaker": {"a": 1}, "note": "good"}
        return found | ({"only_at_4": 2.0} if trainer.evaluated_depth == 4 else {"only_at_2": 1.0})

    trainer = make_trainer(tmp_path, processor, dataset, eval_depths=[2, 4], compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    assert metrics["eval_wer_mean"] == pytest.approx(0.1) and metrics["eval_by_speaker_2"] == {"a": 1}
    assert (
        metrics["eval_note_4"] == "good" and metrics["eval_only_at_4_4"] == 2.0 and metrics["eval_only_at_2_2"] == 1.0
    )
    assert not {"eval_by_speaker_mean", "eval_note_mean", "eval_only_at_4_mean", "eval_only_at_2_mean"} & metrics.keys()


@pytest.mark.parametrize("options", [{"eval_do_concat_batches": False}, {"batch_eval_metrics": True}])
def test_metrics_of_batches_add_up(tmp_path, processor, dataset, options):
    whole = make_trainer(tmp_path, processor, dataset, eval_depths=[2, 4]).evaluate()
    trainer = make_trainer(tmp_path, processor, dataset, eval_depths=[2, 4], **options)
    for _ in range(2):  # nothing of the first is left in the second
        found = trainer.evaluate()
        for name in ("eval_wer_2", "eval_cer_4", "eval_cer_mean"):
            assert found[name] == whole[name]


def test_a_processor_gives_the_collator(tmp_path, processor, dataset):
    options = {"model": make_dynamic("wavlm-stable", **NO_DROPOUT), "train_dataset": dataset}
    trainer = CTCTrainer(
        args=CTCTrainingArguments(**{"output_dir": str(tmp_path), **TRAINING}), processing_class=processor, **options
    )
    assert isinstance(trainer.data_collator, DataCollatorCTC)
    trainer.train()
    given = make_trainer(tmp_path, processor, dataset, max_steps=1)
    assert given.data_collator.processor is processor


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_batches_that_do_not_tell_their_lengths(tmp_path, processor, dataset, phase):
    def usual(examples):
        batch = DataCollatorCTC(processor)(examples)
        del batch["input_lengths"]
        return batch

    trainer = make_trainer(tmp_path, processor, dataset)
    trainer.data_collator = usual
    with pytest.raises(ValueError, match=r"A batch holds no input_lengths .*only \['input_values', .*: pass data_coll"):
        getattr(trainer, phase)()


def test_lengths_come_from_the_examples(tmp_path, processor, dataset):
    grouped = {"train_sampling_strategy": "group_by_length"}
    sampler = make_trainer(tmp_path, processor, dataset, **grouped)._get_train_sampler()
    assert list(sampler.lengths) == [row["input_length"] for row in dataset]
    assert sorted(sampler) == list(range(len(dataset)))
    bare = [{"audio": row["audio"], "labels": row["labels"]} for row in dataset]
    with pytest.raises(ValueError, match="group_by_length' needs the column input_length, .*are: .'audio', 'labels'"):
        make_trainer(tmp_path, processor, bare, **grouped).train()


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("loss", False), ("eval_loss_6", False), ("wer_mean", False), ("cer", False), ("accuracy", True)],
)
def test_fewer_errors_are_better(tmp_path, metric, greater):
    assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is greater
    assert arguments(tmp_path, metric_for_best_model=metric, greater_is_better=True).greater_is_better is True


def test_steps_do_not_look_through_all_modules(tmp_path, processor, dataset, monkeypatch):
    """Accelerate's search for compiled modules took 4 ms of the quickstart's 66 ms steps."""
    trainer = make_trainer(tmp_path, processor, dataset, max_steps=6, logging_steps=6)
    assert trainer.unwrapped_model is trainer.model
    looked, unwrap_model = [], trainer.accelerator.unwrap_model
    monkeypatch.setattr(trainer.accelerator, "unwrap_model", lambda *a, **k: looked.append(a) or unwrap_model(*a, **k))
    trainer.train()
    assert trainer.state.total_flos == 0
    # by the stock Trainer, once and for checkpoints: not in every step
    assert len(looked) < trainer.state.global_step
    trainer.model = torch.nn.parallel.DataParallel(inner := make_dynamic("wavlm-stable"))
    assert trainer.unwrapped_model is inner


def test_grouping_by_length_does_not_read_the_dataset(tmp_path, processor, dataset):
    rows = [{**example, "audio": None} for example in dataset]
    options = {"train_sampling_strategy": "group_by_length"}
    trainer = make_trainer(tmp_path, processor, datasets.Dataset.from_list(rows), **options)
    sampler = trainer._get_train_sampler()
    assert type(sampler.lengths) is list and sampler.lengths == [row["input_length"] for row in rows]
    assert sorted(sampler) == list(range(len(rows)))
