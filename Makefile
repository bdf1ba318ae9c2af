# Each line is a command a person could type.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench bench-model bench-select bench-train bench-pipeline

demo: .venv/installed
	$(BIN)/alit run pipelines/configs/demo.yaml

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m tests.bench.bench

bench-model: .venv/installed
	$(BIN)/python -m tests.bench.bench_model

bench-train: .venv/installed
	$(BIN)/python -m tests.bench.bench_train

bench-pipeline: .venv/installed
	$(BIN)/python -m tests.bench.bench_pipeline
	$(BIN)/python -m tests.bench.bench_rerun

bench-select: .venv/installed
	$(BIN)/python -m tests.bench.bench_select

.venv/installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,judges]'
	touch $@
