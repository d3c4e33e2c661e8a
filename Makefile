PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Packages are installed without bytecode. It is written when a module is first imported, even where
# the environment forbids it: otherwise every process of the tests compiles JAX from source.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo check test test-slow test-lowest bench docs clean

demo: $(VENV)/.demo
	$(BIN)/ttame demo --output demo

# Fast checks to run between edits: format, lint, types, the import contract, quick tests.
check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/pytest -m quick

test: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/pytest

# Parity at full size, timings and processes of which `make test` has smaller cases.
test-slow: $(VENV)/.dev
	$(BIN)/pytest -m slow

# The demo needs neither PyTorch nor TensorFlow.
$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable '.[demo]'
	touch $@

# Reinstalls only when the dependencies change.
$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable '.[docs]'
	touch $@

# The oldest versions that pyproject.toml allows, without PyTorch and TensorFlow: training,
# explaining and evaluating.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/uv pip compile --quiet --resolution lowest-direct --extra demo \
		pyproject.toml --output-file .venv-lowest/versions.txt
	.venv-lowest/bin/pip install --quiet -r .venv-lowest/versions.txt hypothesis pytest pytest-timeout pytest-xdist
	.venv-lowest/bin/pip install --quiet --no-deps --editable .
	.venv-lowest/bin/python -m pytest tests/training/test_step.py tests/training/test_loop.py \
		tests/test_explainer.py tests/test_cli.py tests/metrics/test_evaluation.py

# Speed on this machine, written to docs/benchmarks.md; DEVICE=cuda or tpu for another device.
DEVICE ?= cpu
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/report.py --device $(DEVICE)

# The documentation site, docs/_build/html/index.html.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going docs docs/_build/html

clean:
	rm -rf $(VENV) .venv-lowest demo docs/_build
