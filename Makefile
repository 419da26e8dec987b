# make test     venv, install, build, all tests          make demo    a two-step student of the miniature, made and measured
# make lint     ruff, clang-format, mypy                 make format  what lint wants, applied
# make sanitize the ops' tests under ASan and UBSan      make docs    the documentation as a site, in build/site
# make cuda-compile  the CUDA kernels, GPU or not
#
# The environment is .venv, made on first use:  make PYTHON=python3.12 test  chooses its Python,  make VENV=/path test  another place.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
EXTRAS := test,bench,train,onnx,quantize,web,docs,dev
PYTEST_ARGS ?=
# Tests run in a process for each processor, and each on one thread: threads of several processes wait for one another.
# A file's tests stay together, for what they set up together.  make JOBS=1 test  takes less memory.
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile

# The parts of the package that exist; a new one asks for a new install, since the installer maps folders to names.
PARTS := $(wildcard twostep/__init__.py zoo/__init__.py losses/__init__.py train/__init__.py evaluate/__init__.py export/__init__.py)
NATIVE := $(shell find csrc -path csrc/simt -prune -o -type f -print)
BUILD := setup.py pyproject.toml twostep/version.py constraints.txt $(wildcard build_backend/*.py)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PY_FILES := setup.py build_backend tests $(wildcard benchmarks examples) $(patsubst %/__init__.py,%,$(PARTS))

INSTALLED := build/stamps/installed-$(subst /,-,$(VENV))
SANITIZED := build/sanitize/site
CUDA_ONLY := build/cuda-compile/site

.PHONY: test demo docs lint format sanitize cuda-compile clean
.DELETE_ON_ERROR:

test: $(INSTALLED)
	$(PYTEST) $(PYTEST_ARGS)

demo: $(INSTALLED)
	$(BIN)/twostep demo

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON); name a Python from 3.10 on:  make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than 3.10; name a newer one:  make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv module (Debian and Ubuntu:  apt-get install python3-venv )" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Without an nvcc there is nothing to compile CUDA kernels with, and the package index may well hand out a CUDA torch.
ifeq ($(shell command -v nvcc || ls $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc 2>/dev/null),)
ifndef TWOSTEP_FORCE_CUDA
export TWOSTEP_NO_CUDA ?= 1
endif
endif

# torch first and by itself: the build compiles against the one that is installed.
build/stamps/torch-$(subst /,-,$(VENV)): constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt torch
	@mkdir -p $(@D) && touch $@

$(INSTALLED): build/stamps/torch-$(subst /,-,$(VENV)) $(PARTS) $(NATIVE) $(BUILD)
	@echo 'compiling the kernels: minutes on the first run, seconds afterwards'
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@mkdir -p $(@D) && touch $@

# mypy follows no import hooks, so it is given the installed layout: a folder `twostep` of links.
LINKS := build/mypy/twostep
lint: $(INSTALLED)
	$(BIN)/ruff check $(PY_FILES)
	$(BIN)/ruff format --check $(PY_FILES)
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	@rm -rf $(LINKS) && mkdir -p $(LINKS)
	@for file in twostep/*; do ln -s "$(CURDIR)/$$file" $(LINKS)/; done
	@for part in $(filter-out twostep,$(patsubst %/__init__.py,%,$(PARTS))); do ln -s "$(CURDIR)/$$part" $(LINKS)/; done
	cd build/mypy && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --package twostep
	$(BIN)/mypy setup.py build_backend

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(PY_FILES)
	$(BIN)/ruff format $(PY_FILES)
	$(BIN)/clang-format -i $(CXX_FILES)

# Links that lead nowhere are warnings, and those are errors.
docs: $(INSTALLED)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/site
	@echo 'build/site/index.html'

# A second installation, beside the normal one: its library is compiled with the sanitizers, whose runtimes must be loaded
# first. Python and torch leak at exit by design, so leaks are not looked for; torch's own libraries define some symbols twice.
PURE := $(shell find $(patsubst %/__init__.py,%,$(PARTS)) -name '*.py')
$(SANITIZED): $(INSTALLED) $(PURE)
	TWOSTEP_SANITIZE=1 TWOSTEP_NO_CUDA=1 $(PIP) install --quiet --no-deps --no-build-isolation --upgrade --target $@ .
	@touch $@

runtime = $$($(CXX) -print-file-name=$(1))
# A finding ends the process; --capture=sys lets its report through, which pytest would otherwise take along.
sanitize: $(SANITIZED)
	PYTHONPATH=$(CURDIR)/$(SANITIZED) \
	LD_PRELOAD="$(call runtime,libasan.so) $(call runtime,libubsan.so) $(call runtime,libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1 \
	UBSAN_OPTIONS=print_stacktrace=1 \
	$(PYTEST) -p no:cacheprovider --capture=sys --expect-package-in $(CURDIR)/$(SANITIZED) -m 'not slow' tests/ops $(PYTEST_ARGS)

$(CUDA_ONLY): $(INSTALLED) $(PURE)
	TWOSTEP_FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0;12.0+PTX" \
	$(PIP) install --no-deps --no-build-isolation --upgrade --target $@ .
	@touch $@

cuda-compile: $(CUDA_ONLY)
	@echo "compiled; registers, spills and shared memory of every kernel: build/cuda/**/*.ptxas"

clean:
	rm -rf build .venv twostep/_C.so twostep/_C.json *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
