"""Allocations of the interpreter that fail, each in turn.

The operations are those of test_faults.py.  Each is repeated with its first,
second, ... allocation failing, once that one alone and once all from there on:
it succeeds or raises, and the loop works when there is memory again.
"""

import contextlib
import gc
import sys

import pytest
import test_faults
from kernel import nomemory
from processes import run_python
from test_faults import OPERATIONS, World, assert_same, prepare

import ioloop

# Those whose end depends on a Python function that needs memory to run at all.
ENDLESS = [
    test_faults.start_until_a_thread_stops_it,
    test_faults.start_until_there_is_an_event,
    test_faults.reinit,
]
if ioloop.__file__.endswith(".abi3.so"):
    # There every call needs memory, for Context.run().
    ENDLESS.append(test_faults.start)
# Those that call Python functions, which need memory of their own to do their part.
OF_THE_USER = [
    test_faults.run_sync,
    test_faults.close_with_all_fds,
    # threading's start() waits for ever for a thread that has no memory to begin.
    test_faults.start_watched,
    test_faults.start_watched_by_signal,
    test_faults.set_blocking_threshold_while_it_runs,
]
# An operation is through when so many first allocations may fail in turn.
ENOUGH = 12


@pytest.mark.row("D10", "F15")
@pytest.mark.parametrize("poller", ["_EPoll", "_Select"])
@pytest.mark.parametrize("mode", ["one", "all"])
def test_sweep(poller, mode):
    nomemory()
    done = run_python(
        f"import test_nomemory; test_nomemory.sweep(ioloop.{poller}, {mode == 'all'})",
        timeout=300,
    )
    print(done.stdout)


def sweep(poller, lasting):
    prepare()
    sys.unraisablehook = lambda _: None
    problems = []
    cases = 0
    for operation in OPERATIONS:
        if operation in ENDLESS + OF_THE_USER:
            continue
        attempt(poller, operation, 10**6, 0)
        start = unharmed = 0
        while unharmed < ENOUGH:
            start += 1
            cases += 1
            try:
                harmed = attempt(poller, operation, start, 0 if lasting else start + 1)
            except Exception as error:
                problems.append(f"{operation.__name__}, allocation {start}: {error!r}")
                harmed = True
            unharmed = 0 if harmed else unharmed + 1
    print(f"{cases} cases")
    sys.exit("\n".join(problems) or None)


def attempt(poller, operation, start, stop):
    """Whether it ran out of memory."""
    world = World(poller)
    with contextlib.closing(world):
        steps = operation(world)
        next(steps)
        before = world.state()
        try:
            harmed = run_out(steps, start, stop)
            if harmed:
                assert_same(before, world.state())
            else:
                next(steps, None)
        finally:
            gc.collect()
        world.check()
        return harmed


def run_out(steps, start, stop):
    from _testcapi import remove_mem_hooks, set_nomemory

    try:
        set_nomemory(start, stop)
        try:
            next(steps)
        finally:
            remove_mem_hooks()
    except MemoryError:
        return True
    return False
