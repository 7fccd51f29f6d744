# make test, make lint, make demo. The first run makes .venv from a bare Python 3.11 or newer.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/.installed
TEST_STAMP := .venv/.installed-for-tests
FOLDERS := flows tasks storage deployments

.PHONY: help install demo test lint bench soak docs typing clean

help:
	@echo "targets: demo test lint bench soak docs install clean"

install: $(STAMP)

# Redone when what is to be installed changes. PYTHON=/path/to/python chooses another interpreter.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found="$$python"; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "make: no Python 3.11 or newer with venv on the PATH; install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; \
	  fi; \
	  echo "making .venv with $$("$$found" --version)"; "$$found" -m venv .venv; \
	fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null
	$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --compile -c constraints.txt -e '.[test,examples]'
	@touch $@

# The libraries of every engine: PyTorch alone is larger than all the rest.
$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --compile -c constraints.txt -e '.[test,examples,engines]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/digits/demo.py

test: $(TEST_STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(TEST_STAMP) typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy -p holdfast

bench: $(TEST_STAMP)
	$(BIN)/python benchmarks/trials.py
	$(BIN)/python benchmarks/store.py

soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py

docs: $(STAMP)
	$(BIN)/python docs/generate.py

# A tree of links in which the package looks nested, for mypy and editors.
typing:
	@mkdir -p .typing/holdfast
	@find .typing/holdfast -maxdepth 1 -type l -delete
	@for entry in src/holdfast/*; do [ "$$(basename "$$entry")" = __pycache__ ] || ln -s "../../$$entry" .typing/holdfast/; done
	@for folder in $(FOLDERS); do ln -s "../../$$folder" .typing/holdfast/; done

# Everything but .venv and the experiments.
clean:
	rm -rf build dist *.egg-info .typing .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
