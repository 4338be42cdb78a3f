# `make demo` and `make test` work from a bare clone: they build .venv first and keep it until
# what is required changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The package with all extras, and what development needs besides (a group of pyproject.toml).
REQUIRED := -c constraints.txt -e '.[spikingjelly,snntorch,deploy]' --group dev
# Built when the package is installed, and again here when its sources have changed.
COMPILED := qsnn_ext/deploy/_qsnn.so qsnn_ext/kernels/_kernels.so
# One thread per test process: the processes are the parallelism. A file of tests is one process's,
# so that what its tests share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

# Debian's packages for the tests that `make test` skips where these are missing (gcc-multilib
# without the number excludes the cross compilers). Asked for only where it is used: not everybody
# has gcc.
TOOLS = gcc g++ clang lld tcc gcc-$(shell gcc -dumpversion)-multilib gcc-mingw-w64-x86-64 qemu-user qemu-system-arm \
	qemu-system-misc gcc-arm-none-eabi libnewlib-arm-none-eabi gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf \
	nodejs chromium libc6-dev-i386 \
	$(foreach arch,mips powerpc s390x,gcc-$(arch)-linux-gnu libc6-dev-$(arch)-cross) \
	gcc-arm-linux-gnueabihf libc6-dev-armhf-cross
AS_ROOT = $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: help demo demo-web test test-slow test-all lint format types docs clean
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@test ! -L $(VENV) || { echo "$(VENV) is a link: what it leads to would be emptied; remove the link"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python $(REQUIRED) || { \
		$(BIN)/python -m pip install --quiet 'pip>=25.1' && \
		$(BIN)/python -m pip install --quiet $(REQUIRED); }
	@touch $@

$(COMPILED) &: $(wildcard qsnn_ext/deploy/runtime/* qsnn_ext/kernels/native/*) | $(READY)
	-$(BIN)/python hatch_build.py

demo: $(READY) $(COMPILED) ## train full-precision and quantized networks on handwritten digits, under five minutes
	$(BIN)/python -m recipes.demo

demo-web: $(READY) ## build the demo page and open it, or print its address; DATA_DIR=... adds pictures of the CIFAR-10 there
	$(BIN)/python docs/demo/build.py --open $(if $(DATA_DIR),--data-dir '$(DATA_DIR)')

test: $(READY) $(COMPILED) ## run the test suite without the tests that take longest
	$(PYTEST) -m "not slow and not sweep"

test-slow: $(READY) $(COMPILED) ## run those: trainings, compilations, several processes
	$(PYTEST) -m "slow and not sweep"

test-all: $(READY) $(COMPILED) ## install compilers and emulators with apt-get, then run every test, those of hours too
	$(AS_ROOT) apt-get install -y --no-install-recommends $(TOOLS)
	$(PYTEST) -m "sweep or not sweep" --hypothesis-profile=thorough

lint: $(READY) ## ruff: lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## mypy --strict on the package
	$(BIN)/mypy

docs: $(READY) ## build the documentation into site/, strictly
	$(BIN)/python docs/demo/build.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
