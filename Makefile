# The two commands of the README, each of which sets up what it needs in .venv.
#
#   make demo     train on real digits and detect outliers, then find odd pictures, 3 minutes
#   make test     the tests, under 5 minutes on two cores
#   make test-faults   kills, full disks, damaged files, many processes: some 10 minutes, prints a
#                 table
#   make test-slurm   the batch scripts on a Slurm of one node and one of two, which it starts (as
#                 root) and stops, some 3 minutes
#   make mutants  plant one fault at a time in a copy and see that a test finds it, under 30 minutes
#   make lint     ruff
#   make costs    peak memory and time of features and detection
#   make bench    ours beside the plain way, at sizes for a CPU, under 5 minutes; writes the records
#                 and their table in docs/costs.md
#   make scaling  cost of detection up to 10^6 images and of training in two processes, some 4
#                 minutes; writes its record and its tables in docs/costs.md
#
# make PYTHON=python3.12 ... chooses the interpreter that .venv is made of (3.10 to 3.13).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-faults test-slurm mutants lint costs bench scaling clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(BIN)/python reproduce.py demo --seeds 1 --results-dir demo_results
	$(BIN)/python -m infra.demo_pictures demo_results/pictures
	$(BIN)/python detect.py demo_results/pictures/inbox --good demo_results/pictures/good --out demo_results/odd

test: $(VENV)/ready-dev
	$(BIN)/python -m ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-faults: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/faults

test-slurm: $(VENV)/ready-dev
	$(BIN)/python -m pytest tests/slurm

mutants: $(VENV)/ready-dev
	$(BIN)/python tests/mutants.py

lint: $(VENV)/ready-dev
	$(BIN)/python -m ruff check .

costs: $(VENV)/ready
	$(BIN)/python benchmarks/costs.py

bench: $(VENV)/ready
	$(BIN)/python benchmarks/bench_step.py --quick --fast
	$(BIN)/python benchmarks/bench_augment.py --quick
	$(BIN)/python benchmarks/bench_extract.py --quick
	$(BIN)/python benchmarks/bench_detection.py --quick
	$(BIN)/python benchmarks/table.py --write docs/costs.md

scaling: $(VENV)/ready
	$(BIN)/python benchmarks/scaling.py --write docs/costs.md

$(VENV)/ready: requirements.txt tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c tests/constraints.txt
	touch $@

$(VENV)/ready-dev: $(VENV)/ready tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt -c tests/constraints.txt
	touch $@

clean:
	rm -rf $(VENV)
