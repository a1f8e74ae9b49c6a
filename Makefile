# Each target sets up what it needs: a virtual environment in $(VENV) with this package and an extra's packages.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all lint bench hub-configs clean

demo: $(VENV)/.with-demo
	$(BIN)/timm-eca demo $(ARGS)

test: $(VENV)/.with-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/.with-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' $(ARGS)

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
