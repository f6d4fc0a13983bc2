# Thin names for the commands of the README. Each makes .venv when it is missing or older than its inputs.
PYTHON ?= python3
BIN := .venv/bin
CORES ?= 8
STAMP := .venv/.installed

# Snakemake on a folder, also one that a killed run left locked: $(RUN) FOLDER [OPTIONS] -- TARGET ...
RUN = . $(BIN)/activate && workflow/run.sh

# A GPU takes the full memory, three domains and the recipe; without one a smaller memory, one domain and set values.
SMOL ?= config/smol.yaml config/$(if $(wildcard /dev/nvidia0),recipe,smol-cpu).yaml

# What `make repair` looks after: a table, the config files of its run (none: the default) and the folder with `results`.
TARGET ?= results/table3.csv
CONFIG ?=
FOLDER ?= .
PROFILE ?= profiles/default
# The recipe reads them as variables of the shell, so that none of their characters is taken for a command.
export TARGET CONFIG FOLDER PROFILE

.PHONY: install table3 repair smol test core mutants check bench bench-search bench-cells bench-gpu report snakemake-report regression

install: $(STAMP)

# torch goes first and pinned: without it pip may take a build with gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt memdec_hook.py memdec_hook.pth
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[cpu,dev]'
	touch $@

table3: $(STAMP)
	$(RUN) . --cores $(CORES) -- results/table3.csv
	@cat results/table3.md

# Makes again what a finished table has lost, and nothing else:
#   make repair TARGET=results/table1.csv FOLDER=build/smol CONFIG='config/smol.yaml config/smol-cpu.yaml'
repair: $(STAMP)
	. $(BIN)/activate && set -f && workflow/repair.sh "$$FOLDER" --workflow-profile "$$PROFILE" \
	  $(if $(CONFIG),--configfile $$CONFIG) -- $$TARGET

# A real model of 135 M parameters from the package index; the work folder is build/smol.
smol: $(STAMP)
	mkdir -p build/smol
	$(RUN) build/smol --cores $(CORES) --workflow-profile profiles/smol --configfile $(SMOL) \
	  -- results/memories.csv results/table1.csv
	@cat build/smol/results/memories.md

TESTS ?= tests
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(TESTS)

# All but the slow ones: six of the thirteen minutes on two idle cores.
core: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m 'not slow' tests

# The workflow on a real Slurm of this machine, for root: apt-get install slurm-wlm munge rsync. It mostly waits, ten to twenty minutes.
.PHONY: cluster test-cluster
cluster: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[cpu,dev,cluster]'

test-cluster: cluster
	. $(BIN)/activate && python -m pytest -rs tests/cluster

# The tests without the slow ones, with the lowest version of every dependency, in an environment of its own under build/:
# 1.5 GB, and some ten minutes on two idle cores. Torch is the one of constraints.txt: of its lowest version, 2.11, the
# package index has only builds that bring gigabytes of CUDA along; that version was tried on a GPU. LOWEST_TORCH=2.11 takes it.
LOWEST := build/lowest
LOWEST_TORCH ?= $(patsubst torch==%,%,$(filter torch==%,$(file < constraints.txt)))
LOWEST_TESTS ?= tests
.PHONY: test-lowest
test-lowest:
	mkdir -p $(LOWEST)
	$(PYTHON) -m tests.lowest torch==$(LOWEST_TORCH) > $(LOWEST)/constraints.txt
	test -x $(LOWEST)/venv/bin/python || $(PYTHON) -m venv $(LOWEST)/venv
	$(LOWEST)/venv/bin/pip install -q -c $(LOWEST)/constraints.txt torch
	$(LOWEST)/venv/bin/pip install -q -c $(LOWEST)/constraints.txt -e '.[cpu,dev]'
	. $(LOWEST)/venv/bin/activate && python -m pytest -n 2 -m 'not slow' $(LOWEST_TESTS)

# Plant known bugs one at a time; every one must make a test fail. Some ten minutes of CPU time.
mutants: $(STAMP)
	$(BIN)/python tests/mutants/run.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	. $(BIN)/activate && snakemake --lint
	$(BIN)/python -m benchmarks.report --check
	$(BIN)/python -m docs.build --check
	for bug in tests/mutants/*.patch; do git apply --check --recount -C1 $$bug || exit 1; done

# Every command of README.md and the other pages, run in a scratch folder or skipped with its reason.
.PHONY: docs-check
docs-check: $(STAMP)
	$(BIN)/python -m docs.check

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run --out results/benchmarks.csv

# Recall, total variation and speed of every kind of index on 300,000 keys; half an hour on two cores.
bench-search: $(STAMP)
	$(BIN)/python -m benchmarks.search --out results/search.csv

# Kind `cells` against FAISS on 300,000 keys, and its growth with the number of keys; an hour on two cores.
bench-cells: $(STAMP)
	$(BIN)/python -m benchmarks.search --plan cells --repeats 8 --out results/cells.csv
	$(BIN)/python -m benchmarks.cell_growth --out results/cell-growth.csv

# CPU time and memory of each stage at 1, 4 and 16 times the input: some nine minutes of CPU time.
.PHONY: bench-growth
bench-growth: $(STAMP)
	$(BIN)/python -m benchmarks.growth --out results/growth.csv

# Where CUDA is: tests, hot paths, latency, Table 1 and tasks of one domain, in at most 13 minutes on an H100.
bench-gpu: $(STAMP)
	. $(BIN)/activate && bash benchmarks/gpu.sh results/gpu

# One page of all results that are there: `make report CONFIG=config/smol.yaml FOLDER=build/smol`. What is missing is named
# in the page.
report: $(STAMP)
	. $(BIN)/activate && set -f && for file in $$CONFIG; do set -- "$$@" --config "$$file"; done \
	  && memdec report "$$@" --results "$$FOLDER/results" --out "$$FOLDER/results/report.html"

# Snakemake's own page: each table with the jobs and rules that made it.
snakemake-report: $(STAMP)
	$(RUN) . --cores $(CORES) -- results/table3.csv
	. $(BIN)/activate && snakemake --report results/snakemake-report.html

# Small run against the committed baseline: exit 1 when a number moved, 3 when text, task rows or versions differ.
regression: $(STAMP)
	. $(BIN)/activate && tests/regression/run.sh build/regression

# Whether that check sees six planted faults; CI does it once a week.
.PHONY: sensitivity
sensitivity: regression
	. $(BIN)/activate && tests/regression/sensitivity.sh build/regression

# Every table, figure and claim of the mini scale, and the report. The rows of the tasks come from MEMDEC_DATA or the Hub.
.PHONY: all
all: $(STAMP)
	$(RUN) . --cores $(CORES) -- results/all

# Real pretrained models of 1 and 3 million parameters on six corpora, every system tuned; needs MEMDEC_TEST_DATA.
.PHONY: pretrained
pretrained: $(STAMP)
	mkdir -p build/pretrained
	$(RUN) build/pretrained --cores $(CORES) --workflow-profile profiles/default --configfile config/pretrained.yaml \
	  config/recipe.yaml -- results/rivals.csv results/gains.svg

# The paper's whole grid with stand-ins of a few thousand weights: some twenty minutes on two cores. Task rows as for `make all`.
.PHONY: paper-shapes
paper-shapes: $(STAMP)
	mkdir -p build/paper-shapes
	$(BIN)/python -m tests.paper_shapes build/paper-shapes/shapes
	$(RUN) build/paper-shapes --cores $(CORES) --workflow-profile profiles/default \
	  --configfile config/paper.yaml config/paper-shapes.yaml -- results/all

# Publish what a run wrote, for README.md and the other pages: `make reference FOLDER=build/smol`.
.PHONY: reference
reference: $(STAMP)
	$(BIN)/python -m docs.publish "$$FOLDER/results"
