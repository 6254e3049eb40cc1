# `make demo` and `make test` do all the set-up on a fresh machine; the locked versions are the tested ones.
VENV ?= .venv
PYTHON ?= python3
# Options for pip, for example an index with torch's CPU build.
PIP_ARGS ?=
BIN = $(VENV)/bin

# Many tests wait for other processes: one more at a time than there are cores.
TESTS_AT_ONCE ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count() + 1)')
MAKEFLAGS += --jobs=2

.PHONY: demo test pytest check lint types install lock clean

demo: install
	$(BIN)/twist-fl demo

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("twist_fl needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --editable .
	touch $@

# mypy takes a minute of one core, and works beside the tests.
test: types pytest

pytest: lint
	$(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder

check: lint types

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: lint
	$(BIN)/mypy

# Writes the versions that are installed now; run the tests before committing the result.
lock:
	$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+(cpu|cu[0-9]+)$$//' > requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
