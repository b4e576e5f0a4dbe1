# The two commands: `make demo` and `make test`. Each sets up what it needs, once, in .venv and .devnet.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint unit programs integration docs clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@echo "==> setting up $(VENV) (a few minutes the first time, nothing afterwards)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; set PYTHON=/path/to/python3.11 or newer"; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "==> installing the operator, the devnet and the test tools"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[devnet,test]'
	@touch $@

setup: $(STAMP)  ## create .venv and install everything, the devnet's EVM and tiny models included
	@$(BIN)/python -m devnet.anvil install
	@$(BIN)/python -m devnet.models .devnet/models

demo: setup  ## run the main job on the embedded devnet: tasks from chain to paid
	@$(BIN)/crynux-cluster devnet demo

test: setup lint unit integration  ## linters, types and all tests

lint: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

unit: $(STAMP)  ## unit tests: no sockets, no ray
	@$(BIN)/python -m pytest tests/unit -q

programs: $(STAMP)
	@$(BIN)/python -m tests.debian
	@$(BIN)/python -m tests.prometheus_tools

integration: setup programs  ## integration tests: a real EVM, Ray, Serve, HTTP servers, diffusers
	@$(BIN)/python -m pytest tests/integration tests/chaos -q

docs: $(STAMP)  ## write what is made by code: docs/lifecycle.md, configs/grafana/dashboards
	@$(BIN)/python docs/generate.py
	@$(BIN)/python configs/grafana/generate.py

clean:  ## remove what the devnet and the demo left behind (not .venv)
	rm -rf .devnet/run demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
