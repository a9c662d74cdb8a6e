"""`python -m hf_dld search` on a tiny checkpoint."""

import csv
import json

import numpy as np
import pytest
import soundfile
from conftest import make_dynamic, make_stock

from hf_dld import DLDWavLMForCTC, build_character_processor
from hf_dld.__main__ import main


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    make_dynamic("wavlm-stable").save_pretrained(folder)
    build_character_processor(["abcdefghi"]).save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    generator = np.random.default_rng(0)
    folder = tmp_path / "corpus" / "validation"
    folder.mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription"])
        for index in range(4):
            soundfile.write(folder / f"{index}.wav", 0.1 * generator.standard_normal(6000), 16_000)
            writer.writerow([f"{index}.wav", "abc"])
    return folder.parent


@pytest.mark.parametrize("objective", ["ctc", "kl"])
def test_schedule_goes_into_the_config(objective, checkpoint, corpus, capsys):
    if objective == "kl":  # transcripts are not even looked for
        metadata = corpus / "validation" / "metadata.csv"
        metadata.write_text("".join(line.split(",")[0] + "\n" for line in metadata.read_text().splitlines()))
    before = json.loads((checkpoint / "config.json").read_text())
    files = {path.name for path in checkpoint.iterdir()}
    command = ["search", str(checkpoint), "--dataset", str(corpus), "--objective", objective]
    main([*command, "--batch_size", "2"])
    printed = capsys.readouterr().out
    assert f"{objective} on 4 utterances of 'validation'" in printed and "| 4 | 0 1 2 3 |" in printed
    assert "a count of layers now means these layers (layer_selection was 'even')" in printed
    after = json.loads((checkpoint / "config.json").read_text())
    found = json.loads((checkpoint / "depth_schedule.json").read_text())
    assert after == {**before, "layer_selection": "schedule", "depth_schedule": found["layers"]}
    assert {path.name for path in checkpoint.iterdir()} == files | {"depth_schedule.json"}
    loaded = DLDWavLMForCTC.from_pretrained(checkpoint, num_active_layers=2)
    assert loaded.active_layers == tuple(found["layers"][1])

    main([*command, "--batch_size", "2"])
    assert "(layer_selection was 'schedule', depth_schedule was the same)" in capsys.readouterr().out


def test_layers_that_a_checkpoint_names_stay(checkpoint, corpus, capsys):
    model = DLDWavLMForCTC.from_pretrained(checkpoint)
    model.set_active_layers([1, 3])
    model.save_pretrained(checkpoint)
    (checkpoint / "depth_report.json").write_text("{}")
    main(["search", str(checkpoint), "--dataset", str(corpus)])
    printed = capsys.readouterr().out
    assert "As before, the checkpoint runs layers [1, 3] unless" in printed
    assert "depth_report.json may still tell of the layers as they were: evaluate the depths again." in printed


def test_checkpoints_that_cannot_take_a_schedule(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.config\.json is not there: give the folder of a dynamic"):
        main(["search", str(tmp_path / "nowhere"), "--dataset", "corpus"])
    make_stock("wavlm").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'wavlm' checkpoint, which cannot store a choice of layers"):
        main(["search", str(tmp_path), "--dataset", "corpus"])
