"""The watchdog: thresholds, whom they alarm, and what they leave alone."""

import logging
import signal
import sys
import threading
import time

import pytest
from helpers import READ, Recorder, pair, turn
from support import (
    Exit,
    Thread,
    alarm,
    fail,
    in_thread,
    kill,
    on_signal,
    readable,
    wait_until,
)

ALRM = signal.SIGALRM

# -- The watchdog in the main thread -------------------------------------------

SHORT = 0.02


def block(seconds=0.15):
    """Python code that does not let go."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.fixture
def watched(loop):
    """A loop with a threshold, and the list of its alarms."""
    loop.alarms = []
    loop.set_blocking_signal_threshold(SHORT, lambda n, f: loop.alarms.append((n, f)))
    yield loop
    loop.alarms.clear()


@pytest.mark.parametrize("where", ["callback", "timeout", "handler"])
def test_E15_user_code_that_blocks_is_noticed(watched, where):
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
    number, frame = watched.alarms[0]
    assert number == ALRM
    assert frame.f_code is block.__code__
    assert len(watched.alarms) == 1


def test_E14_sleeping_is_not_blocking(watched):
    watched.call_later(5 * SHORT, watched.stop)
    watched.start()
    assert watched.alarms == []


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("where", ["timeout", "handler"])
def test_E15_what_blocks_after_a_long_sleep_is_noticed(loop, expect_log, where, thread):
    """In which whoever watches has found nothing to do."""
    loop.set_blocking_log_threshold(SHORT)

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
        in_thread(loop.start) if thread else loop.start()
        if where == "handler":
            sender.join()
    expect_log.take(r"(?s)blocked .*\bblock\b")


def test_progress_is_not_blocking(watched):
    """Many iterations, each shorter than the threshold, if the machine lets us."""
    last = time.monotonic()
    end = last + 5 * SHORT
    held_up = 0

    def again():
        nonlocal last, held_up
        before, last = last, time.monotonic()
        held_up += last - before > SHORT / 2
        if last < end:
            watched.add_callback(again)
        else:
            watched.stop()

    watched.add_callback(again)
    watched.start()
    assert len(watched.alarms) <= held_up


def test_an_alarm_for_each_block(watched):
    for n in range(1, 3):
        watched.add_callback(block)
        watched.add_callback(watched.add_callback, int)
        turn(watched, 3)
        watched.call_later(0.001, watched.stop)
        watched.start()
        assert len(watched.alarms) == n


def test_an_action_that_raises_ends_the_block(loop):
    def action(number, frame):
        raise Exit

    loop.set_blocking_signal_threshold(SHORT, action)
    loop.add_callback(block, 30)
    with pytest.raises(Exit):
        loop.start()
    assert not loop.running()


@pytest.mark.parametrize("way", ["stop", "exception"])
def test_E13_disarmed_on_every_exit(watched, way):
    """Score row 27."""
    watched.add_callback(watched.stop if way == "stop" else lambda: fail(Exit))
    if way == "stop":
        watched.start()
    else:
        with pytest.raises(Exit):
            watched.start()
    block()
    assert watched.alarms == []
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_none_turns_it_off_at_once(watched):
    def off():
        watched.set_blocking_signal_threshold(None, None)
        assert signal.getsignal(ALRM) == before
        block()

    before = signal.getsignal(ALRM)
    watched.add_callback(off)
    turn(watched)
    assert watched.alarms == []


def test_it_can_be_set_while_the_loop_runs(loop):
    alarms = []

    def on():
        loop.set_blocking_signal_threshold(SHORT, lambda *args: alarms.append(args))
        block()

    loop.add_callback(on)
    turn(loop)
    assert len(alarms) == 1
    alarms.clear()


def test_set_blocking_log_threshold(loop, expect_log):
    loop.set_blocking_log_threshold(SHORT)
    loop.add_callback(block)
    turn(loop)
    record = expect_log.take(
        r"(?s)^IOLoop blocked for 0\.020000 seconds in\n.*\bblock\b"
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
    loop.add_callback(block)
    turn(loop)
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
    watched.add_callback(block)
    turn(watched)
    assert len(watched.alarms) == 1


@pytest.mark.parametrize("args", [("1", None), (1, 1), (1, "kill"), ([], None)])
def test_thresholds_and_actions_of_wrong_types(loop, args):
    with pytest.raises(TypeError):
        loop.set_blocking_signal_threshold(*args)


def test_E18_main_thread_only(watched):
    """Checked before any state changes."""
    for args in ((SHORT, None), (None, None)):
        with pytest.raises(RuntimeError, match="main thread"):
            in_thread(watched.set_blocking_signal_threshold, *args)
    watched.add_callback(block)
    turn(watched)
    assert len(watched.alarms) == 1


def test_E18_a_loop_with_a_signal_threshold_runs_in_the_main_thread(watched):
    with pytest.raises(RuntimeError):
        in_thread(turn, watched)
    assert not watched.running()
    turn(watched)


def test_E16_E17_a_foreign_timer_and_handler_are_restored(loop):
    """An ITIMER_REAL of the program goes on, less the time that went by."""
    fired = []
    with alarm(60, lambda *_: fired.append(1), 7):
        mine = signal.getsignal(ALRM)
        loop.set_blocking_log_threshold(30)
        for _ in range(2):
            loop.call_later(0.01, loop.stop)
            loop.start()
            assert signal.getsignal(ALRM) is mine
            left, interval = signal.getitimer(signal.ITIMER_REAL)
            assert 0 < left < 59.995
            assert interval == 7
    assert fired == []


@pytest.mark.parametrize("way", ["stop", "exception"])
def test_E16_a_foreign_timer_still_fires(loop, way):
    fired = []
    with alarm(0.05, lambda *_: fired.append(1)):
        loop.set_blocking_log_threshold(30)
        loop.call_later(0.01, loop.stop if way == "stop" else lambda: fail(Exit))
        try:
            loop.start()
        except Exit:
            pass
        wait_until(lambda: fired)


def test_E17_signal_handlers_from_c_are_restored(loop):
    for handler in (signal.SIG_IGN, signal.SIG_DFL):
        with on_signal(ALRM, handler):
            loop.set_blocking_log_threshold(30)
            turn(loop)
            assert signal.getsignal(ALRM) == handler


def test_a_handler_set_while_the_loop_runs_stays(loop):
    with on_signal(ALRM, signal.SIG_IGN):
        loop.set_blocking_log_threshold(30)
        loop.add_callback(signal.signal, ALRM, fail)
        turn(loop)
        assert signal.getsignal(ALRM) is fail


def test_a_handler_set_while_there_is_no_action_stays(poller):
    poller.run(
        """
        import signal
        calls = []
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.set_blocking_signal_threshold(30, None)
            loop.add_callback(signal.signal, signal.SIGALRM, lambda *_: calls.append(1))
            loop.run_once(0)
        signal.raise_signal(signal.SIGALRM)
        assert calls == [1]
        """
    )


@pytest.mark.parametrize("value", [None, 5])
def test_E16_a_posix_timer_of_somebody_else_is_ignored(poller, value):
    """Its value is no address: that of timer_create(clock, NULL), or a number."""
    done = poller.run(
        f"""
        import ctypes, signal

        class Event(ctypes.Structure):
            _fields_ = [
                ("value", ctypes.c_void_p),
                ("number", ctypes.c_int),
                ("rest", ctypes.c_char * 52),
            ]

        class Times(ctypes.Structure):
            _fields_ = [("interval", ctypes.c_long * 2), ("left", ctypes.c_long * 2)]

        def begin():
            times.left[1] = 1_000_000
            assert not libc.timer_settime(timer, 0, ctypes.byref(times), None)
            wait()

        def wait():
            assert not libc.timer_gettime(timer, ctypes.byref(times))
            loop.add_callback(wait if any(times.left) else loop.stop)

        libc, timer, times = ctypes.CDLL(None), ctypes.c_void_p(), Times()
        value = {value}
        event = value and ctypes.byref(Event(value, signal.SIGALRM))
        assert not libc.timer_create(1, event, ctypes.byref(timer))
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.set_blocking_log_threshold(60)
            loop.add_callback(begin)
            loop.start()
        print("done")
        """
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize(
    "stuck",
    [
        pytest.param("sum(itertools.repeat(0))", id="c"),
        pytest.param("lock(mutex), lock(mutex)", id="mutex"),
        pytest.param("time.sleep(30)", id="sleep"),
        pytest.param("os.read(os.pipe()[0], 1)", id="read"),
        pytest.param("threading.Semaphore(0).acquire()", id="lock"),
        pytest.param("signal.sigwait([signal.SIGUSR1])", id="wait"),
    ],
)
def test_E20_no_action_kills_the_process(poller, stuck):
    """By SIGALRM, also when it is stuck in C code that never looks at signals."""
    code = f"""
        import ctypes, itertools, os, resource, signal, threading, time
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        lock = ctypes.PyDLL(None).pthread_mutex_lock
        mutex = ctypes.create_string_buffer(64)
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.set_blocking_signal_threshold(0.05, None)
            loop.add_callback(lambda: ({stuck}))
            loop.start()
        """
    done = poller.run(code, check=False)
    assert done.returncode == -ALRM
    assert "Traceback" not in done.stderr


def test_no_action_does_not_kill_a_loop_that_does_not_block(poller):
    poller.run(
        """
        import time
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.set_blocking_signal_threshold(0.02, None)
            for _ in range(3):
                loop.call_later(0.05, loop.stop)
                loop.start()
                end = time.monotonic() + 0.05
                while time.monotonic() < end:
                    pass
        """
    )


def test_E19_a_child_process_is_not_killed(poller):
    """The timer survives neither fork nor exec."""
    poller.run(
        """
        import os, subprocess, sys, time
        def spawn():
            code = "import time; time.sleep(0.1)"
            child = subprocess.Popen([sys.executable, "-c", code])
            pid = os.fork()
            if pid == 0:
                end = time.monotonic() + 0.1
                while time.monotonic() < end:
                    pass
                os._exit(0)
            children.append((child, pid))
            loop.stop()
        children = []
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.log_stack = lambda *args: None
            loop.set_blocking_log_threshold(0.02)
            loop.add_callback(spawn)
            loop.start()
        [(child, pid)] = children
        assert child.wait() == 0
        assert os.waitpid(pid, 0)[1] == 0
        """
    )


def test_E21_logging_while_the_logging_lock_is_held(loop, expect_log):
    """The callback that blocks holds the handler's lock: an RLock, no deadlock."""
    loop.set_blocking_log_threshold(SHORT)

    def hold():
        handler = logging.getLogger("ioloop").handlers[0]
        handler.acquire()
        try:
            block()
        finally:
            handler.release()

    loop.add_callback(hold)
    turn(loop)
    expect_log.take("blocked")


def test_E22_two_loops_with_watchdogs(make_loop, poller):
    """The inner one's alarms are its own, and the outer one's are restored."""
    outer, inner = make_loop(), make_loop(impl=poller.impl())
    alarms = []
    outer.set_blocking_signal_threshold(SHORT, lambda *_: alarms.append("outer"))
    inner.set_blocking_signal_threshold(SHORT, lambda *_: alarms.append("inner"))
    inner.add_callback(block)
    outer.add_callback(turn, inner)
    turn(outer)
    assert "inner" in alarms
    alarms.clear()
    outer.add_callback(block)
    turn(outer)
    assert alarms == ["outer"]


def test_foreign_sigalrms_reach_nobody_while_it_is_the_loops(watched):
    watched.add_callback(kill, ALRM)
    turn(watched)
    assert watched.alarms == []


def test_the_watchdog_makes_no_system_call_per_iteration(poller, shim):
    """What it costs a loop that makes progress is counted by the C library."""
    done = poller.run(
        """
        import ctypes
        library = ctypes.CDLL(None)
        calls = ctypes.c_int.in_dll(library, "timer_calls")
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.set_blocking_log_threshold(30)
            def again(n):
                if n:
                    loop.add_callback(again, n - 1)
                else:
                    loop.stop()
            loop.add_callback(again, 10000)
            loop.start()
        print(calls.value)
        """,
        LD_PRELOAD=shim,
    )
    assert int(done.stdout) < 20


# -- The watchdog of a loop in another thread ----------------------------------


def test_log_threshold_in_a_thread(loop, expect_log):
    """The same log, by a thread that watches; gone when the loop is."""
    before = set(threading.enumerate())
    loop.set_blocking_log_threshold(SHORT)
    loop.add_callback(block)
    in_thread(turn, loop)
    expect_log.take(r"(?s)^IOLoop blocked for 0\.020000 seconds in\n.*\bblock\b")
    assert set(threading.enumerate()) == before


def test_log_threshold_in_a_thread_is_silent(loop):
    loop.set_blocking_log_threshold(SHORT)
    loop.call_later(5 * SHORT, loop.stop)
    in_thread(loop.start)


def test_log_threshold_in_a_thread_set_while_it_runs(loop, expect_log):
    def on():
        loop.set_blocking_log_threshold(SHORT)
        block()
        loop.set_blocking_log_threshold(None)
        block()

    loop.add_callback(on)
    in_thread(turn, loop)
    expect_log.take("blocked")


@pytest.mark.parametrize("error", [Exit, None])
def test_the_watching_thread_ends_with_the_run(loop, error):
    before = set(threading.enumerate())
    loop.set_blocking_log_threshold(60)
    loop.add_callback(fail, error) if error else loop.add_callback(loop.stop)
    if error:
        with pytest.raises(error):
            in_thread(loop.start)
    else:
        in_thread(loop.start)
    assert set(threading.enumerate()) == before


def test_recorder_of_a_watched_loop(watched):
    """I/O is as before."""
    calls = Recorder()
    with readable() as (a, _):
        watched.add_handler(a, calls, READ)
        turn(watched, 2)
        watched.remove_handler(a)
    assert len(calls) == 2


def test_idle_and_watched_makes_no_system_call(poller, shim):
    """The timer rests while the loop sleeps."""
    done = poller.run(
        """
        import ctypes
        calls = ctypes.c_int.in_dll(ctypes.CDLL(None), "timer_calls")
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.set_blocking_log_threshold(0.004)
            loop.call_later(0.1, loop.stop)
            loop.start()
            print(calls.value + loop.stats()["polls"])
        """,
        LD_PRELOAD=shim,
    )
    assert int(done.stdout) < 10
