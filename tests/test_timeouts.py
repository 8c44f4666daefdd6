"""Timeouts: deadlines and clocks, order, cancelling, and never early."""

import datetime
import decimal
import fractions
import gc
import math
import os
import random
import signal
import sys
import time
import types
from unittest import mock

import pytest
from building import compile_library
from fakes import (
    READ,
    Exit,
    FakeClock,
    Float,
    Index,
    Recorder,
    ScriptedPoller,
    fail,
    turn,
)
from kernel import readable
from processes import child, fork, run_python

import ioloop

WAYS = ["add_timeout", "call_at", "call_later"]


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def fake(clock):
    """A loop whose time passes in the poll only; `fake.impl` is its poller."""
    poller = ScriptedPoller(clock=clock)
    with ioloop.IOLoop(impl=poller, time_func=clock) as loop:
        yield loop


@pytest.fixture(params=WAYS)
def after(fake, clock, request):
    """A function (delay, callback, ...) for each method that adds a timeout."""
    method = getattr(fake, request.param)

    def add(delay, /, callback, *args, **kwargs):
        base = 0 if request.param == "call_later" else clock.now
        return method(base + delay, callback, *args, **kwargs)

    return add


def run_for(loop, seconds):
    loop.call_later(seconds, loop.stop)
    loop.start()


# -- Deadlines -----------------------------------------------------------------


def test_at_its_time(fake, clock, after):
    times = []
    for delay in (3, 0.5, 1, 2.25):
        after(delay, lambda: times.append(clock.now - 1000))
    run_for(fake, 5)
    assert times == pytest.approx([0.5, 1, 2.25, 3])


@pytest.mark.parametrize(
    ("name", "when"), [("add_timeout", "deadline"), ("call_later", "delay")]
)
def test_arguments_by_keyword(fake, name, when):
    log = []

    def note(*args, **kwargs):
        log.append((args, kwargs))

    add = getattr(fake, name)
    assert add(**{when: 0, "callback": note}, a=1).callback is note
    add(0, note, 3, **{when: 4, "callback": 5}, args=6, kwargs=7)
    add(0, **{when: 8, "callback": note})
    turn(fake)
    own = {when: 4, "callback": 5, "args": 6, "kwargs": 7}
    assert log == [((), {"a": 1}), ((3,), own), ((), {when: 8})]
    for missing, args, kwargs in [
        (when, (), {}),
        (when, (), {"callback": note}),
        ("callback", (0,), {}),
        ("callback", (), {when: 0}),
    ]:
        with pytest.raises(TypeError, match=missing):
            add(*args, **kwargs)
    assert fake.stats()["pending_timeouts"] == 0


@pytest.mark.row("C8")
@pytest.mark.parametrize(
    "kind",
    [int, float, decimal.Decimal, fractions.Fraction, Float, Index],
    ids=lambda kind: kind.__name__,
)
def test_kinds_of_numbers(fake, clock, after, kind):
    times = []
    for way, base in ((fake.call_later, 0), (fake.add_timeout, 1000)):
        way(kind(base + 2), lambda: times.append(clock.now))
    run_for(fake, 3)
    assert times == [1002, 1002]


def test_timedelta(fake, clock):
    times = []
    for delta in (
        datetime.timedelta(seconds=1.5),
        datetime.timedelta(days=1),
        datetime.timedelta(milliseconds=1),
        -datetime.timedelta(days=1),
        datetime.timedelta.max,
        datetime.timedelta.min,
    ):
        fake.add_timeout(delta, lambda: times.append(clock.now - 1000))
    run_for(fake, 1e9)
    assert times == pytest.approx([0, 0, 0.001, 1.5, 86400])


NO_TIMES = [None, "1", b"1", [], {}, 1j, object(), datetime.datetime(2030, 1, 1)]
# What only looks like a timedelta.
NO_TIMES += [mock.Mock(), types.SimpleNamespace(total_seconds=int), datetime.timedelta]
NANS = [math.nan, -math.nan, decimal.Decimal("nan"), Float(math.nan)]
NO_FLOATS = [10**400, -(10**400)]


@pytest.mark.row("C5", "C6", "C8")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("values", "error"),
    [(NO_TIMES, TypeError), (NANS, ValueError), (NO_FLOATS, OverflowError)],
    ids=["no time", "NaN", "too large"],
)
def test_what_can_be_no_time_is_refused(fake, way, values, error):
    """A NaN would spoil the order of all others."""
    for value in values:
        with pytest.raises(error):
            getattr(fake, way)(value, print)
    assert fake.stats()["pending_timeouts"] == 0


def test_a_time_is_told_by_its_class(fake):
    """A MagicMock is a number, 1.0: it is not asked for its total_seconds()."""
    assert fake.add_timeout(mock.MagicMock(), int).deadline == 1
    assert fake.call_at(mock.MagicMock(), int).deadline == 1
    assert fake.call_later(mock.MagicMock(), int).deadline == 1001
    spec = mock.Mock(spec=datetime.timedelta)
    spec.total_seconds.return_value = 5
    assert fake.add_timeout(spec, int).deadline == 1005


# 2**63 nanoseconds are 9.22e9 seconds.
NEVER = [
    *(math.inf, 1e300, 1e18, 2.0**63, 2**63, 10**300, sys.float_info.max),
    *(9.21e9, 9.23e9, 9.29e9),
]
PAST = [-math.inf, -1e300, -1e18, -(2**63), -9.29e9, -9.23e9, -1, -0.0, 0, -1e-9]


@pytest.mark.row("C6")
@pytest.mark.parametrize("value", NEVER, ids=repr)
def test_infinity_never_fires(fake, clock, after, value):
    """But it is pending, and can be cancelled."""
    handle = after(value, fail)
    assert fake.next_timeout() is None or fake.next_timeout() > 1e9
    run_for(fake, 1e9)
    assert handle.callback is fail
    assert fake.stats()["pending_timeouts"] == 1
    handle.cancel()
    assert fake.stats()["pending_timeouts"] == 0


@pytest.mark.row("C4", "F12")
@pytest.mark.parametrize("value", NEVER, ids=repr)
def test_far_deadlines_on_the_real_pollers(loop, value):
    """No overflow in what the kernel is told; the nearer ones still count."""
    log = []
    loop.call_later(value, log.append, "far")
    loop.add_timeout(value, log.append, "far")
    loop.call_later(0.001, loop.stop)
    loop.start()
    loop.run_once(0.001)
    assert log == []


@pytest.mark.row("C4", "F12")
@pytest.mark.parametrize("days", [24, 25, 49, 50, 3650, 36500, 106_000])
def test_days_of_sleep(loop, days):
    """More than an int of milliseconds, or of seconds, is no error and not for ever."""
    loop.call_later(days * 86400, fail)
    with readable() as (a, _):
        loop.add_handler(a, lambda *_: loop.stop(), READ)
        loop.start()
        assert loop._impl.poll(days * 86400) == [(a.fileno(), READ)]
        loop.remove_handler(a)
    assert loop.next_timeout() == pytest.approx(days * 86400, abs=60)


MILLISECONDS = r"""
#include <errno.h>
#include <signal.h>
#include <sys/epoll.h>
#include <time.h>

int last_timeout;

long syscall(long number, ...) {
    errno = ENOSYS;
    return -1;
}
int epoll_wait(int ep, struct epoll_event *e, int n, int ms) {
    last_timeout = ms;
    return 0;
}
"""


@pytest.mark.row("C4")
def test_far_deadlines_in_milliseconds(tmp_path):
    """Where there is no epoll_pwait2: what epoll is told fits into an int.

    Neither the loop nor the poller sleeps for more than a day.
    """
    source = tmp_path / "milliseconds.c"
    source.write_text(MILLISECONDS)
    run_python(
        """
        import ctypes
        last = ctypes.c_int.in_dll(ctypes.CDLL(None), "last_timeout")
        for days in (0.5, 1, 24, 25, 49.71, 50, 3650, 106_000):
            wanted = min(days, 1) * 86_400_000
            poller = ioloop._EPoll()
            poller.poll(days * 86400)
            assert last.value == wanted, (days, last.value)
            with ioloop.IOLoop(poller) as loop:
                loop.call_later(days * 86400, print)
                loop.run_once()
                assert 0.99 * wanted < last.value <= wanted, (days, last.value)
        """,
        LD_PRELOAD=str(compile_library(source)),
    )


@pytest.mark.row("C6")
@pytest.mark.parametrize("value", PAST, ids=repr)
def test_the_past_is_due_in_the_next_pass(fake, after, value):
    log = []
    after(value, log.append, 1)
    turn(fake)
    assert log == [1]


@pytest.mark.row("C7")
def test_precision_at_a_large_uptime(fake, clock):
    """now + delay == now in floats: due at once rather than never."""
    clock.now = 1e15
    log = []
    fake.add_timeout(clock.now + 0.01, log.append, 1)
    fake.call_later(0.25, log.append, 2)
    turn(fake)
    clock.now += 1
    turn(fake)
    assert sorted(log) == [1, 2]


# -- Handles -------------------------------------------------------------------


def test_handle(fake, clock, after):
    handle = after(2.5, fail)
    assert isinstance(handle, ioloop._Timeout)
    assert handle.deadline == pytest.approx(1002.5, abs=1e-6)
    assert handle.callback is fail
    assert after(1, fail, error=3).callback is fail
    handle.cancel()
    assert handle.callback is None
    assert handle.deadline == pytest.approx(1002.5, abs=1e-6)


def test_deadline_on_the_wall_clock(loop):
    when = loop.time() + 100
    assert loop.add_timeout(when, print).deadline == pytest.approx(when, abs=1e-3)
    assert loop.call_later(100, print).deadline == pytest.approx(when, abs=10)
    assert loop.call_later(math.inf, print).deadline == math.inf


@pytest.mark.parametrize("end", ["run", "cancel", "remove", "close"])
@pytest.mark.parametrize("time_func", [None, FakeClock()], ids=["wall", "custom"])
def test_deadline_of_a_dead_timeout(make_loop, time_func, end):
    loop = make_loop(time_func=time_func)
    when = loop.time() - 5
    handle = loop.add_timeout(when, int)
    if end == "run":
        turn(loop)
    elif end == "cancel":
        handle.cancel()
    elif end == "remove":
        loop.remove_timeout(handle)
    else:
        loop.close()
    assert handle.callback is None
    assert handle.deadline == pytest.approx(when, abs=1e-3)


def test_handles_are_not_made_by_hand():
    with pytest.raises(TypeError):
        ioloop._Timeout()


@pytest.mark.row("C11")
def test_cancel_and_remove_are_no_ops_when_dead(fake, after):
    log = []
    fired, cancelled = after(0, log.append, 1), after(0, log.append, 2)
    cancelled.cancel()
    turn(fake)
    for _ in range(2):
        for handle in (fired, cancelled):
            handle.cancel()
            fake.remove_timeout(handle)
    assert log == [1]
    assert fired.callback is cancelled.callback is None


@pytest.mark.row("C11")
@pytest.mark.parametrize("garbage", [None, 1, 0.0, "handle", object(), print])
def test_what_is_no_handle_is_a_type_error(fake, garbage):
    with pytest.raises(TypeError):
        fake.remove_timeout(garbage)


@pytest.mark.row("C11")
def test_handle_of_another_loop_is_a_value_error(fake):
    with ioloop.IOLoop() as other:
        handle = other.call_later(0, print)
        with pytest.raises(ValueError):
            fake.remove_timeout(handle)
        assert handle.callback is print
        other.remove_timeout(handle)
        assert handle.callback is None


def test_handle_outlives_its_loop():
    with ioloop.IOLoop() as loop:
        handle = loop.call_later(1, fail)
    handle.cancel()
    loop.remove_timeout(handle)
    assert handle.callback is None
    assert repr(handle)
    assert isinstance(handle.deadline, float)
    loop.close()
    del loop
    gc.collect()
    handle.cancel()


# -- Order ---------------------------------------------------------------------


@pytest.mark.row("C9")
def test_ties_run_in_the_order_of_adding(fake, clock, after):
    """A heap alone does not keep equal deadlines in order."""
    log = []
    for i in range(500):
        deadline = random.Random(i).choice([1, 1.5, 2, 3, 3.25, 4, 5])
        after(deadline, log.append, (deadline, i))
    run_for(fake, 6)
    assert len(log) == 500
    assert log == sorted(log)


@pytest.mark.row("C10")
@pytest.mark.parametrize("seed", range(5))
def test_order_after_cancelling_at_random(fake, seed):
    rng = random.Random(seed)
    log, live, n = [], [], 0
    for _ in range(2000):
        if live and rng.random() < 0.4:
            live.pop(rng.randrange(len(live)))[1].cancel()
        else:
            deadline = 1000 + rng.randrange(50)
            handle = fake.add_timeout(deadline, log.append, (deadline, n))
            live.append(((deadline, n), handle))
            n += 1
        if n % 100 == 0:
            ioloop._verify(fake)
    run_for(fake, 100)
    assert log == sorted(key for key, _ in live)


def test_due_at_one_sample_of_the_clock(fake, clock):
    """A timeout that becomes due while others run waits for the next pass."""
    log = []

    def slow():
        clock.advance(10)
        log.append("slow")

    fake.call_later(1, slow)
    fake.call_later(5, log.append, "later")
    clock.advance(2)
    turn(fake)
    assert log == ["slow"]
    turn(fake)
    assert log == ["slow", "later"]


def test_clock_is_sampled_once_in_a_pass(clock):
    calls = []

    def time_func():
        calls.append(clock.now)
        return clock.now

    with ioloop.IOLoop(impl=ScriptedPoller(), time_func=time_func) as loop:
        for _ in range(20):
            loop.add_timeout(0, int)
        calls.clear()
        loop.run_once(0)
        assert len(calls) == 1


@pytest.mark.row("C14")
@pytest.mark.parametrize("delay", [0, -1, -1e9, -math.inf, -1e-9])
def test_added_by_a_timeout_waits_for_the_next_iteration(fake, after, delay):
    """However small its deadline is, and though it would be first."""
    log = []

    def first():
        log.append("first")
        after(delay, log.append, "third")

    after(0, first)
    after(0, log.append, "second")
    turn(fake)
    assert log == ["first", "second"]
    assert fake.stats()["pending_timeouts"] == 1
    assert fake.next_timeout() == 0
    turn(fake)
    assert log == ["first", "second", "third"]


@pytest.mark.row("C14")
def test_zero_timeouts_that_are_armed_again_starve_nothing(loop):
    """Handlers and the other timeouts have their turn in each iteration."""
    calls = Recorder()

    def again():
        loop.call_later(0, again)
        if len(calls) >= 3:
            loop.stop()

    with readable() as (a, _):
        loop.add_handler(a, calls, READ)
        loop.call_later(0, again)
        loop.start()
        loop.remove_handler(a)
    assert loop.stats()["iterations"] < 100


def test_added_late_and_cancelled_in_the_same_pass(fake, after):
    log, late = [], []

    def first():
        late.append(after(0, log.append, "late"))
        late.append(after(-1, log.append, "kept"))
        assert late[0].deadline == pytest.approx(1000)
        assert late[1].deadline == pytest.approx(999)

    after(0, first)
    after(0, lambda: late[0].cancel())
    turn(fake)
    assert late[0].callback is None
    assert late[0].deadline == pytest.approx(1000)
    turn(fake, 3)
    assert log == ["kept"]


@pytest.mark.row("C14")
@pytest.mark.parametrize("count", [63, 64, 65, 300, 1000])
def test_the_tables_grow_while_timeouts_run(fake, after, count):
    """What has to wait for the next pass moves to the new ones."""
    log, late = [], []

    def add():
        late.extend(after(0, log.append, n) for n in range(count))
        ioloop._verify(fake)
        for handle in late[::3]:
            handle.cancel()
        ioloop._verify(fake)

    after(0, add)
    turn(fake)
    assert log == []
    turn(fake)
    assert log == [n for n in range(count) if n % 3]


@pytest.mark.row("C10")
def test_cancelled_by_an_earlier_one_in_the_same_pass(fake, after):
    log, handles = [], []
    after(0, lambda: [handle.cancel() for handle in handles])
    handles += [after(0, log.append, i) for i in range(10)]
    after(0, log.append, "last")
    turn(fake, 3)
    assert log == ["last"]


@pytest.mark.row("C10")
def test_cancelled_by_a_destructor_of_the_one_before(fake, after):
    class Callback:
        def __call__(self):
            log.append("first")

        def __del__(self):
            handle.cancel()

    log = []
    after(0, Callback())
    handle = after(0, log.append, "never")
    after(0, log.append, "last")
    turn(fake, 2)
    assert log == ["first", "last"]


@pytest.mark.row("C10")
def test_cancels_itself_while_it_runs(fake, after):
    log = []

    def once():
        handle.cancel()
        fake.remove_timeout(handle)
        log.append(handle.callback)

    handle = after(0, once)
    turn(fake, 2)
    assert log == [None]


def test_cancelled_by_a_callback_of_the_same_iteration(fake, after):
    log = []
    handle = after(0, log.append, "never")
    fake.add_callback(handle.cancel)
    turn(fake, 2)
    assert log == []


# -- Exceptions ----------------------------------------------------------------


@pytest.mark.row("D2")
def test_a_late_one_is_kept_too(fake, after):
    log = []

    def first():
        after(0, log.append, "late")
        raise Exit

    after(0, first)
    after(0, log.append, "due")
    with pytest.raises(Exit):
        fake.start()
    turn(fake)
    assert log == ["due", "late"]


# -- The clock -----------------------------------------------------------------


def test_time_is_unix_time_by_default(loop):
    before = time.time()
    assert before - 1 < loop.time() < time.time() + 1


def test_time_is_that_of_time_func(fake, clock):
    assert fake.time() == 1000
    clock.advance(1.5)
    assert fake.time() == 1001.5


@pytest.mark.row("C16")
@pytest.mark.parametrize("jump", [-1e9, -31_536_000, 31_536_000, 1e9])
def test_a_custom_clock_that_jumps_is_followed(fake, clock, jump):
    log = []
    fake.call_later(10, log.append, 1)
    clock.advance(jump)
    turn(fake)
    assert log == ([1] if jump > 0 else [])
    assert jump > 0 or fake.next_timeout() == pytest.approx(10 - jump)


WALL_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

long wall_clock_offset;

int clock_gettime(clockid_t clock, struct timespec *t) {
    static __typeof__(clock_gettime) *real;
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int rc = real(clock, t);
    if (clock == CLOCK_REALTIME) t->tv_sec += wall_clock_offset;
    return rc;
}
"""


@pytest.fixture(scope="module")
def wall_clock(tmp_path_factory):
    """A library to preload, by which a process sets its wall clock."""
    source = tmp_path_factory.mktemp("clock") / "clock.c"
    source.write_text(WALL_CLOCK)
    return str(compile_library(source))


@pytest.mark.row("C16")
@pytest.mark.parametrize("jump", [-31_536_000, -3600, 3600, 31_536_000])
def test_the_wall_clock_moves_nothing(poller, wall_clock, jump):
    """By default a deadline is monotonic from the moment it is set."""
    poller.run(
        f"""
        import ctypes, time
        offset = ctypes.c_long.in_dll(ctypes.CDLL(None), "wall_clock_offset")
        log = []
        with ioloop.IOLoop(impl=impl()) as loop:
            before = loop.time()
            loop.add_timeout(before + 0.02, log.append, 1)
            loop.add_timeout(before + 1800, log.append, 2)
            loop.call_later(0.03, log.append, 3)
            periodic = ioloop.PeriodicCallback(lambda: log.append("p"), 10, loop)
            periodic.start()
            offset.value = {jump}
            assert abs(loop.time() - before - {jump}) < 60
            start = time.monotonic()
            loop.call_later(0.045, loop.stop)
            loop.start()
            assert 0.045 <= time.monotonic() - start < 20
            assert [x for x in log if x != "p"] == [1, 3], log
            assert 1 <= log.count("p") <= 8, log
            assert loop.next_timeout() < 0.011, loop.next_timeout()
            periodic.stop()
            assert 1700 < loop.next_timeout() < 1800
            loop.add_timeout(loop.time() + 0.005, loop.stop)
            loop.start()
        """,
        LD_PRELOAD=wall_clock,
    )


@pytest.mark.row("C17")
@pytest.mark.parametrize(
    ("answer", "error"),
    [(math.nan, ValueError), ("noon", TypeError), (None, TypeError), (Exit, Exit)],
)
def test_a_clock_that_answers_nonsense_or_raises(answer, error):
    """An exception out of whatever asked it, and no hang."""

    def time_func():
        return fail(Exit) if clock.now is Exit else clock.now

    clock, log = FakeClock(), []
    with ioloop.IOLoop(impl=ScriptedPoller(), time_func=time_func) as loop:
        loop.call_later(1, log.append, 1)
        clock.now = answer
        for call in (loop.start, loop.run_once, loop.next_timeout):
            with pytest.raises(error):
                call()
        with pytest.raises(error):
            loop.call_later(1, log.append, 2)
        if error is Exit:
            with pytest.raises(error):
                loop.time()
        assert not loop.running()
        clock.now = 1002
        turn(loop)
        assert log == [1]


@pytest.mark.row("C17")
def test_backwards_is_no_progress(fake, clock):
    log = []
    fake.call_later(1, log.append, 1)
    for _ in range(100):
        clock.advance(-1)
        turn(fake)
    assert log == []
    clock.advance(102)
    turn(fake)
    assert log == [1]


@pytest.mark.row("C18")
def test_all_due_at_once_after_a_suspension(fake, clock):
    log = []
    for i in range(100):
        fake.call_later(100 - i, log.append, 100 - i)
    clock.advance(86400)
    turn(fake)
    assert log == list(range(1, 101))


@pytest.mark.row("C15")
def test_the_wait_is_from_a_fresh_clock(fake, clock):
    """A slow callback is not added to the sleep."""
    fake.call_later(10, fake.stop)
    fake.add_callback(clock.advance, 9.5)
    fake.start()
    assert fake._impl.polls == [pytest.approx(0.5)]


@pytest.mark.row("C8")
@pytest.mark.parametrize("name", ["__float__", "__index__", "total_seconds"])
@pytest.mark.parametrize("act", ["add", "remove", "close", "raise", "lie"])
def test_hostile_deadlines(clock, name, act):
    """They are converted before anything changes."""
    log = []
    with ioloop.IOLoop(impl=ScriptedPoller(), time_func=clock) as loop:
        handles = [loop.call_later(i, log.append, i) for i in range(10)]

        def convert(self):
            if act == "add":
                loop.call_later(2, log.append, "added")
            elif act == "remove":
                for handle in handles:
                    handle.cancel()
            elif act == "close":
                loop.close()
            elif act == "raise":
                raise Exit
            if act == "lie":
                return "soon"
            return 5.0 if name == "__float__" else 5

        deadline = type("Deadline", (), {name: convert})()
        errors = {"close": RuntimeError, "raise": Exit, "lie": TypeError}
        ways = [loop.add_timeout] + [loop.call_later] * (name != "total_seconds")
        for way in ways:
            if act in errors:
                with pytest.raises(errors[act]):
                    way(deadline, log.append, "hostile")
            else:
                way(deadline, log.append, "hostile")
        if act == "close":
            return
        ioloop._verify(loop)
        clock.advance(20)
        turn(loop)
        wanted = [] if act == "remove" else list(range(10))
        assert [i for i in log if isinstance(i, int)] == wanted
        count = 0 if act in errors else len(ways)
        assert log.count("hostile") == count
        assert log.count("added") == (count if act == "add" else 0)


# -- Never early, and not late -------------------------------------------------


@pytest.mark.row("C3")
@pytest.mark.parametrize("way", ["call_later", "add_timeout", "timedelta"])
def test_never_early(loop, way):
    """Also by less than the poller's unit: waits are rounded up."""
    late = []

    def add(delay):
        if way == "add_timeout":
            deadline = time.time() + delay
            loop.add_timeout(deadline, lambda: late.append(time.time() - deadline))
            return
        due = time.monotonic() + delay
        note = lambda: late.append(time.monotonic() - due)  # noqa: E731
        if way == "timedelta":
            loop.add_timeout(datetime.timedelta(seconds=delay), note)
        else:
            loop.call_later(delay, note)

    for i in range(100):
        add(0.0001 + i * 0.000137)
    run_for(loop, 0.02)
    assert len(late) == 100
    # time.time() rounds a deadline to a quarter of a microsecond.
    assert min(late) >= (-1e-6 if way == "add_timeout" else 0)


@pytest.mark.row("C3")
def test_a_fraction_of_a_nanosecond_is_early_too(fake, clock):
    """The deadline is rounded up, and the clock down."""
    log = []
    clock.now = 0.0
    fake.add_timeout(1e-9, log.append, 1)
    clock.now = 0.6e-9
    turn(fake)
    assert log == []
    clock.now = 2e-9
    turn(fake)
    assert log == [1]


@pytest.mark.row("C1")
@pytest.mark.parametrize("delay", [0.00002, 0.00004, 0.0005])
@pytest.mark.parametrize("way", ["call_later", "add_timeout"])
def test_no_spinning_near_the_deadline(loop, way, delay):
    """Two polls to a timeout at most, also within the timer slack."""
    for _ in range(20):
        before = loop.stats()["polls"]
        base = loop.time() if way == "add_timeout" else 0
        getattr(loop, way)(base + delay, loop.stop)
        loop.start()
        assert loop.stats()["polls"] - before <= 2


@pytest.mark.row("C2")
@pytest.mark.parametrize("delay", [0, 1e-9, 0.001, 0.0010000001, 1.5])
def test_what_the_poller_is_told(fake, delay):
    """0 stays 0; what is more is exact, but for nanoseconds upwards."""
    fake.call_later(delay, fake.stop)
    fake.run_once()
    fake.run_once(0)
    if delay:
        assert delay <= fake._impl.polls[0] <= delay + 2e-9
    else:
        assert fake._impl.polls == [] or set(fake._impl.polls) == {0}


def test_lateness_is_microseconds(loop):
    """Median; generous, for a busy machine: a millisecond's rounding is seen."""
    late = []

    def note(due):
        late.append(time.monotonic() - due)
        if len(late) < 41:
            loop.call_later(0.0005, note, time.monotonic() + 0.0005)
        else:
            loop.stop()

    loop.call_later(0.0005, note, time.monotonic() + 0.0005)
    loop.start()
    assert min(late) >= 0
    assert sorted(late)[len(late) // 4] < 0.0005


@pytest.mark.row("E27")
def test_stop_and_continue_while_asleep(loop):
    """SIGCONT interrupts the poll with EINTR: not early, not late by the pause."""
    with child() as inside:
        if inside:
            start = time.monotonic()
            loop.reinit()
            loop.call_later(0.15, loop.stop)
            helper = fork()
            if helper == 0:
                for number in (signal.SIGSTOP, signal.SIGCONT) * 5:
                    os.kill(os.getppid(), number)
                    time.sleep(0.005)
                os._exit(0)
            loop.start()
            assert 0.15 <= time.monotonic() - start < 20
            os.waitpid(helper, 0)
            loop.close()


# -- Many ----------------------------------------------------------------------


@pytest.mark.row("C21")
def test_no_linear_cost(fake):
    """Cancelling among ten times as many is not ten times as slow."""

    def seconds(count):
        handles = [fake.call_later(i, print) for i in range(count)]
        random.Random(1).shuffle(handles)
        start = time.process_time()
        for handle in handles[:1000]:
            handle.cancel()
        took = time.process_time() - start
        for handle in handles:
            handle.cancel()
        return took

    few = min(seconds(2000) for _ in range(3))
    many = min(seconds(20_000) for _ in range(3))
    assert many < 6 * few + 0.001


@pytest.mark.row("C12")
def test_cancelled_in_one_callback(fake):
    """Nothing of them is kept until some later pass."""

    def add_and_cancel():
        for _ in range(10):
            handles = [fake.call_later(3600, print) for _ in range(1000)]
            for handle in handles:
                handle.cancel()
            assert fake.stats()["pending_timeouts"] == 0

    fake.add_callback(add_and_cancel)
    turn(fake)


def test_next_timeout(fake, clock):
    assert fake.next_timeout() is None
    handle = fake.call_later(10, print)
    fake.call_later(20, int)
    assert fake.next_timeout() == pytest.approx(10)
    clock.advance(4)
    assert fake.next_timeout() == pytest.approx(6)
    handle.cancel()
    assert fake.next_timeout() == pytest.approx(16)
    clock.advance(100)
    assert fake.next_timeout() == 0
    turn(fake)
    assert fake.next_timeout() is None
    fake.add_callback(print, end="")
    assert fake.next_timeout() == 0
    turn(fake)
