"""Shorthands for the tests of callbacks, timeouts, threads and signals."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time

from helpers import READ, pair

FOREVER = 3600


class Exit(BaseException):
    """What is no Exception, and leaves start()."""


def fail(error=ValueError):
    """Raise an exception, an instance or a class."""
    raise error


class Await:
    """Awaitable: whatever is given is yielded to the loop."""

    def __init__(self, value=None):
        self.value = value

    def __await__(self):
        return (yield self.value)


# -- Methods, and arguments for them --------------------------------------------

# What is refused in another thread than the one that runs the loop,
LOOP_THREAD_ONLY = {
    "add_handler": (0, int, READ),
    "update_handler": (0, READ),
    "remove_handler": (0,),
    "add_timeout": (0, int),
    "call_later": (0, int),
    "call_at": (0, int),
    "remove_timeout": (None,),
    "start": (),
    "run_once": (0,),
    "run_sync": (int,),
    "next_timeout": (),
    "close": (),
    "set_blocking_signal_threshold": (1, None),
    "set_blocking_log_threshold": (1,),
}

# ... and of a closed loop, or in a forked child.
OPEN_LOOP_ONLY = {
    "add_callback": (int,),
    "add_callback_from_signal": (int,),
    "spawn_callback": (int,),
    "add_handler": (0, int, READ),
    "update_handler": (0, READ),
    "remove_handler": (0,),
    "add_timeout": (0, int),
    "call_later": (0, int),
    "call_at": (0, int),
    "remove_timeout": (None,),
    "start": (),
    "stop": (),
    "run_once": (0,),
    "run_sync": (int,),
    "next_timeout": (),
    "fileno": (),
    "stats": (),
    "install": (),
    "make_current": (),
    "set_blocking_signal_threshold": (None, None),
    "set_blocking_log_threshold": (None,),
}


# -- Hostile objects -----------------------------------------------------------


class Hostile:
    """Whatever is asked of it beyond a call, it fails."""

    def __init__(self, error=None):
        self.error = error

    def __call__(self, *args):
        if self.error:
            raise self.error
        return self

    def broken(self, *args):
        raise RuntimeError("hostile")

    __repr__ = __str__ = __eq__ = __bool__ = __len__ = __iter__ = broken
    __hash__ = None


class Raises(Exception):
    """An exception that can't even be shown."""

    def __str__(self):
        raise RuntimeError("hostile")

    __repr__ = __str__


# -- Threads -------------------------------------------------------------------


class Thread(threading.Thread):
    """A started daemon; join() answers what its target returned, or raises."""

    def __init__(self, target, *args):
        super().__init__(daemon=True)
        self.call = target, args
        self.result = self.error = None
        self.start()

    def run(self):
        target, args = self.call
        try:
            self.result = target(*args)
        except BaseException as error:
            self.error = error
        finally:
            del self.call, target, args

    def join(self, timeout=30):
        super().join(timeout)
        assert not self.is_alive(), "the thread does not end"
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.result


def in_thread(target, *args):
    """Call `target` in another thread; return what it does, or raise."""
    return Thread(target, *args).join()


def at_once(count, target, *args):
    """Call `target` in `count` threads that start together; their results."""
    barrier = threading.Barrier(count)

    def run():
        barrier.wait()
        return target(*args)

    return [thread.join() for thread in [Thread(run) for _ in range(count)]]


def wait_until(done, seconds=30):
    """Wait for another thread or process to get somewhere."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.0002)


def is_asleep(thread):
    """Whether a thread waits in a system call that is not for a lock."""
    try:
        with open(f"/proc/self/task/{thread.native_id}/syscall") as state:
            number = state.read().split()[0]
    except OSError:
        return False
    futex = {"x86_64": "202", "aarch64": "98"}[os.uname().machine]
    return number not in ("running", "-1", futex)


@contextlib.contextmanager
def sleeping(loop):
    """A thread that runs `loop`, asleep in the poll; stopped at the end."""
    native_id = threading.Event()
    loop.add_callback(native_id.set)
    thread = Thread(loop.start)
    try:
        native_id.wait()
        wait_until(lambda: is_asleep(thread))
        yield thread
    finally:
        loop.stop()
        thread.join()


@contextlib.contextmanager
def busy_in_thread(loop):
    """A thread that runs `loop`, which has something to do all the time."""
    thread = Thread(loop.start)
    try:
        wait_until(lambda: loop.stats()["polls"])
        yield
    finally:
        loop.stop()
        thread.join()


@contextlib.contextmanager
def switch_interval(seconds):
    """How long a thread waits for the GIL before it asks for it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def assert_shares_gil(loop, turns=30):
    """Give the GIL away; the loop gives it back, after a bounded number of passes."""
    with switch_interval(0.005):
        before = loop.stats()["iterations"]
        for _ in range(turns):
            time.sleep(0)
        # Some 50,000 passes fit into an interval.
        assert loop.stats()["iterations"] - before < turns * 500_000


@contextlib.contextmanager
def flooded(loop):
    """Two threads that add callbacks as fast as the loop runs them."""
    done = threading.Event()

    def flood():
        while not done.is_set():
            if loop.stats()["pending_callbacks"] < 1000:
                loop.add_callback(int)

    threads = [Thread(flood) for _ in range(2)]
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def broken_bell(reader):
    """A doorbell, known by its reading end, that can't be rung inside the block."""
    pipe = os.readlink(f"/proc/self/fd/{reader}")
    [writer] = [
        int(fd)
        for fd in os.listdir("/proc/self/fd")
        if int(fd) != reader and is_link_to(f"/proc/self/fd/{fd}", pipe)
    ]
    keep, unwritable = os.dup(writer), os.open(os.devnull, os.O_RDONLY)
    try:
        os.dup2(unwritable, writer, inheritable=False)
        yield
    finally:
        os.dup2(keep, writer, inheritable=False)
        os.close(keep)
        os.close(unwritable)


def is_link_to(path, target):
    try:
        return os.readlink(path) == target
    except OSError:
        return False


# -- Signals -------------------------------------------------------------------

_libc = ctypes.CDLL(None)


def pend(number):
    """Raise a signal without running its Python handler on the way.

    To be queued as it is, without a Python function around it: the next point
    at which the interpreter or the loop looks for signals is theirs.
    """
    return _libc["raise"], number


def when_asleep(function, *args):
    """Call it in a thread, once the main thread sleeps in a poll."""
    main = threading.main_thread()

    def wait():
        wait_until(lambda: is_asleep(main))
        function(*args)

    return Thread(wait)


def kill(number=signal.SIGINT):
    os.kill(os.getpid(), number)


@contextlib.contextmanager
def on_signal(number, handler):
    """A signal's handler inside the block."""
    old = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, old)


@contextlib.contextmanager
def in_time(loop):
    """Something else stops the loop, long before it would stop by itself."""
    late = loop.call_later(10, loop.stop)
    yield
    assert late.callback is not None, "only the deadline stopped the loop"
    late.cancel()


@contextlib.contextmanager
def alarm(seconds, handler, interval=0.0):
    """SIGALRM's handler and the timer that raises it inside the block."""
    with on_signal(signal.SIGALRM, handler):
        signal.setitimer(signal.ITIMER_REAL, seconds, interval)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def compile_library(source, target):
    """Compile C for LD_PRELOAD or ctypes."""
    command = [
        *sysconfig.get_config_var("CC").split(),
        *("-shared", "-fPIC", "-O1", str(source), "-o", str(target), "-ldl"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return target


# -- I/O -----------------------------------------------------------------------


@contextlib.contextmanager
def readable():
    """A socket with something to read, and its peer."""
    with pair() as (a, b):
        b.send(b"x")
        yield a, b


def drain(sock):
    """Read what is there."""
    with contextlib.suppress(BlockingIOError, socket.timeout):
        while sock.recv(65536):
            pass
