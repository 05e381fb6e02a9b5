# Every target makes its own .venv when there is none; nothing but Python and a C++ compiler is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CXX_FILES := $(wildcard csrc/*.cc csrc/*.h csrc/*.inc tests/*.cc)

.PHONY: demo test lint bench plots build asan amx clean

demo: $(VENV)/.runtime
	$(BIN)/specmoeoff demo

test: lint
	$(BIN)/pytest

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES) benchmarks/harness/*.cc

bench: build
	$(BIN)/python benchmarks/linear.py --json build/bench/linear.json
	$(BIN)/python benchmarks/expert_ffn.py --json build/bench/expert_ffn.json

# The roofline pictures in docs/, from what `make bench` recorded last.
plots: build
	$(BIN)/pip install --quiet "matplotlib>=3.8"
	$(BIN)/python benchmarks/roofline_plot.py build/bench/linear.json build/bench/expert_ffn.json --output docs/img

# Builds again after a change to csrc/; Python files are used in place.
build: $(VENV)/.dev
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .

# The kernel tests with AddressSanitizer and UndefinedBehaviorSanitizer. `-S` leaves the editable
# install aside, so that the module under build/ is the one imported.
asan: build
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --upgrade --target build/asan-site \
	  -Cbuild-dir=build/asan -Ccmake.define.SPECMOEOFF_SANITIZE=ON .
	PYTHONPATH=build/asan-site:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python -S -m pytest -p no:cacheprovider tests/test_kernels_*.py

# The tests of bfloat16 products on the target amx too, its instructions trapped and emulated.
amx: build
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --upgrade --target build/amx-site \
	  -Cbuild-dir=build/amx -Ccmake.define.SPECMOEOFF_EMULATE_AMX=ON .
	PYTHONPATH=build/amx-site:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  $(BIN)/python -S -m pytest -p no:cacheprovider -p no:faulthandler tests/test_kernels_bf16*.py

$(VENV)/.created:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.runtime: $(VENV)/.created pyproject.toml CMakeLists.txt $(CXX_FILES)
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e .[dev]
	touch $@

clean:
	rm -rf build
