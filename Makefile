# make demo    the echo server of examples/, driven by a real client
# make test    the whole suite but the slow tests
# make test-all  those too, and lint, sanitize and leaks
# make bench   the benchmarks; make bench-smoke shows that they run
# make lint    Cython, C and Python, with every warning an error
# make sanitize  the tests under ASan, UBSan, TSan and valgrind (tests/sanitize.sh)
# make leaks   reference counts on a debug interpreter (tests/leaks.py)
# make clean   removes all that the others made
#
# PYTHON=python3.12 VENV=.venv-3.12 chooses another interpreter, ARGS= goes to pytest;
# IOLOOP_DEBUG=1 VENV=.venv-debug tests a build that checks itself (see setup.py).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
DEBUG_PYTHON ?= python3.11-dbg

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
SOURCES = setup.py pyproject.toml ioloop.pyx ioloop.pxd $(wildcard ioloop-stubs/*)

.DELETE_ON_ERROR:
.PHONY: demo test test-all bench bench-smoke lint sanitize leaks clean

demo: $(VENV)/module
	$(BIN)/python examples/echo_demo.py

test: $(VENV)/test
	$(BIN)/pytest -m "not slow" $(ARGS)

test-all: $(VENV)/test
	IOLOOP_TEST_TIMEOUT=300 $(BIN)/pytest
	$(MAKE) lint sanitize leaks

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks $(ARGS)

bench-smoke: $(VENV)/test
	$(BIN)/python -m benchmarks --quick
	$(BIN)/pytest --quiet --benchmark-disable benchmarks/test_primitives.py

# Cython's performance hints are neither warnings nor errors, so they are looked for.
lint: $(VENV)/lint
	mkdir -p build/lint
	$(BIN)/cython -Wextra -Werror -o build/lint/ioloop.c ioloop.pyx 2>build/lint/hints \
	    || { cat build/lint/hints; exit 1; }
	! grep -A5 "performance hint" build/lint/hints
	PATH="$(abspath $(BIN)):$$PATH" cython-lint ioloop.pyx ioloop.pxd
	IOLOOP_WERROR=1 $(BIN)/python setup.py --quiet build_ext
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# ARGS: some of address, undefined, thread, valgrind.
sanitize: $(VENV)/test
	tests/sanitize.sh $(BIN)/python $(ARGS)

# A debug build of CPython comes from the system; without one there is nothing to do.
leaks: $(VENV)/tools
	@command -v $(DEBUG_PYTHON) >/dev/null \
	    || apt-get install --yes $(DEBUG_PYTHON) python3.11-dev >/dev/null 2>&1 || true
	@if ! command -v $(DEBUG_PYTHON) >/dev/null; then \
	    echo "leaks: skipped, there is no $(DEBUG_PYTHON) and it can't be installed"; \
	else \
	    mkdir -p build/leaks && $(BIN)/cython -o build/leaks/ioloop.c ioloop.pyx && \
	    gcc -shared -fPIC -O1 -g -fvisibility=hidden -w -I$$($(DEBUG_PYTHON) -c \
	        'import sysconfig; print(sysconfig.get_path("include"))') \
	        build/leaks/ioloop.c -o build/leaks/ioloop.so && \
	    PYTHONPATH=build/leaks $(DEBUG_PYTHON) tests/leaks.py; \
	fi

clean:
	rm -rf build dist *.egg-info ioloop.c ioloop.html ioloop.*.so .venv*
	find . \( -name __pycache__ -o -name ".*_cache" -o -name .hypothesis \) -prune \
	    -exec rm -rf {} +

# Each file says when its part of the environment was made.

$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" "Cython>=3.1,<4"
	touch $@

$(VENV)/module: $(VENV)/tools $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps --force-reinstall .
	touch $@

# The module is there already: what pip adds are the tools that these extras name.
$(VENV)/test $(VENV)/lint: $(VENV)/%: $(VENV)/module
	$(PIP) install "ioloop[$*]"
	touch $@

$(VENV)/bench: $(VENV)/module benchmarks/requirements.txt
	$(PIP) install --requirement benchmarks/requirements.txt
	touch $@
