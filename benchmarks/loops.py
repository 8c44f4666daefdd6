"""One small adapter per loop, so that a scenario is written once.

An adapter binds the loop's own methods wherever their signatures fit, so a
scenario calls the loop and not the adapter.  The names that scenarios use:

    call(fn)                 queue a callback, from the loop's thread
    call_from_thread(fn)     the same from another thread
    later(seconds, fn)       set a timer; the answer goes to cancel()
    cancel(timer)
    watch(fd, handler)       call handler(fd, events) whenever fd is readable
    rewatch(fd, events)      READ, WRITE, or both
    unwatch(fd)
    serve_echo(listener)     echo on each connection, in the loop's best style
    run(), stop(), close()

The adapters of asyncio's loops also have loop, the loop itself, and complete(), its
run_until_complete(), for what is written in coroutines.
"""

import functools
import importlib
import importlib.util
import socket
import time

READ, WRITE = 1, 4


def nothing(*args):
    pass


def canceller(loop):
    """Timers are cancelled by a method of theirs: answers it unbound."""
    timer = loop.call_later(1, nothing)
    timer.cancel()
    return type(timer).cancel


class Handlers:
    """Loops whose users read and write in handlers of their own."""

    def serve_echo(self, listener):
        listener.setblocking(False)

        def accept(fd, events):
            try:
                while True:
                    connection, _ = listener.accept()
                    connection.setblocking(False)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self.watch(connection.fileno(), echo_handler(self, connection))
            except BlockingIOError:
                pass

        self.watch(listener.fileno(), accept)


# One buffer for all connections costs less than a bytes object per message, and
# far less where that object would be so big that malloc asks the kernel for it.
BUFFER = memoryview(bytearray(131072))


def echo_handler(loop, connection):
    recv_into, send = connection.recv_into, connection.send
    unsent = b""

    def ready(fd, events):
        nonlocal unsent
        try:
            data = unsent or BUFFER[: recv_into(BUFFER)]
        except ConnectionError:
            data = b""
        if not data:
            loop.unwatch(fd)
            connection.close()
            return
        try:
            sent = send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            if not unsent:
                loop.rewatch(fd, WRITE)
            unsent = bytes(data[sent:])
        elif unsent:
            unsent = b""
            loop.rewatch(fd, READ)

    return ready


class Ioloop(Handlers):
    module = "ioloop"

    def __init__(self):
        import ioloop

        self.loop = loop = ioloop.IOLoop()
        self.call = self.call_from_thread = loop.add_callback
        self.later = loop.call_later
        self.cancel = canceller(loop)
        self.rewatch = loop.update_handler
        self.unwatch = loop.remove_handler
        self.run, self.stop, self.close = loop.start, loop.stop, loop.close

    def watch(self, fd, handler):
        self.loop.add_handler(fd, handler, READ)


class Seed(Handlers):
    module = "benchmarks.seed"

    def __init__(self):
        from benchmarks import seed

        self.loop = loop = seed.IOLoop()
        self.call = self.call_from_thread = loop.add_callback
        self.cancel = loop.remove_timeout
        self.rewatch = loop.update_handler
        self.unwatch = loop.remove_handler
        self.run, self.stop, self.close = loop.start, loop.stop, loop.close

    def later(self, seconds, fn):
        return self.loop.add_timeout(time.time() + seconds, fn)

    def watch(self, fd, handler):
        self.loop.add_handler(fd, handler, READ)


class Tornado(Handlers):
    module = "tornado.ioloop"

    def __init__(self):
        from tornado.ioloop import IOLoop

        self.loop = loop = IOLoop(make_current=False)
        self.call = self.call_from_thread = loop.add_callback
        self.later = loop.call_later
        self.cancel = loop.remove_timeout
        self.rewatch = loop.update_handler
        self.unwatch = loop.remove_handler
        self.run, self.stop, self.close = loop.start, loop.stop, loop.close

    def watch(self, fd, handler):
        self.loop.add_handler(fd, handler, READ)


class Asyncio:
    module = "asyncio"

    def __init__(self):
        self.loop = loop = self.new_event_loop()
        self.handlers = {}
        self.call = loop.call_soon
        self.call_from_thread = loop.call_soon_threadsafe
        self.later = loop.call_later
        self.cancel = canceller(loop)
        self.run, self.stop, self.close = loop.run_forever, loop.stop, loop.close
        self.complete = loop.run_until_complete

    def new_event_loop(self):
        return importlib.import_module(self.module).new_event_loop()

    def watch(self, fd, handler):
        self.handlers[fd] = handler
        self.loop.add_reader(fd, handler, fd, READ)

    def rewatch(self, fd, events):
        handler = self.handlers[fd]
        if events & READ:
            self.loop.add_reader(fd, handler, fd, READ)
        else:
            self.loop.remove_reader(fd)
        if events & WRITE:
            self.loop.add_writer(fd, handler, fd, WRITE)
        else:
            self.loop.remove_writer(fd)

    def unwatch(self, fd):
        self.loop.remove_reader(fd)
        self.loop.remove_writer(fd)
        del self.handlers[fd]

    def serve_echo(self, listener, **options):
        import asyncio

        class Echo(asyncio.Protocol):
            def connection_made(self, transport):
                self.write = transport.write

            def data_received(self, data):
                self.write(data)

        self.complete(self.loop.create_server(Echo, sock=listener, **options))


class Face(Asyncio):
    """An IOLoop as asyncio sees it."""

    module = "ioloop"


class Uvloop(Asyncio):
    module = "uvloop"


class Rloop(Asyncio):
    module = "rloop"


class Rsloop(Asyncio):
    module = "rsloop"


def with_aiofastnet(adapter):
    class Fast(adapter):
        def new_event_loop(self):
            import aiofastnet

            return aiofastnet.patch_loop(super().new_event_loop())

    return Fast


class Gevent(Handlers):
    """libev as gevent wraps it, without greenlets."""

    module = "gevent.core"

    def __init__(self):
        from gevent.core import loop as Loop

        self.loop = loop = Loop(default=False)
        self.watchers = {}
        self.keep_alive = loop.async_()
        self.keep_alive.start(nothing)
        self.call = loop.run_callback
        self.call_from_thread = loop.run_callback_threadsafe
        self.run, self.stop, self.close = loop.run, loop.break_, loop.destroy

    def later(self, seconds, fn):
        timer = self.loop.timer(seconds)
        timer.start(fn)
        return timer

    def cancel(self, timer):
        timer.close()

    def watch(self, fd, handler):
        watcher = self.watchers[fd] = self.loop.io(fd, 1)
        watcher.start(handler, fd, READ)

    def rewatch(self, fd, events):
        watcher = self.watchers[fd]
        handler = watcher.callback
        watcher.stop()
        watcher.events = (events & READ) | (2 if events & WRITE else 0)
        watcher.start(handler, fd, events)

    def unwatch(self, fd):
        self.watchers.pop(fd).close()


LOOPS = {
    "ioloop": Ioloop,
    "seed": Seed,
    "tornado": Tornado,
    "asyncio": Asyncio,
    "uvloop": Uvloop,
    "rloop": Rloop,
    "rsloop": Rsloop,
    "gevent": Gevent,
}

# These have no adapter: door.pyx and floor.c run the scenarios themselves.
DOOR, FLOOR = "ioloop-c", "C"
PEERS = ["ioloop", DOOR, *list(LOOPS)[1:], FLOOR]

# What runs programs of asyncio's, and three of them with the transports of aiofastnet.
ASYNCIO_LOOPS = {
    "ioloop": Face,
    "asyncio": Asyncio,
    "uvloop": Uvloop,
    "rloop": Rloop,
    "rsloop": Rsloop,
    "ioloop+fn": with_aiofastnet(Face),
    "asyncio+fn": with_aiofastnet(Asyncio),
    "uvloop+fn": with_aiofastnet(Uvloop),
}
ALL_PEERS = list(dict.fromkeys([*PEERS, *ASYNCIO_LOOPS]))


@functools.cache
def installed(peer):
    if peer == FLOOR:
        needed = []
    elif peer == DOOR:
        needed = ["ioloop", "Cython", "setuptools"]
    else:
        name, plus, _ = peer.partition("+")
        needed = [LOOPS[name].module.split(".")[0], *["aiofastnet"] * len(plus)]
    return all(importlib.util.find_spec(module) for module in needed)
