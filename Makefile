# make demo   set everything up and run the quickstart
# make test   set everything up and pass the tests
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RL_VENV ?= .venv-rl

.PHONY: setup demo rl test test-rl test-gpu test-cluster test-slow chaos check bench docs fashion study map map-lenet cheaper clean

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

# Files side by side, on as many cores as there are, up to four: a worker may start a Ray of its own.
test: setup
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

# ProcGen holds numpy and others to old versions, so it has an environment of its own; commands are
# .venv-rl/bin/ray-subnets then.
rl: $(RL_VENV)/.ready

$(RL_VENV)/.ready: requirements.txt pyproject.toml $(VENV)/.ready
	test -x $(RL_VENV)/bin/python || $(PYTHON) -m venv $(RL_VENV)
	grep -E '^(gymnasium|pytest|pytest-xdist|ray|torch|torchvision)==' requirements.txt \
		> $(RL_VENV)/constraints.txt
	$(BIN)/uv pip install --python $(RL_VENV)/bin/python --quiet --compile-bytecode \
		--constraints $(RL_VENV)/constraints.txt --editable '.[rl]' pytest pytest-xdist
	touch $@

# Policies with ProcGen's games.
test-rl: rl
	$(RL_VENV)/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile \
		tests/test_envs.py tests/test_ppo.py tests/test_policies.py tests/test_policy_run.py

# Needs a GPU.
test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# Several raylets, servers and killed processes on this machine; minutes.
test-cluster: setup
	$(BIN)/python -m pytest -m cluster

# Every network of strangers, exported too; minutes.
test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

# The API reference, from the docstrings, in build/docs.
docs: setup
	$(BIN)/python docs/build.py build/docs

# Faults of many kinds in real runs, as the README's table.
chaos: setup
	$(BIN)/python tests/faults/chaos.py

bench: setup
	$(BIN)/python -m analysis.benchmarks.training_step
	$(BIN)/python -m analysis.benchmarks.children
	$(BIN)/python -m analysis.benchmarks.distributed
	$(BIN)/python -m analysis.benchmarks.population_128
	$(BIN)/python -m analysis.benchmarks.trust_region
	$(BIN)/python -m analysis.benchmarks.sweeps
	$(BIN)/python -m analysis.benchmarks.rollouts
	$(BIN)/python -m analysis.benchmarks.whole_ppo
	$(BIN)/python -m analysis.benchmarks.kept_memory
	$(BIN)/python -m analysis.benchmarks.members
	$(BIN)/python -m analysis.benchmarks.features
	$(BIN)/python -m analysis.benchmarks.serving

# The README's Fashion-MNIST table: three configs, three seeds, about an hour on two cores.
fashion: setup
	for kind in noisy sparse stochastic; do for seed in 0 1 2; do \
		$(BIN)/ray-subnets run fashion_mnist_$$kind seed=$$seed --out runs/fashion_mnist_$$kind-$$seed || exit; \
	done; done
	$(BIN)/python -m analysis.seeds runs/fashion_mnist_noisy-* runs/fashion_mnist_sparse-* runs/fashion_mnist_stochastic-*

# One study of the dissertation's, three seeds: make study NAME=study_tuning
study: setup
	for seed in 0 1 2; do \
		$(BIN)/ray-subnets run $(NAME) seed=$$seed --out runs/$(NAME)-$$seed || exit; \
	done
	$(BIN)/python -m analysis.groups runs/$(NAME)-[0-9]*

# Where it pays: singles of many budgets, children of three parents, three seeds; about an hour on
# two cores for a width of 256.
WIDTHS ?= 256
PARENTS ?= 10 20 40
map: setup
	for width in $(WIDTHS); do for seed in 0 1 2; do \
		$(BIN)/ray-subnets run map_singles name=map-w$$width-singles seed=$$seed \
			model.hidden=[$$width,$$width] --out runs/map-w$$width-singles-$$seed || exit; \
		for parent in $(PARENTS); do \
			$(BIN)/ray-subnets run map_children name=map-w$$width-p$$parent seed=$$seed \
				model.hidden=[$$width,$$width] parent.epochs=$$parent \
				--out runs/map-w$$width-p$$parent-$$seed || exit; \
		done; \
	done; done
	$(BIN)/python -m analysis.where_it_pays runs/map-w* --figure analysis/figures/where_it_pays.png

# The same for a LeNet, from parents of 20 and 40 epochs; about an hour on two cores.
map-lenet: setup
	for seed in 0 1 2; do \
		$(BIN)/ray-subnets run map_lenet_singles name=map-lenet-singles seed=$$seed \
			--out runs/map-lenet-singles-$$seed || exit; \
		for parent in 20 40; do \
			$(BIN)/ray-subnets run map_lenet_children name=map-lenet-p$$parent seed=$$seed \
				parent.epochs=$$parent --out runs/map-lenet-p$$parent-$$seed || exit; \
		done; \
	done
	$(BIN)/python -m analysis.where_it_pays runs/map-lenet-* \
		--figure analysis/figures/where_it_pays_lenet.png

# What an answer costs, and what it can be cheapened to; minutes on two cores. Five seeds that no
# default was chosen on (0 to 2 are those of `make map`).
cheaper: setup
	for seed in 3 4 5 6 7; do \
		$(BIN)/ray-subnets run cheaper_inference seed=$$seed --out runs/cheaper_inference-$$seed || exit; \
	done
	$(BIN)/python -m analysis.cheaper_inference runs/cheaper_inference-[0-9]* \
		--weights 0.1 0.3 0.5 0.7 0.9 --figure analysis/figures/cheaper_inference.png

clean:
	rm -rf $(VENV) $(RL_VENV) build *.egg-info
