# The two commands: `make train` and `make test`. PYTHON chooses the interpreter, ARGS the overrides of the recipe.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test test-wheel test-envs test-football test-scale check results docs size clean

train: .venv/train
	$(BIN)/python recipes/mars_vmas.py $(ARGS)

test: .venv/test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-wheel: # what `pip install` gives, in an environment and a folder of its own: train, copy, edit, export
	tests/wheel.sh $(PYTHON)

test-envs: .venv/test-envs # the wrappers of other packages' environments and policies that play there, which `make test` skips
	OMP_NUM_THREADS=1 JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.venv/jax \
		$(BIN)/python -m pytest tests/envs tests/test_main.py $(ARGS)

test-football: .venv/test-football # builds the engine; docs/environments.md lists what it needs from the system
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/envs/wrappers/test_football.py $(ARGS)

test-scale: .venv/test-scale # Ray, torchrun, jobs, and what survives which kill: minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/collectors/test_workers.py tests/recipes/test_scale.py $(ARGS)

results: .venv/train # a small part of results/ again; pages in runs/study_small/*/page, finished runs are skipped
	$(BIN)/python benchmarks/study.py small $(ARGS)

docs: .venv/docs # the site, at http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve $(ARGS)

size: # lines of package code, without and with documentation
	$(PYTHON) benchmarks/size.py torchrl_marl recipes

clean:
	rm -rf .venv

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/train: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing PyTorch, TorchRL, VMAS and what they need into .venv: minutes, once."
	$(PIP) --editable ".[vmas,wandb,plot]"
	touch $@

.venv/test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[vmas,wandb,plot,seps,tune,export,video,dev]"
	touch $@

.venv/docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[docs]"
	touch $@

.venv/test-envs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[vmas,wandb,plot,dev,gym,mpe,mamujoco,jax]"
	touch $@

# Its build looks for psutil in the python3 that is first on the path, and needs a setuptools of before version 81.
.venv/test-football: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --upgrade psutil six wheel "setuptools<81"
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable ".[vmas,wandb,plot,dev,football]"
	touch $@

.venv/test-scale: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[vmas,wandb,plot,dev,scale]"
	touch $@
