PYTHON ?= python3
WORKERS ?= 2
OUTPUT ?= demo-output
SEEDS ?= 12

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS_INSTALLED := $(VENV)/.installed-tools
# The lower end of pyproject.toml's range, what users of Python 3.10 get, and the newest, which calls the cache by another name.
RELEASES ?= 5.17.0 5.20.2 5.24.0
TYPES := build/types
SUITE := build/suite

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-tools suite check adapters drift published releases clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## real weights: convert, prove, chat, fine-tune, export back (OUTPUT=folder)
	$(BIN)/hf-variants demo --output "$(OUTPUT)"

# One OpenMP thread per worker: two workers with a full thread pool each are slower than one.
test: $(INSTALLED)  ## run the tests (WORKERS=2, ARGS="-k pattern"); needs no network
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'not whole' $(ARGS)

test-all: $(TOOLS_INSTALLED)  ## the same and other people's tools on our models; writes docs/tools.md
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --tools-table=docs/tools.md $(ARGS)

test-tools: $(TOOLS_INSTALLED)  ## other people's tools alone, without what takes several minutes a test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'whole and not exhaustive' $(ARGS)

# Those of the installed release, from PyPI. Their markers are not ours.
suite: $(INSTALLED)  ## transformers' own testers on one config per kind of variant
	$(BIN)/python -m tests.suite.archive $(SUITE)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$(SUITE) $(BIN)/python -m pytest -n $(WORKERS) -q -W ignore \
		-o addopts= -o strict_markers=false tests/suite/run_suite.py $(ARGS)

# mypy cannot follow the folder mapping of an editable install, so it reads the package in its installed shape, as links.
check: $(INSTALLED)  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf $(TYPES) && mkdir -p $(TYPES)/hf_variants
	ln -s "$(CURDIR)"/hf_variants/* $(TYPES)/hf_variants/
	ln -s "$(CURDIR)/conversion" "$(CURDIR)/model_cards" "$(CURDIR)/docs" $(TYPES)/hf_variants/
	ln -s "$(CURDIR)/hf_variants_cli.py" $(TYPES)/
	cd $(TYPES) && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" -p hf_variants -m hf_variants_cli

drift: $(INSTALLED)  ## compare every native type with the installed transformers, as a table (SEEDS=12)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.drift --seeds $(SEEDS) --workers $(WORKERS)

published: $(INSTALLED)  ## published configs, shrunk: which convert, and in what they equal the stock class (FOLDER=folder)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.published $(FOLDER)

adapters: $(INSTALLED)  ## the table of adapter methods and native types; writes docs/adapters.md
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.adapter_table > docs/adapters.md

hostile: $(INSTALLED)  ## damaged and hostile inputs to every command: what comes of them, as a table (ARGS=--verbose)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.hostile.table $(ARGS)

releases: $(RELEASES:%=release-%)  ## the same with older transformers, shortly (RELEASES="5.17.0 5.24.0")

release-%: .venv-%/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-$*/bin/python -m tests.drift --seeds 1 --workers $(WORKERS) --minutes 12

clean:  ## remove the virtual environment, caches and build output, but not the demo's results
	rm -rf $(VENV) .venv-* build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and pinned, so that no other package's open range picks a different and far larger build.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
		"Python %d.%d is too old for hf-variants. Run make PYTHON=python3.10, or newer." % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "$(PYTHON) cannot make virtual environments. Install its venv package, e.g. apt install python3-venv."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

$(TOOLS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt -e '.[tools]'
	@touch $@

# An environment for each release, with the Hub client that it wants.
.PRECIOUS: .venv-%/.installed
.venv-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-$*
	grep -Ev '^(transformers|huggingface_hub)=' constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install -c .venv-$*/constraints.txt torch
	.venv-$*/bin/python -m pip install -c .venv-$*/constraints.txt -e . transformers==$*
	@touch $@
