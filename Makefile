# make demo    train a small GPT-2 dense and with Mixed Sparsity Training, side by side; 3 to 9 minutes on 2 CPU cores
# make try     train a small GPT on a text of yours, make try DATA=my.txt, and write a report; aims at 4 minutes
# make test    lint, type check, all tests
# make lint    lint and type check alone
# make docs    build the documentation as a site that needs no network, site/index.html; stops at a broken link
# make bench   measure against the dense model on this machine; figures go to benchmarks/ledger.csv
# make clean   remove virtual environments, caches and build output (runs/ stays)
#
# Needs Python 3.11 or newer with venv and headers, and a C++ compiler; on Debian or Ubuntu:
#   apt install python3-venv python3-dev g++
#
# Another PyTorch:   make test TORCH="torch==2.14.1"     (any arguments of pip install: a wheel file, --index-url ...)
# Another Python:    make demo PYTHON=python3.12
# Both take effect when an environment is made: make clean first.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
# Passed on: make demo DEMO="--steps 2000", make test TESTS="tests/examples/test_example.py -k resume",
# make bench BENCH=layers
DEMO   ?=
DATA   ?=
BENCH  ?= layers train_step attention schedule forecast memory overhead epilogue inference
TESTS  ?=
# Parallel test processes. Each compiles, so more than the cores only slows them down.
JOBS   ?= 2

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo try test lint docs bench clean preflight

demo: .venv-demo/.installed
	.venv-demo/bin/python examples/pretrain_gpt.py $(DEMO)

ifeq ($(filter try,$(MAKECMDGOALS))$(DATA),try)
$(error Name a text file: make try DATA=my.txt)
endif
try: .venv-demo/.installed
	.venv-demo/bin/python -m mst_compile try --data $(DATA)

# One thread a process: tests are small, and two processes with two threads each fight for two cores.
test: lint
	OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -n $(JOBS) --dist loadgroup $(TESTS)

lint: .venv-test/.installed
	.venv-test/bin/ruff check .
	.venv-test/bin/mypy

bench: .venv-test/.installed
	for name in $(BENCH); do echo "== $$name"; .venv-test/bin/python -m benchmarks.$$name; done

# Not --quiet: it silences warnings before --strict can count them.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

clean:
	rm -rf .venv-demo .venv-test .venv-docs site .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv-demo/.installed: EXTRAS = examples
.venv-test/.installed: EXTRAS = dev,examples

# The stamp: an environment is made once, and again when the dependencies in pyproject.toml change.
.venv-%/.installed: pyproject.toml | preflight
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	touch $@

# The API is read from the sources, so neither PyTorch nor the package is installed here.
.venv-docs/.installed: pyproject.toml
	rm -rf .venv-docs
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
		print(*p["project"]["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-docs/requirements.txt
	touch $@

preflight:
	@command -v "$(PYTHON)" >/dev/null || { echo "No $(PYTHON) here. Debian/Ubuntu: apt install python3 python3-venv" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11; choose another: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments. Debian/Ubuntu: apt install python3-venv" >&2; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null \
		|| { echo "No C++ compiler; torch.compile and the CPU kernels need one. Debian/Ubuntu: apt install g++" >&2; exit 1; }
	@"$(PYTHON)" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' \
		|| { echo "No Python.h; torch.compile on a CPU needs it. Debian/Ubuntu: apt install python3-dev" >&2; exit 1; }
