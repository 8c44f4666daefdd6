"""Signals, time limits and forks by the thousand: none lost, none late, none wrong.

Each storm is small by default, and whole in the tests marked `slow`, which print how
late the latest was (`pytest -s`).
"""

import asyncio
import collections
import contextlib
import os
import queue
import random
import signal
import socket
import sys
import threading
import time

import pytest
from fakes import READ, block, run_callback, turn
from kernel import alarm, on_signal, readable
from processes import Thread, child, switch_interval

ALRM, USR1, USR2, URG = (
    signal.SIGALRM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGURG,
)
LATE = 0.05  # seconds; on an idle machine
LOST = 5.0
ENOUGH = 3  # of the lost ones, to end a storm


@pytest.fixture(params=["small", pytest.param("whole", marks=pytest.mark.slow)])
def size(request):
    """A function: one of two sizes."""
    return lambda small, whole: whole if request.param == "whole" else small


# -- Signals -------------------------------------------------------------------


class Storm:
    """A thread that sends signals at random moments.

    Python calls a handler once for all signals of a number that it has not looked at
    yet: so each is sent when the one before has been handled.
    """

    def __init__(self, count):
        self.count, self.ended = count, None  # to be called at the end
        self.random = random.Random(count)
        self.handled = queue.SimpleQueue()
        self.sent, self.lost, self.late, self.worst = [], 0, 0, 0.0

    def handle(self, number, frame=None):
        """The handler of the signals."""
        self.handled.put((number, time.perf_counter()))

    def run(self):
        threads = threading.main_thread(), threading.current_thread()
        with contextlib.ExitStack() as stack:
            stack.callback(self.ended)
            self.stats = [
                stack.enter_context(open(f"/proc/self/task/{each.native_id}/schedstat"))
                for each in threads
            ]
            for _ in range(self.count):
                self.pause()
                self.send(self.random.choice([USR1, USR2]))
                if self.lost == ENOUGH:
                    break

    def waited(self):
        """For how many seconds the two threads have waited for a processor."""
        texts = [os.pread(file.fileno(), 99, 0) for file in self.stats]
        return sum(int(text.split()[1]) for text in texts) / 1e9

    def pause(self):
        """Let the loop fall asleep, or not quite."""
        chance = self.random.random()
        if chance < 0.5:
            time.sleep(chance / 5000)
        for _ in range(int(chance * 500)):
            pass

    def send(self, number):
        self.sent.append(number)
        waited = self.waited()
        start = time.perf_counter()
        way = self.random.randrange(3)
        if way == 0:
            signal.pthread_kill(threading.main_thread().ident, number)
        elif way == 1:
            signal.pthread_kill(threading.get_ident(), number)
        else:
            os.kill(os.getpid(), number)
        try:
            handled, when = self.handled.get(timeout=LOST)
            while handled != number or when < start:  # one that was given up
                handled, when = self.handled.get(timeout=LOST)
        except queue.Empty:
            self.lost += 1
        else:
            self.worst = max(self.worst, when - start)
            if when - start > LATE:  # not because others keep the machine busy?
                self.late += when - start - (self.waited() - waited) > LATE

    def judge(self, size):
        """None is lost, and in the whole storm none is late."""
        print(
            f"{len(self.sent)} signals, {self.lost} lost, {self.late} late, "
            f"the latest by {self.worst * 1000:.3f} ms"
        )
        assert self.lost == 0
        assert self.late <= size(self.count, 0)


class Work:
    """What a loop has to do meanwhile: nothing, or something soon, or now."""

    def __init__(self, loop, *more):
        self.loop, self.random = loop, random.Random(1)
        self.choices = [self.nothing, self.later, self.now, *more]

    def __call__(self):
        self.random.choice(self.choices)()

    def nothing(self):
        pass

    def later(self):
        self.loop.call_later(self.random.random() / 2000, int)

    def now(self):
        for _ in range(self.random.randrange(100)):
            self.loop.add_callback(int)


class Host:
    """Somebody with a wakeup fd, who reads it in another thread."""

    def __init__(self, reader, writer):
        self.reader, self.writer, self.got = reader, writer, bytearray()
        self.thread = Thread(self.read)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def read(self):
        while data := self.reader.recv(4096):
            self.got.extend(data)

    def end(self):
        """Take the wakeup fd away; return which it was, and the bytes that came."""
        found = signal.set_wakeup_fd(-1)
        self.writer.shutdown(socket.SHUT_WR)
        self.thread.join()
        return found, self.got


@pytest.fixture
def host():
    reader, writer = socket.socketpair()
    with reader, writer:
        made = Host(reader, writer)
        yield made
        made.end()


def run_storm(loop, storm, more=()):
    """Run the loop, again and again, until all signals are sent."""
    work = Work(loop, loop.stop, *more)

    def handle(number, frame):
        storm.handle(number)
        loop.add_callback_from_signal(work)

    ended = threading.Event()
    storm.ended = lambda: (ended.set(), loop.stop())
    with on_signal(USR1, handle), on_signal(USR2, handle), Thread(storm.run):
        while not ended.is_set():
            loop.start()


def test_signals_with_a_wakeup_fd_of_somebody_else(loop, host, size):
    """Each has its byte there, and wakes the loop, whichever thread gets it."""
    storm = Storm(size(500, 100_000))
    run_storm(loop, storm)
    found, got = host.end()
    storm.judge(size)
    assert found == host.writer.fileno()
    assert collections.Counter(got) == collections.Counter(storm.sent)


def test_signals_beside_nested_runs_of_asyncio(loop, host, size, monkeypatch):
    """Those set a wakeup fd of their own while the loop runs, and leave none."""
    runs, unraisable = [], []
    storm = Storm(size(300, 20_000))

    async def nested():
        arrived = asyncio.Event()
        running = asyncio.get_running_loop()
        running.add_signal_handler(URG, arrived.set)
        signal.raise_signal(URG)
        await asyncio.wait_for(arrived.wait(), LOST)
        runs.append(len(runs))
        if len(runs) % 2:
            running.remove_signal_handler(URG)

    # What asyncio does with it else: it closes the file before it resets the fd.
    monkeypatch.setattr(
        sys, "unraisablehook", lambda each: unraisable.append(each.exc_type)
    )
    with on_signal(URG, signal.SIG_DFL):
        run_storm(loop, storm, [lambda: asyncio.run(nested())])
    storm.judge(size)
    assert len(runs) > storm.count / 10
    assert all(issubclass(error, OSError) for error in unraisable)


def embed(loop, host, has_fileno):
    """Have `host`, of asyncio, run the loop's iterations."""
    handle = None

    def pump():
        nonlocal handle
        loop.run_once(0)
        if not has_fileno:
            host.call_soon(pump)
            return
        if handle is not None:
            handle.cancel()
        wait = loop.next_timeout()
        handle = None if wait is None else host.call_later(wait, pump)

    if has_fileno:
        host.add_reader(loop.fileno(), pump)
    pump()


@pytest.mark.parametrize("kind", ["asyncio's handlers", "Python's handlers"])
def test_signals_of_a_host_that_embeds_the_loop(loop, poller, size, kind):
    """asyncio knows of a signal by the byte in its wakeup fd, and by that alone."""

    async def main():
        host, ended = asyncio.get_running_loop(), asyncio.Event()
        work = Work(loop)

        def handle(number, frame=None):
            storm.handle(number)
            loop.add_callback(work)

        storm.ended = lambda: host.call_soon_threadsafe(ended.set)
        if kind == "asyncio's handlers":
            for number in (USR1, USR2):
                host.add_signal_handler(number, handle, number)
        else:
            host.add_signal_handler(URG, int)  # sets the wakeup fd
            for number in (USR1, USR2):
                signal.signal(number, handle)
        embed(loop, host, poller.name != "select")
        with Thread(storm.run):
            await ended.wait()

    def pass_on(sock, events):
        sock.recv(1)
        loop.call_later(0.0001, b.send, b"x")

    storm = Storm(size(500, 100_000))
    with contextlib.ExitStack() as stack:
        for number in (USR1, USR2, URG):
            stack.enter_context(on_signal(number, signal.SIG_DFL))
        a, b = stack.enter_context(readable())
        loop.add_handler(a, pass_on, READ)
        asyncio.run(main())
    storm.judge(size)


# -- Time limits ---------------------------------------------------------------


class Limit(Exception):
    pass


@pytest.fixture(params=["signal", "log"])
def watched(request, loop, size, expect_log):
    """A loop with a threshold; `reports()` takes what it has reported."""
    alarms, threshold = [], size(0.2, 1)
    if request.param == "signal":
        loop.set_blocking_signal_threshold(threshold, lambda *_: alarms.append("block"))
        loop.reports = lambda: [alarms.pop() for _ in list(alarms)]
    else:
        loop.set_blocking_log_threshold(threshold)
        loop.reports = lambda: [expect_log.take("blocked") for _ in list(expect_log)]
    yield loop
    del loop.reports


def block_until_reported(loop, reported):
    end = time.monotonic() + 20
    while not reported and time.monotonic() < end:
        reported.extend(loop.reports())


@pytest.mark.parametrize("owner", ["callback", "program"])
def test_time_limits_in_callbacks_of_a_watched_loop(watched, size, owner):
    """Each is told its owner once and in time, and no one else."""
    count, numbers, calls = size(40, 10_000), random.Random(2), []
    passed, kept, wrong, reported = [], [], [], []

    def on_limit(number, frame):
        calls.append(time.perf_counter())
        raise Limit

    def limited(seconds, work):
        start = time.perf_counter()
        try:
            if owner == "callback":
                with alarm(seconds, on_limit):
                    work()
            else:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                work()
            kept.append(seconds)
        except Limit:
            passed.append(calls[0] - start - seconds)
            if passed[-1] < 0:
                wrong.append(f"{seconds} were {calls[0] - start}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def a_little():
        for _ in range(numbers.randrange(5000)):
            pass

    def go_on():
        calls.clear()
        if numbers.random() < 0.5:
            limited(numbers.random() / 500 + 1e-4, lambda: block(LOST))
            expected = 1
        else:
            limited(60, a_little)
            expected = 0
        if len(calls) != expected:
            wrong.append(f"{len(calls)} calls, not {expected}")
        if wrong or len(passed) + len(kept) == count:
            watched.stop()
        elif numbers.random() < 0.5:
            watched.add_callback(go_on)
        else:
            watched.call_later(numbers.random() / 2000, go_on)

    watched.add_callback(go_on)
    with on_signal(ALRM, on_limit if owner == "program" else signal.SIG_DFL):
        watched.start()
        assert wrong == []
        print(f"{len(passed)} limits, the latest by {max(passed) * 1000:.3f} ms")
        assert len(passed) > count / 3 and len(kept) > count / 3
        assert watched.reports() == []
        run_callback(watched, block_until_reported, watched, reported)
        assert len(reported) == 1


# -- Forks ---------------------------------------------------------------------

WAYS = ["reinit", "daemonize", "close"]


def in_child(loop, client, counter, way):
    """Whatever the child does with its copy, what is the child's stays."""
    signal.alarm(20)
    posted = counter.value
    if way == "daemonize":
        os.closerange(3, 200)
    files = [os.eventfd(n) for n in range(1, 41)]
    if way != "close":
        ran = []
        loop.reinit()
        loop.add_callback(ran.append, "callback")
        post = lambda loop: (ran.append("post"), loop.stop())  # noqa: E731
        assert client.Door(loop).post(post) == 0
        loop.start()
        turn(loop)
        assert sorted(ran) == ["callback", "post"]
        assert counter.value >= posted
    loop.close()
    assert [os.eventfd_read(fd) for fd in files] == [*range(1, 41)]


def test_forks_beside_threads_that_post(loop, client, size):
    """By the C API and by add_callback: the parent's counts are exact."""
    forks, posts, called = size(30, 1000), 3000, 0
    counter, ended = client.Counter(), threading.Event()

    def call(n):
        nonlocal called
        called += n == called

    def add():
        added = 0
        while not ended.is_set():
            loop.add_callback(call, added)
            added += 1
            # A child runs all that it inherits: without a limit it takes the longer,
            # the longer the one before took.
            while added % 100 == 0 and not ended.is_set():
                time.sleep(0)
                if loop.stats()["pending_callbacks"] < 10_000:
                    break
        return added

    with switch_interval(1e-4):
        adder = Thread(add)
        for n in range(forks):
            posters = client.Posters(client.Door(loop), counter, 2, posts)
            with child() as inside:
                if inside:
                    in_child(loop, client, counter, WAYS[n % len(WAYS)])
            assert posters.join() == 0
            turn(loop)
        ended.set()
        added = adder.join()
    turn(loop, 2)
    assert counter.value == 2 * posts * forks
    assert called == added
