"""The scenarios of asyncio's programs, and the table of their cases.

What a program of handlers does as well is taken from scenarios.py; the rest is here,
in coroutines.
"""

import asyncio
import os
import socket
import ssl
import sys
from contextlib import suppress
from pathlib import Path

from benchmarks import scenarios, targets
from benchmarks.loops import ASYNCIO_LOOPS, nothing
from benchmarks.scenarios import LOAD, TOOLS, Case, Row, Stopwatch, echo_with, spread

# -- timers ------------------------------------------------------------------------


def cancel(loop, live, count):
    """A timer is set and cancelled at once while `live` others run, 100 a pass."""
    call, later, cancel = loop.call, loop.later, loop.cancel
    timers = [later(delay, nothing) for delay in spread(live, 60, 600)]
    left = count

    def set_and_cancel():
        nonlocal left
        for _ in range(100):
            cancel(later(60, nothing))
        left -= 100
        if left:
            call(set_and_cancel)
        else:
            loop.stop()

    call(set_and_cancel)
    watch = Stopwatch()
    loop.run()
    figures = watch.per(count)
    for timer in timers:
        cancel(timer)
    return figures


def timeout(loop, count):
    """`asyncio.timeout()` around a coroutine that lets the loop turn once."""

    async def main():
        watch = Stopwatch()
        for _ in range(count):
            async with asyncio.timeout(60):
                await asyncio.sleep(0)
        return watch.per(count)

    return loop.complete(main())


# -- tasks and futures -------------------------------------------------------------


def sleep(loop, tasks, count):
    """`tasks` tasks take turns by `sleep(0)`."""

    async def work():
        for _ in range(count // tasks):
            await asyncio.sleep(0)

    async def main():
        watch = Stopwatch()
        await asyncio.gather(*(work() for _ in range(tasks)))
        return watch.per(count)

    return loop.complete(main())


def gather(loop, futures, count):
    """`futures` futures are made, get their results by call_soon, and are gathered."""

    async def main():
        loop = asyncio.get_running_loop()
        watch = Stopwatch()
        for _ in range(count // futures):
            waited_for = [loop.create_future() for _ in range(futures)]
            for future in waited_for:
                loop.call_soon(future.set_result, None)
            await asyncio.gather(*waited_for)
        return watch.per(count)

    return loop.complete(main())


def queue(loop, count):
    """An item goes to another task through one Queue, and back through another."""

    async def main():
        there, back = asyncio.Queue(1), asyncio.Queue(1)

        async def serve():
            while True:
                await back.put(await there.get())

        server = asyncio.create_task(serve())
        watch = Stopwatch()
        for number in range(count):
            await there.put(number)
            await back.get()
        figures = watch.per(count)
        server.cancel()
        return figures

    return loop.complete(main())


def task(loop, count):
    """A task is created and awaited."""

    async def do_nothing():
        pass

    async def main():
        watch = Stopwatch()
        for _ in range(count):
            await asyncio.create_task(do_nothing())
        return watch.per(count)

    return loop.complete(main())


# -- fds ---------------------------------------------------------------------------


def readers(loop, fds, count):
    """`fds` pipes get a reader and lose it, with a poll after each step."""
    pipes = [os.pipe() for _ in range(fds)]
    left = count // fds

    def add():
        for reader, _ in pipes:
            loop.watch(reader, nothing)
        loop.later(0, remove)

    def remove():
        nonlocal left
        for reader, _ in pipes:
            loop.loop.remove_reader(reader)
        left -= 1
        if left:
            loop.later(0, add)
        else:
            loop.stop()

    loop.call(add)
    watch = Stopwatch()
    loop.run()
    return watch.per(count // fds * fds)


# -- TCP echo, in other styles than a protocol -------------------------------------


def echo_by(loop, serve, load=LOAD, **parameters):
    return echo_with(
        serve, loop.call_from_thread, loop.run, loop.stop, load, **parameters
    )


def streams(loop, **parameters):
    """A task per connection reads from a stream and writes to another."""

    async def echo(reader, writer):
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    def serve(listener):
        loop.complete(asyncio.start_server(echo, sock=listener))

    return echo_by(loop, serve, **parameters)


def sockets(loop, **parameters):
    """A task per connection uses `sock_recv()` and `sock_sendall()`."""
    receive, send = loop.loop.sock_recv, loop.loop.sock_sendall
    tasks = set()

    async def echo(connection):
        with connection, suppress(ConnectionError):
            while data := await receive(connection, 65536):
                await send(connection, data)

    async def accept(listener):
        while True:
            connection, _ = await loop.loop.sock_accept(listener)
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tasks.add(loop.loop.create_task(echo(connection)))

    def serve(listener):
        listener.setblocking(False)
        tasks.add(loop.loop.create_task(accept(listener)))

    return echo_by(loop, serve, **parameters)


def tls(loop, **parameters):
    """A protocol behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TOOLS / "tls.pem")
    load = [sys.executable, Path(__file__).with_name("tls_load.py")]

    def serve(listener):
        loop.serve_echo(listener, ssl=context)

    return echo_by(loop, serve, load, **parameters)


# -- the cases ---------------------------------------------------------------------

PEERS = [peer for peer in ASYNCIO_LOOPS if "+" not in peer]
AHEAD = (targets.Uvloop(1), targets.Fastest(1))


def case(name, run, parameters, quick, **options):
    return Case(
        f"asyncio {name}",
        run,
        parameters,
        quick,
        **{
            "rows": [Row("wall", "ns", AHEAD), Row("user", "ns")],
            "adapters": ASYNCIO_LOOPS,
            "peers": PEERS,
            **options,
        },
    )


def echo_case(name, run, size, connections):
    return case(
        f"{name} {size // 1024}K x{connections}",
        run,
        {"size": size, "connections": connections, "seconds": 1.5},
        {"size": size, "connections": min(connections, 20), "seconds": 0.1},
        rows=[
            Row("wall", "us"),
            Row("cpu", "us", (targets.FastUvloop(1),)),
            Row("user", "us"),
            Row("system", "us"),
        ],
        peers=[*ASYNCIO_LOOPS],
        warm_up=False,  # the load does
    )


CASES = [
    case("call_soon", scenarios.chain, {"count": 500_000}, {"count": 2_000}),
    case("call_soon batch", scenarios.batch, {"count": 500_000}, {"count": 2_000}),
    case(
        "call_soon_threadsafe",
        scenarios.crossthread,
        {"count": 200_000},
        {"count": 2_000},
    ),
    case("call_later", scenarios.timers_fire, {"count": 200_000}, {"count": 2_000}),
    case(
        "cancel",
        cancel,
        {"live": 10_000, "count": 300_000},
        {"live": 100, "count": 2_000},
    ),
    case(
        "cancel at random",
        scenarios.timers_cancel,
        {"count": 50_000},
        {"count": 2_000},
    ),
    case("timeout()", timeout, {"count": 100_000}, {"count": 500}),
    case(
        "sleep(0)",
        sleep,
        {"tasks": 100, "count": 500_000},
        {"tasks": 10, "count": 2_000},
    ),
    case(
        "gather",
        gather,
        {"futures": 10_000, "count": 300_000},
        {"futures": 100, "count": 2_000},
    ),
    case("Queue", queue, {"count": 100_000}, {"count": 500}),
    case("create_task", task, {"count": 200_000}, {"count": 1_000}),
    *(
        case(
            f"add_reader {pairs}/{active}",
            scenarios.ring,
            {"pairs": pairs, "active": active, "count": 200_000},
            {"pairs": 20, "active": min(active, 10), "count": 2_000},
        )
        for pairs, active in ((100, 1), (1000, 100))
    ),
    case(
        "remove_reader",
        readers,
        {"fds": 100, "count": 100_000},
        {"fds": 10, "count": 500},
    ),
    echo_case("protocol", scenarios.echo, 1024, 10),
    echo_case("protocol", scenarios.echo, 1024, 100),
    echo_case("protocol", scenarios.echo, 102400, 10),
    echo_case("streams", streams, 1024, 100),
    echo_case("sock_recv", sockets, 1024, 100),
    echo_case("TLS", tls, 1024, 10),
]

if not hasattr(asyncio, "timeout"):  # CPython 3.10
    CASES = [case for case in CASES if case.run is not timeout]
