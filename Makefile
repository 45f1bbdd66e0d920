# The two commands are 'make demo' and 'make test'; each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format

demo: .venv/run.stamp
	$(BIN)/python -m dataset.demo data/demo
	$(BIN)/python train.py --config demo.yaml
	@echo "Look at outdir/demo/examples.png; start over with: rm -r outdir/demo"

test: .venv/dev.stamp
	$(BIN)/python -m pytest

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/run.stamp: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
