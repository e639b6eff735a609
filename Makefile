# Each target says what it does: `make help`. PYTHON names the Python to start from, VENV the environment that `make setup` makes.
PYTHON ?= python3
VENV ?= .venv
# A pip spec (TORCH="torch==2.12.1") instead of the torch that PYTHON sees or the tested one; more arguments for pip.
TORCH ?=
PIP_ARGS ?=
# What `make demo` draws; empty: eight examples.
PROMPT ?=
# Where `make gpu` writes its rows.
OUT ?= benchmarks/results

RUN := $(VENV)/bin/python
READY := $(VENV)/.dalle_fast_ready
export PYTHONUNBUFFERED := 1

.PHONY: help setup demo test test-long check bench gpu clean build
.DELETE_ON_ERROR:

help:
	@echo "make setup      make $(VENV)/ with dalle_fast, its extension, and what tests and demo need"
	@echo "make demo       draw: make demo PROMPT=\"a red apple\""
	@echo "make test       prove that everything works (minutes); make test-long: the slow proofs"
	@echo "make check      formatter, linter, types"
	@echo "make bench      measure, beside what else is installed"
	@echo "make gpu        GPU tests and measurements, from a bare checkout with PYTHON's own packages"
	@echo "make clean      remove what was built; not $(VENV)/"

setup: $(READY)

$(READY): setup.py pyproject.toml requirements-dev.txt tools/setup_venv.py
	@$(PYTHON) tools/setup_venv.py $(VENV) --torch="$(TORCH)" --pip-args="$(PIP_ARGS)"
	@touch $@

# Compiles what changed in csrc/, in no time where nothing did.
build: $(READY)
	@$(RUN) -m dalle_fast._build

demo: build
	@$(RUN) -m dalle_fast.cli draw $(if $(PROMPT),"$(PROMPT)")

# A process a core, one thread an op: the tests are many small ones. What depends on threads sets their number itself.
# The slowest takes a third of the time limit: what hangs fails by its name.
PYTEST := -m pytest -n auto --maxprocesses 8 --dist worksteal --timeout 900 -q --durations=10
test test-long: export OMP_NUM_THREADS ?= 1

test: build
	@echo "make test: about seven minutes on two cores (the slow proofs: make test-long)."
	@$(RUN) $(PYTEST) -m "not long and not gpu"

test-long: build
	@echo "make test-long: about 17 minutes on two cores."
	@$(RUN) $(PYTEST) -m "long and not gpu"
	@echo "make test-long: once more what make test proves, with extension and Triton blocked."
	@DALLE_FAST_TEST_BARE=1 $(RUN) $(PYTEST) -m "not long and not gpu"

check: $(READY)
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

bench: build
	@$(RUN) -m benchmarks

gpu:
	@PYTHON="$(PYTHON)" OUT="$(OUT)" tools/gpu.sh

clean:
	@rm -rf build dist *.egg-info dalle_fast/_cpu*.so .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
