# The two commands are 'make demo' and 'make test'; each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin
# A process a core, of one thread each: two threads in each would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
OLDEST := .venv-oldest/bin
# Where it is set, as in many containers, every command compiles what it imports: 12 s in place of 5.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-fast test-all test-oldest lint format docs-check

demo: .venv/run.stamp
	$(BIN)/python -m dataset.demo data/demo
	$(BIN)/python train.py --config demo.yaml
	@echo "Look at outdir/demo/examples.png; start over with: rm -r outdir/demo"

test: .venv/dev.stamp
	$(PYTEST) -m "not exhaustive"

test-fast: .venv/dev.stamp
	$(PYTEST) -m "not slow and not exhaustive"

test-all: .venv/dev.stamp
	$(PYTEST)

test-oldest: .venv-oldest/dev.stamp
	$(OLDEST)/python -m pytest

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs-check: .venv/dev.stamp
	$(BIN)/python -m pytest -q tests/test_docs.py

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pip would compile all of torch's modules, half a minute; those in use are compiled when imported.
.venv/run.stamp: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -r requirements.txt
	touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# The oldest torch that requirements.txt allows, and the torchvision of its day.
.venv-oldest/dev.stamp: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet "torch==2.6.*" "torchvision==0.21.*" -r requirements-dev.txt
	touch $@
