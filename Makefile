# `make demo` and `make test` are all a newcomer needs; both work from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

.PHONY: demo test test-slow lint interop clean

# PyTorch first and by its version: a CPU build found by pip is taken, and nothing later replaces it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/ctp run recipes/quickstart.yaml

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check ctp_cli kernels tests benchmarks
	$(BIN)/ruff format --check ctp_cli kernels tests benchmarks
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m slow

# Foreign readers, each in a cached environment of its own; several gigabytes on the first run.
interop: $(VENV)/.installed-dev
	$(BIN)/python tests/interop/run.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
