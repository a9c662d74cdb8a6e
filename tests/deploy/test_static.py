"""Static export: a stock checkpoint of one depth, checked before it appears, for processes without this package."""

import numpy as np
import pytest
import soundfile
import torch
from conftest import NUM_LAYERS, make_dynamic, make_stock
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from hf_dld import build_character_processor, lora_config
from hf_dld.__main__ import main
from hf_dld.deploy import export_static
from hf_dld.distill.batch_norm import reestimate_batch_norm
from hf_dld.models import DYNAMIC_CLASSES

LAYERS = (1, 2)


@pytest.fixture(scope="module")
def processor():
    return build_character_processor(["abcdefghi"])


@pytest.fixture
def checkpoint(tmp_path, processor):
    make_dynamic("conformer-relative").save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_from_a_stock_checkpoint_and_the_depth_that_is_set(tmp_path, processor):
    make_stock("wavlm-stable").save_pretrained(tmp_path / "stock")
    processor.save_pretrained(tmp_path / "stock")
    assert export_static(tmp_path / "stock", tmp_path / "two", 2).active_layers == (0, 3)
    model = make_dynamic("wavlm-stable", num_active_layers=3)
    (tmp_path / "three").mkdir()  # empty, so it may be used
    assert export_static(model, tmp_path / "three", processor=processor).active_layers == (0, 2, 3)
    assert model.num_active_layers == 3


def test_half_precision_is_kept(tmp_path, processor):
    model = make_dynamic("wavlm").to(torch.bfloat16).train()
    assert export_static(model, tmp_path / "half", 2, processor=processor).difference < 1e-5
    assert load_file(tmp_path / "half" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert model.training and model.dtype == torch.bfloat16, "the model that was given must stay as it was"


def test_positions_that_half_precision_left_behind(tmp_path, processor):
    """Stock rotary positions are kept for the next utterance of their length, in the dtype of the last."""
    model = make_dynamic("conformer-rotary").to(torch.bfloat16)
    model(torch.randn(1, 16_000, dtype=torch.bfloat16))  # as long as what is compared
    export = export_static(model, tmp_path / "out", [1, 3], processor=processor)
    assert export.difference < 1e-5


def test_batch_norm_is_re_estimated_in_the_export_only(tmp_path, processor, batch):
    model = make_dynamic("conformer-relative")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_static(model, tmp_path / "two", 2, processor=processor, batch_norm_batches=[batch])
    assert model.num_active_layers == NUM_LAYERS
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    model.set_active_layers(2)
    reestimate_batch_norm(model, [batch])
    name = "wav2vec2_conformer.encoder.layers.{}.conv_module.batch_norm.running_mean"
    exported = load_file(tmp_path / "two" / "model.safetensors")[name.format(1)]
    torch.testing.assert_close(exported, model.state_dict()[name.format(3)])
    assert not torch.allclose(exported, before[name.format(3)])
    with pytest.raises(ValueError, match="DLDWavLMForCTC has no batch normalisation"):
        export_static(make_dynamic("wavlm"), tmp_path / "x", 2, processor=processor, batch_norm_batches=[batch])
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_a_mismatch_leaves_nothing(tmp_path, processor, monkeypatch):
    model = make_dynamic("wavlm")
    save = model.stock_class.save_pretrained

    def save_something_else(static, folder, **kwargs):
        save(static, folder, **kwargs)
        tensors = load_file(folder / "model.safetensors")
        name = "wavlm.encoder.layers.1.feed_forward.output_dense.weight"
        save_file({**tensors, name: tensors[name] * 1.1}, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(model.stock_class, "save_pretrained", save_something_else)
    message = r"The exported model is not the dynamic one at layers 1, 2: their logits differ by up to .*Nothing was"
    with pytest.raises(RuntimeError, match=message):
        export_static(model, tmp_path / "out", LAYERS, processor=processor)
    with torch.no_grad():
        model.lm_head.bias.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="their logits differ by up to nan"):
        export_static(model, tmp_path / "out", LAYERS, processor=processor)
    assert not list(tmp_path.iterdir())


def test_a_failure_to_write_leaves_nothing(tmp_path, processor, monkeypatch):
    model = make_dynamic("wavlm")
    monkeypatch.setattr(type(processor), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="Could not export to .*/out: disk full. Nothing of it was left there."):
        export_static(model, tmp_path / "out", LAYERS, processor=processor)
    assert not list(tmp_path.iterdir())


def test_what_has_no_head_or_no_model_is_refused(tmp_path, processor):
    make_stock("wavlm").wavlm.save_pretrained(tmp_path / "encoder")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name, message in (
        ("encoder", r"has no CTC head \(lm_head\)"),
        ("adapter", r"holds adapters \(PEFT\): merge them"),
    ):
        processor.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"{tmp_path / name} {message}"):
            export_static(tmp_path / name, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_what_is_refused(tmp_path, processor):
    model, out = make_dynamic("wavlm"), tmp_path / "out"
    with pytest.raises(ValueError, match="num_active_layers must be an integer from 1 to 4.*; got 13"):
        export_static(model, out, 13, processor=processor)
    with pytest.raises(ValueError, match="active_layers must be strictly ascending layer indices from 0 to 3"):
        export_static(model, out, [2, 1], processor=processor)
    with pytest.raises(ValueError, match="A model in memory has no processor.*give processor="):
        export_static(model, out, 2)
    with pytest.raises(ValueError, match="Only a dynamic model has depths to export, and WavLMForCTC is not one"):
        export_static(make_stock("wavlm"), out, 2, processor=processor)
    adapted = get_peft_model(make_dynamic("wavlm"), lora_config(model, r=2))
    with pytest.raises(ValueError, match=r"has adapters \(PEFT\): export what its merge_and_unload\(\) returns"):
        export_static(adapted, out, 2, processor=processor)
    with pytest.raises(ValueError, match=r"The model has adapters \(PEFT\), which no stock model has: merge them"):
        loaded = make_dynamic("wavlm")
        loaded.add_adapter(lora_config(model, r=2))
        loaded.to_static(2)
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").touch()
    for taken in (out, out / "thesis.tex"):
        with pytest.raises(ValueError, match=f"{taken} is there already and not an empty folder; choose another one"):
            export_static(model, taken, 2, processor=processor)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "hubert"}')
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other is a hubert model, and only these can run some of their layers: dld_"):
        export_static(tmp_path / "other", tmp_path / "new", 2)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_command_writes_and_uploads_several_depths(checkpoint, tmp_path, capsys, hub):
    command = ["export", str(checkpoint), "--output", str(tmp_path / "out"), "--num_active_layers", "1", "3", "3"]
    main([*command, "--push_to_hub", "digits"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1_layers", "3_layers"]
    for depth in (1, 3):
        local = {path.name: path.read_bytes() for path in (tmp_path / "out" / f"{depth}_layers").iterdir()}
        repository = next(repo for name, repo in hub.repositories.items() if name.endswith(f"/digits-{depth}-layers"))
        assert local.items() <= repository.files.items()
    assert "3_layers: Wav2Vec2ConformerForCTC of layers 0, 2, 3 (" in capsys.readouterr().out
    for wrong in (command, [*command[:3], str(tmp_path / "new"), "--num_active_layers", "2", "13"]):
        with pytest.raises(ValueError, match="1_layers is there already|integer from 1 to 4.*got 13"):
            main(wrong)
    assert not (tmp_path / "new").exists()


def test_the_command_refuses_before_it_makes_a_repository(checkpoint, tmp_path, hub):
    before = set(hub.repositories)
    with pytest.raises(ValueError, match=r"active_layers must be strictly ascending.*got \[3, 1\]"):
        main(
            ["export", str(checkpoint), "--active_layers", "3", "1", "--output", str(tmp_path / "out")]
            + ["--push_to_hub", "me/exported"]
        )
    assert set(hub.repositories) == before


def test_the_command_looks_for_batch_norm_before_it_makes_a_repository(tmp_path, hub):
    make_dynamic("wavlm").save_pretrained(tmp_path / "wavlm")
    build_character_processor(["abcdefghi"]).save_pretrained(tmp_path / "wavlm")
    before = set(hub.repositories)
    command = ["export", str(tmp_path / "wavlm"), "--num_active_layers", "2", "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="DLDWavLMForCTC has no batch normalisation"):
        main([*command, "--batch_norm_dataset", "gone", "--push_to_hub", "me/exported"])
    assert set(hub.repositories) == before and not (tmp_path / "out").exists()


def test_command_re_estimates_batch_norm(checkpoint, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(3):
        samples = np.random.default_rng(index).standard_normal(8000) * 0.1
        soundfile.write(corpus / f"{index}.wav", samples, 16_000)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/m.csv").write_text("audio\n" + "".join(f"{index}.wav\n" for index in range(3)))
    out = tmp_path / "out"
    command = ["export", str(checkpoint), "--output", str(out), "--active_layers", "0", "2"]
    listed = ["--batch_norm_dataset", str(tmp_path / "lists/m.csv"), "--batch_norm_audio_root", str(corpus)]
    main([*command, *listed, "--batch_norm_utterances", "2"])
    plain = DYNAMIC_CLASSES["dld_wav2vec2_conformer"].from_pretrained(checkpoint).state_dict()
    exported = load_file(out / "model.safetensors")
    name = "wav2vec2_conformer.encoder.layers.{}.conv_module.{}"
    assert not torch.allclose(
        exported[name.format(1, "batch_norm.running_mean")], plain[name.format(2, "batch_norm.running_mean")]
    )
    weight = "pointwise_conv1.weight"
    assert torch.equal(exported[name.format(1, weight)], plain[name.format(2, weight)])
