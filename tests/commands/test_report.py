"""`python -m hf_dld report` and `compare`, from a folder with audio to files."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import make_dynamic

import hf_dld
from hf_dld.__main__ import main


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "test"
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = [["file_name", "transcription"]]
    for index in range(5):
        soundfile.write(folder / f"{index}.wav", generator.uniform(-0.5, 0.5, 6000 + 500 * index), 16_000)
        rows.append([f"{index}.wav", "abc def" if index % 2 else "ghi"])
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(folder.parent)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_dynamic("wavlm-stable").save_pretrained(folder)
    hf_dld.build_character_processor(["abcdefghi"]).save_pretrained(folder)
    return folder


@pytest.fixture
def report(corpus, checkpoint, tmp_path):
    def run(*arguments):
        cache = ["--cache_dir", str(tmp_path / "cache")]
        main(["report", str(checkpoint), "--dataset", corpus, "--timed_utterances", "2", *cache, *arguments])

    return run


def test_report_and_compare(report, corpus, checkpoint, tmp_path, capsys):
    report("--depths", "1", "4")
    printed = capsys.readouterr().out
    assert "| active layers | which | parameters | GMAC | WER | CER | RTF |" in printed
    for suffix in ("json", "csv", "md", "png", "svg", "errors.npz"):
        assert (checkpoint / f"depth_report.{suffix}").stat().st_size > 0
    first = hf_dld.DepthReport.from_json(checkpoint / "depth_report.json")
    assert (first.dataset, first.dataset_config, first.split) == (Path(corpus).name, None, "test")
    assert first.name == "tiny" and first.utterances == 5 and [row.num_active_layers for row in first.rows] == [1, 4]

    output = tmp_path / "random"
    report("--depths", "1", "--selection", "random", "--draws", "2", "--output", str(output), "--streaming")
    second = output / "depth_report_random.json"
    assert len(hf_dld.DepthReport.from_json(second).rows[0].draws) == 2
    capsys.readouterr()
    main(["compare", str(checkpoint / "depth_report.json"), str(second), "--plot", str(tmp_path / "plot.svg")])
    printed = capsys.readouterr().out
    assert "(random/depth_report_random): WER" in printed and (tmp_path / "plot.svg").stat().st_size > 0
    assert "| difference (95% interval) | p |" in printed
    values = json.loads(second.read_text())
    second.write_text(json.dumps({**values, "errors_file": None}))
    main(["compare", str(checkpoint / "depth_report.json"), str(second)])
    assert "difference" not in capsys.readouterr().out
    second.write_text(json.dumps({**values, "errors_file": "gone.npz"}))  # as it comes from the Hub
    main(["compare", str(checkpoint / "depth_report.json"), str(second), "--plot", str(tmp_path / "again.svg")])
    assert "cannot be said: " in capsys.readouterr().out and (tmp_path / "again.svg").exists()


def test_streams_of_two_splits(checkpoint, corpus, tmp_path, monkeypatch):
    """A stream has no fingerprint that would tell it from another one."""
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *names: tmp_path.joinpath("assets", *names))
    shutil.copytree(corpus, tmp_path / "corpus")
    (tmp_path / "corpus/test").rename(tmp_path / "corpus/other")
    for split, folder in (("test", corpus), ("other", tmp_path / "corpus")):
        options = ["--depths", "1", "--timed_utterances", "0", "--streaming", "--output", str(tmp_path / split)]
        main(["report", str(checkpoint), "--dataset", str(folder), "--split", split, *options])
    one, two = (hf_dld.DepthReport.from_json(tmp_path / split / "depth_report.json") for split in ("test", "other"))
    assert one.rows == two.rows
    lines = (tmp_path / "corpus/other/metadata.csv").read_text().splitlines(keepends=True)
    (tmp_path / "corpus/other/metadata.csv").write_text("".join(lines[:-1]))
    with pytest.raises(
        ValueError, match=r"not the one that the cache counted .*Give another cache_dir, or delete .*assets"
    ):
        main(["report", str(checkpoint), "--dataset", str(folder), "--split", split, *options])


def test_careless_arguments(report, corpus, tmp_path):
    with pytest.raises(ValueError, match="from 1 to 4.*; got 5"):
        report("--depths", "5")
    with pytest.raises(SystemExit, match="someone/model is not a folder to write the report to: give --output"):
        main(["report", "someone/model", "--dataset", corpus])
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SystemExit, match="is a bert model, not one of"):
        main(["report", str(tmp_path), "--dataset", corpus])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json holds no depth report"):
        main(["compare", str(tmp_path / "other.json")])
