"""PeriodicCallback, on a clock that moves only in the poll."""

import asyncio
import concurrent.futures
import datetime
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
    loop.start()
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


@pytest.mark.parametrize("period", [None, "1", object()])
def test_C19_a_period_is_a_number(fake, period):
    with pytest.raises(TypeError):
        PeriodicCallback(int, period, fake)


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
@pytest.mark.parametrize("restarts", [1, 3])
def test_restarted_while_a_call_is_pending_it_does_not_overlap(
    fake, times, how, restarts
):
    """One tick, after the end of the call: however often it was started."""
    futures = []

    def future():
        times()
        futures.append(concurrent.futures.Future())
        return futures[-1]

    async def coroutine():
        await Await(future())

    work = {"coroutine": coroutine, "future": future}[how]
    periodic = PeriodicCallback(work, 100, fake)
    periodic.start()
    run_for(fake, 0.15)
    for _ in range(restarts):
        periodic.stop()
        periodic.start()
        run_for(fake, 0.25)
    assert times == [0.1]
    for count in (1, 2):
        futures[-1].set_result(None)
        turn(fake, 3)
        assert fake.stats()["pending_timeouts"] == 1
        run_for(fake, 0.25)
        assert len(times) == count + 1
    periodic.stop()
    futures[-1].set_result(None)
    turn(fake, 3)
    assert fake.stats()["pending_timeouts"] == 0


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


def test_loop_closed_between_ticks_does_not_fire():
    loop = ioloop.IOLoop(impl=ScriptedPoller(), time_func=FakeClock())
    PeriodicCallback(fail, 100, loop).start()
    loop.close()


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
