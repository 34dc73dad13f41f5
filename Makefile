# Every habit of the project is a target; `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := CMakeLists.txt $(shell find csrc -type f)
# An editable install finds new modules by itself, and new packages only when it is made again.
PACKAGES := $(shell find mgd_kernels python -name __init__.py)

.PHONY: demo test bench lint format clean

# The extension is rebuilt when its sources change; Python files are used in place.
$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) $(PACKAGES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/mgd demo --out out/demo --json out/demo/demo.json

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

format:
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

clean:
	rm -rf build dist out .pytest_cache .benchmarks
