"""Signals while the loop sleeps and works, the wakeup fd, and the watchdog."""

import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time

import pytest
from helpers import READ, Recorder, ScriptedPoller, pair, turn
from support import (
    FOREVER,
    Exit,
    Thread,
    alarm,
    compile_library,
    fail,
    in_thread,
    is_asleep,
    on_signal,
    pend,
    readable,
    wait_until,
)

import ioloop

USR1, INT, ALRM = signal.SIGUSR1, signal.SIGINT, signal.SIGALRM


def when_asleep(function, *args):
    """Call it in a thread, once the main thread sleeps in a poll."""
    main = threading.main_thread()

    def wait():
        wait_until(lambda: is_asleep(main))
        function(*args)

    return Thread(wait)


def kill(number=INT):
    os.kill(os.getpid(), number)


# -- Ctrl-C --------------------------------------------------------------------


def test_D6_interrupt_while_asleep(loop):
    loop.call_later(FOREVER, fail)
    thread = when_asleep(kill)
    with pytest.raises(KeyboardInterrupt):
        loop.start()
    thread.join()
    assert not loop.running()
    turn(loop)


@pytest.mark.parametrize("where", ["callback", "timeout", "handler"])
def test_D6_interrupt_in_user_code(loop, where):
    log = []

    def interrupt(*_):
        kill()
        for _ in range(1000):
            pass
        log.append("not reached")

    with readable() as (a, _):
        if where == "callback":
            loop.add_callback(interrupt)
        elif where == "timeout":
            loop.call_later(0, interrupt)
        else:
            loop.add_handler(a, interrupt, READ)
        loop.add_callback(int)
        with pytest.raises(KeyboardInterrupt):
            loop.start()
        loop.remove_handler(a)
    assert log == []


@pytest.mark.parametrize("position", range(6))
def test_D5_interrupt_pending_in_c_loses_nothing(loop, position):
    """The handler runs at a safe point: every callback runs exactly once."""
    log = []
    with readable() as (a, _):
        loop.add_handler(a, lambda *_: log.append("h"), READ)
        for i in range(6):
            if i == position:
                loop.add_callback(*pend(INT))
            loop.add_callback(log.append, i)
            loop.call_later(0, log.append, i + 10)
        with pytest.raises(KeyboardInterrupt):
            loop.start()
        turn(loop, 2)
        loop.remove_handler(a)
    assert [i for i in log if i != "h"] == [*range(6), *range(10, 16)]
    assert "h" in log


@pytest.mark.parametrize("watchdog", [False, True])
def test_D5_interrupt_pending_when_the_loop_stops(loop, watchdog):
    """Wherever it surfaces, the loop is left clean."""
    if watchdog:
        loop.set_blocking_log_threshold(60)
    loop.add_callback(loop.stop)
    loop.add_callback(*pend(INT))
    with pytest.raises(KeyboardInterrupt):
        loop.start()
        for _ in range(1000):
            pass
    assert not loop.running()
    assert signal.set_wakeup_fd(-1) == -1
    loop.add_callback(loop.stop)
    loop.start()


def test_interrupt_of_a_loop_in_a_thread(loop):
    """Signals are the main thread's: the other loop is not disturbed."""
    thread = Thread(loop.start)
    wait_until(loop.running)
    with pytest.raises(KeyboardInterrupt):
        kill()
        time.sleep(10)
    loop.stop()
    thread.join()


# -- Signals while the loop sleeps ---------------------------------------------


def test_E9_the_loop_sleeps_on_after_a_signal(loop):
    """Handled at once; the timeout is neither early nor started over."""
    times = []
    start = time.monotonic()
    loop.call_later(0.05, loop.stop)
    with on_signal(USR1, lambda *_: times.append(time.monotonic() - start)):
        thread = when_asleep(kill, USR1)
        loop.start()
        took = time.monotonic() - start
        thread.join()
    assert len(times) == 1
    assert 0.05 <= took < 20


def test_E9_a_storm_of_signals_postpones_nothing(loop):
    """EINTR with the full timeout again and again would be for ever."""
    signals = []
    start = time.monotonic()
    with alarm(0.0002, lambda *_: signals.append(1), 0.0002):
        loop.call_later(0.05, loop.stop)
        loop.start()
    assert 0.05 <= time.monotonic() - start < 10
    assert len(signals) > 5


def test_E9_a_storm_where_no_doorbell_ends_the_poll(loop, foreign):
    """Somebody else has the wakeup fd: each EINTR leaves the rest of the time."""
    end = time.monotonic() + 3

    def handler(*_):
        if time.monotonic() > end:
            signal.setitimer(signal.ITIMER_REAL, 0)

    with alarm(0.001, handler, 0.001):
        loop.call_later(0.05, loop.stop)
        loop.start()
    assert time.monotonic() < end


def test_E10_a_signal_handler_that_raises(loop):
    log = []
    loop.call_later(FOREVER, fail)
    with on_signal(USR1, lambda *_: fail(ZeroDivisionError)):
        thread = when_asleep(kill, USR1)
        with pytest.raises(ZeroDivisionError):
            loop.start()
        thread.join()
    assert not loop.running()
    loop.add_callback(log.append, 1)
    turn(loop)
    assert log == [1]


@pytest.mark.parametrize("method", ["add_callback", "add_callback_from_signal"])
def test_a_callback_from_a_signal_handler(loop, method):
    loop.call_later(FOREVER, fail)
    with on_signal(USR1, lambda *_: getattr(loop, method)(loop.stop)):
        thread = when_asleep(kill, USR1)
        loop.start()
        thread.join()


def test_E8_a_signal_that_another_thread_gets(loop):
    """The doorbell wakes the main thread, whose handler it is."""
    loop.call_later(FOREVER, fail)
    with on_signal(USR1, lambda *_: loop.stop()):

        def to_itself():
            signal.pthread_kill(threading.get_ident(), USR1)

        thread = when_asleep(to_itself)
        loop.start()
        thread.join()


def test_E26_a_signal_inside_a_conversion(loop):
    """The handler changes the heap in the middle of add_timeout."""
    log = []

    class Deadline:
        def __float__(self):
            signal.raise_signal(USR1)
            return 0.0

    def handler(*_):
        for handle in handles:
            handle.cancel()
        loop.call_later(0, log.append, "signal")

    with on_signal(USR1, handler):
        handles = [loop.call_later(0, fail) for _ in range(50)]
        loop.add_timeout(Deadline(), log.append, "timeout")
    turn(loop)
    assert sorted(log) == ["signal", "timeout"]


def test_E2_many_signals_are_one_ring(loop):
    log = []
    numbers = [USR1, signal.SIGUSR2, signal.SIGHUP]
    old = [signal.signal(n, lambda n, _: log.append(n)) for n in numbers]
    try:
        for number in numbers:
            loop.add_callback(*pend(number))
        turn(loop, 2)
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)
    assert sorted(log) == sorted(numbers)


def test_E2_a_signal_whose_ring_is_drained_with_an_older_one():
    """Its handler runs before the next poll, which would wait for ever."""
    impl = ScriptedPoller()
    with pair() as (a, _), ioloop.IOLoop(impl=impl) as loop:
        loop.add_handler(a.fileno(), functools.partial(*pend(USR1)), READ)
        impl.batches.append([(a.fileno(), READ), (impl.waker, READ)])
        with on_signal(USR1, lambda *_: loop.stop()):
            loop.start()
        assert len(impl.polls) == 1
        loop.remove_handler(a)


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/time.h>
#include <time.h>

/* The n-th wait that may last raises a signal first, in its own thread. */
int window_countdown, window_signal;
/* How often a timer was set. */
int timer_calls;

static void wait_is_next(int waits) {
    if (waits && window_countdown && --window_countdown == 0)
        raise(window_signal);
}
static int waits(const struct timespec *t) { return !t || t->tv_sec || t->tv_nsec; }

#define REAL(name) static __typeof__(name) *real; \
    if (!real) real = dlsym(RTLD_NEXT, #name)

int epoll_wait(int ep, struct epoll_event *e, int n, int ms) {
    REAL(epoll_wait);
    wait_is_next(ms != 0);
    return real(ep, e, n, ms);
}
int epoll_pwait2(int ep, struct epoll_event *e, int n, const struct timespec *t,
                 const sigset_t *m) {
    REAL(epoll_pwait2);
    wait_is_next(waits(t));
    return real(ep, e, n, t, m);
}
int pselect(int n, fd_set *r, fd_set *w, fd_set *x, const struct timespec *t,
            const sigset_t *m) {
    REAL(pselect);
    wait_is_next(waits(t));
    return real(n, r, w, x, t, m);
}
int poll(struct pollfd *p, nfds_t n, int ms) {
    REAL(poll);
    wait_is_next(ms != 0);
    return real(p, n, ms);
}
int ppoll(struct pollfd *p, nfds_t n, const struct timespec *t, const sigset_t *m) {
    REAL(ppoll);
    wait_is_next(waits(t));
    return real(p, n, t, m);
}
int setitimer(__itimer_which_t which, const struct itimerval *v, struct itimerval *o) {
    REAL(setitimer);
    timer_calls++;
    return real(which, v, o);
}
int timer_settime(timer_t t, int f, const struct itimerspec *v, struct itimerspec *o) {
    REAL(timer_settime);
    timer_calls++;
    return real(t, f, v, o);
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """A library to preload, which sees the calls that wait and that set timers."""
    directory = tmp_path_factory.mktemp("shim")
    source = directory / "shim.c"
    source.write_text(SHIM)
    return str(compile_library(source, directory / "shim.so"))


@pytest.mark.parametrize("number", ["SIGUSR1", "SIGINT"])
def test_E1_a_signal_between_the_check_and_the_poll(poller, shim, number):
    """Score row 16: answered at once, not after the hour that the poll waits."""
    poller.run(
        f"""
        import ctypes, signal, time
        signal.signal(signal.SIGUSR1, lambda *_: loop.stop())
        library = ctypes.CDLL(None)
        ctypes.c_int.in_dll(library, "window_signal").value = signal.{number}
        countdown = ctypes.c_int.in_dll(library, "window_countdown")
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.call_later(3600, print)
            for n in range(3):
                countdown.value = 1
                try:
                    loop.start()
                except KeyboardInterrupt:
                    assert {number == "SIGINT"}
                else:
                    assert {number == "SIGUSR1"}
                assert countdown.value == 0
        """,
        LD_PRELOAD=shim,
    )


@pytest.mark.parametrize("poller", ["epoll", "select"], indirect=True)
def test_E1_between_the_check_and_the_poll_without_a_wakeup_fd(poller, shim):
    """Somebody else has it: nothing but the poll's signal mask is left."""
    poller.run(
        """
        import ctypes, signal, socket, time
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGUSR1, lambda *_: loop.stop())
        library = ctypes.CDLL(None)
        ctypes.c_int.in_dll(library, "window_signal").value = signal.SIGUSR1
        countdown = ctypes.c_int.in_dll(library, "window_countdown")
        with ours, theirs, ioloop.IOLoop(impl=impl()) as loop:
            loop.call_later(20, int)
            for n in range(3):
                countdown.value = 1
                start = time.monotonic()
                loop.start()
                assert countdown.value == 0
                assert time.monotonic() - start < 10
            signal.set_wakeup_fd(-1)
        """,
        LD_PRELOAD=shim,
    )


# -- The wakeup fd -------------------------------------------------------------


@pytest.fixture
def foreign():
    """Somebody else's wakeup fd."""
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        assert signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False) == -1
        try:
            yield reader, writer
        finally:
            signal.set_wakeup_fd(-1)


def wakeup_fd():
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    return fd


@pytest.mark.parametrize("error", [None, Exit])
def test_E5_wakeup_fd_is_set_and_restored(loop, error):
    seen = []
    loop.add_callback(lambda: seen.append(wakeup_fd()))
    loop.add_callback(fail, error) if error else loop.add_callback(loop.stop)
    if error:
        with pytest.raises(error):
            loop.start()
    else:
        loop.start()
    assert seen[0] > 2
    assert wakeup_fd() == -1


@pytest.mark.parametrize("error", [None, Exit])
def test_E5_a_foreign_wakeup_fd_is_respected(loop, foreign, error):
    reader, writer = foreign
    seen = []
    loop.add_callback(lambda: seen.append(wakeup_fd()))
    with on_signal(USR1, lambda *_: None):
        loop.add_callback(signal.raise_signal, USR1)
        loop.add_callback(fail, error) if error else loop.add_callback(loop.stop)
        if error:
            with pytest.raises(error):
                loop.start()
        else:
            loop.start()
    assert reader.recv(10) == bytes([USR1])
    assert seen == [writer.fileno()]
    assert wakeup_fd() == writer.fileno()


def test_E5_pending_before_the_sleep_with_a_foreign_wakeup_fd(loop, foreign):
    """Its ring is somebody else's: the loop looks before it sleeps."""
    late = loop.call_later(5, loop.stop)
    with on_signal(USR1, lambda *_: loop.stop()):
        loop.add_callback(*pend(USR1))
        loop.start()
    assert late.callback is not None


def test_E5_a_signal_interrupts_with_a_foreign_wakeup_fd(loop, foreign):
    late = loop.call_later(5, loop.stop)
    with on_signal(USR1, lambda *_: loop.stop()):
        thread = when_asleep(kill, USR1)
        loop.start()
        thread.join()
    assert late.callback is not None


def test_E5_a_wakeup_fd_set_while_the_loop_runs_stays(loop, foreign):
    _, writer = foreign
    signal.set_wakeup_fd(-1)
    loop.add_callback(
        lambda: signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    )
    turn(loop)
    assert wakeup_fd() == writer.fileno()


def test_E5_a_foreign_wakeup_fd_that_is_full_stays_quiet(
    loop, foreign, capsys, monkeypatch
):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    _, writer = foreign
    for size in (1 << 16, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                writer.send(bytes(size))
    with on_signal(USR1, lambda *_: None):
        loop.add_callback(signal.raise_signal, USR1)
        turn(loop)
        signal.raise_signal(USR1)
    assert (capsys.readouterr().err, unraisable) == ("", [])


def test_E5_a_loop_inside_another_has_a_doorbell_of_its_own(make_loop, poller):
    """The outer loop's wakeup fd is not somebody else's."""
    outer, inner = make_loop(), make_loop(impl=poller.impl())
    seen = []

    def nested():
        seen.append(wakeup_fd())
        inner.add_callback(lambda: seen.append(wakeup_fd()))
        turn(inner)
        seen.append(wakeup_fd())

    outer.add_callback(nested)
    turn(outer)
    assert seen[0] == seen[2] != seen[1]
    assert min(seen) > 2
    assert wakeup_fd() == -1


def test_E6_a_loop_in_a_thread_leaves_it_alone(loop, foreign):
    _, writer = foreign
    in_thread(turn, loop)
    assert wakeup_fd() == writer.fileno()


def test_E7_no_wakeup_fd_is_left_at_a_closed_loop(loop):
    turn(loop)
    loop.close()
    assert wakeup_fd() == -1
    with on_signal(USR1, lambda *_: None):
        signal.raise_signal(USR1)


def test_E3_a_pipe_that_signals_have_filled(loop):
    """Each has rung while the loop was at work; nothing is said of it, and whoever
    rings then is heard."""
    count, log = 70_000, []

    def storm():
        for _ in range(count):
            signal.raise_signal(USR1)
        threads.append(Thread(loop.add_callback, loop.stop))
        threads[0].join()

    threads = []
    with on_signal(USR1, lambda *_: log.append(1)):
        loop.add_callback(storm)
        loop.add_callback(*pend(USR1))
        loop.start()
        assert len(log) == count + 1
        thread = when_asleep(loop.stop)
        loop.start()
        thread.join()


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
