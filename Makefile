# make demo   set everything up and run the quickstart
# make test   set everything up and pass the tests
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: setup demo test test-gpu check bench fashion clean

setup: $(VENV)/.ready

# uv installs the pinned versions; --no-deps on the project keeps to them.
$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
	$(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode -r requirements.txt
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/ray-subnets run quickstart --overwrite

test: setup
	$(BIN)/python -m pytest

# Needs a GPU.
test-gpu: setup
	$(BIN)/python -m pytest -m gpu

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

bench: setup
	$(BIN)/python -m analysis.benchmarks.training_step
	$(BIN)/python -m analysis.benchmarks.children

# The README's Fashion-MNIST table: three configs, three seeds, about an hour on two cores.
fashion: setup
	for kind in noisy sparse stochastic; do for seed in 0 1 2; do \
		$(BIN)/ray-subnets run fashion_mnist_$$kind seed=$$seed --out runs/fashion_mnist_$$kind-$$seed || exit; \
	done; done
	$(BIN)/python -m analysis.seeds runs/fashion_mnist_noisy-* runs/fashion_mnist_sparse-* runs/fashion_mnist_stochastic-*

clean:
	rm -rf $(VENV) build *.egg-info
