"""Builds `ioloop`; everything that does not depend on the build is in pyproject.toml.

The compiler's flags are CPython's own and CFLAGS: what is added here changes neither
how fast the module is nor what a debugger sees of it.  Switches, by environment
variable, of which several can be on:

    IOLOOP_ABI3=1         one file for CPython 3.11 and later (limited API), slower
    IOLOOP_DEBUG=1        assertions, and the module checks itself as it runs
    IOLOOP_COVERAGE=1     counts what is run, by gcc (tests/covered.py)
    IOLOOP_FAKE_KQUEUE=1  _KQueue on Linux, on the kqueue() of tests/fake_kqueue.h
    IOLOOP_SANITIZE=...   gcc's sanitizer: address, undefined or thread
    IOLOOP_WERROR=1       warnings of the C compiler are errors
"""

import os
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

switches = {
    name: value
    for name in ("abi3", "debug", "coverage", "fake_kqueue", "sanitize", "werror")
    if (value := os.environ.get(f"IOLOOP_{name.upper()}", "0")) not in ("", "0")
}


class build_ioloop(build_ext):
    """The module, with ioloop.pxd beside it in the wheel, where `cimport` finds it."""

    def run(self):
        super().run()
        if not self.inplace:
            self.copy_file("ioloop.pxd", self.build_lib)

    def get_ext_filename(self, name):
        filename = super().get_ext_filename(name)
        # From 3.15 on there would be a platform in the name, which 3.14 can't load.
        return re.sub(r"\.abi3-.+(?=\.so$)", ".abi3", filename)


ioloop = Extension(
    "ioloop",
    ["ioloop.pyx"],
    depends=["ioloop.pxd"],
    extra_compile_args=[
        *("-fvisibility=hidden", "-Wall", "-Wextra"),
        # Better no module than one that can't be loaded.
        "-Werror=implicit-function-declaration",
    ],
    py_limited_api="abi3" in switches,
)
ioloop.cython_c_in_temp = True  # beside the source, the C file would only litter

if sys.version_info[:2] == (3, 15):
    # Its type objects end with fields that Cython 3.3 does not know.
    ioloop.extra_compile_args += ["-Wno-missing-field-initializers"]
if "abi3" in switches:
    if sys.version_info < (3, 11) or sysconfig.get_config_var("Py_GIL_DISABLED"):
        sys.exit("IOLOOP_ABI3 needs CPython 3.11 or later with the GIL")
    ioloop.define_macros += [("Py_LIMITED_API", "0x030B0000")]
    # Cython writes methods and docstrings that types of the limited API can't have.
    ioloop.extra_compile_args += ["-Wno-unused-function", "-Wno-unused-variable"]
if switches.keys() & {"debug", "coverage", "fake_kqueue", "sanitize"}:
    # For tests: what is compiled often has to compile fast.
    ioloop.extra_compile_args += ["-O1" if "sanitize" in switches else "-O0", "-g"]
if "debug" in switches:
    ioloop.define_macros += [("IOLOOP_DEBUG", "1")]
    ioloop.undef_macros += ["NDEBUG"]
if "coverage" in switches:
    ioloop.extra_compile_args += ["--coverage"]
    ioloop.extra_link_args += ["--coverage", "-Wl,-u,__gcov_dump"]
if "fake_kqueue" in switches:
    ioloop.define_macros += [("IOLOOP_FAKE_KQUEUE", "1")]
    ioloop.include_dirs += ["tests"]
    ioloop.depends += ["tests/fake_kqueue.h"]
if sanitizer := switches.get("sanitize"):
    flag = f"-fsanitize={sanitizer}"
    ioloop.extra_compile_args += [flag, "-fno-omit-frame-pointer"]
    ioloop.extra_link_args += [flag]
    if sanitizer == "undefined":
        ioloop.extra_compile_args += ["-fno-sanitize-recover=undefined"]
    if sanitizer == "thread":
        # It knows no fences.  They order `asleep` against the queue, both of which are
        # atomics, so that it takes no race for one that is none.
        ioloop.extra_compile_args += ["-Wno-tsan"]
if "werror" in switches:
    ioloop.extra_compile_args += ["-Werror"]

# A directory for each kind of build, so that none reuses another's files.
kind = "-".join(
    name if value == "1" else f"{name}-{value}" for name, value in switches.items()
)

setup(
    version=re.search(
        r'^__version__ = "(.+)"$', Path("ioloop.pyx").read_text(encoding="utf-8"), re.M
    )[1],
    ext_modules=[ioloop],
    cmdclass={"build_ext": build_ioloop},
    options={
        "build": {"build_base": os.path.join("build", kind)},
        "bdist_wheel": {"py_limited_api": "cp311" if "abi3" in switches else False},
    },
)
