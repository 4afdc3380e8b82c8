# Needs python3 (3.11 or newer) and make; everything else goes into .venv (and what AsyncFlow is compared with into
# .venv-peers).

PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
# LOCK: the pinned set to install; on a machine whose nvidia-smi answers it is the CUDA one.
ifndef LOCK
LOCK := requirements/$(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu).lock
endif
# TORCH_INDEX_URL: one more package index, for machines where the CPU build of torch comes from another one.
EXTRA_INDEX := $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
PIP := DS_BUILD_OPS=0 $(BIN)/python -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.complete
# The stamp holds what was installed where. It is written last, so an interrupted setup is not complete.
STATE := $(LOCK) in $(CURDIR)
INSTALLED := $(shell cat $(STAMP) 2>/dev/null)
# A venv whose Python is gone does not run, and one that was moved has scripts that name its old place.
RUNS := $(BIN)/python -c '' 2>/dev/null && grep -qF '$(CURDIR)/$(VENV)' $(BIN)/activate
ifneq ($(shell $(RUNS) && echo yes)$(INSTALLED),yes$(STATE))
STALE := stale
endif

.DEFAULT_GOAL := help
.PHONY: help setup run test test-long test-gpu check bench peers lock stale

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(STAMP) ## Install everything into .venv (does nothing when nothing changed)
	@:

$(STAMP): $(LOCK) pyproject.toml $(STALE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'AsyncFlow needs Python 3.11 or newer: make setup PYTHON=python3.12' >&2; exit 1; }
	@# The other lock's packages would stay behind, so a venv that holds them is built anew as well.
	@if [ -n '$(INSTALLED)' -a '$(INSTALLED)' != '$(STATE)' ] || ! { $(RUNS) && $(PIP) --version >/dev/null 2>&1; }; \
		then rm -rf $(VENV); $(PYTHON) -m venv $(VENV); fi
	@rm -f $(STAMP)
	@echo 'Installing $(LOCK) into $(VENV): a few minutes and gigabytes, the first time.'
	@$(PIP) install --no-deps $(EXTRA_INDEX) -r $(LOCK)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@echo '$(STATE)' > $(STAMP)

run: setup ## Train a real language model: CONFIG=configs/quickstart.yaml
	@$(BIN)/asyncflow run $(CONFIG)

test: setup ## Run the tests (half an hour and more; WORKERS=2: on both cores, 23 minutes)
	@$(BIN)/python -m pytest -m 'not long and not gpu' $(if $(WORKERS),-n $(WORKERS) --dist loadfile)

test-long: setup ## Run the tests that take minutes to hours
	@$(BIN)/python -m pytest -m 'long and not gpu'

test-gpu: setup ## Run the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu

check: setup ## Lint, format check, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup ## Run all benchmarks (half an hour): JSON=results.json keeps the figures
	@$(BIN)/asyncflow bench $(if $(JSON),--json $(JSON))

peers: $(PEERS)/.complete ## Install what `asyncflow bench store --peer` compares with, into .venv-peers
	@:

# Scripts of a venv that was moved name its old place: it is built anew.
$(PEERS)/.complete: requirements/peers.lock $(if $(shell grep -sF '$(CURDIR)/$(PEERS)' $(PEERS)/bin/activate),,stale)
	@echo 'Installing requirements/peers.lock into $(PEERS): two minutes and 2 GB.'
	@rm -rf $(PEERS)
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip --disable-pip-version-check -qq install --no-deps $(EXTRA_INDEX) -r $<
	@touch $@

lock: ## Resolve requirements/*.lock again from pyproject.toml (needs a package index)
	@$(RUNS) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python requirements/lock.py
