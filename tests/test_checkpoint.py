"""The checkpoint that the repository carries loads, runs at every depth, and does what the README says of it."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCTC, AutoProcessor, pipeline

import hf_dld
from hf_dld.evaluation import DepthReport, evaluate_depths, paired_differences

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "spoken_digits"
DIGITS = set("zero one two three four five six seven eight nine".split())


def test_readme_shows_its_depth_reports():
    report, cut = (DepthReport.from_json(CHECKPOINT / f"{name}depth_report.json") for name in ("", "static/"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace(" %", "%")
    for depth in (1, 2, 3, 4, 6, 8, 12):
        row = report.row(depth)
        cells = f"{depth} | {row.parameters / 1e6:.2f} M | {cut.row(depth).wer:.1%} | {row.wer:.1%}"
        assert f"| {cells} |" in readme


def test_the_pipeline_says_digits_at_every_depth():
    asr = pipeline("automatic-speech-recognition", model=str(CHECKPOINT), num_active_layers=3)
    assert isinstance(asr.model, hf_dld.DLDWavLMForCTC)
    clip = ROOT / "examples/corpora/spoken_commands/test/test_0000.ogg"  # "open the office door at twenty"
    texts = [asr(str(clip), num_active_layers=k)["text"] for k in range(1, 13)]
    assert all(texts)
    assert set(" ".join(texts).split()) <= DIGITS


def test_its_searched_layers_run_where_they_are_asked_for():
    model = AutoModelForCTC.from_pretrained(CHECKPOINT, layer_selection="schedule", num_active_layers=3)
    report = DepthReport.from_json(CHECKPOINT / "depth_report_schedule.json")
    assert list(model.active_layers) == list(report.row(3).active_layers) == model.config.depth_schedule[2]
    assert AutoModelForCTC.from_pretrained(CHECKPOINT, num_active_layers=3).active_layers == (0, 6, 11), "evenly spaced"


def test_its_errors_can_be_compared_with_the_static_model_s():
    differences = paired_differences(CHECKPOINT / "static" / "depth_report.json", CHECKPOINT / "depth_report.json")
    assert [row.num_active_layers for row in differences] == [*range(1, 13)]
    assert all(row.verdict == "better" for row in differences)


@pytest.mark.data
def test_it_hears_digits(real_speech, tmp_path):
    command = [sys.executable, ROOT / "examples/corpora/join_digits.py", "--source", real_speech("spoken_digits")]
    command += ["--output", tmp_path / "digits", "--utterances", "1", "1", "100", "--babble_snr_db", "5", "20"]
    subprocess.run(command, check=True)
    model, processor = AutoModelForCTC.from_pretrained(CHECKPOINT), AutoProcessor.from_pretrained(CHECKPOINT)
    speech = hf_dld.load_speech_dataset(tmp_path / "digits", split="test")
    utterances, _ = hf_dld.prepare_dataset(speech, processor, model._get_feat_extract_output_lengths)
    measured = evaluate_depths(model, utterances, processor, [3, 12], timed_utterances=0)
    reported = DepthReport.from_json(CHECKPOINT / "depth_report.json")
    for depth in (3, 12):
        low, high = measured.row(depth).wer_interval
        assert low <= reported.row(depth).wer <= high
