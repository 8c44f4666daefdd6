"""Write the last column of the table in README.md: which tests each row has.

    python tests/rows.py [--check]

What a test is about is said by its marker, `@pytest.mark.row("A17")`.  With --check
nothing is written, and the exit status is 1 if the column is not what it should be.
"""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
README = HERE / "README.md"
HEADING = ["row", "how loops fail", "what ioloop does", "tests"]


def marked():
    """{row: {file name: number of its tests}}, read from the source of the tests."""
    found = {}
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for decorator in getattr(node, "decorator_list", ()):
                if isinstance(decorator, ast.Call) and (
                    ast.unparse(decorator.func) == "pytest.mark.row"
                ):
                    for row in decorator.args:
                        files = found.setdefault(ast.literal_eval(row), Counter())
                        files[path.name] += 1
    return found


def cells(line):
    """What a line of a table has between its bars, or nothing."""
    if not line.startswith("|"):
        return []
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def table(text):
    """(line number, cells) of each row of the table of failures."""
    lines = text.splitlines()
    first = [n for n, line in enumerate(lines) if cells(line) == HEADING]
    assert len(first) == 1, "README.md has one table with this heading"
    for number in range(first[0] + 2, len(lines)):
        row = cells(lines[number])
        if not row:
            return
        assert len(row) == len(HEADING), lines[number]
        yield number, row


def generated(text):
    """README.md's text with the last column as the markers are."""
    lines, rows = text.splitlines(), marked()
    for number, [row, *said, _] in table(text):
        files = rows.get(row, {}).items()
        tests = ", ".join(f"`{name}` {count}" for name, count in files)
        lines[number] = f"| {' | '.join([row, *said, tests])} |"
    return "\n".join(lines) + "\n"


def main():
    old = README.read_text(encoding="utf-8")
    new = generated(old)
    if sys.argv[1:] != ["--check"]:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit("tests/README.md is not what its tests say: make rows")


if __name__ == "__main__":
    main()
