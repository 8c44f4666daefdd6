"""PeriodicCallback, on a clock that moves only in the poll."""

import asyncio
import concurrent.futures
import datetime
import decimal
import fractions
import gc
import math
import random
import weakref

import pytest
from helpers import FakeClock, ScriptedPoller, turn
from support import Await, Exit, fail, in_thread, sleeping

import ioloop
from ioloop import PeriodicCallback


@pytest.fixture
def clock():
    return FakeClock(0.0)


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


def run_for(loop, seconds):
    handle = loop.call_later(seconds, loop.stop)
    try:
        loop.start()
    finally:
        handle.cancel()


@pytest.mark.parametrize(
    "period", [100, 100.0, datetime.timedelta(milliseconds=100)], ids=repr
)
def test_first_call_is_one_period_after_start(fake, times, period):
    periodic = PeriodicCallback(times, period, fake)
    assert (periodic.callback, periodic.callback_time) == (times, 100)
    assert (periodic.io_loop, periodic.jitter) == (fake, 0)
    run_for(fake, 1)
    assert times == []
    periodic.start()
    run_for(fake, 0.35)
    assert times == [1.1, 1.2, 1.3]
    periodic.stop()


def test_is_running(fake):
    periodic = PeriodicCallback(int, 100, fake)
    assert periodic.is_running() is False
    periodic.start()
    assert periodic.is_running() is True
    periodic.stop()
    periodic.stop()
    assert periodic.is_running() is False
    assert fake.stats()["pending_timeouts"] == 0


@pytest.mark.parametrize(
    "period", [0, -1, -0.0, math.nan, datetime.timedelta(0), -math.inf], ids=repr
)
def test_C19_a_period_must_be_positive(fake, period):
    with pytest.raises(ValueError):
        PeriodicCallback(int, period, fake)


@pytest.mark.parametrize("period", [None, "1", b"1", 1j, [], object()], ids=repr)
def test_C19_a_period_is_a_number(fake, period):
    with pytest.raises(TypeError):
        PeriodicCallback(int, period, fake)
    periodic = PeriodicCallback(int, 100, fake)
    with pytest.raises(TypeError):
        periodic.callback_time = period
    assert periodic.callback_time == 100


class Float:
    """Nothing but a number of milliseconds can be had of it."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return float(self.value)

    def __gt__(self, other):
        raise AssertionError("compared")

    __lt__ = __ge__ = __le__ = __eq__ = __bool__ = __truediv__ = __gt__


class Index:
    def __init__(self, value):
        self.value = value

    def __index__(self):
        return int(self.value)


@pytest.mark.parametrize("kind", [decimal.Decimal, fractions.Fraction, Float, Index])
def test_periods_are_of_any_kind_of_number(fake, times, kind):
    periodic = PeriodicCallback(times, kind(100), fake)
    assert (type(periodic.callback_time), periodic.callback_time) == (float, 100)
    periodic.start()
    run_for(fake, 0.15)
    periodic.callback_time = kind(200)
    run_for(fake, 0.3)
    periodic.stop()
    assert times == [0.1, 0.2, 0.4]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "-inf"])
@pytest.mark.parametrize("kind", [decimal.Decimal, Float])
def test_periods_of_any_kind_must_be_positive(fake, kind, value):
    with pytest.raises(ValueError):
        PeriodicCallback(int, kind(value), fake)


@pytest.mark.parametrize("callback", [None, 1, "f"])
def test_the_callback_must_be_callable(fake, callback):
    with pytest.raises(TypeError):
        PeriodicCallback(callback, 100, fake)


def test_the_callback_may_be_set(fake, times):
    periodic = PeriodicCallback(fail, 100, fake)
    periodic.callback = times
    assert periodic.callback is times
    periodic.start()
    run_for(fake, 0.15)
    periodic.callback = lambda: times.append("other")
    run_for(fake, 0.1)
    periodic.stop()
    assert times == [0.1, "other"]


@pytest.mark.parametrize(
    "period", [200, 200.0, datetime.timedelta(milliseconds=200)], ids=repr
)
def test_the_period_may_be_set(fake, times, period):
    """It counts from the next tick on."""
    periodic = PeriodicCallback(times, 100, fake)
    periodic.start()
    run_for(fake, 0.25)
    periodic.callback_time = period
    assert periodic.callback_time == 200
    run_for(fake, 0.5)
    periodic.stop()
    assert times == [0.1, 0.2, 0.3, 0.5, 0.7]


@pytest.mark.parametrize("period", [0, -1, math.nan, datetime.timedelta(0)], ids=repr)
def test_C19_a_period_that_is_set_must_be_positive(fake, period):
    periodic = PeriodicCallback(int, 100, fake)
    with pytest.raises(ValueError):
        periodic.callback_time = period
    assert periodic.callback_time == 100


def test_an_infinite_period_never_comes(fake, times):
    periodic = PeriodicCallback(times, math.inf, fake)
    periodic.start()
    run_for(fake, 1e6)
    periodic.stop()
    assert times == []


def test_C19_a_second_start_is_a_no_op(fake, times):
    periodic = PeriodicCallback(times, 100, fake)
    periodic.start()
    clock_before = fake.stats()["pending_timeouts"]
    periodic.start()
    assert fake.stats()["pending_timeouts"] == clock_before == 1
    run_for(fake, 0.25)
    periodic.start()
    run_for(fake, 0.1)
    periodic.stop()
    assert times == [0.1, 0.2, 0.3]


def test_C19_no_drift(fake, clock, times):
    """Calls are late by what the callback and the loop take; the grid stays."""

    def late():
        times()
        clock.advance(0.03)

    periodic = PeriodicCallback(late, 100, fake)
    periodic.start()
    run_for(fake, 10)
    periodic.stop()
    assert times == pytest.approx([0.1 * n for n in range(1, 101)][: len(times)])
    assert len(times) >= 99


def test_C19_missed_periods_are_skipped(fake, clock, times):
    durations = iter([0.25, 0, 1.0, 0, 0])

    def slow():
        times()
        clock.advance(next(durations, 0))

    periodic = PeriodicCallback(slow, 100, fake)
    periodic.start()
    run_for(fake, 2)
    periodic.stop()
    assert times[:5] == [0.1, 0.4, 0.5, 1.6, 1.7]


@pytest.mark.parametrize("jump", [86400 * 366, 1e9, 9e9])
def test_C16_a_clock_that_jumps_forward(fake, clock, times, jump):
    """One call, then the grid again: in constant time."""
    periodic = PeriodicCallback(times, 1, fake)
    periodic.start()
    run_for(fake, 0.0025)
    assert len(times) == 2
    clock.advance(jump)
    turn(fake)
    assert len(times) == 3
    turn(fake)
    assert len(times) == 3
    assert 0 < fake.next_timeout() <= 0.0011
    periodic.stop()


def test_C16_a_clock_that_jumps_back(fake, clock, times):
    """It never fires twice for one tick, and goes on when time does."""
    periodic = PeriodicCallback(times, 100, fake)
    periodic.start()
    run_for(fake, 0.15)
    clock.advance(-0.12)
    run_for(fake, 0.16)
    assert times == [0.1]
    run_for(fake, 0.1)
    assert times == [0.1, 0.2]
    periodic.stop()


def test_C19_stop_in_the_callback(fake, times):
    def once():
        times()
        periodic.stop()

    periodic = PeriodicCallback(once, 100, fake)
    periodic.start()
    run_for(fake, 1)
    assert times == [0.1]
    assert not periodic.is_running()
    assert fake.stats()["pending_timeouts"] == 0


def test_C19_stop_and_start_in_the_callback(fake, times):
    """One schedule, a full period from then."""

    def again():
        times()
        periodic.stop()
        periodic.start()

    periodic = PeriodicCallback(again, 100, fake)
    periodic.start()
    run_for(fake, 0.55)
    assert times == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert fake.stats()["pending_timeouts"] == 1
    periodic.stop()


def test_C19_restart_between_two_ticks(fake, times):
    periodic = PeriodicCallback(times, 100, fake)
    periodic.start()
    run_for(fake, 0.15)
    periodic.stop()
    periodic.start()
    run_for(fake, 0.25)
    periodic.stop()
    assert times == [0.1, 0.25, 0.35]


def test_C19_an_exception_does_not_stop_it(fake, times, expect_log):
    def broken():
        times()
        raise ZeroDivisionError

    periodic = PeriodicCallback(broken, 100, fake)
    periodic.start()
    run_for(fake, 0.35)
    periodic.stop()
    assert times == [0.1, 0.2, 0.3]
    for _ in range(3):
        expect_log.take("Exception in callback .*broken", ZeroDivisionError)


def test_a_base_exception_leaves_start_and_it_goes_on_in_the_next(fake, times):
    def leave():
        times()
        if len(times) == 2:
            raise Exit

    periodic = PeriodicCallback(leave, 100, fake)
    periodic.start()
    with pytest.raises(Exit):
        run_for(fake, 1)
    run_for(fake, 0.25)
    periodic.stop()
    assert times[:4] == [0.1, 0.2, 0.3, 0.4]


# -- Coroutines and futures ----------------------------------------------------


def test_a_coroutine_is_awaited(fake, times):
    """The next call comes after its end, on the grid."""
    gate = concurrent.futures.Future()

    async def work():
        times()
        if len(times) == 1:
            await Await(gate)

    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    run_for(fake, 0.55)
    assert times == [0.1]
    gate.set_result(None)
    run_for(fake, 0.2)
    periodic.stop()
    assert times == [0.1, 0.6, 0.7]


def test_a_future_is_awaited(fake, times):
    futures = []

    def work():
        times()
        futures.append(concurrent.futures.Future())
        return futures[-1]

    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    run_for(fake, 0.35)
    assert times == [0.1]
    futures[0].set_result(1)
    run_for(fake, 0.1)
    assert times == [0.1, 0.4]
    periodic.stop()
    futures[1].set_result(1)
    run_for(fake, 1)
    assert times == [0.1, 0.4]


def test_stopped_and_started_while_a_future_is_pending(fake, times):
    """No second schedule when the old one ends."""
    futures = []

    def work():
        times()
        futures.append(concurrent.futures.Future())
        return futures[-1]

    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    run_for(fake, 0.15)
    periodic.stop()
    periodic.start()
    futures[0].set_result(None)
    turn(fake)
    assert fake.stats()["pending_timeouts"] == 1
    run_for(fake, 0.15)
    assert times == [0.1, 0.25]
    futures[1].set_result(None)
    periodic.stop()
    turn(fake)
    assert fake.stats()["pending_timeouts"] == 0


@pytest.mark.parametrize("how", ["coroutine", "future"])
def test_restarted_it_calls_again_though_an_old_call_never_ends(fake, times, how):
    def future():
        times()
        return concurrent.futures.Future()

    async def coroutine():
        await Await(future())

    work = {"coroutine": coroutine, "future": future}[how]
    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    run_for(fake, 0.25)
    for _ in range(2):
        periodic.stop()
        periodic.start()
        run_for(fake, 0.25)
    assert times == [0.1, 0.35, 0.6]
    periodic.stop()


def test_restarted_in_a_callback_whose_future_never_ends_it_calls_again(fake, times):
    """The call belongs to the start before."""

    def work():
        times()
        periodic.stop()
        periodic.start()
        return concurrent.futures.Future()

    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    run_for(fake, 0.35)
    periodic.stop()
    assert times == [0.1, 0.2, 0.3]
    assert fake.stats()["pending_timeouts"] == 0


@pytest.mark.parametrize("end", ["result", "exception", "cancel"])
def test_an_old_call_that_ends_after_a_restart_sets_no_tick(
    fake, times, expect_log, end
):
    """What it raised is told all the same."""
    futures = []

    def work():
        times()
        futures.append(concurrent.futures.Future())
        return futures[-1]

    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    run_for(fake, 0.15)
    periodic.stop()
    periodic.start()
    run_for(fake, 0.15)
    if end == "result":
        futures[0].set_result(None)
    elif end == "exception":
        futures[0].set_exception(ZeroDivisionError())
    else:
        futures[0].cancel()
    run_for(fake, 0.3)
    assert times == [0.1, 0.25], "the second call has not ended"
    futures[1].set_result(None)
    run_for(fake, 0.1)
    periodic.stop()
    assert times == [0.1, 0.25, 0.65]
    if end == "exception":
        expect_log.take("Exception in callback .*work", ZeroDivisionError)


@pytest.mark.parametrize("steps", [0, 1])
def test_D7_a_coroutine_that_leaves_start_is_called_again(fake, times, steps):
    async def work():
        times()
        for _ in range(steps):
            await Await()
        if len(times) == 1:
            raise Exit

    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    with pytest.raises(Exit):
        run_for(fake, 1)
    run_for(fake, 0.35)
    periodic.stop()
    assert times == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("how", ["coroutine", "future"])
def test_what_fails_later_goes_to_the_hook(fake, times, expect_log, how):
    async def coroutine():
        times()
        raise ZeroDivisionError

    def future():
        times()
        done = concurrent.futures.Future()
        done.set_exception(ZeroDivisionError())
        return done

    work = {"coroutine": coroutine, "future": future}[how]
    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    run_for(fake, 0.25)
    periodic.stop()
    assert times == [0.1, 0.2]
    for _ in range(2):
        expect_log.take("Exception in callback .*" + how, ZeroDivisionError)


def test_a_cancelled_future_is_no_error_and_the_end(fake, times):
    def work():
        times()
        future = concurrent.futures.Future()
        future.cancel()
        return future

    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    run_for(fake, 0.25)
    periodic.stop()
    assert times == [0.1, 0.2]


def test_an_asyncio_future_is_taken_too(fake, times):
    asyncio_loop = asyncio.new_event_loop()
    try:

        def work():
            times()
            return asyncio_loop.create_future()

        periodic = PeriodicCallback(work, 100, fake)
        periodic.start()
        run_for(fake, 0.25)
        periodic.stop()
        assert times == [0.1]
    finally:
        asyncio_loop.close()


# -- What is no Exception ------------------------------------------------------

BASE = [Exit, KeyboardInterrupt, SystemExit]


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
def test_interrupted_by_a_future_it_goes_on(fake, times, step, error):
    """The exception leaves start(), and there is one next tick."""

    def work():
        times()
        if len(times) == 1:
            future = Future(step, error)
            fake.call_later(0.01, future.finish)
            return future

    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    with pytest.raises(error):
        run_for(fake, 1)
    run_for(fake, 0.35)
    assert times == [0.1, 0.2, 0.3, 0.4]
    assert periodic.is_running()
    periodic.stop()
    assert fake.stats()["pending_timeouts"] == 0


@pytest.mark.parametrize("error", BASE)
def test_a_future_that_ended_by_what_is_no_exception(fake, times, error):
    def work():
        times()
        future = concurrent.futures.Future()
        future.set_exception(error())
        return future

    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    for _ in range(3):
        with pytest.raises(error):
            run_for(fake, 1)
    periodic.stop()
    assert times == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("error", BASE)
@pytest.mark.parametrize("how", ["callback", "coroutine", "future"])
def test_interrupted_by_the_hook_it_goes_on(fake, times, how, error):
    def callback():
        times()
        raise ZeroDivisionError

    async def coroutine():
        callback()

    def future():
        times()
        done = concurrent.futures.Future()
        done.set_exception(ZeroDivisionError())
        return done

    work = {"callback": callback, "coroutine": coroutine, "future": future}[how]
    fake.handle_callback_exception = lambda callback: fail(error)
    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    for _ in range(3):
        with pytest.raises(error):
            run_for(fake, 1)
    del fake.handle_callback_exception
    periodic.stop()
    assert times == [0.1, 0.2, 0.3]


@pytest.fixture
def broken():
    """Put an exception in: the clock of `breakable` raises it, once."""
    return []


@pytest.fixture
def breakable(clock, broken):
    def time_func():
        return fail(broken.pop()) if broken else clock()

    impl = ScriptedPoller(clock=clock)
    with ioloop.IOLoop(impl=impl, time_func=time_func) as loop:
        yield loop


def breaking(times, broken, error, result):
    """A callback that breaks the clock in its first call."""

    def work():
        times()
        if len(times) == 1:
            broken.append(error)
        return result

    return work


def ended():
    future = concurrent.futures.Future()
    future.set_result(None)
    return future


@pytest.mark.parametrize("result", [None, ended()], ids=["", "future"])
@pytest.mark.parametrize("error", BASE)
def test_a_clock_that_is_interrupted_after_a_call_stops_nothing(
    breakable, broken, times, error, result
):
    """The next tick is a period after the last."""
    work = breaking(times, broken, error, result)
    periodic = PeriodicCallback(work, 100, breakable)
    periodic.start()
    with pytest.raises(error):
        run_for(breakable, 1)
    run_for(breakable, 0.25)
    periodic.stop()
    assert times == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("result", [None, ended()], ids=["", "future"])
def test_a_clock_that_fails_after_a_call_stops_nothing(
    breakable, broken, times, result, expect_log
):
    work = breaking(times, broken, OSError, result)
    periodic = PeriodicCallback(work, 100, breakable)
    periodic.start()
    run_for(breakable, 0.35)
    periodic.stop()
    assert times == [0.1, 0.2, 0.3]
    expect_log.take("Exception in callback", OSError)


def test_stopped_in_its_callback_it_asks_no_clock(breakable, broken, times):
    """There is no next tick whose time would have to be told."""

    def once():
        times()
        periodic.stop()
        broken.append(OSError)

    periodic = PeriodicCallback(once, 100, breakable)
    periodic.start()
    with pytest.raises(OSError):
        run_for(breakable, 1)  # the loop does, in its next iteration
    assert times == [0.1]


@pytest.mark.parametrize("error", [*BASE, OSError])
def test_running_is_what_has_a_next_tick(fake, clock, monkeypatch, expect_log, error):
    """Also if the length of the next period can't be told."""
    broken = []
    monkeypatch.setattr(random, "random", lambda: broken and fail(error) or 0.5)
    periodic = PeriodicCallback(lambda: broken.append(1), 100, fake, jitter=0.5)
    periodic.start()
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
    periodic.stop()


# -- Jitter --------------------------------------------------------------------


@pytest.mark.parametrize("jitter", [0.1, 0.5, 1])
def test_jitter(fake, times, jitter):
    periodic = PeriodicCallback(times, 100, fake, jitter=jitter)
    assert periodic.jitter == jitter
    periodic.start()
    run_for(fake, 20)
    periodic.stop()
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert all(0 < gap <= 0.1 * (1 + jitter / 2) + 1e-5 for gap in gaps)
    assert len(set(gaps)) > len(gaps) // 2
    assert 150 < len(times) < 260


@pytest.mark.parametrize(("chance", "gap"), [(0, 0.075), (0.5, 0.1), (1, 0.125)])
def test_jitter_is_half_of_the_fraction_each_way(fake, times, monkeypatch, chance, gap):
    monkeypatch.setattr(random, "random", lambda: chance)
    periodic = PeriodicCallback(times, 100, fake, jitter=0.5)
    periodic.start()
    run_for(fake, 0.35)
    periodic.stop()
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


def test_two_at_once(fake, times):
    one = PeriodicCallback(lambda: times.append("one"), 100, fake)
    two = PeriodicCallback(lambda: times.append("two"), 250, fake)
    one.start(), two.start()
    run_for(fake, 0.55)
    one.stop(), two.stop()
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


def test_C20_stopped_it_is_let_go(fake):
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


def test_closed_loop(times):
    loop = ioloop.IOLoop()
    periodic = PeriodicCallback(times, 100, loop)
    running = PeriodicCallback(times, 100, loop)
    running.start()
    loop.close()
    running.stop()
    with pytest.raises(RuntimeError):
        periodic.start()
    assert not periodic.is_running()


def test_loop_closed_between_ticks_does_not_fire(times, clock, caplog):
    """Nor does the end of a call set a tick, and it is not refused either."""
    gate = concurrent.futures.Future()
    loop = ioloop.IOLoop(impl=ScriptedPoller(clock=clock), time_func=clock)
    periodic = PeriodicCallback(lambda: times() or gate, 100, loop)
    waiting = PeriodicCallback(times, 150, loop)
    periodic.start(), waiting.start()
    run_for(loop, 0.12)
    loop.close()
    gate.set_result(None)
    clock.advance(1)
    in_thread(periodic.stop), waiting.stop()
    assert times == [0.1]
    assert not (periodic.is_running() or waiting.is_running())
    assert caplog.messages == []


def test_B16_wrong_thread(loop, poller):
    periodic = poller.module.PeriodicCallback(int, 1e6, loop)
    started = poller.module.PeriodicCallback(int, 1e6, loop)
    started.start()
    with sleeping(loop):
        for method in (periodic.start, started.stop):
            with pytest.raises(RuntimeError):
                method()
        assert started.is_running() and not periodic.is_running()
    started.stop()


def test_B16_wrong_thread_while_it_is_called(loop, poller):
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


def test_on_every_poller(loop, poller):
    calls = []

    def tick():
        calls.append(1)
        if len(calls) == 5:
            periodic.stop()
            loop.stop()

    periodic = poller.module.PeriodicCallback(tick, 1, loop)
    periodic.start()
    loop.start()
    assert len(calls) == 5


def test_in_another_thread(loop, poller):
    def run():
        periodic = poller.module.PeriodicCallback(loop.stop, 1, loop)
        periodic.start()
        loop.start()
        periodic.stop()

    in_thread(run)
