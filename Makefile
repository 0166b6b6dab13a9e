# Every target sets up .venv first, once. PYTHON chooses the interpreter (3.11 or newer), TORCH_INDEX another package
# index to take torch and torchvision from (the README says when that is useful).
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
RUN := $(VENV)/bin/python

# No progress bars in test and page outputs; the notebooks that a person runs have them.
QUIET := TQDM_DISABLE=1

.PHONY: lab test course notebooks bench lint help
.DEFAULT_GOAL := help

help:
	@echo "make lab        open JupyterLab at the first notebook"
	@echo "make test       run every helper test and execute every notebook"
	@echo "make course     run all notebooks in order, write pages to build/course/"
	@echo "make notebooks  run all notebooks and store their outputs in place (for maintainers)"
	@echo "make bench      measure what the helpers cost and what freezing saves, as ratios"
	@echo "make lint       check style"

lab: $(VENV)/ready
	$(RUN) -m jupyter lab --LabApp.default_url=/lab/tree/notebooks/01_layer_lr_theory.ipynb

test: $(VENV)/ready
	$(QUIET) $(RUN) -m pytest --nbmake --nbmake-timeout=900 --durations=10 tests notebooks

course: $(VENV)/ready
	$(RUN) -m layerlr_helpers.course

notebooks: $(VENV)/ready
	$(RUN) -m layerlr_helpers.course --in-place

bench: $(VENV)/ready
	$(RUN) benchmarks/overhead.py
	$(RUN) benchmarks/freezing.py
	$(RUN) benchmarks/optimizers.py

lint: $(VENV)/ready
	$(RUN) -m ruff check .

$(VENV)/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; try make PYTHON=python3.12 …")'
	@echo "Setting up $(VENV), once: creating it, then installing requirements.txt and the helpers (a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(RUN) -m pip install --quiet --index-url $(TORCH_INDEX) $(shell grep -E '^torch(vision)?==' requirements.txt))
	$(RUN) -m pip install --quiet -r requirements.txt
	$(RUN) -m pip install --quiet --no-deps --editable .
	@touch $@
	@echo "$(VENV) is ready"
