# zoosplat: `make demo` runs everything end to end, `make test` passes the tests. Needs Python 3.11+ and make.
BIN := .venv/bin
# Two OpenMP threads that spin on a loaded machine slow each other down.
export OMP_WAIT_POLICY ?= passive
export PYTHON

.PHONY: help install demo test lint check minio bench clean

help:            ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/' | expand -t 12

install: .venv/installed  ## .venv with everything, at the versions of constraints.txt

.venv/installed: pyproject.toml constraints.txt deploy/venv.sh
	@deploy/venv.sh
	@touch $@

demo: install    ## a synthetic recording from videos to the report, in ./demo
	@$(BIN)/zoosplat demo

test: install minio lint  ## linters, types and all tests
	$(BIN)/pytest -q

lint: install    ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

minio:           ## build a MinIO server for the tests, once a machine, where Go is
	@deploy/minio.sh

bench: install   ## CPU stages against ffmpeg, rasteriser
	$(BIN)/python benchmarks/preprocessing.py
	$(BIN)/python benchmarks/rasterize.py

clean:           ## remove .venv and caches; experiments stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
