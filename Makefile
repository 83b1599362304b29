# Two commands do everything on a fresh machine: `make demo` and `make test`.
# With a GPU, name your own build of torch:  make demo TORCH=torch
PYTHON ?= python3
TORCH ?= torch==2.13.0
SUBJECT ?= animal
SEED ?= 0
# The human clip where it is on disk already; it is downloaded otherwise.
HUMAN ?= $(wildcard ../shared/data/human)
ARGS ?=
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: help install demo test lint format clean

help:
	@echo "make demo [SUBJECT=animal|human] [SEED=0] [ARGS=...]   from videos to 3D keypoints and a report, under runs/"
	@echo "make test [ARGS=...]                                   the test suite"
	@echo "make lint | format                                     ruff and mypy | apply ruff's format"
	@echo "make clean                                             remove .venv and what was built"

install: $(STAMP)

# torch comes first and alone, so that nothing after it can bring another build along.
$(STAMP): pyproject.toml setup.py
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip "setuptools>=77" wheel ninja
	$(RUN)/python -c "import torch" 2>/dev/null || $(RUN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[train,dev]"
	touch $@

demo: $(STAMP)
	BKIND3D_HUMAN=$(HUMAN) $(RUN)/bkind3d demo --subject $(SUBJECT) --seed $(SEED) --force $(ARGS)

test: $(STAMP)
	$(RUN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(STAMP)
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
