"""The code in README.md and docs/; documents.py says how a block is run."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import building
import documents
import pytest
from documents import BLOCKS
from fakes import turn
from kernel import readable
from processes import task_is_asleep, wait_until

import ioloop


def these(language):
    blocks = [b for b in BLOCKS if b.language == language and "not run" not in b.notes]
    return pytest.mark.parametrize("block", blocks, ids=repr)


def test_every_block_is_run_or_says_why_not():
    run = {"python", "cython", "toml"}
    silent = [
        block
        for block in BLOCKS
        if block.language not in run and not block.notes.get("not run")
    ]
    assert silent == []


def skip_without(needs):
    for name in needs.split(", ") if needs else ():
        if name.startswith("CPython "):
            if sys.version_info < tuple(map(int, name.split()[1].split("."))):
                pytest.skip(f"needs {name}")
        elif importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def is_idle(process):
    """Whether it sleeps, so that Ctrl-C does not come between two of its steps."""
    return sys.platform != "linux" or task_is_asleep(process.pid)


@these("python")
def test_python(block, tmp_path):
    """To its end, or as long as somebody uses it, and without an error."""
    skip_without(block.notes.get("needs"))
    user = block.notes.get("used by")
    port = free_port()
    process = subprocess.Popen(
        [
            sys.executable,
            "-Werror",
            "-Wignore::ImportWarning",
            "-c",
            block.code.replace("8888", str(port)),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(ioloop.__file__).parent),
            "PYTHONUNBUFFERED": "1",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            if user is not None:
                program = documents.Running(process, port, tmp_path)
                getattr(documents, user)(program)
                wait_until(lambda: process.poll() is not None or is_idle(process))
                process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    if user is not None and errors.endswith("KeyboardInterrupt\n"):
        assert errors.count("Traceback") == 1, errors
    else:
        assert (process.returncode, errors) == (0, "")
    if block.output is not None:
        assert output == block.output


@these("cython")
def test_cython(block):
    """Compiled, and used by somebody; or else it gets a `loop` and an `fd`."""
    user = block.notes.get("used by")
    code = block.code if user else f"from the_program import fd, loop\n{block.code}"

    def build(directory):
        source = directory / "document.pyx"
        source.write_text(code)
        building.compile_extension(source, directory)

    file = building.cached("document", [code], build) / f"document{building.SUFFIX}"
    if user:
        getattr(documents, user)(building.load(file))
        return
    the_program = types.ModuleType("the_program")
    with readable() as (a, _), ioloop.IOLoop() as loop:
        the_program.loop, the_program.fd = loop, a.fileno()
        with mock.patch.dict(sys.modules, the_program=the_program):
            module = building.load(file)
        turn(loop)
        assert loop.stats()["events"] == 1
        loop.remove_handler(a)
        vars(module).clear()
        vars(the_program).clear()


@these("toml")
def test_toml(block):
    pytest.importorskip("tomllib").loads(block.code)
