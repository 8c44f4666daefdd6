"""System calls that fail at every point, and signals that come at every one.

A sweep runs in a process of its own, with faults.c preloaded: it counts the
system calls that an operation makes and repeats it with each of them failing,
in every way that is documented for it.  Whatever happens, the operation
succeeds or raises, and a loop is as before where it raises.
"""

import _thread
import ast
import contextlib
import ctypes
import errno
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from building import compile_library
from fakes import NONE, READ, WRITE
from processes import Thread, fork, run_python

import ioloop

CALLS = {
    "epoll_create1": "EMFILE ENOMEM",
    "epoll_ctl": "EBADF EEXIST EINTR ENOENT ENOMEM ENOSPC EPERM",
    "epoll_wait": "EBADF EINTR",
    "epoll_pwait2": "EBADF EINTR ENOSYS EPERM",
    "pselect": "EBADF EINTR ENOMEM",
    "poll": "EINTR ENOMEM",
    "read": "EAGAIN EINTR EIO",
    "write": "EAGAIN EBADF EINTR EPIPE",
    "close": "EINTR EIO",
    "pipe2": "EMFILE ENFILE",
    "fcntl": "EBADF EMFILE",
    "malloc": "ENOMEM",
    "calloc": "ENOMEM",
    "realloc": "ENOMEM",
}
# Said of an fd that has a handler, these mean that it was closed: it is dropped.
BELIEVED = [
    (operation, "epoll_ctl", error)
    for operation in ("start_with_a_stray_event", "reinit")
    for error in ("EBADF", "EPERM")
] + [
    # By select's witness: the number is that of a file that can't be polled.
    ("add_handler_twice", "epoll_ctl", "EPERM"),
    ("iterate", "epoll_ctl", "EPERM"),
]
# To select's witness they are all the same, and ENOMEM stands for them.
EPOLL = ioloop._EPoll
OF_EPOLL = {"EEXIST", "EINTR", "ENOENT", "ENOSPC"}
CLEAN = (OSError, MemoryError)
SIGNALLED = [call for call in CALLS if not call.endswith("alloc")]
LONG = 3600


@pytest.fixture(scope="module")
def preload():
    """faults.c, before whatever is preloaded already (a sanitizer)."""
    others = os.environ.get("LD_PRELOAD", "")
    library = compile_library(Path(__file__).with_name("faults.c"))
    return f"{library} {others}".strip()


@pytest.mark.row("A7", "B2")
@pytest.mark.parametrize("poller", ["_EPoll", "_Select"])
@pytest.mark.parametrize("sweep", ["sweep_errors", "sweep_signals"])
def test_sweep(preload, poller, sweep):
    """The n-th call of each kind fails with each errno, or a signal comes with it."""
    done = run_python(
        f"import test_faults; test_faults.{sweep}(ioloop.{poller})",
        LD_PRELOAD=preload,
        timeout=300,
    )
    print(done.stdout)


# -- The library ---------------------------------------------------------------


class Faults:
    """The variables of faults.c."""

    def __init__(self):
        self.library = ctypes.CDLL(None)
        self.counts = (ctypes.c_int * len(CALLS)).in_dll(self.library, "fault_counts")
        for end, address in zip(("from", "to"), mapped(ioloop.__file__), strict=True):
            ctypes.c_size_t.in_dll(self.library, f"fault_{end}").value = address

    def __getitem__(self, name):
        return ctypes.c_int.in_dll(self.library, f"fault_{name}")

    @contextlib.contextmanager
    def armed(self, calls=CALLS, nth=0, error=0, number=0):
        """Strike at the nth of `calls`; by default only count all of them."""
        values = {
            "which": sum(1 << list(CALLS).index(call) for call in calls),
            "nth": nth,
            "errno": error,
            "signal": number,
            "seen": 0,
        }
        for name, value in values.items():
            self[name].value = value
        ctypes.memset(self.counts, 0, ctypes.sizeof(self.counts))
        self["armed"].value = 1
        try:
            yield self
        finally:
            self["armed"].value = 0

    def seen(self):
        """How often each call was made, if it was."""
        return {c: n for c, n in zip(CALLS, self.counts, strict=True) if n}


def mapped(path):
    """Where a file is in memory."""
    with open("/proc/self/maps") as maps:
        areas = [line.split()[0] for line in maps if line.rstrip().endswith(path)]
    return int(areas[0].split("-")[0], 16), int(areas[-1].split("-")[1], 16)


# -- A loop in use -------------------------------------------------------------


def ignore(*_):
    pass


class World:
    """A loop that has all there is, and the proof that it still works."""

    def __init__(self, poller):
        self.poller = poller
        self.files = set(os.listdir("/proc/self/fd"))
        self.stack = contextlib.ExitStack()
        self.got = []
        self.loop = self.new_loop()
        self.a, self.b = self.pair()
        self.c, self.d = self.pair()
        self.loop.add_handler(self.a, self.read, READ)
        self.loop.add_handler(self.d.fileno(), ignore, READ)
        self.loop.add_callback(int)
        self.timeout = self.loop.call_later(LONG, ignore)

    def new_loop(self):
        loop = ioloop.IOLoop(impl=self.poller())
        self.stack.callback(loop.close)
        return loop

    def pair(self):
        pair = socket.socketpair()
        for sock in pair:
            sock.setblocking(False)
            self.stack.enter_context(sock)
        return pair

    def read(self, sock, events):
        self.got.append(sock.recv(100))

    def reuse(self, sock):
        """Close a socket behind the loop's back; its number is used again."""
        fd = sock.fileno()
        sock.detach()
        os.dup2(self.b.fileno(), fd)
        self.stack.callback(os.close, fd)
        return fd

    def state(self):
        """What an operation that fails must not change."""
        loop = self.loop
        stats = loop.stats()
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        return {
            "callbacks": stats["callbacks"] + stats["pending_callbacks"],
            "timeouts": stats["timeouts"] + stats["pending_timeouts"],
            "handlers": list(loop._handlers.items()),
            "kernel": self.watched(),
            "running": loop.running(),
            "current": ioloop.IOLoop.current(instance=False),
            "instance": ioloop.IOLoop.initialized(),
            "wakeup fd": wakeup,
            "alarm": signal.getsignal(signal.SIGALRM),
        }

    def watched(self):
        """What the kernel knows of, if it can be asked."""
        if self.poller is not ioloop._EPoll:
            return None
        with open(f"/proc/self/fdinfo/{self.loop._impl.fileno()}") as info:
            [inner] = [line.split()[1] for line in info if line.startswith("tfd:")]
        with open(f"/proc/self/fdinfo/{inner}") as info:
            lines = [line.split() for line in info if line.startswith("tfd:")]
        return sorted((int(line[1]), int(line[3], 16)) for line in lines)

    def check(self, loop=None):
        """The loop runs callbacks, timeouts and handlers, and can be woken."""
        loop = loop or self.loop
        order = []
        for _ in range(3):
            loop.run_once(1e-4)  # what the operation has left
        loop.stop()
        loop.start()

        def give_up():
            order.append("not woken")
            loop.stop()

        def wake():
            while True:
                with contextlib.suppress(OSError):
                    return loop.add_callback(loop.stop)

        loop.add_callback(order.append, "callback")
        loop.call_later(0, order.append, "timeout")
        waker = []
        loop.call_later(1e-4, lambda: waker.append(Thread(wake)))
        guard = loop.call_later(5, give_up)
        self.got.clear()
        if loop is self.loop and self.a.fileno() in loop._handlers:
            self.b.send(b"event")
        else:
            self.got.append(b"event")
        loop.start()
        waker[0].join()
        guard.cancel()
        assert order == ["callback", "timeout"], order
        assert self.got == [b"event"], self.got
        ioloop._verify(loop)

    def is_forked(self):
        return "forked" in repr(self.loop)

    def close_later(self, function, *args):
        self.stack.callback(function, *args)

    def close(self):
        self.stack.close()
        left = set(os.listdir("/proc/self/fd")) ^ self.files
        assert not left, f"descriptors leaked or lost: {left}"


# -- Operations ----------------------------------------------------------------
#
# Each prepares, yields, does one thing, yields, and looks at what it did.  The
# calls that the middle part makes fail.

OPERATIONS = []


def operation(function):
    OPERATIONS.append(function)
    return function


@operation
def construct(world):
    yield
    loop = ioloop.IOLoop(impl=world.poller())
    yield
    world.check(loop)
    loop.close()


@operation
def instance(world):
    yield
    loop = ioloop.IOLoop.instance()
    yield
    assert ioloop.IOLoop.instance() is loop
    loop.close()


@operation
def add_handler(world):
    yield
    world.loop.add_handler(world.c, world.read, READ | WRITE)
    yield
    assert world.loop._handlers[world.c.fileno()] == world.read


@operation
def add_handler_that_rests(world):
    yield
    world.loop.add_handler(world.c, world.read, NONE)
    yield
    assert world.c.fileno() in world.loop._handlers


@operation
def add_handler_far_up(world):
    """The tables grow."""
    fd = os.dup2(world.c.fileno(), 900)
    world.close_later(os.close, fd)
    yield
    world.loop.add_handler(fd, world.read, WRITE)
    yield
    assert fd in world.loop._handlers


@operation
def add_handler_twice(world):
    yield
    with contextlib.suppress(FileExistsError):
        world.loop.add_handler(world.d, world.read, READ)
        raise AssertionError("it was added twice")
    yield
    assert world.loop._handlers[world.d.fileno()] is ignore


@operation
def add_handler_of_a_number_used_again(world):
    fd = world.reuse(world.d)
    yield
    world.loop.add_handler(fd, world.read, WRITE)
    yield
    assert world.loop._handlers[fd] == world.read


@operation
def update_handler(world):
    yield
    world.loop.update_handler(world.d, READ | WRITE)
    yield


@operation
def update_handler_to_rest(world):
    yield
    world.loop.update_handler(world.d, NONE)
    yield


@operation
def update_handler_that_rests(world):
    world.loop.update_handler(world.d, NONE)
    yield
    world.loop.update_handler(world.d, READ)
    yield


@operation
def update_handler_of_a_number_used_again(world):
    fd = world.reuse(world.d)
    yield
    world.loop.update_handler(fd, READ)
    yield


@operation
def remove_handler(world):
    yield
    world.loop.remove_handler(world.d)
    yield
    assert world.d.fileno() not in world.loop._handlers


@operation
def add_callback(world):
    """The queue grows."""
    for _ in range(63):
        world.loop.add_callback(int)
    yield
    world.loop.add_callback(dict, key=1)
    yield
    assert world.loop.stats()["pending_callbacks"] == 65


@operation
def add_callback_for_a_poller_of_ours(world):
    """The waker signals whoever watches fileno()."""
    with contextlib.suppress(OSError):
        world.loop.fileno()
    world.loop.run_once(0)
    yield
    world.loop.add_callback(int)
    yield


@operation
def stop(world):
    with contextlib.suppress(OSError):
        world.loop.fileno()
    world.loop.run_once(0)
    yield
    world.loop.stop()
    yield
    world.loop.start()


@operation
def add_timeout(world):
    yield
    handle = world.loop.call_later(LONG, ignore)
    yield
    assert handle.callback is ignore


@operation
def remove_timeout(world):
    yield
    world.loop.remove_timeout(world.timeout)
    yield
    assert world.timeout.callback is None


@operation
def iterate(world):
    world.b.send(b"event")
    world.loop.call_later(0, int)
    yield
    world.loop.run_once(0)
    yield


@operation
def sleep(world):
    yield
    world.loop.run_once(1e-5)
    world.loop.run_once(1e-5)
    yield


@operation
def start(world):
    world.loop.call_later(1e-5, world.loop.stop)
    yield
    world.loop.start()
    yield


@operation
def start_until_there_is_an_event(world):
    """The poll that waits for ever."""
    world.timeout.cancel()
    world.loop.remove_handler(world.d)
    world.loop.run_once(0)

    def stop(sock, events):
        world.loop.remove_handler(sock)
        world.loop.stop()

    world.loop.add_handler(world.c, stop, WRITE)
    yield
    world.loop.start()
    yield


@operation
def start_until_a_thread_stops_it(world):
    def stop():
        while True:
            with contextlib.suppress(OSError):
                return world.loop.stop()

    threads = []
    world.loop.call_later(1e-4, lambda: threads.append(Thread(stop)))
    yield
    try:
        world.loop.start()
    finally:
        for thread in threads:
            thread.join()
    yield


@operation
def start_with_many_events(world):
    """More than there is room for."""
    for _ in range(300):
        fd = os.dup(world.c.fileno())
        world.close_later(os.close, fd)
        world.loop.add_handler(fd, ignore, WRITE)
    for _ in range(2):
        yield
        world.loop.run_once(0)
    yield


@operation
def start_with_a_stray_event(world):
    """The poller's set is built anew."""
    other = world.d.dup()
    world.close_later(other.close)
    world.c.send(b"stray")
    fd = world.d.detach()
    os.close(fd)
    world.loop.remove_handler(fd)
    yield
    world.loop.run_once(0)
    yield


@operation
def start_watched(world):
    world.loop.set_blocking_log_threshold(LONG)
    world.loop.call_later(1e-5, world.loop.stop)
    yield
    world.loop.start()
    yield


@operation
def start_watched_by_signal(world):
    world.close_later(signal.signal, signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, ignore)
    world.loop.set_blocking_signal_threshold(LONG, ignore)
    world.loop.call_later(1e-5, world.loop.stop)
    yield
    world.loop.start()
    yield


@operation
def set_blocking_threshold_while_it_runs(world):
    world.loop.handle_callback_exception = lambda _: None
    world.loop.add_callback(world.loop.set_blocking_log_threshold, LONG)
    world.loop.add_callback(world.loop.stop)
    yield
    world.loop.start()
    yield


@operation
def run_sync(world):
    yield
    assert world.loop.run_sync(lambda: 1, timeout=5) == 1
    yield


@operation
def close(world):
    yield
    world.loop.close()
    yield
    world.loop = world.new_loop()


@operation
def close_with_all_fds(world):
    world.loop.remove_handler(world.a)
    world.loop.remove_handler(world.d)
    world.loop.add_handler(os.dup(world.c.fileno()), ignore, READ)
    yield
    world.loop.close(all_fds=True)
    yield
    world.loop = world.new_loop()


@operation
def poller(world):
    yield
    poller = world.poller()
    try:
        poller.register(world.c, READ)
        poller.modify(world.c, WRITE)
        poller.poll(0)
        poller.poll(1e-5)
        poller.unregister(world.c)
    finally:
        poller.close()
    yield


@operation
def reinit(world):
    """In a child, which is made when all is prepared: see attempt()."""
    yield
    world.loop.reinit()
    yield


# -- The sweep of errors -------------------------------------------------------


def sweep_errors(poller):
    prepare()
    faults = Faults()
    problems = []
    cases = 0
    for operation in OPERATIONS:
        seen = attempt(faults, poller, operation)
        for call, count in seen.items():
            for name in CALLS[call].split():
                if (operation.__name__, call, name) in BELIEVED:
                    continue
                if (
                    poller is ioloop._Select
                    and name in OF_EPOLL
                    and call == "epoll_ctl"
                ):
                    continue
                for nth in range(1, count + 1):
                    cases += 1
                    try:
                        attempt(
                            faults, poller, operation, [call], nth, getattr(errno, name)
                        )
                    except Exception as error:
                        case = f"{operation.__name__}, {name} from {call} number {nth}"
                        problems.append(f"{case}: {error!r}")
    print(f"{cases} cases")
    sys.exit("\n".join(problems) or None)


def prepare():
    """No collection, no log and no hang in the middle of a sweep."""
    gc.disable()
    gc.freeze()  # what is there by now needn't be looked at by each gc.collect()
    logging.disable()
    faulthandler.dump_traceback_later(240, exit=True)


def attempt(faults, poller, operation, *fault):
    """Do it with a fault, or none; return what calls it made."""
    world = World(poller)
    with contextlib.closing(world):
        steps = operation(world)
        next(steps)
        if operation is reinit:
            return in_child(lambda: conclude(faults, world, steps, fault))
        return conclude(faults, world, steps, fault)


def conclude(faults, world, steps, fault):
    before = None if world.is_forked() else world.state()
    try:
        with faults.armed(*fault):
            next(steps)
    except CLEAN:
        if not fault:
            raise
        if world.is_forked():
            world.loop.reinit()
        else:
            assert_same(before, world.state())
    else:
        next(steps, None)
    world.check()
    return faults.seen()


def in_child(function):
    """What it returns or fails with in a forked child, as text and back."""
    reader, writer = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            answer = function()
        except BaseException as error:
            answer = repr(error)
        os.write(writer, repr(answer).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        seen = ast.literal_eval(answer.read())
    os.waitpid(pid, 0)
    assert isinstance(seen, dict), seen
    return seen


def assert_same(before, after):
    changed = {k: (before[k], after[k]) for k in before if before[k] != after[k]}
    assert not changed, f"it failed and changed {changed}"


# -- The sweep of signals ------------------------------------------------------


def sweep_signals(poller):
    """At every call of a loop that does a bit of everything and then sleeps.

    The sleep is ended by the signal alone: a handler that does not run at once
    leaves the loop asleep.
    """
    prepare()
    faults = Faults()
    problems = []
    cases = 0
    for number in (signal.SIGUSR1, signal.SIGINT):
        for wakeup_fd in (None, "foreign"):
            nth = 1
            while True:
                case = poller, number, wakeup_fd, nth
                struck, problem = signal_at(faults, *case)
                if problem:
                    # A busy machine looks as if the loop slept on.  What falls at a
                    # certain call falls there again.
                    struck, problem = signal_at(faults, *case)
                if problem:
                    problems.append(problem)
                if not struck:
                    break
                nth += 1
            cases += nth - 1
            assert nth > 10, "the workload makes few calls"
    print(f"{cases} cases")
    sys.exit("\n".join(problems) or None)


def signal_at(faults, poller, number, wakeup_fd, nth):
    """Raise a signal at the nth call: whether there were so many, and what is wrong."""
    problem = None
    world = World(poller)
    with contextlib.closing(world):
        if wakeup_fd:
            world.close_later(signal.set_wakeup_fd, -1)
            signal.set_wakeup_fd(world.d.fileno(), warn_on_full_buffer=False)
        before = world.state()
        work = Workload(world, faults, nth)
        signal.signal(signal.SIGUSR1, work.on_signal)
        with faults.armed(SIGNALLED, nth, 0, number):
            work.run()
        if work.has_struck():
            try:
                work.check()
                after = world.state()
                for key in ("callbacks", "timeouts"):
                    after[key] = before[key]
                assert_same(before, after)
                world.check()
            except AssertionError as error:
                case = f"{number.name} at call {nth}, wakeup fd {wakeup_fd}"
                problem = f"{case}: {error}"
        return work.has_struck(), problem


class Workload:
    """Callables in C only: an interrupt falls before one or after, not inside."""

    def __init__(self, world, faults, nth):
        self.world, self.faults, self.nth = world, faults, nth
        self.loop = loop = world.loop
        self.ran = []
        self.signals = 0
        self.ended = self.late = False
        loop.set_blocking_log_threshold(LONG)
        for n in range(10):
            loop.add_callback(self.ran.append, n)
            loop.call_later(1e-5 * n, self.ran.append, 10 + n)
            loop.call_later(1e-5 * n, loop.add_callback, self.ran.append, 20 + n)
        loop.add_callback(loop.update_handler, world.d, READ | WRITE)
        loop.add_callback(loop.update_handler, world.d, READ)
        loop.add_callback(loop.add_handler, world.c.fileno(), os.read, READ)
        world.d.send(b"event")
        # It wakes a loop that sleeps, and nothing else happens then.
        loop.call_later(5e-4, _thread.start_new_thread, self.in_thread, ())
        self.fallback = loop.call_later(0.3, self.give_up)
        self.expected = [*range(30), "thread"]

    def in_thread(self):
        self.loop.add_callback(self.ran.append, "thread")

    def on_signal(self, *_):
        self.signals += 1
        self.loop.add_callback_from_signal(self.loop.stop)

    def has_struck(self):
        return self.faults["seen"].value >= self.nth

    def give_up(self):
        """Unless the signal is to come when the loop leaves."""
        self.ended, self.late = True, self.has_struck()
        self.loop.stop()

    def run(self):
        while not self.ended and not (self.signals and self.is_complete()):
            if self.signals:
                self.loop.call_later(1e-4, self.loop.stop)
            try:
                self.loop.start()
            except KeyboardInterrupt:
                self.signals += 1

    def is_complete(self):
        return len(self.ran) >= len(self.expected)

    def check(self):
        assert not self.late, f"the loop slept on, {self.signals} signals handled"
        assert self.signals == 1, f"{self.signals} signals handled"
        assert sorted(self.ran, key=str) == sorted(self.expected, key=str), self.ran
        # A byte for each event: os.read got the mask, READ, as the length.
        with contextlib.suppress(BlockingIOError):
            while self.world.c.recv(1):
                self.loop.run_once(0)
        self.loop.remove_handler(self.world.c)
        self.loop.set_blocking_log_threshold(None)
        self.fallback.cancel()
