# Needs make, and python3 (3.11 or newer) with its venv module, or uv, which brings a Python where there is none.
#   make setup EXTRAS=cuda13       for an NVIDIA GPU: the pinned versions, with that extra (dev,cuda13: several)
#   make test PYTHON=python3.12    another Python; a .venv of a different version is then made anew
#   make test VENV=.venv-3.12      another folder for it

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
WORKERS ?= 2
SLOW ?=
PRESET ?= cpu
ARGS ?=

python := $(VENV)/bin/python
installed := $(VENV)/.installed-$(EXTRAS)
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

ifeq ($(origin PYTHON),file)
candidates := $(python) $(PYTHON) python3.13 python3.12 python3.11
else
candidates := $(PYTHON)
ifneq ($(call version,$(PYTHON)),$(call version,$(python)))
renew := renew
endif
endif

.PHONY: help setup demo speedrun test lint format clean renew

help:  ## list the targets
	@echo "EXTRAS=cuda13 installs for an accelerator, PYTHON=python3.12 takes another Python, VENV=DIR another folder"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(installed)  ## make .venv, install the pinned versions; EXTRAS=cuda13 (cuda12, tpu, dev,wandb …)

demo: $(installed)  ## train a tiny chat model from nothing and score it (minutes on a CPU)
	$(python) -m launch.demo $(ARGS)

speedrun: $(installed)  ## a whole run, resumable; PRESET=cpu (laptop, h100, 8xh100 …), ARGS="--dry_run"
	$(python) -m launch.speedrun --preset=$(PRESET) $(ARGS)

test: $(installed)  ## the fast tests; SLOW=1 for all tests, ARGS="-k tokenizer" to choose
	$(python) -m pytest $(if $(SLOW),,-m "not slow") -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(installed)  ## ruff: errors and format
	$(python) -m ruff check
	$(python) -m ruff format --check

format: $(installed)  ## let ruff fix what it can
	$(python) -m ruff check --fix
	$(python) -m ruff format

clean:  ## remove the venv and the tests' compilation cache
	rm -rf $(VENV) .cache "$${XDG_CACHE_HOME:-$$HOME/.cache}/jaxchat-tests"

# The first candidate that is new enough makes the venv; a venv of another version is never installed into.
$(installed): pyproject.toml constraints.txt $(renew)
	@set -e; found=; \
	for candidate in $(candidates); do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ] && [ "$(origin PYTHON)" = file ] && command -v uv >/dev/null; then found=3.12; fi; \
	if [ -z "$$found" ]; then \
	    echo "error: no Python 3.11 or newer among: $(candidates). Install one (on Ubuntu 22.04, which has 3.10, by uv:" >&2; \
	    echo "docs/install.md), or say where it is: make $(MAKECMDGOALS) PYTHON=..." >&2; \
	    exit 1; \
	fi; \
	if command -v uv >/dev/null; then \
	    if [ -n "$(renew)" ] || [ ! -x $(python) ]; then \
	        uv venv --clear --python "$$(command -v $$found || echo $$found)" $(VENV); \
	    fi; \
	    uv pip install --python $(python) -c constraints.txt -e '.[$(EXTRAS)]'; \
	else \
	    if [ -n "$(renew)" ] || ! $(python) -m pip --version >/dev/null 2>&1; then \
	        $$found -m venv --clear $(VENV) || { echo "error: this Python has no venv: sudo apt install python3-venv" >&2; exit 1; }; \
	    fi; \
	    $(python) -m pip install --no-compile -c constraints.txt -e '.[$(EXTRAS)]'; \
	fi; \
	touch $@
