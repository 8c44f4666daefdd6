"""Compiles what the tests need: variants of the module, libraries and extensions.

How the module is built, setup.py alone says.  Everything else is compiled here, and
kept in build/tests/ for as long as its sources and the tools are the same.
"""

import fcntl
import gc
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

import ioloop

HERE = Path(__file__).parent
ROOT = HERE.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
INCLUDE = sysconfig.get_path("include")
# The one beside the module is what `cimport ioloop` finds.
PXD = Path(ioloop.__file__).with_name("ioloop.pxd")
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
IS_3_13T = FREE_THREADED and sys.version_info < (3, 14)
IS_ABI3 = ioloop.__file__.endswith(".abi3.so")

CACHE = ROOT / "build" / "tests" / sysconfig.get_config_var("SOABI")
TOOLS = sys.version, importlib.metadata.version("Cython")


def environment():
    """That of the tests, without what is meant for the interpreter that runs them."""
    ours = ("PYTHONPATH", "PYTHONMALLOC", "LD_PRELOAD")
    return {name: value for name, value in os.environ.items() if name not in ours}


def run(*command, env=None, **options):
    """Run a command that has to succeed; return what it printed."""
    done = subprocess.run(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment(), **(env or {})},
        **options,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout}", pytrace=False)
    return done.stdout


def cached(name, sources, build):
    """Return a directory that `build(directory)` has filled from `sources`.

    A source is a file or whatever else the result depends on and can be shown.
    """
    digest = hashlib.sha256()
    for source in [TOOLS, Path(__file__), PXD, *sources]:
        shown = source.read_text() if isinstance(source, Path) else repr(source)
        digest.update(shown.encode())
    target = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            os.utime(target)
            return target
        for stale in CACHE.glob(f"{name}-{'?' * 16}"):
            # Others may be of this name too, and in use by the other process.
            if time.time() - stale.stat().st_mtime > 3600:
                shutil.rmtree(stale)
        work = CACHE / f"{name}-building"
        work.mkdir()
        try:
            build(work)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def load(path, name=None):
    """Import an extension from its file, each time anew."""
    name = name or path.name.partition(".")[0]
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    gc.collect()
    gc.freeze()
    return module


# -- The module ----------------------------------------------------------------


def build_variant(directory, **switches):
    """Build the module in `directory` with switches of setup.py, beside those set."""
    run(
        *(sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", directory),
        cwd=ROOT,
        env={f"IOLOOP_{name.upper()}": value for name, value in switches.items()},
    )


def fake_kqueue():
    """The file of a module like the one under test whose kqueue() is a fake."""
    switches = {"fake_kqueue": "1", "abi3": str(int(IS_ABI3))}
    switches |= {
        name: os.environ.get(f"IOLOOP_{name.upper()}", "0")
        for name in ("debug", "coverage", "sanitize")
    }
    sources = [ROOT / name for name in ("ioloop.pyx", "ioloop.pxd", "setup.py")]
    directory = cached(
        "-".join(name for name, value in switches.items() if value != "0"),
        [*sources, HERE / "fake_kqueue.h", switches],
        lambda directory: build_variant(directory, **switches),
    )
    [path] = directory.glob("ioloop.*.so")
    return path


# -- What uses it --------------------------------------------------------------


def compile_c(source, target, *flags):
    if sys.platform == "darwin":
        flags = ["-undefined", "dynamic_lookup", *flags]  # of the interpreter
    run(
        *sysconfig.get_config_var("CC").split(),
        *("-shared", "-fPIC", "-O1", "-pthread", "-Wall", "-Werror", f"-I{INCLUDE}"),
        *(source, "-o", target, "-ldl", *flags),
    )


def compile_library(source, *flags, depends=()):
    """Compile C for LD_PRELOAD or ctypes; return the file."""
    name = f"{source.stem}.so"
    directory = cached(
        source.stem,
        [source, flags, *depends],
        lambda directory: compile_c(source, directory / name, *flags),
    )
    return directory / name


def compile_extension(source, directory, include=PXD.parent):
    """Compile an extension that is written in C or in Cython; return the file."""
    if source.suffix == ".pyx":
        made = directory / f"{source.stem}.c"
        command = ["-m", "cython", "-Werror", "-I", include, source, "-o", made]
        run(sys.executable, *command, cwd=directory)
        source = made
    target = directory / f"{source.stem}{SUFFIX}"
    compile_c(source, target, "-Wno-unused-function")
    return target


def extension(source):
    """Compile an extension against the installed ioloop.pxd; return the file."""
    directory = cached(
        source.stem, [source], lambda directory: compile_extension(source, directory)
    )
    return directory / f"{source.stem}{SUFFIX}"


# -- The example in Cython -----------------------------------------------------

C_ECHO = ROOT / "examples" / "c_echo"


def install_c_echo(directory):
    """As its README says, in a copy, since building litters."""
    source = directory / "source"
    made = shutil.ignore_patterns("build", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(C_ECHO, source, ignore=made)
    empty = directory / "empty"
    empty.mkdir()
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet"),
        *("--disable-pip-version-check", "--no-index", "--no-deps"),
        *("--no-build-isolation", "--target", directory / "site", source),
        cwd=empty,
        env={"CFLAGS": "-O1"},
    )


def c_echo():
    """The directory that the example is installed in."""
    sources = [path for path in sorted(C_ECHO.iterdir()) if path.suffix != ".so"]
    sources = [path for path in sources if path.is_file()]
    return cached("example", sources, install_c_echo) / "site"
