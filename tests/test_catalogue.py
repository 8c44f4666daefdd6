"""Failures that belong to no single part of the loop, and the table in README.md."""

import asyncio
import contextlib
import contextvars
import ctypes
import errno
import faulthandler
import gc
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import warnings

import pytest
import rows
from building import compile_library
from fakes import (
    FOREVER,
    NONE,
    READ,
    WRITE,
    Exit,
    Hostile,
    Recorder,
    fail,
    idle,
    run_until,
    spin_guard,
    turn,
)
from kernel import (
    can_deny,
    free_number,
    nothing_free,
    on_signal,
    pair,
    pairs,
)
from processes import Thread, at_once, in_thread, sleeping, wait_until

# The table's rows: the last one of each letter.
ROWS = {"A": 36, "B": 33, "C": 22, "D": 31, "E": 28, "F": 15}


# -- The table -----------------------------------------------------------------


def test_the_table_has_the_tests_that_are_marked():
    """Its last column is generated: `make rows` mends it."""
    text = rows.README.read_text(encoding="utf-8")
    assert rows.generated(text) == text


def test_every_row_has_a_test_or_a_reason_for_none():
    table = {row: rest for _, [row, *rest] in rows.table(rows.README.read_text())}
    assert list(table) == [
        f"{letter}{n}" for letter, last in ROWS.items() for n in range(1, last + 1)
    ]
    for row, [failure, what, tests] in table.items():
        assert failure and what, row
        assert tests or what.startswith("does not apply: "), row


def test_every_marker_is_a_row_of_the_table():
    known = {row for _, [row, *_] in rows.table(rows.README.read_text())}
    assert rows.marked().keys() <= known


# -- A: file descriptors -------------------------------------------------------


@pytest.mark.row("A27")
def test_a_server_out_of_descriptors_pauses_without_spinning(loop):
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


@pytest.mark.row("A36")
def test_a_removed_fd_has_left_the_kernels_set(loop):
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


@pytest.mark.row("B2")
def test_who_can_not_ring_is_told(poller):
    """A sandboxed thread whose write() is refused; others still wake the loop."""
    if not can_deny():
        pytest.skip("needs seccomp and known system call numbers")
    poller.run(
        """
        import errno, kernel, processes, sys
        loop = ioloop.IOLoop(impl=impl())
        log = []

        def refused():
            kernel.deny("write", errno.EPERM)  # of this thread
            try:
                loop.add_callback(int)
            except OSError as error:
                return error.errno

        with processes.sleeping(loop):
            assert processes.in_thread(refused) == errno.EPERM
            loop.add_callback(log.append, 1)
            processes.wait_until(lambda: log)
        loop.close()
        """
    )


@pytest.mark.row("B20")
def test_children_made_without_python(loop, tmp_path):
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
    library = ctypes.CDLL(str(compile_library(source)))
    log = []
    with sleeping(loop):
        for n in range(20):
            assert library.fork_and_wait() == 0
            loop.add_callback(log.append, n)
        wait_until(lambda: log == list(range(20)))


@pytest.mark.row("B27")
def test_cancelling_belongs_to_the_loops_thread(loop):
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


@pytest.mark.row("C9")
def test_ties_on_the_wall_clock(loop):
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


@pytest.mark.row("C22")
@pytest.mark.parametrize("poller", ["epoll", "select"], indirect=True)
def test_generations_wrap_around(loop):
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
            assert len(calls) == 2
            assert dict(calls.take()) == {a: READ, c: READ}
            assert loop.stats()["handlers"] == 2
            loop.remove_handler(a)
        assert 0 < generation.value < 10


@pytest.mark.row("C22")
@pytest.mark.parametrize("poller", ["epoll", "select"], indirect=True)
def test_the_number_of_a_batch_wraps_around(loop):
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


@pytest.mark.row("C22")
def test_the_order_of_adding_has_64_bits(make_loop):
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


@pytest.mark.row("D28")
def test_an_exception_leaves_nothing_behind(loop, make_loop):
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


@pytest.mark.row("D29")
def test_nothing_is_shown_unless_it_is_logged(loop):
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


@pytest.mark.row("E4")
def test_signals_without_a_python_handler_are_none_of_the_loops(loop):
    """Ignored, or ignored by default: the loop sleeps on, however many come."""
    with on_signal(signal.SIGUSR1, signal.SIG_IGN):
        done = threading.Event()

        def annoy():
            while not done.is_set():
                signal.pthread_kill(main, signal.SIGUSR1)
                signal.pthread_kill(main, signal.SIGURG)
                time.sleep(0.002)

        main = threading.get_ident()
        with Thread(annoy):
            try:
                idle(loop)
            finally:
                done.set()


@pytest.mark.row("E11")
def test_a_signal_with_events_costs_none_of_them(loop):
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
        with Thread(send, b):
            loop.start()
    assert log == [b"x"] * rounds


@pytest.mark.row("E12")
def test_a_profiler_does_not_disturb(loop):
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


@pytest.mark.row("E24")
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open()")
def test_children_are_left_to_who_made_them(loop):
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


@pytest.mark.row("E24")
def test_many_children_that_end_at_once_are_one_signal(loop):
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


@pytest.mark.row("E28")
def test_faulthandlers_timer_and_the_watchdog(poller):
    """Both report a loop that blocks."""
    done = poller.run(
        """
        import faulthandler, logging
        from fakes import block
        logging.basicConfig(format="logged: %(message)s")
        loop = ioloop.IOLoop(impl=impl())
        faulthandler.dump_traceback_later(0.1)
        loop.set_blocking_log_threshold(0.05)
        loop.add_callback(block, 0.3)
        loop.call_later(0, loop.stop)
        loop.start()
        faulthandler.cancel_dump_traceback_later()
        loop.close()
        """
    )
    assert done.stderr.count("Timeout (") == 1
    assert done.stderr.count("logged: IOLoop blocked") == 1


# -- F: the process ------------------------------------------------------------


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


@pytest.mark.row("F5")
def test_nothing_of_the_process_is_changed(loop, expect_log):
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


@pytest.mark.row("F8")
def test_the_errno_that_is_reported_is_that_of_the_call(loop):
    """Destructors that run on the way out make system calls of their own."""

    class Handler:
        def __call__(self, *args):
            pass

        def __del__(self):
            with contextlib.suppress(FileNotFoundError):
                os.stat("/nowhere")

    class File(Handler):
        def __init__(self, fd):
            self.fd = fd

        def fileno(self):
            return self.fd

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


@pytest.mark.row("F10")
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_no_uninitialised_memory_reaches_the_kernel(poller):
    """What epoll_ctl and timers get has padding."""
    done = poller.run(
        """
        import socket
        a, b = socket.socketpair()
        b.send(b"x")
        with a, b, ioloop.IOLoop(impl=impl()) as loop:
            loop.set_blocking_log_threshold(60)
            loop.add_handler(a, lambda fd, events: 1 & events and a.recv(1), 1)
            loop.call_later(0.05, loop.stop)
            loop.add_callback(print, "ran")
            loop.start()
            loop.update_handler(a, loop.WRITE)
            loop.run_once(0)
        """,
        under=["valgrind", "--quiet", "--leak-check=no"],
        timeout=None,
        PYTHONMALLOC="malloc",
    )
    assert done.stdout == "ran\n", done.stderr
    # Of the interpreter's own, there are other complaints.
    assert "Syscall param" not in done.stderr, done.stderr


@pytest.mark.row("F11")
def test_each_event_of_a_batch_is_read_where_the_kernel_wrote_it(loop):
    """epoll's structures are packed on some machines, and not on others."""
    with pairs(9) as made:
        expected, calls = [], Recorder()
        for n, (a, b) in enumerate(made):
            mask = [READ, WRITE, READ | WRITE][n % 3]
            loop.add_handler(a, calls, mask)
            b.send(b"x")
            expected.append((a, mask))
        turn(loop)
        assert len(calls) == len(expected)
        assert dict(calls) == dict(expected)


@pytest.mark.row("F14")
def test_a_large_batch_needs_no_stack(loop):
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
