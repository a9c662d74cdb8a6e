"""The depth report's files, tables and figures."""

import csv
import json
from dataclasses import replace

import pytest

from hf_dld import DepthReport
from hf_dld.evaluation import DepthDraw, DepthRow, compare_markdown, plot_depths


@pytest.fixture
def report():
    rows = [
        DepthRow(1, [0], 1_000_000, 0.4, 0.2, [0.35, 0.45], [0.1, 0.3], 2.0, 0.05, 0.1, 0.2, 0.3, 50.0),
        DepthRow(4, [0, 1, 2, 3], 4_000_000, 0.1, 0.05, [0.08, 0.12], [0.04, 0.06], 3.5, 0.1, 0.2, 0.4, 0.6, 80.0),
    ]
    sizes = {"characters": 500, "audio_s": 7200.0, "confidence": 0.95, "cost_audio_s": 10.0}
    return DepthReport("tiny", "even", 10, 100, "batches of 16", rows, **sizes, conditions={"threads": 1})


def test_json(report, tmp_path):
    report.rows[0].draws = [DepthDraw([0], 0.3, 0.1), DepthDraw([1], 0.5, 0.3)]
    report.to_json(tmp_path / "report.json")
    again = DepthReport.from_json(tmp_path / "report.json")
    assert again == report
    assert again.row(1).wer_deviation == pytest.approx(0.1414, abs=1e-4)


def test_json_of_before_there_were_intervals_and_costs(tmp_path):
    row = {"num_active_layers": 2, "active_layers": [0, 3], "parameters": 7016, "wer": 0.5, "cer": 0.25}
    old = {"name": "old", "layer_selection": "even", "utterances": 5, "words": 9, "batch_policy": "", "rows": [row]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    report = DepthReport.from_json(tmp_path / "old.json")
    assert report.row(2) == DepthRow(2, [0, 3], 7016, 0.5, 0.25)
    header, _, line = report.to_markdown().splitlines()[:3]
    assert header == "| active layers | which | parameters | WER | CER |"
    assert line == "| 2 | 0 3 | 0.01 M | 50.0 % | 25.0 % |"
    plot_depths([report], tmp_path / "old.png")
    with pytest.raises(ValueError, match="the report 'old' has no gmac_per_s: evaluate again"):
        plot_depths([report], tmp_path / "old.png", against="gmac_per_s")


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"rows": [{"wer": 1}]}', '{"rows": []}'])
def test_json_of_something_else(content, tmp_path):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match="report.json holds no depth report"):
        DepthReport.from_json(tmp_path / "report.json")


ROW = {"num_active_layers": 1, "active_layers": [0], "parameters": 9, "wer": 0.5, "cer": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 3}, "the report.rows must be .*; it is 3"),
        ({"words": "many"}, "the report.words must be int; it is 'many'"),
        ({"rows": [{**ROW, "wer": None}]}, "wer must"),
        ({"audio_s": 10**400}, "the report.audio_s must be float"),
        ({"words": 10**400}, "the report.words must be int"),
        ({"notes": []}, "the report has the unknown field 'notes'"),
    ],
)
def test_fields_of_another_kind_are_named(report, change, message, tmp_path):
    report.to_json(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**stored, **change}))
    with pytest.raises(ValueError, match=f"report.json holds no depth report: .*{message}"):
        DepthReport.from_json(tmp_path / "report.json")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"1" * 5000])
def test_what_no_reader_of_json_survives(content, tmp_path):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ValueError, match="report.json holds no depth report: not JSON"):
        DepthReport.from_json(tmp_path / "report.json")


def test_unknown_depth(report):
    with pytest.raises(ValueError, match=r"the report 'tiny' has no depth 2; it has \[1, 4\]"):
        report.row(2)


def test_csv(report, tmp_path):
    report.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["wer"] for line in lines] == ["0.4", "0.1"]
    assert (lines[1]["wer_low"], lines[1]["wer_high"], lines[1]["active_layers"]) == ("0.08", "0.12", "0 1 2 3")
    assert lines[0]["name"] == "tiny" and lines[0]["memory_mb"] == "50.0" and lines[0]["wer_deviation"] == ""


def test_markdown(report):
    lines = report.to_markdown().splitlines()
    assert lines[3] == (
        "| 4 | 0 1 2 3 | 4.00 M | 3.5 | 10.0 % (8.0 to 12.0) | 5.0 % (4.0 to 6.0) "
        "| 0.1 | 0.2 s / 0.4 s / 0.6 s | 80 MB |"
    )
    notes = "\n".join(lines[4:])
    for note in ("10 utterances, 100 words, 2.00 h", "batches of 16", "95% intervals", "of 10 s", "threads: 1"):
        assert note in notes


def test_comparison(report):
    other = replace(report, name="other", rows=report.rows[1:])
    table = compare_markdown([report, other]).splitlines()
    assert table[0] == "| active layers | parameters | tiny: WER | tiny: CER | other: WER | other: CER |"
    assert table[2] == "| 1 | 1.00 M | 40.0 % | 20.0 % |  |  |"
    assert table[3] == "| 4 | 4.00 M | 10.0 % | 5.0 % | 10.0 % | 5.0 % |"


@pytest.mark.parametrize("against", ["num_active_layers", "gmac_per_s"])
def test_plots(report, against, tmp_path):
    for suffix in ("png", "svg"):
        plot_depths([report, replace(report, name="other")], tmp_path / f"plot.{suffix}", "title", against=against)
        assert (tmp_path / f"plot.{suffix}").stat().st_size > 5000


def test_careless_plots(report, tmp_path):
    with pytest.raises(ValueError, match="against='time' must be one of"):
        plot_depths([report], tmp_path / "plot.png", against="time")
    with pytest.raises(ValueError, match="no report to plot"):
        plot_depths([], tmp_path / "plot.png")
    for name in ("plot", "plot.txt"):
        with pytest.raises(ValueError, match=f"{name} is no name for a figure: it must end in .png, .svg"):
            plot_depths([report], tmp_path / name)
    assert not [*tmp_path.iterdir()]
