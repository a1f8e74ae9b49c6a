# Each target sets up what it needs: a virtual environment in $(VENV) with this package and an extra's packages.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One thread for each of the two workers. glibc keeps what it is given back: else the system zeroes the same pages again
# and again, a tenth of the tests' time.
TEST = OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776 $(BIN)/python -m pytest

.PHONY: demo test test-all lint bench hub-configs clean

demo: $(VENV)/.with-demo
	$(BIN)/timm-eca demo $(ARGS)

test: $(VENV)/.with-dev
	$(TEST) $(ARGS)

test-all: $(VENV)/.with-dev
	$(TEST) -m '' $(ARGS)

lint: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.with-dev
	$(BIN)/python benchmarks/overhead.py $(ARGS)
	$(BIN)/python benchmarks/complexity.py
	$(BIN)/python benchmarks/figures.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/speed.py --tail --engines eager --keep-memory --threads 1
	$(BIN)/python benchmarks/fused_report.py

hub-configs: $(VENV)/.with-dev
	$(BIN)/python hub_configs/generate.py

clean:
	rm -rf $(VENV)

# timm brings the torch and torchvision that fit each other; never install either by itself.
$(VENV)/.with-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@
