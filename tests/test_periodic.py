"""PeriodicCallback, on a clock that moves only in the poll."""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import datetime
import decimal
import fractions
import gc
import math
import random
import types
import weakref
from unittest import mock

import pytest
from fakes import (
    Await,
    Exit,
    FakeClock,
    Float,
    Index,
    ScriptedPoller,
    context_with,
    fail,
    finished,
    turn,
)
from processes import in_thread, sleeping

import ioloop
from ioloop import PeriodicCallback

BASE = [Exit, KeyboardInterrupt, SystemExit]


class Clock(FakeClock):
    """It raises each of its `errors` once."""

    def __init__(self):
        super().__init__(0.0)
        self.errors = []

    def __call__(self):
        return fail(self.errors.pop()) if self.errors else super().__call__()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def fake(clock):
    with ioloop.IOLoop(impl=ScriptedPoller(clock=clock), time_func=clock) as loop:
        yield loop


@pytest.fixture
def times(clock):
    """A list, and a callback that notes the time in it."""

    class Times(list):
        def __call__(self):
            self.append(round(clock.now, 6))

    return Times()


@pytest.fixture
def start(fake):
    """A function that starts one; it is stopped at the end, and leaves no tick."""
    with contextlib.ExitStack() as started:

        def start(callback, period=100, **options):
            periodic = PeriodicCallback(callback, period, fake, **options)
            periodic.start()
            started.callback(periodic.stop)
            return periodic

        yield start
    assert fake.stats()["pending_timeouts"] == 0


def run_for(loop, seconds):
    handle = loop.call_later(seconds, loop.stop)
    try:
        loop.start()
    finally:
        handle.cancel()


def test_all_calls_are_in_the_context_of_start(fake, start):
    variable, seen = contextvars.ContextVar("variable", default=0), []
    context_with(variable, 1).run(start, lambda: seen.append(variable.get()))
    run_for(fake, 0.25)
    assert seen == [1, 1]


# -- Periods -------------------------------------------------------------------


def milliseconds(number):
    return datetime.timedelta(milliseconds=number)


@pytest.mark.parametrize(
    "kind",
    [int, float, milliseconds, decimal.Decimal, fractions.Fraction, Float, Index],
)
def test_the_first_call_is_one_period_after_start(fake, times, kind):
    """A period that is set counts from the next tick on."""
    periodic = PeriodicCallback(times, kind(100), fake)
    assert (periodic.callback, periodic.io_loop, periodic.jitter) == (times, fake, 0)
    assert (type(periodic.callback_time), periodic.callback_time) == (float, 100)
    run_for(fake, 1)
    assert times == []
    periodic.start()
    run_for(fake, 0.25)
    periodic.callback_time = kind(200)
    assert periodic.callback_time == 200
    run_for(fake, 0.5)
    periodic.stop()
    assert times == [1.1, 1.2, 1.3, 1.5, 1.7]


def test_is_running(fake):
    periodic = PeriodicCallback(int, 100, fake)
    assert periodic.is_running() is False
    periodic.start()
    assert periodic.is_running() is True
    periodic.stop()
    periodic.stop()
    assert periodic.is_running() is False
    assert fake.stats()["pending_timeouts"] == 0


NOT_POSITIVE = [0, -1, -0.0, math.nan, -math.inf, datetime.timedelta(0)]
NOT_POSITIVE += [
    kind(value)
    for kind in (decimal.Decimal, Float)
    for value in ("0", "-1", "nan", "-inf")
]
NO_NUMBERS = [None, "1", b"1", 1j, [], object(), mock.Mock(), datetime.timedelta]
NO_NUMBERS += [types.SimpleNamespace(total_seconds=lambda: 5)]


@pytest.mark.row("C19")
@pytest.mark.parametrize(
    ("period", "error"),
    [(period, ValueError) for period in NOT_POSITIVE]
    + [(period, TypeError) for period in NO_NUMBERS],
    ids=lambda value: type(value).__name__,
)
def test_a_period_is_a_positive_number(fake, period, error):
    with pytest.raises(error):
        PeriodicCallback(int, period, fake)
    periodic = PeriodicCallback(int, 100, fake)
    with pytest.raises(error):
        periodic.callback_time = period
    assert periodic.callback_time == 100


@pytest.mark.parametrize("callback", [None, 1, "f"])
def test_the_callback_must_be_callable(fake, callback):
    with pytest.raises(TypeError):
        PeriodicCallback(callback, 100, fake)


def test_the_callback_may_be_set(fake, times, start):
    periodic = start(fail)
    periodic.callback = times
    assert periodic.callback is times
    run_for(fake, 0.15)
    periodic.callback = lambda: times.append("other")
    run_for(fake, 0.1)
    assert times == [0.1, "other"]


def test_an_infinite_period_never_comes(fake, times, start):
    start(times, math.inf)
    run_for(fake, 1e6)
    assert times == []


# -- Ticks ---------------------------------------------------------------------


@pytest.mark.row("C19")
def test_a_second_start_is_a_no_op(fake, times, start):
    periodic = start(times)
    assert fake.stats()["pending_timeouts"] == 1
    periodic.start()
    assert fake.stats()["pending_timeouts"] == 1
    run_for(fake, 0.25)
    periodic.start()
    run_for(fake, 0.1)
    assert times == [0.1, 0.2, 0.3]


@pytest.mark.row("C19")
def test_no_drift(fake, clock, times, start):
    """Calls are late by what the callback and the loop take; the grid stays."""

    def late():
        times()
        clock.advance(0.03)

    start(late)
    run_for(fake, 10)
    assert times == pytest.approx([0.1 * n for n in range(1, 101)][: len(times)])
    assert len(times) >= 99


@pytest.mark.row("C19")
def test_missed_periods_are_skipped(fake, clock, times, start):
    durations = iter([0.25, 0, 1.0, 0, 0])

    def slow():
        times()
        clock.advance(next(durations, 0))

    start(slow)
    run_for(fake, 2)
    assert times[:5] == [0.1, 0.4, 0.5, 1.6, 1.7]


@pytest.mark.row("C16")
@pytest.mark.parametrize("jump", [86400 * 366, 1e9, 9e9])
def test_a_clock_that_jumps_forward(fake, clock, times, start, jump):
    """One call, then the grid again: in constant time."""
    start(times, 1)
    run_for(fake, 0.0025)
    assert len(times) == 2
    clock.advance(jump)
    turn(fake)
    assert len(times) == 3
    turn(fake)
    assert len(times) == 3
    assert 0 < fake.next_timeout() <= 0.0011


@pytest.mark.row("C16")
def test_a_clock_that_jumps_back(fake, clock, times, start):
    """It never fires twice for one tick, and goes on when time does."""
    start(times)
    run_for(fake, 0.15)
    clock.advance(-0.12)
    run_for(fake, 0.16)
    assert times == [0.1]
    run_for(fake, 0.1)
    assert times == [0.1, 0.2]


@pytest.mark.row("C19")
def test_stop_in_the_callback(fake, times, start):
    def once():
        times()
        periodic.stop()

    periodic = start(once)
    run_for(fake, 1)
    assert times == [0.1]
    assert not periodic.is_running()
    assert fake.stats()["pending_timeouts"] == 0


@pytest.mark.row("C19")
@pytest.mark.parametrize("make", [type(None), concurrent.futures.Future])
def test_stop_and_start_in_the_callback(fake, times, start, make):
    """One schedule, a full period from then; the call belongs to the start before."""

    def again():
        times()
        periodic.stop()
        periodic.start()
        return make()

    periodic = start(again)
    run_for(fake, 0.55)
    assert times == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert fake.stats()["pending_timeouts"] == 1


@pytest.mark.row("C19")
def test_restart_between_two_ticks(fake, times, start):
    periodic = start(times)
    run_for(fake, 0.15)
    periodic.stop()
    periodic.start()
    run_for(fake, 0.25)
    assert times == [0.1, 0.25, 0.35]


@pytest.fixture(params=["callback", "coroutine", "future"])
def failing(request, times):
    """A callback that fails at once, as a coroutine, or by the future it returns."""

    def callback():
        times()
        raise ZeroDivisionError

    async def coroutine():
        callback()

    def future():
        times()
        return finished(error=ZeroDivisionError())

    return {"callback": callback, "coroutine": coroutine, "future": future}[
        request.param
    ]


@pytest.mark.row("C19")
def test_an_exception_does_not_stop_it(fake, times, start, failing, expect_log):
    start(failing)
    run_for(fake, 0.35)
    assert times == [0.1, 0.2, 0.3]
    for _ in range(3):
        pattern = f"Exception in callback .*{failing.__name__}"
        expect_log.take(pattern, ZeroDivisionError)


# -- Coroutines and futures ----------------------------------------------------


@pytest.fixture
def pending(times):
    """A list of futures, and a callback that notes the time and returns a new one."""

    class Pending(list):
        def __call__(self):
            times()
            self.append(concurrent.futures.Future())
            return self[-1]

    return Pending()


def test_a_coroutine_is_awaited(fake, times, start):
    """The next call comes after its end, on the grid."""
    gate = concurrent.futures.Future()

    async def work():
        times()
        if len(times) == 1:
            await Await(gate)

    start(work)
    run_for(fake, 0.55)
    assert times == [0.1]
    gate.set_result(None)
    run_for(fake, 0.2)
    assert times == [0.1, 0.6, 0.7]


def test_a_future_is_awaited(fake, times, start, pending):
    periodic = start(pending)
    run_for(fake, 0.35)
    assert times == [0.1]
    pending[0].set_result(1)
    run_for(fake, 0.1)
    assert times == [0.1, 0.4]
    periodic.stop()
    pending[1].set_result(1)
    run_for(fake, 1)
    assert times == [0.1, 0.4]


def test_stopped_and_started_while_a_future_is_pending(fake, times, start, pending):
    """No second schedule when the old one ends."""
    periodic = start(pending)
    run_for(fake, 0.15)
    periodic.stop()
    periodic.start()
    pending[0].set_result(None)
    turn(fake)
    assert fake.stats()["pending_timeouts"] == 1
    run_for(fake, 0.15)
    assert times == [0.1, 0.25]
    pending[1].set_result(None)
    periodic.stop()
    turn(fake)
    assert fake.stats()["pending_timeouts"] == 0


@pytest.mark.parametrize("how", ["coroutine", "future"])
def test_restarted_it_calls_again_though_an_old_call_never_ends(
    fake, times, start, pending, how
):
    async def coroutine():
        await Await(pending())

    periodic = start(coroutine if how == "coroutine" else pending)
    run_for(fake, 0.25)
    for _ in range(2):
        periodic.stop()
        periodic.start()
        run_for(fake, 0.25)
    assert times == [0.1, 0.35, 0.6]


def test_restarted_by_a_callback_it_waits_for_nothing_from_before(fake, times, start):
    def restart():
        times()
        if len(times) == 1:
            periodic.stop()
            periodic.start()
            return concurrent.futures.Future()

    periodic = start(restart)
    run_for(fake, 0.45)
    assert times == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("end", ["result", "exception", "cancel"])
def test_an_old_call_that_ends_after_a_restart_sets_no_tick(
    fake, times, start, pending, expect_log, end
):
    """What it raised is told all the same."""
    periodic = start(pending)
    run_for(fake, 0.15)
    periodic.stop()
    periodic.start()
    run_for(fake, 0.15)
    if end == "result":
        pending[0].set_result(None)
    elif end == "exception":
        pending[0].set_exception(ZeroDivisionError())
    else:
        pending[0].cancel()
    run_for(fake, 0.3)
    assert times == [0.1, 0.25], "the second call has not ended"
    pending[1].set_result(None)
    run_for(fake, 0.1)
    assert times == [0.1, 0.25, 0.65]
    if end == "exception":
        expect_log.take(r"Exception in callback \[<Future", ZeroDivisionError)


def test_a_cancelled_future_is_no_error_and_the_end(fake, times, start, pending):
    start(lambda: pending().cancel() and pending[-1])
    run_for(fake, 0.25)
    assert times == [0.1, 0.2]


def test_an_asyncio_future_is_taken_too(fake, times, start):
    asyncio_loop = asyncio.new_event_loop()
    try:
        start(lambda: times() or asyncio_loop.create_future())
        run_for(fake, 0.25)
        assert times == [0.1]
    finally:
        asyncio_loop.close()


# -- What is no Exception ------------------------------------------------------


@pytest.mark.row("D7")
@pytest.mark.parametrize("steps", [None, 0, 1], ids=["callback", "0", "1"])
def test_after_a_call_that_leaves_start_it_is_called_again(fake, times, start, steps):
    def callback():
        times()
        if len(times) == 2:
            raise Exit

    async def coroutine():
        times()
        for _ in range(steps):
            await Await()
        if len(times) == 2:
            raise Exit

    start(callback if steps is None else coroutine)
    with pytest.raises(Exit):
        run_for(fake, 1)
    run_for(fake, 0.25)
    assert times[:4] == [0.1, 0.2, 0.3, 0.4]


class Future:
    """One that raises `error` at the `broken` step, once."""

    def __init__(self, broken=None, error=None):
        self.broken, self.error = broken, error
        self.callbacks = []

    def step(self, name):
        if name == self.broken:
            self.broken = None
            raise self.error

    def add_done_callback(self, callback):
        self.step("before it is attached")
        self.callbacks.append(callback)
        self.step("after it was attached")

    def finish(self):
        for callback in self.callbacks:
            callback(self)

    def cancelled(self):
        self.step("cancelled")
        return False

    def result(self):
        self.step("result")


STEPS = ["before it is attached", "after it was attached", "cancelled", "result"]


@pytest.mark.parametrize("error", BASE)
@pytest.mark.parametrize("step", STEPS)
def test_interrupted_by_a_future_it_goes_on(fake, times, start, step, error):
    """The exception leaves start(), and there is one next tick."""

    def work():
        times()
        if len(times) == 1:
            future = Future(step, error)
            fake.call_later(0.01, future.finish)
            return future

    periodic = start(work)
    with pytest.raises(error):
        run_for(fake, 1)
    run_for(fake, 0.35)
    assert times == [0.1, 0.2, 0.3, 0.4]
    assert periodic.is_running()


@pytest.mark.parametrize("error", BASE)
def test_a_future_that_ended_by_what_is_no_exception(fake, times, start, error):
    start(lambda: times() or finished(error=error()))
    for _ in range(3):
        with pytest.raises(error):
            run_for(fake, 1)
    assert times == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("error", BASE)
def test_interrupted_by_the_hook_it_goes_on(fake, times, start, failing, error):
    fake.handle_callback_exception = lambda callback: fail(error)
    start(failing)
    for _ in range(3):
        with pytest.raises(error):
            run_for(fake, 1)
    del fake.handle_callback_exception
    assert times == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("result", [None, finished()], ids=["", "future"])
@pytest.mark.parametrize("error", [*BASE, OSError])
def test_a_clock_that_fails_after_a_call_stops_nothing(
    fake, clock, times, start, expect_log, error, result
):
    """The next tick is a period after the last."""

    def work():
        times()
        if len(times) == 1:
            clock.errors.append(error)
        return result

    start(work)
    if error is OSError:
        run_for(fake, 0.15)
        expect_log.take("Exception in callback", OSError)
    else:
        with pytest.raises(error):
            run_for(fake, 1)
    run_for(fake, 0.35 - clock.now)
    assert times == [0.1, 0.2, 0.3]


def test_stopped_in_its_callback_it_asks_no_clock(fake, clock, times, start):
    """There is no next tick whose time would have to be told."""

    def once():
        times()
        periodic.stop()
        clock.errors.append(OSError)

    periodic = start(once)
    with pytest.raises(OSError):
        run_for(fake, 1)  # the loop does, in its next iteration
    assert times == [0.1]


@pytest.mark.parametrize("error", [*BASE, OSError])
def test_running_is_what_has_a_next_tick(
    fake, clock, start, monkeypatch, expect_log, error
):
    """Also if the length of the next period can't be told."""
    broken = []
    monkeypatch.setattr(random, "random", lambda: broken and fail(error) or 0.5)
    periodic = start(lambda: broken.append(1), jitter=0.5)
    clock.advance(0.1)
    try:
        turn(fake)
    except error:
        pass
    assert broken
    assert periodic.is_running() == (fake.stats()["pending_timeouts"] == 1)
    broken.clear()
    expect_log.clear()
    periodic.stop()
    periodic.start()
    assert fake.stats()["pending_timeouts"] == 1


# -- Jitter --------------------------------------------------------------------


@pytest.mark.parametrize("jitter", [0.1, 0.5, 1])
def test_jitter(fake, times, start, jitter):
    assert start(times, jitter=jitter).jitter == jitter
    run_for(fake, 20)
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert all(0 < gap <= 0.1 * (1 + jitter / 2) + 1e-5 for gap in gaps)
    assert len(set(gaps)) > len(gaps) // 2
    assert 150 < len(times) < 260


@pytest.mark.parametrize(("chance", "gap"), [(0, 0.075), (0.5, 0.1), (1, 0.125)])
def test_jitter_is_half_of_the_fraction_each_way(
    fake, times, start, monkeypatch, chance, gap
):
    monkeypatch.setattr(random, "random", lambda: chance)
    start(times, jitter=0.5)
    run_for(fake, 0.35)
    assert times[:2] == pytest.approx([gap, 2 * gap])


@pytest.mark.parametrize("jitter", [-0.1, -1, math.nan])
def test_jitter_is_a_fraction(fake, jitter):
    with pytest.raises(ValueError):
        PeriodicCallback(int, 100, fake, jitter=jitter)


# -- Loops ---------------------------------------------------------------------


def test_the_default_is_the_current_loop(fake):
    fake.make_current()
    try:
        assert PeriodicCallback(int, 100).io_loop is fake
    finally:
        fake.clear_current()


def test_the_default_is_the_first_loop_of_the_thread(fake):
    with ioloop.IOLoop():
        assert PeriodicCallback(int, 100).io_loop is fake
    assert not ioloop.IOLoop.initialized()


def test_without_a_current_loop_it_is_the_instance():
    try:
        assert PeriodicCallback(int, 100).io_loop is ioloop.IOLoop.instance()
    finally:
        ioloop.IOLoop.instance().close()


def test_two_at_once(fake, times, start):
    start(lambda: times.append("one"))
    start(lambda: times.append("two"), 250)
    run_for(fake, 0.55)
    assert times == ["one", "one", "two", "one", "one", "two", "one"]


def test_subclass(fake, times):
    class Mine(PeriodicCallback):
        def __init__(self, *args):
            super().__init__(*args)
            self.more = True

    periodic = Mine(times, 100, fake)
    periodic.start()
    run_for(fake, 0.15)
    periodic.stop()
    assert periodic.more and times == [0.1]


@pytest.mark.row("C20")
def test_stopped_it_is_let_go(fake):
    class Owner:
        def __init__(self):
            self.periodic = PeriodicCallback(self.tick, 100, fake)
            self.periodic.start()

        def tick(self):
            pass

    owner = Owner()
    reference, periodic = weakref.ref(owner), weakref.ref(owner.periodic)
    run_for(fake, 0.15)
    owner.periodic.stop()
    del owner
    gc.collect()
    assert reference() is periodic() is None


def test_closed_loop(fake, times, pending, caplog):
    """None can be started, any can be stopped, and the end of a call is ignored."""
    never, waiting, calling = (
        PeriodicCallback(callback, 100, fake) for callback in (times, times, pending)
    )
    waiting.start(), calling.start()
    run_for(fake, 0.12)
    fake.close()
    pending[0].set_result(None)
    assert caplog.messages == [], "concurrent.futures logs what is refused"
    assert in_thread(calling.stop) is waiting.stop() is None
    for periodic in (never, waiting, calling):
        with pytest.raises(RuntimeError, match="closed"):
            periodic.start()
        assert not periodic.is_running()
    ended = weakref.ref(pending.pop())
    gc.collect()
    assert ended() is None, "the loop has queued it"


@pytest.mark.row("B16")
def test_wrong_thread(loop, poller):
    periodic = poller.module.PeriodicCallback(int, 1e6, loop)
    started = poller.module.PeriodicCallback(int, 1e6, loop)
    started.start()
    with sleeping(loop):
        for method in (periodic.start, started.stop):
            with pytest.raises(RuntimeError):
                method()
        assert started.is_running() and not periodic.is_running()
    started.stop()


@pytest.mark.row("B16")
def test_wrong_thread_while_it_is_called(loop, poller):
    """There is no next tick then, but it is not stopped either."""
    refused = []

    def tick():
        with pytest.raises(RuntimeError):
            in_thread(periodic.stop)
        refused.append(periodic.is_running())
        periodic.stop()
        loop.stop()

    periodic = poller.module.PeriodicCallback(tick, 1, loop)
    periodic.start()
    loop.start()
    assert refused == [True]


@pytest.mark.parametrize("call", [lambda run: run(), in_thread], ids=["", "thread"])
def test_on_every_poller(loop, poller, call):
    calls = []

    def tick():
        calls.append(1)
        if len(calls) == 5:
            periodic.stop()
            loop.stop()

    def run():
        periodic.start()
        loop.start()

    periodic = poller.module.PeriodicCallback(tick, 1, loop)
    call(run)
    assert len(calls) == 5
