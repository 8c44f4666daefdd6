"""Builds `ioloop`; everything that does not depend on the build is in pyproject.toml.

Switches, by environment variable:
    IOLOOP_ABI3=1    one file for CPython 3.11 and later (limited API), a little slower
    IOLOOP_DEBUG=1   assertions, and the module checks itself as it runs
    IOLOOP_TRACE=1   line tracing, for coverage
    IOLOOP_WERROR=1  warnings of the C compiler are errors
"""

import os

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

switches = [
    name
    for name in ("abi3", "debug", "trace", "werror")
    if os.environ.get(f"IOLOOP_{name.upper()}", "0") not in ("", "0")
]


class build_ext_with_pxd(build_ext):
    """Puts ioloop.pxd beside the module in the wheel, where `cimport` finds it."""

    def run(self):
        super().run()
        if not self.inplace:
            self.copy_file("ioloop.pxd", self.build_lib)


ioloop = Extension(
    "ioloop",
    ["ioloop.pyx"],
    depends=["ioloop.pxd"],
    extra_compile_args=[
        *("-O3", "-g" if "debug" in switches else "-g0"),
        *("-fvisibility=hidden", "-Wall", "-Wextra"),
        # Better no module than one that can't be loaded.
        "-Werror=implicit-function-declaration",
    ],
    py_limited_api="abi3" in switches,
)
# Coverage looks for the C file beside the source; elsewhere it would only litter.
ioloop.cython_c_in_temp = "trace" not in switches

if "abi3" in switches:
    ioloop.define_macros += [("Py_LIMITED_API", "0x030B0000")]
if "debug" in switches:
    ioloop.define_macros += [("IOLOOP_DEBUG", "1")]
    ioloop.undef_macros += ["NDEBUG"]
if "trace" in switches:
    ioloop.cython_directives = {"linetrace": True}
    ioloop.define_macros += [
        ("CYTHON_TRACE_NOGIL", "1"),
        ("CYTHON_USE_SYS_MONITORING", "0"),
    ]
if "werror" in switches:
    ioloop.extra_compile_args += ["-Werror"]

setup(
    ext_modules=[ioloop],
    cmdclass={"build_ext": build_ext_with_pxd},
    options={
        # A directory for each kind of build, so that none reuses another's files.
        "build": {"build_base": os.path.join("build", "-".join(switches))},
        "build_ext": {"force": "trace" in switches},
        "bdist_wheel": {"py_limited_api": "cp311" if "abi3" in switches else False},
    },
)
