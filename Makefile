# make test, make demo, make lint: each sets up .venv and the extension where that has not been
# done, then does its job.
# make demo-seeds: the demo three times, with seeds that its settings were not chosen by.
# make sanitize: the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer;
# make emulate: the CUDA kernels likewise, run on the CPU.
# make cuda-check: builds the CUDA kernels with a CUDA torch of its own (no GPU needed, nvcc is).
# make gpu-check: on a machine with a GPU, with the python3 on PATH.
# make faults: breaks runs and caches in every way of docs/RELIABILITY.md, in full (20 minutes).
PYTHON ?= python3
TEST_PROCESSES ?= 2
VENV := .venv
PY := $(VENV)/bin/python
EXTENSION := $(VENV)/extension.stamp
REQUIREMENTS := $(VENV)/requirements.stamp
TEST_REQUIREMENTS := $(VENV)/requirements-test.stamp
DEMO_REQUIREMENTS := $(VENV)/requirements-demo.stamp

# Another torch than requirements.txt's, so that both are seen to compile; its CUDA must be nvcc's.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV := .venv-cuda
CUDA_BUILD := build/cuda-check

CPP := $(wildcard csrc/* tests/emulation/*) tests/sanitize.cpp

.PHONY: lint test demo demo-short demo-seeds setup clean sanitize emulate cuda-check gpu-check faults

setup: $(EXTENSION)

test: setup $(TEST_REQUIREMENTS)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(TEST_PROCESSES) --dist loadfile \
	  --no-loadscope-reorder tests

lint: setup $(TEST_REQUIREMENTS)
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/pyright
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

faults: setup $(TEST_REQUIREMENTS)
	rm -f out/faults.jsonl
	SALT_FAULTS=full $(PY) -m pytest -q tests/faults \
	  tests/test_cache.py::test_killed_at_any_change_to_the_disk \
	  tests/test_ranks.py::test_a_killed_rank_leads_to_a_clean_restart
	$(PY) -m tests.faults.harness

SANITIZE := $(CXX) -std=c++17 -O1 -g -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off \
  -fsanitize=address,undefined -fno-sanitize-recover=all
ROUNDS ?= 100
SANITIZED := $(patsubst csrc/%.cpp,build/sanitized/%.o,csrc/cpu.cpp csrc/files.cpp csrc/frames.cpp csrc/bfloat16.cpp)
EMULATED := build/emulation/masks.cpp build/emulation/rows.cpp build/emulation/loss.cpp

sanitize: build/sanitize
	build/sanitize $(ROUNDS)
	SALT_SIMD=avx512 build/sanitize $(ROUNDS)
	SALT_SIMD=avx2 build/sanitize $(ROUNDS)
	SALT_SIMD=baseline build/sanitize $(ROUNDS)

build/sanitize: tests/sanitize.cpp $(SANITIZED)
	$(SANITIZE) -o $@ $^ -pthread

build/sanitized/%.o: csrc/%.cpp $(wildcard csrc/*.h) Makefile
	mkdir -p build/sanitized
	$(SANITIZE) -c -o $@ $<

emulate: build/emulation/run
	ASAN_OPTIONS=detect_stack_use_after_return=0 build/emulation/run 1

build/emulation/run: tests/sanitize.cpp $(EMULATED) $(SANITIZED) $(wildcard tests/emulation/*)
	$(SANITIZE) -DSALT_EMULATE -Itests/emulation -Icsrc -o $@ $(filter %.cpp %.o,$^) -pthread

# kernel<<<blocks, threads>>>(...) as a call of the emulation's
build/emulation/%.cpp: csrc/%.cu $(wildcard csrc/*.h csrc/*.cuh) Makefile
	mkdir -p build/emulation
	sed -E -e 's/([A-Za-z0-9_]+(<[^<>()]*>)?)<<<([^;]*)>>>\(/salt_launch((\1), \3)(/' \
	  -e 's/__shared__ /static /' \
	  -e 's/extern static uint64_t shared_scratch\[\];/uint64_t* shared_scratch = emulation::shared.data();/' \
	  $< > $@

cuda-check: $(CUDA_VENV)/stamp
	rm -rf $(CUDA_BUILD) && mkdir -p $(CUDA_BUILD)/tests
	cp -r setup.py salt csrc $(CUDA_BUILD)
	cp tests/__init__.py tests/conftest.py tests/test_ops.py tests/test_masks.py tests/test_rows.py tests/test_gpu.py $(CUDA_BUILD)/tests
	cd $(CUDA_BUILD) && NVCC_APPEND_FLAGS="-Xptxas -v" ../../$(CUDA_VENV)/bin/python setup.py build_ext > build.log 2>&1 && ! grep '^setup.py:' build.log || (tail -40 build.log; false)
	$(CUDA_VENV)/bin/python tests/ptxas_report.py $(CUDA_BUILD)/build.log
	cd $(CUDA_BUILD) && ../../$(CUDA_VENV)/bin/python -c 'from salt import extension, ops; print(extension.describe()); assert "cuda" in ops.EXTENSION["devices"]'
	cd $(CUDA_BUILD) && ../../$(CUDA_VENV)/bin/python -m pytest -q tests

$(CUDA_VENV)/stamp:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install -q "$(CUDA_TORCH)" "numpy>=2.1,<3" "einops>=0.8,<0.9" "ninja>=1.11" "setuptools>=70,<90" "pytest>=8,<10" "hypothesis>=6,<7"
	touch $@

gpu-check:
	tests/gpu_check.sh

demo: setup $(DEMO_REQUIREMENTS)
	$(PY) demo/run.py

demo-short: setup $(DEMO_REQUIREMENTS)
	$(PY) demo/run.py --short --out out/demo-short

demo-seeds: setup $(DEMO_REQUIREMENTS)
	$(PY) demo/seeds.py

$(REQUIREMENTS): requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "SALT-VLA needs Python 3.11 or newer; give make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt
	touch $@

$(DEMO_REQUIREMENTS): $(REQUIREMENTS) requirements-demo.txt
	$(PY) -m pip install -q -r requirements-demo.txt
	touch $@

$(TEST_REQUIREMENTS): $(REQUIREMENTS) requirements-demo.txt requirements-test.txt
	$(PY) -m pip install -q -r requirements-test.txt
	touch $@

$(EXTENSION): $(REQUIREMENTS) setup.py $(wildcard csrc/*)
	$(PY) setup.py -q build_ext
	touch $@

clean:
	rm -rf $(VENV) $(CUDA_VENV) build salt_ops*.so
