# `make demo` and `make test` need python3 with its venv module, and make; they set up the rest in .venv.
PYTHON ?= python3
# The build of torch to install, in a step of its own: override for CUDA, or for another version.
TORCH ?= torch==2.13.*
BIN := .venv/bin
SEED ?= 0
OUT ?= runs/spirals
# Small operations on shared cores: one thread a test process is the fastest.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test check bench docs clean

demo: .venv/.installed
	$(BIN)/neurode spirals --out $(OUT) --seeds $(SEED)

test: .venv/.dev
	$(TEST_ENV) $(BIN)/pytest -q -n 2

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	PYTHONPATH=src $(BIN)/lint-imports
	$(TEST_ENV) $(BIN)/pytest -q -n 2

bench: .venv/.dev
	$(BIN)/python benchmarks/eager.py

docs: .venv/.dev
	$(TEST_ENV) $(BIN)/pytest -q tests/test_docs.py

clean:
	rm -rf .venv build dist runs .pytest_cache .ruff_cache .hypothesis

.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

.venv/.installed: .venv/.torch pyproject.toml CMakeLists.txt
	$(BIN)/pip install --quiet --editable ".[all]"
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/pip install --quiet --group dev
	touch $@
