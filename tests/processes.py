"""Other processes, other threads, and how threads share the GIL with a loop."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
import warnings
from pathlib import Path

import building
import pytest

import ioloop

# -- Processes -----------------------------------------------------------------


def run_python(
    code, *args, prelude="import ioloop\n", timeout=30, check=True, under=(), **env
):
    """Run `code` in a new interpreter, or `under` another command that runs it.

    Return the completed process.
    """
    here = Path(__file__).parent
    path = [str(Path(ioloop.__file__).parent), str(here)]
    python = [*under, sys.executable, "-Werror", "-c"]
    done = subprocess.run(
        [*python, prelude + textwrap.dedent(code), *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"
    return done


def fork():
    """os.fork(), which warns of other threads: the hang guard's is harmless."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


@contextlib.contextmanager
def forking():
    """A function that forks; its children never leave the block.

    A child exits with 0 if it gets to the end of the block without an exception.
    There the parent waits for it, and wants it to have done so.
    """
    parent, children = os.getpid(), []

    def fork_child():
        pid = fork()
        children.append(pid)
        return pid

    code = 1
    try:
        yield fork_child
        code = 0
    except BaseException:
        if os.getpid() == parent:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise
        sys.excepthook(*sys.exc_info())
    finally:
        if os.getpid() != parent:
            os._exit(code)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    assert not any(statuses), f"a child failed: {statuses}"


@contextlib.contextmanager
def program(*command):
    """What Python runs with these arguments, as a process; it has ended afterwards."""
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def end_of(process, timeout=10):
    """What it still prints before it ends, as it should and without an error."""
    output, errors = process.communicate(timeout=timeout)
    assert (process.returncode, errors) == (0, "")
    return output


@contextlib.contextmanager
def child():
    """Fork: True in the child, which never leaves the block; False in the parent."""
    with forking() as fork:
        yield fork() == 0


def in_child(target, *args):
    """Call `target` in a forked child, where it must not fail."""
    with child() as inside:
        if inside:
            target(*args)


# -- Threads -------------------------------------------------------------------

# CPython looks at the state of a busy daemon thread after it has freed it at exit, and
# musl unmaps what is freed.
MUSL = "musl" in (sysconfig.get_config_var("HOST_GNU_TYPE") or "")
exits_with_a_busy_thread = pytest.mark.skipif(
    MUSL or building.IS_3_13T,
    # The lock of a thread that was stopped for ever: _Py_brc_remove_thread() waits for
    # it, in one exit of some 2,000 also with plain threads and a deque.
    reason="CPython itself crashes at exit with musl, and may hang without the GIL",
)


class Thread(threading.Thread):
    """A started daemon; join() returns what its target did, or raises.

    As a context manager it is joined at the end of the block.
    """

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

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error is None:
            self.join()


def in_thread(target, *args):
    """Call `target` in another thread; return what it does, or raise."""
    return Thread(target, *args).join()


def together(*targets):
    """Call each in a thread of its own, all at the same moment; their results."""
    barrier = threading.Barrier(len(targets))

    def run(target):
        barrier.wait()
        return target()

    return [thread.join() for thread in [Thread(run, target) for target in targets]]


def at_once(count, target, *args):
    """Call `target` in `count` threads at the same moment; their results."""
    return together(*[functools.partial(target, *args)] * count)


def wait_until(done, seconds=30):
    """Wait for another thread or process to get somewhere."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.0002)


# The number of futex(), in which threads wait for locks, on x86-64, arm64, i386 (two)
# and s390x.  Under emulation it is that of the machine outside.
FUTEX = ("202", "98", "240", "422", "238")


def is_asleep(thread):
    """Whether a thread waits in a system call that is not for a lock."""
    return task_is_asleep(f"self/task/{thread.native_id}")


def task_is_asleep(task):
    """The same of a thread, or the main thread of a process, by its name in /proc."""
    try:
        with open(f"/proc/{task}/syscall") as state:
            number = state.read().split()[0]
    except OSError:
        return False
    return number not in ("running", "-1", *FUTEX)


def needs_is_asleep():
    if sys.platform != "linux":
        pytest.skip("only Linux shows who is asleep")


def when_asleep(function, *args):
    """Call it in a thread, once the main thread sleeps in a poll."""
    needs_is_asleep()
    main = threading.main_thread()

    def wait():
        wait_until(lambda: is_asleep(main))
        function(*args)

    return Thread(wait)


# -- A loop and other threads --------------------------------------------------


@contextlib.contextmanager
def sleeping(loop):
    """A thread that runs `loop`, asleep in the poll; stopped at the end."""
    needs_is_asleep()
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
    with Thread(loop.start):
        try:
            wait_until(lambda: loop.stats()["polls"])
            yield
        finally:
            loop.stop()


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


# -- The GIL -------------------------------------------------------------------


@contextlib.contextmanager
def switch_interval(seconds):
    """How long a thread waits for the GIL before it asks for it."""
    before = sys.getswitchinterval()
    # Python cuts it to microseconds: 1e-6 to 0 on i386, which can't be set again.
    sys.setswitchinterval(seconds + 1e-7)
    try:
        yield
    finally:
        sys.setswitchinterval(before + 1e-7)


def assert_shares_gil(loop, turns=30):
    """Give the GIL away; the loop gives it back, after a bounded number of passes."""
    with switch_interval(0.005):
        before = loop.stats()["iterations"]
        for _ in range(turns):
            time.sleep(0)
        # Some 50,000 passes fit into an interval.
        assert loop.stats()["iterations"] - before < turns * 500_000
