PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test test-lowest bench clean

demo: $(STAMP)
	$(VENV)/bin/ttame demo --output demo

test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pytest

# Reinstalls only when the dependencies change.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

# The oldest versions that pyproject.toml allows, without PyTorch and TensorFlow: what trains,
# explains and measures.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/uv pip compile --quiet --resolution lowest-direct --extra demo \
		pyproject.toml --output-file .venv-lowest/versions.txt
	.venv-lowest/bin/pip install --quiet -r .venv-lowest/versions.txt pytest pytest-xdist
	.venv-lowest/bin/python -m pytest tests/training/test_step.py tests/training/test_loop.py \
		tests/test_explainer.py tests/test_cli.py tests/metrics/test_evaluation.py

# Speed on this machine, written to docs/benchmarks.md; DEVICE=cuda or tpu for another device.
DEVICE ?= cpu
bench: $(STAMP)
	$(VENV)/bin/python benchmarks/report.py --device $(DEVICE)

clean:
	rm -rf $(VENV) .venv-lowest demo
