"""Clients that were written for other loops: pika with a RabbitMQ server, pyzmq.

Their adapters are in examples/.  The server is started here, as this user, on free
ports of 127.0.0.1 with its files in a temporary directory.
"""

import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from fakes import Exit, fail
from processes import Thread, end_of, program

EXAMPLES = Path(__file__).parent.parent / "examples"
START_SECONDS = 180


def load(name):
    """A program of examples/, as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(name, *arguments):
    """What a program of examples/ prints."""
    with program(EXAMPLES / name, *arguments) as process:
        return end_of(process, timeout=50)


def run(loop):
    """Until it is stopped, which does not take long unless it stalls."""
    stalled = loop.call_later(40, fail, Exit("stalled"))
    loop.start()
    stalled.cancel()


# -- ZeroMQ --------------------------------------------------------------------


@pytest.fixture(scope="module")
def zmq():
    return pytest.importorskip("zmq", reason="needs pyzmq")


@pytest.fixture(scope="module")
def zmq_adapter(zmq):
    return load("zmq_adapter")


@pytest.fixture
def context(zmq):
    """Its sockets keep nobody waiting at the end."""
    with zmq.Context() as context:
        context.linger = 0
        yield context


@pytest.fixture(params=["inproc", "tcp"])
def transport(request):
    return request.param


@pytest.mark.slow
def test_zmq_100000_messages_each_way(loop, context, zmq_adapter, transport):
    """Through queues that hold a thousand: each side waits for the other."""
    count, left, streams = 100_000, [1, 2], []

    def on_last():
        left.pop()
        if not left:
            loop.stop()

    for _ in range(2):
        push, pull = zmq_adapter.connected(context, transport)
        counter = zmq_adapter.Counter(count, on_last)
        sender = zmq_adapter.Stream(loop, push)
        streams += [sender, zmq_adapter.Stream(loop, pull, counter)]
        for number in range(count):
            sender.send(b"%d" % number)
    run(loop)
    for stream in streams:
        stream.close()
    assert [streams[i].on_message.received for i in (1, 3)] == [count, count]


def test_zmq_between_two_threads(make_loop, context, zmq_adapter, transport):
    """A loop in each, both of which send and receive."""
    count = 5_000
    ways = [zmq_adapter.connected(context, transport) for _ in range(2)]
    loops = [make_loop(), make_loop()]

    def talk(loop, push, pull):
        def stop_when_sent():
            if sender.unsent:
                loop.call_later(0.001, stop_when_sent)
            else:
                loop.stop()

        counter = zmq_adapter.Counter(count, stop_when_sent)
        sender = zmq_adapter.Stream(loop, push)
        receiver = zmq_adapter.Stream(loop, pull, counter)
        for number in range(count):
            sender.send(b"%d" % number)
        run(loop)
        receiver.close()
        return counter.received, sender

    threads = [
        Thread(talk, loops[0], ways[0][0], ways[1][1]),
        Thread(talk, loops[1], ways[1][0], ways[0][1]),
    ]
    # Only when both are through: what was sent is with the other side then.
    results = [thread.join() for thread in threads]
    for received, sender in results:
        assert received == count
        sender.close()


@pytest.mark.parametrize("seed", range(3))
def test_zmq_bursts_and_pauses(loop, context, zmq_adapter, transport, seed):
    """At moments when the descriptor has no news: it never waits for another one."""
    rng = random.Random(seed)
    push, pull = zmq_adapter.connected(context, transport)
    push.sndhwm = pull.rcvhwm = 1
    received, sent = [], []

    def receive(parts):
        received.append(parts)
        if len(received) == len(sent):
            loop.stop()

    sender = zmq_adapter.Stream(loop, push)
    receiver = zmq_adapter.Stream(loop, pull, receive)
    for _ in range(60):
        for _ in range(rng.choice([1, 1, 2, 7, 150])):
            sent.append([b"%d" % len(sent), b"part"])
            sender.send(*sent[-1])
        way = rng.randrange(3)
        if way == 0:
            run(loop)
        elif way == 1:
            loop.run_once(0)
        else:
            time.sleep(0.001)
    while len(received) < len(sent):
        run(loop)
    assert received == sent
    sender.close()
    receiver.close()


def test_zmq_a_receiver_that_raises(loop, context, zmq_adapter, transport, expect_log):
    """The messages behind the one that it failed with are not left behind."""
    push, pull = zmq_adapter.connected(context, transport)
    received = []

    def receive(parts):
        received.append(parts)
        if len(received) == 30:
            loop.stop()
        if len(received) % 3 == 0:
            raise ValueError(parts)

    sender = zmq_adapter.Stream(loop, push)
    receiver = zmq_adapter.Stream(loop, pull, receive)
    for number in range(30):
        sender.send(b"%d" % number)
    run(loop)
    for _ in range(10):
        expect_log.take("Exception in callback", ValueError)
    receiver.close()
    receiver.close()
    sender.close()


def test_zmq_closed_by_a_message(loop, context, zmq_adapter, transport):
    push, pull = zmq_adapter.connected(context, transport)
    received = []

    def receive(parts):
        received.append(parts)
        receiver.close()
        loop.call_later(0.01, loop.stop)

    sender = zmq_adapter.Stream(loop, push)
    receiver = zmq_adapter.Stream(loop, pull, receive)
    for _ in range(10):
        sender.send(b"x")
    run(loop)
    assert received == [[b"x"]]
    sender.close()


def test_zmq_example(zmq, transport):
    output = run_example(
        "zmq_adapter.py", "--messages=2000", f"--transport={transport}"
    )
    assert output.startswith("4000 messages in ")


# -- RabbitMQ ------------------------------------------------------------------


@pytest.fixture(scope="module")
def pika():
    return pytest.importorskip("pika", reason="needs pika")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def server_program():
    # The one in PATH insists on the user of the system's service.
    path = shutil.which("rabbitmq-server", path="/usr/lib/rabbitmq/bin")
    path = path or shutil.which("rabbitmq-server")
    if path is None or shutil.which("epmd") is None:
        pytest.skip("needs a RabbitMQ server: the Debian package rabbitmq-server")
    return path


def environment(directory, port):
    """Of a node that has nothing in common with others on this machine."""
    (directory / "inetrc").write_text(
        "{lookup, [file]}.\n{host, {127,0,0,1}, ['localhost']}.\n"
    )
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),  # the cookie
        "LANG": "C.UTF-8",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(free_port()),
        "ERL_INETRC": str(directory / "inetrc"),
        "RABBITMQ_CONF_ENV_FILE": str(directory / "none"),
        "RABBITMQ_CONFIG_FILE": str(directory / "none"),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_LOG_BASE": str(directory),
        "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
        "RABBITMQ_NODENAME": f"ioloop-{os.getpid()}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
            "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1"
        ),
    }


def processes_of(directory):
    """Those that have the directory as their home, and are no zombies."""
    home, found = f"HOME={directory}\0".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if home in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def wait_for_server(server, port, log):
    end = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        if server.poll() is not None or time.monotonic() > end:
            pytest.fail(f"the RabbitMQ server does not start:\n{log.read_text()}")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def rabbitmq(pika, tmp_path_factory):
    """The port of a server of our own, of which nothing is left at the end."""
    program = server_program()
    directory = tmp_path_factory.mktemp("rabbitmq")
    port = free_port()
    env = environment(directory, port)
    log = directory / "log"
    # Otherwise the server would start it, as a daemon that stays.
    names = subprocess.Popen(["epmd"], env=env, start_new_session=True)
    try:
        with log.open("wb") as output:
            server = subprocess.Popen(
                [program],
                env=env,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            wait_for_server(server, port, log)
            yield port
        finally:
            stop(server)
    finally:
        names.terminate()
        names.wait()
    end = time.monotonic() + 30
    while left := processes_of(directory):
        assert time.monotonic() < end, f"processes left: {left}"
        time.sleep(0.05)


def stop(server):
    """With all that it has started."""
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture
def parameters(pika, rabbitmq):
    """A function: the parameters of a connection to the server."""

    def make(**options):
        return pika.ConnectionParameters("127.0.0.1", rabbitmq, **options)

    return make


@pytest.mark.slow
def test_pika_publishes_and_consumes(loop, pika, parameters):
    trip = load("pika_adapter").RoundTrip(loop, parameters(), 3000)
    run(loop)
    assert trip.received == list(range(3000))
    assert isinstance(trip.reason, pika.exceptions.ConnectionClosedByClient)
    assert trip.connection.is_closed
    assert loop.stats()["handlers"] == loop.stats()["pending_timeouts"] == 0


@pytest.mark.slow
def test_pika_two_connections_and_large_messages(loop, pika, parameters):
    """Megabytes wait in pika until the socket has room."""
    body, received, closed = os.urandom(1 << 20), [], []

    def on_message(channel, method, properties, data):
        received.append(data == body)
        channel.basic_ack(method.delivery_tag)
        if len(received) == 20:
            for connection in connections:
                connection.close()

    def on_queue(frame):
        consumer.basic_consume("large", on_message)
        connections[1].channel(on_open_callback=publish)

    def publish(channel):
        for _ in range(20):
            channel.basic_publish("", "large", body)

    def on_channel(channel):
        nonlocal consumer
        consumer = channel
        channel.queue_declare("large", auto_delete=True, callback=on_queue)

    def on_open(connection):
        opened.append(connection)
        if len(opened) == 2:
            connections[0].channel(on_open_callback=on_channel)

    def on_close(connection, reason):
        closed.append(reason)
        if len(closed) == 2:
            loop.stop()

    consumer, opened = None, []
    connections = [
        pika.SelectConnection(
            parameters(), on_open, on_close, on_close, custom_ioloop=loop
        )
        for _ in range(2)
    ]
    run(loop)
    assert received == [True] * 20
    assert {type(reason) for reason in closed} == {
        pika.exceptions.ConnectionClosedByClient
    }


@pytest.mark.slow
def test_pika_heartbeats_keep_an_idle_connection(loop, pika, parameters):
    """For longer than the server or pika would wait without one."""
    closed = []

    def on_close(connection, reason):
        closed.append(reason)
        loop.stop()

    def on_open(connection):
        loop.call_later(4, connection.close)

    pika.SelectConnection(
        parameters(heartbeat=1), on_open, on_close, on_close, custom_ioloop=loop
    )
    run(loop)
    assert [type(reason) for reason in closed] == [
        pika.exceptions.ConnectionClosedByClient
    ]


@pytest.mark.slow
def test_pika_a_server_that_does_not_answer(loop, pika):
    """Neither one that refuses, nor one that accepts and says nothing."""
    closed = []

    def on_error(connection, reason):
        closed.append(reason)
        loop.stop()

    def connect(port):
        parameters = pika.ConnectionParameters(
            "127.0.0.1", port, socket_timeout=0.3, stack_timeout=0.3
        )
        pika.SelectConnection(
            parameters, on_open_error_callback=on_error, custom_ioloop=loop
        )
        run(loop)
        assert isinstance(closed.pop(), pika.exceptions.AMQPConnectionError)
        assert loop.stats()["handlers"] == 0

    connect(free_port())
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect(server.getsockname()[1])


@pytest.mark.slow
def test_pika_example(rabbitmq):
    url = f"--url=amqp://guest:guest@127.0.0.1:{rabbitmq}/"
    output = run_example("pika_adapter.py", url, "--messages=1000")
    assert output.startswith("1000 messages there and back in ")
