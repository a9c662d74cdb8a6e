"""The two methods in a row: teacher, CoLLD student, DLD dynamic model, static export, each from what the last saved."""

import pytest
import torch
from conftest import VARIANTS, make_stock
from transformers import AutoModelForCTC

from hf_dld import (
    CoLLDTrainer,
    CoLLDTrainingArguments,
    DataCollatorCoLLD,
    DataCollatorCTC,
    DLDTrainer,
    DLDTrainingArguments,
    make_student,
)
from hf_dld.models import DYNAMIC_CLASSES

from .conftest import TRAINING


@pytest.mark.parametrize("variant", ["wavlm", "wavlm-stable", "conformer-relative"])
def test_teacher_to_student_to_dynamic_to_static(tmp_path, processor, dataset, variant):
    (stock_class, config_class, _), _ = VARIANTS[variant]
    make_stock(variant, mask_time_prob=0.05).save_pretrained(tmp_path / "teacher")

    teacher = AutoModelForCTC.from_pretrained(tmp_path / "teacher")
    colld = CoLLDTrainer(
        model=make_student(teacher, 3),
        teacher=teacher,
        args=CoLLDTrainingArguments(str(tmp_path / "colld"), mask_time_length=4, **TRAINING),
        train_dataset=dataset,
        data_collator=DataCollatorCoLLD(processor.feature_extractor),
    )
    colld.train()
    colld.save_model(str(tmp_path / "student"))

    vocabulary = {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
    student = DYNAMIC_CLASSES[config_class.model_type].from_pretrained(tmp_path / "student", **vocabulary)
    encoder = dict(colld.student.named_parameters())
    assert all(tensor.equal(encoder[name]) for name, tensor in student.base_model.named_parameters())
    dld = DLDTrainer(
        model=student,
        teacher=AutoModelForCTC.from_pretrained(tmp_path / "teacher"),
        args=DLDTrainingArguments(str(tmp_path / "dld"), **TRAINING),
        train_dataset=dataset,
        data_collator=DataCollatorCTC(processor),
    )
    dld.train()
    dld.save_model(str(tmp_path / "dynamic"))

    dynamic = AutoModelForCTC.from_pretrained(tmp_path / "dynamic").eval()
    dynamic.to_static(2).save_pretrained(tmp_path / "static")
    static = AutoModelForCTC.from_pretrained(tmp_path / "static").eval()
    assert type(static) is stock_class and static.config.num_hidden_layers == 2
    values = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(static(values).logits, dynamic(values, num_active_layers=2).logits)
        assert not torch.allclose(static(values).logits, dynamic(values).logits)
