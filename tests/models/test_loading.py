"""Damaged checkpoints, pickles, and checkpoints of newer versions: each is refused with its reason, or works."""

import json
import pickle

import pytest
import torch
from conftest import make_dynamic, make_stock
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCTC, pipeline

import hf_dld
from hf_dld import CheckpointError, build_character_processor
from hf_dld.data import load_processor

TASK = "automatic-speech-recognition"


@pytest.fixture
def checkpoint(tmp_path):
    make_dynamic("wavlm").save_pretrained(tmp_path)
    build_character_processor(["abcdefghi"]).save_pretrained(tmp_path)
    return tmp_path


def edit_config(checkpoint, **fields):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(checkpoint, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def all_ways_to_load(checkpoint):
    yield lambda: AutoModelForCTC.from_pretrained(checkpoint)
    yield lambda: hf_dld.DLDWavLMModel.from_pretrained(checkpoint)
    yield lambda: pipeline(TASK, model=str(checkpoint))
    yield lambda: AutoModelForCTC.from_pretrained(checkpoint, num_active_layers=2, prune_inactive_layers=True)


def assert_refused(checkpoint, message, error=CheckpointError):
    for load in all_ways_to_load(checkpoint):
        with pytest.raises(error, match=message):
            load()


@pytest.mark.parametrize("size", [0, 100, 20_000, -4])
def test_a_truncated_file(checkpoint, size):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    size = file.stat().st_size
    assert_refused(
        checkpoint,
        rf"model.safetensors \({size} bytes\) of {checkpoint} is not a whole safetensors file \(.*\): it was cut short",
    )


def test_a_truncated_shard_is_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    make_dynamic("wavlm").save_pretrained(checkpoint, max_shard_size="20KB")
    shard = sorted(checkpoint.glob("*-of-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=rf"^{shard.name} \(5000 bytes\) of {checkpoint} is not a whole"):
        AutoModelForCTC.from_pretrained(checkpoint)
    shard.unlink()  # Transformers says it clearly
    with pytest.raises(FileNotFoundError, match=shard.name):
        AutoModelForCTC.from_pretrained(checkpoint)


def test_wrong_shapes(checkpoint):
    name = "wavlm.encoder.layers.3.attention.v_proj.weight"
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: torch.zeros(8, 16)}))
    assert_refused(
        checkpoint,
        rf"{checkpoint} has 1 tensors of another shape than its config.json asks for: (wavlm\.)?{name[6:]} is "
        r"\[8, 16\], not \[16, 16\]. Weights and configuration are of different models",
    )
    model = AutoModelForCTC.from_pretrained(checkpoint, ignore_mismatched_sizes=True)
    assert model.wavlm.encoder.layers[3].attention.v_proj.weight.shape == (16, 16)


def test_missing_layers(checkpoint):
    edit_config(checkpoint, num_hidden_layers=6)
    message = (
        rf"{checkpoint} lacks tensors of encoder layers \[4, 5\], which its configuration asks for: .*random values"
    )
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCTC.from_pretrained(checkpoint)
    # the fewest that are there may still be wanted
    assert AutoModelForCTC.from_pretrained(checkpoint, active_layers=[0, 3], prune_inactive_layers=True)
    edit_config(checkpoint, num_hidden_layers=4)
    edit_tensors(checkpoint, lambda tensors: tensors.pop("wavlm.encoder.layers.2.layer_norm.bias"))
    with pytest.raises(CheckpointError, match=r"lacks tensors of encoder layers \[2\].*layers.2.layer_norm.bias. They"):
        AutoModelForCTC.from_pretrained(checkpoint)


def test_why_a_part_of_the_processor_does_not_load(checkpoint):
    """Transformers' pipelines drop the reason where a part may be missing."""
    (checkpoint / "vocab.json").write_text("{broken")
    with pytest.raises(ValueError, match=f"{checkpoint} has no tokenizer that can be loaded") as raised:
        pipeline("automatic-speech-recognition", model=str(checkpoint))
    assert isinstance(raised.value.__cause__, json.JSONDecodeError)


@pytest.mark.parametrize(
    "name",
    ["feature_projection.projection.weight", "feature_extractor.conv_layers.1.conv.weight", "encoder.layer_norm.bias"],
)
def test_missing_tensors_beside_the_layers(checkpoint, name):
    edit_tensors(checkpoint, lambda tensors: tensors.pop(f"wavlm.{name}"))
    message = (
        rf"{checkpoint} lacks 1 tensors that its configuration asks for: (wavlm\.)?{name}. They would run with ran"
    )
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCTC.from_pretrained(checkpoint)


def test_a_head_may_be_missing(checkpoint, tmp_path):
    """A pretrained checkpoint without a CTC head is what fine-tuning starts from."""
    make_stock("wavlm").wavlm.save_pretrained(tmp_path / "base")
    _, loading = hf_dld.DLDWavLMForCTC.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert loading["missing_keys"] == {"lm_head.weight", "lm_head.bias"}


def test_pickles_are_loaded_only_when_asked_for(checkpoint):
    model = make_dynamic("wavlm")
    old_names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = model.state_dict()
    for name in list(tensors):
        for new, old in old_names.items():
            if name.endswith(new):
                tensors[name.replace(new, old)] = tensors.pop(name)
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    assert AutoModelForCTC.from_pretrained(checkpoint), "next to safetensors it is never looked at"
    (checkpoint / "model.safetensors").unlink()
    assert_refused(
        checkpoint,
        rf"{checkpoint} has its weights in pytorch_model.bin, a pickle, and none in safetensors. Pickles are only "
        r"loaded when asked for.*pass use_safetensors=False, and save_pretrained\(\) then writes model.safetensors",
    )
    with pytest.raises(OSError, match="no file named model.safetensors found in directory"):
        AutoModelForCTC.from_pretrained(checkpoint, use_safetensors=True)
    loaded, loading = AutoModelForCTC.from_pretrained(checkpoint, use_safetensors=False, output_loading_info=True)
    assert not any(loading.values()), loading
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    loaded.save_pretrained(checkpoint)
    assert AutoModelForCTC.from_pretrained(checkpoint)


def test_no_weights_at_all(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model.safetensors found in directory"):
        AutoModelForCTC.from_pretrained(checkpoint)


def test_no_configuration(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(OSError, match=f"{checkpoint} has no config.json, so it is not a checkpoint"):
        hf_dld.DLDWavLMForCTC.from_pretrained(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(OSError, match="config.json' is not a valid JSON file"):
        hf_dld.DLDWavLMForCTC.from_pretrained(checkpoint)


def test_a_newer_version(checkpoint):
    assert json.loads((checkpoint / "config.json").read_text())["hf_dld_version"] == hf_dld.__version__
    edit_config(checkpoint, hf_dld_version="9.1.0", transformers_version="9.0.0")
    assert AutoModelForCTC.from_pretrained(checkpoint), "all that it says is known, so newer is no reason to refuse"
    edit_config(checkpoint, exit_layers=[2], layer_selection="learned")
    assert_refused(
        checkpoint,
        rf"This checkpoint was saved by hf_dld 9.1.0, and hf_dld {hf_dld.__version__}, which is installed, does not "
        r"know its exit_layers, layer_selection='learned'. Upgrade: pip install --upgrade hf_dld",
        ValueError,
    )


def test_unknown_settings_of_this_version(checkpoint):
    edit_config(checkpoint, corpus="mine")
    assert AutoConfig.from_pretrained(checkpoint).corpus == "mine", "fields of the user's own stay, as in Transformers"
    edit_config(checkpoint, layer_selection="learned")
    assert_refused(
        checkpoint, r"layer_selection must be one of \('even', 'first', 'schedule'\); got 'learned'", ValueError
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth_schedule": 3}, "depth_schedule must be a list of lists of layer indices; got 3"),
        ({"depth_schedule": [1, 2, 3, 4]}, "depth_schedule must be a list of lists"),
        ({"active_layers": {"0": 1}}, "active_layers must be strictly ascending layer indices"),
        # building them would take forever
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 1000; got 1000000000"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers must be an integer|num_hidden_layers"),
        ({"hf_dld_version": 7}, "hf_dld_version=7 in config.json is not a version"),
        ({"hf_dld_version": "new"}, "hf_dld_version='new' in config.json is not a version"),
        ({"conv_bias": []}, "config.json cannot be used .*conv_bias"),
        ({"conv_stride": [5, 2]}, "config.json cannot be used .*convolutional layers is incorrect"),
        ({"dtype": 0.5}, "dtype must be a name like 'float32'; got 0.5"),
        ({"dtype": "Tensor"}, "dtype must be a name like 'float32'; got <class 'torch.Tensor'>"),
    ],
)
def test_impossible_configurations(checkpoint, fields, message):
    edit_config(checkpoint, **fields)
    with pytest.raises(ValueError, match=message):
        hf_dld.DLDWavLMForCTC.from_pretrained(checkpoint)


@pytest.mark.parametrize("fields", [{"hidden_act": "gelux"}, {"num_attention_heads": 0}])
def test_a_configuration_that_no_model_can_be_built_of(checkpoint, fields):
    edit_config(checkpoint, **fields)
    with pytest.raises(CheckpointError, match=f"{checkpoint} cannot be loaded .*config.json is damaged"):
        hf_dld.DLDWavLMForCTC.from_pretrained(checkpoint)


class Canary:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_no_code_of_a_checkpoint_runs(checkpoint):
    file = checkpoint / "canary"
    (checkpoint / "code.py").write_text(f"open({str(file)!r}, 'w')\nclass Mine: pass\n")
    for name in ("processor_config.json", "tokenizer_config.json", "config.json"):
        path = checkpoint / name
        code = dict.fromkeys(("AutoProcessor", "AutoModelForCTC", "AutoConfig"), "code.Mine")
        code["AutoTokenizer"] = ["code.Mine", "code.Mine"]
        fields = {"auto_map": code, "processor_class": "Mine", "tokenizer_class": "Mine"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    assert AutoModelForCTC.from_pretrained(checkpoint), "the class of its model_type is known here"
    with pytest.raises(ValueError, match="has no processor that can be loaded without running code of its own: save"):
        load_processor(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    torch.save(Canary(file), checkpoint / "pytorch_model.bin")
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises((CheckpointError, ValueError, pickle.UnpicklingError)):
            AutoModelForCTC.from_pretrained(checkpoint, **options)
    assert not file.exists()


def test_a_missing_processor(checkpoint):
    advice = "save the processor that it was trained with beside the model"
    (checkpoint / "processor_config.json").unlink()
    with pytest.raises(OSError, match=f"Can't load feature extractor for '{checkpoint}'"):  # clear as it is
        load_processor(checkpoint)
    message = (
        rf"{checkpoint} has no feature_extractor that can be loaded.*processor.save_pretrained, or pass feature_ex"
    )
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, model=str(checkpoint))
    (checkpoint / "tokenizer_config.json").unlink()
    (checkpoint / "vocab.json").unlink()
    with pytest.raises(ValueError, match=f"{checkpoint} has no processor that can be loaded: {advice}"):
        load_processor(checkpoint)
    with pytest.raises(ValueError, match=rf"{checkpoint} has no feature_extractor and no tokenizer that can be loaded"):
        pipeline(TASK, model=str(checkpoint))
    processor = build_character_processor(["abcdefghi"])
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    assert pipeline(TASK, model=str(checkpoint), **parts)
