"""Each program of examples/, run for real."""

import contextlib
import itertools
import pathlib
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture
def many_fds():
    """A limit that leaves room for 1,000 clients and their badly behaved friends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 1200:
        pytest.skip(f"the limit of open files is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def running(name, *arguments):
    """The example, as a process whose output is text; it has ended afterwards."""
    with subprocess.Popen(
        [sys.executable, EXAMPLES / name, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@contextlib.contextmanager
def serving(name, *arguments, ending=signal.SIGTERM):
    """The address of a server that ends without a word when it gets a signal."""
    with running(name, "--port", "0", *arguments) as process:
        yield address_of(process)
        assert process.poll() is None
        process.send_signal(ending)
        output, errors = process.communicate(timeout=10)
        assert (process.returncode, output, errors) == (0, "", "")


def address_of(process):
    line = process.stdout.readline()
    assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+\n", line), process.stderr.read()
    return "127.0.0.1", int(line.rpartition(":")[2])


def connect(address):
    return socket.create_connection(address, timeout=10)


def read_all(sock):
    return b"".join(iter(lambda: sock.recv(65536), b""))


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Lines:
    """A client of the chat, which knows lines."""

    def __init__(self, address, name=None):
        self.sock = connect(address)
        self.file = self.sock.makefile("rb")
        assert self.read() == "* your name?"
        if name:
            self.write(name)
            assert self.read().startswith(f"* hello {name}, here: ")

    def read(self):
        return self.file.readline().decode().rstrip("\n")

    def write(self, line):
        self.sock.sendall(line.encode() + b"\n")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.sock.close()


# -- The echo server


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_echo(ending):
    with serving("echo_server.py", ending=ending) as address:
        with connect(address) as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b"hello"


def test_echo_ends_while_clients_are_connected():
    with contextlib.ExitStack() as stack:
        with serving("echo_server.py") as address:
            socks = [stack.enter_context(connect(address)) for _ in range(3)]
            socks[0].sendall(b"x")
            assert socks[0].recv(1) == b"x"
        assert socks[0].recv(1) == b""


def test_echo_1000_clients_lose_not_one_byte():
    with running("echo_demo.py", "--connections=1000", "--messages=50") as process:
        output, errors = process.communicate(timeout=50)
    assert (process.returncode, errors) == (0, "")
    assert "sent     b'hello, ioloop\\n'\nreceived b'hello, ioloop\\n'\n" in output
    total = f"{1000 * 65536:,}"
    assert f"1,000 connections at once: {total} bytes sent, {total} received" in output


def test_echo_half_close():
    """Who ends its half still gets all it has sent, and then the server's end."""
    data = random.randbytes(3_000_000)
    with serving("echo_server.py") as address, connect(address) as sock:

        def send():
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        assert read_all(sock) == data
        sender.join()


def test_echo_does_not_read_for_a_client_that_never_reads():
    """The server's memory is bounded: the client's send() blocks in the end."""
    with serving("echo_server.py") as address, connect(address) as sock:
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


def test_echo_bad_clients_harm_no_other(many_fds):
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(serving("echo_server.py"))
        for _ in range(20):
            reset(connect(address))
        for _ in range(20):
            resets_later = connect(address)
            resets_later.sendall(bytes(65536))
            reset(resets_later)
        for _ in range(20):
            never_reads = stack.enter_context(connect(address))
            never_reads.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    never_reads.send(bytes(65536))
        for _ in range(20):
            half_closes = stack.enter_context(connect(address))
            half_closes.shutdown(socket.SHUT_WR)
        for _ in range(20):
            vanishes = connect(address)
            vanishes.sendall(bytes(65536))
            vanishes.close()

        good = [stack.enter_context(connect(address)) for _ in range(1000)]
        for number, sock in enumerate(good):
            sock.sendall(b"%04d" % number * 256)
        for number, sock in enumerate(good):
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == b"%04d" % number * 256


def test_echo_out_of_descriptors():
    """Clients that can't be served yet wait; the server does not spin meanwhile."""
    limit = "import resource as r, runpy, sys; r.setrlimit(r.RLIMIT_NOFILE, (32, 32)); "
    run = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", limit + f"sys.path.insert(0, {str(EXAMPLES)!r}); "]
    command[-1] += run
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                [*command, EXAMPLES / "echo_server.py", "--port=0"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(process.kill)
        address = address_of(process)
        socks = [connect(address) for _ in range(60)]
        busy = cpu_seconds(process.pid)
        time.sleep(0.5)
        assert cpu_seconds(process.pid) - busy < 0.1
        for sock in socks:
            with sock:
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"


def cpu_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


# -- The ancestor's first program


def test_seed():
    with serving("seed.py", ending=signal.SIGINT) as address:
        for _ in range(100):
            with connect(address) as sock:
                assert read_all(sock) == b"hello, 127.0.0.1\n"


def test_seed_accepts_all_that_wait():
    with serving("seed.py", ending=signal.SIGINT) as address:
        with contextlib.ExitStack() as stack:
            for sock in [stack.enter_context(connect(address)) for _ in range(100)]:
                assert read_all(sock) == b"hello, 127.0.0.1\n"


# -- The chat


def test_chat():
    with serving("chat_server.py") as address:
        with Lines(address, "ann") as ann:
            with Lines(address, "bob") as bob:
                assert ann.read() == "* bob came"
                bob.write("hello")
                assert ann.read() == "bob: hello"
                ann.write("hello bob\r\n\nand good bye")
                assert bob.read() == "ann: hello bob"
                assert bob.read() == "ann: and good bye"
            assert ann.read() == "* bob left (bye)"


def test_chat_names_are_unique():
    with serving("chat_server.py") as address:
        with Lines(address, "ann"), Lines(address) as other:
            other.write("ann")
            assert other.read() == "* ann is not free, choose another name"
            other.write("")
            assert other.read() == "* that is not free, choose another name"
            other.write("eve")
            assert other.read() == "* hello eve, here: ann"


def test_chat_lines_in_pieces():
    with serving("chat_server.py") as address:
        with Lines(address, "ann") as ann, Lines(address, "bob") as bob:
            assert ann.read() == "* bob came"
            for piece in (b"in ", b"p", b"ieces\nand tw", b"o\n"):
                bob.sock.sendall(piece)
                time.sleep(0.01)
            assert ann.read() == "bob: in pieces"
            assert ann.read() == "bob: and two"


def test_chat_idle_guests_leave():
    with serving("chat_server.py", "--idle=0.4") as address:
        with Lines(address, "ann") as ann, Lines(address, "bob"):
            assert ann.read() == "* bob came"
            start = time.monotonic()
            for _ in range(6):
                time.sleep(0.1)
                ann.write("still here")
            assert ann.read() == "* bob left (idle for too long)"
            assert ann.read() == ""
            assert time.monotonic() - start >= 1.0


def test_chat_bad_guests_harm_no_other():
    with serving("chat_server.py") as address, Lines(address, "ann") as ann:
        with Lines(address, "silent") as silent, Lines(address, "long") as long:
            assert ann.read() == "* silent came"
            assert ann.read() == "* long came"
            with contextlib.suppress(ConnectionError):
                long.sock.sendall(bytes(100_000))
            assert ann.read() == "* long left (that line was too long)"

            # The one who reads nothing is told so much that it has to leave.
            with Lines(address, "talks") as talks:
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
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(serving("chat_server.py"))
        guests = []
        for number in range(50):
            guests.append(stack.enter_context(Lines(address, f"guest {number}")))
            for guest in guests[:-1]:
                assert guest.read() == f"* guest {number} came"
        for number, guest in enumerate(guests):
            guest.write(str(number))
            for other in guests[:number] + guests[number + 1 :]:
                assert other.read() == f"guest {number}: {number}"


# -- The supervisor


def supervised(*arguments):
    with running("supervisor.py", *arguments) as process:
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    return output


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
        text = ""
        while text.count("| run\n") < 2:
            text += process.stdout.readline()
        assert "0 sh | * exited with 3\n" in text
        process.send_signal(signal.SIGTERM)
        text, errors = process.communicate(timeout=10)
        assert (process.returncode, errors) == (0, "")
        assert "1 sleep | * killed by SIGTERM\n" in text


def test_supervisor_restarts_what_failed():
    with running("supervisor.py", "--restart=failed", "false", "true") as process:
        text = ""
        while text.count("0 false | * started") < 2:
            text += process.stdout.readline()
        process.send_signal(signal.SIGINT)
        text += process.communicate(timeout=10)[0]
        assert process.returncode == 0
        assert text.count("1 true | * started") == 1


def test_supervisor_kills_what_does_not_end():
    stubborn = "sh -c 'trap \"\" TERM; echo ready; while :; do sleep 0.1; done'"
    with running("supervisor.py", "--grace=0.3", stubborn, "sleep 100") as process:
        text = ""
        while "ready" not in text:
            text += process.stdout.readline()
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        text, errors = process.communicate(timeout=10)
        assert time.monotonic() - start >= 0.3
        assert (process.returncode, errors) == (0, "")
        assert "1 sleep | * killed by SIGTERM\n" in text
        assert "0 sh | * killed by SIGKILL\n" in text


def test_supervisor_command_not_found():
    output = supervised("--restart=never", "/nonexistent/command", "echo here")
    assert "0 command | * can't be started: No such file or directory\n" in output
    assert "1 echo | here\n" in output
