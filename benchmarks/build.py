"""Builds the compiled parts into a directory of the caller's choice."""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

SETUP = """
from setuptools import Extension, setup
setup(
    name="door",
    ext_modules=[Extension("door", ["door.pyx"], extra_compile_args=["-O2"])],
)
"""


def build(directory, door):
    """Builds `floor`, `load` and `tls.pem`, and `door.so` if asked.

    Says why when `door.so` fails.
    """
    for name in ("floor", "load"):
        command = ["cc", "-O2", "-pthread", "-o", directory / name]
        subprocess.run([*command, HERE / f"{name}.c"], check=True)
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    command += ["-subj", "/CN=localhost", "-days", "1"]
    key = subprocess.run(
        [*command, "-keyout", "-"], capture_output=True, text=True, check=True
    )
    (directory / "tls.pem").write_text(key.stdout)
    if not door:
        return
    shutil.copy(HERE / "door.pyx", directory)
    (directory / "setup.py").write_text(SETUP)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    answer = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if answer.returncode:
        print(answer.stderr or answer.stdout, file=sys.stderr)
        return
    next(directory.glob("door.*.so")).rename(directory / "door.so")
