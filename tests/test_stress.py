"""Many things at once, and often: no crash, no hang, exact counts.

The sizes are for a few seconds in all.  IOLOOP_STRESS=20 makes them 20 times
as large, and is what the tests marked `slow` use by default.
"""

import contextlib
import gc
import itertools
import os
import random
import signal
import socket
import struct
import threading
import time

import pytest
from fakes import FOREVER, LOOP_THREAD_ONLY, READ, Await, fail, turn
from kernel import alarm, on_signal, readable
from processes import (
    Thread,
    at_once,
    busy_in_thread,
    exits_with_a_busy_thread,
    in_child,
    switch_interval,
    wait_until,
)

TIMES = int(os.environ.get("IOLOOP_STRESS", "0"))


@pytest.fixture(params=["short", pytest.param("long", marks=pytest.mark.slow)])
def size(request):
    """A function: a number, larger in the slow test."""
    factor = TIMES or (1 if request.param == "short" else 10)
    if TIMES and request.param == "long":
        pytest.skip("IOLOOP_STRESS makes the short one long")
    return lambda number: number * factor


@pytest.fixture(autouse=True)
def fast_switching():
    with switch_interval(1e-6):
        yield


# -- Threads -------------------------------------------------------------------


def test_threads_add_while_others_stop_and_fork(poller, size):
    """What was accepted runs once, in order; a child has a whole loop too."""
    for _ in range(size(3)):
        count, log, ended = 300, [], threading.Event()
        with poller.module.IOLoop(impl=poller.impl()) as loop:
            threads = [
                *(Thread(produce, loop, log, name, count) for name in range(3)),
                Thread(in_child, run_what_is_pending, loop, log),
            ]
            others = [Thread(repeat, ended, loop.stop) for _ in range(2)]
            while any(thread.is_alive() for thread in threads):
                loop.start()
            ended.set()
            for thread in [*threads, *others]:
                thread.join()
            turn(loop, 2)
            for name in range(3):
                assert [i for who, i in log if who == name] == list(range(count))


def produce(loop, log, name, count):
    for i in range(count):
        loop.add_callback(log.append, (name, i))


def repeat(ended, function):
    while not ended.is_set():
        function()
        time.sleep(1e-5)


def run_what_is_pending(loop, log):
    loop.reinit()
    log.clear()
    pending = loop.stats()["pending_callbacks"]
    loop.run_once(0)
    assert len(log) == pending
    loop.close()


@pytest.mark.row("B5", "B6")
def test_threads_add_while_others_close(poller, size):
    """A call is either refused, or its callback is run or dropped with the loop."""
    for _ in range(size(15)):
        loop = poller.module.IOLoop(impl=poller.impl())
        log = []
        started = threading.Barrier(5)

        def produce(loop=loop, log=log, started=started):
            started.wait()
            for accepted in itertools.count():
                try:
                    loop.add_callback(log.append, 1)
                except RuntimeError:
                    return accepted

        def close(loop=loop, started=started):
            started.wait()
            time.sleep(random.random() / 1000)
            while not loop_is_closed(loop):
                with contextlib.suppress(RuntimeError):
                    loop.stop()
                    loop.close()

        threads = [Thread(produce), Thread(produce)]
        closers = [Thread(close), Thread(close)]
        started.wait()
        with contextlib.suppress(RuntimeError):
            loop.start()
        for thread in closers:
            thread.join()
        assert len(log) <= sum(thread.join() for thread in threads)


def loop_is_closed(loop):
    return "closed" in repr(loop)


@pytest.mark.row("B16")
def test_every_method_from_wrong_threads_while_the_loop_works(loop, poller, size):
    """Refused each time, and nothing is lost of what goes on meanwhile."""
    counts = dict.fromkeys(["timeouts", "events", "callbacks", "ticks"], 0)

    def count(what):
        counts[what] += 1

    def rearm():
        count("timeouts")
        loop.call_later(FOREVER, int).cancel()
        loop.call_later(0, rearm)

    def on_event(sock, events):
        count("events")
        sock.recv(1)
        b.send(b"x")

    def storm():
        refused = 0
        for _ in range(size(40)):
            for method, args in calls:
                try:
                    method(*args)
                except RuntimeError:
                    refused += 1
            loop.add_callback(count, "callbacks")
        return refused

    periodic = poller.module.PeriodicCallback(lambda: count("ticks"), 0.1, loop)
    handle = loop.call_later(FOREVER, int)
    calls = [(getattr(loop, name), args) for name, args in LOOP_THREAD_ONLY.items()]
    calls += [(handle.cancel, ()), (periodic.start, ()), (periodic.stop, ())]
    with readable() as (a, b):
        loop.add_handler(a, on_event, READ)
        loop.call_later(0, rearm)
        periodic.start()
        with busy_in_thread(loop):
            wait_until(lambda: counts["ticks"])
            assert at_once(4, storm) == [size(40) * len(calls)] * 4
        turn(loop, 2)
        assert counts["callbacks"] == size(40) * 4
        assert loop.stats()["handlers"] == 1
        poller.module._verify(loop)
        loop.close()


# -- Connections ---------------------------------------------------------------


def test_connections_opened_and_reset(loop, size, counted_files):
    """Every one is accepted and heard of again, exactly once."""
    count, batch = size(1000), 50
    seen = {"accepted": 0, "reset": 0}

    def on_connection(server, events):
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = server.accept()
                sock.setblocking(False)
                loop.add_handler(sock, on_reset, READ)
                seen["accepted"] += 1

    def on_reset(sock, events):
        try:
            assert sock.recv(1) == b"never"
        except ConnectionResetError:
            seen["reset"] += 1
        loop.remove_handler(sock)
        sock.close()

    with socket.create_server(("127.0.0.1", 0), backlog=2 * batch) as server:
        server.setblocking(False)
        loop.add_handler(server, on_connection, READ)
        for done in range(batch, count + 1, batch):
            clients = [
                socket.create_connection(server.getsockname()) for _ in range(batch)
            ]
            for client in clients:
                linger = struct.pack("ii", 1, 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            for client in clients[::2]:
                client.close()  # also before it is accepted
            while seen["accepted"] < done:
                loop.run_once(5)
            for client in clients[1::2]:
                client.close()
            while seen["reset"] < done:
                loop.run_once(5)
        loop.remove_handler(server)
    assert seen == {"accepted": count, "reset": count}
    assert loop.stats()["handlers"] == 0


# -- Signals -------------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True], ids=["poll", "dispatch"])
def test_signals_at_1_khz(loop, size, busy):
    """A callback for each signal, and the loop's own work goes on unharmed."""
    counts = {"signals": 0, "callbacks": 0, "events": 0, "timeouts": 0}

    def count(what):
        counts[what] += 1

    def on_signal(*_):
        count("signals")
        loop.add_callback_from_signal(count, "callbacks")

    def on_event(sock, events):
        count("events")
        sock.recv(1)
        b.send(b"x")

    def rearm():
        count("timeouts")
        loop.call_later(0.002, rearm)
        if all(counts[what] >= size(100) for what in expected):
            loop.stop()

    expected = [*counts] if busy else ["signals", "callbacks", "timeouts"]
    with readable() as (a, b):
        if busy:
            loop.add_handler(a, on_event, READ)
        loop.call_later(0, rearm)
        loop.call_later(FOREVER, loop.stop)
        with alarm(0.001, on_signal, 0.001):
            loop.start()
        turn(loop, 2)
        loop.close()
    assert counts["signals"] == counts["callbacks"]
    assert all(counts[what] >= size(100) for what in expected), counts
    assert (counts["events"] > 0) == busy


# -- close() from everywhere ---------------------------------------------------


class Float:
    def __init__(self, function):
        self.function = function

    def __float__(self):
        self.function()
        return 0.0

    def fileno(self):
        self.function()
        return 0


def places(loop, sock, close, running):
    """Functions that let a loop call `close` where it does not expect it."""

    async def coroutine():
        await Await()
        close()

    def hook(callback):
        close()

    class Dying:
        def __init__(self):
            self.me = self

        def __del__(self):
            close()

    def die():
        Dying()
        gc.collect()

    yield lambda: loop.add_callback(close)
    yield lambda: loop.add_timeout(0, close)
    yield lambda: loop.add_handler(sock, lambda *_: close(), READ)
    yield lambda: loop.add_callback(coroutine)
    yield lambda: (
        setattr(loop, "handle_callback_exception", hook),
        loop.add_callback(fail),
    )
    yield lambda: loop.add_callback(die)
    yield lambda: loop.add_handler(Float(close), int, READ)
    yield lambda: loop.update_handler(Float(close), READ)
    yield lambda: loop.remove_handler(Float(close))
    yield lambda: loop.call_later(Float(close), int)
    yield lambda: loop.call_at(Float(close), int)
    yield lambda: loop.add_callback(signal.raise_signal, signal.SIGUSR1)
    yield lambda: loop.add_callback(Thread, close)
    if not running:  # else refused before it is called
        yield lambda: loop.run_once(Float(close))
        yield lambda: loop.run_sync(close)


@pytest.mark.parametrize("running", [False, True], ids=["idle", "running"])
def test_close_from_everywhere(make_loop, poller, running, size, expect_log):
    """Done where the loop is idle, refused where it runs; never a crash."""
    index = 0
    while True:
        loop = make_loop()
        outcomes = []

        def close(loop=loop, outcomes=outcomes):
            try:
                loop.close()
                outcomes.append("closed")
            except RuntimeError:
                outcomes.append("refused")

        for n in range(5):
            loop.add_callback(int)
            loop.call_later(n / 1e5, int)
        with readable() as (sock, _), on_signal(signal.SIGUSR1, lambda *_: close()):
            try:
                place = list(places(loop, sock, close, running))[index]
            except IndexError:
                break
            if running:
                loop.add_callback(place)
            else:
                with contextlib.suppress(RuntimeError, OSError):
                    place()
            with contextlib.suppress(RuntimeError):
                for _ in range(30):
                    loop.run_once(0.001)
                    if outcomes:
                        break
        wait_until(outcomes.copy)
        assert ("closed" in outcomes) == loop_is_closed(loop)
        loop.close()
        index += 1
    expect_log.clear()
    assert index == (13 if running else 15)


# -- Finalizers ----------------------------------------------------------------


@pytest.mark.parametrize("what", ["callback", "timeout", "late timeout", "handler"])
def test_finalizers_that_use_the_loop_at_any_allocation(poller, size, what):
    """With a collector that runs all the time, inside the loop's own methods."""
    code = """
    import gc, os, resource, sys
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    ran = []
    loop = ioloop.IOLoop(impl=impl())
    what, size = os.environ["WHAT"], int(os.environ["SIZE"])
    made = 0

    class Thing:
        def __init__(self):
            self.me = self

        def __del__(self):
            global made
            made += 1
            if what == "handler":
                fd = os.dup2(writer, 100 + made % 900)
                loop.remove_handler(fd)
                loop.add_handler(fd, print, loop.NONE)
            if what == "callback":
                loop.add_callback(ran.append, 1)
            else:
                loop.call_later(0, ran.append, 1)

    def work(n):
        Thing()
        for i in range(5):
            if what == "handler":
                fd = os.dup2(writer, 1000 + (n * 5 + i) % 20)
                loop.add_handler(fd, print, loop.NONE)
                loop.remove_handler(fd)
            loop.add_callback(ran.append, 1)
            loop.call_later(-1, ran.append, 1)
            loop.call_later(3600, ran.append, 1).cancel()

    reader, writer = os.pipe()
    count = 200 * size
    gc.set_threshold(1)
    for n in range(count):
        if what == "late timeout":
            loop.call_later(0, work, n)
        else:
            loop.add_callback(work, n)
        if n % 5 == 0:
            loop.run_once(0)
    for _ in range(3):
        loop.run_once(0)
    gc.collect()
    loop.run_once(0)
    loop.run_once(0)
    ioloop._verify(loop)
    assert made == count, made
    assert len(ran) == 11 * count, (len(ran), 11 * count)
    loop.close()
    """
    poller.run(code, WHAT=what, SIZE=str(size(1)), timeout=120)


LATE_TIMEOUT = """
def prepare(loop, count):
    def finalize():
        for _ in range(count):
            loop.call_later(-1, ran.append, 1)

    def act():
        for _ in range(60):
            loop.call_later(3600, print)
        held.extend((i, i, i) for i in range(3000))  # no tuple is left to reuse
        collect_at_allocation(lambda: loop.call_later(-1, ran.append, 1))

    loop.call_later(0, act)
    return finalize

def check(loop, count):
    assert len(ran) == count + 1, (len(ran), count + 1)
"""
HANDLER = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
reader, writer = os.pipe()

def prepare(loop, count):
    os.dup2(writer, 40)
    os.dup2(writer, 100 * count)

    def finalize():
        loop.add_handler(100 * count, print, loop.NONE)

    def act():
        held.extend([] for _ in range(300))
        collect_at_allocation(lambda: loop.add_handler(40, print, loop.NONE))

    loop.add_callback(act)
    return finalize

def check(loop, count):
    assert sorted(loop._handlers) == [40, 100 * count], loop._handlers
"""
AT_EVERY_ALLOCATION = """
import gc
gc.disable()
for nth in range(6):
    for count in range(1, 8):
        class Thing:
            def __del__(self):
                finalize()

        def collect_at_allocation(function):
            thing = Thing()
            thing.me = thing
            del thing
            counts = gc.get_count()  # kept: or there is a tuple to reuse
            gc.set_threshold(counts[0] + nth)
            gc.enable()
            function()
            gc.disable()
            del counts

        ran, held = [], []
        with ioloop.IOLoop(impl=impl()) as loop:
            finalize = prepare(loop, count)
            loop.run_once(0)
            gc.collect()
            loop.run_once(0)
            loop.run_once(0)
            ioloop._verify(loop)
            check(loop, count)
"""


@pytest.mark.parametrize("what", [LATE_TIMEOUT, HANDLER], ids=["timeout", "handler"])
def test_finalizers_at_every_allocation(poller, what):
    """A collection in the middle of a method, that uses up what it just made."""
    poller.run(what + AT_EVERY_ALLOCATION)


# -- The end of the interpreter ------------------------------------------------

# Between two runs the loop is idle, and unclosed.
EXIT = """
import gc, os, sys, threading, warnings
warnings.simplefilter("ignore", ResourceWarning)
sys.setswitchinterval(1e-6)
loop = ioloop.IOLoop(impl=impl())
started = threading.Event()
reader, writer = os.pipe()
loop.add_handler(writer, lambda *_: None, loop.WRITE)
loop.call_later(0, started.set)

def tick():
    loop.call_later(0, tick)

def flood():
    while True:
        loop.add_callback(lambda: None)
        loop.stop()

def run():
    tick()
    while True:
        loop.start()

for target in (run, flood, flood):
    threading.Thread(target=target, daemon=True).start()
started.wait()
{end}
"""


@exits_with_a_busy_thread
@pytest.mark.parametrize(
    "end",
    ["", "sys.exit(0)", "del run, flood; gc.collect()", "ioloop.IOLoop.instance()"],
)
def test_exit_while_a_thread_runs_the_loop(poller, size, end):
    """The interpreter ends all the same: no crash, no hang, no complaint."""

    def run():
        return poller.run(EXIT.replace("{end}", end)).stderr

    for _ in range(size(3)):
        errors = [thread.join() for thread in [Thread(run), Thread(run)]]
        assert errors == ["", ""]
