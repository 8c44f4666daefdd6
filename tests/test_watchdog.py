"""The watchdog: thresholds, whom they alarm, and what they leave alone."""

import contextlib
import ctypes
import faulthandler
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from inspect import signature

import pytest
from fakes import (
    FOREVER,
    READ,
    Exit,
    Recorder,
    block,
    fail,
    in_time,
    run_callback,
    start_until,
    turn,
)
from kernel import alarm, kill, on_signal, pair, pend, readable
from processes import Thread, child, in_thread, sleeping, wait_until, when_asleep

ALRM = signal.SIGALRM
SHORT = 0.02
LONG = 0.1  # no busy machine holds us up for so long

both = pytest.mark.parametrize("way", ["log", "signal"])
only_epoll = pytest.mark.parametrize("poller", ["epoll"], indirect=True)

# Only these have to do with how a poller sleeps; the others run on epoll.
ON_EVERY_POLLER = {
    "test_sleeping_is_not_blocking",
    "test_what_blocks_after_a_long_sleep_is_noticed",
    "test_no_action_kills_the_process",
    "test_a_watched_loop_that_is_idle_makes_no_system_call",
    "test_an_alarm_that_falls_due_while_the_loop_sleeps",
    "test_it_can_be_set_while_the_loop_runs",
    "test_the_watcher_ends_with_the_run",
}


def watch(loop, way, seconds=SHORT, names=("block", "sleep")):
    """Set the threshold; the list of the functions that are reported to block.

    They have these names.  What else is reported is a busy machine; () takes it all.
    """
    alarms = []

    def action(number, frame):
        assert number == ALRM
        while names and frame and frame.f_code.co_name not in names:
            frame = frame.f_back
        if frame:
            alarms.append(frame.f_code.co_name)

    if way == "signal":
        loop.set_blocking_signal_threshold(seconds, action)
    elif way == "kill":
        loop.set_blocking_signal_threshold(seconds, None)
    else:
        loop.log_stack = action
        loop.set_blocking_log_threshold(seconds)
    return alarms


@pytest.fixture(params=["log", "signal"])
def watched(loop, request):
    """A loop with either threshold, and the list of what is reported."""
    loop.alarms = watch(loop, request.param)
    return loop


def watchers():
    return [t for t in threading.enumerate() if t.name == "ioloop watchdog"]


def still_watches(loop):
    """What blocks is reported, once."""
    before = len(loop.alarms)
    run_callback(loop, block)
    assert len(loop.alarms) == before + 1


def run(way, function, *args):
    """Call it, for the way "thread" in another thread."""
    in_thread(function, *args) if way == "thread" else function(*args)


def mine(*_):
    """The program's handler of SIGALRM, which is not to be called."""
    fail(AssertionError)


# -- What is blocked, and what is not -------------------------------------------


@pytest.mark.row("E15")
@pytest.mark.parametrize("where", ["callback", "timeout", "handler"])
def test_user_code_that_blocks_is_noticed(watched, where):
    """From the first batch on; with the signal and the frame that blocks."""
    with readable() as (a, _):

        def handler(*_):
            watched.remove_handler(a)
            block()

        if where == "callback":
            watched.add_callback(block)
        elif where == "timeout":
            watched.call_later(0, block)
        else:
            watched.add_handler(a, handler, READ)
        turn(watched)
    assert watched.alarms == ["block"]


@pytest.mark.row("E14")
@pytest.mark.parametrize("way", ["log", "signal", "thread", "python"])
def test_sleeping_is_not_blocking(make_loop, way):
    """Nor in a poller that is written in Python."""

    def sleep():
        loop.call_later(3 * LONG, loop.stop)
        loop.start()

    loop = make_loop(impl=select.epoll()) if way == "python" else make_loop()
    alarms = watch(loop, way, LONG)
    run(way, sleep)
    assert alarms == []


@pytest.mark.row("E15")
@pytest.mark.parametrize("way", ["log", "signal", "thread"])
@pytest.mark.parametrize("where", ["timeout", "handler"])
def test_what_blocks_after_a_long_sleep_is_noticed(loop, where, way):
    """In which whoever watches has found nothing to do."""
    alarms = watch(loop, way)

    def handler(*_):
        loop.remove_handler(a)
        block()
        loop.stop()

    with pair() as (a, b):
        loop.add_handler(a, handler, READ)
        if where == "timeout":
            loop.call_later(5 * SHORT, handler)
        else:
            sender = Thread(lambda: (time.sleep(5 * SHORT), b.send(b"x")))
        run(way, loop.start)
        if where == "handler":
            sender.join()
    assert alarms == ["block"]


def test_progress_is_not_blocking(watched):
    """Many iterations, each shorter than the threshold, if the machine lets us."""
    last = time.monotonic()
    end = last + 5 * SHORT
    held_up = 0

    def block():
        nonlocal last, held_up
        before, last = last, time.monotonic()
        held_up += last - before > SHORT / 2
        if last < end:
            watched.add_callback(block)
        else:
            watched.stop()

    watched.add_callback(block)
    watched.start()
    assert len(watched.alarms) <= held_up


def test_an_alarm_for_each_block(watched):
    """One, however long it blocks."""
    for n in range(1, 3):
        watched.add_callback(block, 15 * SHORT)
        watched.add_callback(watched.add_callback, int)
        turn(watched, 3)
        watched.call_later(0.001, watched.stop)
        watched.start()
        assert len(watched.alarms) == n


@pytest.mark.parametrize("gil", ["held", "free"])
def test_what_blocks_in_c_is_noticed(watched, gil):
    """At the latest when it is back in Python."""
    usleep = ctypes.PyDLL(None).usleep

    def sleep():
        usleep(150_000) if gil == "held" else time.sleep(0.15)
        for _ in range(1000):
            pass

    run_callback(watched, sleep)
    assert watched.alarms == ["sleep"]


def test_an_action_that_raises_ends_the_block(loop):
    def action(number, frame):
        raise Exit

    loop.set_blocking_signal_threshold(SHORT, action)
    for _ in range(2):
        loop.add_callback(block, 30)
        with pytest.raises(Exit):
            loop.start()
        assert not loop.running()
        assert signal.getsignal(ALRM) == signal.SIG_DFL


def test_an_action_may_turn_it_off(loop):
    alarms = []

    def action(number, frame):
        alarms.append(number)
        loop.set_blocking_signal_threshold(None, None)

    loop.set_blocking_signal_threshold(SHORT, action)
    for _ in range(2):
        run_callback(loop, block)
    assert alarms == [ALRM]
    assert watchers() == []


def test_a_log_stack_that_raises_is_shown_and_disturbs_nobody(loop, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: shown.append(info.exc_type))
    loop.log_stack = lambda *_: fail(ZeroDivisionError)
    loop.set_blocking_log_threshold(SHORT)
    for _ in range(2):
        run_callback(loop, block)
    assert shown == [ZeroDivisionError] * 2


@pytest.mark.row("E13")
@pytest.mark.parametrize("error", [None, Exit])
def test_disarmed_on_every_exit(watched, error):
    """An alarm after the run would hit code that has nothing to do with the loop."""
    start_until(watched, error)
    block()
    assert watched.alarms == []
    assert signal.getsignal(ALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("method", ["signal", "log"])
def test_none_turns_it_off_at_once(watched, method):
    """By either method: there is one threshold."""

    def off():
        if method == "signal":
            watched.set_blocking_signal_threshold(None, None)
        else:
            watched.set_blocking_log_threshold(None)
        assert signal.getsignal(ALRM) == before
        assert watchers() == []
        block()

    before = signal.getsignal(ALRM)
    run_callback(watched, off)
    assert watched.alarms == []


@pytest.mark.parametrize("way", ["log", "signal", "thread"])
def test_it_can_be_set_while_the_loop_runs(loop, way):
    """And turned off."""
    alarms = []

    def on_and_off():
        alarms.append(watch(loop, way))
        block()
        loop.set_blocking_log_threshold(None)
        block()

    run(way, run_callback, loop, on_and_off)
    assert alarms == [["block"]]
    assert signal.getsignal(ALRM) == signal.SIG_DFL


@pytest.mark.row("F4")
@pytest.mark.parametrize("way", ["log", "signal", "thread"])
@pytest.mark.parametrize("end", ["start", "run_once", "run_sync", "exception", "none"])
def test_the_watcher_ends_with_the_run(loop, way, end):
    """One thread while it lasts, and none before and after."""

    def look():
        seen.extend(watchers())

    def run_and_end():
        loop.add_callback(look)
        if end in ("start", "exception"):
            start_until(loop, Exit if end == "exception" else None)
        elif end == "run_sync":
            loop.run_sync(int)
        elif end == "none":
            loop.add_callback(loop.set_blocking_log_threshold, None)
            run_callback(loop, look)
        else:
            turn(loop)

    seen, before = [], set(threading.enumerate())
    watch(loop, way)
    run(way, run_and_end)
    assert len(seen) == 1
    assert set(threading.enumerate()) == before
    wait_until(lambda: not os.path.exists(f"/proc/self/task/{seen[0].native_id}"))


def test_an_interrupt_leaves_no_watcher_behind(loop):
    """It comes while the run waits for the watcher, which still reports."""
    reporting = threading.Event()
    loop.log_stack = lambda *_: (reporting.set(), time.sleep(0.3))
    loop.set_blocking_log_threshold(SHORT)
    loop.add_callback(reporting.wait)
    loop.add_callback(loop.stop)
    loop.add_callback(*pend(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        loop.start()
    assert watchers() == []


@pytest.mark.parametrize("way", ["log", "thread"])
def test_set_blocking_log_threshold(loop, expect_log, way):
    loop.set_blocking_log_threshold(LONG)
    run(way, run_callback, loop, block, 3 * LONG)
    record = expect_log.take(
        r"(?s)^IOLoop blocked for 0\.100000 seconds in\n.*\bblock\b"
    )
    assert (record.name, record.levelno) == ("ioloop", logging.WARNING)


def test_log_stack(loop, expect_log):
    loop.log_stack(ALRM, sys._getframe())
    expect_log.take(r"(?s)^IOLoop blocked for .*test_log_stack")


def test_log_stack_of_a_subclass(make_loop, poller):
    class Sub(poller.module.IOLoop):
        def log_stack(self, number, frame):
            seen.append(number)

    seen = []
    loop = make_loop(Sub)
    loop.set_blocking_log_threshold(SHORT)
    run_callback(loop, block)
    assert seen == [ALRM]


@pytest.mark.parametrize(
    "seconds", [0, -1, -0.0, float("nan"), float("-inf")], ids=repr
)
def test_a_threshold_must_be_positive(watched, seconds):
    """And what fails changes nothing: the old one still counts."""
    with pytest.raises(ValueError):
        watched.set_blocking_signal_threshold(seconds, None)
    with pytest.raises(ValueError):
        watched.set_blocking_log_threshold(seconds)
    still_watches(watched)


@pytest.mark.parametrize("args", [("1", None), (1, 1), (1, "kill"), ([], None)])
def test_thresholds_and_actions_of_wrong_types(loop, args):
    with pytest.raises(TypeError):
        loop.set_blocking_signal_threshold(*args)


@pytest.mark.row("E18")
def test_main_thread_only(watched):
    """Checked before any state changes."""
    for args in ((SHORT, None), (None, None)):
        with pytest.raises(RuntimeError, match="main thread"):
            in_thread(watched.set_blocking_signal_threshold, *args)
    still_watches(watched)


@pytest.mark.row("E18")
def test_a_loop_with_a_signal_threshold_runs_in_the_main_thread(loop):
    watch(loop, "signal")
    with pytest.raises(RuntimeError):
        in_thread(turn, loop)
    assert not loop.running()
    turn(loop)


# -- The program's SIGALRM and timers -------------------------------------------


def test_what_sigalrm_means_while_a_loop_with_an_action_runs(loop):
    """The action, for the program to see; nothing is hidden."""

    def action(number, frame):
        pass

    seen = []
    loop.set_blocking_signal_threshold(30, action)
    run_callback(loop, lambda: seen.append(signal.getsignal(ALRM)))
    assert seen == [action]


@pytest.mark.parametrize("way", ["log", "kill"])
def test_sigalrm_is_not_touched_without_an_action(loop, way):
    """From the first callback to the last, also when the loop has blocked."""

    def look():
        assert signal.getsignal(ALRM) is mine
        assert signal.getitimer(signal.ITIMER_REAL)[1] == 7
        if way == "log":
            block()
            assert signal.getsignal(ALRM) is mine

    with alarm(60, mine, 7):
        alarms = watch(loop, way, SHORT if way == "log" else 30)
        for _ in range(2):
            run_callback(loop, look)
    assert way == "kill" or len(alarms) == 2


@pytest.mark.row("E16", "E17")
@both
def test_a_foreign_timer_and_handler_are_restored(loop, way):
    """The timer goes on all the time; the handler is back after each run."""

    def look():
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left < 60
        assert interval == 7

    with alarm(60, mine, 7):
        watch(loop, way, 30)
        for _ in range(2):
            loop.add_callback(look)
            loop.call_later(0.01, loop.stop)
            loop.start()
            assert signal.getsignal(ALRM) is mine
            look()


@pytest.mark.row("E16")
@both
@pytest.mark.parametrize("end", ["stop", "exception"])
def test_a_foreign_timer_still_fires(loop, way, end):
    fired = []
    with alarm(0.05, lambda *_: fired.append(1)):
        watch(loop, way, 30)
        loop.call_later(0.01, loop.stop if end == "stop" else lambda: fail(Exit))
        with contextlib.suppress(Exit):
            loop.start()
        wait_until(lambda: fired)
    assert fired == [1]


@pytest.mark.row("E17")
@both
def test_signal_handlers_from_c_are_restored(loop, way, tmp_path):
    watch(loop, way, 30)
    for handler in (signal.SIG_IGN, signal.SIG_DFL):
        with on_signal(ALRM, handler):
            turn(loop)
            assert signal.getsignal(ALRM) == handler
    with open(tmp_path / "dump", "w") as file, on_signal(ALRM, mine):
        faulthandler.register(ALRM, file)
        turn(loop)
        signal.raise_signal(ALRM)
        faulthandler.unregister(ALRM)
    assert (tmp_path / "dump").read_text()


@pytest.mark.parametrize("way", ["log", "signal", "kill"])
def test_a_handler_set_while_the_loop_runs_stays(loop, way):
    calls = []
    with on_signal(ALRM, signal.SIG_IGN):
        watch(loop, way, 30)
        run_callback(loop, signal.signal, ALRM, lambda *_: calls.append(1))
        signal.raise_signal(ALRM)
    assert calls == [1]


@both
@pytest.mark.parametrize(("interval", "count"), [(0, 1), (0.005, 5)])
def test_an_alarm_that_falls_due_while_the_loop_sleeps(loop, way, interval, count):
    """It was set before; its handler is called once, or as often as the timer ticks."""
    fired = []

    def handler(*_):
        fired.append(1)
        if len(fired) == count:
            loop.stop()

    alarms = watch(loop, way, 30)
    with alarm(0.005, handler, interval), in_time(loop):
        loop.start()
    assert len(fired) == 1 or interval
    assert alarms == []


def test_an_alarm_that_falls_due_in_a_callback(watched):
    """While the watchdog reports that callback."""
    fired = []
    with alarm(5 * SHORT, lambda *_: fired.append(1)):
        run_callback(watched, block, 10 * SHORT)
    assert fired == [1]
    assert watched.alarms == ["block"]


@pytest.mark.parametrize("seconds", [SHORT / 10, 5 * SHORT])
def test_an_alarm_that_falls_due_in_c_code_which_no_signal_interrupts(watched, seconds):
    """When Python gets to run handlers, both signals have come: two calls."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    fired, locked = [], threading.Event()

    def hold():
        libc.pthread_mutex_lock(mutex)
        locked.set()
        time.sleep(15 * SHORT)
        libc.pthread_mutex_unlock(mutex)

    def sleep():
        with Thread(hold):
            locked.wait()
            signal.setitimer(signal.ITIMER_REAL, seconds)
            libc.pthread_mutex_lock(mutex)

    with on_signal(ALRM, lambda *_: fired.append(1)):
        run_callback(watched, sleep)
    assert fired == [1]
    assert watched.alarms == ["sleep"]


@both
def test_a_time_limit_around_the_run_ends_it(loop, way):
    """That of a test runner, say; by what its handler raises."""
    watch(loop, way, 30)
    with pytest.raises(Exit), alarm(0.01, lambda *_: fail(Exit)):
        loop.call_later(10, loop.stop)
        loop.start()
    assert signal.getsignal(ALRM) == signal.SIG_DFL
    wait_until(lambda: not watchers())  # if it was just being started


@pytest.mark.row("E16")
@both
def test_a_posix_timer_of_somebody_else_reaches_its_handler(loop, way):
    """That of timer_create(clock, NULL): its signal carries a number."""
    libc, timer, fired = ctypes.CDLL(None), ctypes.c_void_p(), []

    def handler(*_):
        fired.append(1)
        loop.stop()

    watch(loop, way, 30)
    assert not libc.timer_create(time.CLOCK_MONOTONIC, None, ctypes.byref(timer))
    with on_signal(ALRM, handler), in_time(loop):
        libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 0, 0, 5_000_000), None)
        loop.start()
    libc.timer_delete(timer)
    assert fired == [1]


def test_a_signal_that_is_not_the_watchers_is_the_programs(loop):
    fired = []
    alarms = watch(loop, "signal", 30)
    with on_signal(ALRM, lambda number, _: fired.append(number)):
        loop.add_callback(kill, ALRM)
        loop.add_callback(signal.raise_signal, ALRM)
        turn(loop)
    assert (fired, alarms) == ([ALRM, ALRM], [])


# -- Time limits and the like in callbacks ---------------------------------------


@pytest.mark.parametrize("seconds", [5 * SHORT, 60])
def test_a_time_limit_in_a_callback_is_exact(watched, seconds):
    """It strikes once, in time, or not at all; what blocks later is reported."""
    strikes = []

    def callback():
        start = time.monotonic()
        with alarm(seconds, lambda *_: strikes.append(time.monotonic() - start)):
            block(10 * SHORT)

    run_callback(watched, callback)
    assert [strike >= seconds for strike in strikes] == [True] * (seconds < 60)
    still_watches(watched)


@pytest.mark.slow
def test_many_time_limits_are_exact(watched):
    """Around the threshold: some strike before the report, some after it."""
    strikes, wrong = [], []

    def callback(seconds):
        start = time.monotonic()
        with alarm(seconds, lambda *_: strikes.append(time.monotonic() - start)):
            block(seconds + 0.001)

    for n in range(200):
        strikes.clear()
        run_callback(watched, callback, n * 3 * SHORT / 200 + 0.0001)
        if len(strikes) != 1 or strikes[0] < n * 3 * SHORT / 200:
            wrong.append((n, *strikes))
    assert wrong == []


def test_a_time_limit_in_whole_seconds(watched):
    """The one of the report: far from over when the callback is done."""

    def callback():
        old = signal.signal(ALRM, mine)
        signal.alarm(FOREVER)
        block()
        assert FOREVER - 60 < signal.alarm(0) <= FOREVER
        signal.signal(ALRM, old)

    run_callback(watched, callback)


def test_a_time_limit_that_raises_in_a_callback(watched, expect_log):
    def callback():
        with alarm(5 * SHORT, lambda *_: fail(ZeroDivisionError)):
            block(30)

    run_callback(watched, callback)
    expect_log.take("callback", ZeroDivisionError)
    still_watches(watched)


def test_what_still_blocks_after_a_time_limit_is_reported(loop):
    """Not while the callback's handler is there, and once when it is not."""
    alarms, during = watch(loop, "signal"), []

    def callback():
        with alarm(60, mine):
            block()
            during.extend(alarms)
        block()

    run_callback(loop, callback)
    assert (during, alarms) == ([], ["block"])


def test_an_alarm_of_a_callback_is_the_programs_if_it_sets_no_handler(watched):
    """Its handler is that from before the run."""
    fired = []

    def callback():
        signal.setitimer(signal.ITIMER_REAL, 5 * SHORT)
        block(10 * SHORT)

    with on_signal(ALRM, lambda *_: fired.append(1)):
        run_callback(watched, callback)
    assert fired == [1]
    assert len(watched.alarms) == 1


def test_faulthandler_dumps_at_its_own_signals_only(watched, tmp_path):
    """It sets SIGALRM's handler behind Python's back."""

    def callback():
        faulthandler.register(ALRM, file, all_threads=False)
        try:
            signal.setitimer(signal.ITIMER_REAL, 5 * SHORT)
            block(10 * SHORT)
        finally:
            faulthandler.unregister(ALRM)

    with open(tmp_path / "dump", "w") as file:
        run_callback(watched, callback)
    assert (tmp_path / "dump").read_text().count("most recent call first") == 1
    still_watches(watched)


@both
@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_callback_that_sets_no_handler_of_its_own_survives(
    make_loop, capfd, way, handler
):
    """The watcher's signal would be lost, or kill; so it waits with it."""

    def callback():
        with on_signal(ALRM, handler):
            block()
            assert way == "log" or alarms == []

    with child() as inside:
        if inside:
            loop = make_loop()
            alarms = watch(loop, way, names=())
            run_callback(loop, callback)
            alarms.clear()
            run_callback(loop, block)
            assert alarms
    assert capfd.readouterr().err == ""


@both
def test_a_program_that_blocks_sigalrm_survives(make_loop, way):
    """What is pending at the end of the run must not come after it."""

    def callback():
        signal.pthread_sigmask(signal.SIG_BLOCK, [ALRM])
        block()

    with child() as inside:
        if inside:
            loop = make_loop()
            watch(loop, way)
            run_callback(loop, callback)
            loop.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [ALRM])


@pytest.mark.parametrize(
    ("way", "threshold", "seconds"), [("log", SHORT, 0.15), ("signal", 0.4, 0.2)]
)
def test_no_signal_interrupts_c_code(loop, way, threshold, seconds):
    """At least not before the loop is blocked, and never under a log threshold.

    nanosleep(2) is what signals interrupt, whatever siginterrupt(3) says.
    """
    alarms, interrupted = watch(loop, way, threshold), []

    def sleep():
        duration = (ctypes.c_long * 2)(0, int(seconds * 1e9))
        interrupted.append(ctypes.CDLL(None).nanosleep(duration, None))

    run_callback(loop, sleep)
    if way == "log":
        assert (interrupted, alarms) == ([0], ["sleep"])
    else:
        assert interrupted == [-1 if alarms else 0]


def test_a_log_threshold_makes_no_system_call_for_signals_and_timers(poller, shim):
    """Not when it is set, not when the loop blocks, and not at the end."""
    done = poller.run(
        """
        import ctypes, time
        borrowed = ctypes.c_int.in_dll(ctypes.CDLL(None), "borrowed")
        alarms = []
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.log_stack = lambda *args: alarms.append(args)
            before = borrowed.value
            loop.set_blocking_log_threshold(0.02)
            loop.add_callback(time.sleep, 0.15)
            loop.call_later(0.2, loop.stop)
            loop.start()
            print(alarms != [], borrowed.value - before)
        """,
        LD_PRELOAD=shim,
    )
    assert done.stdout == "True 0\n"


# -- No action ------------------------------------------------------------------


@pytest.mark.row("E20")
@pytest.mark.parametrize(
    "stuck",
    [
        pytest.param("sum(itertools.repeat(0))", id="c"),
        pytest.param("lock(mutex), lock(mutex)", id="mutex"),
        pytest.param("time.sleep(30)", id="sleep"),
        pytest.param("os.read(os.pipe()[0], 1)", id="read"),
        pytest.param("threading.Semaphore(0).acquire()", id="lock"),
        pytest.param("signal.sigwait([signal.SIGUSR1])", id="wait"),
        pytest.param("signal.signal(signal.SIGALRM, print)", id="handler"),
        pytest.param("signal.signal(signal.SIGALRM, signal.SIG_IGN)", id="ignored"),
        pytest.param("signal.pthread_sigmask(signal.SIG_BLOCK, [14])", id="blocked"),
    ],
)
def test_no_action_kills_the_process(poller, stuck):
    """By SIGALRM, also when it is stuck in C code that never looks at signals, and
    whatever the program does with SIGALRM."""
    code = f"""
        import ctypes, itertools, os, resource, signal, threading, time
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        lock = ctypes.PyDLL(None).pthread_mutex_lock
        mutex = ctypes.create_string_buffer(64)
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.set_blocking_signal_threshold(0.05, None)
            loop.add_callback(lambda: ({stuck}, time.sleep(30)))
            loop.start()
        """
    done = poller.run(code, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-ALRM, "", "")


def test_no_action_does_not_kill_a_loop_that_does_not_block(make_loop):
    with child() as inside:
        if inside:
            loop = make_loop()
            loop.set_blocking_signal_threshold(SHORT, None)
            for _ in range(3):
                loop.call_later(0.05, loop.stop)
                loop.start()
                block(0.05)


@pytest.mark.row("E19")
@both
def test_a_child_process_is_not_killed(loop, way):
    """The watcher survives neither fork nor exec."""
    alarms = watch(loop, way)

    def spawn():
        sleep = "import time; time.sleep(0.1)"
        children.append(subprocess.Popen([sys.executable, "-c", sleep]))
        with child() as inside:
            if inside:
                alarms.clear()
                block(0.1)
                assert signal.getsignal(ALRM) is mine
                assert threading.active_count() == 1
                assert alarms == []

    children = []
    with on_signal(ALRM, mine):
        run_callback(loop, spawn)
    assert children[0].wait() == 0


def test_in_a_child_of_two_watched_loops_sigalrm_is_the_programs(make_loop, capfd):
    def fork():
        with child() as inside:
            if inside:
                assert signal.getsignal(ALRM) is mine

    outer, inner = make_loop(), make_loop()
    for loop in (outer, inner):
        loop.set_blocking_signal_threshold(60, print)
    with on_signal(ALRM, mine):
        inner.add_callback(fork)
        outer.run_sync(lambda: turn(inner))
    assert capfd.readouterr().err == ""


# -- Logging ----------------------------------------------------------------------


@pytest.mark.row("E21")
def test_logging_while_the_logging_lock_is_held(loop, expect_log):
    """By the callback that blocks: the watcher waits until it lets go."""
    loop.set_blocking_log_threshold(LONG)

    def hold():
        handler = logging.getLogger("ioloop").handlers[0]
        handler.acquire()
        try:
            block(3 * LONG)
        finally:
            handler.release()

    run_callback(loop, hold)
    expect_log.take("blocked")


def test_logging_while_the_logging_lock_is_held_around_the_run(poller):
    """Say by a log handler that runs a loop to send its record."""
    poller.run(
        """
        import logging, time
        handler = logging.StreamHandler()
        logging.getLogger("ioloop").addHandler(handler)
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.set_blocking_log_threshold(0.02)
            loop.add_callback(time.sleep, 0.15)
            handler.acquire()
            loop.run_once(0)
            handler.release()
        """
    )


# -- Several loops, and what it costs -----------------------------------------------


@pytest.mark.row("E22")
def test_two_loops_with_watchdogs(make_loop):
    """The inner one's alarms are its own, and the outer one's are restored."""
    outer, inner = make_loop(), make_loop()
    alarms = []
    outer.set_blocking_signal_threshold(SHORT, lambda *_: alarms.append("outer"))
    inner.set_blocking_signal_threshold(SHORT, lambda *_: alarms.append("inner"))
    run_callback(outer, run_callback, inner, block)
    assert "inner" in alarms
    alarms.clear()
    run_callback(outer, block)
    assert set(alarms) == {"outer"}


def test_two_watched_loops_one_inside_the_other_by_log(make_loop):
    """For each a watcher of its own, which ends with the run."""
    outer, inner = make_loop(), make_loop()
    alarms, seen = watch(inner, "log"), []
    watch(outer, "log")

    def nested():
        turn(inner)
        seen.append(len(watchers()))

    inner.add_callback(lambda: seen.append(len(watchers())))
    inner.add_callback(block)
    run_callback(outer, nested)
    assert alarms == ["block"]
    assert (seen, watchers()) == ([2, 1], [])


def switches(thread):
    """How often a thread has gone to sleep, which takes a system call."""
    with open(f"/proc/self/task/{thread}/status") as status:
        return int(status.read().split("\nvoluntary_ctxt_switches:")[1].split()[0])


@both
def test_a_loop_that_makes_progress_does_not_wake_the_watcher(loop, way):
    """However often it sleeps: the watcher looks when its own time has come."""
    counts = []

    def again(n):
        counts.append(switches(watchers()[0].native_id))
        if n:
            loop.call_later(0.0001, again, n - 1)
        else:
            loop.stop()

    watch(loop, way, 60)
    loop.add_callback(again, 100)
    with in_time(loop):
        loop.start()
    assert counts[-1] - counts[0] < 20


@pytest.mark.parametrize("way", ["log", "signal", "thread"])
def test_a_watched_loop_that_is_idle_makes_no_system_call(loop, way):
    """Nobody looks while it sleeps, no thread of the process wakes up."""

    def total():
        mine = str(threading.get_native_id())
        return sum(switches(t) for t in os.listdir("/proc/self/task") if t != mine)

    def rests():
        before = total()
        time.sleep(0.1)
        return total() == before

    watch(loop, way, 0.004)
    if way == "thread":
        with sleeping(loop):
            wait_until(rests)
    else:
        with when_asleep(lambda: (wait_until(rests), loop.stop())):
            loop.start()


def test_a_watched_loop_calls_its_handlers(watched):
    calls = Recorder()
    with readable() as (a, _):
        watched.add_handler(a, calls, READ)
        turn(watched, 2)
        watched.remove_handler(a)
    assert len(calls) == 2


@both
def test_an_embedded_loop_that_blocks_is_noticed(loop, way):
    """Between its runs it passes for asleep, for who polls its fileno()."""
    loop.fileno()
    alarms = watch(loop, way)
    for n in range(1, 4):
        run_callback(loop, block)
        assert alarms == ["block"] * n


@both
def test_fileno_in_a_callback_is_not_sleep(loop, way):
    def callback():
        loop.fileno()
        block()

    alarms = watch(loop, way)
    run_callback(loop, callback)
    assert alarms == ["block"]


def test_an_alarm_that_was_handled_is_not_the_programs_any_more(loop):
    """Neither one of an earlier run nor one of a callback's own handler."""
    fired = []

    def limited():
        with on_signal(ALRM, lambda *_: fired.append("limit")):
            signal.raise_signal(ALRM)

    with on_signal(ALRM, lambda *_: fired.append("program")):
        run_callback(loop, signal.raise_signal, ALRM)
        alarms = watch(loop, "signal")
        run_callback(loop, limited)
        loop.add_callback(limited)
        loop.add_callback(loop.add_callback, block)
        turn(loop, 2)
    assert fired == ["program", "limit", "limit"]
    assert alarms == ["block"]


def test_threads_that_are_none_are_refused(loop, monkeypatch):
    """As those of gevent's monkey patching: the watcher would wait in our own."""
    monkeypatch.setattr("_thread.start_new_thread", lambda *_: None)
    loop.set_blocking_log_threshold(1)
    with pytest.raises(RuntimeError, match="patched"):
        loop.start()
    assert not loop.running()


for name, test in list(globals().items()):
    if name.startswith("test_") and name not in ON_EVERY_POLLER:
        if {"loop", "make_loop", "poller", "watched"} & set(signature(test).parameters):
            only_epoll(test)
