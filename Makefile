# Everything runs in .venv, which is made on first use and brought up to date when a requirements file changes.
# `make help` lists the targets; `make PYTHON=/path/to/python3.12 ...` chooses the interpreter for .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# An interrupted installation is begun again.
.DELETE_ON_ERROR:

BIN := .venv/bin
USER_REQUIREMENTS := requirements.txt requirements-base.txt requirements-mxnet.txt
DEV_REQUIREMENTS := requirements-dev.txt requirements-torch.txt requirements-onnx.txt $(USER_REQUIREMENTS)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# In the order of preference; releases outside 3.10 to 3.12 lack wheels of numpy 1.26 or PyTorch.
PYTHON ?= python3.11 python3.12 python3.10 python3
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
IMPORT_MXNET := import errors, importlib; \
	raise SystemExit(errors.run_command(lambda: importlib.import_module("mxnet_compat") and 0))

.PHONY: help demo test lint format bench clean distclean

help: ## list the targets
	@sed -nE 's/^([a-z]+):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: .venv/.installed ## train, stop, resume and draw curves on the embedded data (under 4 minutes)
	$(BIN)/python demo.py

test: lint ## lint, then run the tests (PYTEST_ARGS adds to pytest's arguments)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/.installed-dev ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed-dev ## fix style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed-dev ## run every benchmark in turn; each says what it measured and how
	@for file in $$(ls benchmarks | grep -E '^[a-z]\w*\.py$$'); do \
		echo "== python -m benchmarks.$${file%.py}"; \
		$(BIN)/python -m "benchmarks.$${file%.py}"; \
	done

clean: ## remove caches and what the demo made
	rm -rf demo_run .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## clean, and remove .venv
	rm -rf .venv

.venv/bin/python:
	@for candidate in $(PYTHON); do \
		if "$$candidate" -c '$(SUPPORTED)' 2>/dev/null; then \
			echo "Creating .venv with $$("$$candidate" --version)"; \
			exec "$$candidate" -m venv .venv; \
		fi; \
	done; \
	echo "error: none of these is a Python from 3.10 to 3.12, which MXNet 1.9.1 and PyTorch need: $(PYTHON);" \
		"install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

.venv/.installed: $(USER_REQUIREMENTS) | .venv/bin/python
	@echo "Installing requirements.txt into .venv (a few minutes the first time)"
	@$(PIP_INSTALL) -r requirements.txt
	@$(BIN)/python -c '$(IMPORT_MXNET)'
	@touch $@

.venv/.installed-dev: $(DEV_REQUIREMENTS) | .venv/bin/python
	@echo "Installing requirements-dev.txt into .venv (a few minutes the first time)"
	@$(PIP_INSTALL) -r requirements-dev.txt
	@$(BIN)/python -c '$(IMPORT_MXNET)'
	@touch .venv/.installed $@
