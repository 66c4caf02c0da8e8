# `make demo` and `make test` need python3 with its venv module, and make; they set up the rest in .venv.
PYTHON ?= python3
# The build of torch to install, in a step of its own: override for CUDA, or for another version.
TORCH ?= torch==2.13.*
BIN := .venv/bin
SEED ?= 0
OUT ?= runs/spirals
# Small operations on shared cores: one thread a test process is the fastest.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Where a C++ compiler is at hand, the tests include the native engine; elsewhere they name it among the skipped.
NATIVE := $(if $(shell command -v $(CXX) 2>/dev/null),native)

.PHONY: demo test check bench bench-engine docs native clean

demo: .venv/.installed
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

docs: .venv/.dev
	$(TEST_ENV) $(BIN)/pytest -q tests/test_docs.py

native: build/native/build.ninja
	$(BIN)/ninja -C build/native --quiet

clean:
	rm -rf .venv build dist runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache

build/native/build.ninja: native/CMakeLists.txt | .venv/.dev
	CXX="$(CXX)" $(BIN)/cmake -S native -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" --log-level=WARNING

.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

.venv/.installed: .venv/.torch pyproject.toml CMakeLists.txt
	$(BIN)/pip install --quiet --editable ".[all]"
	touch $@

# The libraries that the engine is compared with, in a step of their own.
.venv/.peers: .venv/.dev
	$(BIN)/pip install --quiet torchdiffeq torchode diffrax jax
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/pip install --quiet --group dev
	touch $@
