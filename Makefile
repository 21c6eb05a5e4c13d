# make quickstart: set up, then train a TokenFormer on real text (two and a half minutes); quickstart-vision: on images (one).
# make test: set up, then run all tests; test-quick: those of single parts, in a minute or so, while you work.
PYTHON ?= python3
BIN := .venv/bin
CONFIG := configs/language/quickstart.yaml

# Tests on all cores, a file in one process; the first files are those that take long.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: help setup quickstart quickstart-vision test test-quick study-smoke lint types bench bench-check clean
help:
	@sed -n '1,2s/^# //p' Makefile
	@echo "also: make study-smoke | lint | types | bench | bench-check | clean"

setup: .venv/done
.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/tokenformer fit --config $(CONFIG)

quickstart-vision: setup
	$(BIN)/tokenformer fit --config configs/vision/quickstart.yaml

test: setup
	$(PYTEST)

test-quick: setup
	$(PYTEST) --ignore tests/integration --ignore tests/benchmarks -k 'not importing and not in_the_interpreter'

# Each cell of all studies with a few steps.
study-smoke: setup
	$(BIN)/python -m studies smoke

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks

bench-check: setup
	$(BIN)/python -m benchmarks --check

clean:
	rm -rf .venv runs data *.egg-info
