"""How Sphinx builds this documentation: `make docs`, from the installed module."""

import ast
import re
import sys
from pathlib import Path

import ioloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from rows import table  # noqa: E402

project = "ioloop"
author = copyright = "The ioloop founders"
version = release = ioloop.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "literal"  # as the docstrings have it

exclude_patterns = ["figures.md"]

html_theme = "furo"
html_title = f"ioloop {release}"
pygments_style = "friendly"


# -- Types ---------------------------------------------------------------------
# The module is compiled, and its types are in the stubs.


def signatures(body, prefix=""):
    """(name, signature, result) of what the stubs declare; an overload's last one."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from signatures(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            kinds = {ast.unparse(decorator) for decorator in node.decorator_list}
            if "property" in kinds or f"{node.name}.setter" in kinds:
                continue
            arguments = node.args
            if prefix and "staticmethod" not in kinds:
                first = arguments.posonlyargs or arguments.args
                del first[0]
            result = ast.unparse(node.returns)
            name = prefix + node.name
            if node.name == "__init__":
                name, result = prefix[:-1], None
            yield f"ioloop.{name}", f"({ast.unparse(arguments)})", result


STUBS = ast.parse((ROOT / "ioloop-stubs" / "__init__.pyi").read_text())
SIGNATURES = {name: found for name, *found in signatures(STUBS.body)}


def add_types(app, what, name, obj, options, signature, result):
    return SIGNATURES.get(name, (signature, result))


# -- Guarantees ----------------------------------------------------------------
# Rows of the table in tests/README.md; its last column comes from the tests' markers.


def add_rows(app, docname, source):
    """In place of `@rows A`, the promises of section A, each with what it prevents."""
    if docname == "guarantees":
        text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
        rows = [cells for _, cells in table(text)]
        source[0] = re.sub(
            "^@rows ([A-Z])$",
            lambda match: promises(row for row in rows if row[0][0] == match[1]),
            source[0],
            flags=re.M,
        )


def promises(rows):
    lines = ["| | What the loop does | What would happen otherwise | Tests |"]
    lines.append("|---|---|---|--:|")
    for name, failure, promise, files in rows:
        tests = sum(map(int, re.findall(r"` (\d+)", files)))
        lines.append(f"| {name} | {promise} | {failure} | {tests} |")
    return "\n".join(lines)


def setup(app):
    app.connect("autodoc-process-signature", add_types)
    app.connect("source-read", add_rows)
