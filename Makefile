# The exact torch release is asked for first: where an index offers a CPU build of it, that one is a fraction of the
# size of the newest release with its CUDA packages. Set TORCH to take another release that pyproject.toml admits.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/smol
MODEL ?= smollm2-135m
# A quick fit on few windows, so that the demo takes minutes; compile's own defaults take their time and fit closer.
PASSES ?= shiftadd{starts=1 rounds=5 iterations=1 polish=0 sweeps=0},fold
SAMPLES ?= 16
PROMPT ?= The capital of France is
# Tests run on this many cores; 0 runs them in one process.
WORKERS ?= auto
PYTEST_ARGS ?=

.PHONY: help venv test test-fast test-native test-real lint format demo clean

help:
	@echo "make venv       create $(VENV) with nomul and its tools (network the first time only)"
	@echo "make test       lint, types and every test"
	@echo "make test-fast  the tests that need no real model and little time"
	@echo "make test-native  the kernels under sanitizers of memory, undefined behaviour and threads (needs g++)"
	@echo "make test-real  the tests on real models"
	@echo "make lint       ruff and mypy"
	@echo "make demo       compile, evaluate and run $(MODEL) with --passes $(PASSES)"

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" \
	    || echo "$(TORCH) is not offered here; taking a release that pyproject.toml admits" >&2
	$(BIN)/python -m pip install --quiet "setuptools>=77.0.3"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# tests/conftest.py puts the real-model tests last, so a run gives the quick answers first.
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

test-fast: venv
	$(BIN)/python -m pytest -m "not real and not slow" -n $(WORKERS) $(PYTEST_ARGS)

# The sanitized library stays in the build directory. The sanitizer has to be in the process before Python, and looks for
# the C++ library's throw when it starts; Python itself leaks. Unoptimised code compiles in a third of the time.
SANITIZED := $(CURDIR)/build/sanitized
MEMORY := -O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
THREADS := -O1 -g1 -fsanitize=thread
test-native: venv
	@mkdir -p $(SANITIZED)
	CXX="$(CXX)" CXXFLAGS="$(THREADS)" $(BIN)/python -c \
	    "from pathlib import Path; from backends.native.build import build; build(Path('$(SANITIZED)/libthreads.so'))"
	$(CXX) -std=c++17 $(THREADS) -Ibackends/native/src tests/native_threads.cpp $(SANITIZED)/libthreads.so -pthread \
	    -o $(SANITIZED)/threads
	$(SANITIZED)/threads
	CXX="$(CXX)" CXXFLAGS="$(MEMORY)" XDG_CACHE_HOME=$(SANITIZED) $(BIN)/python -c \
	    "from backends.native.build import built_library; print(built_library())"
	CXX="$(CXX)" CXXFLAGS="$(MEMORY)" XDG_CACHE_HOME=$(SANITIZED) OMP_NUM_THREADS=1 \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	    $(BIN)/python -m pytest -n 0 --capture=sys tests/test_native_kernels.py tests/test_onnx_kernels.py \
	    tests/test_native_bad_input.py $(PYTEST_ARGS)

test-real: venv
	$(BIN)/python -m pytest -m real $(PYTEST_ARGS)

# compile refuses to write over an artifact, so that a rerun of the demo has to clear its own.
demo: venv
	rm -rf $(OUT)
	$(BIN)/python -m tools.compile $(MODEL) --passes "$(PASSES)" --out $(OUT) --samples $(SAMPLES) \
	    --precision bfloat16
	$(BIN)/python -m tools.evaluate $(OUT) --against $(MODEL) --ctx 512 --windows 6 --last
	$(BIN)/python -m tools.generate $(OUT) "$(PROMPT)" -n 32

clean:
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
