# make demo    set up .venv and run all commands, from data to generated text, on a CPU
# make test    set up .venv and run the tests
# make test-slurm    the tests that need a Slurm (of two nodes with ranks on their processors)
# make lint    ruff and mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR := runs/demo

.PHONY: setup demo test test-slurm lint clean

setup: $(VENV)/.ready

# Everything is pinned by constraints.txt; the package itself is installed in place.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is %s; set PYTHON=..." % sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[test]'
	@touch $@

demo: setup
	$(BIN)/python -m launch.demo $(DEMO_DIR)

test: setup
	$(BIN)/python -m pytest -m "not slow" --durations=10

test-slurm: setup
	$(BIN)/python -m pytest -m slurm --durations=0 tests/slurm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
