import pytest
import torch
from conftest import make_dynamic

from hf_dld.distill.batch_norm import reestimate_batch_norm


def statistics(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}


def test_statistics_are_those_of_the_active_layers(batch):
    model = make_dynamic("conformer-relative")
    model.set_active_layers([1, 3])
    before, inputs = statistics(model), []
    norm = model.wav2vec2_conformer.encoder.layers[3].conv_module.batch_norm
    handle = norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    reestimate_batch_norm(model, [batch, {name: tensor[:1] for name, tensor in batch.items()}])
    handle.remove()
    torch.testing.assert_close(norm.running_mean, sum(x.mean((0, 2)) for x in inputs) / 2)
    torch.testing.assert_close(norm.running_var, sum(x.var((0, 2)) for x in inputs) / 2)
    for name, tensor in statistics(model).items():
        assert torch.equal(tensor, before[name]) == (".layers.0." in name or ".layers.2." in name), name
    assert norm.momentum == 0.1 and not model.training and not norm.training


def test_models_without_batch_norm(batch):
    with pytest.raises(ValueError, match="DLDWavLMForCTC has no batch normalisation"):
        reestimate_batch_norm(make_dynamic("wavlm"), [batch])
