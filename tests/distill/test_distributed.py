"""Two processes end with the weights, the logs and the error rates of one, whatever layers are drawn."""

import pytest
import torch
from conftest import NUM_LAYERS
from launching import launch

from hf_dld.models.depth import sample_layers

from .distributed_runs import RUNS, run, run_colld


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch("--module", "distill.distributed_runs", folder)
    return folder


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(name, two_processes, tmp_path):
    one, two = run(name, tmp_path, 1), torch.load(two_processes / f"{name}.pt")
    assert_same(one["weights"], two["weights"])
    for first, second in zip(one["logs"], two["logs"], strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-6)
    assert two["metrics"] == one["metrics"], "the same utterances in the same batches"
    assert two["report"] == one["report"], "batches are shared, not split"
    assert two["calls"] == one["calls"]
    assert two["sharded"] == ("fsdp" in name) and not one["sharded"]


def test_two_processes_distil_what_one_does(two_processes, tmp_path):
    one, two = run_colld(tmp_path, 1), torch.load(two_processes / "colld.pt")
    assert any("heads" in name for name in one["weights"])
    assert_same(one["weights"], two["weights"])
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)


def test_layers_that_a_process_dropped_are_logged_as_the_others_had_them(two_processes):
    result = torch.load(two_processes / "stock colld.pt")
    assert any(one.keys() != two.keys() for one, two in result["brought"]), "processes drew the same layers"
    for brought, log in zip(result["brought"], result["logs"], strict=True):
        for name in set().union(*brought):
            totals, counts = zip(*(mine[name] for mine in brought if name in mine), strict=True)
            assert log[name] == pytest.approx(sum(totals) / sum(counts), rel=1e-4), name
        assert {name for name in log if name.startswith("loss_")} == set().union(*brought)


def test_skipping_is_real_where_weights_are_sharded(two_processes):
    """Transformers' own LayerDrop computes every layer there, for fear that processes draw differently."""
    drawn = [layer for step in range(4) for layer in sample_layers(NUM_LAYERS, "bernoulli", seed=3, step=step)[0]]
    micro_batches = RUNS["fsdp, wavlm"]["gradient_accumulation_steps"]
    calls = [micro_batches * drawn.count(layer) for layer in range(NUM_LAYERS)]
    assert torch.load(two_processes / "fsdp, wavlm.pt")["calls"] == calls
    assert 0 < min(calls) < max(calls) < 4 * micro_batches, "seed 3 skips every layer at some step"
