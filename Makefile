# `make help` lists what there is. Needs Python 3.11-3.13; PYTHON=python3.12 chooses one.
PYTHON ?= python3
VENV   ?= .venv
WORKERS ?= 2
PIP_FLAGS ?= --quiet --disable-pip-version-check
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format bench bench-dp bench-journal bench-deployment clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo  ## Make the environment and fine-tune one model across six simulated banks (ε = 8)
	HF_HUB_OFFLINE=1 $(BIN)/fedtune simulate

test: $(VENV)/.dev  ## Run the fast tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.dev  ## Run every test, the slow ones too
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow or not slow"

lint: $(VENV)/.dev  ## Check style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench  ## Run the simulation benchmark against Flower's Ray engine
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.simulation

bench-dp: $(VENV)/.dev  ## Run the benchmark of the private step against PEFT, Opacus and functorch
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.dp_step

bench-journal: $(VENV)/.dev  ## Run the benchmark of the journal against SQLite and a plain file
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.journal

bench-deployment: $(VENV)/.dev  ## Run the benchmark of large adapters and short rounds against stock Flower
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.deployment

clean:  ## Remove the environment and caches
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "fedtune needs Python 3.11, 3.12 or 3.13; choose one with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: a machine that has a CPU build at hand takes it, and nothing below asks for another.
$(VENV)/.torch: $(BIN)/python constraints.txt
	@echo "installing torch ..."
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing fedtune ..."
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "installing fedtune and what its tests need ..."
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[demo,dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[demo,dev,ray]'
	@touch $@
