"""The blocks of code in README.md, docs/ and examples/, and who uses their servers.

Each block of code is a program, which the tests run as a reader would.  What stands
before it in comments decides how:

    <!-- used by: name -->       while it runs, the function of this name uses it
    <!-- needs: name, name -->   it is skipped without these modules (or `CPython 3.12`)
    <!-- goes on -->             it is run with the blocks before it, since the last one
                                 that did not go on
    <!-- sooner: a -> b -->      b in place of a, since the tests don't have all day
    <!-- not run: why -->        it is not

A block of `output` after it is what it prints.  Wherever a program says 8888, it gets
a port that is free.
"""

import contextlib
import os
import random
import re
import resource
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from building import ROOT
from clients import ChatClient, assert_all_hear_each_other, read_all, reset
from fakes import turn
from kernel import pair
from processes import Thread

import ioloop

FENCE = re.compile(
    r"^(?P<notes>(?:<!-- .*? -->\n+)*)```(?P<language>\S*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
NOTE = re.compile(r"<!-- (used by|needs|goes on|sooner|not run)(?:: (.*?))? -->", re.S)


class Block:
    def __init__(self, path, line, match):
        self.path, self.line = path, line
        self.language, self.code = match["language"], match["code"]
        self.notes = dict(NOTE.findall(match["notes"]))
        self.output = None
        if "sooner" in self.notes:
            long, short = self.notes["sooner"].split(" -> ")
            assert long in self.code, self
            self.code = self.code.replace(long, short)

    def __repr__(self):
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks_of(path):
    text = path.read_text(encoding="utf-8")
    blocks, before = [], ""
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        block = Block(path, line, match)
        if block.language.startswith("{"):
            continue  # for Sphinx
        if block.language == "output":
            blocks[-1].output = block.code
            continue
        if "goes on" in block.notes:
            block.code = f"{before}\n{block.code}"
        before = block.code if block.language == "python" else before
        blocks.append(block)
    return blocks


def documents():
    docs = (ROOT / "docs").rglob("*.md") if (ROOT / "docs").exists() else ()
    return [ROOT / "README.md", *sorted(docs), *sorted(ROOT.glob("examples/**/*.md"))]


BLOCKS = [block for path in documents() if path.exists() for block in blocks_of(path)]


# -- Users ---------------------------------------------------------------------


class Running:
    """A program of the documentation that runs, in a directory of its own."""

    def __init__(self, process, port, directory):
        self.process, self.port, self.directory = process, port, directory

    def connect(self, address=None):
        """Connect, once the program listens."""
        address = address or ("127.0.0.1", self.port)
        return self.when_ready(lambda: connected(address))

    def when_ready(self, function):
        """What a function returns that raises OSError until the program is ready."""
        end = time.monotonic() + 20
        while True:
            try:
                return function()
            except OSError:
                assert self.process.poll() is None, self.process.stderr.read()
                assert time.monotonic() < end, "it is never ready"
                time.sleep(0.01)

    def read_line(self):
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return line

    def interrupt(self, number):
        self.process.send_signal(number)


def connected(address):
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    sock = socket.socket(family)
    sock.settimeout(10)
    try:
        sock.connect(str(address) if isinstance(address, Path) else address)
    except OSError:
        sock.close()
        raise
    return sock


def echo_server(program):
    """Echoes what two clients send, even one that reads late, and outlives a reset."""
    with program.connect() as one, program.connect() as two:
        for sock, data in (one, b"1"), (two, bytes(30_000)), (one, b"once more"):
            sock.sendall(data)
            assert sock.recv(len(data), socket.MSG_WAITALL) == data
        one.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""
        two.sendall(b"2")
        assert two.recv(1) == b"2"


# -- docs/c.md: users get the module that was compiled -------------------------


def c_counter(counter):
    with pair() as (a, b), ioloop.IOLoop() as loop:
        counted = counter.Counter(loop, a.fileno())
        b.sendall(b"12345")
        turn(loop)
        assert (counted.total, counted.done) == (5, False)
        b.sendall(b"6")
        b.shutdown(socket.SHUT_WR)
        turn(loop, 2)
        assert (counted.total, counted.done) == (6, True)


def c_idle(idle):
    with ioloop.IOLoop() as loop:
        timers = [idle.Idle(loop, 0.001, loop.stop), idle.Idle(loop, 1000, loop.stop)]
        timers[0].touch()
        loop.start()
        for timer in timers:
            timer.close()
        assert loop.next_timeout() is None


def c_worker(worker):
    totals = []
    with ioloop.IOLoop() as loop:

        def done(total):
            totals.append(total)
            loop.stop()

        job = worker.Job(loop, 1000, done)
        with Thread(job.run):
            loop.start()
    assert totals == [499500]


# -- tutorial: each page's server keeps what the pages before it promised -------


def tutorial_naive(program):
    echo_server(program)


def tutorial_echo(program):
    with contextlib.ExitStack() as stack:
        # A slow reader keeps nobody else waiting, and gets all of its bytes.
        slow = stack.enter_context(program.connect())
        slow.setblocking(False)
        taken = 0
        while select.select([], [slow], [], 0.3)[1]:
            taken += slow.send(bytes(65536))
        slow.settimeout(10)
        for _ in range(50):
            sock = stack.enter_context(program.connect())
            sock.sendall(b"hello")
            assert sock.recv(5, socket.MSG_WAITALL) == b"hello"
        slow.shutdown(socket.SHUT_WR)
        assert read_all(slow) == bytes(taken)
        # Resets: at once, with bytes on the way, and while the server can't send.
        reset(program.connect())
        reset(program.connect(), bytes(100_000))
        sock = program.connect()
        send_until_full(sock)
        reset(sock)
        # Without a free descriptor clients wait.
        if hasattr(resource, "prlimit"):
            pid = program.process.pid
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
            sock = stack.enter_context(program.connect())
            sock.sendall(b"late")
            before = cpu_seconds(pid)
            assert not select.select([sock], [], [], 0.5)[0]
            assert cpu_seconds(pid) - before < 0.25
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            assert sock.recv(4, socket.MSG_WAITALL) == b"late"
        sock = stack.enter_context(program.connect())
        sock.sendall(b"all is well")
        assert sock.recv(11, socket.MSG_WAITALL) == b"all is well"


def tutorial_talk(program):
    with ChatClient(program, "ann") as ann, ChatClient(program) as bob:
        assert bob.enter("ann") == "* ann is not free, choose another name"
        assert bob.enter("bob") == "* hello bob, here: ann"
        assert ann.read() == "* bob came"
        # Lines in pieces, and several at once.
        for piece in (b"in p", b"ieces\nand", b" more\n\nlast\n"):
            bob.sock.sendall(piece)
        lines = [ann.read() for _ in range(3)]
        assert lines == ["bob: in pieces", "bob: and more", "bob: last"]
        ann.write("hello")
        assert bob.read() == "ann: hello"
        # One who ends its half gets what waits for it.
        with ChatClient(program) as eve:
            eve.write("eve", "I can't stay")
            eve.sock.shutdown(socket.SHUT_WR)
            assert eve.read() == "* hello eve, here: ann, bob"
            assert eve.read() == ""
        for one in (ann, bob):
            lines = [one.read() for _ in range(3)]
            assert lines == ["* eve came", "eve: I can't stay", "* eve left (bye)"]
        # One who resets, and one who never ends a line.
        ChatClient(program, "rst").reset()
        assert ann.read() == "* rst came"
        assert ann.read().startswith("* rst left (")
        with ChatClient(program, "long") as long:
            assert ann.read() == "* long came"
            with contextlib.suppress(ConnectionError):
                long.sock.sendall(bytes(100_000))
            assert ann.read() == "* long left (that line was too long)"
        # One who never reads has to leave, and until then the others do not notice.
        # (bob has gone before: he does not read here, either.)
        bob.sock.shutdown(socket.SHUT_WR)
        assert ann.read() == "* bob left (bye)"
        with ChatClient(program, "deaf"), ChatClient(program, "talker") as talker:
            assert [ann.read(), ann.read()] == ["* deaf came", "* talker came"]
            line = "x" * 4000
            for _ in range(10_000):
                talker.write(line)
                if (heard := ann.read()) != f"talker: {line}":
                    break
            assert heard.startswith("* deaf left (")


def tutorial_chat(program):
    tutorial_talk(program)
    assert_all_hear_each_other(program)


def tutorial_timeouts(program):
    """Who says nothing for so long has to leave, with a name or without one."""
    with contextlib.ExitStack() as stack:
        start = time.monotonic()
        nameless = stack.enter_context(ChatClient(program))
        quiet = stack.enter_context(ChatClient(program, "quiet"))
        talker = stack.enter_context(ChatClient(program, "talker"))
        assert quiet.read() == "* talker came"
        ChatClient(program, "rst").reset()
        assert quiet.read() == "* rst came"
        assert quiet.read().startswith("* rst left (")
        heard = []
        while "* quiet left (idle for too long)" not in heard:
            talker.write("still here")
            if select.select([talker.sock], [], [], 0.2)[0]:
                heard.append(talker.read())
            assert time.monotonic() - start < 20
        assert time.monotonic() - start >= 1
        assert nameless.read() == ""
        assert quiet.read() == "talker: still here"


def tutorial_threads(program):
    tutorial_talk(program)
    with ChatClient(program, "ann") as ann:
        # What is looked up comes later than what was asked for after it.
        ann.write("/lookup localhost", "/who", "/lookup again")
        assert ann.read() == "* here: ann"
        assert ann.read() == "* one lookup at a time"
        assert ann.read() == "* localhost is 127.0.0.1"
        for wrong in ("x" * 100, "no\0thing", "a..b"):
            ann.write(f"/lookup {wrong}")
            assert ann.read().startswith(f"* {wrong}: ")
        # One who has gone meanwhile is not told.
        bob = ChatClient(program, "bob")
        assert ann.read() == "* bob came"
        bob.write("/lookup localhost")
        bob.reset()
        assert ann.read().startswith("* bob left (")
        while not program.read_line().startswith("1 guests, busy for "):
            pass


def tutorial_shutdown(program):
    """All get what waits for them, and are not waited for longer than necessary."""
    tutorial_threads(program)
    with contextlib.ExitStack() as stack:
        ann = stack.enter_context(ChatClient(program, "ann"))
        bob = stack.enter_context(ChatClient(program, "bob"))
        stack.enter_context(ChatClient(program))
        assert ann.read() == "* bob came"
        line = "x" * 1000
        for _ in range(100):
            ann.write(line)
        for _ in range(100):
            assert bob.read() == f"ann: {line}"
        # One who reads nothing has some 2 MB on the way, and is not waited for forever.
        stack.enter_context(ChatClient(program, "deaf"))
        for guest in (ann, bob):
            assert guest.read() == "* deaf came"
        for _ in range(600):
            ann.write(f"{line}{line}{line}{line}")
            assert bob.read() == f"ann: {line}{line}{line}{line}"
        start = time.monotonic()
        program.interrupt(signal.SIGTERM)
        for guest in (ann, bob):
            assert guest.read() == "* the server is closing"
            assert guest.read() == ""
        assert program.process.wait(20) == 0
        assert time.monotonic() - start < 10
        with contextlib.suppress(ConnectionRefusedError):
            connected(("127.0.0.1", program.port)).close()
            raise AssertionError("it still listens")


def tutorial_await(program):
    tutorial_chat(program)
    while not program.read_line().endswith(" guests\n"):
        pass
    with ChatClient(program, "ann"):
        program.interrupt(signal.SIGTERM)
        assert program.process.wait(20) == 0


# -- recipes -------------------------------------------------------------------


def recipe_tcp_server(program):
    """A reset, one that never reads, a half-close with all bytes, many at once."""
    echo_server(program)
    reset(program.connect())
    with program.connect() as silent, program.connect() as sock:
        send_until_full(silent)
        data = random.randbytes(3_000_000)
        assert talk(sock, data) == data
        reset(program.connect(), b"x")
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(program.connect()) for _ in range(100)]
        for sock in socks:
            sock.sendall(b"x")
        for sock in socks:
            assert sock.recv(1) == b"x"


def send_until_full(sock):
    """Send without ever reading; the kernels and the program take only so much."""
    sock.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        for _ in range(1000):
            sock.send(bytes(65536))
        raise AssertionError("it keeps whatever it is sent")


def talk(sock, data):
    """What comes back, to the end, for data that another thread sends and ends."""

    def send():
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    received = read_all(sock)
    thread.join()
    return received


def recipe_reconnecting(program):
    """It comes back after every end, and when there is a server again."""

    def serve(*endings):
        with socket.create_server(("127.0.0.1", program.port)) as server:
            server.settimeout(20)
            for number, ending in enumerate(endings):
                sock, _ = server.accept()
                sock.sendall(b"hello %d\n" % number)
                assert program.read_line() == f"hello {number}\n"
                ending(sock)

    serve(socket.socket.close, reset, reset, socket.socket.close)
    serve(reset)


def recipe_udp(program):
    """Answers every datagram that the kernel has kept, an empty and a large one too."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.connect(("127.0.0.1", program.port))

        def first():  # until it is bound, there is ECONNREFUSED
            sock.send(b"first")
            return sock.recv(100)

        assert program.when_ready(first) == b"FIRST"
        for data in (b"", b"x" * 60_000, b"last"):
            sock.send(data)
            assert sock.recv(65535) == data.upper()
        for number in range(150):
            sock.send(b"n%d" % number)
        answers = {sock.recv(100) for _ in range(150)}
        assert answers == {b"N%d" % number for number in range(150)}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
            deaf.connect(("127.0.0.1", program.port))
            deaf.send(b"to a closed port")
        sock.send(b"still there")
        assert sock.recv(100) == b"STILL THERE"


def recipe_unix(program):
    path = program.directory / "server.sock"
    expected = b"process %d of user %d\n" % (os.getpid(), os.getuid())
    for _ in range(20):
        program.connect(path).close()
        with program.connect(path) as sock:
            assert read_all(sock) == expected
    assert path.stat().st_mode & 0o777 == 0o600
    program.interrupt(signal.SIGINT)
    program.process.wait(20)
    assert not path.exists()


def recipe_tls(program):
    """Echoes over TLS, in spite of plain text, silence and resets."""
    program.connect().close()
    context = ssl.create_default_context(cafile=program.directory / "cert.pem")

    def connect():
        return context.wrap_socket(program.connect(), server_hostname="localhost")

    with program.connect(), program.connect() as plain, connect() as never_reads:
        plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            read_all(plain)
        reset(program.connect())
        reset(program.connect(), b"\x16\x03\x01")
        send_until_full(never_reads)
        with connect() as one, connect() as two:
            for sock, size in (one, 1), (two, 16384), (one, 16385), (two, 3_000_000):
                data = random.randbytes(size)
                assert echoed_over_tls(sock, data) == data
            with contextlib.suppress(OSError):
                two.unwrap()
            assert echoed_over_tls(one, b"x") == b"x"
            reset(one)


def echoed_over_tls(sock, data):
    """In one thread, since OpenSSL's objects do not stand two."""
    sock.setblocking(False)
    unsent, received = memoryview(data), bytearray()
    while len(received) < len(data):
        select.select([sock], [sock] if unsent else [], [], 10)
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if unsent:
                unsent = unsent[sock.send(unsent) :]
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            while len(received) < len(data):
                part = sock.recv(65536)
                assert part, "the end came too early"
                received += part
    sock.settimeout(10)
    return received


def recipe_signals(program):
    assert program.read_line() == "ready\n"
    for _ in range(3):
        program.interrupt(signal.SIGHUP)
        assert program.read_line() == "reads its configuration again\n"
    program.interrupt(signal.SIGTERM)
    assert program.read_line() == "ends\n"
    program.process.wait(20)


def recipe_daemon(program):
    """The first process ends when the daemon listens, and leaves it nothing."""
    assert program.process.wait(20) == 0
    with connected(("127.0.0.1", program.port)) as sock:
        pid = int(read_all(sock).split()[1])
    pidfd = os.pidfd_open(pid)
    try:
        assert pid != program.process.pid
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert os.getsid(pid) not in (pid, os.getsid(0))
        links = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)}
        assert links == {os.devnull}
        os.kill(pid, signal.SIGTERM)
        assert select.select([pidfd], [], [], 20)[0]
    finally:
        os.close(pidfd)


def recipe_inotify(program):
    assert program.read_line() == "watching\n"
    for name in "one", "a name that is longer than sixteen bytes", "ü":
        path = program.directory / name
        path.write_text("x")
        assert program.read_line() == f"{name} is new\n"
        path.rename(program.directory / "renamed")
        assert program.read_line() == "renamed is new\n"
        (program.directory / "renamed").unlink()
        assert program.read_line() == "renamed is gone\n"
    for number in range(1000):
        (program.directory / str(number)).touch()
    for number in range(1000):
        assert program.read_line() == f"{number} is new\n"


def recipe_emfile(program):
    """Clients that it has no descriptor for wait, and it does not spin meanwhile."""
    program.connect().close()
    pid = program.process.pid
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (32, 32))
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(program.connect()) for _ in range(60)]
        for sock in socks:
            sock.sendall(b"hello")
        assert socks[0].recv(5, socket.MSG_WAITALL) == b"hello"
        busy = cpu_seconds(pid)
        assert select.select(socks[50:], [], [], 0.5)[0] == []
        assert cpu_seconds(pid) - busy < 0.1
        socks[0].close()
        for sock in socks[1:]:
            assert sock.recv(5, socket.MSG_WAITALL) == b"hello"
            sock.close()


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def recipe_proxy(program):
    """All bytes in both directions, however late, and little is kept; resets end it."""
    with program.connect() as sock:
        assert read_all(sock) == b"", "there is no server yet"
    backend = socket.socket(socket.AF_UNIX)
    with backend:
        backend.bind(str(program.directory / "backend.sock"))
        backend.listen()
        backend.settimeout(10)

        def pair():
            client = program.connect()
            server, _ = backend.accept()
            server.settimeout(10)
            return client, server

        client, server = pair()
        with client, server:
            request, response = random.randbytes(1000), random.randbytes(3_000_000)
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            assert read_all(server) == request
            answers = threading.Thread(target=send_all, args=(server, response))
            answers.start()
            assert read_all(client) == response
            answers.join()
            assert server.recv(1) == b""

        # One half ends long before the other, whose reader takes its time.
        client, server = pair()
        with client, server:
            server.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
            everything = request * 10_000
            sender = threading.Thread(target=send_all, args=(client, everything))
            sender.start()
            sender.join(0.2)
            assert read_all(server) == everything
            sender.join()

        client, server = pair()
        with client, server:  # which never reads
            send_until_full(server)
            send_until_full(client)
            reset(client)
            server.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                read_all(server)

        client, server = pair()
        with client, server:  # which resets, since it has not read
            client.sendall(b"x")
            program.when_ready(lambda: server.recv(1, socket.MSG_PEEK))
            server.close()
            with pytest.raises(ConnectionResetError):
                client.recv(1)

        client, server = pair()
        with client, server:
            server.close()
            assert client.recv(1) == b""
            client.sendall(b"x")
            with contextlib.suppress(ConnectionError):
                while client.send(b"x"):
                    select.select([client], [], [], 0.01)


def send_all(sock, data):
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def recipe_idle(program):
    """Who says something in time stays, however long; the others have to go."""
    with program.connect() as busy:
        for _ in range(2):
            with program.connect() as silent:
                while not select.select([silent], [], [], 0.05)[0]:
                    last = time.monotonic()
                    busy.sendall(b"x")
                    assert busy.recv(1) == b"x"
                assert silent.recv(1) == b""
        assert busy.recv(1) == b""
        assert time.monotonic() - last > 0.49
    reset(program.connect(), b"x")


def recipe_prefork(program):
    """Both workers serve, and both end with the first process."""
    pids = set()
    while len(pids) < 2:
        with program.connect() as sock:
            pids.add(int(read_all(sock).split()[1]))
    assert program.process.pid not in pids
    pidfds = [os.pidfd_open(pid) for pid in pids]
    program.interrupt(signal.SIGTERM)
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], 20)[0]
        os.close(pidfd)
    program.process.wait(20)


def recipe_graceful(program):
    """Who is connected is still served; nobody else is; the last one ends it."""
    with program.connect() as one, program.connect() as two:
        for sock in one, two:
            sock.sendall(b"a")
            assert sock.recv(1) == b"a"
        program.interrupt(signal.SIGTERM)
        with contextlib.suppress(ConnectionError):
            while True:
                connected(("127.0.0.1", program.port)).close()
        program.interrupt(signal.SIGTERM)
        two.sendall(b"b")
        assert two.recv(1) == b"b"
        reset(one)
    assert program.process.wait(4) == 0


def recipe_systemd(program):
    """Alone, it listens by itself; then two of it on sockets that are open before."""
    with program.connect() as sock:
        assert read_all(sock) == b"process %d\n" % program.process.pid
    path = program.directory / "activated.sock"
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    with tcp, unix:
        unix.bind(str(path))
        unix.listen()
        fds = [tcp.fileno(), unix.fileno()]
        command = [sys.executable, "-c", AS_SYSTEMD, *map(str, fds)]
        with (
            connected(tcp.getsockname()) as early,
            subprocess.Popen(
                [*command, *program.process.args],
                env={**os.environ, "PYTHONPATH": str(Path(ioloop.__file__).parent)},
                pass_fds=fds,
                stderr=subprocess.PIPE,
            ) as process,
        ):
            expected = b"process %d\n" % process.pid
            assert read_all(early) == expected
            for address in tcp.getsockname(), path:
                with connected(address) as sock:
                    assert read_all(sock) == expected
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == b""


AS_SYSTEMD = """
import fcntl, os, sys
copies = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 10) for fd in sys.argv[1:3]]
for number, copy in enumerate(copies, 3):
    os.dup2(copy, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="a:b")
os.execv(sys.argv[3], sys.argv[3:])
"""
