"""Students made from a teacher, and how they are saved."""

import pytest
import torch
from conftest import NUM_LAYERS, make_dynamic, make_stock
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCTC

from hf_dld.distill.student import make_student, save_student

from .conftest import DYNAMIC, OPTIONS, STOCK, make_encoder, make_extractor


def run(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 40, 160) if model.main_input_name == "input_features" else (2, 8000)
    with torch.no_grad():
        return model.eval()(torch.randn(shape, generator=generator)).last_hidden_state


def test_all_layers_compute_what_the_teacher_computes(kind):
    teacher = make_encoder(kind)
    student = make_student(teacher, NUM_LAYERS)
    torch.testing.assert_close(run(student), run(teacher), rtol=1e-4, atol=1e-5)
    assert not type(student).__name__.startswith("DLD"), "the stock class"
    tensors = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert not any(tensor.data_ptr() in tensors for tensor in student.state_dict().values()), "weights of its own"


@pytest.mark.parametrize("variant", ["wavlm", "wavlm-stable", "conformer-relative"])
def test_chosen_layers_are_those_of_the_dynamic_model(variant):
    dynamic = make_dynamic(variant).base_model
    for layers in ([0, 2], [1, 3], [2]):
        with torch.no_grad():
            expected = dynamic(torch.randn(1, 8000, generator=torch.Generator().manual_seed(3)), active_layers=layers)
            student = make_student(dynamic, layers=layers)
            found = student(torch.randn(1, 8000, generator=torch.Generator().manual_seed(3)))
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)


def test_depth_is_evenly_spaced():
    teacher = make_encoder("hubert")
    student = make_student(teacher, 2)
    for mine, theirs in ((0, 0), (1, 3)):
        for name, tensor in student.encoder.layers[mine].state_dict().items():
            assert tensor.equal(teacher.encoder.layers[theirs].state_dict()[name])


def test_another_width_keeps_the_feature_encoder_alone(kind):
    teacher = make_encoder(kind)
    student = make_student(teacher, 3, hidden_size=24)
    config = student.config
    sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size, config.num_hidden_layers)
    assert sizes == (24, 3, 48, 3)
    assert run(student).shape[-1] == 24
    for name, tensor in student.state_dict().items():
        theirs = teacher.state_dict().get(name)
        if name.startswith("feature_extractor"):
            assert tensor.equal(theirs), name
        elif "encoder.layers" in name and tensor.ndim == 2 and "rel_attn_embed" not in name:
            assert theirs is None or theirs.shape != tensor.shape or not tensor.equal(theirs), name


def test_a_teacher_with_a_head_in_another_dtype():
    teacher = make_stock("wavlm", **OPTIONS).to(torch.bfloat16)
    student = make_student(teacher, 2)
    assert student.dtype == torch.float32 and student.config.num_hidden_layers == 2
    assert teacher.config.num_hidden_layers == NUM_LAYERS


def test_a_student_can_always_be_masked(kind):
    student = make_student(make_encoder(kind, mask_time_prob=0.0), 2)
    assert student.masked_spec_embed.shape == (16,) and student.config.mask_time_prob == 0.05
    masked = (
        student.config.mask_time_prob,
        make_student(make_encoder(kind, mask_time_prob=0.2), 2).config.mask_time_prob,
    )
    assert masked == (0.05, 0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "num_hidden_layers must be from 1 to 4, because the teacher has 4 layers; got None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be from 1 to 4.*; got 0"),
        ({"num_hidden_layers": 5}, "num_hidden_layers must be from 1 to 4.*; got 5"),
        ({"layers": [2, 1]}, "layers must be strictly ascending layer indices from 0 to 3.*; got .2, 1."),
        ({"layers": [1, 1]}, "layers must be strictly ascending"),
        ({"layers": [0, 4]}, "layers must be strictly ascending"),
        ({"layers": []}, "layers must be strictly ascending"),
        ({"layers": [0, 1], "num_hidden_layers": 3}, "layers names 2 layers, but num_hidden_layers is 3"),
        ({"num_hidden_layers": 2, "hidden_size": 12}, "hidden_size must be a multiple of 8, .*; got 12"),
        ({"num_hidden_layers": 2, "hidden_size": 0}, "hidden_size must be a multiple of 8, .*; got 0"),
        ({"layers": [0, 1], "hidden_size": 24}, "layers .* copied, .* hidden_size 24"),
    ],
)
def test_impossible_students(options, message):
    with pytest.raises(ValueError, match=message):
        make_student(make_encoder("wavlm"), **options)


def test_saved_and_loaded_as_stock(tmp_path, kind):
    student = make_student(make_encoder(kind), 2)
    loaded = save_student(tmp_path / "student", student, make_extractor(kind))
    assert type(loaded) is type(student) and type(loaded).__module__.startswith("transformers.")
    torch.testing.assert_close(run(AutoModel.from_pretrained(tmp_path / "student")), run(student))
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "student").to_dict() == make_extractor(kind).to_dict()
    tuned, loading = AutoModelForCTC.from_pretrained(tmp_path / "student", vocab_size=9, output_loading_info=True)
    assert {name.partition(".")[0] for name in loading["missing_keys"]} == {"lm_head"}
    assert not loading["unexpected_keys"] and type(tuned).__name__.endswith("ForCTC")


def test_a_dynamic_student_stays_dynamic(tmp_path):
    student = make_encoder(next(iter(DYNAMIC)))
    assert type(save_student(tmp_path / "student", student, make_extractor("wavlm"))) is type(student)


def test_a_save_that_computes_something_else_is_an_error(tmp_path):
    student = make_student(make_encoder(next(iter(STOCK))), 2)
    student.encoder.layers[0].register_forward_hook(lambda module, args, output: (2 * output[0], *output[1:]))
    with pytest.raises(RuntimeError, match="computes something else than the one in memory"):
        save_student(tmp_path / "student", student, make_extractor("wavlm"))
