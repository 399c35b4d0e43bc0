# Everything a reader or a contributor does, one word each. `make help` lists the words.
PY := .venv/bin/python
PYTEST := $(PY) -m pytest
ARGS ?=
JOBS ?= auto

# Chapters and tests run on what is in the repository: nothing here may reach for the network or for published weights.
OFFLINE := env -u MINIVLA_PUBLISHED HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

# JupyterLab refuses to run as root unless told, and asks about news from its makers unless told not to.
LAB_OPTIONS := --ServerApp.root_dir=notebooks --LabApp.news_url=None \
	--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help install lab test test-slow lint book zoo bench ledger notebooks format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## make .venv and install everything at pinned versions; at once when nothing changed
	@$(PY) -I tools/install.py --check 2>/dev/null || { python=$$(tools/find_python.sh) && "$$python" tools/install.py; }

lab: install ## open the chapters in JupyterLab (ARGS="--no-browser --port 8899" where there is no screen)
	$(PY) -m jupyterlab $(LAB_OPTIONS) $(ARGS)

test: install lint ## ruff, mypy, pytest and every chapter under nbval: what continuous checks run
	$(OFFLINE) $(PYTEST) -n $(JOBS) --durations=10 --nbval --doctest-modules minivla tests notebooks $(ARGS)

test-slow: install ## the tests that take minutes: published sizes, a thousand seeds, the wheel
	$(OFFLINE) $(PYTEST) -m slow --durations=10 tests $(ARGS)

lint: install ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy minivla

book: install ## build the book into book/_build/html and check that it needs no other host
	$(OFFLINE) $(PY) tools/build_book.py $(ARGS)

zoo: install ## train a shipped checkpoint again: make zoo NAME=act-tabletop
	$(PY) -m minivla.zoo $(NAME) $(ARGS)

bench: install ## speed and memory: Tabletop, and minivla beside LeRobot on the same weights
	$(PY) -m benchmarks $(ARGS)

ledger: install ## run the parity tests and write what they measured to book/ledger
	$(OFFLINE) MINIVLA_LEDGER=1 $(PYTEST) $(wildcard tests/policies/test_*_parity.py tests/policies/test_*_layouts.py) $(ARGS)

notebooks: install ## run every chapter again and store its outputs (ARGS=notebooks/02_act.ipynb for one)
	$(OFFLINE) $(PY) tools/run_notebooks.py $(ARGS)

format: install ## ruff's formatter and its safe fixes, notebooks included
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove what the other targets made, .venv excepted
	rm -rf book/_build book/api build dist .pytest_cache .mypy_cache .ruff_cache
