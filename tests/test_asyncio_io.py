"""Asyncio's readers, writers and signals, and what its coroutines await."""

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import weakref

import pytest
from fakes import (
    FOREVER,
    READ,
    WRITE,
    fail,
    in_time,
    run_until,
    turn,
)
from kernel import kill, on_signal, pair, pipe, readable, tcp_pair
from processes import (
    MUSL,
    Thread,
    in_thread,
    run_python,
    wait_until,
)

USR1 = signal.SIGUSR1


def nothing(*_):
    pass


# -- Readers and writers -------------------------------------------------------


def test_a_reader_and_a_writer(loop, face, log):
    """Of one fd, by one registration; each goes by itself."""
    with readable() as (a, _):
        face.add_reader(a, log.append, "reader")
        face.add_writer(a.fileno(), log.append, "writer")
        assert loop.stats()["handlers"] == 1
        turn(loop, 2)
        assert sorted(log) == ["reader", "writer"]
        assert face.remove_reader(a.fileno()) is True
        assert face.remove_reader(a) is False
        turn(loop)
        log.clear()
        turn(loop)
        assert log == ["writer"]
        face.add_reader(a, log.append, "reader")
        assert face.remove_writer(a) is True
        assert face.remove_writer(a) is False
        turn(loop)
        log.clear()
        turn(loop)
        assert log == ["reader"]
        assert face.remove_reader(a) is True
        assert loop.stats()["handlers"] == 0
        turn(loop)
        log.clear()
        turn(loop)
        assert log == []


def test_a_reader_waits_for_its_event(loop, face, log):
    with pair() as (a, b):
        face.add_reader(a, log.append, 1)
        turn(loop, 2)
        assert log == []
        b.send(b"x")
        turn(loop, 2)
        assert log == [1]
        face.remove_reader(a)


@pytest.mark.parametrize("kind", ["reader", "writer"])
def test_a_reader_is_replaced(loop, face, log, kind):
    """The old handle is cancelled, even if its event has come."""
    add, remove = getattr(face, f"_add_{kind}"), getattr(face, f"remove_{kind}")
    with readable() as (a, _):
        old = add(a, fail)
        turn(loop)
        new = add(a, log.append, 1)
        assert old.cancelled() and not new.cancelled()
        turn(loop, 2)
        assert log == [1]
        assert remove(a) is True
        assert new.cancelled()
        turn(loop)
        assert log == [1]


def test_a_reader_whose_handle_is_cancelled(loop, face):
    """It is removed, and the loop does not poll for nothing."""
    with readable() as (a, _):
        face._add_reader(a, fail).cancel()
        writer = face._add_writer(a, nothing)
        turn(loop, 2)
        assert face.remove_reader(a) is False
        writer.cancel()
        turn(loop, 2)
        assert face.remove_writer(a) is False
    assert loop.stats()["handlers"] == 0


@pytest.mark.row("A25")
def test_a_reader_removes_itself_and_others(loop, face, log):
    """Of two that are ready, the first removes both."""

    def read(name):
        log.append(name)
        assert face.remove_reader(a) and face.remove_reader(b)

    with readable() as (a, _), readable() as (b, _):
        face.add_reader(a, read, "a")
        face.add_reader(b, read, "b")
        turn(loop, 3)
    assert len(log) == 1


@pytest.mark.row("A18")
@pytest.mark.parametrize("which", ["reader", "writer", "both"])
def test_a_hang_up_is_for_both(loop, face, log, which):
    with pair() as (a, b):
        if which != "writer":
            face.add_reader(a, log.append, "reader")
        if which != "reader":
            # The buffer is full: without the hang-up there is no event.
            with contextlib.suppress(BlockingIOError):
                while True:
                    a.send(b"x" * 4096)
            face.add_writer(a, log.append, "writer")
        turn(loop, 2)
        assert log == []
        b.close()
        turn(loop, 2)
        assert set(log) == ({"reader", "writer"} if which == "both" else {which})
        face.remove_reader(a)
        face.remove_writer(a)


@pytest.mark.row("A18")
@pytest.mark.parametrize("which", ["reader", "writer", "both"])
def test_an_error_is_for_both(loop, face, log, which):
    """The writing end of a pipe that nobody reads any more."""
    with pipe() as (reader, writer):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        if which != "writer":
            face.add_reader(writer, log.append, "reader")
        if which != "reader":
            face.add_writer(writer, log.append, "writer")
        turn(loop, 2)
        assert log == []
        os.close(reader)
        turn(loop, 2)
        assert set(log) == ({"reader", "writer"} if which == "both" else {which})
        face.remove_reader(writer)
        face.remove_writer(writer)


def test_a_connection_that_is_refused(loop, face):
    """Its error reaches whoever waits for it to be writable."""

    async def main():
        with tcp_pair() as (a, _):
            address = a.getsockname()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)

    loop.run_sync(main)


@pytest.mark.row("A4")
def test_an_fd_closed_before_it_was_removed(loop, face, log):
    """Nothing comes of it, and its number can be used again."""
    with readable() as (a, _), pair() as (c, d):
        number = a.fileno()
        face.add_reader(a, fail)
        a.close()
        os.dup2(c.fileno(), number)
        try:
            face.add_reader(number, log.append, 1)
            turn(loop, 2)
            assert log == []
            d.send(b"x")
            turn(loop, 2)
            assert log == [1]
            assert face.remove_reader(number) is True
        finally:
            os.close(number)


@pytest.mark.row("A4")
def test_a_number_used_again_while_its_writer_is_left(loop, face, log):
    """That writer is not called for the new file."""
    with pair() as (a, _), pair() as (c, d):
        number = a.fileno()
        face.add_writer(a, fail)
        a.close()
        os.dup2(c.fileno(), number)
        try:
            face.add_reader(number, log.append, 1)
            d.send(b"x")
            turn(loop, 2)
            assert set(log) == {1}
            assert face.remove_writer(number) is False
            assert face.remove_reader(number) is True
        finally:
            os.close(number)


@pytest.mark.parametrize("remains", ["reader", "writer", None])
def test_remove_of_what_was_closed(loop, face, remains):
    with pair() as (a, _):
        number = a.fileno()
        if remains != "writer":
            face.add_reader(a, nothing)
        if remains != "reader":
            face.add_writer(a, nothing)
        a.close()
        if remains != "reader":
            assert face.remove_writer(number) is True
        if remains != "writer":
            assert face.remove_reader(number) is True
    assert loop.stats()["handlers"] == 0


def test_where_the_ioloop_has_a_handler(loop, face, log):
    """Or asyncio: one fd is for one of them."""
    with readable() as (a, _):
        loop.add_handler(a, lambda *_: log.append("handler"), READ)
        for add in face.add_reader, face.add_writer:
            with pytest.raises(FileExistsError):
                add(a, fail)
        assert face.remove_reader(a) is face.remove_writer(a) is False
        turn(loop)
        assert log == ["handler"]
        loop.remove_handler(a)
        face.add_reader(a, log.append, "reader")
        with pytest.raises(FileExistsError):
            loop.add_handler(a, fail, WRITE)
        turn(loop, 2)
        assert log[-1] == "reader"
        assert face.remove_reader(a)


def test_the_ioloops_methods_leave_asyncios_files_alone(loop, face, log):
    """It has no handler for them."""
    with readable() as (a, _):
        face.add_reader(a, log.append, "reader")
        with pytest.raises(FileNotFoundError):
            loop.update_handler(a, WRITE)
        loop.remove_handler(a)
        assert loop._handlers == {}
        turn(loop, 2)
        assert log == ["reader"]
        assert face.remove_reader(a) is True


def test_only_callables_read(loop, face):
    with pair() as (a, _):
        for add in face.add_reader, face.add_writer:
            for value in None, 1, "text":
                with pytest.raises(TypeError):
                    add(a, value)
    assert loop.stats()["handlers"] == 0


@pytest.mark.row("A13")
@pytest.mark.parametrize("fd", [-1, None, "0", 1.5, 2**40, object()], ids=str)
def test_nonsense_is_not_watched(loop, face, fd):
    for add in face.add_reader, face.add_writer:
        with pytest.raises((ValueError, TypeError, OverflowError)):
            add(fd, fail)
    assert loop.stats()["handlers"] == 0


@pytest.mark.row("A9")
def test_a_file_that_can_not_be_watched(loop, face, tmp_path):
    with open(tmp_path / "file", "w") as file:
        with pytest.raises(PermissionError):
            face.add_reader(file, fail)
    assert loop.stats()["handlers"] == 0


# -- Signals -------------------------------------------------------------------


def wakeup_fd():
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    return fd


def test_a_signal_handler(loop, face, log):
    """It is a callback of the loop, which may be asleep."""

    def handler(*args):
        log.append((args, asyncio.get_running_loop(), threading.get_ident()))
        face.stop()

    face.add_signal_handler(USR1, handler, 1, 2)
    with in_time(loop):
        with Thread(wait_and_kill, loop):
            face.run_forever()
    assert log == [((1, 2), face, threading.main_thread().ident)]
    assert face.remove_signal_handler(USR1) is True
    assert face.remove_signal_handler(USR1) is False
    assert signal.getsignal(USR1) == signal.SIG_DFL


def wait_and_kill(loop):
    wait_until(loop.running)
    kill(USR1)


def test_a_signal_handler_is_replaced(loop, face, log):
    face.add_signal_handler(USR1, fail)
    face.add_signal_handler(USR1, log.append, 1)
    kill(USR1)
    turn(loop)
    assert log == [1]
    face.remove_signal_handler(USR1)


def test_the_default_handler_comes_back(face):
    """SIGINT's is Python's own."""
    face.add_signal_handler(signal.SIGINT, fail)
    assert face.remove_signal_handler(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.row("E5")
def test_the_programs_wakeup_fd_is_left_alone(loop, face, log):
    with pair() as (reader, writer):
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            face.add_signal_handler(USR1, log.append, 1)
            assert wakeup_fd() == writer.fileno()
            loop.add_callback(kill, USR1)
            turn(loop, 2)
            assert log == [1]
            assert reader.recv(10) == bytes([USR1])
            face.remove_signal_handler(USR1)
            assert wakeup_fd() == writer.fileno()
        finally:
            signal.set_wakeup_fd(-1)


def test_a_handler_removed_in_a_run(loop, face, log):
    """The loop goes on hearing of other signals."""

    def remove():
        assert face.remove_signal_handler(USR1)
        with on_signal(signal.SIGUSR2, lambda *_: log.append("USR2")):
            with Thread(kill, signal.SIGUSR2):
                wait_until(lambda: log)

    face.add_signal_handler(USR1, fail)
    face.call_soon(remove)
    turn(loop)
    assert log == ["USR2"]


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGKILL, RuntimeError),
        (signal.SIGSTOP, RuntimeError),
        (0, ValueError),
        (4711, ValueError),
        ("USR1", TypeError),
    ],
)
def test_signals_that_can_not_be_handled(face, stock, number, error):
    for each in face, stock:
        with pytest.raises(error):
            each.add_signal_handler(number, fail)
    assert not face._signal_handlers


def test_signals_are_for_the_main_thread(face):
    with pytest.raises(RuntimeError):
        in_thread(face.add_signal_handler, USR1, fail)
    assert signal.getsignal(USR1) == signal.SIG_DFL
    assert not face._signal_handlers


def test_a_failed_replacement_leaves_the_old_handler(loop, face, log):
    face.add_signal_handler(USR1, log.append, 1)
    with pytest.raises(RuntimeError):
        in_thread(face.add_signal_handler, USR1, fail)
    kill(USR1)
    turn(loop)
    assert log == [1]
    assert face.remove_signal_handler(USR1) is True


@pytest.mark.parametrize("value", [None, 1])
def test_a_signal_handler_can_be_called(face, value):
    with pytest.raises(TypeError):
        face.add_signal_handler(USR1, value)
    assert signal.getsignal(USR1) == signal.SIG_DFL


@pytest.mark.row("D18")
def test_a_signal_handler_keeps_no_loop(poller):
    face = poller.module.IOLoop(impl=poller.impl()).asyncio_loop
    face.add_signal_handler(USR1, fail)
    dead = weakref.ref(face), weakref.ref(face.ioloop)
    with pytest.warns(ResourceWarning, match="unclosed event loop"):
        del face
        gc.collect()
    assert [each() for each in dead] == [None, None]
    assert signal.getsignal(USR1) == signal.SIG_DFL


# -- What coroutines of an IOLoop can await ------------------------------------


async def sleep():
    assert await asyncio.sleep(0.001, "slept") == "slept"


async def lock():
    lock, log = asyncio.Lock(), []

    async def use(name):
        async with lock:
            log.append(name)
            await asyncio.sleep(0)
            log.append(name)

    await asyncio.gather(use("a"), use("b"))
    assert log == ["a", "a", "b", "b"]


async def wait_for():
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.sleep(FOREVER), 0.001)
    assert await asyncio.wait_for(asyncio.sleep(0, 7), FOREVER) == 7


async def timeout():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await asyncio.sleep(FOREVER)


async def task_group():
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(asyncio.sleep(0, n)) for n in range(3)]
    assert [task.result() for task in tasks] == [0, 1, 2]


async def queue():
    queue = asyncio.Queue(1)

    async def produce():
        for n in range(5):
            await queue.put(n)

    task = asyncio.create_task(produce())
    assert [await queue.get() for _ in range(5)] == list(range(5))
    await task


async def to_thread():
    assert await asyncio.to_thread(threading.get_ident) != threading.get_ident()


async def run_in_executor():
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(None, pow, 2, 10) == 1024


async def subprocess():
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "print(input()[::-1])",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate(b"abc\n")
    assert (process.returncode, output) == (0, b"cba\n")


async def streams():
    async def echo(reader, writer):
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"abc\n")
    assert await reader.read() == b"abc\n"
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()


async def socket_methods():
    loop = asyncio.get_running_loop()
    with pair() as (a, b):
        receiving = asyncio.create_task(loop.sock_recv(a, 3))
        await asyncio.sleep(0)
        await loop.sock_sendall(b, b"abc")
        assert await receiving == b"abc"


AWAITED = [
    sleep,
    lock,
    wait_for,
    queue,
    to_thread,
    run_in_executor,
    subprocess,
    streams,
    socket_methods,
]
if sys.version_info >= (3, 11):
    AWAITED += [timeout, task_group]


@pytest.mark.parametrize("where", ["callback", "periodic", "run_sync", "handler"])
@pytest.mark.parametrize("awaited", AWAITED, ids=lambda function: function.__name__)
def test_what_a_coroutine_can_await(loop, poller, log, where, awaited):
    """Wherever an IOLoop takes one."""

    async def coroutine(sock=None, events=None):
        if sock is not None:
            loop.remove_handler(sock)
        await awaited()
        log.append(awaited)

    if where == "run_sync":
        loop.run_sync(coroutine)
    elif where == "handler":
        with readable() as (a, _):
            loop.add_handler(a, coroutine, READ)
            run_until(loop, lambda: log)
    elif where == "periodic":
        periodic = poller.module.PeriodicCallback(coroutine, 1, loop)
        periodic.start()
        run_until(loop, lambda: log)
        periodic.stop()
    else:
        loop.add_callback(coroutine)
        run_until(loop, lambda: log)
    assert log == [awaited]
    turn(loop, 4)
    assert asyncio.all_tasks(loop.asyncio_loop) == set()
    loop.asyncio_loop.run_until_complete(loop.asyncio_loop.shutdown_default_executor())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="new in Python 3.12")
def test_eager_tasks(loop, face, log):
    """A coroutine's first step is made when its task is, not an iteration later."""

    async def coroutine(name):
        log.append(name)
        assert asyncio.get_running_loop() is face
        await asyncio.sleep(0)
        log.append(name)

    async def main():
        task = asyncio.create_task(coroutine("task"))
        assert log.pop() == "task"
        await task
        return log.pop()

    face.set_task_factory(asyncio.eager_task_factory)
    assert loop.run_sync(main) == "task"
    loop.add_callback(coroutine, "callback")
    loop.add_callback(log.append, "behind it")
    turn(loop)
    assert log == ["callback", "behind it"]
    run_until(loop, lambda: len(log) == 3)


@pytest.mark.skipif(sys.version_info < (3, 14), reason="new in Python 3.14")
def test_the_call_graph_of_a_task(loop):
    async def inner():
        return asyncio.capture_call_graph()

    async def main():
        return await asyncio.create_task(inner(), name="inner")

    graph = loop.run_sync(main)
    assert graph.future.get_name() == "inner"
    assert [each.frame.f_code.co_name for each in graph.call_stack] == ["inner"]
    [waiter] = graph.awaited_by
    assert [each.frame.f_code.co_name for each in waiter.call_stack] == ["main"]
    del graph, waiter


@pytest.mark.skipif(sys.version_info < (3, 14), reason="new in Python 3.14")
def test_the_tasks_of_another_process():
    """As `python -m asyncio ps` shows them."""
    code = """
        import asyncio, os, subprocess, sys

        async def sleeper():
            await asyncio.sleep(3600)

        async def main():
            task = asyncio.create_task(sleeper(), name="the sleeper")
            await asyncio.sleep(0)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "asyncio", "ps", str(os.getpid()),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            output, _ = await process.communicate()
            print(output.decode())
            task.cancel()

        with ioloop.IOLoop() as loop:
            loop.run_sync(main)
        """
    shown = run_python(code).stdout
    if "Permission" in shown or "not permitted" in shown:
        pytest.skip("the kernel lets nobody look into another process")
    assert "the sleeper" in shown, shown


# -- Transports ----------------------------------------------------------------


@pytest.mark.skipif(MUSL, reason="musl's malloc() has another rule")
def test_transports_receive_without_new_memory_from_the_kernel():
    """asyncio's asks for 256 KiB each time, which malloc() may map and unmap."""
    run_python("""
        import asyncio, resource, socket

        class Protocol(asyncio.Protocol):
            def data_received(self, data):
                received.set_result(data)

        async def main():
            global received
            loop = asyncio.get_running_loop()
            a, b = socket.socketpair()
            transport, _ = await loop.create_connection(Protocol, sock=a)
            for turn in range(1100):
                if turn == 100:
                    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                received = loop.create_future()
                b.send(b"x")
                assert await received == b"x"
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            transport.close()
            b.close()
            await asyncio.sleep(0)
            assert faults < 500, faults

        face = ioloop.new_event_loop()
        face.run_until_complete(main())
        face.close()
    """)
