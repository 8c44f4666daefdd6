"""What the kernel gives and refuses: descriptors, limits, system calls, signals."""

import contextlib
import ctypes
import os
import platform
import resource
import signal
import socket

import pytest
from building import IS_3_13T
from processes import run_python

# -- Sockets and pipes ---------------------------------------------------------


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
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    try:
        yield ends
    finally:
        for fd in ends:
            close(fd)


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


# -- Descriptors and limits ----------------------------------------------------


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


def is_link_to(path, target):
    try:
        return os.readlink(path) == target
    except OSError:
        return False


@contextlib.contextmanager
def broken_bell(reader):
    """A waker, known by its reading end, that can't be signalled inside the block."""
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


# -- System calls that fail ----------------------------------------------------

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
    "i686": {
        "dup": 41,
        "epoll_create1": 329,
        "epoll_ctl": 255,
        "epoll_pwait2": 441,
        "epoll_wait": 256,
        "eventfd2": 328,
        "fcntl": 221,
        "pipe2": 331,
        "timer_create": 259,
        "write": 4,
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
    code = "import kernel; kernel.deny('pipe2', 38)"
    return run_python(code, check=False).returncode == 0


def nomemory():
    """The module with set_nomemory(), which lets allocations fail; or skip the test."""
    if IS_3_13T:
        pytest.skip("a list for which there is no memory corrupts CPython 3.13t's heap")
    return pytest.importorskip("_testcapi", reason="this CPython has no _testcapi")


# -- Signals -------------------------------------------------------------------

_libc = ctypes.CDLL(None)


def pend(number):
    """Raise a signal without running its Python handler on the way.

    To be queued as it is, without a Python function around it: the next point
    at which the interpreter or the loop looks for signals is theirs.
    """
    return _libc["raise"], number


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
def alarm(seconds, handler, interval=0.0):
    """SIGALRM's handler and the timer that raises it inside the block."""
    with on_signal(signal.SIGALRM, handler):
        signal.setitimer(signal.ITIMER_REAL, seconds, interval)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
