"""What users read: docstrings, and the README's code."""

import inspect
import re
import signal
import socket
import sys
import types
from unittest import mock

import building
import pytest
from fakes import turn
from kernel import readable
from processes import program, run_python

import ioloop

README = building.ROOT / "README.md"


def documented(owner, prefix):
    """Every public name of the module, or of one of its classes, with its object.

    Not attributes: those that Cython makes of C fields can have no docstring.
    """
    for name, value in vars(owner).items():
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if name.startswith("_") or getattr(value, "__module__", None) != "ioloop":
            continue
        yield prefix + name, value
        if inspect.isclass(value):
            yield from documented(value, prefix + name + ".")


NAMES = dict(documented(ioloop, ""))


def test_there_is_something_to_document():
    assert {"IOLoop", "IOLoop.start", "PeriodicCallback.stop"} <= NAMES.keys()
    assert len(NAMES) > 30


@pytest.mark.parametrize("name", ["ioloop", *NAMES])
def test_docstring(name):
    text = inspect.getdoc(NAMES.get(name, ioloop))
    assert text
    # With `embedsignature`, the first line is the signature.
    first, _, rest = text.partition("\n")
    if re.match(rf"(\w+\.)*{name.rpartition('.')[2]}\(.*\)( -> .+)?$", first):
        text = rest.strip()
    paragraph = text.split("\n\n")[0].rstrip()
    assert paragraph[:1].isupper()
    assert paragraph.endswith((".", ":"))


def code_blocks(language):
    text = README.read_text() if README.exists() else ""
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S):
        line = text.count("\n", 0, match.start()) + 2
        yield pytest.param(match[1], id=f"line {line}")


# A server has any free port instead of its own, and prints it.  It may not block.
AS_SERVER = """
import socket

def create_server(address, *args, _real=socket.create_server, **kwargs):
    server = _real((address[0], 0), *args, **kwargs)
    print(server.getsockname()[1], flush=True)
    return server

def never_blocking(method):
    def call(sock, *args):
        assert not sock.getblocking(), f"{method} may block"
        return method(sock, *args)
    return call

for name in ("accept", "recv", "send"):
    setattr(socket.socket, name, never_blocking(getattr(socket.socket, name)))
socket.create_server = create_server
"""


@pytest.mark.parametrize("code", [*code_blocks("python")])
def test_python_code_of_readme_runs(code):
    """To its end, or as an echo server for as long as somebody uses it."""
    if "create_server" not in code:
        run_python(code, prelude="")
        return
    # It gets nothing of the names: what it needs, it has to import.
    prelude = f"exec({AS_SERVER!r}, {{}})\n"
    with program("-Werror", "-c", prelude + code) as process:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        address = "127.0.0.1", int(line)
        with (
            socket.create_connection(address, timeout=10) as one,
            socket.create_connection(address, timeout=10) as two,
        ):
            for sock, data in (one, b"1"), (two, bytes(30_000)), (one, b"once more"):
                sock.sendall(data)
                assert sock.recv(len(data), socket.MSG_WAITALL) == data
            one.shutdown(socket.SHUT_WR)
            assert one.recv(1) == b""
            two.sendall(b"2")
            assert two.recv(1) == b"2"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=10)
    assert output == "" and errors.splitlines()[-1] == "KeyboardInterrupt"
    assert errors.count("Traceback") == 1, errors


@pytest.mark.parametrize("code", [*code_blocks("cython")])
def test_cython_code_of_readme_runs(code):
    """What it calls `loop` and `fd` is given to it; its handler is called."""
    code = f"from the_program import fd, loop\n{code}"

    def build(directory):
        source = directory / "readme.pyx"
        source.write_text(code)
        building.compile_extension(source, directory)

    directory = building.cached("readme", [code], build)
    the_program = types.ModuleType("the_program")
    with readable() as (a, _), ioloop.IOLoop() as loop:
        the_program.loop, the_program.fd = loop, a.fileno()
        with mock.patch.dict(sys.modules, the_program=the_program):
            module = building.load(directory / f"readme{building.SUFFIX}")
        turn(loop)
        assert loop.stats()["events"] == 1
        loop.remove_handler(a)
        vars(module).clear()
        vars(the_program).clear()
