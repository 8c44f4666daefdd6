"""From callbacks to asyncio, step by step: the same service three times in one thread.

A client gets each of its lines back in capital letters, and has to leave when it has
been idle for too long.  Each step can be the last one, and a program whose parts are at
different steps works as well: they all share one loop.

python examples/step_by_step.py --port 8881, then: nc 127.0.0.1 8881, or 8882, or 8883
"""

import argparse
import asyncio
import contextlib
import functools
import signal

from echo_server import RECV_SIZE, listen, serve

import ioloop

# -- Step 1: handlers and timeouts.  A connection is an object that remembers what it
# has done so far.


class Connection:
    def __init__(self, idle, loop, sock):
        self.idle = idle
        self.loop = loop
        self.sock = sock
        self.partial = b""
        self.timeout = loop.call_later(idle, self.close)
        loop.add_handler(sock, self.on_ready, loop.READ)

    def on_ready(self, sock, events):
        try:
            data = sock.recv(RECV_SIZE)
            *lines, self.partial = (self.partial + data).split(b"\n")
            for line in lines:
                sock.sendall(line.upper() + b"\n")
        except OSError:  # including that a client does not read
            data = b""
        self.timeout.cancel()
        if data:
            self.timeout = self.loop.call_later(self.idle, self.close)
        else:
            self.close()

    def close(self):
        self.loop.remove_handler(self.sock)
        self.sock.close()


# -- Step 2: a connection is a coroutine, which can wait in the middle of what it does.
# Only the handler that accepts it is left.

# An error, no line for too long, or the end of the program.
ENDINGS = OSError, asyncio.TimeoutError, asyncio.CancelledError


async def talk(idle, sock):
    loop = asyncio.get_running_loop()
    partial = b""
    with sock, contextlib.suppress(*ENDINGS):
        while data := await asyncio.wait_for(loop.sock_recv(sock, RECV_SIZE), idle):
            *lines, partial = (partial + data).split(b"\n")
            for line in lines:
                await loop.sock_sendall(sock, line.upper() + b"\n")


def start_talk(idle, loop, sock):
    loop.add_callback(talk, idle, sock)


# -- Step 3: asyncio accepts the connections, and its streams know what a line is.  Who
# has come so far with all parts can run them by
# asyncio.Runner(loop_factory=ioloop.new_event_loop).


async def talk_by_streams(idle, reader, writer):
    with contextlib.closing(writer), contextlib.suppress(*ENDINGS):
        while (line := await asyncio.wait_for(reader.readline(), idle)).endswith(b"\n"):
            writer.write(line.upper())
            await writer.drain()


async def cancel_all():
    """End whatever coroutines are left, as the Runner does by itself."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def main():
    parser = argparse.ArgumentParser(description="Lines in capital letters.")
    parser.add_argument("--port", type=int, default=8881, help="0: any free ports")
    parser.add_argument("--idle", type=float, default=300, help="seconds")
    options = parser.parse_args()
    steps = [
        functools.partial(step, options.idle)
        for step in (Connection, start_talk, talk_by_streams)
    ]

    loop = ioloop.IOLoop.instance()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.add_callback_from_signal(loop.stop))
    listeners = [
        listen("127.0.0.1", options.port and options.port + number)
        for number in range(len(steps))
    ]
    serve(loop, listeners[0], steps[0])
    serve(loop, listeners[1], steps[1])
    server = loop.run_sync(lambda: asyncio.start_server(steps[2], sock=listeners[2]))
    for number, listener in enumerate(listeners, 1):
        print("step {}: {}:{}".format(number, *listener.getsockname()), flush=True)
    loop.start()
    server.close()
    loop.run_sync(cancel_all)
    loop.close(all_fds=True)


if __name__ == "__main__":
    main()
