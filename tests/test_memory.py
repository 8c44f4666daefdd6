"""What the loop lets go of, and when."""

import asyncio
import contextlib
import contextvars
import gc
import os
import random
import sys
import tracemalloc
import weakref

import pytest
from fakes import READ, WRITE, Await, fail, start_until, turn
from kernel import pair, readable
from processes import Thread, in_thread, is_asleep, wait_until


class Thing:
    """A callable that can be watched."""

    def __call__(self, *args, **kwargs):
        pass


def watched():
    thing = Thing()
    return thing, weakref.ref(thing)


def put(place, add, *args):
    """Add a callback that has a Thing; a reference to it, and what `add` returns."""
    thing, reference = watched()
    if place == "callable":
        return reference, add(*args, thing)
    if place == "argument":
        return reference, add(*args, id, thing)
    return reference, add(*args, dict, key=thing)


@pytest.fixture
def no_gc():
    """What goes, goes by its reference count."""
    gc.disable()
    yield
    gc.enable()


# -- References are dropped ----------------------------------------------------


@pytest.mark.row("C13")
@pytest.mark.parametrize("place", ["callable", "argument", "keyword"])
@pytest.mark.parametrize("end", ["fire", "cancel", "remove"])
def test_a_timeout_that_fired_or_was_cancelled_holds_nothing(loop, no_gc, place, end):
    """At once, though the handle is still there."""
    reference, handle = put(place, loop.call_later, 0)
    assert reference() is not None
    if end == "fire":
        turn(loop)
    elif end == "cancel":
        handle.cancel()
    else:
        loop.remove_timeout(handle)
    assert reference() is None
    assert handle.callback is None


@pytest.mark.parametrize("place", ["callable", "argument", "keyword"])
@pytest.mark.parametrize("method", ["add_callback", "spawn_callback"])
def test_a_callback_that_ran_is_dropped(loop, no_gc, place, method):
    reference, _ = put(place, getattr(loop, method))
    assert reference() is not None
    turn(loop)
    assert reference() is None


@pytest.mark.parametrize("end", ["remove", "close"])
def test_a_handler_that_was_removed_is_dropped(loop, no_gc, end):
    handler, reference = watched()
    with pair() as (a, _):
        file = weakref.ref(a)
        loop.add_handler(a, handler, READ)
        del handler
        assert reference() is not None
        if end == "remove":
            loop.remove_handler(a)
        else:
            loop.close()
        assert reference() is None
    del a, _
    assert file() is None


@pytest.mark.row("D16")
def test_a_handler_that_removes_itself(loop):
    """It is kept while it runs, and not longer."""

    class Handler:
        def __call__(self, fd, events):
            loop.remove_handler(fd)
            gc.collect()
            alive.append(reference())

    alive = []
    handler = Handler()
    reference = weakref.ref(handler)
    with readable() as (a, _):
        loop.add_handler(a, handler, READ)
        del handler
        turn(loop)
    assert len(alive) == 1 and alive.pop() is not None
    assert reference() is None


@pytest.mark.row("D15")
def test_nothing_is_held_while_the_loop_sleeps(loop):
    """Not the last callback, timeout or handler, nor what they were given."""

    class Handler:
        def __call__(self, fd, events):
            loop.remove_handler(fd)

    class File(Thing):
        def fileno(self):
            return a.fileno()

    with readable() as (a, _):
        things = [Thing() for _ in range(6)] + [Handler(), File()]
        references = [weakref.ref(thing) for thing in things]
        loop.add_callback(things[0], things[1])
        loop.spawn_callback(things[2], things[3])
        loop.call_later(0, things[4], things[5])
        loop.add_handler(things[7], things[6], READ)
        del things
        with Thread(loop.start) as thread:
            wait_until(lambda: loop.stats()["handlers"] == 0 and is_asleep(thread))
            assert [reference() for reference in references] == [None] * 8
            loop.stop()


def test_what_a_callback_returns_is_dropped(loop, no_gc):
    thing, reference = watched()
    things = [thing]
    del thing
    loop.add_callback(things.pop)
    turn(loop)
    assert reference() is None


# -- Cycles --------------------------------------------------------------------


def in_callback(loop, thing):
    loop.add_callback(thing, loop)


def in_keyword(loop, thing):
    loop.add_callback(thing, loop=loop)


def in_timeout(loop, thing):
    thing.handle = loop.call_later(60, thing, loop)


def in_handler(loop, thing):
    loop.add_handler(thing.sock, thing, READ)


def in_attribute(loop, thing):
    loop.thing = thing


def in_hook(loop, thing):
    loop.handle_callback_exception = thing


def in_action(loop, thing):
    loop.set_blocking_signal_threshold(60, thing)


def in_context(loop, thing):
    var = contextvars.ContextVar("var")

    def add():
        var.set(thing)
        loop.add_callback(int)

    contextvars.copy_context().run(add)


# Not inside of the function: CPython 3.13t keeps functions and classes for ever.
async def wait_for_ever(thing):
    thing.never = asyncio.get_running_loop().create_future()
    await thing.never


def in_coroutine(loop, thing):
    loop.add_callback(wait_for_ever, thing)
    turn(loop, 3)


def in_asyncio(loop, thing):
    loop.asyncio_loop.call_later(60, thing)
    loop.asyncio_loop.add_reader(thing.sock, thing)
    loop.asyncio_loop.set_exception_handler(lambda *_: thing)


def queue(loop, thing):
    loop.add_callback(thing, 1)
    thing.handle = loop.asyncio_loop.call_soon(thing)


def left_by_a_run(loop, thing):
    """While the loop runs, the garbage collector does not see what is queued."""
    loop.add_callback(queue, loop, thing)
    loop.run_once(0)


def in_periodic(loop, thing):
    thing.periodic = thing.module.PeriodicCallback(thing, 60_000, loop)
    thing.periodic.start()


PLACES = [
    in_callback,
    in_keyword,
    in_timeout,
    in_handler,
    in_attribute,
    in_hook,
    in_action,
    in_context,
    in_coroutine,
    in_asyncio,
    left_by_a_run,
    in_periodic,
]


@pytest.mark.row("D18")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.filterwarnings("ignore:unclosed")
def test_cycles_through_the_loop_are_collected(
    poller, counted_files, expect_log, place, closed, monkeypatch
):
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    with pair() as (a, _):

        def make():
            loop = poller.module.IOLoop(impl=poller.impl())
            thing = Thing()
            thing.loop, thing.sock, thing.module = loop, a, poller.module
            place(loop, thing)
            if closed:
                loop.close()
            return weakref.ref(thing), weakref.ref(loop)

        references = make()
        gc.collect()
        assert [reference() for reference in references] == [None, None]
    assert not counted_files()
    if place is in_coroutine:
        expect_log.take("Task was destroyed but it is pending")


@pytest.mark.row("D19")
def test_a_dropped_loop_leaks_nothing_and_warns(poller, counted_files, warns_unclosed):
    """Nobody has closed it: its descriptors are closed when it is collected."""
    for _ in range(5):
        with warns_unclosed():
            loop = poller.module.IOLoop(impl=poller.impl())
            loop.call_later(60, fail)
            loop.add_callback(fail)
            del loop
            gc.collect()
    assert not counted_files()


@pytest.mark.row("F1")
@pytest.mark.parametrize("started", [False, True])
def test_loops_that_come_and_go(poller, counted_files, started):
    """Each of them takes its descriptors along."""
    for _ in range(50):
        with poller.module.IOLoop(impl=poller.impl()) as loop:
            loop.call_later(60, fail)
            if started:
                start_until(loop, None)
    assert not counted_files()


# -- Amounts -------------------------------------------------------------------


def growth(work, warm=2, rounds=3):
    """Bytes that `work` leaves allocated, on average."""
    for _ in range(warm):
        work()
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(rounds):
            work()
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / rounds
    finally:
        tracemalloc.stop()


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.row("C12")
def test_timeouts_added_and_cancelled_in_random_order(loop):
    """50,000 of them leave no memory behind."""
    rng = random.Random(0)
    references = sys.getrefcount(fail)

    def work(count):
        handles = [loop.call_later(rng.random() * 3600, fail) for _ in range(count)]
        rng.shuffle(handles)
        for handle in handles:
            handle.cancel()

    work(50_000)
    work(50_000)
    before = resident()
    work(50_000)
    assert resident() - before < 2 << 20
    assert sys.getrefcount(fail) == references
    assert loop.stats()["pending_timeouts"] == 0


@pytest.mark.row("C12")
def test_the_heap_shrinks(loop):
    """What a burst took is given back: the tables follow what is there."""

    def burst():
        handles = [loop.call_later(60, fail) for _ in range(5000)]
        for handle in handles:
            handle.cancel()

    assert growth(burst) < 20_000


def test_the_queue_shrinks(loop):
    """A burst's room is given back by and by, while the loop sleeps."""

    def burst():
        for _ in range(200_000):
            loop.add_callback(int)
        turn(loop)
        for _ in range(50):
            loop.run_once(0.001)

    # In an empty context a callback is an entry of the queue, and nothing else.
    assert contextvars.Context().run(growth, burst, 0, 1) < 20_000


@pytest.mark.row("C12")
def test_the_first_burst_is_given_back_too(loop):
    """Growth from one burst to the next would not show tables that stay large."""
    tracemalloc.start()
    try:
        handles = [loop.call_later(60, fail) for _ in range(50_000)]
        peak = tracemalloc.get_traced_memory()[0]
        for handle in handles:
            handle.cancel()
        del handles, handle
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 50_000 < peak / 10
    finally:
        tracemalloc.stop()


@pytest.mark.row("F3")
@pytest.mark.parametrize("what", ["callbacks", "timeouts", "events", "handlers"])
def test_iterations_leave_nothing(loop, what):
    with readable() as (a, _):

        def work():
            for _ in range(300):
                if what == "callbacks":
                    loop.add_callback(int)
                    loop.add_callback(dict, key=1)
                elif what == "timeouts":
                    loop.call_later(0, int)
                    loop.call_later(60, int).cancel()
                elif what == "events":
                    loop.add_handler(a, Thing(), READ)
                else:
                    loop.add_handler(a, Thing(), WRITE)
                    loop.update_handler(a, READ)
                loop.run_once(0)
                loop.remove_handler(a)

        assert growth(work) < 2000


@pytest.mark.row("F2")
def test_failures_leave_nothing(loop):
    """Nor do the errors of calls that were refused."""

    def work():
        for _ in range(100):
            for name, args in (
                ("add_callback", (None,)),
                ("call_later", (0, None)),
                ("call_later", ("1", int)),
                ("add_timeout", (float("nan"), int)),
                ("add_handler", (-1, int, READ)),
                ("add_handler", (10_000, int, READ)),
                ("update_handler", (500, READ)),
                ("remove_timeout", (1,)),
            ):
                with contextlib.suppress(Exception):
                    getattr(loop, name)(*args)

    assert growth(work) < 2000


def test_coroutines_leave_nothing(loop):
    async def work():
        for _ in range(5):
            await Await()
        return 1

    def run():
        for _ in range(50):
            assert loop.run_sync(work) == 1

    assert growth(run) < 2000


def test_add_callback_from_many_threads_leaves_nothing(loop):
    def work():
        in_thread(lambda: [loop.add_callback(int) for _ in range(500)])
        turn(loop)

    assert growth(work) < 20_000
