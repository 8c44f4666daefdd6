"""Forks, other processes, subinterpreters, and the end of the interpreter."""

import concurrent.futures
import contextlib
import contextvars
import functools
import gc
import io
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
import types
import weakref

import pytest
from helpers import (
    READ,
    WRITE,
    Recorder,
    ScriptedPoller,
    child,
    nothing_free,
    pair,
    run_until,
    turn,
)
from support import (
    OPEN_LOOP_ONLY,
    Exit,
    Thread,
    fail,
    flooded,
    in_thread,
    is_asleep,
    on_signal,
    readable,
    sleeping,
    wait_until,
)

import ioloop

pytestmark = pytest.mark.filterwarnings(
    # A fork beside other threads, from 3.12 on: it is what is tested here.
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def still_works(loop, a, b, calls):
    """The parent's loop gets its events and its wake-ups."""
    calls.clear()
    b.send(b"x")
    turn(loop)
    assert [fd for fd, _ in calls] == [a]
    a.recv(1)
    thread = Thread(loop.stop)
    loop.start()
    thread.join()


# -- An inherited loop ---------------------------------------------------------


def test_B18_every_use_in_the_child_is_refused(loop):
    """By an error that says what to do."""
    with child() as inside:
        if inside:
            for name, args in OPEN_LOOP_ONLY.items():
                with pytest.raises(RuntimeError, match="fork.*reinit"):
                    getattr(loop, name)(*args)
            assert "forked" in repr(loop)
            assert loop.running() is False
            assert loop.time() > 0


@pytest.mark.parametrize("way", ["close", "drop", "reinit", "remove"])
def test_B18_the_child_leaves_the_parent_alone(loop, way):
    """Score row 15."""
    calls = Recorder()
    with pair() as (a, b):
        loop.add_handler(a, calls, READ)
        with child() as inside:
            if inside:
                if way == "close":
                    loop.close()
                    loop.close()
                elif way == "drop":
                    a.close()
                else:
                    loop.reinit()
                    if way == "remove":
                        loop.remove_handler(a)
                    loop.close()
        still_works(loop, a, b, calls)
        loop.remove_handler(a)


def test_B18_close_all_fds_in_the_child(loop):
    calls = Recorder()
    with pair() as (a, b):
        loop.add_handler(a, calls, READ)
        with child() as inside:
            if inside:
                loop.close(all_fds=True)
                assert a.fileno() == -1
        still_works(loop, a, b, calls)
        loop.remove_handler(a)


def test_B19_reinit_keeps_what_was_there(loop):
    """Handlers, callbacks and timeouts, in both processes."""
    log = []
    with readable() as (a, _):
        loop.add_handler(a, lambda *_: log.append("h"), READ)
        loop.add_callback(log.append, "c")
        handle = loop.call_later(0, log.append, "t")
        loop.call_later(0, log.append, "never").cancel()
        with child() as inside:
            if inside:
                loop.reinit()
                loop.reinit()
                assert handle.callback is not None
                turn(loop)
                assert log == ["c", "t", "h"]
                thread = threading.Thread(target=loop.add_callback, args=(loop.stop,))
                loop.remove_handler(a)
                thread.start()
                loop.start()
                thread.join()
                loop.close()
        turn(loop)
        loop.remove_handler(a)
    assert log == ["c", "t", "h"]


def test_B19_the_doorbell_is_not_shared(loop):
    """A child that rings its own does not wake the parent, and the reverse."""
    with child() as inside:
        if inside:
            loop.reinit()
            threads = [threading.Thread(target=loop.stop) for _ in range(10)]
            for thread in threads:
                thread.start()
            loop.start()
            for thread in threads:
                thread.join()
            loop.close()
    events = loop.stats()["events"]
    loop.run_once(0)
    assert loop.stats()["events"] == events


def test_masks_are_kept(loop):
    calls = Recorder()
    with readable() as (a, _), readable() as (b, _):
        loop.add_handler(a, calls, READ | WRITE)
        loop.add_handler(b, calls, READ)
        loop.update_handler(b, 0)
        with child() as inside:
            if inside:
                loop.reinit()
                turn(loop)
                assert calls == [(a, READ | WRITE)]
                loop.close()
        loop.remove_handler(a)
        loop.remove_handler(b)


def test_a_descriptor_closed_in_the_child(loop):
    """What can't be registered again is as if the kernel had dropped it."""
    calls = Recorder()
    with readable() as (a, _), readable() as (b, _):
        loop.add_handler(a.fileno(), calls, READ)
        loop.add_handler(b.fileno(), calls, READ)
        with child() as inside:
            if inside:
                number = a.detach()
                os.close(number)
                loop.reinit()
                turn(loop, 2)
                assert (b.fileno(), READ) in calls
                loop.remove_handler(number)
                loop.close()
        loop.remove_handler(a)
        loop.remove_handler(b)


def test_numbers_closed_in_the_child_that_become_the_loops_own(make_loop, poller):
    """Those of the new poller and doorbell; what had them before is forgotten."""
    with pair() as (a, _):
        numbers = [os.dup(a.fileno()) for _ in range(6)]
        loop = make_loop(impl=poller.impl())
        for number in numbers:
            loop.add_handler(number, fail, READ)
        with child() as inside:
            if inside:
                for number in numbers:
                    os.close(number)
                loop.reinit()
                assert set(numbers) & set(open_files())
                assert loop._handlers.keys() == set(numbers) - set(open_files())
                loop.add_callback(loop.stop)
                loop.start()
                loop.close()
        for number in numbers:
            loop.remove_handler(number)
            os.close(number)


@pytest.mark.parametrize("way", ["leave", "reinit", "close"])
def test_fork_inside_a_callback(loop, way):
    """The child may go on with the loop, or leave it."""
    log = []

    def fork():
        loop.stop()
        with child() as inside:
            if inside:
                if way == "reinit":
                    loop.reinit()
                    assert loop.running()
                    loop.add_callback(log.append, "child")
                elif way == "close":
                    loop.close()
                    assert not loop.running()
                else:
                    with pytest.raises(RuntimeError, match="fork"):
                        loop.stop()
        log.append("parent")

    loop.add_callback(fork)
    loop.start()
    assert log == ["parent"]


def test_fork_inside_a_callback_and_return_from_start(loop):
    """The child that reinits goes on running the inherited start()."""
    pids = []

    def fork():
        pids.append(os.fork())
        if pids[0] == 0:
            loop.reinit()
        loop.call_later(0.001, loop.stop)

    loop.add_callback(fork)
    try:
        loop.start()
    finally:
        if pids[0] == 0:
            os._exit(loop.stats()["timeouts"] != 1)
    assert os.waitpid(pids[0], 0)[1] == 0


def test_signals_wake_the_child_that_goes_on_with_start(loop):
    """The wakeup fd is that of the new doorbell, for signals that a thread gets."""
    pids = []

    def kill_itself(main):
        wait_until(lambda: is_asleep(main))
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    def fork():
        pids.append(os.fork())
        if pids[0]:
            loop.stop()
        else:
            signal.alarm(20)
            loop.reinit()
            Thread(kill_itself, types.SimpleNamespace(native_id=os.getpid()))

    loop.add_callback(fork)
    with on_signal(signal.SIGUSR1, lambda *_: loop.stop()):
        try:
            loop.start()
        finally:
            if pids[0] == 0:
                os._exit(0)
    assert os.waitpid(pids[0], 0)[1] == 0


def test_fork_inside_a_callback_without_reinit(loop):
    """The child's start() ends by the same error, and touches nothing."""
    pids, calls = [], Recorder()
    with pair() as (a, b):
        loop.add_handler(a, calls, READ)

        def fork():
            pids.append(os.fork())
            if pids[0]:
                loop.stop()

        loop.add_callback(fork)
        code = 1
        try:
            loop.start()
        except RuntimeError as error:
            code = "fork" not in str(error)
        finally:
            if pids[0] == 0:
                os._exit(code)
        assert os.waitpid(pids[0], 0)[1] == 0
        still_works(loop, a, b, calls)
        loop.remove_handler(a)


@pytest.mark.parametrize("by", ["callback", "thread"])
def test_E7_a_child_does_not_ring_the_parents_bell(loop, by):
    """Its wakeup fd is what it was before start(), whoever has forked."""

    def fork():
        with child() as inside:
            if inside:
                for _ in range(3):
                    signal.raise_signal(signal.SIGUSR1)
                assert signal.set_wakeup_fd(-1) == -1

    loop.add_callback(*((fork,) if by == "callback" else (in_thread, fork)))
    loop.add_callback(loop.stop)
    with on_signal(signal.SIGUSR1, lambda *_: None):
        loop.start()
    turn(loop)
    assert loop.stats()["events"] == 0


def start_and_fork(loop, pids):
    """SIGUSR1 forks; the child exits with 0 if its start() was refused."""
    code = 1
    try:
        with on_signal(signal.SIGUSR1, lambda *_: pids.append(os.fork())):
            loop.start()
    except RuntimeError as error:
        code = "made before a fork" not in str(error)
    finally:
        if pids == [0]:
            os._exit(code)


def test_B18_fork_in_a_signal_handler_while_the_loop_sleeps(loop):
    """The child's start() ends, and the parent's goes on."""
    pids = []

    def signal_and_stop():
        main = threading.main_thread()
        wait_until(lambda: is_asleep(main))
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: pids)
        status = os.waitpid(pids[0], 0)[1]
        wait_until(lambda: is_asleep(main))
        loop.add_callback(loop.stop)
        return status

    loop.call_later(10, loop.stop)
    thread = Thread(signal_and_stop)
    start_and_fork(loop, pids)
    assert thread.join() == 0
    assert loop.stats()["timeouts"] == 0, "nothing else has woken the loop"


def test_B18_fork_in_a_signal_handler_with_a_python_poller():
    """Its poll() goes on after the signal: the child finds out when that ends."""
    pids = []

    def signal_and_stop():
        main = threading.main_thread()
        wait_until(lambda: is_asleep(main))
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: pids and is_asleep(main))
        loop.add_callback(loop.stop)

    with pair() as (a, b), ioloop.IOLoop(impl=select.epoll()) as loop:
        loop.add_handler(a, fail, READ)
        loop.call_later(10, loop.stop)
        thread = Thread(signal_and_stop)
        start_and_fork(loop, pids)
        thread.join()
        assert loop.stats()["timeouts"] == 0, "add_callback() has woken the loop"
        b.send(b"x")  # in the epoll that both have
        assert os.waitpid(pids[0], 0)[1] == 0


def test_B21_fork_from_a_thread(loop):
    """Its thread is the child's main thread."""

    def fork():
        with child() as inside:
            if inside:
                loop.reinit()
                loop.add_callback(loop.stop)
                loop.start()
                loop.close()

    in_thread(fork)


def test_fork_while_another_thread_runs_the_loop(loop):
    thread = Thread(loop.start)
    wait_until(loop.running)
    with child() as inside:
        if inside:
            with pytest.raises(RuntimeError, match="fork"):
                loop.add_callback(int)
            loop.reinit()
            assert not loop.running()
            loop.add_callback(loop.stop)
            loop.start()
            loop.close()
    loop.stop()
    thread.join()


@pytest.mark.parametrize("context", ["empty", "own"])
@pytest.mark.parametrize("where", ["callback", "timeout", "handler"])
def test_fork_while_another_thread_is_inside_a_call(loop, where, context):
    """The child's loop is as if that call had ended."""
    parent, entered, leave = os.getpid(), threading.Event(), threading.Event()
    seen = set()
    var = contextvars.ContextVar("var")

    def call(name, *_):
        seen.add(name)
        if name == where and os.getpid() == parent:
            entered.set()
            leave.wait()

    def add():
        loop.add_callback(call, "callback")
        loop.add_timeout(0, call, "timeout")

    def add_all(handler):
        if context == "own":
            var.set(1)
        loop.add_handler(a, handler, READ)
        add()

    with readable() as (a, _):
        handler = functools.partial(call, "handler")
        contextvars.Context().run(add_all, handler)
        thread = Thread(loop.start)
        entered.wait()
        try:
            with child() as inside:
                if inside:
                    loop.reinit()
                    seen.clear()
                    contextvars.Context().run(add)
                    add()
                    run_until(loop, lambda: len(seen) == 3)
                    loop.close()
        finally:
            leave.set()
            loop.stop()
            thread.join()
        loop.remove_handler(a)


def test_fork_while_other_threads_queue(loop):
    """Whatever a thread held when it vanished, the child's copy is usable."""
    with flooded(loop):
        for _ in range(5):
            with child() as inside:
                if inside:
                    loop.reinit()
                    loop.add_callback(loop.stop)
                    loop.start()
                    loop.close()
            loop.run_once(0)


def test_signals_wake_the_child(loop):
    with child() as inside:
        if inside:
            loop.reinit()
            with on_signal(signal.SIGUSR1, lambda *_: loop.stop()):
                thread = Thread(os.kill, os.getpid(), signal.SIGUSR1)
                loop.call_later(60, fail)
                loop.start()
                thread.join()
            loop.close()


def test_instance_in_the_child(poller):
    """The inherited one is closed and another takes its place."""
    cls = poller.module.IOLoop
    loop = cls.instance()
    try:
        with child() as inside:
            if inside:
                loop.close()
                assert not cls.initialized()
                other = cls.instance()
                assert other is not loop
                other.add_callback(other.stop)
                other.start()
                other.close()
        turn(loop)
    finally:
        loop.close()


def test_a_grandchild(loop):
    with child() as inside:
        if inside:
            loop.reinit()
            with child() as inside_again:
                if inside_again:
                    with pytest.raises(RuntimeError, match="fork"):
                        loop.stop()
                    loop.reinit()
                    turn(loop)
                    loop.close()
            turn(loop)
            loop.close()


def test_a_python_poller_needs_a_reinit_of_its_own():
    class Renewable(ScriptedPoller):
        def reinit(self):
            self.registered.clear()
            self.waker = None

    with ioloop.IOLoop(impl=ScriptedPoller()) as loop:
        with child() as inside:
            if inside:
                with pytest.raises(RuntimeError, match="reinit"):
                    loop.reinit()
                loop.close()
    with pair() as (a, _), ioloop.IOLoop(impl=Renewable()) as loop:
        loop.add_handler(a, int, READ)
        with child() as inside:
            if inside:
                loop.reinit()
                assert a.fileno() in loop._impl.registered
                turn(loop)
                loop.close()


def test_B18_a_refused_reinit_leaves_the_parent_alone():
    """The doorbell stays in an epoll that both have."""
    with ioloop.IOLoop(impl=select.epoll()) as loop:
        with child() as inside:
            if inside:
                for _ in range(2):
                    with pytest.raises(RuntimeError, match="reinit"):
                        loop.reinit()
                loop.close()
        loop.call_later(10, loop.stop)
        with sleeping(loop):
            pass
        assert loop.stats()["timeouts"] == 0, "stop() has woken the loop"


def test_reinit_without_a_fork_changes_nothing(loop):
    log = []
    loop.add_callback(log.append, 1)
    loop.reinit()
    turn(loop)
    assert log == [1]


def test_a_watched_loop_in_the_child(loop):
    """The watch is not inherited; the child's start() makes its own."""
    loop.set_blocking_log_threshold(60)
    with child() as inside:
        if inside:
            loop.reinit()
            loop.add_callback(loop.stop)
            loop.start()
            loop.close()
    turn(loop)


@pytest.mark.parametrize("call", [lambda run: run(), in_thread], ids=["main", "thread"])
def test_a_watched_loop_that_goes_on_in_the_child(loop, expect_log, call):
    """Nor by the start() that is going on: reinit() starts another watch."""

    def fork():
        pids.append(os.fork())
        if pids[0] == 0:
            loop.reinit()
            loop.add_callback(time.sleep, 0.5)
        loop.add_callback(loop.stop)

    def run():
        code = 1
        try:
            loop.start()
            if pids[0] == 0:
                expect_log.take("blocked")
                code = 0
        finally:
            if pids[0] == 0:
                os._exit(code)

    pids = []
    loop.set_blocking_log_threshold(0.1)
    loop.add_callback(fork)
    call(run)
    assert os.waitpid(pids[0], 0)[1] == 0
    expect_log.clear()  # the fork may have taken its time


# -- Numbers that are no longer the loop's -------------------------------------


def open_files():
    """{fd: what it is}, above the three of stdio."""
    files = {}
    for fd in range(3, 256):
        with contextlib.suppress(FileNotFoundError):
            files[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return files


@contextlib.contextmanager
def daemonized():
    """As daemons begin: all files are closed, and others get their numbers.

    At the end of the block just those must be open.
    """
    os.closerange(3, 256)
    for _ in range(20):
        os.pipe()
    files = open_files()
    yield
    assert open_files() == files


def drop(loops):
    dropped = weakref.ref(loops.pop())
    gc.collect()
    assert dropped() is None


def close(loops):
    loops[0].close()


def reinit(loops):
    """The loop works, on files of its own."""
    [loop] = loops
    loop.reinit()
    loop.add_callback(loop.stop)
    loop.start()
    loop.close()


def fork_again(loops):
    with child() as inside:
        if inside:
            close(loops)
    drop(loops)


def reinit_and_fork(loops):
    """Now the loop's numbers are those that it got in the first child."""
    loops[0].reinit()
    with child() as inside:
        if inside:
            with daemonized():
                drop(loops)
    loops[0].close()


@pytest.mark.parametrize("watched", [False, True], ids=["", "fileno"])
@pytest.mark.parametrize("way", [drop, close, reinit, fork_again, reinit_and_fork])
def test_a_daemon_keeps_its_files(poller, way, watched):
    """Whatever it does with the loop of its parent, also one that another polled."""
    loops = [poller.module.IOLoop(impl=poller.impl())]
    if watched:
        with contextlib.suppress(io.UnsupportedOperation):
            loops[0].fileno()
    with child() as inside:
        if inside:
            with daemonized():
                way(loops)
    turn(loops[0])
    loops.pop().close()


def test_a_daemon_keeps_its_files_when_reinit_fails(loop):
    """For want of a number, wherever that is noticed; the next reinit() works."""
    with child() as inside:
        if inside:
            with daemonized():
                for spare in range(4):
                    with nothing_free(spare), contextlib.suppress(OSError):
                        loop.reinit()
                reinit([loop])


@pytest.mark.parametrize("forker", ["callback", "thread"])
def test_a_daemon_keeps_its_files_when_nested_loops_ran(make_loop, poller, forker):
    outer, inner = make_loop(), make_loop(impl=poller.impl())

    def fork():
        with child() as inside:
            if inside:
                with daemonized():
                    outer.close()
                    inner.close()

    inner.add_callback(*((fork,) if forker == "callback" else (in_thread, fork)))
    inner.add_callback(inner.stop)
    outer.add_callback(inner.start)
    outer.add_callback(outer.stop)
    outer.start()


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("forker", ["callback", "thread"])
def test_the_wakeup_fd_of_a_child_is_the_programs(make_loop, poller, forker, nested):
    """From the moment of the fork on: the child may close all the others at once."""
    loop, inner = make_loop(), make_loop(impl=poller.impl())
    # From 3.12 on asyncio, once it is imported, sets it to -1 in all children.
    given_back = sys.version_info < (3, 12) or "asyncio" not in sys.modules
    with pair() as (a, b):

        def fork():
            with child() as inside:
                if inside:
                    signal.raise_signal(signal.SIGUSR1)
                    found = signal.set_wakeup_fd(-1)
                    assert found == (b.fileno() if given_back else -1)
                    assert not given_back or a.recv(9) == bytes([signal.SIGUSR1])

        call = (fork,) if forker == "callback" else (in_thread, fork)
        inner.add_callback(*call)
        inner.add_callback(inner.stop)
        loop.add_callback(*((inner.start,) if nested else call))
        loop.add_callback(loop.stop)
        signal.set_wakeup_fd(b.fileno())
        try:
            with on_signal(signal.SIGUSR1, lambda *_: None):
                loop.start()
        finally:
            assert signal.set_wakeup_fd(-1) == b.fileno()


def test_a_future_that_ends_in_a_child_waits_for_reinit(loop, caplog):
    """Its loop slept in another thread, which is not there to be woken."""
    gate, log = concurrent.futures.Future(), []
    loop.add_future(gate, log.append)
    with sleeping(loop):
        with child() as inside:
            if inside:
                gate.set_result(None)
                assert caplog.messages == []
                loop.reinit()
                turn(loop)
                assert log == [gate]
                loop.close()
    assert log == []


def test_a_child_finishes_what_its_parents_handler_has_begun(loop, expect_log):
    """A handler whose future is not done is not called again, there as well."""
    calls, gate = [], concurrent.futures.Future()
    with readable() as (a, _):
        loop.add_handler(a, lambda *_: calls.append(1) or gate, READ)
        turn(loop, 2)
        expect_log.take("not called again")
        with child() as inside:
            if inside:
                loop.reinit()
                turn(loop, 3)
                assert len(calls) == 1
                gate.set_result(None)
                turn(loop, 3)
                assert len(calls) > 1
                loop.close()
        assert len(calls) == 1
        loop.remove_handler(a)


# -- Servers -------------------------------------------------------------------


def test_preforked_servers_on_one_listening_socket(poller):
    """Each connection is served once, by one of them."""
    clients, workers = 20, 3
    with socket.create_server(("127.0.0.1", 0), backlog=clients) as server:
        server.setblocking(False)
        pids, (ready, tell) = [], os.pipe()
        for _ in range(workers):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    serve(poller, server, tell)
                    code = 0
                finally:
                    os._exit(code)
            pids.append(pid)
        for _ in pids:
            os.read(ready, 1)
        os.close(ready), os.close(tell)
        answers = []
        for _ in range(clients):
            with socket.create_connection(server.getsockname(), timeout=20) as client:
                client.sendall(b"?")
                answers.append(client.recv(99))
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert statuses == [0] * workers
    assert len(answers) == clients
    assert {int(answer) for answer in answers} <= set(pids)


def serve(poller, server, tell):
    with poller.module.IOLoop(impl=poller.impl()) as loop:
        signal.signal(signal.SIGTERM, lambda *_: loop.stop())
        os.write(tell, b"x")

        def accept(sock, events):
            try:
                connection, _ = sock.accept()
            except BlockingIOError:
                return
            loop.add_handler(connection, answer, READ)

        def answer(connection, events):
            loop.remove_handler(connection)
            connection.recv(1)
            connection.sendall(str(os.getpid()).encode())
            connection.close()

        loop.add_handler(server, accept, READ)
        loop.start()


def work(connection):
    """What a process of multiprocessing does."""
    with ioloop.IOLoop() as loop:
        total = []
        loop.add_handler(
            connection,
            lambda *_: (total.append(connection.recv()), loop.stop()),
            READ,
        )
        loop.start()
        connection.send(sum(total) + 1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method):
    """A loop here, and one in the other process."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.path.dirname(ioloop.__file__)
    try:
        if method == "fork":
            process = context.Process(target=work, args=(theirs,))
            process.start()
        else:
            # Test modules have no importable name: the code goes as text.
            process = context.Process(target=exec, args=(SPAWNED, {"pipe": theirs}))
            process.start()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
    with ioloop.IOLoop() as loop, ours, theirs:
        answers = []
        loop.add_handler(ours, lambda c, _: (answers.append(c.recv()), loop.stop()), 1)
        ours.send(41)
        loop.start()
        process.join()
        process.close()
    if method == "spawn":
        stop_resource_tracker()
    assert answers == [42]


SPAWNED = """
import ioloop
with ioloop.IOLoop() as loop:
    def answer(pipe, events):
        pipe.send(pipe.recv() + 1)
        loop.stop()
    loop.add_handler(pipe, answer, loop.READ)
    loop.start()
"""


def stop_resource_tracker():
    """multiprocessing leaves its helper, and a descriptor, to the end."""
    from multiprocessing import resource_tracker

    resource_tracker._resource_tracker._stop()


# -- Interpreters --------------------------------------------------------------


def test_B24_subinterpreter(poller):
    """It works, or the import says clearly that it does not."""
    done = poller.run(
        """
        try:
            import _interpreters as interpreters
        except ImportError:
            import _xxsubinterpreters as interpreters
        import sys
        code = '''if True:
            import sys
            sys.path[:] = %r
            try:
                import ioloop
            except ImportError as error:
                assert "interpreter" in str(error), error
            else:
                with ioloop.IOLoop() as loop:
                    loop.add_callback(loop.stop)
                    loop.start()
            ''' % sys.path
        interpreter = interpreters.create()
        error = interpreters.run_string(interpreter, code)
        assert error is None, error
        interpreters.destroy(interpreter)
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.run_once(0)
        print("done")
        """
    )
    assert done.stdout == "done\n"


@pytest.mark.parametrize("busy", ["asleep", "callbacks", "timeouts", "flooded"])
def test_B22_exit_with_a_running_loop_in_a_daemon_thread(poller, busy):
    done = poller.run(
        f"""
        import threading, time
        loop = ioloop.IOLoop(impl=impl())
        def again():
            loop.add_callback(again)
        def later():
            loop.call_later(0, later)
        def flood():
            while True:
                if loop.stats()["pending_callbacks"] < 1000:
                    loop.add_callback(int)
        if {busy!r} == "callbacks":
            loop.add_callback(again)
        elif {busy!r} == "timeouts":
            loop.call_later(0, later)
        elif {busy!r} == "flooded":
            threading.Thread(target=flood, daemon=True).start()
        threading.Thread(target=loop.start, daemon=True).start()
        while not loop.stats()["polls"]:
            time.sleep(0.001)
        print("end")
        """
    )
    assert (done.stdout, done.stderr) == ("end\n", "")


@pytest.mark.parametrize("kept", ["module", "cycle", "instance", "current", "atexit"])
def test_B23_a_loop_that_is_alive_at_the_end(poller, kept):
    """No complaint about what is gone already."""
    done = poller.run(
        f"""
        import atexit, sys
        sys.warnoptions.clear()
        import warnings
        warnings.simplefilter("ignore")
        kept = {kept!r}
        loop = ioloop.IOLoop(impl=impl())
        loop.call_later(60, print)
        loop.add_callback(print)
        if kept == "cycle":
            loop.me = loop
            loop.module = sys.modules
        elif kept == "instance":
            loop.install()
        elif kept == "current":
            loop.make_current()
        elif kept == "atexit":
            atexit.register(loop.close)
        """
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_use_at_exit(poller):
    """atexit functions and finalizers may still run a loop."""
    done = poller.run(
        """
        import atexit
        def last():
            with ioloop.IOLoop(impl=impl()) as loop:
                loop.add_callback(print, "last")
                loop.call_later(0.001, loop.stop)
                loop.start()
        atexit.register(last)
        """
    )
    assert done.stdout == "last\n"


def test_exceptions_in_the_child_stay_there(loop):
    with child() as inside:
        if inside:
            loop.reinit()
            loop.add_callback(fail, Exit)
            with pytest.raises(Exit):
                loop.start()
            loop.close()
    turn(loop)


def test_a_paused_handler_whose_future_ends_in_a_child(loop, expect_log):
    """Before the child's reinit(), which takes it up again."""
    calls, future = [], concurrent.futures.Future()

    def handler(sock, events):
        calls.append(1)
        return None if future.done() else future

    with readable() as (a, _):
        loop.add_handler(a, handler, READ)
        turn(loop, 2)
        expect_log.take("not called again")
        with child() as is_child:
            if is_child:
                future.set_result(None)
                loop.reinit()
                turn(loop, 3)
                assert len(calls) > 1
        loop.remove_handler(a)
