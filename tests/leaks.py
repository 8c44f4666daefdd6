"""make leaks: what the loop's operations leave behind, on a debug interpreter.

Each operation is repeated and the total of all reference counts compared with
that of an empty control; likewise the open files.  A leak of one reference per
repetition would show as REPEAT, a drift of the interpreter's own as a few.
"""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import gc
import os
import signal
import socket
import sys
import warnings
from threading import Thread

import ioloop

REPEAT = 50
ROUNDS = 6
READ, WRITE, NONE = ioloop.IOLoop.READ, ioloop.IOLoop.WRITE, ioloop.IOLoop.NONE
OPERATIONS = []
VARIABLE = contextvars.ContextVar("VARIABLE")


def operation(function):
    OPERATIONS.append(function)
    return function


def fail(*args):
    raise ValueError("a callback's")


def turn(loop, times=1):
    for _ in range(times):
        loop.run_once(0)


@contextlib.contextmanager
def quiet(loop):
    loop.handle_callback_exception = lambda callback: None
    yield
    del loop.handle_callback_exception


@operation
def control(loop, a, b):
    pass


@operation
def construct(loop, a, b):
    with ioloop.IOLoop(impl=type(loop._impl)()) as other:
        other.add_callback(print, 1, key=2)
        other.call_later(10, print, 1, key=2)
        other.add_handler(a, print, READ)
        other.keep = other


@operation
def drop(loop, a, b):
    other = ioloop.IOLoop(impl=type(loop._impl)())
    other.call_later(10, other.add_callback, other)
    other.add_handler(a, other.stop, READ)
    del other
    gc.collect()


@operation
def callbacks(loop, a, b):
    for _ in range(70):
        loop.add_callback(int)
        loop.add_callback(int, "1")
        loop.add_callback(dict, key=[])
        loop.spawn_callback(int)
    turn(loop)


@operation
def timeouts(loop, a, b):
    handles = [loop.call_later(0, dict, key=[]) for _ in range(20)]
    handles += [loop.add_timeout(loop.time() + 100, list) for _ in range(20)]
    loop.call_later(0, lambda: loop.call_later(-1, list))
    turn(loop, 2)
    for handle in handles:
        str(handle), handle.deadline, handle.callback
        loop.remove_timeout(handle)


@operation
def handlers(loop, a, b):
    b.send(b"x")
    loop.add_handler(a, lambda *_: a.recv(1), READ)
    turn(loop)
    for mask in (READ | WRITE, NONE, READ):
        loop.update_handler(a.fileno(), mask)
    with contextlib.suppress(FileExistsError):
        loop.add_handler(a.fileno(), print, READ)
    loop.stats(), loop._handlers, loop.next_timeout(), repr(loop)
    loop.remove_handler(a)


@operation
def failures(loop, a, b):
    with quiet(loop):
        b.send(b"x")
        loop.add_handler(a, fail, READ)
        loop.add_callback(fail)
        loop.call_later(0, fail, 1)
        turn(loop)
        loop.remove_handler(a)
        a.recv(1)


@operation
def refusals(loop, a, b):
    for call in (
        lambda: loop.add_callback(None),
        lambda: loop.call_later("1", int),
        lambda: loop.add_timeout(float("nan"), int),
        lambda: loop.add_handler(-1, int, READ),
        lambda: loop.add_handler(1.0, int, READ),
        lambda: loop.update_handler(a, READ),
        lambda: loop.remove_timeout(1),
        lambda: loop.run_sync(None),
        lambda: ioloop.IOLoop(impl=1),
        lambda: ioloop.PeriodicCallback(int, -1),
    ):
        with contextlib.suppress(Exception):
            call()
            raise AssertionError("it was not refused")


@operation
def base_exceptions(loop, a, b):
    def leave(*_):
        raise SystemExit

    for add in (
        lambda: loop.add_callback(leave),
        lambda: loop.call_later(0, leave),
        lambda: (b.send(b"x"), loop.add_handler(a, leave, READ)),
    ):
        add()
        with contextlib.suppress(SystemExit):
            loop.start()
    loop.remove_handler(a)
    a.recv(1)


@operation
def coroutines(loop, a, b):
    async def add(x, y):
        await asyncio.sleep(0)
        future = concurrent.futures.Future()
        loop.add_callback(future.set_result, x + y)
        return await asyncio.wrap_future(future)

    async def broken():
        await asyncio.sleep(0)
        fail()

    assert loop.run_sync(lambda: add(1, 2)) == 3
    with contextlib.suppress(ValueError):
        loop.run_sync(broken)
    with contextlib.suppress(TimeoutError):
        loop.run_sync(asyncio.Event().wait, timeout=0)
    with contextlib.suppress(TimeoutError):
        loop.run_sync(concurrent.futures.Future, timeout=0)
    with quiet(loop):
        loop.add_callback(broken)
        turn(loop, 6)


@operation
def faces(loop, a, b):
    with contextlib.closing(ioloop.new_event_loop()) as face:
        face.keep = face
        face.run_until_complete(asyncio.sleep(0))
    face = ioloop.new_event_loop()
    face.call_later(10, face.call_soon, face)
    del face
    gc.collect()


@operation
def handles(loop, a, b):
    face = loop.asyncio_loop
    face.set_exception_handler(lambda face, context: None)
    for debug in False, True:
        face.set_debug(debug)
        for add in face.call_soon, face.call_soon_threadsafe:
            add(list, (1,))
            add(fail)
            add(VARIABLE.set, [1], context=contextvars.Context())
            add(fail).cancel()
        face.call_later(0, list, (1,))
        timer = face.call_later(10, fail)
        repr(timer), timer.cancel(), repr(timer)
        with contextlib.suppress(TypeError):
            face.call_soon(None)
        turn(loop, 2)


@operation
def readers(loop, a, b):
    face = loop.asyncio_loop
    face.add_writer(a, fail)
    face.add_reader(a, list)
    face.add_writer(a, list)
    b.send(b"x")
    turn(loop, 2)
    a.recv(1)
    face._add_reader(a, fail).cancel()
    face.remove_writer(a)
    b.send(b"x")
    turn(loop, 2)
    a.recv(1)
    assert not face.remove_reader(a)
    with contextlib.suppress(ValueError):
        face.add_reader(-1, fail)


@operation
def streams(loop, a, b):
    async def talk():
        c, d = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=c)
        d.send(b"hello\n")
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        d.close()

    loop.run_sync(talk)


@operation
def periodic(loop, a, b):
    periodic = ioloop.PeriodicCallback(list, 0.001, loop)
    periodic.start()
    loop.call_later(0.0005, loop.stop)
    loop.start()
    periodic.stop()


@operation
def threads(loop, a, b):
    threads = [Thread(target=loop.add_callback, args=(list, (n,))) for n in range(3)]
    threads.append(Thread(target=loop.stop))
    for thread in threads:
        thread.start()
    loop.start()
    for thread in threads:
        thread.join()
    turn(loop)


@operation
def watchdog(loop, a, b):
    loop.set_blocking_signal_threshold(10, print)
    turn(loop)
    loop.set_blocking_log_threshold(10)
    turn(loop)
    loop.set_blocking_log_threshold(None)


@operation
def signals(loop, a, b):
    old = signal.signal(signal.SIGUSR1, lambda *_: loop.add_callback(loop.stop))
    loop.call_later(0, signal.raise_signal, signal.SIGUSR1)
    loop.start()
    signal.signal(signal.SIGUSR1, old)


@operation
def instance(loop, a, b):
    loop.make_current()
    ioloop.IOLoop.current()
    ioloop.IOLoop.clear_current()
    with ioloop.IOLoop.instance() as other:
        other.add_callback(other.stop)
        other.start()


@operation
def pollers(loop, a, b):
    poller = type(loop._impl)()
    poller.register(a, WRITE)
    poller.modify(a, READ | WRITE)
    poller.poll(0)
    poller.unregister(a)
    poller.close()


@operation
def contexts(loop, a, b):
    context = contextvars.copy_context()
    context.run(VARIABLE.set, [1])
    context.run(loop.add_callback, VARIABLE.set, [2])
    context.run(loop.call_later, 0, VARIABLE.get)
    loop.spawn_callback(VARIABLE.set, [3])
    turn(loop, 2)


def measure(function, poller):
    """The references and files that repetitions leave, once it has settled."""
    counts = []
    with ioloop.IOLoop(impl=poller()) as loop:
        a, b = socket.socketpair()
        with a, b:
            for _ in range(ROUNDS):
                for _ in range(REPEAT):
                    function(loop, a, b)
                gc.collect()
                files = len(os.listdir("/proc/self/fd"))
                counts.append((sys.gettotalrefcount(), files))
    (refs, files), (last_refs, last_files) = counts[-3], counts[-1]
    return last_refs - refs, last_files - files


def main():
    leaks = 0
    for poller in (ioloop._EPoll, ioloop._Select):
        base, _ = measure(control, poller)
        for function in OPERATIONS:
            refs, files = measure(function, poller)
            leaking = abs(refs - base) >= REPEAT or files != 0
            leaks += leaking
            print(
                f"{poller.__name__:8} {function.__name__:16} {refs - base:6} references"
                f" {files:3} files in {2 * REPEAT}  {'LEAKS' if leaking else 'ok'}"
            )
    sys.exit(f"{leaks} leaks" if leaks else 0)


def once():
    """Each operation three times, for tools that look on, on any interpreter."""
    for poller in (ioloop._EPoll, ioloop._Select):
        for function in OPERATIONS:
            with ioloop.IOLoop(impl=poller()) as loop:
                a, b = socket.socketpair()
                with a, b:
                    for _ in range(3):
                        function(loop, a, b)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of the loops that are dropped
    if "--once" in sys.argv:
        once()
    elif hasattr(sys, "gettotalrefcount"):
        main()
    else:
        sys.exit("leaks.py needs a debug build of CPython, as python3.11-dbg is")
