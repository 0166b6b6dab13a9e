# Every target sets up .venv first, once. PYTHON chooses the interpreter (3.11 or newer), TORCH_INDEX another package
# index to take torch and torchvision from (docs/install.md says when that is useful), PORT the port of `make lab`.
PYTHON ?= python3
TORCH_INDEX ?=
PORT ?=
VENV := .venv
# Programs are started through Python, since their own scripts in .venv/bin break when this folder is moved.
RUN := $(VENV)/bin/python
# On a terminal pip shows what it does, since it downloads for minutes; elsewhere it writes only what went wrong.
PIP = $(RUN) -m pip install $$(test -t 2 || echo --quiet)

# No progress bars in test and page outputs; the notebooks that a person runs have them.
QUIET := TQDM_DISABLE=1
# Test files side by side. Each process computes on one thread, so that they do not get in each other's way.
TESTS := $(QUIET) OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

.PHONY: help setup lab lab-read check test integrations course notebooks exercises slides cheatsheet bench lint
.DEFAULT_GOAL := help

help:
	@echo "make setup      install everything into .venv, once; every other target does that first"
	@echo "make lab        open JupyterLab with your own copies of the notebooks, in learn/; PORT=8889 chooses the port"
	@echo "make lab-read   open the notebooks as they are stored, with all outputs"
	@echo "make check      check style and imports and run the quick tests, in one to two minutes"
	@echo "make test       run every helper test and execute every notebook"
	@echo "make integrations  install the libraries that docs/integrations.md is about, and run the tests with them"
	@echo "make course     run all notebooks in order, write pages to build/course/"
	@echo "make notebooks  run all notebooks and store their outputs in place (for maintainers)"
	@echo "make exercises  make the exercises and their solutions from notebooks/exercises/source (for maintainers)"
	@echo "make slides     make the slides of the lessons in build/slides/ (needs npm, which fetches reveal.js)"
	@echo "make cheatsheet  make the course on two printed pages, build/cheatsheet.pdf"
	@echo "make bench      measure what the helpers cost and what freezing saves, as ratios"
	@echo "make lint       check style, imports and spelling"

setup: $(VENV)/ready
	@echo "$(VENV) is ready; make lab opens the first notebook"

lab: $(VENV)/ready
	@$(RUN) tools/lab.py $(if $(PORT),--port="$(PORT)")

lab-read: $(VENV)/ready
	@$(RUN) tools/lab.py --read $(if $(PORT),--port="$(PORT)")

check: lint
	$(TESTS) -m "not slow" tests

# A notebook takes minutes, and only one that hangs reaches the limit of an hour a cell.
test: $(VENV)/ready
	$(TESTS) --durations=10 tests
	$(QUIET) $(RUN) -m pytest --nbmake --nbmake-timeout=3600 --durations=10 notebooks

integrations: $(VENV)/ready
	$(PIP) --editable ".[compare]"
	$(QUIET) OMP_NUM_THREADS=1 $(RUN) -m pytest tests/integrations

course: $(VENV)/ready
	$(RUN) -m layerlr_helpers.course

notebooks: $(VENV)/ready
	$(RUN) -m layerlr_helpers.course --in-place

exercises: $(VENV)/ready
	$(RUN) tools/build_exercises.py

REVEAL := build/reveal/node_modules/reveal.js/dist
slides: $(VENV)/ready
	@command -v npm > /dev/null || { echo "make slides needs npm, for reveal.js; it comes with Node.js"; exit 1; }
	npm install --silent --no-save --prefix build/reveal reveal.js@6.0.2
	$(RUN) tools/build_slides.py --reveal $(REVEAL)

cheatsheet: $(VENV)/ready
	$(RUN) tools/build_cheatsheet.py

bench: $(VENV)/ready
	$(RUN) benchmarks/overhead.py
	$(RUN) benchmarks/freezing.py
	$(RUN) benchmarks/optimizers.py

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -c "from importlinter.cli import lint_imports_command as check; check(['--no-logo', '--no-cache'])"
	$(RUN) -m codespell_lib

$(VENV)/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; try make PYTHON=python3.12 …")'
	@echo "Setting up $(VENV), once: creating it, then installing requirements.txt and the helpers (a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) --index-url "$(TORCH_INDEX)" $(shell grep -E '^torch(vision)?==' requirements.txt))
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	@touch $@
