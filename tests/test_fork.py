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
from fakes import (
    FOREVER,
    OPEN_LOOP_ONLY,
    READ,
    WRITE,
    Exit,
    Recorder,
    ScriptedPoller,
    fail,
    run_until,
    start_until,
    turn,
)
from kernel import nothing_free, on_signal, pair, pend, pipe, readable
from processes import (
    Thread,
    child,
    exits_with_a_busy_thread,
    flooded,
    forking,
    in_child,
    in_thread,
    is_asleep,
    sleeping,
    wait_until,
    when_asleep,
)

import ioloop

pytestmark = pytest.mark.filterwarnings(
    # A fork beside other threads, from 3.12 on: it is what is tested here.
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def still_works(loop, a, b, calls):
    """The parent's loop gets its events and its wake-ups; `a` is removed in the end."""
    calls.clear()
    b.send(b"x")
    turn(loop)
    assert [fd for fd, _ in calls] == [a]
    a.recv(1)
    with Thread(loop.stop):
        loop.start()
    loop.remove_handler(a)


def reinit(loop):
    """In the child: the loop works, on files of its own."""
    loop.reinit()
    assert not loop.running()
    start_until(loop, None)
    loop.close()


def start_until_refused(loop, pids):
    """In the child, of which `pids` is [0], start() ends by an error."""
    try:
        loop.start()
        assert pids != [0]
    except RuntimeError as error:
        assert pids == [0] and "made before a fork" in str(error)


by_whom = pytest.mark.parametrize(
    "by", [lambda fork: fork(), in_thread], ids=["callback", "thread"]
)


# -- An inherited loop ---------------------------------------------------------


@pytest.mark.row("B18")
def test_every_use_in_the_child_is_refused(loop):
    """By an error that says what to do."""
    with child() as inside:
        if inside:
            for name, args in OPEN_LOOP_ONLY.items():
                with pytest.raises(RuntimeError, match="fork.*reinit"):
                    getattr(loop, name)(*args)
            assert "forked" in repr(loop)
            assert loop.running() is False
            assert loop.time() > 0


@pytest.mark.row("B18")
@pytest.mark.parametrize("way", ["close", "close all", "drop", "reinit", "remove"])
def test_the_child_leaves_the_parent_alone(loop, way):
    """Whatever it does to its copy: the kernel's set is one for both."""
    calls = Recorder()
    with pair() as (a, b):
        loop.add_handler(a, calls, READ)
        with child() as inside:
            if inside:
                if way == "close":
                    loop.close()
                    loop.close()
                elif way == "close all":
                    loop.close(all_fds=True)
                    assert a.fileno() == -1
                elif way == "drop":
                    a.close()
                else:
                    loop.reinit()
                    if way == "remove":
                        loop.remove_handler(a)
                    loop.close()
        still_works(loop, a, b, calls)


@pytest.mark.row("B19")
def test_reinit_keeps_what_was_there(loop):
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
                loop.remove_handler(a)
                with Thread(loop.add_callback, loop.stop):
                    loop.start()
                loop.close()
        turn(loop)
        loop.remove_handler(a)
    assert log == ["c", "t", "h"]


def test_loops_whose_truth_is_the_users_own_are_found(poller):
    """The fork's hook asks none of them whether it is true."""

    class Empty(poller.module.IOLoop):
        def __len__(self):
            return 0

    class Broken(poller.module.IOLoop):
        def __bool__(self):
            raise ZeroDivisionError

    def look():
        assert "forked" in repr(empty) and "forked" in repr(broken)

    with Empty(poller.impl()) as empty, Broken(poller.impl()) as broken:
        in_child(look)


@pytest.mark.row("B19")
def test_the_waker_is_not_shared(loop):
    """A child that rings its own does not wake the parent, and the reverse."""
    with child() as inside:
        if inside:
            loop.reinit()
            threads = [Thread(loop.stop) for _ in range(10)]
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
                assert calls.take() == [(a, READ | WRITE)]
                loop.update_handler(b, WRITE)
                loop.remove_handler(a)
                turn(loop)
                assert calls == [(b, WRITE)]
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


def test_numbers_closed_in_the_child_that_become_the_loops_own(make_loop):
    """Those of the new poller and waker; what had them before is forgotten."""
    with pair() as (a, _):
        numbers = [os.dup(a.fileno()) for _ in range(6)]
        loop = make_loop()
        for number in numbers:
            loop.add_handler(number, fail, READ)
        with child() as inside:
            if inside:
                for number in numbers:
                    os.close(number)
                loop.reinit()
                assert set(numbers) & set(open_files())
                assert loop._handlers.keys() == set(numbers) - set(open_files())
                start_until(loop, None)
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

    def call():
        if fork() == 0:
            loop.reinit()
        loop.call_later(0.001, loop.stop)

    with forking() as fork:
        loop.add_callback(call)
        loop.start()
        assert loop.stats()["timeouts"] == 1


def test_signals_wake_the_child_that_goes_on_with_start(loop):
    """The wakeup fd is that of the new waker, for signals that a thread gets."""

    def kill_itself(main):
        wait_until(lambda: is_asleep(main))
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    def call():
        if fork():
            loop.stop()
        else:
            signal.alarm(20)
            loop.reinit()
            Thread(kill_itself, types.SimpleNamespace(native_id=os.getpid()))

    loop.add_callback(call)
    with forking() as fork, on_signal(signal.SIGUSR1, lambda *_: loop.stop()):
        loop.start()


def test_fork_inside_a_callback_without_reinit(loop):
    """The child's start() ends by the same error, and touches nothing."""
    pids, calls, later = [], Recorder(), []

    def call():
        loop.add_callback(later.append, "called")
        pids.append(fork())
        if pids[0]:
            loop.stop()

    with pair() as (a, b):
        loop.add_handler(a, calls, READ)
        loop.add_callback(call)
        with forking() as fork:
            start_until_refused(loop, pids)
            assert later == []
        still_works(loop, a, b, calls)


@pytest.mark.row("E7")
@by_whom
def test_a_child_does_not_ring_the_parents_bell(loop, by):
    """Its wakeup fd is what it was before start(), whoever has forked."""

    def fork():
        with child() as inside:
            if inside:
                for _ in range(3):
                    signal.raise_signal(signal.SIGUSR1)
                assert signal.set_wakeup_fd(-1) == -1

    loop.add_callback(by, fork)
    loop.add_callback(loop.stop)
    with on_signal(signal.SIGUSR1, lambda *_: None):
        loop.start()
    turn(loop)
    assert loop.stats()["events"] == 0


@contextlib.contextmanager
def forked_by_a_signal(loop, wait_for_child):
    """Run a loop, let a signal handler fork while it sleeps, and stop it."""
    pids, main = [], threading.main_thread()

    def signal_and_stop():
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: pids)
        if wait_for_child:
            os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
        wait_until(lambda: is_asleep(main))
        loop.add_callback(loop.stop)

    loop.call_later(10, loop.stop)
    with forking() as fork:
        with on_signal(signal.SIGUSR1, lambda *_: pids.append(fork())):
            thread = when_asleep(signal_and_stop)
            start_until_refused(loop, pids)
        if pids != [0]:
            thread.join()
            assert loop.stats()["timeouts"] == 0, "nothing else has woken the loop"
            yield


@pytest.mark.row("B18")
def test_fork_in_a_signal_handler_while_the_loop_sleeps(loop):
    """The child's start() ends, and the parent's goes on."""
    with forked_by_a_signal(loop, wait_for_child=True):
        pass


@pytest.mark.row("B18")
def test_fork_in_a_signal_handler_with_a_python_poller():
    """Its poll() goes on after the signal: the child finds out when that ends."""
    with pair() as (a, b), ioloop.IOLoop(impl=select.epoll()) as loop:
        loop.add_handler(a, fail, READ)
        with forked_by_a_signal(loop, wait_for_child=False):
            b.send(b"x")  # in the epoll that both have


@pytest.mark.row("B21")
def test_fork_from_a_thread(loop, make_loop):
    """In the child it is the main thread, with all that is the main thread's."""

    def use(loop):
        loop.set_blocking_signal_threshold(30, None)
        loop.call_later(FOREVER, fail)
        loop.add_callback(*pend(signal.SIGUSR1))
        with on_signal(signal.SIGUSR1, lambda *_: loop.stop()):
            loop.start()
        loop.close()

    def use_in_child():
        loop.reinit()
        use(loop)
        use(make_loop())

    turn(loop)
    in_thread(in_child, use_in_child)
    use(loop)


def test_fork_while_another_thread_runs_the_loop(loop):
    with sleeping(loop), child() as inside:
        if inside:
            with pytest.raises(RuntimeError, match="fork"):
                loop.add_callback(int)
            reinit(loop)


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

    def go_on():
        loop.reinit()
        seen.clear()
        contextvars.Context().run(add)
        add()
        run_until(loop, lambda: len(seen) == 3)
        loop.close()

    with readable() as (a, _):
        handler = functools.partial(call, "handler")
        contextvars.Context().run(add_all, handler)
        with Thread(loop.start):
            entered.wait()
            try:
                in_child(go_on)
            finally:
                leave.set()
                loop.stop()
        loop.remove_handler(a)


def test_fork_while_other_threads_queue(loop):
    """Whatever a thread held when it vanished, the child's copy is usable."""
    with flooded(loop):
        for _ in range(5):
            in_child(reinit, loop)
            loop.run_once(0)


def test_signals_wake_the_child(loop):
    with child() as inside:
        if inside:
            loop.reinit()
            loop.call_later(60, fail)
            with on_signal(signal.SIGUSR1, lambda *_: loop.stop()):
                with Thread(os.kill, os.getpid(), signal.SIGUSR1):
                    loop.start()
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
                start_until(other, None)
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


@pytest.mark.row("B18")
def test_a_refused_reinit_leaves_the_parent_alone():
    """The waker stays in an epoll that both have."""
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
    in_child(reinit, loop)
    turn(loop)


@pytest.mark.parametrize("call", [lambda run: run(), in_thread], ids=["main", "thread"])
def test_a_watched_loop_that_goes_on_in_the_child(loop, expect_log, call):
    """Nor by the start() that is going on: reinit() starts another watch."""
    pids = []

    def fork_and_stop(fork):
        pids.append(fork())
        if pids == [0]:
            loop.reinit()
            loop.add_callback(time.sleep, 0.5)
        loop.add_callback(loop.stop)

    def run():
        with forking() as fork:
            loop.add_callback(fork_and_stop, fork)
            loop.start()
            if pids == [0]:
                expect_log.take("blocked")

    loop.set_blocking_log_threshold(0.1)
    call(run)
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


def reinit_and_close(loops):
    reinit(loops[0])


def fork_again(loops):
    in_child(close, loops)
    drop(loops)


def reinit_and_fork(loops):
    """Now the loop's numbers are those that it got in the first child."""
    loops[0].reinit()
    in_child(in_daemon, drop, loops)
    loops[0].close()


def in_daemon(target, *args):
    with daemonized():
        target(*args)


@pytest.mark.parametrize("watched", [False, True], ids=["", "fileno"])
@pytest.mark.parametrize(
    "way", [drop, close, reinit_and_close, fork_again, reinit_and_fork]
)
def test_a_daemon_keeps_its_files(poller, way, watched):
    """Whatever it does with the loop of its parent, also one that another polled."""
    loops = [poller.module.IOLoop(impl=poller.impl())]
    if watched:
        with contextlib.suppress(io.UnsupportedOperation):
            loops[0].fileno()
    in_child(in_daemon, way, loops)
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
                reinit(loop)


@by_whom
def test_a_daemon_keeps_its_files_when_nested_loops_ran(make_loop, by):
    outer, inner = make_loop(), make_loop()

    def close_both():
        outer.close()
        inner.close()

    inner.add_callback(by, lambda: in_child(in_daemon, close_both))
    inner.add_callback(inner.stop)
    outer.add_callback(inner.start)
    outer.add_callback(outer.stop)
    outer.start()


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@by_whom
def test_the_wakeup_fd_of_a_child_is_the_programs(make_loop, by, nested):
    """From the moment of the fork on: the child may close all the others at once."""
    loop, inner = make_loop(), make_loop()
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

        inner.add_callback(by, fork)
        inner.add_callback(inner.stop)
        loop.add_callback(*((inner.start,) if nested else (by, fork)))
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


@pytest.mark.parametrize("when", ["before reinit", "after reinit"])
def test_a_child_finishes_what_its_parents_handler_has_begun(loop, expect_log, when):
    """A handler whose future is not done is not called again, there as well."""
    calls, gate = [], concurrent.futures.Future()
    with readable() as (a, _):
        loop.add_handler(a, lambda *_: calls.append(1) or gate, READ)
        turn(loop, 2)
        with child() as inside:
            if inside:
                if when == "before reinit":
                    gate.set_result(None)
                loop.reinit()
                if when == "after reinit":
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
        pids, answers = [], []
        with pipe() as (ready, tell), forking() as fork:
            for _ in range(workers):
                pids.append(fork())
                if pids[-1] == 0:
                    return serve(poller, server, tell)
            os.set_blocking(ready, True)
            for _ in pids:
                os.read(ready, 1)
            address = server.getsockname()
            for _ in range(clients):
                with socket.create_connection(address, timeout=20) as client:
                    client.sendall(b"?")
                    answers.append(client.recv(99))
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
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


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method, monkeypatch):
    """A loop here, and one in the other process."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(ioloop.__file__))
    # Test modules have no importable name: the code goes as text.
    process = context.Process(target=exec, args=(ANSWER, {"pipe": theirs}))
    process.start()
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


ANSWER = """
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


@pytest.mark.row("B24")
def test_subinterpreter(poller):
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


@pytest.mark.row("B22")
@exits_with_a_busy_thread
@pytest.mark.parametrize("busy", ["asleep", "callbacks", "timeouts", "flooded"])
def test_exit_with_a_running_loop_in_a_daemon_thread(poller, busy):
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


@pytest.mark.row("B23")
@pytest.mark.parametrize("kept", ["module", "cycle", "instance", "current", "atexit"])
def test_a_loop_that_is_alive_at_the_end(poller, kept):
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
            start_until(loop, Exit)
            loop.close()
    turn(loop)
