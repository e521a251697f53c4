# Every target does its own set-up in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test test-fast check map build clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

quickstart: $(VENV)/quickstart.done  ## cache, train, evaluate and report on real Gemma-3-270M
	$(BIN)/hsae quickstart

test: $(VENV)/dev.done  ## run all tests, the slow ones on the real model included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/dev.done  ## run the tests that need neither the real model nor minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

map: $(VENV)/dev.done  ## write docs/map.md and docs/plan.md anew
	$(BIN)/python .ci/map.py
	$(BIN)/python .ci/keys.py

check: $(VENV)/dev.done  ## format, lint and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

build: $(VENV)/dev.done  ## wheel and sdist in dist/
	rm -rf dist
	$(BIN)/python -m build

clean:  ## remove the virtual environment and build leftovers (not your results)
	rm -rf $(VENV) dist build *.egg-info

$(BIN)/python:
	@echo "== making a virtual environment in $(VENV)"
	$(PYTHON) -c 'import sys; sys.exit("hsae needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.3"

$(VENV)/%.done: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing hsae[$*] (PyTorch and a 240 MB model: minutes the first time)"
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[$*]'
	@touch $@
