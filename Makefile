# Two commands do everything from a fresh clone: `make quickstart` and `make test`.
# Python 3.11+ and make are all a machine needs; environments stay inside the checkout.
PYTHON ?= python3
BIN := .venv/bin
RUNTIMES := .venv-runtimes/bin
# Tests spend their time compiling, which takes one core: two processes, a file of tests in each at a time. If one of
# them crashes the run ends (with a new one in its place, it would wait for ever).
PYTEST := -m pytest -n 2 --dist loadfile --max-worker-restart 0

.PHONY: env quickstart test test-default test-slow test-runtimes lint clean
.DEFAULT_GOAL := env

env: .venv/.done

.venv/.done: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lowbit needs Python 3.11 or later, found " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# The other runtimes that exports are checked against: torch + transformers, llama.cpp. The first time, llama.cpp is
# compiled (about 8 minutes on two cores); pip keeps the wheel.
.venv-runtimes/.done: requirements.txt requirements-runtimes.txt pyproject.toml
	$(PYTHON) -m venv .venv-runtimes
	$(RUNTIMES)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUNTIMES)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-runtimes.txt
	$(RUNTIMES)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

quickstart: env
	$(BIN)/lowbit run experiments/quickstart.py $(ARGS)

# In CI the longer checks and the real runtimes run too.
ifdef CI
test: test-default test-slow test-runtimes
else
test: test-default
endif

test-default: env lint
	$(BIN)/python $(PYTEST)

test-slow: env
	$(BIN)/python $(PYTEST) -m slow

test-runtimes: .venv-runtimes/.done
	$(RUNTIMES)/python $(PYTEST) -m 'transformers or llamacpp'

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-runtimes build *.egg-info
