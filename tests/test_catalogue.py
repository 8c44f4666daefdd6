"""Rows of the failure catalogue that belong to no single part of the loop, and the
table of all rows in README.md."""

import ast
import asyncio
import contextlib
import contextvars
import ctypes
import errno
import faulthandler
import gc
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from helpers import (
    NONE,
    READ,
    WRITE,
    Recorder,
    can_deny,
    free_number,
    idle,
    nothing_free,
    pair,
    pairs,
    run_until,
    spin_guard,
    turn,
)
from support import (
    FOREVER,
    Exit,
    Hostile,
    Thread,
    at_once,
    compile_library,
    fail,
    in_thread,
    on_signal,
    sleeping,
    wait_until,
)

HERE = Path(__file__).parent
ROWS = {"A": 36, "B": 27, "C": 22, "D": 29, "E": 28, "F": 15}


# -- The table -----------------------------------------------------------------


def table():
    """{row: (what ioloop does, test)} of README.md."""
    text = (HERE / "README.md").read_text()
    rows = re.findall(r"^\| ([A-F]\d+) \| (.*?) \| (.*?) \|$", text, re.M)
    assert len(rows) == len({row for row, *_ in rows}), "a row is there twice"
    return {row: rest for row, *rest in rows}


def existing_tests():
    """The names `file::test` of this directory."""
    found = set()
    for path in HERE.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                found.add(f"{path.name}::{node.name}")
    return found


def test_every_test_named_after_a_row_is_in_the_table():
    rows = table()
    for name in existing_tests():
        for row in re.findall(r"_([A-F]\d+)(?=_)", name):
            assert f"`{name}`" in rows[row][1]


def test_every_row_has_a_test_that_exists_or_a_reason():
    rows, exist = table(), existing_tests()
    assert list(rows) == [
        f"{letter}{n}" for letter, last in ROWS.items() for n in range(1, last + 1)
    ]
    for row, (what, named) in rows.items():
        names = re.findall(r"`(.*?)`", named)
        assert what and set(names) <= exist, row
        assert names or what.startswith("does not apply: "), row


# -- A: file descriptors -------------------------------------------------------


def test_A27_a_server_out_of_descriptors_pauses_without_spinning(loop):
    accepted, refused = [], []

    def accept(server, events):
        try:
            accepted.append(server.accept()[0])
        except OSError as error:
            refused.append(error.errno)
            loop.update_handler(server, NONE)
            loop.call_later(0.02, loop.update_handler, server, READ)

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.setblocking(False)
        for _ in range(5):
            client = socket.create_connection(server.getsockname())
            stack.enter_context(client)
        loop.add_handler(server, accept, READ)
        with nothing_free(), spin_guard(loop, 30):
            loop.call_later(0.1, loop.stop)
            loop.start()
        assert set(refused) == {errno.EMFILE} and not accepted
        run_until(loop, lambda: len(accepted) == 5)
        loop.remove_handler(server)
        for sock in accepted:
            sock.close()


def test_A36_a_removed_fd_has_left_the_kernels_set(loop):
    """At once: a duplicate that lives on has nothing to report."""
    with pair() as (a, b):
        calls = Recorder()
        b.send(b"x")
        for _ in range(20):
            loop.add_handler(a, calls, READ)
            loop.remove_handler(a)
            duplicate = a.dup()
            a.close()
            a = duplicate
        idle(loop)
        assert calls == []
        a.close()


# -- B: threads and processes --------------------------------------------------


def test_B2_who_can_not_ring_is_told(poller):
    """A sandboxed thread whose write() is refused; others still wake the loop."""
    if not can_deny():
        pytest.skip("needs seccomp and known system call numbers")
    poller.run(
        """
        import errno, helpers, support, sys
        loop = ioloop.IOLoop(impl=impl())
        log = []

        def refused():
            helpers.deny("write", errno.EPERM)  # of this thread
            try:
                loop.add_callback(int)
            except OSError as error:
                return error.errno

        with support.sleeping(loop):
            assert support.in_thread(refused) == errno.EPERM
            loop.add_callback(log.append, 1)
            support.wait_until(lambda: log)
        loop.close()
        """
    )


def test_B20_children_made_without_python(loop, tmp_path):
    """By C code without the GIL: no handler of ours runs in them."""
    source = tmp_path / "forker.c"
    source.write_text(
        "#include <sys/wait.h>\n#include <unistd.h>\n"
        "int fork_and_wait(void) {\n"
        "    int status = -1;\n"
        "    pid_t pid = fork();\n"
        "    if (pid == 0)\n"
        "        _exit(0);\n"
        "    waitpid(pid, &status, 0);\n"
        "    return status;\n"
        "}\n"
    )
    library = ctypes.CDLL(str(compile_library(source, tmp_path / "forker.so")))
    log = []
    with sleeping(loop):
        for n in range(20):
            assert library.fork_and_wait() == 0
            loop.add_callback(log.append, n)
        wait_until(lambda: log == list(range(20)))


def test_B21_a_child_forked_by_a_thread(poller):
    """There that thread is the main one, with all that is the main thread's."""
    poller.run(
        """
        import os, signal, support, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        old = ioloop.IOLoop(impl=impl())
        old.call_later(0, old.stop)
        old.start()

        def use(loop):
            loop.set_blocking_signal_threshold(30, None)
            loop.call_later(3600, int)
            loop.add_callback(*support.pend(signal.SIGUSR1))
            with support.on_signal(signal.SIGUSR1, lambda *_: loop.stop()):
                loop.start()
            loop.close()

        def fork():
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    old.reinit()
                    use(old)
                    use(ioloop.IOLoop(impl=impl()))
                    code = 0
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                os._exit(code)
            return os.waitpid(pid, 0)[1]

        assert support.in_thread(fork) == 0
        use(old)
        """
    )


def test_B27_cancelling_belongs_to_the_loops_thread(loop):
    """While it runs nobody else can race with it; idle, any order is fine."""
    count, log = 500, []
    handles = [loop.call_later(0.01 + n * 2e-5, log.append, n) for n in range(count)]

    def cancel_all():
        refused = 0
        for handle in handles:
            try:
                handle.cancel()
            except RuntimeError:
                refused += 1
        return refused

    with sleeping(loop):
        in_thread(cancel_all)
        wait_until(lambda: len(log) == count)
    assert log == list(range(count))
    handles = [loop.call_later(FOREVER, int) for _ in range(count)]
    assert at_once(3, cancel_all) == [0] * 3
    assert loop.stats()["pending_timeouts"] == 0


# -- C: clocks and counters ----------------------------------------------------


def test_C9_ties_on_the_wall_clock(loop):
    """Equal UNIX times are ties, whatever happens to the clocks between the calls."""
    for when in (1.0, time.time() + 0.002):
        log = []
        for n in range(20):
            loop.add_timeout(when, log.append, n)
        loop.call_later(0.01, loop.stop)
        loop.start()
        assert log == list(range(20))


def counters(loop, size, count):
    """The loop's integers of so many bytes that go up by one with each `count()`."""
    integer = {4: ctypes.c_uint32, 8: ctypes.c_uint64}[size]
    parts = [
        part
        for part in gc.get_referents(loop)
        if type(part).__name__ in ("_Table", "_Timers", "_Queue")
    ]
    # Behind the reference count and the type.
    found = [
        integer.from_address(id(part) + offset)
        for part in parts
        for offset in range(16, type(part).__basicsize__, size)
    ]
    for _ in range(3):
        before = [number.value for number in found]
        count()
        found = [n for n, old in zip(found, before, strict=True) if n.value == old + 1]
    return found


@pytest.mark.parametrize("poller", ["epoll", "select"], indirect=True)
def test_C22_generations_wrap_around(loop):
    """None of the numbers is 0, which stands for no registration."""
    with pairs(2) as [(a, b), (c, d)]:
        calls = Recorder()

        def count():
            loop.add_handler(a, calls, READ)
            loop.remove_handler(a)

        [generation] = counters(loop, 4, count)
        generation.value = 2**32 - 3
        loop.add_handler(c, calls, READ)
        d.send(b"x")
        b.send(b"x")
        for _ in range(6):
            loop.add_handler(a, calls, READ)
            turn(loop)
            assert sorted(calls.take(), key=repr) == sorted(
                [(a, READ), (c, READ)], key=repr
            )
            assert loop.stats()["handlers"] == 2
            loop.remove_handler(a)
        assert 0 < generation.value < 10


@pytest.mark.parametrize("poller", ["epoll", "select"], indirect=True)
def test_C22_the_number_of_a_batch_wraps_around(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ)
        b.send(b"x")
        found = counters(loop, 4, lambda: turn(loop))
        calls.clear()
        assert found
        for number in found:
            number.value = 2**32 - 3
        turn(loop, 8)
        assert calls == [(a, READ)] * 8


def test_C22_the_order_of_adding_has_64_bits(make_loop):
    log = []

    def count():
        loop.call_later(FOREVER, int).cancel()

    loop = make_loop(time_func=lambda: 1000.0)
    for added in counters(loop, 8, count):
        added.value = 2**32 - 3
    for n in range(8):
        loop.add_timeout(1.0, log.append, n)
    turn(loop)
    assert log == list(range(8))


# -- D: state that is the interpreter's ----------------------------------------


def test_D28_an_exception_leaves_nothing_behind(loop, make_loop):
    """Whatever start() changed of the interpreter is as before."""
    variable = contextvars.ContextVar("variable", default="outside")

    def state():
        return (
            type(loop).current(instance=False),
            sys.exc_info(),
            sys.get_asyncgen_hooks(),
            sys.getrecursionlimit(),
            sys.gettrace(),
            variable.get(),
            asyncio._get_running_loop(),
            signal.getsignal(signal.SIGALRM),
            loop.running(),
        )

    def change():
        variable.set("inside")
        other = make_loop()
        other.add_callback(fail, Exit)
        with contextlib.suppress(Exit):
            other.start()
        assert type(loop).current() is loop
        raise Exit

    before = state()
    for run in (loop.start, loop.run_once):
        loop.add_callback(change)
        with pytest.raises(Exit):
            run()
        assert state() == before
    with pytest.raises(Exit):
        loop.run_sync(change)
    assert state() == before


def test_D29_nothing_is_shown_unless_it_is_logged(loop):
    """No repr(), no traceback: what they cost or raise is nobody's concern."""
    shy = Hostile()
    loop.add_callback(shy, shy, shy)
    loop.call_later(0, shy, shy)
    with pair() as (a, b):
        b.send(b"x")
        loop.add_handler(a, shy, READ)
        turn(loop, 3)
        loop.remove_handler(a)
    assert loop.stats()["callbacks"] == loop.stats()["timeouts"] == 1


# -- E: signals and children ---------------------------------------------------


def test_E4_signals_without_a_python_handler_are_none_of_the_loops(loop):
    """Ignored, or ignored by default: the loop sleeps on, however many come."""
    with on_signal(signal.SIGUSR1, signal.SIG_IGN):
        done = threading.Event()

        def annoy():
            while not done.is_set():
                signal.pthread_kill(main, signal.SIGUSR1)
                signal.pthread_kill(main, signal.SIGURG)
                time.sleep(0.002)

        main = threading.get_ident()
        thread = Thread(annoy)
        try:
            idle(loop)
        finally:
            done.set()
            thread.join()


def test_E11_a_signal_with_events_costs_none_of_them(loop):
    """Both at once, again and again, and every byte arrives."""
    rounds, log = 200, []
    main = threading.get_ident()
    gate = threading.Semaphore(0)

    def read(sock, events):
        log.append(sock.recv(1))
        gate.release()
        if len(log) == rounds:
            loop.stop()

    def send(sock):
        for _ in range(rounds):
            signal.pthread_kill(main, signal.SIGUSR1)
            sock.send(b"x")
            signal.pthread_kill(main, signal.SIGUSR1)
            gate.acquire()

    with on_signal(signal.SIGUSR1, lambda *_: None), pair() as (a, b):
        loop.add_handler(a, read, READ)
        thread = Thread(send, b)
        loop.start()
        thread.join()
    assert log == [b"x"] * rounds


def test_E12_a_profiler_does_not_disturb(loop):
    """Its signals count CPU time: none while the loop sleeps, any while it works."""
    ticks, log = [], []
    with on_signal(signal.SIGPROF, lambda *_: ticks.append(1)):
        signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
        try:
            idle(loop, seconds=0.2, polls=20)
            asleep = len(ticks)
            end = time.process_time() + 0.1

            def work(n):
                log.append(n)
                if time.process_time() < end:
                    loop.add_callback(work, n + 1)
                else:
                    loop.stop()

            loop.add_callback(work, 0)
            loop.start()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    assert asleep < 20
    assert len(ticks) > asleep
    assert log == list(range(len(log)))


def spawn(code=0):
    """A child that exits at once, not yet waited for."""
    return os.posix_spawn("/bin/sh", ["sh", "-c", f"exit {code}"], {})


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open()")
def test_E24_children_are_left_to_who_made_them(loop):
    """The loop waits for nobody: each child ends with its own status."""
    count, statuses = 20, {}
    foreign = spawn(77)

    def reap(fd, events, pid):
        statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        loop.remove_handler(fd)
        os.close(fd)

    children = {spawn(code): code for code in range(count)}
    for pid in children:
        fd = os.pidfd_open(pid)
        loop.add_handler(fd, lambda *call, pid=pid: reap(*call, pid), READ)
    run_until(loop, lambda: len(statuses) == count)
    assert statuses == children
    assert os.waitstatus_to_exitcode(os.waitpid(foreign, 0)[1]) == 77


def test_E24_many_children_that_end_at_once_are_one_signal(loop):
    """Its handler queues a callback, which looks at each child."""
    left = set()

    def reap():
        for pid in list(left):
            if os.waitpid(pid, os.WNOHANG)[0]:
                left.remove(pid)
        if not left:
            loop.stop()

    def on_child(*_):
        loop.add_callback(reap)

    with on_signal(signal.SIGCHLD, on_child):
        left.update(spawn() for _ in range(20))
        loop.add_callback(reap)
        loop.start()
    assert not left


def signal_masks():
    """The lines of a new process's status about its signals."""
    command = ["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]
    return subprocess.check_output(command, text=True)


@pytest.mark.parametrize("foreign_wakeup_fd", [False, True])
def test_E25_children_get_the_signal_mask_that_was(loop, foreign_wakeup_fd):
    """Also those of a thread, while the loop sleeps with signals blocked."""
    log, expected = [], signal_masks()
    with pair() as (a, b), contextlib.ExitStack() as stack:
        if foreign_wakeup_fd:
            signal.set_wakeup_fd(b.fileno(), warn_on_full_buffer=False)
            stack.callback(signal.set_wakeup_fd, -1)

        def spawn_while_asleep():
            time.sleep(0.05)
            log.append(signal_masks())
            loop.stop()

        loop.add_callback(lambda: log.append(signal_masks()))
        thread = Thread(spawn_while_asleep)
        loop.start()
        thread.join()
        log.append(signal_masks())
    assert log == [expected] * 3


def test_E28_faulthandlers_timer_and_the_watchdog(poller):
    """Both report a loop that blocks."""
    done = poller.run(
        """
        import faulthandler, logging, time
        logging.basicConfig(format="logged: %(message)s")
        loop = ioloop.IOLoop(impl=impl())
        faulthandler.dump_traceback_later(0.1)
        loop.set_blocking_log_threshold(0.05)

        def block():
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                pass

        loop.add_callback(block)
        loop.call_later(0, loop.stop)
        loop.start()
        faulthandler.cancel_dump_traceback_later()
        loop.close()
        """
    )
    assert done.stderr.count("Timeout (") == 1
    assert done.stderr.count("logged: IOLoop blocked") == 1


# -- F: the process ------------------------------------------------------------


def test_F4_no_thread_is_left(loop, expect_log):
    """The watchdog's, of a loop that is not in the main thread."""
    before = set(os.listdir("/proc/self/task"))
    loop.set_blocking_log_threshold(0.02)
    added = set()

    def run():
        loop.add_callback(lambda: added.update(os.listdir("/proc/self/task")))
        loop.call_later(0.05, loop.stop)
        loop.start()

    in_thread(run)
    added -= before
    assert len(added) == 2
    wait_until(lambda: added.isdisjoint(os.listdir("/proc/self/task")))


def process_state():
    umask = os.umask(0)
    os.umask(umask)
    return {
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "excepthook": sys.excepthook,
        "faulthandler": faulthandler.is_enabled(),
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_debug(), list(gc.callbacks)),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "logger": logging.getLogger("ioloop").level,
        "modules": set(sys.modules) & {"asyncio", "selectors", "tornado"},
        "path": list(sys.path),
        "switch interval": sys.getswitchinterval(),
        "thread hook": threading.excepthook,
        "thread stack": threading.stack_size(),
        "umask": umask,
        "unraisablehook": sys.unraisablehook,
        "warnings": list(warnings.filters),
    }


def test_F5_nothing_of_the_process_is_changed(loop, expect_log):
    """By whatever a loop does; `clean` compares signals after every test."""
    before = process_state()
    loop.set_blocking_log_threshold(FOREVER)
    loop.add_callback(fail)
    loop.call_later(0, fail, KeyError)
    with pytest.raises(Exit):
        loop.run_sync(lambda: fail(Exit))
    turn(loop)
    expect_log.take("Exception in callback", ValueError)
    expect_log.take("Exception in callback", KeyError)
    loop.close()
    assert process_state() == before


def test_F8_the_errno_that_is_reported_is_that_of_the_call(loop):
    """Destructors that run on the way out make system calls of their own."""

    class Handler:
        def __call__(self, *args):
            pass

        def __del__(self):
            with contextlib.suppress(FileNotFoundError):
                os.stat("/nowhere")

    class File:
        def __init__(self, fd):
            self.fd = fd

        def fileno(self):
            return self.fd

        __del__ = Handler.__del__

    with open(__file__) as file:
        for fd, expected in (
            (free_number(), errno.EBADF),
            (file.fileno(), errno.EPERM),
        ):
            with pytest.raises(OSError) as error:
                loop.add_handler(File(fd), Handler(), READ)
            assert error.value.errno == expected
    with pytest.raises(OSError) as error:
        loop.update_handler(File(free_number()), READ)
    assert error.value.errno == errno.ENOENT


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_F10_no_uninitialised_memory_reaches_the_kernel(poller, tmp_path):
    """What epoll_ctl and timers get has padding."""
    program = tmp_path / "program.py"
    program.write_text(
        "import socket, sys, importlib.machinery, importlib.util\n"
        "name, path, impl = sys.argv[1:]\n"
        "loader = importlib.machinery.ExtensionFileLoader(name, path)\n"
        "spec = importlib.util.spec_from_file_location(name, path, loader=loader)\n"
        "ioloop = importlib.util.module_from_spec(spec)\n"
        "loader.exec_module(ioloop)\n"
        "a, b = socket.socketpair()\n"
        "b.send(b'x')\n"
        "with ioloop.IOLoop(impl=getattr(ioloop, impl)()) as loop:\n"
        "    loop.set_blocking_log_threshold(60)\n"
        "    loop.add_handler(a, lambda fd, events: 1 & events and a.recv(1), 1)\n"
        "    loop.call_later(0.05, loop.stop)\n"
        "    loop.add_callback(print, 'ran')\n"
        "    loop.start()\n"
        "    loop.update_handler(a, loop.WRITE)\n"
        "    loop.run_once(0)\n"
    )
    names = poller.module.__name__, poller.module.__file__, poller.impl.__name__
    done = subprocess.run(
        ["valgrind", "--quiet", "--leak-check=no", sys.executable, program, *names],
        env={**os.environ, "PYTHONMALLOC": "malloc"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
    # Of the interpreter's own, there are other complaints.
    assert "Syscall param" not in done.stderr, done.stderr


def test_F11_each_event_of_a_batch_is_read_where_the_kernel_wrote_it(loop):
    """epoll's structures are packed on some machines, and not on others."""
    with pairs(9) as made:
        expected, calls = [], Recorder()
        for n, (a, b) in enumerate(made):
            mask = [READ, WRITE, READ | WRITE][n % 3]
            loop.add_handler(a, calls, mask)
            b.send(b"x")
            expected.append((a, mask))
        turn(loop)
        assert sorted(calls, key=repr) == sorted(expected, key=repr)


def test_F14_a_large_batch_needs_no_stack(loop):
    """Hundreds of events in a thread that has next to none."""
    calls = Recorder()
    with pairs(400) as made:
        for a, b in made:
            loop.add_handler(a, calls, READ)
            b.send(b"x")
        old = threading.stack_size(256 * 1024)
        try:
            in_thread(turn, loop, 6)
        finally:
            threading.stack_size(old)
        assert len(calls) > 6 * 200
        assert {fd for fd, _ in calls} == {a for a, _ in made}
