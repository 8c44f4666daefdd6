"""Threads: what is safe to call from them, and what is refused."""

import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import gc
import os
import threading
import time

import pytest
from fakes import (
    FOREVER,
    LOOP_THREAD_ONLY,
    READ,
    Exit,
    ScriptedPoller,
    start_until,
    turn,
)
from kernel import alarm, broken_bell, pair, readable
from processes import (
    Thread,
    assert_shares_gil,
    at_once,
    busy_in_thread,
    flooded,
    in_thread,
    sleeping,
    switch_interval,
    wait_until,
)

import ioloop


@pytest.fixture(autouse=True)
def fast_switching():
    """Threads change places as often as can be."""
    with switch_interval(1e-6):
        yield


# -- The wrong thread ----------------------------------------------------------

ALLOWED = {
    "add_callback": (int,),
    "add_callback_from_signal": (int,),
    "spawn_callback": (int,),
    "time": (),
    "running": (),
    "stats": (),
    "__repr__": (),
}


@pytest.mark.row("B16")
def test_wrong_thread_is_refused(loop):
    """Every method that is not thread-safe, while the loop runs."""
    handle = loop.call_later(FOREVER, int)
    with sleeping(loop):
        before = loop.stats()
        for name, args in LOOP_THREAD_ONLY.items():
            with pytest.raises(RuntimeError):
                getattr(loop, name)(*args)
        with pytest.raises(RuntimeError):
            handle.cancel()
        after = loop.stats()
        assert loop.running()
    for key in ("pending_callbacks", "pending_timeouts", "handlers"):
        assert before[key] == after[key]
    handle.cancel()


@pytest.mark.row("B16")
def test_what_any_thread_may_call(loop):
    with sleeping(loop):
        for name, args in ALLOWED.items():
            getattr(loop, name)(*args)
        loop.add_future(concurrent.futures.Future(), int)


@pytest.mark.row("B16")
def test_other_threads_may_use_an_idle_loop(loop):
    """It belongs to nobody while it does not run."""
    with pair() as (a, _):
        in_thread(loop.add_handler, a, int, READ)
        in_thread(loop.update_handler, a, 0)
        in_thread(loop.remove_handler, a)
    handle = in_thread(loop.call_later, 0, int)
    in_thread(loop.remove_timeout, handle)
    in_thread(loop.run_once, 0)
    assert loop.stats()["iterations"] == 1


@pytest.mark.row("B12")
def test_start_in_many_threads(loop):
    """One at a time runs, the others are refused."""

    def start():
        try:
            loop.start()
        except RuntimeError:
            return "refused"
        return "ran"

    def stop_all(threads):
        loop.stop()
        return not any(thread.is_alive() for thread in threads)

    for _ in range(20):
        threads = [Thread(start) for _ in range(3)]
        wait_until(functools.partial(stop_all, threads))
        assert "ran" in [thread.join() for thread in threads]
        assert not loop.running()


@pytest.mark.row("B17")
def test_the_ident_of_a_dead_thread(loop):
    """Nobody owns a loop that does not run, whatever its thread was called."""
    in_thread(loop.run_once, 0)
    in_thread(loop.call_later, 0, int)
    in_thread(loop.run_once, 0)
    assert loop.stats()["timeouts"] == 1


# -- add_callback from threads -------------------------------------------------


@pytest.mark.row("B3", "B25")
@pytest.mark.parametrize("method", ["add_callback", "spawn_callback"])
def test_exact_counts(loop, method):
    """What is accepted is run, each producer's in its order."""
    threads, count = 4, 3000
    log = []

    def produce(name):
        add = getattr(loop, method)
        for i in range(count):
            add(log.append, (name, i))

    def stop_when_done():
        if len(log) == threads * count:
            loop.stop()
        else:
            loop.call_later(0.0005, stop_when_done)

    loop.call_later(0, stop_when_done)
    producers = [Thread(produce, name) for name in range(threads)]
    loop.start()
    for producer in producers:
        producer.join()
    for name in range(threads):
        assert [i for n, i in log if n == name] == list(range(count))


@pytest.mark.row("B3")
def test_no_wake_up_is_lost(loop):
    """One callback at a time to a loop that goes to sleep after each."""
    rounds = 2000
    gate = threading.Semaphore(0)

    def ping():
        for _ in range(rounds):
            loop.add_callback(gate.release)
            if not gate.acquire(timeout=20):
                return "lost"
        loop.stop()
        return "done"

    with Thread(ping) as thread:
        loop.start()
    assert thread.result == "done"
    assert loop.stats()["callbacks"] == rounds


@pytest.mark.row("B3")
def test_no_stop_is_lost(loop):
    for _ in range(200):
        with Thread(loop.stop):
            loop.start()


@pytest.mark.row("B4")
def test_nothing_is_written_after_close(poller, tmp_path):
    """Its number may be that of a foreign file by then."""
    for _ in range(20):
        loop = poller.module.IOLoop(impl=poller.impl())
        before = set(os.listdir("/proc/self/fd"))
        started = threading.Event()

        def ring(loop=loop, started=started):
            try:
                while True:
                    loop.stop()
                    started.set()
            except RuntimeError:
                pass

        threads = [Thread(ring) for _ in range(2)]
        started.wait()
        loop.run_once(0)
        loop.close()
        files = [open(tmp_path / str(i), "w+b", buffering=0) for i in range(4)]
        for thread in threads:
            thread.join()
        assert [os.fstat(file.fileno()).st_size for file in files] == [0] * 4
        for file in files:
            file.close()
        assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.row("B5")
def test_stop_and_start_lose_no_callback(loop):
    """What is added while the loop stops is run by the next start()."""
    count, log = 3000, []

    def produce():
        for i in range(count):
            loop.add_callback(log.append, i)
            if i % 10 == 0:
                loop.stop()

    with Thread(produce):
        while len(log) < count:
            loop.call_later(0.001, loop.stop)
            loop.start()
    assert log == list(range(count))


# -- The waker -----------------------------------------------------------------


class Doorbell(ScriptedPoller):
    """A poller that counts what comes out of the waker."""

    def __init__(self):
        super().__init__()
        self.rings = 0
        self.actions = []

    def poll(self, seconds):
        self.polls.append(seconds)
        if self.actions:
            self.actions.pop(0)()
        try:
            self.rings += len(os.read(self.waker, 4096))
        except BlockingIOError:
            assert seconds >= 0, "asleep, and nobody rang"
            return []
        # The byte is gone: the loop finds an empty pipe, and does not mind.
        return [(self.waker, READ)]


@pytest.fixture
def bell():
    with ioloop.IOLoop(impl=Doorbell()) as loop:
        yield loop


@pytest.mark.row("B26")
def test_rung_only_while_the_loop_sleeps(bell):
    poller = bell._impl
    for _ in range(100):
        bell.add_callback(int)
        in_thread(bell.add_callback, int)
    bell.add_callback(bell.add_callback, in_thread, bell.add_callback, int)
    turn(bell, 4)
    assert poller.rings == 0
    poller.actions = [lambda: in_thread(bell.add_callback, int)]
    bell.run_once()
    assert poller.rings == 1


@pytest.mark.row("B26")
def test_rung_once_until_answered(bell):
    poller = bell._impl

    def ring():
        for _ in range(1000):
            bell.add_callback(int)
        at_once(4, bell.add_callback, int)
        bell.stop()

    for n in range(1, 4):
        poller.actions = [ring]
        bell.start()
        assert poller.rings == n
        turn(bell)
    assert bell.stats()["pending_callbacks"] == 0


@pytest.mark.row("B26")
def test_not_rung_for_a_poll_that_does_not_wait(bell):
    poller = bell._impl
    poller.actions = [lambda: in_thread(bell.add_callback, int)]
    bell.add_callback(bell.add_callback, int)
    bell.run_once()
    assert poller.rings == 0
    turn(bell)
    assert bell.stats()["pending_callbacks"] == 0


@pytest.mark.row("B3")
def test_queued_just_before_the_loop_sleeps():
    """By a thread between two steps: the loop looks once more, and does not wait."""

    def clock():
        if armed:
            armed.pop()
            in_thread(loop.add_callback, int)
        return 1000.0

    armed = []
    with ioloop.IOLoop(impl=Doorbell(), time_func=clock) as loop:
        loop.call_later(FOREVER, int)
        armed.append(True)
        loop.run_once()
        turn(loop)
        assert loop.stats()["callbacks"] == 1
        assert set(loop._impl.polls) == {0}


def fill(reader):
    """Fill a pipe to the last byte."""
    writer = os.open(f"/proc/self/fd/{reader}", os.O_WRONLY | os.O_NONBLOCK)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"!" * size)
    os.close(writer)


@pytest.mark.row("B1")
@pytest.mark.parametrize("count", [1, 100_000])
def test_a_full_pipe_is_a_rung_bell(loop, count):
    """EAGAIN is success: somebody else filled it."""
    fill(waker_pipe())
    added = []

    def add():
        for _ in range(count):
            loop.add_callback(added.append, 1)
        loop.add_callback(loop.stop)

    with Thread(add):
        loop.start()
    assert len(added) == count
    loop.call_later(0.001, loop.stop)
    loop.start()


@pytest.mark.row("B1")
def test_full_while_the_loop_sleeps(bell):
    """Before it has answered: who rings then is told of no error."""
    poller, log = bell._impl, []

    def fill_and_ring():
        fill(poller.waker)
        in_thread(bell.add_callback, log.append, 1)

    poller.actions = [fill_and_ring]
    bell.run_once()
    turn(bell)
    assert log == [1]


@pytest.mark.row("B2")
def test_what_is_queued_behind_a_refused_callback_stays(bell, monkeypatch):
    """Only the call that failed is undone, not one that was accepted meanwhile."""
    log = []

    def strerror(error):
        broken.close()
        bell.add_callback(log.append, "accepted")
        return "broken"

    def ring():
        broken.enter_context(broken_bell(bell._impl.waker))
        with pytest.raises(OSError, match="broken"):
            bell.add_callback(log.append, "refused")

    broken = contextlib.ExitStack()
    monkeypatch.setattr(os, "strerror", strerror)
    bell._impl.actions = [ring]
    bell.run_once()
    turn(bell)
    assert "accepted" in log


@pytest.mark.row("B2")
def test_a_refused_stop_does_not_stop(bell):
    def ring():
        with broken_bell(bell._impl.waker), pytest.raises(OSError):
            bell.stop()
        bell.add_callback(int)

    log = []
    bell._impl.actions = [ring]
    bell.run_once()
    bell.add_callback(bell.add_callback, log.append, "ran")
    bell.add_callback(bell.add_callback, bell.stop)
    bell.start()
    assert log == ["ran"]


def waker_pipe():
    """The reading end of the pipe that was opened last."""
    pipes = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            is_pipe = os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")
            if is_pipe and flags & (os.O_NONBLOCK | os.O_ACCMODE) == os.O_NONBLOCK:
                pipes.append(fd)
    return max(pipes)


def test_errno_is_kept(loop):
    """Whoever adds a callback may look at errno afterwards."""
    with sleeping(loop):
        ctypes.set_errno(77)
        loop.add_callback(int)
        assert ctypes.get_errno() == 77


@pytest.mark.row("E23")
def test_a_wake_up_during_close_does_not_kill(poller):
    """SIGPIPE, which the program has set back to its default."""
    done = poller.run(
        """
        import processes, signal
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

        def ring(loop):
            try:
                while True:
                    loop.stop()
            except RuntimeError:
                return "closed"

        for _ in range(20):
            loop = ioloop.IOLoop(impl=impl())
            if impl is not ioloop._Select:
                loop.fileno()  # somebody else polls it: each stop() may ring
            threads = [processes.Thread(ring, loop) for _ in range(2)]
            loop.run_once(0)
            loop.close()
            assert [thread.join() for thread in threads] == ["closed"] * 2
        """
    )
    assert done.returncode == 0


# -- Reentrancy ----------------------------------------------------------------


@pytest.mark.row("B7")
def test_a_signal_handler_that_adds_callbacks(loop):
    """At any moment, also inside add_callback: no deadlock, and exact counts."""
    added, log = 0, []

    def handler(*_):
        nonlocal added
        added += 1
        loop.add_callback_from_signal(log.append, "signal")

    count = 0
    with alarm(50e-6, handler, 50e-6):
        while added < 300:
            loop.add_callback(log.append, "plain")
            count += 1
            if count % 50 == 0:
                loop.run_once(0)
    turn(loop, 2)
    assert log.count("plain") == count
    assert log.count("signal") == added


@pytest.mark.row("B8")
def test_finalizers_in_threads(loop):
    """A __del__ that queues, run by the collector inside any allocation."""
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    count, log = 300, []

    class Thing:
        def __init__(self):
            self.me = self

        def __del__(self):
            loop.add_callback(log.append, "del")

    def produce():
        for _ in range(count):
            Thing()
            loop.add_callback(log.append, "plain")

    try:
        threads = [Thread(produce) for _ in range(3)]
        while any(thread.is_alive() for thread in threads):
            loop.run_once(0)
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    turn(loop, 2)
    assert log.count("plain") == log.count("del") == 3 * count


@pytest.mark.row("F9")
def test_other_threads_run_while_the_loop_sleeps(loop):
    """The poll is without the GIL."""
    with sleeping(loop):
        assert in_thread(sum, range(1000)) == 499500


def chain(loop, a):
    loop.add_callback(chain, loop, a)


def ticks(loop, a):
    loop.call_later(0, ticks, loop, a)


def never_reads(loop, a):
    loop.add_handler(a, lambda *_: None, READ)


@pytest.mark.row("F9")
@pytest.mark.parametrize("work", [chain, ticks, never_reads])
def test_other_threads_run_while_the_loop_is_busy(loop, work):
    """A thread that waits for the GIL has it after one switch interval."""
    with readable() as (a, _):
        work(loop, a)
        with busy_in_thread(loop):
            assert_shares_gil(loop)
        loop.remove_handler(a)


def test_exceptions_in_a_thread_that_runs_the_loop(loop):
    in_thread(start_until, loop, Exit)
    assert not loop.running()


def test_loops_in_many_threads(poller):
    """Each has its own loop, and they ring each other."""
    count, laps = 4, 50
    loops = [poller.module.IOLoop(impl=poller.impl()) for _ in range(count)]
    log = []

    def token(n):
        log.append(n)
        if n == count * laps:
            for loop in loops:
                loop.stop()
        else:
            loops[n % count].add_callback(token, n + 1)

    threads = [Thread(loop.start) for loop in loops]
    loops[0].add_callback(token, 0)
    for thread in threads:
        thread.join()
    for loop in loops:
        loop.close()
    assert log == list(range(count * laps + 1))


def test_time_is_not_stopped_by_a_flood(loop):
    """Producers that never pause starve neither timeouts nor I/O."""
    with flooded(loop):
        start = time.monotonic()
        loop.call_later(0.02, loop.stop)
        loop.start()
    assert time.monotonic() - start < 20
