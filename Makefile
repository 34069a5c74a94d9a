# Two commands for a fresh machine: `make quickstart` and `make test`. Needs Python 3.11+, a C++ compiler and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow test-sanitize fuzz bench check format clean

quickstart: $(VENV)/.installed  ## fine-tune the bundled sparse ResNet-20 on handwritten digits
	$(BIN)/sparse-ft finetune --model resnet20-cifar10 --dataset digits --batch-size 64 --epochs 6 --output-dir out/quickstart --overwrite

# Threads that wait for work must not take the core of a test in another process.
test: $(VENV)/.installed  ## every fast test, on up to four cores
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses 4 -m "not slow"

test-slow: $(VENV)/.slow fuzz  ## the rest: minutes each
	$(BIN)/pytest -m slow

SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
test-sanitize: $(VENV)/.sanitize  ## the native core's tests under AddressSanitizer and UBSan (GCC)
	$(BIN)/cmake -C csrc/sanitize.cmake -S csrc -B build/sanitize -DCMAKE_CXX_COMPILER=$(CXX) \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/sanitize --parallel
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=tests \
		$(BIN)/python -m pytest -p sanitized_core -m "not slow" tests/ops tests/nn

FUZZ_SECONDS ?= 600
FUZZ_SEED ?= $(shell date +%s)
fuzz: $(VENV)/.sanitize  ## the native core fuzzed under both sanitizers (GCC): make fuzz FUZZ_SECONDS=60
	$(BIN)/cmake -C csrc/sanitize.cmake -DSPARSE_FT_FUZZ=ON -S csrc -B build/fuzz -DCMAKE_CXX_COMPILER=$(CXX) \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/fuzz --target fuzz --parallel
	OMP_WAIT_POLICY=passive build/fuzz/fuzz $(FUZZ_SECONDS) build/fuzz/crash $(FUZZ_SEED)

bench: $(VENV)/.bench  ## every figure of docs/benchmarks.md: an hour and more, on a machine that does nothing else
	$(BIN)/python scripts/bench.py --json out/bench.json --page docs/benchmarks.md

check: $(VENV)/.dev  ## lint, types, formats
	$(BIN)/ruff check sparse_ft tests scripts
	$(BIN)/ruff format --check sparse_ft tests scripts
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp

format: $(VENV)/.dev
	$(BIN)/ruff check --fix sparse_ft tests scripts
	$(BIN)/ruff format sparse_ft tests scripts
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp

$(VENV)/.installed: pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install -e ".[test]"
	touch $@

$(VENV)/.slow: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[test-slow]"
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

$(VENV)/.sanitize: $(VENV)/.installed
	$(BIN)/pip install --quiet cmake pybind11
	touch $@

# The published packages compile on installation and need setuptools for it; one that does not build is left out.
$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install --quiet setuptools wheel pybind11 scipy onnx onnxruntime onnxscript
	-$(BIN)/pip install --quiet --no-build-isolation sparseprop
	-$(BIN)/pip install --quiet sparselab
	touch $@

clean:
	rm -rf $(VENV) build out
