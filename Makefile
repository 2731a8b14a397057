# Each target does all of its own set-up: a virtual environment in .venv, the pinned packages of
# constraints.txt, and (for the tests) the tools that run ARM code. A second call finds it all done.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs bench bench-quality bench-answers bench-avx2 test-cuda bench-cuda litert arm-tools clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: .venv/installed-examples ## quantize EfficientNet-Lite0, compile it, compare it with the original
	$(BIN)/python -m examples.efficientnet_lite0

test: lint arm-tools ## what has to pass before a change goes in
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow"

test-all: lint arm-tools ## the same, and the slow tests as well
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

# VENV= (nothing) takes $(PYTHON) as it is, and installs nothing: where there is a PyTorch for the GPU already.
VENV ?= .venv
GPU_PYTHON := $(if $(VENV),$(BIN)/python,$(PYTHON))

test-cuda: $(if $(VENV),.venv/installed-test) ## run every kernel for GPUs on the GPU of this machine
	QCOMPILE_TEST_GPU=1 $(GPU_PYTHON) -m pytest -q -n $(JOBS) --dist worksteal -m cuda tests/targets

lint: .venv/installed-test ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-docs ## build the documentation into site/
	$(BIN)/python docs/draw_stages.py
	$(BIN)/sphinx-build -q -W -b html docs site
	@echo "open site/index.html"

bench: .venv/installed-bench litert ## measure against the other engines, side by side; rewrites docs/benchmarks.md
	$(BIN)/python -m benchmarks.run $(OPTIONS)
	$(BIN)/python -m benchmarks.report

bench-quality: .venv/installed-bench ## measure the accuracy that each preset and the other tools keep, on two networks
	$(BIN)/python -m benchmarks.quality

bench-answers: .venv/installed-bench ## measure what quantization does to precision, speed, storage and more; rewrites docs/answers.md
	$(BIN)/python -m benchmarks.answers

bench-avx2: .venv/installed-bench ## measure x86-avx2 beside ONNX Runtime held to AVX2; rewrites docs/benchmarks.md
	$(BIN)/python -m benchmarks.avx2 $(OPTIONS)
	$(BIN)/python -m benchmarks.report

bench-cuda: $(if $(VENV),.venv/installed-bench) ## measure the GPU of this machine beside PyTorch on it; rewrites docs/cuda.md
	$(GPU_PYTHON) -m benchmarks.cuda $(OPTIONS)

.venv/installed-%: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv .venv

# LiteRT's converter pins packages of its own. Where it cannot be installed, the benchmark says so.
litert:
	@$(MAKE) --no-print-directory .venv-litert/installed || echo "LiteRT could not be installed: it is left out"

.venv-litert/installed: constraints-litert.txt
	$(PYTHON) -m venv .venv-litert
	@echo '*' > .venv-litert/.gitignore
	.venv-litert/bin/python -m pip install --quiet --constraint constraints-litert.txt litert-torch
	@touch $@

# ARM libraries are linked with an aarch64 linker and run under qemu, in an AArch64 Python kept in
# .cache/. Where these are missing and cannot be installed, the tests that need them skip and say so.
arm-tools: .venv/installed-test
	@if command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-ld >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends qemu-user binutils-aarch64-linux-gnu >/dev/null \
		|| echo "qemu-user and binutils-aarch64-linux-gnu could not be installed: the ARM tests will skip"; \
	else echo "qemu-user and binutils-aarch64-linux-gnu are missing: the ARM tests will skip"; fi
	@$(BIN)/python tests/arm_sysroot.py || true

clean: ## remove what the other targets made
	rm -rf .venv .venv-litert .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build site qcompile.egg-info
