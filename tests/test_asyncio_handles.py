"""Asyncio's handles: what they are, their contexts, debug mode, other threads."""

import asyncio
import contextvars
import functools
import gc
import math
import signal
import sys
import threading
import weakref

import pytest
from fakes import (
    FOREVER,
    FakeClock,
    block,
    context_with,
    fail,
    in_time,
    turn,
)
from kernel import kill, pair, readable
from processes import (
    Thread,
    at_once,
    in_thread,
    sleeping,
    switch_interval,
)

USR1 = signal.SIGUSR1

var = contextvars.ContextVar("var", default="unset")

threadsafe_handles = hasattr(asyncio.events, "_ThreadSafeHandle")  # from 3.14 on


def nothing(*_):
    pass


def add(face, how, *args, **options):
    """Add a callback in one of the ways; return its handle."""
    if how == "call_later":
        return face.call_later(0, *args, **options)
    if how == "call_at":
        return face.call_at(face.time(), *args, **options)
    return getattr(face, how)(*args, **options)


hows = pytest.mark.parametrize(
    "how", ["call_soon", "call_soon_threadsafe", "call_later", "call_at"]
)


# -- Handles -------------------------------------------------------------------


@hows
def test_a_handle_is_asyncios(face, how):
    """With all attributes that those have."""
    handle = add(face, how, nothing, 1)
    assert isinstance(handle, asyncio.Handle)
    timer = how in ("call_later", "call_at")
    assert isinstance(handle, asyncio.TimerHandle) == timer
    names = {*asyncio.Handle.__slots__, *(asyncio.TimerHandle.__slots__ * timer)}
    for name in names - {"__weakref__"}:
        getattr(handle, name)
    assert (handle._callback, handle._args) == (nothing, (1,))
    assert handle._loop is face
    assert weakref.ref(handle)() is handle
    if threadsafe_handles:
        theirs = isinstance(handle, asyncio.events._ThreadSafeHandle)
        assert theirs == (how == "call_soon_threadsafe")
    handle.cancel()
    assert (handle._callback, handle._args) == (None, None)


def test_nobody_else_makes_handles(face):
    for handle in face.call_soon(nothing), face.call_later(0, nothing):
        with pytest.raises(TypeError, match="by an event loop"):
            type(handle)()
        blank = type(handle).__new__(type(handle))
        with pytest.raises(TypeError, match="by an event loop"):
            face._add_callback(blank)
        assert repr(blank)
        blank._run()
        blank.cancel()
        assert blank.cancelled()


def test_a_timer_knows_when(make_loop):
    clock = FakeClock()
    face = make_loop(time_func=clock).asyncio_loop
    assert face.call_at(1234.5, nothing).when() == 1234.5
    assert face.call_later(2.5, nothing).when() == clock.now + 2.5
    assert face.call_later(math.inf, nothing).when() == math.inf


def test_timers_have_an_order(face):
    timers = [face.call_at(when, nothing) for when in (3, 1, 2)]
    assert [timer.when() for timer in sorted(timers)] == [1, 2, 3]
    first, second, same = (face.call_at(when, nothing) for when in (1, 2, 1))
    assert first < second and first <= second and second > first and second >= first
    assert first == same and first != second and first != 1
    assert {first: 1, second: 2} == {same: 1, second: 2}


@pytest.mark.row("C11")
@hows
def test_cancel_before(loop, face, how):
    """Once and for all."""
    handle = add(face, how, fail)
    assert not handle.cancelled()
    for _ in range(2):
        handle.cancel()
        assert handle.cancelled()
    turn(loop, 2)


@hows
def test_cancel_inside_and_after(loop, face, log, how):
    """The callback ends as usual."""

    def callback():
        handle.cancel()
        log.append(handle.cancelled())

    handle = add(face, how, callback)
    turn(loop, 2)
    handle.cancel()
    turn(loop)
    assert log == [True]
    assert handle.cancelled()


@pytest.mark.row("C11")
@hows
def test_cancel_of_what_has_run(loop, face, log, how):
    handle = add(face, how, log.append, 1)
    turn(loop, 2)
    assert not handle.cancelled()
    handle.cancel()
    assert handle.cancelled()
    assert log == [1]


@pytest.mark.row("C10")
@hows
def test_callbacks_cancel_one_another(make_loop, how):
    """Of two that are due at the same time, the first cancels the second."""
    loop = make_loop(time_func=FakeClock())
    face = loop.asyncio_loop
    add(face, how, lambda: second.cancel())
    second = add(face, how, fail)
    turn(loop)
    assert loop.stats()["pending_timeouts"] == 0


@pytest.mark.row("C12", "C13")
@hows
def test_what_is_cancelled_is_dropped_at_once(loop, face, how):
    """With its arguments; a timer leaves the heap too."""

    class Thing:
        def __call__(self, *_):
            fail()

    callback, argument = Thing(), Thing()
    dead = weakref.ref(callback), weakref.ref(argument)
    handle = add(face, how, callback, argument)
    del callback, argument
    assert None not in [each() for each in dead]
    handle.cancel()
    assert [each() for each in dead] == [None, None]
    assert loop.stats()["pending_timeouts"] == 0


@hows
@pytest.mark.parametrize("ending", ["run", "cancelled", "failed", "failed, then kept"])
@pytest.mark.parametrize("running", [False, True])
def test_what_keeps_its_own_handle_is_collected(loop, face, how, ending, running):
    """While the loop lives on, which some other loops don't manage."""

    class Thing:
        def __init__(self):
            kept = add(face, how, self.run)
            if ending != "failed, then kept":
                self.handle = kept
            if ending == "cancelled":
                self.handle.cancel()
            references.append(weakref.ref(self))

        def run(self):
            runs.append(how)
            if ending.startswith("failed"):
                raise Failure(self)

    class Failure(Exception):
        pass

    def keep(face, context):
        context["exception"].args[0].kept = context

    def begin():
        Thing()
        face.call_later(0, loop.stop)

    references, runs = [], []
    face.set_exception_handler(keep)
    if running:
        loop.add_callback(begin)
    else:
        begin()
    loop.start()
    assert runs == [how] * (ending != "cancelled")
    gc.collect()
    assert [dead() for dead in references] == [None]


@pytest.mark.row("B27")
@hows
def test_cancel_in_another_thread(make_loop, how):
    """Its callback is not called, even if it is due in this iteration."""
    loop = make_loop(time_func=FakeClock())
    face = loop.asyncio_loop
    face.call_soon(lambda: in_thread(handle.cancel))
    handle = add(face, how, fail)
    turn(loop, 2)
    assert handle.cancelled()


@pytest.mark.row("B27")
def test_a_timer_is_cancelled_while_the_loop_sleeps(loop, face):
    """By another thread; what it refers to goes at once, the rest with its time."""

    class Thing:
        def __call__(self):
            fail()

    callback = Thing()
    dead = weakref.ref(callback)
    timer = face.call_later(FOREVER, callback)
    del callback
    with sleeping(loop):
        timer.cancel()
        assert dead() is None
    assert timer.cancelled()
    timer.cancel()
    turn(loop)


def test_cancel_in_debug_mode_with_a_repr_that_fails(loop, face):
    class Callback:
        __call__ = fail

        def __repr__(self):
            raise KeyError("hostile")

    face.set_debug(True)
    handle = face.call_soon(Callback())
    with pytest.raises(KeyError, match="hostile"):
        handle.cancel()
    assert handle.cancelled()
    turn(loop)


def test_cancel_in_debug_mode_with_a_repr_that_cancels(loop, face):
    class Callback:
        __call__ = fail

        def __repr__(self):
            assert handle.cancelled()
            handle.cancel()
            return "<myself>"

    face.set_debug(True)
    handle = face.call_soon(Callback())
    handle.cancel()
    assert "<Handle cancelled <myself>() created at" in repr(handle)
    assert handle._callback is None
    turn(loop)


@pytest.mark.row("B27")
@pytest.mark.skipif(not threadsafe_handles, reason="new in Python 3.14")
def test_cancel_waits_for_a_callback_that_runs(loop, face, log):
    """In another thread, and only of call_soon_threadsafe()."""

    def callback():
        started.set()
        block()
        log.append("callback has ended")

    def cancel():
        started.wait()
        handle.cancel()
        log.append("cancelled")
        loop.stop()

    started = threading.Event()
    handle = face.call_soon_threadsafe(callback)
    with Thread(cancel):
        loop.start()
    assert log == ["callback has ended", "cancelled"]


@hows
def test_run_of_a_handle(loop, face, log, how):
    """As a library may want it, at another time."""
    handle = add(face, how, log.append, 1)
    handle._run()
    assert log == [1]
    turn(loop, 2)
    assert log == [1, 1]


@hows
def test_run_inside_of_another_callback(loop, face, log, how):
    """Each in its own context, even if both are empty."""

    def outer():
        inner._run()
        inner.cancel()

    contextvars.Context().run(face.call_soon, outer)
    inner = contextvars.Context().run(add, face, how, log.append, 1)
    turn(loop, 2)
    assert log == [1]


def test_a_handle_that_is_run_again(loop, face, log):
    """asyncio's proactors and selectors give _add_callback() what they have kept."""
    handle = face.call_soon(log.append, 1)
    turn(loop)
    face._add_callback(handle)
    turn(loop)
    assert log == [1, 1]
    handle.cancel()
    face._add_callback(handle)
    turn(loop)
    assert log == [1, 1]


@hows
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("arguments", [(), (1, "two")])
def test_the_repr_is_asyncios(face, stock, how, debug, arguments):
    """To the word, before and after it is cancelled."""
    face.set_debug(debug)
    stock.set_debug(debug)
    pair = []
    for loop in face, stock:
        if how in ("call_later", "call_at"):
            pair.append(loop.call_at(9e9, nothing, *arguments))
        else:
            pair.append(getattr(loop, how)(nothing, *arguments))
    for _ in range(3):
        ours, theirs = map(repr, pair)
        assert ours == theirs
        assert ("created at" in ours) == debug
        for handle in pair:
            handle.cancel()
    assert "cancelled" in ours


@hows
@pytest.mark.parametrize("value", [None, 1, "text"])
def test_what_can_not_be_called_is_refused(loop, face, how, value):
    with pytest.raises(TypeError, match=f"callable object was expected by {how}"):
        add(face, how, value)
    stats = loop.stats()
    assert stats["pending_callbacks"] == stats["pending_timeouts"] == 0


# -- Contexts ------------------------------------------------------------------


@pytest.fixture
def sets():
    """The variable is set in the context of the test."""
    token = var.set("test")
    yield
    var.reset(token)


def adders(face, sock):
    return {
        "call_soon": face.call_soon,
        "call_soon_threadsafe": face.call_soon_threadsafe,
        "call_later": functools.partial(face.call_later, 0),
        "call_at": functools.partial(face.call_at, 0),
        "add_reader": functools.partial(face._add_reader, sock),
        "add_signal_handler": functools.partial(face.add_signal_handler, USR1),
    }


@pytest.mark.row("D20")
@pytest.mark.parametrize("how", adders(asyncio.SelectorEventLoop, None))
@pytest.mark.parametrize("value", ["unset", "test"])
def test_a_context_is_captured(loop, face, log, how, value):
    """Also an empty one."""

    def callback():
        face.remove_reader(a)
        log.append(var.get())

    with readable() as (a, _):
        add = adders(face, a)[how]
        context = (
            context_with(var, "test") if value == "test" else contextvars.Context()
        )
        context.run(add, callback)
        if how == "add_signal_handler":
            kill(USR1)
        face.call_soon(nothing)
        context_with(var, "another").run(turn, loop, 3)
        face.remove_signal_handler(USR1)
    assert log == [value]


@hows
def test_a_context_is_given(loop, face, log, how):
    context = context_with(var, "given")
    handle = add(face, how, lambda: log.append(var.get()), context=context)
    assert handle.get_context() is context
    turn(loop)
    assert log == ["given"]
    assert var.get() == "unset"


@hows
@pytest.mark.parametrize("value", ["unset", "test"])
def test_the_context_of_a_handle(loop, face, how, value):
    """What is set in it is there for the callback, and the other way round."""

    def callback():
        seen.append(var.get())
        var.set("by the callback")

    seen = []
    outside = context_with(var, "test") if value == "test" else contextvars.Context()
    handle = outside.run(add, face, how, callback)
    context = handle.get_context()
    assert context is handle.get_context()
    assert context.get(var, "unset") == value
    context.run(var.set, "by the test")
    turn(loop)
    assert seen == ["by the test"]
    assert context[var] == "by the callback"
    assert outside.get(var, "unset") == value


@pytest.mark.parametrize("value", ["unset", "test"])
def test_what_a_reader_sets_is_there_again(loop, face, log, value):
    def read():
        log.append(var.get())
        var.set(len(log))

    outside = context_with(var, "test") if value == "test" else contextvars.Context()
    with readable() as (a, _):
        outside.run(face.add_reader, a, read)
        turn(loop, 4)
        face.remove_reader(a)
    assert log == [value, 1, 2]
    assert outside.get(var, "unset") == value


@pytest.mark.row("D20")
def test_callbacks_do_not_share_the_empty_context(loop, face, log):
    def callback():
        log.append(var.get())
        var.set("leaked")

    for _ in range(2):
        face.call_soon(callback)
        loop.add_callback(callback)
        face.call_later(0, callback)
    turn(loop, 2)
    assert log == ["unset"] * 6
    assert var.get() == "unset"


@pytest.mark.row("D20")
@pytest.mark.parametrize("name", ["_context", "_run"])
def test_a_callback_that_asks_for_its_own_context(loop, face, log, name):
    """What it sets is not there for the next one."""
    handles = []

    def callback():
        if not log:
            log.append("again")
            getattr(handles[0], name) if name == "_context" else handles[0]._run()
            var.set("leaked")

    def add_both():
        handles.append(face.call_soon(callback))
        face.call_soon(lambda: log.append(var.get()))

    contextvars.Context().run(add_both)
    turn(loop)
    assert log == ["again", "unset"]


def test_a_task_has_a_context_of_its_own(loop, face, log):
    async def main(name):
        log.append(var.get())
        var.set(name)
        await asyncio.sleep(0)
        log.append(var.get())

    context = context_with(var, "test")
    tasks = [context.run(face.create_task, main(name)) for name in "ab"]
    turn(loop, 3)
    assert log == ["test", "test", "a", "b"]
    assert context[var] == "test"
    assert all(task.done() for task in tasks)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="new in Python 3.11")
def test_a_task_in_a_given_context(loop, face):
    async def main():
        var.set("by the task")

    context = contextvars.Context()
    task = face.create_task(main(), context=context)
    turn(loop, 2)
    assert task.done()
    assert context[var] == "by the task"


# -- Debug mode ----------------------------------------------------------------


@pytest.fixture
def debugged(face):
    face.set_debug(True)
    return face


def test_debug_mode_knows_where_a_handle_was_made(debugged):
    handle = debugged.call_soon(nothing)
    timer = debugged.call_later(FOREVER, nothing)
    for each in handle, timer:
        frame = each._source_traceback[-1]
        assert (frame.filename, frame.name) == (
            __file__,
            "test_debug_mode_knows_where_a_handle_was_made",
        )
    debugged.set_debug(False)
    assert debugged.call_soon(nothing)._source_traceback is None


@pytest.mark.parametrize("how", ["call_soon", "timer", "reader", "task"])
def test_slow_callbacks_are_logged(loop, debugged, expect_log, how):
    """From slow_callback_duration on, here all."""

    def slow():
        debugged.remove_reader(a)

    async def coroutine():
        pass

    debugged.slow_callback_duration = FOREVER
    debugged.call_soon(nothing)
    turn(loop)
    debugged.slow_callback_duration = 0
    with readable() as (a, _):
        if how == "call_soon":
            debugged.call_soon(slow)
        elif how == "timer":
            debugged.call_later(0, slow)
        elif how == "reader":
            debugged.add_reader(a, slow)
        else:
            task = debugged.create_task(coroutine())
        turn(loop, 2)
    name = "coroutine" if how == "task" else "slow"
    record = expect_log.take(f"^Executing <.*{name}.* took [0-9.]* seconds$")
    assert (record.name, record.levelname) == ("asyncio", "WARNING")
    assert how != "task" or task.done()


def test_slow_callbacks_are_logged_in_debug_mode_only(loop, face):
    face.slow_callback_duration = 0
    face.call_soon(nothing)
    turn(loop)


def test_the_handle_that_runs_is_known_in_debug_mode(loop, debugged, log):
    """For asyncio's hook, which tells where it was made."""
    handle = debugged.call_soon(lambda: log.append(debugged._current_handle))
    turn(loop)
    assert log == [handle]
    assert debugged._current_handle is None


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("call_soon", ()), ("call_later", (0,)), ("call_at", (0,))],
)
def test_debug_mode_checks_the_thread(loop, debugged, method, arguments):
    with sleeping(loop):
        with pytest.raises(RuntimeError, match="Non-thread-safe operation"):
            getattr(debugged, method)(*arguments, fail)
        done = threading.Event()
        debugged.call_soon_threadsafe(done.set)
        done.wait()


@pytest.mark.parametrize("value", ["function", "coroutine"])
@hows
def test_coroutines_are_no_callbacks(debugged, how, value):
    async def function():
        pass

    coroutine = function()
    with pytest.raises(TypeError, match="coroutines cannot be used with call_"):
        add(debugged, how, function if value == "function" else coroutine)
    coroutine.close()


def test_debug_mode_tracks_the_origins_of_coroutines(loop, debugged, log):
    """During a run, and no longer."""
    loop.add_callback(lambda: log.append(sys.get_coroutine_origin_tracking_depth()))
    turn(loop)
    assert log[0] > 0
    assert sys.get_coroutine_origin_tracking_depth() == 0


def test_debug_mode_can_be_turned_on_in_a_run(loop, face):
    async def main():
        face.set_debug(True)
        await asyncio.sleep(0)
        return sys.get_coroutine_origin_tracking_depth()

    assert loop.run_sync(main) > 0
    assert sys.get_coroutine_origin_tracking_depth() == 0


# -- Threads -------------------------------------------------------------------


@pytest.mark.row("B33")
@pytest.mark.parametrize("how", ["call_soon", "call_soon_threadsafe"])
def test_a_callback_from_another_thread_wakes_the_loop(loop, face, how):
    done = threading.Event()
    with sleeping(loop):
        getattr(face, how)(done.set)
        assert done.wait(10)


@pytest.mark.row("B33")
def test_callbacks_of_many_threads(loop, face, log):
    """Each runs once, and those of one thread in its order."""
    threads, count, left = 4, 500, 4

    def produce(name):
        adds = [face.call_soon, face.call_soon_threadsafe, loop.add_callback]
        for i in range(count):
            adds[i % 3](log.append, (name, i))
        face.call_soon(end)

    def end():
        nonlocal left
        left -= 1
        if not left:
            face.stop()

    with switch_interval(1e-6):
        producers = [Thread(produce, name) for name in range(threads)]
        with in_time(loop):
            face.run_forever()
        for producer in producers:
            producer.join()
    for name in range(threads):
        assert [i for who, i in log if who == name] == list(range(count))
    assert loop.stats()["callbacks"] == threads * (count + 1)


@pytest.mark.row("B16", "B33")
def test_what_other_threads_may_not_do(loop, face):
    """While the loop runs; nothing has changed then."""
    calls = {
        "call_later": (1, fail),
        "call_at": (0, fail),
        "add_reader": (0, fail),
        "add_writer": (0, fail),
        "remove_reader": (0,),
        "remove_writer": (0,),
        "run_forever": (),
        "close": (),
    }
    with pair() as (a, _):
        face.add_reader(a, fail)
        calls["remove_reader"] = calls["remove_writer"] = (a,)
        timer = face.call_later(FOREVER, fail)
        with sleeping(loop):
            before = loop.stats()
            for name, arguments in calls.items():
                with pytest.raises(RuntimeError):
                    getattr(face, name)(*arguments)
            after = loop.stats()
        assert before == after
        assert face.remove_reader(a)
        timer.cancel()
    assert not face.is_closed()


def test_timers_cancelled_by_many_threads(loop, face):
    """While the loop runs: none of them fires, and the loop goes on."""
    timers = [face.call_later(FOREVER + i % 7, fail) for i in range(400)]
    face.call_soon(timers[0].cancel)
    with switch_interval(1e-6), sleeping(loop):
        at_once(4, lambda: [timer.cancel() for timer in timers])
    assert all(timer.cancelled() for timer in timers)
    loop.call_later(0, loop.stop)
    loop.start()


def test_a_coroutine_of_another_thread(loop, face):
    async def main():
        await asyncio.sleep(0.001)
        return threading.get_ident()

    with sleeping(loop) as thread:
        future = asyncio.run_coroutine_threadsafe(main(), face)
        assert future.result(10) == thread.ident
