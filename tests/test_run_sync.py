"""run_sync, add_future, coroutines as callbacks, and their contexts."""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import decimal
import fractions
import gc
import types
import weakref
from unittest import mock

import pytest
from fakes import (
    FOREVER,
    READ,
    Await,
    Exit,
    context_with,
    fail,
    finished,
    run_until,
    turn,
)
from kernel import readable
from processes import Thread, in_thread

BASE = [Exit, KeyboardInterrupt, SystemExit]
var = contextvars.ContextVar("var", default="unset")


async def coroutine(result=None, error=None, steps=2):
    for _ in range(steps):
        await Await()
    if error is not None:
        raise error
    return result


def function(result=None, error=None):
    if error is not None:
        raise error
    return result


kinds = pytest.mark.parametrize("kind", [function, coroutine, finished])


class Answers:
    """Has whatever it is asked for."""

    def __getattr__(self, name):
        return lambda *args: self


class Refuses:
    """Fails when it is asked for anything."""

    def __getattr__(self, name):
        raise RuntimeError("hostile")


class Generators(type):
    """Instances, which are classes, have what a generator has."""

    gi_code = types.SimpleNamespace(co_flags=0x100)


def make_generator():
    """One that is no coroutine."""
    yield


PLAIN = {
    "Mock": mock.Mock(),
    "MagicMock": mock.MagicMock(),
    "AsyncMock": mock.AsyncMock(),
    "NonCallableMock": mock.NonCallableMock(add_done_callback=None),
    "attribute": types.SimpleNamespace(add_done_callback=int, result=int),
    "gi_code": types.SimpleNamespace(gi_code=Generators.gi_code, send=int),
    "__await__": types.SimpleNamespace(__await__=lambda: iter("x")),
    "Answers": Answers(),
    "Refuses": Refuses(),
    "a class of futures": concurrent.futures.Future,
    "a class of asyncio's": asyncio.Future,
    "a class of awaitables": Await,
    "a generator": make_generator(),
    "a generator function": make_generator,
    "a class with gi_code": Generators("Class", (), {}),
}
plain = pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)


# -- run_sync ------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("value", [None, 7, "text", {}])
def test_value(loop, kind, value):
    assert loop.run_sync(lambda: kind(value)) == value
    assert not loop.running()


@kinds
def test_exception(loop, kind):
    with pytest.raises(ZeroDivisionError):
        loop.run_sync(lambda: kind(error=ZeroDivisionError()))
    assert not loop.running()
    assert loop.run_sync(lambda: kind(1)) == 1


@pytest.mark.parametrize("kind", [function, coroutine])
@pytest.mark.parametrize("error", BASE)
def test_base_exception(loop, kind, error):
    with pytest.raises(error):
        loop.run_sync(lambda: kind(error=error()))
    assert not loop.running()
    assert loop.run_sync(lambda: kind(1)) == 1


def test_callback_and_timeouts_run_meanwhile(loop):
    log = []
    loop.add_callback(log.append, "c")
    loop.call_later(0.001, log.append, "t")

    async def main():
        while len(log) < 2:
            await Await()
        return "done"

    assert loop.run_sync(main) == "done"
    assert log == ["c", "t"]


def test_a_future_of_another_thread(loop):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert loop.run_sync(lambda: pool.submit(pow, 2, 10)) == 1024

        async def main():
            return [await Await(pool.submit(pow, 2, n)) for n in range(5)]

        assert loop.run_sync(main) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    "timeout", [0, 0.002, -1, decimal.Decimal("0.002"), fractions.Fraction(1, 500)]
)
def test_timeout(loop, timeout):
    never = concurrent.futures.Future()
    with pytest.raises(TimeoutError):
        loop.run_sync(lambda: never, timeout)
    assert not loop.running()
    assert loop.stats()["pending_timeouts"] == 0


def test_done_in_the_iteration_of_its_timeout(loop):
    """The value counts, and not that time is over as well."""
    assert loop.run_sync(lambda: 7, timeout=0) == 7


def test_a_timeout_stops_no_later_start(loop):
    """What is cancelled tells so when nobody waits for it any more."""
    log = []
    with pytest.raises(TimeoutError):
        loop.run_sync(concurrent.futures.Future, timeout=0.001)
    loop.add_callback(loop.add_callback, log.append, 1)
    loop.call_later(0.002, loop.stop)
    loop.start()
    assert log == [1]


def test_timeout_closes_the_coroutine(loop):
    log = []

    async def main():
        try:
            await Await(concurrent.futures.Future())
        finally:
            log.append("closed")

    with pytest.raises(TimeoutError):
        loop.run_sync(main, timeout=0.001)
    assert log == ["closed"]


def test_timeout_waits_for_the_cancellation(loop):
    """However many iterations a coroutine takes to clean up."""
    log = []

    async def main():
        try:
            await asyncio.sleep(FOREVER)
        finally:
            await coroutine(steps=3)
            await asyncio.sleep(0.001)
            log.append("closed")

    with pytest.raises(TimeoutError):
        loop.run_sync(main, timeout=0.001)
    assert log == ["closed"]
    assert asyncio.all_tasks(loop.asyncio_loop) == set()


def test_timeout_of_a_coroutine_that_goes_on(loop):
    """Another stop() is enough; later on, nobody hears of it."""
    log = []

    async def main():
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            loop.call_later(0.001, loop.stop)
            await asyncio.wrap_future(gate)
            log.append("went on")

    gate = concurrent.futures.Future()
    with pytest.raises(TimeoutError):
        loop.run_sync(main, timeout=0.001)
    assert log == []
    gate.set_result(None)
    turn(loop, 4)
    assert log == ["went on"]
    assert_stops_by_itself(loop)


def test_what_its_cancellation_raises_goes_to_the_hook(loop, expect_log):
    async def main():
        try:
            await asyncio.sleep(FOREVER)
        finally:
            raise ZeroDivisionError

    with pytest.raises(TimeoutError):
        loop.run_sync(main, timeout=0.001)
    expect_log.take("Exception in callback", ZeroDivisionError)


@kinds
@pytest.mark.parametrize("number", [int, decimal.Decimal, fractions.Fraction])
def test_timeout_that_is_not_needed(loop, kind, number):
    assert loop.run_sync(lambda: kind(3), timeout=number(FOREVER)) == 3
    assert loop.stats()["pending_timeouts"] == 0


@pytest.mark.parametrize("timeout", ["1", object(), float("nan"), mock.Mock()])
def test_timeout_that_is_nonsense(loop, timeout):
    with pytest.raises((TypeError, ValueError)):
        loop.run_sync(int, timeout)
    turn(loop)
    assert loop.stats()["callbacks"] == 0


def test_a_timeout_error_of_the_function_is_its_own(loop):
    with pytest.raises(TimeoutError, match="mine"):
        loop.run_sync(lambda: fail(TimeoutError("mine")), timeout=FOREVER)


def test_timeout_error_is_the_builtin(poller):
    assert poller.module.TimeoutError is TimeoutError


def test_stopped_before_it_was_done(loop):
    async def main():
        loop.stop()
        await Await(concurrent.futures.Future())

    with pytest.raises(RuntimeError, match="stopped"):
        loop.run_sync(main)


@pytest.mark.parametrize("error", [None, ValueError])
def test_stopped_in_the_iteration_in_which_it_is_done(loop, error):
    """Done is done."""

    async def function():
        loop.stop()
        if error is not None:
            raise error("why")
        return 7

    if error is None:
        assert loop.run_sync(function) == 7
    else:
        with pytest.raises(error, match="why"):
            loop.run_sync(function)
    turns = []
    loop.add_callback(turns.append, 1)
    loop.call_later(0.001, loop.stop)
    loop.start()
    assert turns == [1]


def test_timeout_of_a_future_of_a_loop_that_does_not_run(loop):
    """There is nothing to wait for once it is cancelled."""
    with contextlib.closing(asyncio.SelectorEventLoop()) as other:
        future = other.create_future()
        with pytest.raises(TimeoutError):
            loop.run_sync(lambda: future, timeout=0.001)
        assert future.cancelled()


def test_left_in_the_iteration_in_which_it_is_done(loop, expect_log):
    """What else it has raised is not lost."""

    async def function():
        loop.add_callback(interrupt)
        raise ValueError("why")

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run_sync(function)
    expect_log.take("Exception in callback", ValueError)


def test_stop_before_run_sync(loop):
    """That is the start() which returns at once; nothing is left over."""
    calls = []
    loop.stop()
    with pytest.raises(RuntimeError):
        loop.run_sync(lambda: calls.append(1))
    turn(loop, 2)
    assert calls == []
    assert loop.run_sync(lambda: 5) == 5


def assert_stops_by_itself(loop):
    """A later start() ends by its own stop(), an iteration later."""
    log = []
    loop.add_callback(loop.add_callback, lambda: log.append("own") or loop.stop())
    loop.start()
    assert log == ["own"]


@pytest.mark.row("D1")
def test_left_before_its_function_began(loop):
    """What else was queued is run by a later start(); the function is not."""
    log = []

    def leave():
        loop.add_callback(log.append, "other")
        raise Exit

    loop.add_callback(leave)
    with pytest.raises(Exit):
        loop.run_sync(lambda: log.append("func"))
    assert_stops_by_itself(loop)
    assert log == ["other"]


@pytest.mark.parametrize("cancels", [True, False])
def test_left_while_it_waits_for_a_future(loop, cancels):
    """It is cancelled; and if it goes on all the same, nobody hears of it."""

    class Future(concurrent.futures.Future):
        def cancel(self):
            log.append("cancelled")
            return cancels and super().cancel()

    log, gate = [], Future()
    loop.add_callback(loop.add_callback, fail, Exit)
    with pytest.raises(Exit):
        loop.run_sync(lambda: gate)
    assert log == ["cancelled"]
    if not cancels:
        gate.set_result(1)
    assert_stops_by_itself(loop)


@pytest.mark.parametrize("make", [type(None), concurrent.futures.Future])
def test_left_while_a_coroutine_runs(loop, make):
    log, awaited = [], make()

    async def main():
        try:
            while True:
                await Await(awaited)
        finally:
            log.append("closed")

    # In the third iteration: it is called in the first, and begins in the second.
    loop.add_callback(loop.add_callback, loop.add_callback, fail, Exit)
    with pytest.raises(Exit):
        loop.run_sync(main)
    assert log == ["closed"]
    assert_stops_by_itself(loop)


@pytest.mark.parametrize("func", [None, 1, "f"])
def test_what_is_not_callable(loop, func):
    with pytest.raises(TypeError):
        loop.run_sync(func)


def test_in_a_thread(loop):
    assert in_thread(loop.run_sync, lambda: coroutine(9)) == 9


def test_a_cancelled_future(loop):
    cancelled = concurrent.futures.Future()
    cancelled.cancel()
    cancelled.set_running_or_notify_cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        loop.run_sync(lambda: cancelled, timeout=FOREVER)


# -- Coroutines ----------------------------------------------------------------


def add_callback(loop, function):
    loop.add_callback(function)


def call_later(loop, function):
    loop.call_later(0, function)


def add_handler(loop, function):
    sock = loop.sock

    def handler(fd, events):
        loop.remove_handler(fd)
        return function()

    loop.add_handler(sock, handler, READ)


@pytest.fixture(params=[add_callback, call_later, add_handler])
def run(loop, request):
    """Each way to have a function called by the loop."""
    with readable() as (loop.sock, _):
        yield lambda function: request.param(loop, function)
        del loop.sock


def until(loop, log, count):
    for _ in range(200):
        if len(log) >= count:
            break
        loop.run_once(0)
    assert len(log) >= count


def test_a_coroutine_is_driven_to_its_end(loop, run):
    log = []

    async def work():
        for i in range(3):
            log.append(i)
            await Await()
        log.append(await Await(finished("result")))

    run(work)
    until(loop, log, 4)
    assert log == [0, 1, 2, "result"]


def test_one_step_in_an_iteration(loop):
    log = []

    async def work():
        for _ in range(3):
            log.append(loop.stats()["iterations"])
            await Await()

    loop.add_callback(work)
    turn(loop, 6)
    assert log == [log[0], log[0] + 1, log[0] + 2]


@pytest.mark.parametrize("kind", [coroutine, finished])
def test_its_exception_goes_to_the_hook(loop, run, kind, expect_log):
    run(lambda: kind(error=ZeroDivisionError("in vain")))
    turn(loop, 8)
    expect_log.take("Exception in callback", ZeroDivisionError)


def test_the_hook_gets_the_users_callable(loop):
    seen = []
    loop.handle_callback_exception = seen.append

    async def work():
        raise ZeroDivisionError

    loop.add_callback(work)
    loop.call_later(0, work)
    turn(loop, 5)
    del loop.handle_callback_exception
    assert seen == [work, work]


@pytest.mark.row("D7")
@pytest.mark.parametrize("error", BASE)
@pytest.mark.parametrize("steps", [0, 2])
def test_its_base_exception_leaves_start_once(loop, run, error, steps):
    run(lambda: coroutine(error=error(), steps=steps))
    late = loop.call_later(FOREVER, fail)
    with pytest.raises(error):
        loop.start()
    assert not loop.running()
    turn(loop, 5)
    late.cancel()


@pytest.mark.row("D12")
def test_stop_iteration_and_cancelled_error(loop, expect_log):
    """Inside a coroutine the first is a RuntimeError; the other is its own end."""

    async def stop():
        raise StopIteration

    async def cancelled():
        raise asyncio.CancelledError

    loop.add_callback(stop)
    turn(loop, 4)
    expect_log.take("Exception in callback", RuntimeError)
    loop.add_callback(cancelled)
    turn(loop, 4)
    with pytest.raises(asyncio.CancelledError):
        loop.run_sync(cancelled)


def test_awaitables_of_other_kinds(loop, run):
    """Objects with __await__, and a generator that is a coroutine by its decorator."""
    log = []

    class Yields:
        def __await__(self):
            for i in range(3):
                log.append(i)
                yield

    class Iterates:
        def __await__(self):
            return map(log.append, range(3))

    @types.coroutine
    def generator():
        for i in range(3):
            log.append(i)
            yield
        return "result"

    for kind in (Yields, Iterates, generator):
        run(kind)
        until(loop, log, 3)
        assert log == [0, 1, 2]
        log.clear()
    assert loop.run_sync(Iterates, timeout=FOREVER) is None
    assert loop.run_sync(generator, timeout=FOREVER) == "result"


def test_coroutines_wake_the_loop_from_another_thread(loop):
    gate = concurrent.futures.Future()

    async def work():
        loop.value = await Await(gate)
        loop.stop()

    loop.add_callback(work)
    thread = Thread(lambda: gate.set_result("value"))
    loop.call_later(FOREVER, fail)
    loop.start()
    thread.join()
    assert loop.value == "value"


def test_many_coroutines_take_turns(loop):
    log = []

    async def work(name):
        for i in range(3):
            log.append((i, name))
            await Await()

    for name in "abc":
        loop.add_callback(work, name)
    until(loop, log, 9)
    assert log == [(i, name) for i in range(3) for name in "abc"]


@pytest.mark.row("D20")
def test_every_step_runs_in_the_context_of_its_callback(loop):
    log = []

    async def work(value):
        var.set(value)
        for _ in range(3):
            await Await()
            log.append((value, var.get()))
        await Await(finished())
        log.append((value, var.get()))

    loop.add_callback(work, "a")
    contextvars.copy_context().run(loop.spawn_callback, work, "b")
    until(loop, log, 8)
    assert all(value == got for value, got in log)
    assert var.get() == "unset"


@pytest.mark.row("D20")
@pytest.mark.parametrize("kind", [function, coroutine])
def test_the_hook_is_called_in_the_context(loop, run, kind):
    seen = []
    loop.handle_callback_exception = lambda callback: seen.append(var.get())
    context_with(var, "mine").run(run, lambda: kind(error=ZeroDivisionError()))
    turn(loop, 6)
    del loop.handle_callback_exception
    assert seen == ["mine"]


@pytest.mark.row("D20")
def test_run_sync_sees_the_callers_context(loop):
    async def main():
        await Await()
        return var.get()

    context = context_with(var, "mine")
    assert context.run(loop.run_sync, main) == "mine"
    assert context.run(loop.run_sync, var.get) == "mine"


@pytest.mark.row("D18")
def test_coroutines_that_never_end_go_with_the_loop(loop, expect_log):
    """What waits for nothing that anybody has is collected."""
    log = []

    class Thing:
        pass

    async def work():
        thing = Thing()
        log.append(weakref.ref(thing))
        await Await(concurrent.futures.Future())

    loop.add_callback(work)
    turn(loop, 3)
    gc.collect()
    assert log[0]() is None
    expect_log.take("Task was destroyed but it is pending")


def test_a_loop_closed_under_a_coroutine(loop, expect_log):
    """Its generator is closed by the collector; the future finds the loop closed."""
    gates = [concurrent.futures.Future()]
    log = []

    async def work():
        try:
            await Await(gates[0])
        finally:
            log.append("closed")

    loop.add_callback(work)
    turn(loop, 3)
    loop.close()
    gates.clear()
    gc.collect()
    assert log == ["closed"]
    expect_log.take("Task was destroyed but it is pending")


# -- add_future ----------------------------------------------------------------


def test_add_future(loop):
    log = []
    gate = concurrent.futures.Future()
    assert loop.add_future(gate, log.append) is None
    loop.add_future(finished(), log.append)
    turn(loop)
    assert len(log) == 1
    gate.set_result(1)
    assert len(log) == 1
    turn(loop)
    assert log[1] is gate


def test_add_future_from_a_thread_that_finishes_it(loop):
    gate = concurrent.futures.Future()
    loop.add_future(gate, lambda done: loop.stop())
    thread = Thread(gate.set_result, 1)
    loop.call_later(FOREVER, fail)
    loop.start()
    thread.join()


@pytest.mark.row("D20")
def test_add_future_captures_the_context(loop):
    log = []
    gate = concurrent.futures.Future()
    context_with(var, "a").run(loop.add_future, gate, lambda _: log.append(var.get()))
    in_thread(gate.set_result, 1)
    turn(loop)
    assert log == ["a"]


@pytest.mark.parametrize("callback", [None, 1])
def test_add_future_wants_a_callable(loop, callback):
    with pytest.raises(TypeError):
        loop.add_future(finished(), callback)


def test_add_future_wants_a_future(loop):
    with pytest.raises(AttributeError):
        loop.add_future(object(), print)


def test_add_future_exception_goes_to_the_hook(loop, expect_log):
    loop.add_future(finished(), fail)
    turn(loop)
    expect_log.take("Exception in callback", TypeError)


def test_futures_and_coroutines_of_handlers_do_not_pile_up(loop):
    with readable() as (a, _):
        loop.add_handler(a, lambda *_: finished(), READ)
        turn(loop, 50)
        loop.remove_handler(a)
        assert loop.stats()["pending_callbacks"] <= 1


# -- What is a future ----------------------------------------------------------


@plain
def test_a_value_that_only_looks_like_a_future_is_returned(loop, value):
    assert loop.run_sync(lambda: value, timeout=1) is value


@plain
def test_a_value_that_only_looks_like_a_future_is_ignored(loop, value):
    """As is every other, whoever returns it."""
    calls = []
    with readable() as (loop.sock, _):
        for way in (add_callback, call_later, add_handler):
            way(loop, lambda: calls.append(1) or value)
        turn(loop, 3)
    del loop.sock
    assert calls == [1, 1, 1]
    assert loop.stats()["pending_callbacks"] == 0


@plain
def test_a_value_that_only_looks_like_a_future_does_not_stop_ticks(loop, poller, value):
    calls = []
    periodic = poller.module.PeriodicCallback(
        lambda: calls.append(1) or value, 0.1, loop
    )
    periodic.start()
    run_until(loop, lambda: len(calls) >= 3)
    periodic.stop()


def test_a_coroutine_function_that_is_a_mock(loop, run):
    """What it returns is a coroutine, whoever made it."""
    work = mock.AsyncMock(return_value=7)
    run(work)
    run_until(loop, lambda: work.await_count)
    assert loop.run_sync(work) == 7


class Proxy:
    """Says that it is what it stands for."""

    def __init__(self, target):
        self.target = target

    @property
    def __class__(self):
        return type(self.target)

    def __getattr__(self, name):
        return getattr(self.target, name)


class Duck:
    """All that a future needs."""

    def __init__(self, inner):
        self.inner = inner

    def add_done_callback(self, callback):
        self.inner.add_done_callback(lambda _: callback(self))

    def result(self):
        return self.inner.result()


@pytest.mark.parametrize("wrap", [Proxy, weakref.proxy, Duck])
@pytest.mark.parametrize("end", ["early", "late"])
def test_what_stands_for_a_future_is_one(loop, wrap, end):
    gate = concurrent.futures.Future()
    if end == "early":
        gate.set_result(7)
    else:
        loop.call_later(0, gate.set_result, 7)

    assert loop.run_sync(lambda: wrap(gate), timeout=5) == 7


def test_a_mock_with_the_class_of_a_future_is_one(loop, poller):
    """By its class: it is waited for, for ever."""
    pending = mock.Mock(spec=concurrent.futures.Future)
    calls = []
    periodic = poller.module.PeriodicCallback(
        lambda: calls.append(1) or pending, 0.1, loop
    )
    periodic.start()
    loop.call_later(0.01, loop.stop)
    loop.start()
    periodic.stop()
    assert calls == [1]
    pending.add_done_callback.assert_called_once()


def test_a_future_of_asyncio_is_one(loop):
    asyncio_loop = asyncio.new_event_loop()
    try:
        pending = asyncio_loop.create_future()
        asyncio_loop.call_soon(pending.set_result, 7)
        loop.call_later(0.001, asyncio_loop.run_until_complete, pending)
        assert loop.run_sync(lambda: pending, timeout=5) == 7
    finally:
        asyncio_loop.close()


def test_only_the_class_of_a_future_is_asked_for_its_methods(loop, run, expect_log):
    """Else a failure would be taken for a cancelling."""
    asked = []

    class Evasive(Duck):
        def __getattr__(self, name):
            asked.append(name)
            return lambda: True

    run(lambda: Evasive(finished(error=ZeroDivisionError())))
    turn(loop, 4)
    expect_log.take("Exception in callback", ZeroDivisionError)
    with pytest.raises(TimeoutError):
        loop.run_sync(lambda: Evasive(concurrent.futures.Future()), timeout=0)
    assert asked == []


@pytest.mark.parametrize("error", [RuntimeError, Exit])
def test_a_class_that_can_not_be_told(loop, run, error, expect_log):
    """It is a value, or its exception is an error like others; the loop goes on."""

    class Nobody:
        @property
        def __class__(self):
            raise error

    log = []
    run(lambda: log.append(1) or Nobody())
    loop.call_later(0, log.append, 2)
    for _ in range(4):
        try:
            turn(loop)
        except error:
            log.append("left")
    assert {1, 2} <= set(log) and log.count("left") <= 1
    if expect_log:
        expect_log.take("Exception in callback", RuntimeError)


# -- A future that ends too late -----------------------------------------------


def add_future(loop, pending):
    loop.add_future(pending, fail)


def as_result(loop, pending):
    loop.add_callback(lambda: pending)


def in_a_coroutine(loop, pending):
    async def work():
        await Await(pending)

    loop.add_callback(work)


def in_run_sync(loop, pending):
    with pytest.raises(TimeoutError):
        loop.run_sync(lambda: Duck(pending), timeout=0)


def as_handler(loop, pending):
    def handler(sock, events):
        loop.update_handler(sock, 0)
        return pending

    loop.add_handler(loop.sock, handler, READ)


@pytest.mark.parametrize(
    "wait", [add_future, as_result, in_a_coroutine, in_run_sync, as_handler]
)
@pytest.mark.parametrize("end", ["result", "exception", "cancel", "thread"])
def test_futures_that_end_after_close_are_let_go(loop, caplog, expect_log, wait, end):
    """concurrent.futures logs what it can't call; the loop must not keep it either."""
    pending = concurrent.futures.Future()
    reference = weakref.ref(pending)
    with readable() as (loop.sock, _):
        wait(loop, pending)
        turn(loop, 2)
    loop.close()
    caplog.clear()
    if end == "result":
        pending.set_result(1)
    elif end == "exception":
        pending.set_exception(ZeroDivisionError())
    elif end == "cancel":
        pending.cancel()
    else:
        in_thread(pending.set_result, 1)
    del loop.sock, pending
    gc.collect()
    if wait is in_a_coroutine:
        expect_log.take("Task was destroyed but it is pending")
    assert {record.name for record in caplog.records} <= {"asyncio"}
    assert reference() is None


def test_an_executor_that_is_shut_down_after_close(loop, caplog):
    """Its threads find the loop closed, without a word."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        gate = concurrent.futures.Future()
        for _ in range(4):
            loop.add_future(pool.submit(gate.result), fail)
        loop.close()
        gate.set_result(None)
    assert caplog.messages == []
