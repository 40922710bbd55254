# Needs Python 3.11+ and make. The same commands without make are in README.md.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-card test-vllm lint types check format docs clean bench bench-card

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# OMP_PROC_BIND: unpinned threads halve the speed of matrix products on two cores (measured).
demo: $(STAMP) ## fetch a small chat model, compress a system prompt, answer from it side by side with the whole prompt
	OMP_PROC_BIND=true $(BIN)/gisting demo $(ARGS)

test: $(STAMP) ## run the tests but the slow ones; ARGS="--cov=gisting --cov=gisting_kernels" measures coverage
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-all: $(STAMP) ## run all tests, the slow ones too
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# What runs on a CUDA device; every other test runs on the CPU of such a machine too. One device is enough, and taken.
CARD_TESTS := tests/card tests/kernels tests/attention/test_flex.py tests/test_device.py tests/test_host_reads.py \
	tests/test_table.py::test_gather_waits_for_the_device_once tests/test_generation_modes.py::test_offloaded_on_cuda \
	tests/models/test_fingerprint.py::test_stays_on_an_accelerator
test-card: $(STAMP) ## run the tests that need a CUDA device; ARGS=--smoke runs them on the CPU
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --dist worksteal \
		$(if $(findstring --smoke,$(ARGS)),-n 2 tests/card,-n 8 $(CARD_TESTS)) $(ARGS)

test-vllm: ## run the tests against real vLLM on the CPU, in .venv-vllm
	GISTING_VLLM_ENV=.venv-vllm tests/vllm/run

lint: $(STAMP) ## ruff (rules and format), import-linter (layers), deptry (dependencies)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=.:kernels $(BIN)/lint-imports
	$(BIN)/deptry .

types: $(STAMP) ## pyright
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

check: lint types test ## lint, types and tests

format: $(STAMP) ## rewrite the files as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# NO_MKDOCS_2_WARNING: the theme would print an advertisement.
docs: $(STAMP) ## build the documentation into site/; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Without NAME it lists the benchmarks. Those of kernels need a CUDA device.
bench: $(STAMP) ## run a benchmark, such as NAME=training ARGS="--repeats 5"
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(NAME) $(ARGS)

bench-card: ## measure kernels, training and generation on a CUDA device, planned for 4 minutes; ARGS=--smoke on a CPU
	$(MAKE) bench NAME=card ARGS='$(ARGS)'

clean: ## remove builds and caches; .venv stays
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# Asked before the environment is made, and of one that was there already.
require_python = $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	found=$$($(1) --version 2>/dev/null || echo "not there"); \
	echo "gisting needs Python 3.11 or later, $(1) is $$found; run: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; \
	exit 1; }

$(STAMP): setup.py pyproject.toml constraints.txt
	@test -x $(BIN)/python || { $(call require_python,$(PYTHON)); }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(call require_python,$(BIN)/python)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
