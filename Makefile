# `make setup` creates .venv with all that the tests need. Each target first installs what it needs, so it works on a
# fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
# pip is quiet for minutes, so the first line says what it does.
INSTALL = @echo "installing torch and the rest into $(VENV): about 7 GB, and some minutes"; \
  $(PYTHON) -m venv $(VENV) && \
  $(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e

.PHONY: setup demo docs test test-fast test-faults gpu-check lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(INSTALL) '.[dev]'
	@touch $(DEMO_STAMP) $(STAMP)

# Half as many packages as the tests need.
$(DEMO_STAMP): pyproject.toml constraints.txt
	$(INSTALL) '.[demo]'
	@touch $(DEMO_STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/fastmae demo

# The guide as a site in site/. `make docs ARGS=serve` shows it in a browser while you write.
docs: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build --strict --site-dir site)

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

# The unit tests that take little time: under three minutes on two cores.
test-fast: setup
	$(PYTEST) -m "not slow" --ignore tests/end_to_end

# What docs/reliability.md promises, with more rounds than `make test` has; ends with its table.
test-faults: setup
	FAULTS=thorough $(PYTEST) -m promise

# On a machine with a GPU: what works there, and how fast. `make gpu-check ARGS="--budget 900"` gives it more time.
gpu-check: setup
	$(BIN)/python tools/gpu_check $(ARGS)

lint: setup
	$(BIN)/ruff check src tests tools
	$(BIN)/ruff format --check src tests tools
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix src tests tools
	$(BIN)/ruff format src tests tools

clean:
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache
