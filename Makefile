# Two commands do everything on a fresh machine: `make demo` and `make test`.
# With a GPU, name your own build of torch:  make demo TORCH=torch
PYTHON ?= python3
TORCH ?= torch==2.13.0
SUBJECT ?= animal
SEED ?= 0
# The human clip where it is on disk already; it is downloaded otherwise.
BKIND3D_HUMAN ?= $(wildcard ../shared/data/human)
export BKIND3D_HUMAN
ARGS ?=
VENV := .venv
RUN := $(VENV)/bin
# Named after the build of torch, so that another TORCH= installs again.
STAMP := $(VENV)/installed-$(shell echo "$(TORCH)" | cksum | cut -d' ' -f1)

.PHONY: help install demo test lint format clean

help:
	@echo "make demo [SUBJECT=animal|human] [SEED=0] [ARGS=...]   from videos to 3D keypoints and a report, under runs/"
	@echo "make test [ARGS=...]                                   the test suite"
	@echo "make lint | format                                     ruff and mypy | apply ruff's format"
	@echo "make clean                                             remove .venv and what was built"

install: $(STAMP)

# torch comes first and alone, so that nothing after it can bring another build along.
$(STAMP): pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip "setuptools>=77" wheel ninja
	$(RUN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[train,dev]"
	touch $@

demo: $(STAMP)
	$(RUN)/bkind3d demo --subject $(SUBJECT) --seed $(SEED) --force $(ARGS)

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
