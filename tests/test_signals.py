"""Signals while the loop sleeps and works, and the wakeup fd."""

import asyncio
import contextlib
import fcntl
import functools
import operator
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from fakes import (
    FOREVER,
    READ,
    Exit,
    ScriptedPoller,
    fail,
    in_time,
    run_callback,
    spin_guard,
    start_until,
    turn,
)
from kernel import alarm, kill, on_signal, pair, pend, pipe, readable
from processes import Thread, in_thread, sleeping, wait_until, when_asleep

import ioloop

USR1, USR2, INT = signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT
QUEUED = signal.SIGRTMIN  # the kernel never makes one signal of two


def in_a_row(*functions):
    """Call them with no bytecode in between, which would handle a pending signal."""
    return list(map(operator.methodcaller("__call__"), functions))


def signal_to_itself(number=USR1):
    """Not the main thread gets the signal, though the handler runs there."""
    signal.pthread_kill(threading.get_ident(), number)


def ignore(*_):
    pass


def wakeup_fd():
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    return fd


@pytest.fixture
def foreign():
    """Somebody else's wakeup fd."""
    with pair() as (reader, writer):
        assert signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False) == -1
        try:
            yield reader, writer
        finally:
            signal.set_wakeup_fd(-1)


@pytest.fixture(params=["nobody", "somebody"])
def owner(request):
    """Whose wakeup fd is there before the loop's; the end to read of that, or None."""
    if request.param == "somebody":
        return request.getfixturevalue("foreign")[0]


# -- Ctrl-C --------------------------------------------------------------------


@pytest.mark.row("D6")
def test_interrupt_while_asleep(loop):
    loop.call_later(FOREVER, fail)
    with when_asleep(kill), pytest.raises(KeyboardInterrupt):
        loop.start()
    assert not loop.running()
    turn(loop)


@pytest.mark.row("D6")
@pytest.mark.parametrize("where", ["callback", "timeout", "handler"])
def test_interrupt_in_user_code(loop, where):
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


@pytest.mark.row("D5")
@pytest.mark.parametrize("position", range(6))
def test_interrupt_pending_in_c_loses_nothing(loop, position):
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


@pytest.mark.row("D5")
@pytest.mark.parametrize("watchdog", [False, True])
def test_interrupt_pending_when_the_loop_stops(loop, watchdog):
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
    with sleeping(loop), pytest.raises(KeyboardInterrupt):
        kill()
        time.sleep(10)


# -- Signals while the loop sleeps ---------------------------------------------


@pytest.mark.row("E9")
def test_the_loop_sleeps_on_after_a_signal(loop):
    """Handled at once; the timeout is neither early nor started over."""
    times = []
    start = time.monotonic()
    loop.call_later(0.05, loop.stop)
    with on_signal(USR1, lambda *_: times.append(time.monotonic() - start)):
        with when_asleep(kill, USR1):
            loop.start()
            took = time.monotonic() - start
    assert len(times) == 1
    assert 0.05 <= took < 20


@pytest.mark.row("E9")
@pytest.mark.parametrize("gap", [0.0002, 0.001])
def test_a_storm_of_signals_postpones_nothing(loop, owner, gap):
    """EINTR with the full timeout again and again would be for ever.

    With a foreign wakeup fd each signal ends the poll, and leaves the rest of the time.
    """
    signals, start = [], time.monotonic()

    def handler(*_):
        signals.append(1)
        if time.monotonic() > start + 10:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def end():  # a machine that is busy may have had no time for signals
        loop.stop() if len(signals) > 5 else loop.call_later(0.05, end)

    with alarm(gap, handler, gap):
        loop.call_later(0.05, end)
        loop.start()
    assert 0.05 <= time.monotonic() - start < 10


@pytest.mark.row("E10")
def test_a_signal_handler_that_raises(loop):
    log = []
    loop.call_later(FOREVER, fail)
    with on_signal(USR1, lambda *_: fail(ZeroDivisionError)):
        with when_asleep(kill, USR1), pytest.raises(ZeroDivisionError):
            loop.start()
    assert not loop.running()
    run_callback(loop, log.append, 1)
    assert log == [1]


@pytest.mark.row("E5", "E8")
@pytest.mark.parametrize("whose", [kill, signal_to_itself])
@pytest.mark.parametrize("method", ["stop", "add_callback", "add_callback_from_signal"])
def test_a_signal_handler_wakes_the_loop(loop, owner, whose, method):
    """Whichever thread the kernel gives it to; the handler is the main one's."""

    def handler(*_):
        getattr(loop, method)(*(() if method == "stop" else (loop.stop,)))

    with on_signal(USR1, handler), in_time(loop), when_asleep(whose, USR1):
        loop.start()
    assert owner is None or owner.recv(10) == bytes([USR1])


@pytest.mark.row("E26")
def test_a_signal_inside_a_conversion(loop):
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


@pytest.mark.row("E2")
def test_many_signals_are_one_ring(loop):
    log = []
    numbers = [USR1, USR2, signal.SIGHUP]
    with contextlib.ExitStack() as handlers:
        for number in numbers:
            handlers.enter_context(on_signal(number, lambda n, _: log.append(n)))
            loop.add_callback(*pend(number))
        turn(loop, 2)
    assert sorted(log) == sorted(numbers)


@pytest.mark.row("E2")
def test_a_signal_whose_ring_is_drained_with_an_older_one():
    """Its handler runs before the next wait, which would be for ever."""
    impl = ScriptedPoller()
    with pair() as (a, _), ioloop.IOLoop(impl=impl) as loop:
        loop.add_handler(a.fileno(), functools.partial(*pend(USR1)), READ)
        impl.batches.append([(a.fileno(), READ), (impl.waker, READ)])
        with on_signal(USR1, lambda *_: loop.stop()):
            loop.start()
        assert set(impl.polls[1:]) <= {0}
        loop.remove_handler(a)


@pytest.mark.row("E1")
@pytest.mark.parametrize("foreign_wakeup_fd", [False, True])
@pytest.mark.parametrize("number", ["SIGUSR1", "SIGINT"])
def test_a_signal_between_the_check_and_the_poll(
    poller, shim, number, foreign_wakeup_fd
):
    """Handled at once, not after the hour that the poll waits."""
    poller.run(
        f"""
        import ctypes, signal, socket
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        if {foreign_wakeup_fd}:
            signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGUSR1, lambda *_: loop.stop())
        library = ctypes.CDLL(None)
        ctypes.c_int.in_dll(library, "window_signal").value = signal.{number}
        countdown = ctypes.c_int.in_dll(library, "window_countdown")
        with ours, theirs, ioloop.IOLoop(impl=impl()) as loop:
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
                if {foreign_wakeup_fd}:
                    assert ours.recv(10) == bytes([signal.{number}])
            signal.set_wakeup_fd(-1)
        """,
        LD_PRELOAD=shim,
    )


@pytest.mark.parametrize("way", ["start", "run_once"])
def test_a_signal_that_is_pending_at_the_start(loop, way):
    """It came before the wakeup fd was ours, and its handler has not run."""
    with on_signal(USR1, lambda *_: loop.stop()), in_time(loop):
        in_a_row(functools.partial(*pend(USR1)), getattr(loop, way))
        turn(loop)


@pytest.mark.row("B7", "E5")
@pytest.mark.parametrize("reset", [False, True])
def test_a_signal_that_is_pending_before_the_sleep(loop, owner, reset):
    """Raised in C between two callbacks, also when one has reset the wakeup fd."""
    if reset:
        loop.add_callback(signal.set_wakeup_fd, -1)
    loop.add_callback(*pend(USR1))
    with on_signal(USR1, lambda *_: loop.stop()), in_time(loop):
        loop.start()


# A signal at each call into the C library, one after the other.  The prelude's
# at_every_call(function) calls `function` with a signal at its first call, its second
# and so on; what is left is for the test.
AT_EVERY_CALL = """
    import ctypes, os, signal, socket, subprocess, time

    class Exit(BaseException):
        pass

    library = ctypes.CDLL(None)
    countdown = ctypes.c_int.in_dll(library, "call_countdown")
    ctypes.c_int.in_dll(library, "window_signal").value = signal.SIGUSR1

    def at_every_call(function):
        n = 0
        while countdown.value == 0:
            n += 1
            countdown.value = n
            function()
            if countdown.value == 0:
                yield n
        countdown.value = 0
        assert n > 3, n

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno())
    loop = ioloop.IOLoop(impl=impl())
"""
AT_THE_END = """
    loop.close()
    signal.set_wakeup_fd(-1)
    ours.close()
    theirs.close()
"""


def test_embedded_a_signal_at_any_system_call_reaches_the_host(poller, shim):
    """Its wakeup fd gets each one once, whatever run_once() is doing."""
    poller.run(
        AT_EVERY_CALL
        + """
    def once():
        loop.add_callback(signal.raise_signal, signal.SIGUSR2)
        loop.run_once(0.001)

    signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
    signal.signal(signal.SIGUSR2, lambda number, _: handled.append(number))
    handled = []
    for n in at_every_call(once):
        assert sorted(handled) == [signal.SIGUSR1, signal.SIGUSR2], n
        assert sorted(ours.recv(100)) == sorted(handled), n
        handled.clear()
    ours.recv(100)
    """
        + AT_THE_END,
        LD_PRELOAD=shim,
    )


def test_no_handler_runs_masked_at_any_system_call(poller, shim):
    """Nor does a child process that it starts."""
    poller.run(
        AT_EVERY_CALL
        + """
    def handler(*_):
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
        grep = ["grep", "SigBlk", "/proc/self/status"]
        done = subprocess.run(grep, capture_output=True, env={})  # nothing preloaded
        masks.add(done.stdout.split()[1])

    signal.signal(signal.SIGUSR1, handler)
    masks = set()
    for _ in at_every_call(lambda: loop.run_once(0.001)):
        pass
    assert masks == {b"0000000000000000"}
    """
        + AT_THE_END,
        LD_PRELOAD=shim,
    )


@pytest.mark.parametrize("way", ["unwatched", "log", "signal"])
def test_a_handler_that_raises_at_any_system_call_leaves_all_clean(poller, shim, way):
    """The wakeup fd, SIGALRM's handler and the threads are as before the run."""
    poller.run(
        AT_EVERY_CALL
        + f"""
    if "{way}" == "log":
        loop.set_blocking_log_threshold(60)
    elif "{way}" == "signal":
        loop.set_blocking_signal_threshold(60, print)

    def handler(*_):
        raise Exit

    def once():
        try:
            loop.run_once(0.001)
            for _ in range(100):
                pass
        except Exit:
            raised.append(1)

    signal.signal(signal.SIGUSR1, handler)
    raised = []
    threads = len(os.listdir("/proc/self/task"))  # qemu has one of its own
    for n in at_every_call(once):
        assert signal.set_wakeup_fd(theirs.fileno()) == theirs.fileno(), n
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL, n
        assert not loop.running(), n
        end = time.monotonic() + 10
        while len(os.listdir("/proc/self/task")) > threads:
            assert time.monotonic() < end, n
            time.sleep(0.001)
    assert raised
    """
        + AT_THE_END,
        LD_PRELOAD=shim,
    )


def signal_masks():
    """The lines of a new process's status about its signals."""
    command = ["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]
    return subprocess.check_output(command, text=True)


@pytest.mark.row("E25")
def test_children_get_the_signal_mask_that_was(loop, owner):
    """Started by a callback, by a thread and a handler while the loop sleeps."""
    log, expected = [], signal_masks()

    def spawn_while_asleep():
        log.append(signal_masks())
        signal_to_itself()

    def handler(*_):
        log.append(signal_masks())
        loop.stop()

    loop.add_callback(lambda: log.append(signal_masks()))
    with on_signal(USR1, handler), in_time(loop), when_asleep(spawn_while_asleep):
        loop.start()
    log.append(signal_masks())
    assert log == [expected] * 4


# -- The wakeup fd -------------------------------------------------------------


@pytest.mark.row("E5")
@pytest.mark.parametrize("error", [None, Exit])
def test_the_wakeup_fd_is_set_and_restored(loop, owner, error):
    """The loop uses its own, hands the signals on, and gives the other back."""
    seen, before = [], wakeup_fd()
    loop.add_callback(lambda: seen.append(wakeup_fd()))
    loop.add_callback(signal.raise_signal, USR1)
    with on_signal(USR1, ignore):
        start_until(loop, error)
    assert owner is None or owner.recv(10) == bytes([USR1])
    assert before != seen[0] > 2
    assert wakeup_fd() == before


def test_the_loop_may_watch_a_foreign_wakeup_fd_itself(loop, foreign):
    """What it hands on wakes it a second time, and no third."""
    reader, _ = foreign
    loop.add_handler(reader, lambda *_: loop.stop(), READ)
    with on_signal(USR1, ignore), in_time(loop), when_asleep(signal_to_itself):
        loop.start()
    loop.remove_handler(reader)
    assert reader.recv(10) == bytes([USR1])


@pytest.mark.row("E5")
def test_a_wakeup_fd_set_while_the_loop_runs_stays(loop, foreign):
    _, writer = foreign
    signal.set_wakeup_fd(-1)
    loop.add_callback(
        lambda: signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    )
    turn(loop)
    assert wakeup_fd() == writer.fileno()


def reset_wakeup_fd():
    signal.set_wakeup_fd(-1)


def run_asyncio():
    """It resets the wakeup fd in the end."""

    async def main():
        asyncio.get_running_loop().add_signal_handler(USR2, int)

    asyncio.run(main())


def close_unset():
    """Set a wakeup fd and close it, far away from the numbers that are used next."""
    with pipe() as (_, writer):
        far = fcntl.fcntl(writer, fcntl.F_DUPFD_CLOEXEC, 500)
        signal.set_wakeup_fd(far, warn_on_full_buffer=False)
        os.close(far)


@pytest.mark.parametrize(
    ("meddle", "delay"),
    [
        (reset_wakeup_fd, 0),
        (run_asyncio, 0),
        # Python itself complains of a closed one, until the loop finds it.
        (close_unset, 0.1),
    ],
)
def test_a_signal_wakes_the_loop_whatever_a_callback_did(loop, meddle, delay):
    """To the wakeup fd: the loop takes it again when it sleeps."""
    threads = []
    loop.add_callback(meddle)
    loop.call_later(delay, lambda: threads.append(when_asleep(signal_to_itself)))
    with on_signal(USR1, lambda *_: loop.stop()), in_time(loop):
        loop.start()
        threads[0].join()
    assert wakeup_fd() == -1


def test_a_wakeup_fd_that_a_callback_sets_gets_every_signal(loop, foreign):
    """While it is there, when the loop has taken its place, and afterwards."""
    reader, writer = foreign
    signal.set_wakeup_fd(-1)
    loop.add_callback(signal.set_wakeup_fd, writer.fileno(), warn_on_full_buffer=False)
    loop.add_callback(signal.raise_signal, USR2)
    with on_signal(USR1, lambda *_: loop.stop()), on_signal(USR2, ignore):
        with in_time(loop), when_asleep(signal_to_itself):
            loop.start()
        signal.raise_signal(USR2)
    assert reader.recv(10) == bytes([USR2, USR1, USR2])
    assert wakeup_fd() == writer.fileno()


def test_a_loop_that_can_not_be_woken_does_not_start(poller):
    """Its pipe was closed: an error, and the wakeup fd is the program's as before."""
    poller.run(
        """
        import os, signal, socket
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        with ours, theirs:
            first = os.dup(0)
            os.close(first)
            loop = ioloop.IOLoop(impl=impl())
            for fd in range(first, first + 10):
                link = f"/proc/self/fd/{fd}"
                if os.path.exists(link) and os.readlink(link).startswith("pipe:"):
                    os.close(fd)
            loop.call_later(0.01, loop.stop)
            try:
                loop.start()
            except OSError:
                assert signal.set_wakeup_fd(-1) == theirs.fileno()
            else:
                raise AssertionError
            loop.close()
        """
    )


def test_a_stop_by_a_signal_while_run_once_ends_is_for_the_next(loop):
    """The stop() of a callback was for this one, which leaves because of it."""
    loop.set_blocking_log_threshold(60)
    with on_signal(USR1, lambda *_: loop.stop()):
        loop.add_callback(loop.stop)
        loop.add_callback(*pend(USR1))
        loop.run_once(0)
    polls = loop.stats()["polls"]
    loop.run_once(0)
    loop.run_once(0)
    assert loop.stats()["polls"] - polls == 1


def test_a_callback_that_borrows_the_wakeup_fd_gives_the_loop_its_own(loop, foreign):
    reader, writer = foreign
    signal.set_wakeup_fd(-1)

    def borrow():
        old = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        signal.raise_signal(USR1)
        signal.set_wakeup_fd(old, warn_on_full_buffer=False)

    loop.add_callback(borrow)
    with on_signal(USR1, ignore):
        turn(loop)
        assert wakeup_fd() == -1
        signal.raise_signal(USR1)
    assert reader.recv(10) == bytes([USR1])


@pytest.mark.parametrize("reused", [False, True])
def test_a_foreign_wakeup_fd_that_was_closed_is_not_given_back(loop, capsys, reused):
    """Nor is the file that has its number now, which would block."""
    with pipe() as (_, writer), on_signal(USR1, ignore):
        signal.set_wakeup_fd(writer)
        loop.add_callback(signal.raise_signal, USR1)
        loop.add_callback(os.close, writer)
        if reused:
            loop.add_callback(os.dup2, 0, writer)
        turn(loop)
        assert signal.set_wakeup_fd(-1) == -1
    assert capsys.readouterr().err == ""


def test_embedded_in_a_host_that_owns_the_wakeup_fd(loop, foreign):
    """In the order in which they came, from inside of run_once() and in between."""
    numbers = [USR1, USR2, USR1, USR1, USR2, USR2] * 10
    with on_signal(USR1, ignore), on_signal(USR2, ignore):
        for i, number in enumerate(numbers):
            if i % 3:
                loop.add_callback(signal.raise_signal, number)
            else:
                turn(loop)
                signal.raise_signal(number)
        turn(loop)
    assert foreign[0].recv(100) == bytes(numbers)


@pytest.mark.parametrize("count", [500, pytest.param(40_000, marks=pytest.mark.slow)])
def test_embedded_in_asyncio_no_signal_is_lost(loop, count):
    async def main():
        host = asyncio.get_running_loop()
        host.add_signal_handler(QUEUED, handled.append, 1)
        sender = Thread(send)
        while len(handled) < count and sender.is_alive():
            loop.run_once(0.0001)
            await asyncio.sleep(0)
        sender.join()

    def send():
        for n in range(count):
            kill(QUEUED)
            # asyncio's wakeup fd has room for 278.
            wait_until(lambda n=n: len(handled) > n - 50)
        wait_until(lambda: len(handled) == count)

    handled = []
    asyncio.run(main())
    assert len(handled) == count


def test_more_signals_than_one_read_of_the_pipe_takes(loop):
    """They come in the last callback, and all reach the foreign wakeup fd."""

    def storm():
        for _ in range(600):
            signal.raise_signal(QUEUED)
        loop.stop()

    with pipe() as (reader, writer), on_signal(QUEUED, lambda *_: None):
        signal.set_wakeup_fd(writer)
        loop.add_callback(storm)
        loop.start()
        assert signal.set_wakeup_fd(-1) == writer
        assert os.read(reader, 1000) == bytes([QUEUED]) * 600


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("count", [300, pytest.param(40_000, marks=pytest.mark.slow)])
def test_a_storm_with_a_foreign_wakeup_fd_loses_no_signal(make_loop, count, nested):
    """At random moments and to any thread; each one wakes the loop."""

    def receive():
        with contextlib.suppress(BlockingIOError):
            received.extend(os.read(reader, 1000))

    def send():
        try:
            for n in range(count):
                kill(QUEUED) if n % 2 else signal_to_itself(QUEUED)
                wait_until(lambda n=n: len(handled) > n)
                receive()
        finally:
            loop.stop()

    handled, received = [], bytearray()
    outer, inner = make_loop(), make_loop()
    loop = inner if nested else outer
    with pipe() as (reader, writer), on_signal(QUEUED, lambda *_: handled.append(1)):
        signal.set_wakeup_fd(writer)
        with Thread(send):
            outer.run_sync(inner.start) if nested else outer.start()
            assert signal.set_wakeup_fd(-1) == writer
        receive()
    assert received == bytes([QUEUED]) * count


def test_signals_reach_a_foreign_wakeup_fd_through_two_loops(make_loop, foreign):
    reader, writer = foreign
    outer, inner = make_loop(), make_loop()
    inner.add_callback(signal.raise_signal, USR1)
    outer.add_callback(signal.raise_signal, USR2)
    outer.add_callback(turn, inner)
    outer.add_callback(signal.raise_signal, USR2)
    with on_signal(USR1, ignore), on_signal(USR2, ignore):
        turn(outer)
    assert reader.recv(10) == bytes([USR2, USR1, USR2])
    assert wakeup_fd() == writer.fileno()


@pytest.mark.parametrize("stops", ["signal handler", "handler"])
def test_a_signal_wakes_a_loop_inside_another(make_loop, foreign, stops):
    """A foreign wakeup fd need not wait for the outer loop: the inner one may run
    for hours, and watch it."""
    reader, _ = foreign
    outer, inner = make_loop(), make_loop()

    def stop(*_):
        inner.stop()

    if stops == "handler":
        inner.add_handler(reader, stop, READ)
    with on_signal(USR1, ignore if stops == "handler" else stop), in_time(inner):
        with when_asleep(signal_to_itself):
            outer.run_sync(inner.start)
    inner.remove_handler(reader)
    assert reader.recv(10) == bytes([USR1])


@pytest.mark.row("E5")
def test_a_foreign_wakeup_fd_that_is_full_stays_quiet(
    loop, foreign, capsys, monkeypatch
):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    _, writer = foreign
    for size in (1 << 16, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                writer.send(bytes(size))
    with on_signal(USR1, ignore):
        loop.add_callback(signal.raise_signal, USR1)
        turn(loop)
        signal.raise_signal(USR1)
    assert (capsys.readouterr().err, unraisable) == ("", [])


@pytest.mark.row("E5")
def test_a_loop_inside_another_has_a_waker_of_its_own(make_loop):
    """The outer loop's wakeup fd is not somebody else's."""
    outer, inner = make_loop(), make_loop()
    seen = []

    def look():
        seen.append(wakeup_fd())

    outer.add_callback(look)
    outer.add_callback(run_callback, inner, look)
    run_callback(outer, look)
    assert seen[0] == seen[2] != seen[1]
    assert min(seen) > 2
    assert wakeup_fd() == -1


@pytest.mark.row("E6")
def test_a_loop_in_a_thread_leaves_it_alone(loop, foreign):
    _, writer = foreign
    in_thread(turn, loop)
    assert wakeup_fd() == writer.fileno()


@pytest.mark.row("E7")
def test_no_wakeup_fd_is_left_at_a_closed_loop(loop):
    turn(loop)
    loop.close()
    assert wakeup_fd() == -1
    with on_signal(USR1, ignore):
        signal.raise_signal(USR1)


@pytest.mark.row("E3")
def test_a_pipe_that_signals_have_filled(loop):
    """Each has rung while the loop was at work; nothing is said of it, and whoever
    rings then is heard."""
    count, log = 70_000, []

    def storm():
        for _ in range(count):
            signal.raise_signal(USR1)
        in_thread(loop.add_callback, loop.stop)

    with on_signal(USR1, lambda *_: log.append(1)):
        loop.add_callback(storm)
        loop.add_callback(*pend(USR1))
        loop.start()
        assert len(log) == count + 1
        with when_asleep(loop.stop):
            loop.start()


def test_a_callback_that_closes_the_pipe_makes_no_loop_spin(poller):
    """The wakeup fd can't be claimed any more, and the loop sleeps all the same."""
    poller.run(
        """
        import os
        from fakes import spin_guard
        def close_pipe():
            for fd in os.listdir("/proc/self/fd"):
                if os.path.exists(f"/proc/self/fd/{fd}"):
                    if os.readlink(f"/proc/self/fd/{fd}") in pipes:
                        os.close(int(fd))
        def links():
            fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
            return {os.readlink(fd) for fd in fds if os.path.exists(fd)}
        before = links()
        with ioloop.IOLoop(impl=impl()) as loop:
            pipes = {link for link in links() - before if link.startswith("pipe:")}
            assert len(pipes) == 1
            loop.add_callback(close_pipe)
            loop.call_later(0.1, loop.stop)
            with spin_guard(loop, 10):
                loop.start()
        """
    )


def test_a_wakeup_fd_that_is_the_loops_own_from_an_earlier_run(loop):
    """Somebody kept it and put it back: it is not to feed itself."""
    seen = []
    loop.add_callback(lambda: seen.append(wakeup_fd()))
    turn(loop)
    signal.set_wakeup_fd(seen[0], warn_on_full_buffer=False)
    with on_signal(USR1, ignore), spin_guard(loop, 10):
        loop.add_callback(signal.raise_signal, USR1)
        loop.call_later(0.05, loop.stop)
        loop.start()
    assert wakeup_fd() == -1
