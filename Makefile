PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
INTEGRATIONS = $(VENV)-integrations

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest-triton test-wheel test-integrations fuzz test-gpu test-gpu-sanitizer soak lint tables docs clean

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

tables: $(VENV)/.test  ## the tables of the documentation are those of the committed results
	$(RUN)/python benchmarks/pages.py --check

# Interpreted kernels want TRITON_INTERPRET before Triton is imported, compiled ones must not have it; and the
# tests of the bitsandbytes bridge run once without bitsandbytes and once with it.
test: lint tables docs  ## lint, types, the site and every test that needs no GPU
	$(RUN)/pip uninstall --quiet --yes bitsandbytes
	$(RUN)/pytest -n 2 --dist loadfile tests
	TRITON_INTERPRET=1 $(RUN)/pytest -n 2 tests/kernels
	$(RUN)/pip install --quiet -c constraints.txt -e '.[bitsandbytes]'
	$(RUN)/pytest -n 2 tests/test_bitsandbytes.py tests/test_seeds.py

# The oldest Triton that the package allows, for the compiler alone: what it makes of every kernel.
test-oldest-triton: $(VENV)/.test  ## kernels compiled by the oldest Triton
	$(RUN)/pip install --quiet --no-deps --upgrade --target $(VENV)/oldest-triton triton -c constraints-oldest.txt
	PYTHONPATH=$(VENV)/oldest-triton $(RUN)/pytest -n 2 tests/compile tests/test_launch.py

test-wheel: $(VENV)/.test  ## the wheel in an environment of its own, without Triton
	rm -rf dist $(VENV)/wheel
	$(RUN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(VENV)/wheel
	$(VENV)/wheel/bin/pip install --quiet torch -c constraints.txt
	$(VENV)/wheel/bin/pip install --quiet --no-deps dist/*.whl
	$(VENV)/wheel/bin/pip uninstall --quiet --yes triton
	cd $(VENV)/wheel && bin/python -c 'import torch, torch_switchback as ts; \
	  ts.SwitchBackLinear(8, 8)(torch.ones(2, 8)).sum().backward()'

# In an environment of their own: what they bring along must not decide how the other tests come out.
$(INTEGRATIONS)/.installed: pyproject.toml constraints.txt constraints-integrations.txt
	test -d $(INTEGRATIONS) || $(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/pip install --quiet --upgrade pip
	$(INTEGRATIONS)/bin/pip install --quiet torch -c constraints.txt
	$(INTEGRATIONS)/bin/pip install --quiet -c constraints.txt -c constraints-integrations.txt \
		-e '.[demo,test,integrations]'
	touch $@

test-integrations: $(INTEGRATIONS)/.installed  ## the bridges to other libraries, with the real ones, on the CPU
	$(INTEGRATIONS)/bin/pytest -n 2 --dist loadfile tests/integrations

docs: $(VENV)/.test  ## the documentation's site in site/, from these files alone; a dead link fails
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

fuzz: $(VENV)/.test  ## the properties on random inputs, some minutes; prints how to repeat a failure
	HYPOTHESIS_PROFILE=fuzz $(RUN)/pytest -n 2 tests/test_properties.py

test-gpu:  ## the GPU's tests, in the present environment
	$(PYTHON) -m pytest --device cuda tests/gpu tests/test_*.py

test-gpu-sanitizer:  ## every kernel under compute-sanitizer, in the present environment
	$(PYTHON) -m pytest --device cuda --sanitizer tests/gpu/test_sanitizer.py

soak:  ## ten minutes of random steps on the GPU, in the present environment
	$(PYTHON) tests/soak.py --minutes 10

clean:  ## remove what was made
	rm -rf $(VENV) $(INTEGRATIONS) build dist runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
