# Two commands do everything on a fresh machine: `make demo` and `make test`.
# With a GPU, name your own build of torch:  make demo TORCH=torch
PYTHON ?= python3
TORCH ?= torch==2.13.0
# A build of torch with CUDA brings its own Triton; beside the CPU build the tests interpret and compile with this one.
TRITON ?= $(if $(filter torch==2.13.0,$(TORCH)),triton==3.6.0)
SUBJECT ?= animal
SEED ?= 0
# The human clip where it is on disk already; it is downloaded otherwise.
BKIND3D_HUMAN ?= $(wildcard ../shared/data/human)
export BKIND3D_HUMAN
ARGS ?=
VENV := .venv
RUN := $(VENV)/bin
# Named after the build of torch, so that another TORCH= installs again.
STAMP := $(VENV)/installed-$(shell echo "$(TORCH) $(TRITON)" | cksum | cut -d' ' -f1)
# Built again when a source has changed; without a C++ compiler there is none, and every rule works without it.
LIBRARY := bkind3d_kernels/_cpu.so
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu)
CPP := $(NATIVE) $(wildcard tests/kernels/*/*.h tests/kernels/*/*.cpp tests/kernels/*/*.cu)
# Where there is nvcc, it compiles for one architecture here, and for all of a release beside another build of torch.
export TORCH_CUDA_ARCH_LIST ?= $(if $(filter torch==2.13.0,$(TORCH)),9.0)
# The oldest torch that pyproject.toml allows.
OLDEST_TORCH ?= torch==2.10.0
OLDEST := build/oldest-torch

.PHONY: help install demo test lint format docs sanitize check-oldest-torch clean

help:
	@echo "make demo [SUBJECT=animal|human|rat|human-sim]         from videos to 3D keypoints and a report, under runs/;
	@echo "          [SEED=0] [ARGS=...]                          rat and human-sim need libegl1 libgl1 libgl1-mesa-dri"
	@echo "make test [ARGS=...]                                   the test suite"
	@echo "make lint | format                                     ruff, mypy and clang-format | apply the formats"
	@echo "make docs                                              the docs site, strict about links, in build/site"
	@echo "make sanitize                                          the kernels under sanitizers; needs g++"
	@echo "make check-oldest-torch [OLDEST_TORCH=torch==2.10.0]   the wheel built here, tested with another torch: gigabytes"
	@echo "make clean                                             remove .venv and what was built"

install: $(STAMP) $(LIBRARY)

# torch comes first and alone, so that nothing after it can bring another build along.
$(STAMP): pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip "setuptools>=77" wheel ninja
	$(RUN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation $(TRITON) -e ".[train,dev,sim]"
	touch $@

$(LIBRARY): $(NATIVE) | $(STAMP)
	$(RUN)/python setup.py -q build_ext --inplace

demo: $(STAMP) $(LIBRARY)
	$(RUN)/bkind3d demo --subject $(SUBJECT) --seed $(SEED) --force $(ARGS)

test: $(STAMP) $(LIBRARY)
	$(RUN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/clang-format --dry-run --Werror $(CPP)

format: $(STAMP)
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .
	$(RUN)/clang-format -i $(CPP)

# Sphinx imports the packages for their docstrings; nothing that it needs touches torch.
docs: $(STAMP)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -r docs/site/requirements.txt
	$(RUN)/sphinx-build -q -W --keep-going -b html -c docs/site . build/site

sanitize: $(STAMP)
	$(RUN)/python tests/kernels/native/sanitize.py

# Left out: the reference's second derivatives are those of grid_sample, which came with a later torch; kernels that are
# interpreted or emulated, which take long and need nothing of the wheel.
check-oldest-torch: $(STAMP)
	test -x $(OLDEST)/venv/bin/python || $(PYTHON) -m venv $(OLDEST)/venv
	$(OLDEST)/venv/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST_TORCH) "numpy<2.4" ninja pytest hypothesis mpmath
	rm -rf $(OLDEST)/wheel
	$(RUN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps -w $(OLDEST)/wheel .
	$(OLDEST)/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall $(OLDEST)/wheel/*.whl
	{ date -u +%F; echo "commit $$(git describe --always --dirty)"; \
	  $(RUN)/python -c "import torch; print('built against torch', torch.__version__)"; \
	  cd $(OLDEST) && venv/bin/python -m bkind3d_kernels.info; } | sed "s#$(CURDIR)/##g" >$(OLDEST)/log
	$(OLDEST)/venv/bin/pytest -q --no-header -p no:cacheprovider -W ignore::DeprecationWarning \
	  --deselect tests/kernels/test_unproject.py::test_second_derivative -k "not triton and not emulated" \
	  tests/kernels/test_cpp_*.py $(foreach op,unproject soft_argmax3d linear_soft_argmax3d rasterize_edges,tests/kernels/test_$(op).py) >>$(OLDEST)/log \
	  || { cat $(OLDEST)/log; exit 1; }
	cat $(OLDEST)/log

clean:
	rm -rf $(VENV) bkind3d_kernels/*.so build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
