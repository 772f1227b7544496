PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' Makefile

setup: $(VENV)/.ready  ## a virtual environment in .venv with everything (PYTHON=python3.12 to choose)

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version) is too old; jaxchat needs 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv -q --clear --python $(PYTHON) $(VENV) && uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
	  $(PYTHON) -m venv --clear $(VENV) && $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	fi
	@touch $@

test: setup  ## the fast tests
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: setup  ## the slow tests
	$(BIN)/python -m pytest -q -m slow

lint: setup  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: help setup test test-slow lint
