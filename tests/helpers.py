"""Fakes and shorthands shared by the tests."""

import contextlib
import ctypes
import itertools
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from collections import deque
from pathlib import Path

import pytest

import ioloop

NONE, READ, WRITE, ERROR = 0, 0x001, 0x004, 0x018


# -- Time and readiness as a script -------------------------------------------


class FakeClock:
    """A `time_func` that moves only when told to."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


class ScriptEnded(BaseException):
    """A ScriptedPoller was asked to wait for ever."""


class ScriptedPoller:
    """An `impl` whose polls answer the given batches, one each.

    A batch is a list of (fd, events) or a function that returns one.  A poll
    without a batch is a wait: `clock` moves by its seconds.
    """

    def __init__(self, *batches, clock=None):
        self.batches = deque(batches)
        self.clock = clock
        self.registered = {}
        self.waker = None
        self.polls = []
        self.log = []

    def register(self, fd, events):
        if fd in self.registered:
            raise FileExistsError(fd)
        if self.waker is None:
            self.waker = fd
        self.registered[fd] = events
        self.log.append(("register", fd, events))

    def modify(self, fd, events):
        if fd not in self.registered:
            raise FileNotFoundError(fd)
        self.registered[fd] = events
        self.log.append(("modify", fd, events))

    def unregister(self, fd):
        del self.registered[fd]
        self.log.append(("unregister", fd))

    def poll(self, seconds):
        self.polls.append(seconds)
        if self.batches:
            batch = self.batches.popleft()
            return batch() if callable(batch) else batch
        if seconds < 0:
            raise ScriptEnded
        if self.clock is not None:
            self.clock.advance(seconds)
        return []


# -- Running a loop -----------------------------------------------------------


class Recorder(list):
    """A handler that notes (fd, events) of its calls."""

    def __call__(self, fd, events):
        self.append((fd, events))

    def take(self):
        calls = list(self)
        self.clear()
        return calls


def turn(loop, times=1):
    """Run iterations that do not wait."""
    for _ in range(times):
        loop.run_once(0)


def run_until(loop, done, seconds=10):
    """Run iterations until `done()`, sleeping in the poller only."""
    end = time.monotonic() + seconds
    while not done():
        left = end - time.monotonic()
        assert left > 0, "the loop did not get there"
        loop.run_once(left)


@contextlib.contextmanager
def spin_guard(loop, polls):
    """The loop polls at most so often inside the block; a spin makes thousands."""
    before = loop.stats()["polls"]
    yield
    made = loop.stats()["polls"] - before
    assert made <= polls, f"{made} polls: the loop spins"


def idle(loop, seconds=0.05, polls=3):
    """Start the loop for a while in which nothing may happen."""
    loop.call_later(seconds, loop.stop)
    with spin_guard(loop, polls):
        loop.start()


# -- Descriptors --------------------------------------------------------------


@contextlib.contextmanager
def pairs(count=1):
    """`count` connected non-blocking socket pairs, closed at the end."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            pair = socket.socketpair()
            for sock in pair:
                sock.setblocking(False)
                stack.enter_context(sock)
            made.append(pair)
        yield made


@contextlib.contextmanager
def pair():
    """One connected non-blocking socket pair."""
    with pairs() as [(a, b)]:
        yield a, b


@contextlib.contextmanager
def tcp_pair():
    """A connected non-blocking pair of TCP sockets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = socket.create_connection(server.getsockname())
        b, _ = server.accept()
    with a, b:
        a.setblocking(False)
        b.setblocking(False)
        yield a, b


@contextlib.contextmanager
def pipe():
    """A non-blocking pipe as (reader, writer); either may be closed meanwhile."""
    ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield ends
    finally:
        for fd in ends:
            close(fd)


def close(*fds):
    """Close numbers that may be closed already."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def free_number():
    """A descriptor number that is free, and not the lowest."""
    fds = [os.dup(0) for _ in range(4)]
    close(*fds)
    return fds[-1]


@contextlib.contextmanager
def limit(which, soft):
    """A soft resource limit inside the block (raised as far as root may)."""
    old, hard = resource.getrlimit(which)
    try:
        resource.setrlimit(which, (soft, max(hard, soft)))
    except (ValueError, PermissionError):
        pytest.skip(f"the limit of {hard} can't be raised to {soft}")
    try:
        yield
    finally:
        resource.setrlimit(which, (old, max(hard, soft)))


@contextlib.contextmanager
def nothing_free(spare=0):
    """No descriptor can be opened inside the block, but for `spare`."""
    with limit(resource.RLIMIT_NOFILE, 64):
        fillers = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    fillers.append(os.dup(0))
            for _ in range(spare):
                os.close(fillers.pop())
            yield
        finally:
            close(*fillers)


# -- Processes ----------------------------------------------------------------


def run_python(code, *args, prelude="import ioloop\n", timeout=30, check=True, **env):
    """Run `code` in a new interpreter; return the completed process."""
    here = Path(__file__).parent
    path = [str(Path(ioloop.__file__).parent), str(here)]
    done = subprocess.run(
        [sys.executable, "-Werror", "-c", prelude + textwrap.dedent(code), *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"
    return done


@contextlib.contextmanager
def child():
    """Fork: true in the child, which never leaves the block; false in the parent.

    The parent waits for the child at the end and wants it to exit with 0.
    """
    with warnings.catch_warnings():
        # 3.12 and later warn of other threads: the hang guard's is harmless.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            yield True
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    try:
        yield False
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child failed: {status}"


# Numbers of the system calls, by machine.
SYSCALLS = {
    "x86_64": {
        "dup": 32,
        "epoll_create1": 291,
        "epoll_ctl": 233,
        "epoll_pwait2": 441,
        "epoll_wait": 232,
        "eventfd2": 290,
        "fcntl": 72,
        "pipe2": 293,
        "timer_create": 222,
        "write": 1,
    },
    "aarch64": {
        "dup": 23,
        "epoll_create1": 20,
        "epoll_ctl": 21,
        "epoll_pwait2": 441,
        "eventfd2": 19,
        "fcntl": 25,
        "pipe2": 59,
        "timer_create": 107,
        "write": 64,
    },
}


def deny(name, error, second=None):
    """From now on let system call `name` fail in this process, by seccomp.

    With `second`, only calls with that second argument (its lower half).  There is
    no way back: only for processes made by run_python() or child().
    """
    number = SYSCALLS[platform.machine()][name]

    class Instruction(ctypes.Structure):
        _fields_ = (
            ("code", ctypes.c_ushort),
            ("jt", ctypes.c_ubyte),
            ("jf", ctypes.c_ubyte),
            ("k", ctypes.c_uint32),
        )

    class Program(ctypes.Structure):
        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    load, jump_if_equal, answer = 0x20, 0x15, 0x06
    allow, fail_with = 0x7FFF0000, 0x00050000
    number_at, second_at = 0, 24
    steps = [
        (load, 0, 0, number_at),
        (jump_if_equal, 0, 1, number),
        (answer, 0, 0, fail_with | error),
        (answer, 0, 0, allow),
    ]
    if second is not None:
        steps[1] = (jump_if_equal, 0, 3, number)
        steps[2:2] = [(load, 0, 0, second_at), (jump_if_equal, 0, 1, second)]
    program = (Instruction * len(steps))(*steps)
    descriptor = Program(len(steps), ctypes.cast(program, ctypes.c_void_p))
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(
        set_seccomp, filter_mode, ctypes.byref(descriptor), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp")


def can_deny():
    """Whether deny() works here (another machine, a container's policy)."""
    if platform.machine() not in SYSCALLS:
        return False
    code = "import helpers; helpers.deny('pipe2', 38)"
    return run_python(code, check=False).returncode == 0


def permutations(count):
    """All orders of `count` things, with readable ids."""
    orders = list(itertools.permutations(range(count)))
    return pytest.mark.parametrize(
        "order", orders, ids=["".join(map(str, order)) for order in orders]
    )
