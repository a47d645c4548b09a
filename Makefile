# Everything a fresh machine with Python 3.11+ and make needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The MLX back end to install on Linux: cpu, cuda12 or cuda13. macOS brings Metal by itself.
BACKEND ?= cpu
# Most of a test is the work of one thread. 0: in the process that is started, for a debugger.
TEST_PROCESSES ?= 2
ARGS   ?=
# What an installation takes, where that was measured.
TAKES_Linux_cpu     := about 75 MB to download, 400 MB on disk
TAKES_Linux_cpu_dev := about 125 MB to download, 600 MB on disk
SAY_TAKES = $(if $(TAKES_$(shell uname)_$(1)), ($(TAKES_$(shell uname)_$(1))))

PYTEST = $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

.PHONY: help run test ways check newest bench fmt clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.installed: pyproject.toml
	@echo "installing into $(VENV)$(call SAY_TAKES,$(BACKEND)); this takes a few minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(BACKEND)]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	@echo "installing into $(VENV)$(call SAY_TAKES,$(BACKEND)_dev); this takes a few minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(BACKEND),dev]'
	@touch $@ $(VENV)/.installed

run: $(VENV)/.installed  ## install what is needed and serve the bundled model (ARGS="--model ..." for another)
	$(BIN)/mlx-lm-server $(if $(findstring --model,$(ARGS)),,--model nano) $(ARGS)

test: $(VENV)/.installed-dev  ## install and run the tests
	$(PYTEST) $(ARGS)

ways: $(VENV)/.installed-dev  ## run what differs by device in the ways of other devices
	for way in metal cuda plain; do \
	  MLX_LM_SERVER_WAY=$$way $(PYTEST) -m each_way tests/mlx || exit 1; \
	done

check: $(VENV)/.installed-dev  ## lint, types, import directions, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) $(ARGS)

newest:  ## test the families of models against the newest mlx-lm, in a scratch environment
	$(PYTHON) -m tests.contract.newest --backend $(BACKEND) $(ARGS)

bench: $(VENV)/.installed-dev  ## print the numbers that the README claims
	$(BIN)/python -m benchmarks $(ARGS)

fmt: $(VENV)/.installed-dev  ## format and fix what can be fixed
	$(BIN)/ruff check --fix . || true
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
