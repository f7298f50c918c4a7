# `make demo` and `make test` are all that is needed; both set up .venv on their first call.
# PYTHON is the interpreter that .venv is made from: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
# What `make gpu` runs after its tests: GPU_ARGS="training --method dsr", GPU_ARGS="translation --variant all"
GPU_ARGS ?=

bin := $(VENV)/bin
# The build constraint pins what builds our own wheel; pip before 25.3 takes it from the first variable.
pip := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	$(bin)/python -m pip --quiet --quiet
# fairseq and what its import and the recipe on it need. Its extensions in C++ are left out, so that no compiler
# is needed: that is what READTHEDOCS=1 says to its setup.py. Its requirement of torchaudio is not needed either.
translation := fairseq-fixed hydra-core omegaconf antlr4-python3-runtime bitarray sacrebleu portalocker tabulate \
	lxml colorama sacremoses subword-nmt
set_up := pyproject.toml constraints.txt lightning_memtrain/__about__.py

.DEFAULT_GOAL := help
.SUFFIXES:
.PHONY: help demo test lint types unit oldest projects nightly docs wheel-check gpu constraints clean

help:
	@echo "make demo         train WRN-28-2 on small real images and show where the memory goes"
	@echo "make test         lint, types, tests, examples, docs and packages"
	@echo "make lint         ruff, codespell, pydoclint, import contracts"
	@echo "make types        mypy --strict"
	@echo "make unit         tests, the examples of the docs among them"
	@echo "make oldest       unit tests on the lowest Lightning and torchmetrics that we declare"
	@echo "make projects     train two published projects with our callbacks"
	@echo "make nightly      tests over random examples, others at each call, many of them"
	@echo "make docs         docs/_build/html"
	@echo "make wheel-check  build the packages, install the wheel elsewhere, train two steps with it"
	@echo "make gpu          checks on a CUDA device, with this machine's own python3"
	@echo "make clean        remove everything that make made"

demo: $(VENV)/.recipes
	@$(bin)/memtrain demo

# A sub-make per part: they run in this order even under -j, and the first that fails ends the run.
test: $(VENV)/.dev
	@for part in lint types unit oldest projects docs wheel-check; do \
		start=$$(date +%s); \
		echo "== $$part"; \
		$(MAKE) --no-print-directory $$part || exit 1; \
		echo "== $$part passed in $$(($$(date +%s) - start)) s"; \
	done

lint: $(VENV)/.dev $(VENV)/.lint
	@$(bin)/ruff check --quiet .
	@$(bin)/ruff format --quiet --check .
	@$(bin)/codespell
	@PYTHONPATH=$(VENV)/.lint $(bin)/python -m pydoclint.main --quiet lightning_memtrain recipes
	@$(bin)/lint-imports > $(VENV)/import-contracts.txt || { cat $(VENV)/import-contracts.txt; exit 1; }

# The layout of the wheel, so that the recipes are checked under the name that they import each other by.
types: $(VENV)/.dev
	@rm -rf $(VENV)/.types && mkdir $(VENV)/.types
	@cp -Rp lightning_memtrain $(VENV)/.types/ && cp -Rp recipes $(VENV)/.types/lightning_memtrain/
	@cd $(VENV)/.types && $(abspath $(bin))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
		--no-error-summary

# One thread per worker: two workers on two cores, and byte counts that do not depend on the machine.
unit: $(VENV)/.translation
	@OMP_NUM_THREADS=1 $(bin)/python -m pytest -q -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

# The tests that say Lightning or torchmetrics, and those of the command line, which starts them; the others test
# what does without a trainer. Their own deprecations under today's torch are no errors here.
oldest: $(VENV)/.oldest
	@PYTHONPATH=$(VENV)/.oldest $(bin)/python -c 'import lightning, torchmetrics; \
		print("Lightning", lightning.__version__, "and torchmetrics", torchmetrics.__version__)'
	@OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/.oldest $(bin)/python -m pytest -q -n $(PYTEST_WORKERS) \
		--override-ini filterwarnings=default --override-ini cache_dir=.pytest_cache/oldest \
		$$(grep -rlE '^ *(import|from) (lightning|pytorch_lightning|torchmetrics)\b' tests/unit --include='test_*.py' \
			| grep -v '^tests/unit/cli/') tests/unit/cli $(PYTEST_ARGS)

# In the folder are neither torch nor Lightning: both are those of .venv, under either name of Lightning.
projects: $(VENV)/.projects
	@if [ -d $</gluonts ]; then \
		OMP_NUM_THREADS=1 PYTHONPATH=$< $(bin)/python -m pytest -q --override-ini cache_dir=.pytest_cache/projects \
			tests/projects $(PYTEST_ARGS); \
	else \
		echo "the projects could not be installed; what trains them is skipped"; \
	fi

# Other examples at each call; a failure prints how to try its example again. No part of `make test`.
nightly: $(VENV)/.translation
	@OMP_NUM_THREADS=1 MEMTRAIN_HYPOTHESIS_PROFILE=random $(bin)/python -m pytest -q -n $(PYTEST_WORKERS) \
		-m hypothesis --timeout 3600 $(PYTEST_ARGS)

docs: $(VENV)/.dev
	@$(bin)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

wheel-check: $(VENV)/.dev
	@PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(bin)/python tests/packaging/check_wheel.py

gpu:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then \
		$(PYTHON) -m unittest discover -s tests/gpu -t . && $(PYTHON) -m benchmarks.gpu $(GPU_ARGS); \
	else \
		echo "$(PYTHON) has no torch with a CUDA device: nothing was checked."; \
	fi

# Versions that already stand in constraints.txt are kept; delete a line to let it move. What torch pins to
# its own CUDA build is left out, so that CPU builds and other CUDA builds of the same torch can be used.
constraints:
	@uv pip compile pyproject.toml --quiet --extra all --universal --python-version 3.10 \
		--no-annotate --no-header --no-emit-package lightning-memtrain --output-file constraints.txt
	@sed -i -E '/^(nvidia-|cuda-|triton)/d; 1i # Written by `make constraints`: what `make demo` and `make test` install.' \
		constraints.txt

clean:
	@rm -rf $(VENV) docs/_build build dist runs lightning_logs wandb
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find lightning_memtrain recipes benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.recipes: $(bin)/python $(set_up)
	@echo "== installing the library with its recipes (some minutes, once)"
	@$(pip) install --editable '.[recipes]'
	@touch $@

$(VENV)/.dev: $(bin)/python $(set_up)
	@echo "== installing the library with its test tools (some minutes, once)"
	@$(pip) install --editable '.[dev]'
	@touch $@ $(VENV)/.recipes

$(VENV)/.translation: $(VENV)/.dev
	@READTHEDOCS=1 $(pip) install --no-build-isolation --no-deps $(translation) \
		|| echo "fairseq could not be installed; the tests of translation will skip"
	@touch $@

$(VENV)/.projects: constraints-projects.txt | $(VENV)/.dev
	@rm -rf $@
	@$(bin)/python -m pip --quiet --quiet --disable-pip-version-check install --no-deps --only-binary :all: \
		--target $@ --requirement $< || { rm -rf $@; mkdir $@; }
	@touch $@

# Packages that must not be in .venv itself lie in folders that go before it on the path.
$(VENV)/.lint $(VENV)/.oldest: $(VENV)/.%: constraints-%.txt | $(VENV)/.dev
	@rm -rf $@
	@$(bin)/python -m pip --quiet --quiet --disable-pip-version-check install --no-deps --target $@ --requirement $<
	@touch $@
