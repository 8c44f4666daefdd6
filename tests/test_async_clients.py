"""Libraries that were written for asyncio, on a loop's other face, with real servers.

A server is a process with its files in a temporary directory.  What runs in this
process does so on every poller, with asyncio's transports and with aiofastnet's.
"""

import asyncio
import contextlib
import importlib.metadata
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from building import ROOT
from processes import run_python, wait_until

import ioloop

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.version_info < (3, 11), reason="needs asyncio.Runner"),
]

SECONDS = 40  # for what takes a second or two unless it stalls
DATA = random.Random(11).randbytes(2_000_000)


def need(*names):
    for name in names:
        pytest.importorskip(name, reason=f"needs {name}: make libraries")


def library(name, *parts):
    """A fixture: what needs a library is skipped without it."""

    @pytest.fixture(scope="module", name=name)
    def module():
        need(name, *[f"{name}.{part}" for part in parts])
        return sys.modules[name]

    return module


aiofastnet = library("aiofastnet")
aiohttp = library("aiohttp", "web")
anyio = library("anyio")
asyncpg = library("asyncpg")
grpc = library("grpc")
httpx = library("httpx")
pytest_asyncio = library("pytest_asyncio")
redis = library("redis", "asyncio")
tornado = library("tornado")
trustme = library("trustme")
uvicorn = library("uvicorn")
websockets = library("websockets")


# -- Loops, certificates, files ------------------------------------------------


@pytest.fixture(params=["asyncio", "aiofastnet"])
def new_loop(request, make_loop):
    """A factory of asyncio's loops."""
    if request.param == "aiofastnet":
        patch = request.getfixturevalue("aiofastnet").patch_loop
        return lambda: patch(make_loop().asyncio_loop)
    return lambda: make_loop().asyncio_loop


@pytest.fixture
def run(new_loop):
    """A function that runs `main()`, and wants the loop to report no exception."""

    def run(main):
        reports = []
        with asyncio.Runner(loop_factory=new_loop) as runner:
            loop = runner.get_loop()
            loop.set_exception_handler(lambda loop, report: reports.append(report))
            runner.run(asyncio.wait_for(main(), SECONDS))
        assert reports == []

    return run


@pytest.fixture(scope="module")
def tls(trustme, tmp_path_factory):
    """The context of a server, that of a client, and the server's key in a file."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    pem = tmp_path_factory.mktemp("tls") / "server.pem"
    certificate.private_key_and_cert_chain_pem.write_to_path(pem)
    return SimpleNamespace(server=server, client=client, pem=pem)


@pytest.fixture(params=["plain", "TLS"])
def maybe_tls(request):
    """The same, or nothing."""
    if request.param == "TLS":
        return request.getfixturevalue("tls")
    return SimpleNamespace(server=None, client=None, pem=None)


@pytest.fixture
def short_path():
    """A directory whose name leaves room for that of a socket."""
    with tempfile.TemporaryDirectory(prefix="ioloop-") as directory:
        yield Path(directory)


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def address(listener, secure, scheme="http"):
    return f"{scheme}{'s' if secure else ''}://127.0.0.1:{listener.getsockname()[1]}"


# -- uvicorn, httpx and websockets ---------------------------------------------


async def echo(scope, receive, send):
    """An ASGI application: what a request or a message holds is sent back."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({**message, "type": "websocket.send"})
    else:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200})
        for piece in (body[:1000], body[1000:]):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})


@pytest.fixture
def uvicorn_serving(uvicorn, listener, maybe_tls):
    """A context manager: uvicorn in this loop, with the one or the other parser."""
    if maybe_tls.server:
        http, ws = "httptools", "websockets-sansio"
    else:
        http, ws = "h11", "wsproto"
    need(http, ws.partition("-")[0])

    @contextlib.asynccontextmanager
    async def serving():
        config = uvicorn.Config(
            echo,
            http=http,
            ws=ws,
            lifespan="off",
            log_config=None,
            ssl_certfile=maybe_tls.pem,
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await task

    return serving


def test_uvicorn_http(run, uvicorn_serving, httpx, listener, maybe_tls):
    async def main():
        url = address(listener, maybe_tls.client)
        verify = maybe_tls.client or False
        async with uvicorn_serving(), httpx.AsyncClient(verify=verify) as client:
            small = [b"%d" % number for number in range(50)]
            responses = await asyncio.gather(
                *[client.post(url, content=body) for body in small]
            )
            assert [response.content for response in responses] == small
            assert (await client.post(url, content=DATA)).content == DATA
            async with client.stream("POST", url, content=DATA) as response:
                pieces = [piece async for piece in response.aiter_bytes(1000)]
            assert b"".join(pieces) == DATA

    run(main)


def test_uvicorn_websocket(run, uvicorn_serving, websockets, listener, maybe_tls):
    async def talk(url, number):
        async with websockets.connect(url, ssl=maybe_tls.client) as socket:
            for message in (f"hello {number}", b"bytes", DATA[: 500_000 + number], ""):
                await socket.send(message)
                assert await socket.recv() == message
            await (await socket.ping())
        assert socket.close_code == 1000

    async def main():
        url = address(listener, maybe_tls.client, "ws")
        async with uvicorn_serving():
            await asyncio.gather(*[talk(url, number) for number in range(10)])

    run(main)


@pytest.mark.parametrize("workers", [1, 2])
def test_uvicorn_from_the_command_line(uvicorn, workers):
    """It serves an example, until Ctrl-C."""
    command = [sys.executable, "-m", "uvicorn", "--loop=ioloop:new_event_loop"]
    options = ["--port=0", f"--workers={workers}", f"--app-dir={ROOT / 'examples'}"]
    with subprocess.Popen(
        [*command, *options, "uvicorn_on_ioloop:app"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said = ""
            while "running on" not in said or said.count("startup comp") < workers:
                line = process.stderr.readline()
                assert line, said
                said += line
            port = int(re.search(r"running on http://127\.0\.0\.1:(\d+) ", said)[1])
            wait_until(lambda: is_open(port))
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as response:
                state = json.load(response)
            assert state["asyncio"].startswith("<EventLoop running=True ")
            process.send_signal(signal.SIGINT)
            said += process.communicate(timeout=SECONDS)[1]
        finally:
            process.kill()
    assert "Traceback" not in said
    assert said.count("Finished server process") == workers


def is_open(port):
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()
        return True


# -- aiohttp -------------------------------------------------------------------


@pytest.fixture
def aiohttp_serving(aiohttp, maybe_tls, listener):
    """A context manager: aiohttp serves in this loop; a session of its client."""

    @contextlib.asynccontextmanager
    async def serving(**handlers):
        application = aiohttp.web.Application(client_max_size=10 * len(DATA))
        for name, handler in handlers.items():
            application.router.add_route("*", f"/{name}", handler)
        runner = aiohttp.web.AppRunner(application, handler_cancellation=True)
        await runner.setup()
        site = aiohttp.web.SockSite(runner, listener, ssl_context=maybe_tls.server)
        await site.start()
        connector = aiohttp.TCPConnector(ssl=maybe_tls.client or False)
        url = address(listener, maybe_tls.client)
        async with aiohttp.ClientSession(url, connector=connector) as session:
            yield session
        await runner.cleanup()

    return serving


def test_aiohttp_requests(run, aiohttp, aiohttp_serving):
    async def handler(request):
        return aiohttp.web.Response(body=await request.read())

    async def post(session, data):
        async with session.post("/echo", data=io.BytesIO(data)) as response:
            return await response.read()

    async def main():
        async with aiohttp_serving(echo=handler) as session:
            bodies = [b"%d" % number for number in range(100)] + [DATA]
            echoes = await asyncio.gather(*[post(session, body) for body in bodies])
            assert echoes == bodies

    run(main)


def test_aiohttp_sends_a_file(run, aiohttp, aiohttp_serving, tmp_path):
    (tmp_path / "data").write_bytes(DATA)

    async def handler(request):
        return aiohttp.web.FileResponse(tmp_path / "data")

    async def main():
        async with aiohttp_serving(file=handler) as session:
            async with session.get("/file") as response:
                assert await response.read() == DATA
            async with session.get("/file", headers={"Range": "bytes=5-9"}) as response:
                assert await response.read() == DATA[5:10]

    run(main)


def test_aiohttp_websocket(run, aiohttp, aiohttp_serving):
    async def handler(request):
        socket = aiohttp.web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_bytes(message.data[::-1])
        return socket

    async def main():
        async with aiohttp_serving(ws=handler) as session:
            async with session.ws_connect("/ws") as socket:
                for size in (1, 1000, 1_000_000):
                    await socket.send_bytes(DATA[:size])
                    assert await socket.receive_bytes() == DATA[:size][::-1]
            assert socket.close_code == 1000

    run(main)


def test_aiohttp_a_client_that_gives_up(run, aiohttp, aiohttp_serving):
    """The server cancels its request, and serves the next one."""
    started, left = asyncio.Event(), asyncio.Event()

    async def hang(request):
        await asyncio.Event().wait()

    async def wait(request):
        started.set()
        try:
            await hang(request)
        finally:
            left.set()

    async def hello(request):
        return aiohttp.web.Response(text="hello")

    async def get_hello(session):
        async with session.get("/hello") as response:
            assert await response.text() == "hello"

    async def main():
        async with aiohttp_serving(hang=hang, wait=wait, hello=hello) as session:
            await get_hello(session)  # connected, there is nothing else to wait for
            with pytest.raises(asyncio.TimeoutError):
                await session.get("/hang", timeout=aiohttp.ClientTimeout(total=0.1))
            request = asyncio.create_task(session.get("/wait"))
            await started.wait()
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            await left.wait()
            await get_hello(session)

    run(main)


# -- redis ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis_server(redis):
    """{how to reach it: URL}."""
    path = shutil.which("redis-server")
    if path is None:
        pytest.skip("needs a Redis server: the Debian package redis-server")
    with tempfile.TemporaryDirectory(prefix="ioloop-") as directory:
        port, unix = free_port(), f"{directory}/socket"
        command = [path, "--bind", "127.0.0.1", "--port", f"{port}", "--save", ""]
        server = subprocess.Popen(
            [*command, "--unixsocket", unix],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: is_open(port))
            yield {"tcp": f"redis://127.0.0.1:{port}", "unix": f"unix://{unix}"}
        finally:
            server.terminate()
            server.wait(SECONDS)


@pytest.fixture(params=["tcp", "unix"])
def redis_run(request, run, redis, redis_server):
    """A function that runs `main(client)` with an empty database."""

    def run_main(main):
        async def connected():
            url = redis_server[request.param]
            async with redis.asyncio.from_url(url, decode_responses=True) as client:
                await client.flushall()
                return await main(client)

        run(connected)

    return run_main


def test_redis_pipeline(redis_run, redis):
    async def main(client):
        async with client.pipeline() as pipeline:
            for number in range(1000):
                pipeline.rpush("list", number)
            assert await pipeline.execute() == list(range(1, 1001))
        assert await client.lrange("list", 0, -1) == [str(n) for n in range(1000)]
        async with client.pipeline() as pipeline:
            await pipeline.watch("watched")
            await client.set("watched", "changed")
            pipeline.multi()
            pipeline.set("watched", "mine")
            with pytest.raises(redis.WatchError):
                await pipeline.execute()

    redis_run(main)


def test_redis_many_at_once(redis_run):
    async def main(client):
        results = await asyncio.gather(*[client.incr("count") for _ in range(90)])
        assert sorted(results) == list(range(1, 91))
        value = DATA.hex()
        await client.set("large", value)
        assert await client.get("large") == value

    redis_run(main)


def test_redis_publish_and_subscribe(redis_run):
    async def main(client):
        async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
            await pubsub.subscribe("news")
            await pubsub.psubscribe("new*")
            count = 0
            while count < 2:
                count = await client.publish("news", "first")
            for number in range(100):
                await client.publish("news", number)
            heard = []
            async for message in pubsub.listen():
                heard.append(message["data"])
                if heard[-2:] == ["99", "99"]:
                    break
            assert heard[-200:] == [str(n // 2) for n in range(200)]

    redis_run(main)


def test_redis_blocking_pop(redis_run):
    async def main(client):
        waiter = asyncio.create_task(client.blpop(["empty", "list"], timeout=SECONDS))
        await client.rpush("list", "item")
        assert list(await waiter) == ["list", "item"]
        assert await client.blpop(["list"], timeout=0.1) is None
        cancelled = asyncio.create_task(client.blpop(["list"], timeout=SECONDS))
        while not await is_popping(client):
            pass
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        while await is_popping(client):
            pass
        assert await client.rpush("list", "another") == 1
        assert await client.lpop("list") == "another"

    async def is_popping(client):
        return "blpop" in [other["cmd"] for other in await client.client_list()]

    redis_run(main)


# -- PostgreSQL ----------------------------------------------------------------


def postgres_programs():
    """The newest version's; Debian has none of them in PATH."""
    found = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    paths = sorted(found, key=lambda path: int(path.parts[-3]))
    path = paths[-1] if paths else shutil.which("initdb")
    if path is None:
        pytest.skip("needs a PostgreSQL server: the Debian package postgresql")
    return Path(path).parent


@pytest.fixture(scope="module")
def postgres(asyncpg, tls):
    """{how to reach it: arguments of asyncpg's}."""
    programs, port = postgres_programs(), free_port()
    # It refuses to run as root.
    user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}

    def call(name, *arguments):
        subprocess.run(
            [programs / name, f"--pgdata={data}", *arguments],
            check=True,
            cwd=directory,
            timeout=SECONDS,
            stdout=subprocess.DEVNULL,
            **user,
        )

    with tempfile.TemporaryDirectory(prefix="ioloop-") as directory:
        data, pem = f"{directory}/data", f"{directory}/server.pem"
        shutil.copy(tls.pem, pem)
        os.chmod(pem, 0o600)
        if user:
            for path in (directory, pem):
                shutil.chown(path, **user)
        call("initdb", "--auth=trust", "--username=ioloop", "--no-sync")
        settings = {
            "port": port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": directory,
            "fsync": "off",
            "ssl": "on",
            "ssl_cert_file": pem,
            "ssl_key_file": pem,
        }
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        call("pg_ctl", "start", "--wait", f"--log={directory}/log", "-o", options)
        try:
            common = {"user": "ioloop", "database": "postgres", "port": port}
            yield {
                "tcp": {**common, "host": "127.0.0.1", "ssl": False},
                "TLS": {**common, "host": "127.0.0.1", "ssl": tls.client},
                "unix": {**common, "host": directory},
            }
        finally:
            call("pg_ctl", "stop", "--wait", "--mode=fast")


@pytest.fixture(params=["tcp", "TLS", "unix"])
def connection_arguments(request, postgres):
    return postgres[request.param]


@pytest.fixture
def postgres_run(run, asyncpg, connection_arguments):
    """A function that runs `main(connection)`."""

    def run_main(main):
        async def connected():
            connection = await asyncpg.connect(**connection_arguments)
            try:
                await main(connection)
            finally:
                await connection.close()

        run(connected)

    return run_main


def test_asyncpg_pool(run, asyncpg, connection_arguments):
    async def main():
        async with asyncpg.create_pool(
            **connection_arguments, min_size=2, max_size=5
        ) as pool:
            query = "SELECT $1::int + 1"
            results = await asyncio.gather(
                *[pool.fetchval(query, number) for number in range(100)]
            )
            assert results == list(range(1, 101))
            assert 2 <= pool.get_size() <= 5

    run(main)


def test_asyncpg_copy_and_cursor(postgres_run):
    async def main(connection):
        await connection.execute("CREATE TEMP TABLE copied (number int, text text)")
        records = [(number, f"text {number}" * 10) for number in range(10_000)]
        result = await connection.copy_records_to_table("copied", records=records)
        assert result == "COPY 10000"
        async with connection.transaction():
            query = "SELECT * FROM copied ORDER BY number"
            found = [tuple(row) async for row in connection.cursor(query, prefetch=70)]
        assert found == records
        copy = io.BytesIO()
        await connection.copy_from_table("copied", output=copy, columns=["text"])
        lines = sorted(copy.getvalue().decode().splitlines())
        assert lines == sorted(text for _, text in records)

    postgres_run(main)


def test_asyncpg_transaction(postgres_run, asyncpg):
    async def main(connection):
        await connection.execute("CREATE TEMP TABLE numbers (number int UNIQUE)")
        with pytest.raises(asyncpg.UniqueViolationError):
            async with connection.transaction():
                insert = "INSERT INTO numbers VALUES ($1)"
                await connection.executemany(insert, [(1,), (2,), (2,)])
        assert await connection.fetch("SELECT * FROM numbers") == []

    postgres_run(main)


def test_asyncpg_cancellation(postgres_run, asyncpg):
    """The server is told, and the connection can be used again."""

    async def main(connection):
        with pytest.raises(asyncio.TimeoutError):
            await connection.execute("SELECT pg_sleep(60)", timeout=0.1)
        sleep = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
        await asyncio.sleep(0)
        sleep.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleep
        assert await connection.fetchval("SELECT 1") == 1

    postgres_run(main)


def test_asyncpg_listens(postgres_run, asyncpg, connection_arguments):
    async def main(connection):
        heard, all_heard = [], asyncio.Event()

        def on_notice(connection, pid, channel, payload):
            heard.append(payload)
            if payload == "99":
                all_heard.set()

        await connection.add_listener("news", on_notice)
        other = await asyncpg.connect(**connection_arguments)
        for number in range(100):
            await other.execute(f"NOTIFY news, '{number}'")
        await other.close()
        await all_heard.wait()
        await connection.remove_listener("news", on_notice)
        assert heard == [str(number) for number in range(100)]

    postgres_run(main)


# -- gRPC ----------------------------------------------------------------------


def test_grpc(poller, grpc):
    """Its threads stay, so in a process of its own."""
    poller.run(
        f"""
        import asyncio, grpc

        class Echo(grpc.GenericRpcHandler):
            def service(self, details):
                return getattr(self, details.method[1:])

            async def one(request, context):
                return request[::-1]

            async def one_many(request, context):
                for number in range(int(request)):
                    yield b"%d" % number

            async def many_one(requests, context):
                return b",".join([request async for request in requests])

            async def many_many(requests, context):
                async for request in requests:
                    yield request[::-1]

            async def fails(request, context):
                await context.abort(grpc.StatusCode.NOT_FOUND, "nothing")

            async def waits(request, context):
                waits.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    left.set()

            one = grpc.unary_unary_rpc_method_handler(one)
            one_many = grpc.unary_stream_rpc_method_handler(one_many)
            many_one = grpc.stream_unary_rpc_method_handler(many_one)
            many_many = grpc.stream_stream_rpc_method_handler(many_many)
            fails = grpc.unary_unary_rpc_method_handler(fails)
            waits = grpc.unary_unary_rpc_method_handler(waits)

        async def items(count=200):
            for number in range(count):
                yield b"%d" % number

        async def main():
            global waits, left
            waits, left = asyncio.Event(), asyncio.Event()
            server = grpc.aio.server()
            server.add_generic_rpc_handlers([Echo()])
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{{port}}") as channel:
                one = channel.unary_unary("/one")
                sent = [b"%d" % number for number in range(100)]
                received = await asyncio.gather(*[one(item) for item in sent])
                assert received == [item[::-1] for item in sent]
                large = bytes(range(256)) * 10_000
                assert await one(large) == large[::-1]

                call = channel.unary_stream("/one_many")(b"200")
                expected = [item async for item in items()]
                assert [item async for item in call] == expected
                call = channel.stream_unary("/many_one")(items())
                assert await call == b",".join(expected)
                call = channel.stream_stream("/many_many")(items())
                assert [item async for item in call] == [i[::-1] for i in expected]

                try:
                    await channel.unary_unary("/fails")(b"")
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.NOT_FOUND
                else:
                    raise AssertionError

                call = channel.unary_unary("/waits")(b"")
                await waits.wait()
                call.cancel()
                await left.wait()
                assert await call.code() is grpc.StatusCode.CANCELLED
                try:
                    await channel.unary_unary("/waits")(b"", timeout=0.1)
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                else:
                    raise AssertionError
            await server.stop(None)

        loop = ioloop.IOLoop(impl=impl()).asyncio_loop
        loop.run_until_complete(asyncio.wait_for(main(), {SECONDS}))
        loop.close()
        """,
        timeout=SECONDS + 10,
    )


# -- Tornado 6 -----------------------------------------------------------------


@pytest.fixture
def tornado_run(new_loop, tornado):
    """A function that runs `main()` by Tornado's own IOLoop, on a loop of ours."""
    from tornado.ioloop import IOLoop

    def run(main):
        loop = IOLoop(asyncio_loop=new_loop(), make_current=False)
        try:
            return loop.run_sync(main, timeout=SECONDS)
        finally:
            loop.close()

    return run


@pytest.fixture
def tornado_serving(tornado, maybe_tls, listener):
    """A context manager: Tornado serves in this loop; options for its clients."""
    from tornado.httpserver import HTTPServer
    from tornado.web import Application

    @contextlib.asynccontextmanager
    async def serving(*handlers):
        server = HTTPServer(Application(handlers), ssl_options=maybe_tls.server)
        listener.setblocking(False)
        server.add_sockets([listener])
        headers = {"Content-Type": "application/octet-stream"}
        yield {"headers": headers, "ssl_options": maybe_tls.client}
        server.stop()
        await server.close_all_connections()

    return serving


def test_tornado_http(tornado_run, tornado_serving, listener, maybe_tls):
    from tornado.httpclient import AsyncHTTPClient
    from tornado.web import RequestHandler

    class Echo(RequestHandler):
        async def post(self):
            self.write(self.request.body[:1000])
            await self.flush()
            await asyncio.sleep(0)
            self.write(self.request.body[1000:])

    async def main():
        url = address(listener, maybe_tls.client)
        client = AsyncHTTPClient(force_instance=True, max_clients=50)
        async with tornado_serving(("/", Echo)) as options:
            bodies = [b"%d" % number for number in range(50)] + [DATA]
            responses = await asyncio.gather(
                *[client.fetch(url, method="POST", body=b, **options) for b in bodies]
            )
            assert [response.body for response in responses] == bodies
        client.close()

    tornado_run(main)


def test_tornado_websocket(tornado_run, tornado_serving, listener, maybe_tls):
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import WebSocketHandler, websocket_connect

    class Echo(WebSocketHandler):
        async def on_message(self, message):
            await self.write_message(message, binary=isinstance(message, bytes))

    async def main():
        url = address(listener, maybe_tls.client, "ws")
        async with tornado_serving(("/", Echo)) as options:
            socket = await websocket_connect(HTTPRequest(url, **options))
            for message in ("hello", b"bytes", DATA[:1_000_000], ""):
                await socket.write_message(message, isinstance(message, bytes))
                assert await socket.read_message() == message
            socket.close()
            assert await socket.read_message() is None

    tornado_run(main)


def test_tornado_subprocess(tornado_run):
    """Which hears of its end by SIGCHLD."""
    from tornado.process import Subprocess

    async def main():
        children = [
            Subprocess(["cat"], stdin=Subprocess.STREAM, stdout=Subprocess.STREAM)
            for _ in range(3)
        ]
        for child in children:
            await child.stdin.write(b"through a pipe")
            child.stdin.close()
            assert await child.stdout.read_until_close() == b"through a pipe"
            assert await child.wait_for_exit() == 0
        status = Subprocess(["sh", "-c", "exit 3"]).wait_for_exit(raise_error=False)
        assert await status == 3
        Subprocess.uninitialize()

    tornado_run(main)


def test_tornado_timeouts_and_periodic_callbacks(tornado_run):
    from tornado.gen import TimeoutError, with_timeout
    from tornado.ioloop import IOLoop, PeriodicCallback

    async def main():
        loop, calls, done = IOLoop.current(), [], asyncio.Event()

        async def call():
            calls.append(len(calls))
            if len(calls) == 5:
                periodic.stop()
                done.set()

        periodic = PeriodicCallback(call, 5)
        periodic.start()
        await done.wait()
        assert calls == [0, 1, 2, 3, 4]
        never = loop.call_later(0.01, calls.clear)
        loop.remove_timeout(never)
        with pytest.raises(TimeoutError):
            await with_timeout(loop.time() + 0.05, asyncio.Future())
        assert await loop.run_in_executor(None, sum, calls) == 10

    tornado_run(main)


# -- anyio ---------------------------------------------------------------------


@pytest.fixture
def anyio_run(anyio, new_loop):
    """A function that runs `main()` by anyio."""

    def run(main):
        async def limited():
            with anyio.fail_after(SECONDS):
                await main()

        anyio.run(limited, backend_options={"loop_factory": new_loop})

    return run


def test_anyio_task_groups(anyio_run, anyio):
    async def main():
        send, receive = anyio.create_memory_object_stream(5)
        log = []

        async def produce(send, first, task_status):
            task_status.started(first)
            async with send:
                for number in range(first, first + 100):
                    await send.send(number)

        async with anyio.create_task_group() as tasks, receive:
            async with send:
                for first in (0, 100, 200):
                    assert await tasks.start(produce, send.clone(), first) == first
            received = [number async for number in receive]
        assert sorted(received) == list(range(300))

        async def fail():
            raise ValueError

        async def wait():
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)
                    log.append("cancelled")

        with pytest.RaisesGroup(ValueError):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(fail)
        with anyio.move_on_after(0.05) as scope:
            await wait()
        assert scope.cancelled_caught
        assert log == ["cancelled"] * 2

    anyio_run(main)


def test_anyio_threads(anyio_run, anyio, new_loop):
    async def add(*numbers):
        await anyio.sleep(0)
        return sum(numbers)

    def in_thread(number):
        return anyio.from_thread.run(add, number, anyio.from_thread.run_sync(int))

    async def main():
        results = []

        async def call(number):
            results.append(await anyio.to_thread.run_sync(in_thread, number))

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(call, number)
        assert sorted(results) == list(range(50))

    anyio_run(main)
    options = {"loop_factory": new_loop}
    with anyio.from_thread.start_blocking_portal(backend_options=options) as portal:
        assert portal.call(add, 1, 2, 3) == 6
        future = portal.start_task_soon(anyio.sleep_forever)
        future.cancel()


def test_anyio_processes(anyio_run, anyio):
    async def main():
        done = await anyio.run_process(["cat"], input=DATA)
        assert done.stdout == DATA
        async with await anyio.open_process(["cat"], stderr=None) as process:
            await process.stdin.send(b"piped")
            assert await process.stdout.receive() == b"piped"
            process.terminate()
            assert await process.wait() == -signal.SIGTERM

    anyio_run(main)


def test_anyio_a_pool_of_processes(poller, anyio):
    """Each keeps its loop for ever, so in a process of its own."""
    poller.run(
        f"""
        import anyio, os

        async def main():
            with anyio.fail_after({SECONDS}):
                pid = await anyio.to_process.run_sync(os.getpid)
                assert pid != os.getpid()
                assert await anyio.to_process.run_sync(os.getpid) == pid
                assert await anyio.to_process.run_sync(abs, -10**100) == 10**100

        if __name__ == "__main__":
            factory = lambda: ioloop.IOLoop(impl=impl()).asyncio_loop
            anyio.run(main, backend_options={{"loop_factory": factory}})
        """,
        timeout=SECONDS + 10,
    )


def test_anyio_signals(anyio_run, anyio):
    async def main():
        with anyio.open_signal_receiver(signal.SIGUSR1, signal.SIGUSR2) as signals:
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):
                os.kill(os.getpid(), number)
                assert await anext(signals) == number

    anyio_run(main)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_anyio_sockets(anyio_run, anyio, maybe_tls, short_path, kind, expect_log):
    from anyio.streams.tls import TLSListener, TLSStream

    async def echo(stream):
        async with stream:
            async for data in stream:
                await stream.send(data)

    async def talk(stream):
        async with stream, anyio.create_task_group() as tasks:
            tasks.start_soon(stream.send, DATA)
            received = b""
            while len(received) < len(DATA):
                received += await stream.receive()
        assert received == DATA

    async def main():
        if kind == "tcp":
            listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            stream = await anyio.connect_tcp("127.0.0.1", port)
        else:
            listener = await anyio.create_unix_listener(short_path / "socket")
            stream = await anyio.connect_unix(short_path / "socket")
        if maybe_tls.server:
            listener = TLSListener(listener, maybe_tls.server)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, echo)
            if maybe_tls.client:
                stream = await TLSStream.wrap(
                    stream, hostname="localhost", ssl_context=maybe_tls.client
                )
            await talk(stream)
            tasks.cancel_scope.cancel()

    anyio_run(main)
    if kind == "unix":  # anyio closes it in a way that does this, on any event loop
        while expect_log:
            expect_log.take(r"callback Future\.set_result", asyncio.InvalidStateError)


# -- aiofastnet ----------------------------------------------------------------


def test_aiofastnet_as_a_factory(aiofastnet, maybe_tls):
    """Its transports come by name, TLS can start late, and streams work."""

    async def serve(reader, writer):
        assert type(writer.transport).__module__.startswith("aiofastnet")
        writer.write(await reader.readline())
        if maybe_tls.server:
            await writer.start_tls(maybe_tls.server)
        while data := await reader.read(100_000):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            address = server.sockets[0].getsockname()
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"plain\n")
            assert await reader.readline() == b"plain\n"
            if maybe_tls.client:
                await writer.start_tls(maybe_tls.client, server_hostname="localhost")
            writer.write(DATA)
            assert await reader.readexactly(len(DATA)) == DATA
            writer.close()
            await writer.wait_closed()

    factory = aiofastnet.loop_factory(ioloop.new_event_loop)
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(main(), SECONDS))
    finally:
        asyncio.set_event_loop(None)


# -- Their own suites ----------------------------------------------------------

# Whoever asks asyncio for a new loop gets one of ours.
PLUG = """
import asyncio
import ioloop

made = 0

def new_event_loop():
    global made
    made += 1
    return ioloop.new_event_loop()

asyncio.new_event_loop = asyncio.events.new_event_loop = new_event_loop
"""


def number_of(what, output):
    return int(re.search(rf"(\d+) {what}", output)[1])


def assert_as_good_as_stock(ours, stock):
    """Each is a function that runs these tests, or all, and returns those that fail."""
    failed = ours()
    if failed:
        failed -= stock(*failed)
    # Some wait for a fixed time, which is too short on a busy machine.  The price: what
    # fails only now and then gets by.
    for _ in range(3):
        if failed:
            failed &= ours(*failed)
    assert not failed


def run_tornado(prelude, *names):
    """(the names of those that failed, what it printed)."""
    code = """
        from tornado.test.runtests import all, main
        main()
    """
    arguments = ["--quiet", *names]
    done = run_python(code, *arguments, prelude=prelude, timeout=280, check=False)
    failed = set(re.findall(r"^(?:ERROR|FAIL): .*\((\S+)\)$", done.stderr, re.M))
    assert bool(failed) == bool(done.returncode), done.stderr
    return failed, done.stdout + done.stderr


def test_tornado_suite(tornado):
    summary = """
import atexit
atexit.register(lambda: print(made, "loops"))
"""

    def ours(*names):
        failed, output = run_tornado(PLUG + summary, *names)
        assert names or number_of("loops", output) > 1000
        return failed

    assert_as_good_as_stock(ours, lambda *names: run_tornado("", *names)[0])


def run_pytest(directory, *options):
    """What pytest prints, with no plugins but those that are named."""
    path = [Path(ioloop.__file__).parent, directory]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--quiet", "--tb=no", "-rfE", *options],
        cwd=directory,
        env={
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": os.pathsep.join(map(str, path)),
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def failures(output):
    return set(re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M))


@pytest.fixture(scope="module")
def anyio_suite(anyio, tmp_path_factory):
    """The directory of anyio's sources."""
    need("psutil", "pytest_mock", "pytest_timeout", "trustme")
    directory = tmp_path_factory.mktemp("anyio")
    name = f"anyio-{importlib.metadata.version('anyio')}"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        + ["--no-binary=anyio", f"--dest={directory}", name.replace("-", "==")],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"anyio's sources can't be had: {done.stderr}")
    shutil.unpack_archive(directory / f"{name}.tar.gz", directory, filter="data")
    summary = """
def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{made} loops")
"""
    (directory / name / "plug.py").write_text(PLUG + summary)
    return directory / name


SOCKETS = "tests/test_sockets.py"


@pytest.mark.parametrize("part", [SOCKETS, f"--ignore={SOCKETS}"])
def test_anyio_suite(anyio_suite, part):
    # IPv6 is not everywhere, and uvloop is another loop.
    options = ["-m not network", "-k not (uvloop or ipv6 or dualstack)"]

    def ours(*names):
        output = run_pytest(anyio_suite, "-p", "plug", *options, *(names or [part]))
        assert names or number_of("passed", output) > 200 < number_of("loops", output)
        return failures(output)

    def stock(*names):
        return failures(run_pytest(anyio_suite, *options, *names))

    assert_as_good_as_stock(ours, stock)


def test_pytest_asyncio(pytest_asyncio, tmp_path):
    """Each test gets a loop of ours, whatever its scope."""
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
    )
    (tmp_path / "conftest.py").write_text(
        """
import ioloop

def pytest_asyncio_loop_factories(config, item):
    return {"ioloop": ioloop.new_event_loop}
"""
    )
    (tmp_path / "test_it.py").write_text(
        """
import asyncio
import ioloop
import pytest
import pytest_asyncio

def is_ours(loop):
    return isinstance(loop.ioloop, ioloop.IOLoop)

@pytest.fixture
async def server():
    async def serve(reader, writer):
        writer.write(await reader.readline())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server

@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def module_loop():
    yield asyncio.get_running_loop()

async def test_streams(server):
    assert is_ours(asyncio.get_running_loop())
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello\\n")
    assert await reader.read() == b"hello\\n"
    writer.close()
    await writer.wait_closed()

@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("number", range(3))
async def test_same_loop(module_loop, number):
    assert is_ours(module_loop)
    assert asyncio.get_running_loop() is module_loop

async def test_another_loop(module_loop):
    assert is_ours(asyncio.get_running_loop())
    assert asyncio.get_running_loop() is not module_loop

class TestClass:
    async def test_tasks(self):
        async with asyncio.TaskGroup() as tasks:
            found = [tasks.create_task(asyncio.sleep(0, n)) for n in range(10)]
        assert [task.result() for task in found] == list(range(10))

async def test_that_fails():
    await asyncio.sleep(0)
    raise ValueError
"""
    )
    output = run_pytest(tmp_path, "-p", "pytest_asyncio.plugin", "-Werror")
    assert failures(output) == {"test_it.py::test_that_fails"}, output
    assert number_of("passed", output) == 6
