# Two commands to begin with: `make quickstart`, `make test`. Each creates .venv, or reuses it.
#   make quickstart PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
RANKS := 2
CORES := $(shell getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS ?= $(shell expr \( $(CORES) + $(RANKS) - 1 \) / $(RANKS))
# Tests spend half of their time waiting for processes and disks, so there are two workers per core, of
# up to 3 GB each. A worker takes tests in order, whose files share fixtures; idle workers take some over.
WORKERS ?= $(shell expr 2 \* $(CORES) \| 2)
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: install quickstart test test-all lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	@touch $@

quickstart: install
	$(VENV)/bin/resnet-dist prepare digits data/digits
	$(VENV)/bin/resnet-dist train configs/quickstart.yaml --ranks $(RANKS)

test: install
	$(PYTEST) -m "not slow"

# GPU tests cannot share a process with the others, which hide the GPUs.
test-all: test
	$(PYTEST) -m slow
	@if $(VENV)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(VENV)/bin/python benchmarks/gpu_tests.py; fi

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
