# Everything runs in a virtual environment made here; nothing but Python >= 3.10 is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= runs/demo
REFERENCE ?= build/reference
WORKERS ?= 2

.PHONY: demo test coverage lint docs clean

demo: $(VENV)/.experiments
	$(BIN)/python experiments/demo.py --output $(OUTPUT)

test: $(VENV)/.test # one thread for each worker: most tests are too small for more
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(COVERED)

coverage: COVERED = --cov --cov-report=term --cov-fail-under=95
coverage: test # takes up to 40 % longer

lint: $(VENV)/.lint build/types/nac_gpu/kernels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	$(BIN)/python -m pdoc nac_gpu nac_gpu.clustering.methods nac_gpu.testing -d google -o $(REFERENCE)

$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

build/types/nac_gpu/kernels: # pyright cannot see that kernels/ is installed as nac_gpu.kernels
	mkdir -p build/types/nac_gpu
	touch build/types/nac_gpu/__init__.py
	ln -sfn ../../../kernels $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .coverage
