# `make demo` and `make test` need python3 with its venv module, and make; they set up the rest in .venv.
PYTHON ?= python3
# The build of torch to install, in a step of its own: override for CUDA, or for another version.
TORCH ?= torch==2.13.*
BIN := .venv/bin
SEED ?= 0
OUT ?= runs/spirals
# Small operations on shared cores: one thread a test process is the fastest.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# The C++ compiler: $CXX, or the first that is there.
ifeq ($(origin CXX),default)
CXX := $(firstword $(foreach name,g++ c++ clang++,$(shell command -v $(name) 2>/dev/null)) none)
endif
# Where it compiles the native engine, demo and tests use that; elsewhere they run on the eager engine and say so.
NATIVE := $(shell "$(CXX)" -std=c++17 -fsyntax-only -x c++ -include native/simd.h /dev/null 2>/dev/null && echo native)

.PHONY: demo test check bench bench-engine docs native test-native test-engines check-install clean

demo: .venv/.installed $(NATIVE)
	$(BIN)/neurode spirals --out $(OUT) --seeds $(SEED)

test: .venv/.dev $(NATIVE)
	$(TEST_ENV) $(BIN)/pytest -q -n 2

check: .venv/.dev $(NATIVE)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	PYTHONPATH=src $(BIN)/lint-imports
	$(TEST_ENV) $(BIN)/pytest -q -n 2

bench: .venv/.dev
	$(BIN)/python benchmarks/eager.py

# The table of the fused engine's promises, peers beside it in the same run.
bench-engine: .venv/.peers native
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python benchmarks/engine.py --out benchmarks/results/engine.json
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python benchmarks/overhead.py --out benchmarks/results/overhead.json
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/training_threads.py --out benchmarks/results/training_threads.json

docs: .venv/.dev
	$(TEST_ENV) $(BIN)/pytest -q tests/test_docs.py

native: build/native/build.ninja
	$(BIN)/ninja -C build/native --quiet

# The engine by itself under address and undefined-behaviour sanitizers: every instruction on every instruction set of this
# machine, then FUZZ seconds of random programs against a slow reference. SEED=... repeats a run.
FUZZ ?= 60
test-native: build/sanitized/build.ninja
	$(BIN)/ninja -C build/sanitized --quiet
	build/sanitized/tests/engine_tests --seconds $(FUZZ) --seed $(if $(filter file,$(origin SEED)),random,$(SEED))

# The engine's tests on the other instruction sets of this machine, and all tests where there is no native library.
test-engines: .venv/.dev native
	for isa in $$($(BIN)/python -c "from neurode.fused import native; print(*native.isas()[1:])"); do \
	  echo "NEURODE_ISA=$$isa"; NEURODE_ISA=$$isa $(TEST_ENV) $(BIN)/pytest -q -n 2 tests/native tests/fused || exit 1; done
	echo "without the library"; NEURODE_NATIVE=none $(TEST_ENV) $(BIN)/pytest -q -n 2

# What a stranger's machine does: wheel and source archive in a fresh environment, with and without a compiler.
check-install: .venv/.dev
	$(BIN)/python tests/install.py

clean:
	rm -rf .venv build dist runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache

CONFIGURE = CXX="$(CXX)" $(BIN)/cmake -S native -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" --log-level=WARNING

build/native/build.ninja: native/CMakeLists.txt | .venv/.native
	$(CONFIGURE) -B build/native

build/sanitized/build.ninja: native/CMakeLists.txt | .venv/.native
	$(CONFIGURE) -B build/sanitized -DNEURODE_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=Sanitize

.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

# `make native` builds the engine of a checkout, so that a change of it needs no new installation.
.venv/.installed: .venv/.torch pyproject.toml CMakeLists.txt
	$(BIN)/pip install --quiet --editable ".[all]" --config-settings=cmake.define.NEURODE_NATIVE=OFF
	touch $@

.venv/.native: .venv/.torch
	$(BIN)/pip install --quiet --group native
	touch $@

# The libraries that the engine is compared with, in a step of their own.
.venv/.peers: .venv/.dev
	$(BIN)/pip install --quiet torchdiffeq torchode diffrax jax
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/pip install --quiet --group dev
	touch $@
