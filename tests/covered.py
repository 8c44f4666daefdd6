"""make coverage: which lines of ioloop.pyx were run, by gcc's counters.

The lines are those of the C file, and the comments that Cython writes there tell to
which line of ioloop.pyx each belongs.  Unlike line tracing this sees threads without
the GIL and signal handlers, and changes nothing of what Python code can observe.  It
does not see what a process did that was killed.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What follows is of this line of this file, or of none.
POSITION = re.compile(r'\s*/\* (?:"(.+)":(\d+)$|function exit code \*/)')


def positions(text):
    """The line of ioloop.pyx that each line of C belongs to, or None."""
    position = None
    for line in text.splitlines():
        if found := POSITION.match(line):
            position = int(found[2]) if found[1] == "ioloop.pyx" else None
        yield position


def counts(data):
    """{line of ioloop.pyx: how often it was run} in one build of the module."""
    command = ["gcov", "--json-format", "--stdout", str(data)]
    output = subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout
    files = json.loads(output)["files"]
    [file] = [file for file in files if file["file"].endswith("ioloop.c")]
    of_line = [None, *positions((ROOT / file["file"]).read_text())]
    found = defaultdict(int)
    for line in file["lines"]:
        if position := of_line[line["line_number"]]:
            found[position] = max(found[position], line["count"])
    return found


def count_before_exit():
    """Let os._exit() write the counters: that is how forked children leave."""
    leave = os._exit

    def count_and_leave(status):
        with open("/proc/self/maps") as maps:
            files = set(re.findall(r"/.*/ioloop\.[^/]*so$", maps.read(), re.M))
        for file in files:
            getattr(ctypes.CDLL(file), "__gcov_dump", int)()
        leave(status)

    os._exit = count_and_leave


def main():
    total = defaultdict(int)
    for data in (ROOT / "build").glob("*coverage*/**/ioloop.gcda"):
        for line, count in counts(data).items():
            total[line] += count
    if not total:
        sys.exit("there are no counters in build/")
    source = (ROOT / "ioloop.pyx").read_text().splitlines()
    missing = sorted(line for line, count in total.items() if not count)
    for line in missing:
        print(f"{line:5} {source[line - 1]}")
    share = 100 - 100 * len(missing) / len(total)
    print(f"ioloop.pyx: {share:.1f} % of {len(total)} lines; not run: {len(missing)}")


if __name__ == "__main__":
    main()
