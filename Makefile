# zoosplat: `make demo` runs everything end to end, `make test` passes the tests. Needs Python 3.11+ and make.
BIN := .venv/bin
# Two OpenMP threads that spin on a loaded machine slow each other down.
export OMP_WAIT_POLICY ?= passive
export PYTHON

.PHONY: help install demo demo-containers demo-kubernetes test test-slow lint minio images bench cluster-tools test-cluster clean
# Before anything is built: what a target needs of this machine.
CHECKED := $(addprefix check-,demo-containers demo-kubernetes test-cluster)
.PHONY: $(CHECKED)
.NOTPARALLEL:

help:            ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(CHECKED): check-%:
	@deploy/requirements.sh $*

install: .venv/installed  ## .venv with everything, at the versions of constraints.txt

.venv/installed: pyproject.toml constraints.txt deploy/venv.sh
	@deploy/venv.sh
	@touch $@

demo: install    ## a synthetic recording from videos to the report, in ./demo
	@$(BIN)/zoosplat demo

test: install minio lint  ## linters, types and all tests
	$(BIN)/pytest -q -n logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder

test-slow: install minio  ## tests of many minutes, which `make test` leaves out
	$(BIN)/pytest -q -m slow

lint: install    ## ruff, mypy --strict and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

minio:           ## build a MinIO server for the tests, once a machine, where Go is
	@deploy/minio.sh

images:          ## container images of the stages and of the flows, with podman or docker
	@deploy/images/build.sh

demo-containers: check-demo-containers install minio  ## the demo, each stage in its own container on a MinIO of its own; needs images
	@$(BIN)/python deploy/demo/in_containers.py

demo-kubernetes: check-demo-kubernetes install minio cluster-tools  ## the demo on a Kubernetes of this machine; needs root and images
	@$(BIN)/python deploy/demo/on_kubernetes.py

bench: install   ## CPU stages against ffmpeg, rasteriser
	$(BIN)/python benchmarks/preprocessing.py
	$(BIN)/python benchmarks/rasterize.py

cluster-tools:   ## build a Kubernetes, kwok and helm for the tests, once a machine, where Go is
	@deploy/cluster/build.sh

test-cluster: check-test-cluster install minio cluster-tools  ## tests on a Kubernetes of this machine; needs root and images
	ZOOSPLAT_CI_CLUSTER=1 $(BIN)/pytest -q tests/cluster

clean:           ## remove .venv and caches; experiments stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
