# Every target sets up what it needs: `make demo` and `make test` work as the first command after a clone.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install demo serve test check bench protos clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(READY)  ## create .venv and install deltamux in it, editable

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: install  ## one frozen model, many adapters, one batch: see it work
	$(BIN)/deltamux demo

serve: install  ## serve MODEL=path-or-hub-id (ARGS='--adapter name=path ...')
	$(BIN)/deltamux serve --model $(MODEL) $(ARGS)

test: install  ## run the tests
	$(BIN)/python -m pytest

check: install  ## lint, types, import floors, protos, layout, counts of a step
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_protos.py tests/test_layout.py tests/counts \
	    tests/frontend/test_step_counts.py

bench: install  ## load a running server (ARGS='--target host:port ...')
	$(BIN)/deltamux bench $(ARGS)

protos: install  ## regenerate server/deltamux/v1 from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=server --pyi_out=server \
	    --grpc_python_out=server protos/deltamux/v1/*.proto

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
