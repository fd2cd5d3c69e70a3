# Every target sets up what it needs in .venv; nothing else on the machine is touched.
# PYTHON chooses the interpreter (3.11 or newer): make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test audit test-slow test-faults test-soak test-gpu lint types bench conf clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.run  ## Train, export, sign, verify and use a model: the whole line, offline
	$(BIN)/lepton-fed demo --out demo

# A file's tests stay together: they share what it starts.
test: $(VENV)/.dev  ## Run the tests but for the slow ones
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile -m "not slow and not gpu and not faults and not soak and not audit"

audit: $(VENV)/.dev  ## Audit the training: sound runs pass, planted faults are found (under a minute)
	$(BIN)/python -m pytest -m audit tests/attacks

test-slow: $(VENV)/.dev  ## Run the slow tests
	$(BIN)/python -m pytest -m slow

test-faults: $(VENV)/.dev  ## Kill, starve and cut off real processes (some 20 minutes)
	$(BIN)/python -m pytest -m faults tests/faults

test-soak: $(VENV)/.dev  ## Let random faults happen for 200 rounds: nothing may be lost or grow (some 20 minutes)
	$(BIN)/python -m pytest -m soak tests/soak

test-gpu: $(VENV)/.dev  ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.dev  ## Check style, formatting and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(VENV)/.dev  ## Check types
	$(BIN)/mypy

bench: $(VENV)/.dev  ## Run the benchmarks
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.aggregation
	$(BIN)/python -m benchmarks.dp_engines
	$(BIN)/python -m benchmarks.simulation
	$(BIN)/python -m benchmarks.federation
	$(BIN)/python -m benchmarks.secagg
	$(BIN)/python -m benchmarks.dp_noise
	$(BIN)/python -m benchmarks.dp_accounting
	$(BIN)/python -m benchmarks.dp_accuracy
	$(BIN)/python -m benchmarks.dp_orders
	$(BIN)/python -m benchmarks.distributed_noise
	$(BIN)/python -m benchmarks.attacks

conf: $(VENV)/.dev  ## Write conf/*.yaml and docs/reference/conf.md anew from the schema
	$(BIN)/python -m lepton_fed.config.generated

clean:  ## Remove what the targets made
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "lepton-fed needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: it decides between its CPU and CUDA builds, and the rest then takes what is there.
$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --editable '.[dev]'
	@touch $@
