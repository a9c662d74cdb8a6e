"""DLDTrainer on adapters: what learns, a teacher that is the base model and no copy of it, resuming, errors."""

import gc
import types

import pytest
import torch
from conftest import NUM_LAYERS, make_dynamic
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from hf_dld import DataCollatorCTC, DLDTrainer, lora_config
from hf_dld.distill.lora import adapters_off
from hf_dld.evaluation import evaluate_depths
from hf_dld.evaluation.metrics import asr_metrics

from .test_trainer import NO_DROPOUT, arguments, assert_same

NOISY = {**NO_DROPOUT, "hidden_dropout": 0.3, "conformer_conv_dropout": 0.3, "mask_time_prob": 0.3}
NOISY["mask_time_length"] = 2


def adapted(variant="wavlm-stable", started=True, modules_to_save=None, dropout=0.0, **config):
    """A PeftModel; `started` gives its adapters an effect, which they lack at first."""
    torch.manual_seed(2)
    base = make_dynamic(variant, **{**NO_DROPOUT, **config})
    model = get_peft_model(base, lora_config(base, r=2, lora_dropout=dropout, modules_to_save=modules_to_save))
    if started:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
    return model


@pytest.fixture
def make_trainer(tmp_path, processor, dataset):
    def make(model=None, teacher="base", folder="run", **options):
        return DLDTrainer(
            model=model or adapted(),
            teacher=teacher,
            args=arguments(tmp_path / folder, **options),
            train_dataset=dataset,
            eval_dataset=[example for example in dataset if example["labels"]],
            data_collator=DataCollatorCTC(processor),
            processing_class=processor,
            compute_metrics=asr_metrics(processor.tokenizer),
        )

    return make


def state(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def inputs_of(processor, dataset):
    batch = DataCollatorCTC(processor)(dataset[3:7])
    return {name: batch[name] for name in ("input_values", "attention_mask")}


def test_the_teacher_is_the_base_model_exactly(make_trainer, processor, dataset, variant):
    """Whatever the student's depth, mode, dropout, masks, adapters and trained head: and none of it is disturbed."""
    inputs = inputs_of(processor, dataset)
    base = make_dynamic(variant, **NOISY)
    with torch.no_grad():
        expected = base(**inputs).logits
    model = adapted(variant, modules_to_save=["lm_head"], dropout=0.3, **NOISY)
    trainer = make_trainer(model)
    model.set_active_layers(2)
    model.train()
    model.get_base_model().dropout.eval()  # a mode of its own
    frozen = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(1.0)
    before = mode_and_flags(model)
    random_state = torch.get_rng_state()
    logits = trainer.compute_teacher_logits(inputs)
    torch.testing.assert_close(logits, expected)  # products round by where tensors lie in memory
    assert not logits.requires_grad
    assert mode_and_flags(model) == before
    assert torch.get_rng_state().equal(random_state), "the teacher must not take random numbers from the student"
    with torch.no_grad():
        assert not torch.allclose(model.eval()(**inputs, num_active_layers=NUM_LAYERS).logits, expected, atol=1e-2)


def mode_and_flags(model):
    modes = {name: module.training for name, module in model.named_modules()}
    return modes, {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_all_comes_back_after_an_error():
    model = adapted("conformer-relative", **NOISY).train()
    model.freeze_batch_norm()
    before = mode_and_flags(model)
    with pytest.raises(ValueError, match="from 1 to 4.*; got 9"), adapters_off(model):
        model(torch.zeros(1, 4000), num_active_layers=9)
    assert mode_and_flags(model) == before


@pytest.mark.parametrize("sampling", ["selection", "sandwich"])
@pytest.mark.parametrize("variant", ["wavlm-stable", "conformer-relative"])
def test_only_adapters_and_a_new_head_learn(make_trainer, variant, sampling):
    trainer = make_trainer(
        adapted(variant, started=False, modules_to_save=["lm_head"]), depth_sampling=sampling, max_steps=8
    )
    before = state(trainer)
    trainer.train()
    moved = {name for name, tensor in state(trainer).items() if not tensor.equal(before[name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    assert any("lora_" in name for name in moved) and any("lm_head.modules_to_save" in name for name in moved)
    assert set(before) - moved, "the base stays"
    logs = [log for log in trainer.state.log_history if "kl_loss" in log]
    assert logs[-1]["kl_loss"] > 0, "the student has left its teacher"


def test_adapters_start_as_the_teacher(make_trainer, processor, dataset):
    """PEFT's adapters do nothing at first: at full depth the first KL is 0."""
    trainer = make_trainer(adapted(started=False), depth_sampling="bernoulli", layerdrop=0.0, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["kl_loss"] == pytest.approx(0.0, abs=1e-6)


def test_the_trainer_holds_one_model(make_trainer):
    """Everything that can be reached from the trainer is the student's own weights, and no more."""
    model = adapted(modules_to_save=["lm_head"])
    trainer = make_trainer(model)
    own = {tensor.data_ptr(): tensor.numel() for tensor in [*model.parameters(), *model.buffers()]}
    found = {tensor.data_ptr(): tensor.numel() for tensor in reachable_tensors(trainer) if tensor.is_floating_point()}
    assert set(own) <= set(found)
    base_size = sum(own.values())
    assert sum(found[pointer] for pointer in set(found) - set(own)) < 0.01 * base_size
    assert len([module for module in model.modules() if type(module).__name__ == "DLDWavLMForCTC"]) == 1

    apart = make_trainer(adapted(modules_to_save=["lm_head"]), teacher=make_dynamic("wavlm-stable"))
    pointers = {t.data_ptr(): t.numel() for t in reachable_tensors(apart) if t.is_floating_point()}
    assert sum(pointers.values()) > 1.8 * base_size, "a second model would have been seen"


def reachable_tensors(start):
    """Tensors behind an object's attributes, items and closures, of whatever lies between."""
    seen, queue, tensors = set(), [start], []
    skipped = (type, types.ModuleType, types.FunctionType, types.CodeType, types.BuiltinFunctionType, types.FrameType)
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, skipped):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            tensors.append(thing)
        queue.extend(gc.get_referents(thing))
    return tensors


@pytest.mark.parametrize(("variant", "stop"), [("wavlm-stable", 1), ("conformer-relative", 3)])
def test_a_resumed_run_ends_with_equal_weights(make_trainer, tmp_path, variant, stop):
    def run(folder, resume=None, stop_at=None):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop = state.global_step == stop_at

        model = adapted(variant, modules_to_save=["lm_head"], dropout=0.2, **NOISY)
        trainer = make_trainer(model, folder=folder, max_steps=5, save_strategy="steps", save_steps=1)
        if stop_at:
            trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run("straight")
    run("stopped", stop_at=stop)
    resumed = run("stopped", resume=True)
    assert resumed.state.global_step == 5
    assert_same(state(straight), state(resumed))
    checkpoint = tmp_path / "stopped" / "run" / "checkpoint-5"
    assert {"adapter_model.safetensors", "vocab.json"} <= {path.name for path in checkpoint.iterdir()}
    assert not (checkpoint / "model.safetensors").exists(), "checkpoints hold the adapters alone"
    loaded = PeftModel.from_pretrained(make_dynamic(variant, **NOISY), checkpoint)
    assert_same(state(straight), loaded.state_dict())


def test_evaluation_over_depths_and_the_best_checkpoint(make_trainer, processor, dataset):
    trainer = make_trainer(
        eval_depths=[2, 4],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="loss_2",
        greater_is_better=False,
        load_best_model_at_end=True,
        learning_rate=0.05,
    )
    trainer.train()
    losses = [log["eval_loss_2"] for log in trainer.state.log_history if "eval_loss_2" in log]
    assert len(losses) == 4 and trainer.state.best_metric == min(losses)
    metrics = trainer.evaluate()
    assert metrics["eval_loss_2"] == pytest.approx(min(losses))
    report = evaluate_depths(trainer.unwrapped_model, list(trainer.eval_dataset), processor, [2, 4], batch_size=4)
    assert report.row(2).wer == pytest.approx(metrics["eval_wer_2"])
    assert report.row(2).parameters < report.row(4).parameters


def test_frozen_batch_norm_and_activation_checkpointing(make_trainer):
    states = []
    for checkpointing in (False, True):
        trainer = make_trainer(adapted("conformer-relative"), gradient_checkpointing=checkpointing)
        before = state(trainer)
        trainer.train()
        states.append(state(trainer))
        assert_same(*({n: t for n, t in s.items() if "running" in n} for s in (before, states[-1])))
    assert_same(*states, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("teacher", ["self", "model", "adapted", None])
def test_other_teachers(make_trainer, teacher):
    given = {"model": make_dynamic("wavlm-stable"), "adapted": adapted()}.get(teacher, teacher)
    trainer = make_trainer(teacher=given, kl_weight=float(teacher is not None), max_steps=2)
    trainer.train()
    assert (sum(log.get("kl_loss", 0) for log in trainer.state.log_history) > 0) == (teacher is not None)


class TestBadInput:
    def test_base_without_adapters(self, make_trainer):
        with pytest.raises(ValueError, match='teacher="base" is the student with its adapters off, and DLDWavLMForCTC'):
            make_trainer(make_dynamic("wavlm-stable"))

    def test_base_that_would_move(self, make_trainer):
        base = make_dynamic("wavlm-stable")
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], bias="all"))
        with pytest.raises(ValueError, match="needs base weights that stay as they are, .*bias, .*, \\.\\.\\.: freeze"):
            make_trainer(model)
        model = adapted()
        model.get_base_model().lm_head.requires_grad_(True)
        with pytest.raises(ValueError, match=r"training would change .*lm_head.weight, .*lm_head.bias: freeze"):
            make_trainer(model)
        make_trainer(model, teacher="self")

    def test_running_statistics_that_no_adapter_saves(self, make_trainer):
        with pytest.raises(ValueError, match='batch_norm="updated" gathers new running statistics in the base model'):
            make_trainer(adapted("conformer-relative"), batch_norm="updated")
        make_trainer(adapted("wavlm"), batch_norm="updated")

    def test_a_cache_of_the_base(self, make_trainer, tmp_path):
        with pytest.raises(ValueError, match="which has to be a model; got teacher='base'. Leave teacher_cache_dir"):
            make_trainer(teacher_cache_dir=str(tmp_path / "cache"))
        assert not (tmp_path / "cache").exists()

    def test_the_student_itself_as_a_frozen_teacher(self, make_trainer):
        model = adapted()
        with pytest.raises(ValueError, match='share weights, and the teacher\'s are frozen: .* or teacher="base"'):
            make_trainer(model, teacher=model.get_base_model())
        assert any(parameter.requires_grad for parameter in model.parameters())
