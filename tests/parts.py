"""Runs the suite in two processes at once, each with every second test.

Its arguments go to pytest.  What the second process prints comes last.  (pytest-xdist
would do that too, but has a thread in each process, in which no test could fork.)
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PYTEST = Path(sys.executable).with_name("pytest")


def start(part, **options):
    env = dict(os.environ)
    if "IOLOOP_CURRENT_TEST" in env:
        env["IOLOOP_CURRENT_TEST"] += f"-{part}"
    command = [PYTEST, f"--part={part}", *sys.argv[1:]]
    return subprocess.Popen(command, env=env, **options)


with tempfile.TemporaryFile() as output:
    processes = [start(1), start(2, stdout=output, stderr=subprocess.STDOUT)]
    try:
        codes = [process.wait() for process in processes]
    finally:
        output.seek(0)
        shutil.copyfileobj(output, sys.stdout.buffer)
sys.exit(max(map(abs, codes)))
