# make demo, make demo-moe, make test: everything from a fresh machine with Python and make.
EXTRA ?= cpu
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .tools/bin/uv)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export GLOO_SOCKET_IFNAME ?= lo
# Python compiles torch and vllm once here instead of in each of many processes.
export UV_COMPILE_BYTECODE := 1

.PHONY: demo demo-moe test test-all test-slurm gpu-check lint clean

demo: $(BIN)/.synced
	$(BIN)/python tools/demo.py $(ARGS)

demo-moe: $(BIN)/.synced
	$(BIN)/python tools/demo.py --moe $(ARGS)

# Two workers: make test ARGS="-n 4" has four, make test ARGS="-n 0 --pdb tests/unit" none.
test: $(BIN)/.synced
	$(BIN)/python -m pytest -n 2 $(ARGS)

# The default suite and what takes minutes: tensor-parallel engines.
test-all: $(BIN)/.synced
	$(BIN)/python -m pytest -m "" $(ARGS)

# The scripts in slurm/ on a Slurm that the tests start themselves, in a temporary folder and on free
# ports. Where Slurm's programs are missing, root on Debian gets the packages slurmctld, slurmd,
# slurm-client and munge installed, services included as always; elsewhere the tests are skipped.
test-slurm: $(BIN)/.synced
	@if [ ! -x /usr/sbin/slurmctld ] && ! command -v slurmctld >/dev/null \
	  && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y \
	    --no-install-recommends slurmctld slurmd slurm-client munge; fi
	$(BIN)/python -m pytest tests/e2e/test_slurm.py -m slurm $(ARGS)

# What only a machine with NVIDIA GPUs can show: make gpu-check EXTRA=gpu ARGS=--quick
gpu-check: $(BIN)/.synced
	$(BIN)/python tools/gpu_check.py $(ARGS)

lint: $(BIN)/.synced
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(BIN)/.synced: uv.lock pyproject.toml | $(filter .tools/bin/uv,$(UV))
	$(UV) sync --frozen --extra $(EXTRA) --extra dev
	touch $@

.tools/bin/uv:
	python3 -m pip install --quiet --target .tools uv

clean:
	rm -rf .venv .tools runs
