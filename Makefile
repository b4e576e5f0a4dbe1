# The two commands: `make demo` and `make test`. Each sets up what it needs, once, in .venv and .devnet.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Test processes at once: with more on two cores, Ray's own start runs into its fixed time limit.
AT_ONCE ?= 2

.PHONY: help setup demo test lint unit chart chart-tools chart-test programs integration docs lock clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@echo "==> setting up $(VENV) (a few minutes the first time, nothing afterwards)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; set PYTHON=/path/to/python3.11 or newer"; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "==> installing the operator, the devnet and the test tools"
	@# Most modules that are installed are never imported; Python compiles those that are.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[devnet,test]'
	@touch $@

setup: $(STAMP)  ## create .venv and install everything, the devnet's EVM and tiny models included
	@$(BIN)/python -m devnet.anvil install
	@$(BIN)/python -m devnet.models .devnet/models

demo: setup  ## run the main job on the embedded devnet: tasks from chain to paid
	@$(BIN)/crynux-cluster devnet demo

test: setup lint unit chart-test integration  ## linters, types and all tests

lint: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

unit: $(STAMP)  ## unit tests: no sockets, no ray
	@$(BIN)/python -m pytest tests/unit -q -n $(AT_ONCE)

chart-tools: $(STAMP)
	@$(BIN)/python -m tests.chart.tools
	@$(BIN)/python -m tests.prometheus_tools

chart-test: chart-tools  ## the Helm chart: rendered by real Helm 3 and 4, validated, judged; no cluster
	@$(BIN)/python -m pytest tests/chart -q -n $(AT_ONCE)

chart: chart-tools  ## package the Helm chart into dist/, with rules and dashboards in it
	@$(BIN)/python -m tests.chart.tools package dist

programs: $(STAMP)
	@$(BIN)/python -m tests.debian
	@$(BIN)/python -m tests.prometheus_tools
	@$(BIN)/python -m tests.redis_tools

integration: setup programs chart-tools  ## integration tests: a real EVM, Ray, Serve, HTTP servers, diffusers
	@$(BIN)/python -m pytest tests/integration tests/chaos -q -n $(AT_ONCE) --dist loadgroup --durations=25

docs: $(STAMP)  ## write what is made by code: docs/lifecycle.md, Grafana's dashboards, the chart's schema
	@$(BIN)/python docs/generate.py
	@$(BIN)/python configs/grafana/generate.py
	@$(BIN)/python -m helm.schema.generate

lock: $(STAMP)  ## resolve again what the images are installed from (requirements/*.txt)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@PATH="$(BIN):$$PATH" $(BIN)/python requirements/lock.py

clean:  ## remove what the devnet and the demo left behind (not .venv)
	rm -rf .devnet/run demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
