# Every target makes .venv when it is missing. On a fresh machine: Python 3.11, make, and nothing else.
PYTHON ?= python3.11
PIP = .venv/bin/pip install --quiet --constraint constraints.txt

BENCHMARKS = inference breakdown training_step epoch loading onnx_export latency_prediction colld_step data_loading compile

.PHONY: quickstart test quality style benchmark

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first and pinned: resolved together with the rest, pip may take a build with gigabytes of CUDA libraries
.venv/installed: .venv/bin/python setup.cfg pyproject.toml constraints.txt
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) --editable ".[test,quality]"
	touch $@

## the main job on the corpus that the repository embeds: teacher, dynamic student, table, plot, transcriptions
quickstart: .venv/installed
	.venv/bin/python examples/run_dld_ctc.py examples/quickstart.yaml

## all tests, in two processes (with --fail-under, slipcover 1.1.0 prints of them only where it merges)
test: .venv/installed-test
	.venv/bin/python -m slipcover --source hf_dld --json --out .coverage.json \
		-m pytest -n 2 --dist loadfile --no-loadscope-reorder
	.venv/bin/python -m slipcover --skip-covered --fail-under 90 --merge .coverage.json --out .coverage.json

## every benchmark beside stock models, as Markdown tables
benchmark: .venv/installed-test
	for script in $(BENCHMARKS); do .venv/bin/python benchmarks/$$script.py || exit 1; done

## formatting and lint, checked
quality: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

## formatting and lint, mended
style: .venv/installed-test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
