# Everything sets itself up in .venv from Python 3.11+ and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.DEFAULT_GOAL := help
# for two cores: tests of ranks and launchers wait for much of their time
WORKERS ?= 4
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help venv train assistant test test-all test-nightly test-fast check format typed bench docs clean

help:  ## Say what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	@sh tools/setup.sh "$(PYTHON)" "$(VENV)"
	@touch $(STAMP)

venv: $(STAMP)  ## Set up .venv

train: $(STAMP)  ## Train the tiny model, resume it, sample from it, export it
	@sh tools/first_run.sh "$(BIN)/python"

assistant: $(STAMP)  ## Train a small assistant: text, conversations, rewards; evaluate, export
	@sh tools/assistant.sh "$(BIN)/python"

test: check  ## Run all checks and tests, and name the slowest
	$(PYTEST) --durations 30 --durations-min 1

test-all: check  ## Run `make test` with the further cases marked `nightly`
	$(PYTEST) --nightly --durations 30 --durations-min 1

test-nightly: $(STAMP)  ## Run the cases that `make test` leaves out, and only those
	$(PYTEST) --nightly -m nightly

test-fast: $(STAMP)  ## Run the tests that are neither slow nor start ranks
	$(PYTEST) -m "not distributed and not slow"

check: $(STAMP)  ## Formatting, lint, types and import floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Put the code into the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

typed: $(STAMP)  ## Run the tests of model and operations with checked shape types
	@# checked functions hide the source of kernels from Triton, and are slow to time
	$(BIN)/python -m pytest tests/ops tests/model --ignore-glob='*/test_triton_*.py' \
		--deselect tests/ops/test_tuning.py::test_a_look_up_is_a_matter_of_a_microsecond \
		--jaxtyping-packages=nemotron.ops,nemotron.model,beartype.beartype

bench: $(STAMP)  ## Compare speed and memory with transformers
	$(BIN)/python tools/bench/models.py

docs: $(STAMP)  ## Build the pages into build/site, to be opened in a browser; links are checked
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'mkdocs>=1.6,<2' 'mkdocs-material>=9.7'
	$(BIN)/python -m mkdocs build --strict --clean

clean:  ## Remove .venv and caches; runs stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
