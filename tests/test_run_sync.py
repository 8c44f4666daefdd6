"""run_sync, add_future, coroutines as callbacks, and their contexts."""

import asyncio
import concurrent.futures
import contextvars
import gc
import types
import weakref

import pytest
from helpers import READ, turn
from support import FOREVER, Await, Exit, Thread, fail, in_thread, readable

var = contextvars.ContextVar("var", default="unset")


def future(result=None, error=None):
    """A finished future."""
    done = concurrent.futures.Future()
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
    return done


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


KINDS = [function, coroutine, future]
kinds = pytest.mark.parametrize("kind", KINDS)


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
@pytest.mark.parametrize("error", [Exit, KeyboardInterrupt, SystemExit])
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


@pytest.mark.parametrize("timeout", [0, 0.002, -1])
def test_timeout(loop, poller, timeout):
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


def test_timeout_of_a_coroutine_that_refuses_to_be_closed(loop, expect_log):
    never = concurrent.futures.Future()

    async def main():
        try:
            await Await(never)
        except GeneratorExit:
            await Await(never)

    with pytest.raises(TimeoutError):
        loop.run_sync(main, timeout=0.001)
    expect_log.take("Exception in callback", RuntimeError)


@kinds
def test_timeout_that_is_not_needed(loop, kind):
    assert loop.run_sync(lambda: kind(3), timeout=FOREVER) == 3
    assert loop.stats()["pending_timeouts"] == 0


@pytest.mark.parametrize("timeout", ["1", object(), float("nan")])
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


def test_left_before_its_function_began(loop):
    """D1: what else was queued is run by a later start(); the function is not."""
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
        log.append(await Await(future("result")))

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


def test_what_it_awaits_may_fail(loop, run):
    log = []

    async def work():
        try:
            await Await(future(error=KeyError("gone")))
        except KeyError as error:
            log.append(error.args)
        log.append(await Await(future(2)))

    run(work)
    until(loop, log, 2)
    assert log == [("gone",), 2]


@pytest.mark.parametrize("kind", [coroutine, future])
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


@pytest.mark.parametrize("error", [Exit, KeyboardInterrupt, SystemExit])
def test_D7_its_base_exception_leaves_start(loop, run, error):
    run(lambda: coroutine(error=error()))
    loop.call_later(FOREVER, fail)
    with pytest.raises(error):
        loop.start()
    assert not loop.running()


@pytest.mark.parametrize("error", [Exit, KeyboardInterrupt])
@pytest.mark.parametrize("steps", [0, 2])
def test_D7_its_base_exception_is_raised_once(loop, run, error, steps):
    run(lambda: coroutine(error=error(), steps=steps))
    with pytest.raises(error):
        turn(loop, 5)
    turn(loop, 5)


def test_D12_stop_iteration_and_cancelled_error(loop, expect_log):
    """Inside a coroutine the first is a RuntimeError; the other, a BaseException."""

    async def stop():
        raise StopIteration

    async def cancelled():
        raise asyncio.CancelledError

    loop.add_callback(stop)
    turn(loop, 4)
    expect_log.take("Exception in callback", RuntimeError)
    loop.add_callback(cancelled)
    with pytest.raises(asyncio.CancelledError):
        turn(loop, 4)


def test_what_can_not_be_awaited_raises_inside(loop):
    log = []

    async def work():
        try:
            await Await("nonsense")
        except TypeError as error:
            log.append("nonsense" in str(error))
        await Await()
        log.append("on")

    loop.add_callback(work)
    until(loop, log, 2)
    assert log == [True, "on"]


def test_what_can_not_be_waited_for_raises_inside(loop, run):
    class Broken:
        def add_done_callback(self, callback):
            raise KeyError("broken")

    log = []

    async def work():
        try:
            await Await(Broken())
        except KeyError as error:
            log.append(error.args)
        await Await()
        log.append("on")

    run(work)
    until(loop, log, 2)
    assert log == [("broken",), "on"]


def test_objects_with_await(loop):
    log = []

    class Work:
        def __await__(self):
            yield
            log.append("done")

    loop.add_callback(Work)
    until(loop, log, 1)


def test_awaitables_of_other_kinds(loop, run):
    """An iterator of Nones, and a generator that is a coroutine by its decorator."""
    log = []

    class Iterates:
        def __await__(self):
            return map(log.append, range(3))

    @types.coroutine
    def generator():
        for i in range(3):
            log.append(i)
            yield
        return "result"

    for kind in (Iterates, generator):
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


def test_D20_every_step_runs_in_the_context_of_its_callback(loop):
    log = []

    async def work(value):
        var.set(value)
        for _ in range(3):
            await Await()
            log.append((value, var.get()))
        await Await(future())
        log.append((value, var.get()))

    loop.add_callback(work, "a")
    contextvars.copy_context().run(loop.spawn_callback, work, "b")
    until(loop, log, 8)
    assert all(value == got for value, got in log)
    assert var.get() == "unset"


@pytest.mark.parametrize("kind", [function, coroutine])
def test_D20_the_hook_is_called_in_the_context(loop, run, kind):
    seen = []
    loop.handle_callback_exception = lambda callback: seen.append(var.get())
    context = contextvars.copy_context()
    context.run(var.set, "mine")
    context.run(run, lambda: kind(error=ZeroDivisionError()))
    turn(loop, 6)
    del loop.handle_callback_exception
    assert seen == ["mine"]


def test_D20_run_sync_sees_the_callers_context(loop):
    async def main():
        await Await()
        return var.get()

    context = contextvars.copy_context()
    context.run(var.set, "mine")
    assert context.run(loop.run_sync, main) == "mine"
    assert context.run(loop.run_sync, var.get) == "mine"


def test_coroutines_that_never_end_go_with_the_loop(loop):
    """D18: what waits for nothing that anybody has is collected."""
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


def test_a_loop_closed_under_a_coroutine(loop):
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


# -- add_future ----------------------------------------------------------------


def test_add_future(loop):
    log = []
    gate = concurrent.futures.Future()
    assert loop.add_future(gate, log.append) is None
    loop.add_future(future(), log.append)
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


def test_D20_add_future_captures_the_context(loop):
    log = []
    gate = concurrent.futures.Future()
    context = contextvars.copy_context()
    context.run(var.set, "a")
    context.run(loop.add_future, gate, lambda _: log.append(var.get()))
    in_thread(gate.set_result, 1)
    turn(loop)
    assert log == ["a"]


@pytest.mark.parametrize("callback", [None, 1])
def test_add_future_wants_a_callable(loop, callback):
    with pytest.raises(TypeError):
        loop.add_future(future(), callback)


def test_add_future_wants_a_future(loop):
    with pytest.raises(AttributeError):
        loop.add_future(object(), print)


def test_add_future_exception_goes_to_the_hook(loop, expect_log):
    loop.add_future(future(), fail)
    turn(loop)
    expect_log.take("Exception in callback", TypeError)


def test_futures_and_coroutines_of_handlers_do_not_pile_up(loop):
    with readable() as (a, _):
        loop.add_handler(a, lambda *_: future(), READ)
        turn(loop, 50)
        loop.remove_handler(a)
        assert loop.stats()["pending_callbacks"] <= 1
