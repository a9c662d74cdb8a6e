"""ONNX export: the graph computes what the model does at that depth, and says what transcribing needs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VARIANTS, make_dynamic, make_stock

import hf_dld
from hf_dld import build_character_processor
from hf_dld.__main__ import main
from hf_dld.deploy import onnx_export
from hf_dld.deploy.onnx_export import RelativePositions, compare_with_pytorch, export_onnx

LAYERS = (2,)
# two convolutions have as many samples in a frame as the usual three, and their lengths are traced in less time
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_kernel": (10, 16), "conv_stride": (5, 32)}
OPTIONS = {
    **dict.fromkeys(VARIANTS, CONVOLUTIONS),
    # shorter than the clips below: the stock module would extend its table, a graph cannot
    "conformer-relative": {**CONVOLUTIONS, "max_source_positions": 20},
    # wide enough for the weights to be most of the file
    "wavlm-stable": {**CONVOLUTIONS, "hidden_size": 128, "intermediate_size": 512},
}
needs_extra = pytest.mark.skipif(
    not all(map(onnx_export.find_spec, onnx_export.EXTRA)), reason='needs pip install "hf_dld[onnx]"'
)


@pytest.fixture(scope="module")
def processor():
    return build_character_processor(["abcdefghi"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory, processor):
    """From the variant to its dynamic model, its export and what was traced, made once: tracing takes 10 s."""
    made = {}

    def export(variant):
        if variant not in made:
            model, programs, trace = make_dynamic(variant, **OPTIONS[variant]), [], onnx_export.trace
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(onnx_export, "trace", lambda shallow: programs.append(trace(shallow)) or programs[0])
                folder = tmp_path_factory.mktemp("onnx") / variant
                made[variant] = model, export_onnx(model, folder, LAYERS, processor=processor), programs[0]
        return made[variant]

    return export


def run(file, input_values, attention_mask):
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    inputs = {"input_values": input_values.numpy(), "attention_mask": attention_mask.numpy()}
    return session.run(["logits"], inputs)[0]


@needs_extra
def test_any_batch_and_length(exported, variant):
    model, export, _ = exported(variant)
    assert export.active_layers == LAYERS and export.difference < 1e-4 and export.token_agreement > 0.99
    for batch, samples, padded in ((1, 1_000, False), (2, 33_333, True), (4, 5_001, True)):
        inputs = onnx_export.noise(batch, samples, padded)
        with torch.no_grad():  # the very model that was exported: it must have stayed as it was
            expected = model(inputs[0], attention_mask=inputs[1], active_layers=LAYERS).logits
            full = model(inputs[0], attention_mask=inputs[1]).logits
        logits = run(export.file, *inputs)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        assert np.abs(logits - full.numpy()).max() > 1e-2, "the depths must differ"
    with torch.no_grad():
        unmasked = model(inputs[0], active_layers=LAYERS).logits
    np.testing.assert_allclose(run(export.file, inputs[0], torch.ones_like(inputs[1])), unmasked, atol=1e-4)


@needs_extra
def test_the_file_holds_these_layers_and_what_transcribing_needs(exported, processor):
    import onnx

    model, export, _ = exported("conformer-relative")
    graph = onnx.load(export.file)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata.pop("vocabulary")) == ["<pad>", "<unk>", "|", *"abcdefghi"]
    assert metadata == {
        "model_type": "wav2vec2-conformer",
        "active_layers": "[2]",
        "num_hidden_layers": "4",
        "sampling_rate_hz": "16000",
        "do_normalize": "true",
        "blank_id": "0",
        "word_delimiter": "|",
        "weights": "float32",
    }
    shapes = [[size.dim_param for size in value.type.tensor_type.shape.dim]
              for value in (*graph.graph.input, *graph.graph.output)]  # fmt: skip
    assert shapes == [["batch", "samples"], ["batch", "samples"], ["batch", "frames", ""]]
    numbers = sum(np.prod(tensor.dims) for tensor in graph.graph.initializer)
    assert numbers < model.to_static(LAYERS).num_parameters() * 1.01
    assert export.file.stat().st_size == export.size_bytes
    assert b"site-packages" not in export.file.read_bytes(), "the paths of this machine are nobody's business"
    loaded = type(processor).from_pretrained(export.file.parent)
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


@needs_extra
def test_int8_from_the_command_line(tmp_path, exported, processor, monkeypatch, capsys):
    stock = make_stock("wavlm-stable", **OPTIONS["wavlm-stable"])
    stock.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    program = exported("wavlm-stable")[2]  # of the same weights and layers
    monkeypatch.setattr(onnx_export, "trace", lambda _: program)
    out = tmp_path / "out"
    main(["export-onnx", str(tmp_path / "checkpoint"), "--active_layers", "2", "--output", str(out), "--int8"])
    assert f"{out / 'model.onnx'}: layers 2, 0." in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "model.onnx", "processor_config.json", "tokenizer_config.json", "vocab.json"
    ]  # fmt: skip
    file = out / "model.onnx"
    static = hf_dld.DLDWavLMForCTC.from_pretrained(tmp_path / "checkpoint").to_static([2])
    assert file.stat().st_size < 0.5 * 4 * static.num_parameters()
    assert b"MatMulInteger" in file.read_bytes()
    difference, agreement = compare_with_pytorch(static, file, tolerance=0.5)
    assert 1e-4 < difference and 0.5 < agreement < 1
    metadata = pytest.importorskip("onnxruntime").InferenceSession(file).get_modelmeta().custom_metadata_map
    assert metadata["weights"] == "int8" and metadata["active_layers"] == "[2]"


@needs_extra
def test_weights_beside_the_graph(exported, tmp_path, processor, monkeypatch):
    """As for models above the 2 GB that an ONNX file holds; the int8 file is whole again."""
    import onnx

    model, export, _ = exported("wavlm")

    class Program:
        model = type("Model", (), {"metadata_props": {}})

        @staticmethod
        def save(file):
            graph = onnx.load(export_of_one_file)  # saving moves the weights out of it
            onnx.save(graph, file, save_as_external_data=True, location="model.onnx.data", size_threshold=256)

    export_of_one_file = export.file
    monkeypatch.setattr(onnx_export, "trace", lambda _: Program)
    export = export_onnx(model, tmp_path / "float", LAYERS, processor=processor)
    assert (tmp_path / "float" / "model.onnx.data").exists()
    assert export.size_bytes > 4 * model.to_static(LAYERS).num_parameters()
    assert export.difference < 1e-4
    run(export.file, *onnx_export.noise(1, 4_000, False))  # from where it lies now
    export_onnx(model, tmp_path / "int8", LAYERS, int8=True, processor=processor)
    assert not (tmp_path / "int8" / "model.onnx.data").exists()


@needs_extra
def test_a_mismatch_leaves_nothing(tmp_path, exported, processor, monkeypatch):
    model, export, _ = exported("wavlm")
    static = model.to_static([1, 2])
    with pytest.raises(RuntimeError, match="The ONNX model is not the PyTorch one: on 1 x 8000 samples, without padd"):
        compare_with_pytorch(static, export.file)
    with torch.no_grad():
        static.lm_head.bias.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="their logits differ by up to nan"):
        compare_with_pytorch(static, export.file)

    def fails(*_):
        raise RuntimeError("not the same")

    monkeypatch.setattr(onnx_export, "trace", fails)
    with pytest.raises(RuntimeError, match="not the same"):
        export_onnx(model, tmp_path / "out", LAYERS, processor=processor)
    assert not list(tmp_path.iterdir())


@needs_extra
def test_what_is_refused(tmp_path, processor, monkeypatch):
    def work(*_):
        raise AssertionError("it should be refused before any work")

    monkeypatch.setattr(onnx_export, "trace", work)
    model, out = make_dynamic("wavlm"), tmp_path / "out"
    with pytest.raises(ValueError, match="num_active_layers must be an integer from 1 to 4.*; got 13"):
        export_onnx(model, out, 13, processor=processor)
    with pytest.raises(ValueError, match="active_layers must be strictly ascending layer indices from 0 to 3"):
        export_onnx(model, out, [2, 1], processor=processor)
    with pytest.raises(ValueError, match="A model in memory has no processor.*give processor="):
        export_onnx(model, out, 2)
    with pytest.raises(ValueError, match="Only a dynamic model has depths to export, and WavLMForCTC is not one. Load"):
        export_onnx(make_stock("wavlm"), out, 2, processor=processor)
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").touch()
    for taken in (out, out / "thesis.tex"):
        with pytest.raises(ValueError, match=f"{taken} is there already and not an empty folder; choose another one"):
            export_onnx(model, taken, 2, processor=processor)
    with pytest.raises(OSError, match="Could not export to .*/thesis.tex/deeper: .*Nothing of it was left there"):
        export_onnx(model, out / "thesis.tex" / "deeper", 2, processor=processor)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]

    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    several = ["export-onnx", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "new"), "--num_active_layers"]
    with pytest.raises(ValueError, match="integer from 1 to 4.*got 13"):
        main([*several, "2", "13"])
    assert not (tmp_path / "new").exists()


@needs_extra
def test_command_writes_a_folder_for_each_depth(tmp_path, exported, processor, monkeypatch, capsys):
    model, export, _ = exported("wavlm")
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    calls = []

    def record(model, folder, depth, int8, processor):
        calls.append((folder, depth, int8))
        return export

    monkeypatch.setattr(onnx_export, "export_onnx", record)
    command = ["export-onnx", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "out")]
    main([*command, "--num_active_layers", "1", "3", "3"])
    main(command)
    assert calls == [
        (tmp_path / "out" / "1_layers", 1, False),
        (tmp_path / "out" / "3_layers", 3, False),
        (tmp_path / "out", None, False),
    ]
    assert capsys.readouterr().out.count(f"{export.file}: layers 2, 0.1 MB; on noise its logits differ by at") == 3


def test_without_the_extra(tmp_path, processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'ONNX export needs .*onnxruntime.*: pip install "hf_dld\[onnx\]"'):
        export_onnx(make_dynamic("wavlm"), tmp_path / "out", 2, processor=processor)
    with pytest.raises(ImportError, match=r'pip install "hf_dld\[onnx\]"'):
        main(["export-onnx", "anywhere", "--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


ALONE = """
import sys
for name in ("hf_dld", "torch", "transformers"):
    sys.modules[name] = None  # as good as not installed: importing it fails
import numpy, onnxruntime
session = onnxruntime.InferenceSession("exported/model.onnx")
numpy.save("logits.npy", session.run(["logits"], dict(numpy.load("inputs.npz")))[0])
"""


@needs_extra
def test_a_fresh_process_with_onnxruntime_alone(exported, tmp_path):
    model, export, _ = exported("wavlm-stable")
    input_values, attention_mask = onnx_export.noise(3, 5_001, True)
    np.savez(tmp_path / "inputs.npz", input_values=input_values.numpy(), attention_mask=attention_mask.numpy())
    (tmp_path / "exported").symlink_to(Path(export.file).parent)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(input_values, attention_mask=attention_mask, active_layers=LAYERS).logits
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-4)


def test_the_copy_that_is_traced_leaves_the_original_alone(tmp_path, variant):
    make_dynamic(variant).save_pretrained(tmp_path)
    pruned = type(make_dynamic(variant)).from_pretrained(tmp_path, active_layers=[1, 3], prune_inactive_layers=True)
    inputs = onnx_export.noise(2, 4_000, True)
    with torch.no_grad():
        before = pruned(*inputs).logits
        shallow = onnx_export.shallow_copy(pruned, pruned.to_static())
        torch.testing.assert_close(shallow(*inputs).logits, before, atol=1e-5, rtol=1e-5)
        assert torch.equal(pruned(*inputs).logits, before)
    assert shallow.num_active_layers == shallow.config.num_hidden_layers == 2
    assert not any(map(onnx_export.parametrize.is_parametrized, shallow.modules()))
    assert any(map(onnx_export.parametrize.is_parametrized, pruned.modules()))


def test_relative_positions_equal_the_stock_table():
    stock = make_dynamic("conformer-relative").wav2vec2_conformer.encoder.embed_positions
    for frames in (1, 2, 301):
        hidden_states = torch.zeros(1, frames, 16)
        torch.testing.assert_close(RelativePositions(16)(hidden_states), stock(hidden_states))
