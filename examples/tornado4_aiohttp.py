"""A program in the style of Tornado 4 that awaits aiohttp: is each URL still there?

python examples/tornado4_aiohttp.py --port 8888 http://localhost:8000/ ...

It looks at them now and then, and whoever connects to its port is told how they are:
nc 127.0.0.1 8888
"""

import argparse
import asyncio
import contextlib
import signal

import aiohttp
from echo_server import listen
from step_by_step import cancel_all

import ioloop


class Monitor:
    """Remembers how each URL was when it was last fetched."""

    def __init__(self, loop, urls):
        self.loop = loop
        self.states = dict.fromkeys(urls, "unknown")

    async def open(self):
        timeout = aiohttp.ClientTimeout(total=5)
        self.session = aiohttp.ClientSession(timeout=timeout)
        await self.check()

    async def close(self):
        await cancel_all()
        await self.session.close()

    async def check(self):
        await asyncio.gather(*map(self.fetch, self.states))

    async def fetch(self, url):
        try:
            async with self.session.get(url) as response:
                state = f"{response.status} {response.reason}"
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            state = type(error).__name__
        self.states[url] = state

    def on_client(self, listener, events):
        sock, _ = listener.accept()
        sock.setblocking(False)
        self.loop.add_callback(self.report, sock)

    async def report(self, sock):
        lines = [f"{url} {state}\n" for url, state in self.states.items()]
        with sock, contextlib.suppress(OSError):
            await self.loop.asyncio_loop.sock_sendall(sock, "".join(lines).encode())


def main():
    parser = argparse.ArgumentParser(description="Watches URLs.")
    parser.add_argument("urls", nargs="+", metavar="URL")
    parser.add_argument("--port", type=int, default=8888, help="0: any free port")
    parser.add_argument("--every", type=float, default=10, metavar="SECONDS")
    options = parser.parse_args()

    loop = ioloop.IOLoop.instance()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.add_callback_from_signal(loop.stop))
    monitor = Monitor(loop, options.urls)
    loop.run_sync(monitor.open)
    periodic = ioloop.PeriodicCallback(monitor.check, options.every * 1000)
    periodic.start()
    with listen("127.0.0.1", options.port) as listener:
        loop.add_handler(listener, monitor.on_client, loop.READ)
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        loop.start()
        loop.remove_handler(listener)
    periodic.stop()
    loop.run_sync(monitor.close)
    loop.close()


if __name__ == "__main__":
    main()
