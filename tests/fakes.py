"""Fakes and shorthands for what happens inside a loop.

Time and readiness as a script (FakeClock, ScriptedPoller), what records its calls
(Recorder) or fails (fail, Hostile), shorthands to run a loop (turn, idle, ...), and
the methods of a loop with arguments to call them with.
"""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import itertools
import time
from collections import deque

import pytest

NONE, READ, WRITE, ERROR = 0, 0x001, 0x004, 0x018

FOREVER = 3600


# -- Time and readiness as a script --------------------------------------------


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
    """An `impl` whose polls return the given batches, one each.

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


def permutations(count):
    """All orders of `count` things, with readable ids."""
    orders = list(itertools.permutations(range(count)))
    return pytest.mark.parametrize(
        "order", orders, ids=["".join(map(str, order)) for order in orders]
    )


# -- Callbacks and handlers ----------------------------------------------------


class Recorder(list):
    """A handler that records the (fd, events) of its calls."""

    def __call__(self, fd, events):
        self.append((fd, events))

    def take(self):
        calls = list(self)
        self.clear()
        return calls


class Exit(BaseException):
    """Not an Exception: it leaves start()."""


def fail(error=ValueError):
    """Raise an exception, an instance or a class."""
    raise error


def outcome(function, *args):
    """What it returns, or the exception that it raises."""
    try:
        return function(*args)
    except Exception as error:
        return error


class Await:
    """An awaitable: a future of another thread, or else the next iteration."""

    def __init__(self, future=None):
        self.future = future

    def __await__(self):
        if self.future is None:
            return (yield)
        return (yield from asyncio.wrap_future(self.future).__await__())


def finished(result=None, error=None):
    """A future that is done."""
    future = concurrent.futures.Future()
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
    return future


def context_with(variable, value):
    """A context in which a variable has a value."""
    context = contextvars.copy_context()
    context.run(variable.set, value)
    return context


# -- Hostile objects -----------------------------------------------------------


class Hostile:
    """It can be called; everything else that is done with it fails."""

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


class Float:
    """A number of which nothing but its value can be had."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return float(self.value)

    def refuse(self, *args):
        raise AssertionError("asked for more than its value")

    __getattr__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = refuse
    __bool__ = __truediv__ = refuse


class Index:
    """A number as `__index__` gives it."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return int(self.value)


# -- Running a loop ------------------------------------------------------------


def turn(loop, times=1):
    """Run iterations that do not wait."""
    for _ in range(times):
        loop.run_once(0)


def run_until(loop, done, seconds=10):
    """Run iterations until `done()`, sleeping in the poller only.

    Not for long, since it may be done before that iteration polls.
    """
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "the loop did not get there"
        loop.run_once(0.005)


def run_callback(loop, function, *args):
    """Have the loop call a function."""
    loop.add_callback(function, *args)
    turn(loop)


ways = pytest.mark.parametrize(
    "way", ["start", "run_once", "run_sync", "run_forever", "run_until_complete"]
)
our_ways = pytest.mark.parametrize("way", ["start", "run_once", "run_sync"])


def run_by(loop, way, function):
    """Run a loop in one of its ways; it calls the function meanwhile."""

    async def main():
        function()

    if way == "run_until_complete":
        loop.asyncio_loop.run_until_complete(main())
    elif way == "run_sync":
        loop.run_sync(function)
    else:
        loop.add_callback(function)
        if way == "run_once":
            return loop.run_once(0)
        loop.add_callback(loop.stop)
        loop.start() if way == "start" else loop.asyncio_loop.run_forever()


def either(loop, which, name):
    """The method of that name, of one of the two faces."""
    return getattr(loop if which == "IOLoop" else loop.asyncio_loop, name)


def running():
    """Asyncio's running loop and its current task in this thread."""
    loop = asyncio._get_running_loop()
    return loop, loop and asyncio.current_task()


def start_until(loop, error):
    """Run a loop that ends by `error`, or by stop() if that is None."""
    with pytest.raises(error) if error else contextlib.nullcontext():
        loop.add_callback(fail, error) if error else loop.add_callback(loop.stop)
        loop.start()


def block(seconds=0.15):
    """Python code that does not let go.

    For so much of the CPU's time: on a busy machine that leaves others more than
    `seconds` to notice it.
    """
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@contextlib.contextmanager
def spin_guard(loop, polls):
    """The loop polls at most `polls` times inside the block; a spin makes thousands."""
    before = loop.stats()["polls"]
    yield
    made = loop.stats()["polls"] - before
    assert made <= polls, f"{made} polls: the loop spins"


def idle(loop, seconds=0.05, polls=3):
    """Start the loop for a while in which nothing may happen."""
    loop.call_later(seconds, loop.stop)
    with spin_guard(loop, polls):
        loop.start()


@contextlib.contextmanager
def in_time(loop):
    """Something else stops the loop, long before it would stop by itself."""
    late = loop.call_later(10, loop.stop)
    yield
    assert late.callback is not None, "only the deadline stopped the loop"
    late.cancel()


# -- Methods, and arguments for them -------------------------------------------

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
    **LOOP_THREAD_ONLY,
    "add_callback": (int,),
    "add_callback_from_signal": (int,),
    "spawn_callback": (int,),
    "stop": (),
    "fileno": (),
    "stats": (),
    "install": (),
    "make_current": (),
    "set_blocking_signal_threshold": (None, None),
    "set_blocking_log_threshold": (None,),
}
del OPEN_LOOP_ONLY["close"]  # which may be called twice
