# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer and nothing else installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A process for each core, and a core for each process; the tests of a file share what they prepare.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
SOURCES := siss_diffusers train_siss_unconditional.py train_siss_sd.py benchmarks examples tests setup.py

.PHONY: demo demo-flow demo-unconditional demo-audit test test-full bench gpu-check style quality clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo_sd.py

demo-flow: $(INSTALLED)
	$(BIN)/python examples/demo_sd.py --flow

demo-unconditional: $(INSTALLED)
	$(BIN)/python examples/demo_unconditional.py

demo-audit: $(INSTALLED)
	$(BIN)/python examples/demo_audit.py

test: $(INSTALLED)
	$(PYTEST) -m "not slow and not gpu"

test-full: $(INSTALLED)
	$(PYTEST) -m "slow and not gpu"

bench: $(INSTALLED)
	$(BIN)/python benchmarks/step_cost.py

gpu-check: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_check/check.py

style: $(INSTALLED)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

clean:
	rm -rf $(VENV) outputs build *.egg-info

$(INSTALLED): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
