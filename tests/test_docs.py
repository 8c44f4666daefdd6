"""What users read in `help()`: the docstrings."""

import inspect
import re

import pytest

import ioloop


def documented(owner, prefix):
    """Every public name of the module, or of one of its classes, with its object.

    Not attributes: those that Cython makes of C fields can have no docstring.
    """
    for name, value in vars(owner).items():
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if name.startswith("_") or getattr(value, "__module__", None) != "ioloop":
            continue
        yield prefix + name, value
        if inspect.isclass(value):
            yield from documented(value, prefix + name + ".")


NAMES = dict(documented(ioloop, ""))


def test_there_is_something_to_document():
    assert {"IOLoop", "IOLoop.start", "PeriodicCallback.stop"} <= NAMES.keys()
    assert len(NAMES) > 30


@pytest.mark.parametrize("name", ["ioloop", *NAMES])
def test_docstring(name):
    text = inspect.getdoc(NAMES.get(name, ioloop))
    assert text
    # With `embedsignature`, the first line is the signature.
    first, _, rest = text.partition("\n")
    if re.match(rf"(\w+\.)*{name.rpartition('.')[2]}\(.*\)( -> .+)?$", first):
        text = rest.strip()
    paragraph = text.split("\n\n")[0].rstrip()
    assert paragraph[:1].isupper()
    assert paragraph.endswith((".", ":"))
