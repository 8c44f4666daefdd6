"""Only the main interpreter gets the module, whichever is the first to import it."""

import sys
from pathlib import Path

import pytest
from building import FREE_THREADED, compile_library
from processes import run_python

PROGRAM = """
import ctypes
import sys

library, own_gil, code, first = sys.argv[1:]
run_in_subinterpreter = ctypes.PyDLL(library).run_in_subinterpreter

def refuse():
    assert run_in_subinterpreter(code.encode(), int(own_gil)) == 0

if first == "sub":
    refuse()
    refuse()

import ioloop

with ioloop.IOLoop() as loop:
    loop.run_sync(refuse)
    loop.call_later(0.001, loop.stop)
    loop.start()
"""

REFUSED = """
import sys

for attempt in range(2):
    try:
        import ioloop
    except ImportError as error:
        assert "subinterpreter" in str(error), error
    else:
        raise AssertionError("it was imported")
    assert "ioloop" not in sys.modules
"""

# Without this, CPython itself refuses the module to an interpreter with its own GIL.
UNCHECKED = "import _imp; _imp._override_multi_interp_extensions_check(-1)\n"

has_own_gil = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="all interpreters share the GIL before 3.12"
)
has_check = pytest.mark.skipif(
    FREE_THREADED,
    reason="a free-threaded build never does without the check",
)


@pytest.mark.parametrize("first", ["main", "sub"])
@pytest.mark.parametrize(
    "own_gil, code",
    [
        pytest.param("0", REFUSED, id="legacy"),
        pytest.param("1", REFUSED, id="own GIL", marks=has_own_gil),
        pytest.param(
            *("1", UNCHECKED + REFUSED), id="unchecked", marks=[has_own_gil, has_check]
        ),
    ],
)
def test_a_subinterpreter_is_refused(own_gil, code, first):
    library = compile_library(Path(__file__).with_name("subinterpreter.c"))
    run_python(PROGRAM, library, own_gil, code, first, prelude="")
