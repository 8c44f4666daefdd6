# make demo      the echo server of examples/, driven by a real client
# make test      the whole suite but the slow tests
# make test-all  those too, and conformance, docs, lint, abi3, sanitize and leaks
# make conformance
#                CPython's own tests of asyncio, on ioloop's event loops
# make libraries asyncio's libraries with real servers, and their own suites
# make dev       a build that checks itself, for the loop of editing and testing:
#                make dev ARGS=tests/test_timeouts.py
# make coverage  the lines of ioloop.pyx that the suite runs
# make bench     the benchmarks; make bench-smoke shows that they run
# make docs      the documentation, in build/docs; warnings are errors
# make rows      writes the column "tests" of the table in tests/README.md
# make lint      Cython, C and Python, with every warning an error
# make abi3      the wheel for CPython 3.11 and later, in build/wheel, and its symbols
# make sanitize  the tests under ASan, UBSan, TSan and valgrind (tests/sanitize.sh)
# make leaks     reference counts on a debug interpreter (tests/leaks.py)
# make platforms the suite on i386, arm64, s390x and musl (tests/platforms.sh); as root
# make clean     removes all that the others made
#
# All of it stays in this directory: nothing is installed in the system.
#
# PYTHON=python3.12 VENV=.venv-3.12 chooses another interpreter, ARGS= goes to pytest;
# IOLOOP_ABI3=1 VENV=.venv-abi3 tests another build of the module (see setup.py), and
# MODULE=build/wheel/ioloop_native-....whl a wheel instead of the sources.

PYTHON ?= python3
VENV ?= .venv
MODULE ?= .
ARGS ?=
DEBUG_PYTHON ?= python3.11-dbg

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
SOURCES = setup.py pyproject.toml ioloop.pyx ioloop.pxd $(wildcard ioloop-stubs/*)
PLATLIB = -c 'import sysconfig; print(sysconfig.get_path("platlib"))'

.DELETE_ON_ERROR:
.PHONY: demo test test-all conformance libraries dev coverage bench bench-smoke docs \
    rows lint abi3 sanitize leaks platforms clean

demo: $(VENV)/module
	$(BIN)/python examples/echo_demo.py

test: $(VENV)/module $(VENV)/test
	$(BIN)/$(if $(ARGS),pytest,python tests/parts.py) -m "not slow" $(ARGS)

test-all: $(VENV)/module $(VENV)/test $(VENV)/libraries
	IOLOOP_TEST_TIMEOUT=300 $(BIN)/pytest
	$(MAKE) conformance docs lint abi3 sanitize leaks

# ARGS: parts of the names of the modules to run.
conformance: $(VENV)/module
	$(BIN)/python tests/conformance.py $(ARGS)

libraries: $(VENV)/module $(VENV)/test $(VENV)/libraries
	IOLOOP_TEST_TIMEOUT=300 $(BIN)/pytest -m slow tests/test_async_clients.py \
	    tests/test_examples.py $(ARGS)

# In place of the module that is installed in an environment of its own.  Not in the
# source tree, where every python that is started there would find it first.
dev: export IOLOOP_DEBUG = 1
dev:
	test -e .venv-dev/module || $(MAKE) VENV=.venv-dev .venv-dev/module .venv-dev/test
	.venv-dev/bin/python setup.py --quiet build_ext \
	    --build-lib "$$(.venv-dev/bin/python $(PLATLIB))"
	$(if $(ARGS),.venv-dev/bin/pytest $(ARGS))

coverage: export IOLOOP_COVERAGE = 1
coverage:
	$(MAKE) VENV=.venv-coverage .venv-coverage/module .venv-coverage/test
	find build -name "*.gcda" -exec rm {} +
	-.venv-coverage/bin/pytest -m "not slow" $(ARGS)
	$(PYTHON) tests/covered.py

bench: $(VENV)/module $(VENV)/bench
	-$(PIP) install --only-binary=:all: --group bench-rsloop
	$(BIN)/python -m benchmarks $(ARGS)

bench-smoke: $(VENV)/module $(VENV)/test
	$(BIN)/python -m benchmarks --quick
	$(BIN)/pytest --quiet --benchmark-disable benchmarks/test_primitives.py

docs: $(VENV)/module $(VENV)/docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env docs build/docs

rows:
	$(PYTHON) tests/rows.py

# Cython's performance hints are neither warnings nor errors, so they are looked for.  So
# is what Cython 3.3 makes of some lists: without memory for an item, it is freed twice.
lint: $(VENV)/lint
	mkdir -p build/lint
	$(BIN)/cython -Wextra -Werror -o build/lint/ioloop.c ioloop.pyx 2>build/lint/hints \
	    || { cat build/lint/hints; exit 1; }
	! grep -A5 "performance hint" build/lint/hints
	@if grep "__Pyx_ListComp_AppendAndDecref(.*__PYX_ERR" build/lint/ioloop.c; then \
	    echo "a list comprehension, or a list with * in it: write a loop with append()"; \
	    exit 1; \
	fi
	PATH="$(abspath $(BIN)):$$PATH" cython-lint ioloop.pyx ioloop.pxd
	IOLOOP_WERROR=1 $(BIN)/python setup.py --quiet build_ext
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows \
	    .github/workflows/*
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.dependabot \
	    .github/dependabot.yml
	$(BIN)/zizmor --quiet --offline --min-severity medium .github

abi3: $(VENV)/lint
	rm -rf build/wheel
	IOLOOP_ABI3=1 $(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(BIN)/abi3audit --strict --verbose build/wheel/*.whl

# ARGS: some of address, undefined, thread, valgrind.
sanitize: $(VENV)/module $(VENV)/test
	tests/sanitize.sh $(BIN)/python $(ARGS)

# A debug build of CPython comes from the system; without one there is nothing to do.
leaks: $(VENV)/tools
	@if ! $(DEBUG_PYTHON) -c 'import os, sys, sysconfig; sys.gettotalrefcount(); \
	        os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null; then \
	    echo "leaks: skipped, since it needs a debug build of CPython with its headers:"; \
	    echo "    apt install python3-dbg libpython3-dev, or DEBUG_PYTHON=/path/to/one"; \
	else \
	    set -e; \
	    $(DEBUG_PYTHON) -m venv --without-pip build/leaks/venv; \
	    python=build/leaks/venv/bin/python; \
	    $(PIP) --python $$python install --group build; \
	    $$python setup.py --quiet build_ext --build-lib build/leaks; \
	    PYTHONPATH=build/leaks $$python tests/leaks.py; \
	fi

# ARGS: some of i386, arm64, s390x, musl.
platforms: $(VENV)/tools
	tests/platforms.sh $(BIN)/python $(ARGS)

clean:
	rm -rf build dist *.egg-info ioloop.c ioloop.html ioloop.*.so .venv*
	find . \( -name __pycache__ -o -name ".*_cache" -o -name .hypothesis \) -prune \
	    -exec rm -rf {} +

# Each file says when its part of the environment was made.

$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"  # the first to know groups
	$(PIP) install --group build
	touch $@

$(VENV)/module: $(VENV)/tools $(SOURCES) $(filter %.whl,$(MODULE))
	$(PIP) install --no-build-isolation --no-deps --force-reinstall $(MODULE)
	touch $@

# Rather older versions than some that can't be compiled here: 3.13t has few wheels.
$(VENV)/test $(VENV)/lint $(VENV)/bench $(VENV)/docs $(VENV)/libraries: $(VENV)/%: $(VENV)/tools pyproject.toml
	$(PIP) install --only-binary :all: --group $* || $(PIP) install --group $*
	touch $@
