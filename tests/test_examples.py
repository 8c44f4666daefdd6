"""Each program of examples/, run for real."""

import contextlib
import functools
import http.server
import itertools
import json
import os
import random
import re
import resource
import select
import signal
import socket
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from building import ROOT, c_echo
from clients import ChatClient, assert_all_hear_each_other, read_all, reset
from kernel import limit
from processes import Thread, end_of, is_asleep, program, wait_until


def running(name, *arguments):
    """An example, as a process; the one in Cython is built first."""
    directory = c_echo() if name == "c_echo.py" else ROOT / "examples"
    return program(directory / name, *arguments)


@contextlib.contextmanager
def serving(name, *arguments, ending=signal.SIGTERM):
    """A server with its `address`, which ends without a word when it gets a signal."""
    with running(name, "--port", "0", *arguments) as process:
        line = process.stdout.readline()
        found = re.fullmatch(r"listening on 127\.0\.0\.1:(\d+)\n", line)
        assert found, line + process.stderr.read()
        process.address = "127.0.0.1", int(found[1])
        process.connect = functools.partial(connect, process)
        yield process
        assert process.poll() is None
        process.send_signal(ending)
        assert end_of(process) == ""


def read_until(process, text, count=1):
    """What it prints, until a text has come so many times."""
    printed = ""
    while printed.count(text) < count:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        printed += line
    return printed


def connect(server):
    return socket.create_connection(server.address, timeout=10)


def send_until_full(sock):
    """All that the server and the kernel take, for one who never reads."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(65536))


def assert_echoes(sock, data=b"x"):
    with Thread(sock.sendall, data):
        received = b""
        while len(received) < len(data):
            chunk = sock.recv(65536)
            assert chunk, "the server has closed the connection"
            received += chunk
    assert received == data


# -- The echo servers, in Python and in Cython


@pytest.fixture(params=["echo_server.py", "c_echo.py"])
def echo(request):
    return request.param


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_echo(echo, ending):
    with serving(echo, ending=ending) as server, connect(server) as sock:
        for size in (1, 1000, 65536, 65537, 1_000_000):
            assert_echoes(sock, random.randbytes(size))


def test_echo_ends_while_clients_are_connected(echo):
    with contextlib.ExitStack() as stack:
        with serving(echo) as server:
            socks = [stack.enter_context(connect(server)) for _ in range(3)]
            assert_echoes(socks[0])
        assert socks[0].recv(1) == b""


def test_echo_1000_clients_lose_not_one_byte():
    with running("echo_demo.py", "--connections=1000", "--messages=50") as process:
        output = end_of(process, timeout=50)
    assert "sent     b'hello, ioloop\\n'\nreceived b'hello, ioloop\\n'\n" in output
    total = f"{1000 * 65536:,}"
    assert f"1,000 connections at once: {total} bytes sent, {total} received" in output


def test_echo_half_close(echo):
    """Who ends its half still gets all it has sent, however late and little at once."""
    data = random.randbytes(3_000_000)
    with serving(echo) as server, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect(server.address)

        def send():
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        with Thread(send) as sender:
            # It has sent everything, or nobody takes any more.
            wait_until(lambda: not sender.is_alive() or is_asleep(sender))
            assert read_all(sock) == data


def test_echo_does_not_read_for_a_client_that_never_reads(echo):
    """The server's memory is bounded: the client's send() blocks in the end."""
    with serving(echo) as server, connect(server) as sock:
        # Beyond this, the bytes could only be in the server's memory.
        in_kernels = 32 << 20
        sock.settimeout(0.3)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < in_kernels:
                sent += sock.send(bytes(65536))
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(10)
        assert len(read_all(sock)) == sent


def test_echo_bad_clients_harm_no_other(echo):
    """Resets, silence, unread data: the good ones get theirs, and nothing is kept."""
    with limit(resource.RLIMIT_NOFILE, 1200), serving(echo) as server:
        files = len(os.listdir(f"/proc/{server.pid}/fd"))
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                reset(connect(server))
                with connect(server) as vanishes:
                    vanishes.sendall(bytes(65536))
                resets_later = connect(server)
                resets_later.sendall(bytes(65536))
                reset(resets_later)
                half_closes = stack.enter_context(connect(server))
                half_closes.shutdown(socket.SHUT_WR)
                send_until_full(stack.enter_context(connect(server)))
                stack.enter_context(connect(server))  # says nothing

            memory = status(server, "VmRSS")
            good = [stack.enter_context(connect(server)) for _ in range(1000)]
            for number, sock in enumerate(good):
                sock.sendall(b"%04d" % number * 256)
            for number, sock in enumerate(good):
                sock.shutdown(socket.SHUT_WR)
                assert read_all(sock) == b"%04d" % number * 256
            if echo == "c_echo.py":
                assert status(server, "VmRSS") - memory < 4096
        wait_until(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) == files)


def test_echo_out_of_descriptors(echo):
    """Clients that can't be served yet wait; the server does not spin meanwhile."""
    with serving(echo) as server:
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (32, 32))
        socks = [connect(server) for _ in range(60)]
        busy = cpu_seconds(server)
        time.sleep(0.5)
        assert cpu_seconds(server) - busy < 0.1
        for sock in socks:
            with sock:
                assert_echoes(sock)


def test_echo_idle_clients_are_closed():
    with serving("c_echo.py", "--idle=1") as server, contextlib.ExitStack() as stack:
        never_reads = stack.enter_context(connect(server))
        send_until_full(never_reads)
        busy, silent = (stack.enter_context(connect(server)) for _ in range(2))
        # It came first: it would be the first to be closed.
        while not is_readable(silent, 0.05):
            assert_echoes(busy)
        assert silent.recv(1) == b""
        assert_echoes(busy)
        never_reads.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            read_all(never_reads)


def is_readable(sock, seconds):
    return bool(select.select([sock], [], [], seconds)[0])


def status(process, key):
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(rf"^{key}:\s+(\d+)", text, re.M)[1])


def cpu_seconds(process):
    text = Path(f"/proc/{process.pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- The ancestor's first program


def test_seed():
    with serving("seed.py", ending=signal.SIGINT) as server:
        for _ in range(100):
            with connect(server) as sock:
                assert read_all(sock) == b"hello, 127.0.0.1\n"


def test_seed_accepts_all_that_wait():
    with serving("seed.py", ending=signal.SIGINT) as server:
        with contextlib.ExitStack() as stack:
            for sock in [stack.enter_context(connect(server)) for _ in range(100)]:
                assert read_all(sock) == b"hello, 127.0.0.1\n"


# -- The chat


def test_chat():
    with serving("chat_server.py") as server:
        with ChatClient(server, "ann") as ann:
            with ChatClient(server, "bob") as bob:
                assert ann.read() == "* bob came"
                bob.write("hello")
                assert ann.read() == "bob: hello"
                ann.write("hello bob\r\n\nand good bye")
                assert bob.read() == "ann: hello bob"
                assert bob.read() == "ann: and good bye"
            assert ann.read() == "* bob left (bye)"


def test_chat_names_are_unique():
    with serving("chat_server.py") as server:
        with ChatClient(server, "ann"), ChatClient(server) as other:
            other.write("ann")
            assert other.read() == "* ann is not free, choose another name"
            other.write("")
            assert other.read() == "* that is not free, choose another name"
            other.write("eve")
            assert other.read() == "* hello eve, here: ann"


def test_chat_lines_in_pieces():
    with serving("chat_server.py") as server:
        with ChatClient(server, "ann") as ann, ChatClient(server, "bob") as bob:
            assert ann.read() == "* bob came"
            for piece in (b"in ", b"p", b"ieces\nand tw", b"o\n"):
                bob.sock.sendall(piece)
                # In the same turn of the server or an earlier one, it gets the piece.
                for _ in range(2):
                    ann.write("and?")
                    assert bob.read() == "ann: and?"
            assert ann.read() == "bob: in pieces"
            assert ann.read() == "bob: and two"


def test_chat_idle_guests_leave():
    with serving("chat_server.py", "--idle=0.4") as server:
        with ChatClient(server, "ann") as ann, ChatClient(server, "bob"):
            assert ann.read() == "* bob came"
            # She came first: she would be the first to leave.
            while not is_readable(ann.sock, 0.05):
                last = time.monotonic()
                ann.write("still here")
            assert ann.read() == "* bob left (idle for too long)"
            assert ann.read() == ""
            assert time.monotonic() - last >= 0.4


def test_chat_bad_guests_harm_no_other():
    with serving("chat_server.py") as server, ChatClient(server, "ann") as ann:
        with ChatClient(server, "silent") as silent, ChatClient(server, "long") as long:
            assert ann.read() == "* silent came"
            assert ann.read() == "* long came"
            with contextlib.suppress(ConnectionError):
                long.sock.sendall(bytes(100_000))
            assert ann.read() == "* long left (that line was too long)"

            # The one who reads nothing is told so much that it has to leave.
            with ChatClient(server, "talks") as talks:
                assert ann.read() == "* talks came"
                line = "x" * 4000
                for count in itertools.count():
                    talks.write(line)
                    heard = ann.read()
                    if heard != f"talks: {line}":
                        break
                    assert count < 10_000
                assert heard == "* silent left (did not read)"
                assert ann.read() == f"talks: {line}"
                assert silent.sock.fileno() >= 0
                reset(talks.sock)
                talks.file.close()
            assert re.match(r"\* talks left \(", ann.read())


def test_chat_many_guests():
    with serving("chat_server.py") as server:
        assert_all_hear_each_other(server)


# -- The supervisor


def supervised(*arguments):
    with running("supervisor.py", *arguments) as process:
        return end_of(process, timeout=20)


def test_supervisor_shows_every_line():
    commands = [f"sh -c 'seq {n}00 {n}99; printf %s-end {n} >&2'" for n in range(1, 31)]
    output = supervised("--restart=never", *commands)
    for number in range(1, 31):
        shown = re.findall(rf"^{number - 1} sh \| ([^*].*)$", output, re.M)
        assert shown == [
            *map(str, range(number * 100, number * 100 + 100)),
            f"{number}-end",
        ]
    assert output.count("| * started") == output.count("| * exited with 0") == 30


def test_supervisor_restarts():
    with running("supervisor.py", "sh -c 'echo run; exit 3'", "sleep 100") as process:
        assert "0 sh | * exited with 3\n" in read_until(process, "| run\n", 2)
        process.send_signal(signal.SIGTERM)
        assert "1 sleep | * killed by SIGTERM\n" in end_of(process)


def test_supervisor_restarts_what_failed():
    with running("supervisor.py", "--restart=failed", "false", "true") as process:
        text = read_until(process, "0 false | * started", 2)
        process.send_signal(signal.SIGINT)
        text += end_of(process)
        assert text.count("1 true | * started") == 1


def test_supervisor_kills_what_does_not_end():
    stubborn = "sh -c 'trap \"\" TERM; echo ready; while :; do sleep 0.1; done'"
    with running("supervisor.py", "--grace=0.3", stubborn, "sleep 100") as process:
        read_until(process, "ready")
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        text = end_of(process)
        assert time.monotonic() - start >= 0.3
        assert "1 sleep | * killed by SIGTERM\n" in text
        assert "0 sh | * killed by SIGKILL\n" in text


def test_supervisor_command_not_found():
    output = supervised("--restart=never", "/nonexistent/command", "echo here")
    assert "0 command | * can't be started: No such file or directory\n" in output
    assert "1 echo | here\n" in output


# -- Three steps to asyncio


@contextlib.contextmanager
def three_steps(*arguments):
    """The servers, each with its `address`; they end without a word."""
    with running("step_by_step.py", "--port", "0", *arguments) as process:
        steps = []
        for number in (1, 2, 3):
            line = process.stdout.readline()
            found = re.fullmatch(rf"step {number}: 127\.0\.0\.1:(\d+)\n", line)
            assert found, line + process.stderr.read()
            steps.append(SimpleNamespace(address=("127.0.0.1", int(found[1]))))
        yield steps
        process.send_signal(signal.SIGTERM)
        assert end_of(process) == ""


def test_steps_do_the_same():
    with contextlib.ExitStack() as stack, three_steps() as steps:
        for step in steps:
            reset(connect(step))
            with connect(step) as sock:
                sock.sendall(b"whole\npart")
                sock.shutdown(socket.SHUT_WR)
                assert read_all(sock) == b"WHOLE\n"
            # This one is still connected when they end.
            sock = stack.enter_context(connect(step))
            file = stack.enter_context(sock.makefile("rb"))
            for piece in (b"in ", b"p", b"ieces\nand ", b"one\n\ntwo\n"):
                sock.sendall(piece)
            lines = [file.readline() for _ in range(4)]
            assert lines == [b"IN PIECES\n", b"AND ONE\n", b"\n", b"TWO\n"]


def test_steps_idle_clients_leave():
    with three_steps("--idle=1") as steps, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(step)) for step in steps]
        for sock in socks:
            sock.sendall(b"one\n")
        assert [read_all(sock) for sock in socks] == [b"ONE\n"] * 3


# -- Programs that use libraries of asyncio's


def fetch(server):
    with urllib.request.urlopen("http://{}:{}/".format(*server.address)) as response:
        return json.load(response)


@pytest.mark.slow
def test_uvicorn():
    pytest.importorskip("uvicorn", reason="needs uvicorn: make libraries")
    with serving("uvicorn_on_ioloop.py", ending=signal.SIGINT) as server:
        states = [fetch(server) for _ in range(3)]
    for state in states:
        assert state["asyncio"].startswith("<EventLoop running=True ")
        assert state["ioloop"].startswith("<IOLoop running ")
    assert states[0]["polls"] < states[1]["polls"] < states[2]["polls"]


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200, "hello")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def web_server():
    """Its URL."""
    with http.server.HTTPServer(("127.0.0.1", 0), Hello) as server:
        with Thread(server.serve_forever):
            try:
                yield f"http://127.0.0.1:{server.server_port}/"
            finally:
                server.shutdown()


@pytest.mark.slow
def test_tornado4_aiohttp():
    pytest.importorskip("aiohttp", reason="needs aiohttp: make libraries")

    def report():
        with connect(monitor) as sock:
            return read_all(sock).decode()

    with contextlib.ExitStack() as stack:
        with web_server() as url:
            options = "--every=0.05", url
            monitor = stack.enter_context(serving("tornado4_aiohttp.py", *options))
            assert report() == f"{url} 200 hello\n"
        wait_until(lambda: report() == f"{url} ClientConnectorError\n")
