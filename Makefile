PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz test-gpu lint clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# torch comes first and alone: a CPU build satisfies the package afterwards, where the newest would not be one.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --upgrade pip

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN)/python -c 'import torch' 2>/dev/null || $(RUN)/pip install --quiet torch -c constraints.txt
	$(RUN)/pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(RUN)/pip install --quiet -c constraints.txt -e '.[demo,dev,docs,test]'
	touch $@

demo: $(VENV)/.demo  ## train a small GPT on real text, nn.Linear beside SwitchBack
	$(RUN)/python examples/train_gpt.py

lint: $(VENV)/.test  ## style and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# Interpreted kernels want TRITON_INTERPRET before Triton is imported, compiled ones must not have it; and the
# tests of the bitsandbytes bridge run once without bitsandbytes and once with it.
test: lint docs  ## lint, types, the site and every test that needs no GPU
	$(RUN)/pip uninstall --quiet --yes bitsandbytes
	$(RUN)/pytest -n 2 --dist loadgroup tests
	TRITON_INTERPRET=1 $(RUN)/pytest -n 2 tests/kernels
	$(RUN)/pip install --quiet -c constraints.txt -e '.[bitsandbytes]'
	$(RUN)/pytest tests/test_bitsandbytes.py tests/test_seeds.py

.PHONY: docs
docs: $(VENV)/.test  ## the documentation's site in site/, from these files alone; a dead link fails
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --quiet --strict

fuzz: $(VENV)/.test  ## the properties on random inputs, some minutes; prints how to repeat a failure
	HYPOTHESIS_PROFILE=fuzz $(RUN)/pytest -n 2 tests/test_properties.py

test-gpu:  ## the GPU's tests, in the present environment
	$(PYTHON) -m pytest --device cuda tests/gpu tests/test_*.py

clean:  ## remove what was made
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf site
