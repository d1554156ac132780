# make demo    trains on real digits and writes demo-report/
# make test    runs the tests
# make check   lint and types        make bench   fused against eager
#
# TORCH chooses the build of torch, as pip spells it, and PIP_ARGS is passed to pip:
#   make demo TORCH=torch                                     whatever pip takes by itself
#   make demo TORCH=torch==2.13.0 PIP_ARGS="--index-url ..."  from an index of your choice
# Left alone: on Linux without an NVIDIA or AMD GPU the small CPU build where pip finds one.

PYTHON ?= python3
TORCH ?=
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m iada demo --out demo-report

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m bench

$(VENV)/.torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@if [ -n "$(TORCH)" ]; then \
	  $(BIN)/python -m pip install --quiet $(PIP_ARGS) "$(TORCH)"; \
	elif [ "$$(uname -s)" != Linux ] || [ -e /dev/nvidiactl ] || [ -e /dev/kfd ]; then \
	  $(BIN)/python -m pip install --quiet $(PIP_ARGS) "torch>=2.11"; \
	elif ! $(BIN)/python -m pip install --quiet $(PIP_ARGS) "torch==2.13.0+cpu" 2>/dev/null; then \
	  echo "pip finds no CPU build of torch and takes the default one, several GB with CUDA."; \
	  echo "A small one: make PIP_ARGS='--index-url URL', URL as pytorch.org's install page"; \
	  echo "shows it for the compute platform CPU."; \
	  $(BIN)/python -m pip install --quiet $(PIP_ARGS) "torch>=2.11"; \
	fi
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e ".[dev]"
	@touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) build demo-report
