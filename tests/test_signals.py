"""Signals while the loop sleeps and works, the wakeup fd, and the watchdog."""

import contextlib
import functools
import signal
import socket
import sys
import threading
import time

import pytest
from helpers import READ, ScriptedPoller, pair, turn
from support import (
    FOREVER,
    Exit,
    Thread,
    alarm,
    fail,
    in_thread,
    kill,
    on_signal,
    pend,
    readable,
    wait_until,
    when_asleep,
)

import ioloop

USR1, INT = signal.SIGUSR1, signal.SIGINT


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
