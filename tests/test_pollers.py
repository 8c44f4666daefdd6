"""What every poller does alike, and where it can't.

Each test runs on epoll, select and (the fake) kqueue.
"""

import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import io
import os
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import threading

import pytest
from building import compile_library
from fakes import (
    ERROR,
    FOREVER,
    NONE,
    READ,
    WRITE,
    Exit,
    Recorder,
    fail,
    idle,
    run_until,
    turn,
)
from kernel import (
    can_deny,
    close,
    drain,
    free_number,
    limit,
    nomemory,
    nothing_free,
    pair,
    pairs,
    pipe,
    readable,
    tcp_pair,
)
from processes import Thread, child, in_thread, run_python, sleeping, when_asleep

import ioloop

FD_SETSIZE = 1024

only_epoll = pytest.mark.parametrize("poller", ["epoll"], indirect=True)
only_select = pytest.mark.parametrize("poller", ["select"], indirect=True)
not_select = pytest.mark.parametrize("poller", ["epoll", "kqueue"], indirect=True)


@pytest.fixture(scope="session")
def seccomp():
    if not can_deny():
        pytest.skip("needs seccomp and known system call numbers")


@pytest.fixture
def sockets():
    """A connected pair."""
    with pair() as made:
        yield made


@pytest.fixture
def sock(sockets):
    return sockets[0]


@pytest.fixture
def peer(sockets):
    return sockets[1]


@pytest.fixture
def calls():
    """A handler that records its calls."""
    return Recorder()


# -- Readiness ----------------------------------------------------------------


def test_read_is_level_triggered(loop, sock, peer, calls):
    loop.add_handler(sock, calls, READ)
    turn(loop)
    assert calls.take() == []
    peer.send(b"x")
    turn(loop, 3)
    assert calls.take() == [(sock, READ)] * 3
    sock.recv(9)
    turn(loop)
    assert calls == []


def test_write_is_level_triggered(loop, sock, peer, calls):
    loop.add_handler(sock, calls, WRITE)
    turn(loop, 3)
    assert calls.take() == [(sock, WRITE)] * 3
    with pytest.raises(BlockingIOError):
        while True:
            sock.send(bytes(65536))
    turn(loop)
    assert calls.take() == []
    while select.select([peer], [], [], 0)[0]:
        peer.recv(1 << 20)
    turn(loop)
    assert calls == [(sock, WRITE)]


@pytest.mark.parametrize("asked", [READ, WRITE, READ | WRITE])
def test_one_call_with_all_that_was_asked_and_no_more(loop, asked, sock, peer, calls):
    loop.add_handler(sock, calls, asked)
    peer.send(b"x")
    turn(loop)
    assert calls == [(sock, asked)]


@pytest.mark.parametrize("before", [NONE, READ, WRITE, READ | WRITE])
@pytest.mark.parametrize("after", [NONE, READ, WRITE, READ | WRITE])
def test_update_replaces_the_mask(loop, before, after, sock, peer, calls):
    peer.send(b"x")
    loop.add_handler(sock, calls, before)
    turn(loop)
    calls.clear()
    loop.update_handler(sock, after)
    turn(loop)
    assert calls == ([(sock, after)] if after else [])


def test_a_sleeping_loop_wakes_for_a_descriptor(loop, sock, peer, calls):
    loop.add_handler(sock, lambda *call: (calls(*call), loop.stop()), READ)
    loop.add_callback(peer.send, b"x")
    loop.start()
    assert calls == [(sock, READ)]


def test_listening_socket_is_readable(loop, calls):
    with socket.create_server(("127.0.0.1", 0)) as server:
        loop.add_handler(server, calls, READ)
        turn(loop)
        assert calls == []
        with socket.create_connection(server.getsockname()):
            run_until(loop, lambda: calls)
        assert calls == [(server, READ)]


def test_an_idle_loop_does_not_poll_again(loop, sock):
    loop.add_handler(sock, Recorder(), READ)
    idle(loop)


@pytest.mark.parametrize("after", [READ, NONE, None])
def test_no_interest_is_left_behind(loop, after, sock, calls):
    """What is not asked for any more does not wake the loop either."""
    loop.add_handler(sock, calls, READ | WRITE)
    turn(loop)
    assert calls.take() == [(sock, WRITE)]
    if after is None:
        loop.remove_handler(sock)
    else:
        loop.update_handler(sock, after)
    idle(loop)
    assert calls == []


def test_many_descriptors_at_once(loop, calls):
    with pairs(100) as made:
        for a, b in made:
            loop.add_handler(a, calls, READ | WRITE)
            b.send(b"x")
        turn(loop, 5)
        assert {a for a, _ in calls} == {a for a, _ in made}
        assert {events for _, events in calls} == {READ | WRITE}


# -- Closed peers -------------------------------------------------------------


@pytest.mark.row("A19")
@pytest.mark.parametrize("pairs_of", [pair, tcp_pair], ids=["unix", "tcp"])
def test_half_close_loses_no_data(loop, pairs_of):
    """The end of the stream shows as READ and b"", never as an ERROR before it."""
    payload = os.urandom(1 << 20)
    with pairs_of() as (a, b):
        left, got, masks = memoryview(payload), bytearray(), set()

        def write(fd, events):
            nonlocal left
            left = left[b.send(left) :]
            if not left:
                b.shutdown(socket.SHUT_WR)
                loop.remove_handler(b)

        def read(fd, events):
            masks.add(events)
            if data := a.recv(65536):
                got.extend(data)
            else:
                loop.remove_handler(a)

        loop.add_handler(a, read, READ)
        loop.add_handler(b, write, WRITE)
        run_until(loop, lambda: not loop.stats()["handlers"])
        assert got == payload
        assert masks == {READ}


@pytest.mark.row("A20")
@pytest.mark.parametrize("pairs_of", [pair, tcp_pair, pipe])
def test_closed_peer_reads_as_read_while_data_is_left(loop, pairs_of):
    with pairs_of() as (a, b):
        reader = os.dup(a if isinstance(a, int) else a.fileno())
        writer = os.dup(b if isinstance(b, int) else b.fileno())
        close(b) if isinstance(b, int) else b.close()
        os.write(writer, b"last words")
        os.close(writer)
        calls, got = [], []

        def handler(fd, events):
            calls.append(events)
            got.append(os.read(fd, 4))
            if not got[-1]:
                loop.remove_handler(fd)

        loop.add_handler(reader, handler, READ)
        try:
            run_until(loop, lambda: not loop.stats()["handlers"])
        finally:
            os.close(reader)
        assert b"".join(got) == b"last words"
        # A pipe's end alone is a HUP to epoll; while data is left it is READ too.
        assert [events & READ for events in calls[:3]] == [READ] * 3
        assert calls[3] & (READ | ERROR)


def fill(writer):
    """Write to the end of a pipe until it takes no more."""
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(65536))


def hang_up(peer, reset=False):
    if reset:
        linger = struct.pack("ii", 1, 0)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    if isinstance(peer, int):
        os.close(peer)
    else:
        peer.close()


@pytest.mark.row("A18")
@pytest.mark.parametrize("kind", ["closed", "reset"])
def test_hangup_reaches_a_reader(loop, poller, calls, kind):
    """As an ERROR, which it has not asked for, on epoll alone."""
    with pair() if kind == "closed" else tcp_pair() as (a, b):
        loop.add_handler(a, calls, READ)
        hang_up(b, kind == "reset")
        run_until(loop, lambda: calls)
        assert calls[0][1] & READ
        assert (calls[0][1] & ERROR != 0) == (poller.name == "epoll")
        if kind == "reset":
            with pytest.raises(ConnectionResetError):
                a.recv(9)


@pytest.mark.row("A18")
@pytest.mark.parametrize("added", ["before", "before, and full", "after"])
def test_closed_reader_reaches_the_write_end_of_a_pipe(loop, poller, calls, added):
    with pipe() as (reader, writer):
        if added == "after":
            os.close(reader)
        elif added == "before, and full":
            fill(writer)
        loop.add_handler(writer, calls, WRITE)
        if added != "after":
            turn(loop)
            assert bool(calls.take()) == (added == "before")
            os.close(reader)
        turn(loop)
        [(_, events)] = calls
        assert events & (WRITE if poller.name == "select" else ERROR)


def test_refused_connection_is_an_error(loop, poller, calls):
    with socket.socket() as taken, socket.socket() as client:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        client.setblocking(False)
        assert client.connect_ex(taken.getsockname()) in (
            errno.EINPROGRESS,
            errno.ECONNREFUSED,
        )
        loop.add_handler(client, calls, WRITE)
        run_until(loop, lambda: calls)
        assert calls[0][1] & (WRITE if poller.name == "select" else ERROR)
        refused = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        assert refused == errno.ECONNREFUSED


@contextlib.contextmanager
def hung_up(loop, kind, order, calls):
    """An fd with a handler, and no events asked before or after its peer goes."""
    kinds = {"reader": pipe, "writer": pipe, "socket": pair, "reset": tcp_pair}
    with kinds[kind]() as (a, b):
        fd, peer = (b, a) if kind == "writer" else (a, b)
        if order == "added first":
            loop.add_handler(fd, calls, NONE)
        elif order == "masked first":
            loop.add_handler(fd, calls, READ | WRITE)
            loop.update_handler(fd, NONE)
        hang_up(peer, kind == "reset")
        if order == "added last":
            loop.add_handler(fd, calls, NONE)
        yield fd


@pytest.mark.row("A17")
@pytest.mark.parametrize("order", ["added first", "masked first", "added last"])
@pytest.mark.parametrize("kind", ["reader", "writer", "socket", "reset"])
def test_no_kind_of_hangup_is_heard_with_no_events_asked(loop, calls, kind, order):
    """Nor does it spin, and it is heard when there are some again."""
    with hung_up(loop, kind, order, calls) as fd:
        idle(loop)
        loop.update_handler(fd, NONE)
        idle(loop, 0.01)
        assert calls == []
        assert loop.stats()["handlers"] == 1
        asked = WRITE if kind == "writer" else READ
        loop.update_handler(fd, asked)
        turn(loop)
        [(_, events)] = calls
        assert events & (READ if kind in ("socket", "reset") else asked | ERROR)


@pytest.mark.row("A17")
def test_a_hangup_with_no_events_asked_does_not_spin_in_a_child(loop, calls):
    with hung_up(loop, "reader", "added first", calls):
        idle(loop)
        with child() as inside:
            if inside:
                loop.reinit()
                idle(loop)
                assert calls == []


def test_no_events_asked_and_then_some(loop, sock, peer, calls):
    """What the poller keeps for an fd with no events never outlives them."""
    peer.send(b"x")
    loop.add_handler(sock, calls, NONE)
    for events in (READ, NONE, WRITE, NONE, READ | WRITE, NONE, READ):
        loop.update_handler(sock, events)
        with pytest.raises(FileExistsError):
            loop.add_handler(sock, fail, READ)
        turn(loop, 2)
        assert calls.take() == ([(sock, events)] * 2 if events else [])


def test_a_masked_handler_can_be_removed_and_added_again(loop, sock, peer, calls):
    loop.add_handler(sock, calls, NONE)
    loop.remove_handler(sock)
    loop.add_handler(sock, calls, READ)
    peer.send(b"x")
    turn(loop)
    assert calls == [(sock, READ)]


# -- Numbers that change hands ------------------------------------------------


@pytest.mark.row("A4", "A21")
@pytest.mark.parametrize("before", [READ, READ | WRITE])
@pytest.mark.parametrize("after", [READ, WRITE, READ | WRITE])
def test_update_after_the_kernel_dropped_a_closed_fd(loop, calls, before, after):
    with pairs(2) as [(a, _), (b, b_peer)]:
        number = a.fileno()
        loop.add_handler(number, calls, before)
        os.dup2(b.fileno(), number)
        loop.update_handler(number, after)
        turn(loop)
        assert calls.take() == ([(number, WRITE)] if after & WRITE else [])
        b_peer.send(b"x")
        turn(loop)
        assert calls == [(number, after)]


@pytest.mark.parametrize("poller", ["select"], indirect=True)
def test_a_closed_select_has_forgotten_its_files(poller):
    """It has no file of its own that would be closed."""
    with readable() as (a, _):
        impl = poller.impl()
        impl.register(a, READ)
        assert impl.poll(0) == [(a.fileno(), READ)]
        impl.close()
        assert impl.poll(0) == []


@pytest.mark.row("A4")
def test_an_updated_registration_is_a_registration(loop, sock, peer, calls):
    """What update_handler() moved to the new file is not replaced by add."""
    with pair() as (other, _):
        number = other.fileno()
        loop.add_handler(number, calls, READ)
        os.dup2(sock.fileno(), number)
        loop.update_handler(number, READ)
        with pytest.raises(FileExistsError):
            loop.add_handler(number, fail, READ)
        peer.send(b"x")
        turn(loop)
        assert calls == [(number, READ)]


@pytest.mark.row("A4")
def test_a_new_connection_on_an_old_number(loop):
    """The accept loop's everyday case, with a forgotten remove_handler()."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        numbers = set()
        for _ in range(3):
            with socket.create_connection(server.getsockname()) as client:
                connection, _ = server.accept()
                numbers.add(connection.fileno())
                calls = Recorder()
                loop.add_handler(connection, calls, READ)
                client.sendall(b"x")
                run_until(loop, lambda calls=calls: calls)
                assert calls[0][0] is connection
                connection.close()
        assert len(numbers) == 1


@pytest.mark.row("A5")
def test_add_when_the_kernel_still_knows_the_number(loop, sock, peer):
    """Removed while closed, so the kernel kept it; then the number came back."""
    old, new = Recorder(), Recorder()
    number, keep = os.dup(sock.fileno()), os.dup(sock.fileno())
    try:
        loop.add_handler(number, old, READ | WRITE)
        os.close(number)
        loop.remove_handler(number)
        os.dup2(keep, number)
        loop.add_handler(number, new, READ)
        peer.send(b"x")
        turn(loop)
    finally:
        close(number, keep)
    assert (old, new) == ([], [(number, READ)])


@pytest.fixture
def leftover_logged(poller, expect_log):
    """A function: only epoll has leftovers, and the loop says that it got rid of
    them."""

    def take():
        if poller.name == "epoll":
            expect_log.take("closed before remove_handler")

    return take


# Sockets, and files that have one device and inode: fstat() does not tell them apart.

libc = ctypes.CDLL(None, use_errno=True)


def checked(result):
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


class Eventfds:
    def __init__(self, stack, directory):
        pass

    def open(self):
        return os.eventfd(0, os.EFD_NONBLOCK)

    def wake(self, fd):
        os.eventfd_write(fd, 1)


class Sockets(Eventfds):
    """UDP, each connected to itself."""

    def open(self):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        sock.setblocking(False)
        return sock.detach()

    def wake(self, fd):
        os.write(fd, b"x")


class Timerfds(Eventfds):
    def open(self):
        return checked(libc.timerfd_create(1, os.O_NONBLOCK | os.O_CLOEXEC))

    def wake(self, fd):
        checked(libc.timerfd_settime(fd, 0, (ctypes.c_long * 4)(0, 0, 0, 1), None))


class Signalfds:
    number = signal.SIGUSR2

    def __init__(self, stack, directory):
        self.mask = (ctypes.c_ulong * 16)(1 << self.number - 1)
        old = signal.pthread_sigmask(signal.SIG_BLOCK, [self.number])
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, old)
        stack.callback(signal.sigtimedwait, [self.number], 0)

    def open(self):
        return checked(libc.signalfd(-1, self.mask, os.O_NONBLOCK | os.O_CLOEXEC))

    def wake(self, fd):
        signal.pthread_kill(threading.get_ident(), self.number)


class Inotifys:
    def __init__(self, stack, directory):
        self.directory = directory

    def open(self):
        return checked(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def wake(self, fd):
        create = 0x100
        checked(libc.inotify_add_watch(fd, bytes(self.directory), create))
        self.directory.joinpath(str(len(os.listdir(self.directory)))).touch()


class Pidfds:
    def __init__(self, stack, directory):
        process = stack.enter_context(subprocess.Popen(["sleep", "60"]))
        self.pid = process.pid
        stack.callback(process.kill)

    def open(self):
        if not hasattr(os, "pidfd_open"):
            pytest.skip("this CPython has no pidfd_open()")
        return os.pidfd_open(self.pid)

    def wake(self, fd):
        os.kill(self.pid, signal.SIGKILL)


class Epolls:
    def __init__(self, stack, directory):
        self.source = os.eventfd(1, os.EFD_CLOEXEC)
        stack.callback(os.close, self.source)

    def open(self):
        with select.epoll() as poll:
            return os.dup(poll.fileno())

    def wake(self, fd):
        with select.epoll.fromfd(os.dup(fd)) as poll:
            poll.register(self.source, select.EPOLLIN)


class Fifos:
    def __init__(self, stack, directory):
        self.path = directory / "fifo"
        os.mkfifo(self.path)

    def open(self):
        return os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def wake(self, fd):
        os.write(fd, b"x")


class Ttys:
    def __init__(self, stack, directory):
        self.master, slave = os.openpty()
        self.path = os.ttyname(slave)
        stack.callback(close, self.master, slave)

    def open(self):
        return os.open(self.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)

    def wake(self, fd):
        os.write(self.master, b"x\n")


KINDS = [Eventfds, Sockets, Timerfds, Signalfds, Inotifys, Pidfds, Epolls, Fifos, Ttys]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__.lower()[:-1])
def twins(request, tmp_path):
    """Files of a kind: `open()` makes one, `wake(fd)` has it readable."""
    with contextlib.ExitStack() as stack:
        yield request.param(stack, tmp_path)


def replace(number, fd):
    """Close what has a number and put an open file there."""
    os.dup2(fd, number, inheritable=False)
    os.close(fd)


@pytest.mark.row("A4")
def test_a_number_used_again_by_a_file_that_looks_the_same(loop, twins):
    """Forgotten, closed, and opened anew: only the new handler is called."""
    for mask in (NONE, READ, WRITE):
        old, new = Recorder(), Recorder()
        number = twins.open()
        try:
            loop.add_handler(number, old, mask)
            replace(number, twins.open())
            loop.add_handler(number, new, READ)
            assert loop.stats()["handlers"] == 1
            twins.wake(number)
            run_until(loop, lambda: new)  # noqa: B023
            assert (old, new) == ([], [(number, READ)])
            with pytest.raises(FileExistsError):
                loop.add_handler(number, old, READ)
            loop.remove_handler(number)
        finally:
            os.close(number)


@pytest.mark.row("A4")
def test_a_number_used_again_behind_the_loops_back(loop, poller, twins, calls):
    """The old handler hears of an ERROR at most, and nothing spins."""
    for mask in (NONE, READ, WRITE):
        number = twins.open()
        try:
            loop.add_handler(number, calls, mask)
            replace(number, twins.open())
            twins.wake(number)
            select.select([number], [], [])
            idle(loop, 0.01)
            if poller.name == "select" and mask == READ:
                assert calls == [(number, ERROR)]
            assert calls.take() in ([], [(number, ERROR)])
            loop.update_handler(number, READ)  # which is for the new file
            turn(loop)
            assert calls.take() == [(number, READ)]
            loop.remove_handler(number)
        finally:
            os.close(number)


@pytest.mark.row("A1", "A2")
@pytest.mark.parametrize("removed", [True, False], ids=["removed", "forgotten"])
def test_stale_event_after_reuse(loop, twins, removed):
    """In one batch: the first handler closes the other fd, its number is reused."""
    numbers, called, fresh = {twins.open(), twins.open()}, [], Recorder()

    def handler(fd, events):
        called.append(fd)
        [victim] = numbers - {fd}
        if removed:
            loop.remove_handler(victim)
        loop.remove_handler(fd)
        replace(victim, os.eventfd(0))
        loop.add_handler(victim, fresh, READ)

    try:
        for fd in numbers:
            loop.add_handler(fd, handler, READ)
            twins.wake(fd)
        for fd in numbers:
            select.select([fd], [], [])
        turn(loop, 3)
        assert len(called) == 1
        assert fresh == []
        [victim] = numbers - set(called)
        os.eventfd_write(victim, 1)
        turn(loop)
        assert fresh == [(victim, READ)]
    finally:
        close(*numbers)


@pytest.mark.parametrize("mask", [NONE, READ])
@pytest.mark.parametrize("poller", ["epoll", "select"], indirect=True)
def test_the_same_open_file_on_its_number_has_a_handler_already(loop, twins, mask):
    """Put there again, but the same: the registration holds."""
    first, second = Recorder(), Recorder()
    number = twins.open()
    keep = os.dup(number)
    try:
        loop.add_handler(number, first, mask)
        os.dup2(keep, number)
        with pytest.raises(FileExistsError):
            loop.add_handler(number, second, READ)
        loop.update_handler(number, READ)
        twins.wake(number)
        run_until(loop, lambda: first)
        assert (first, second) == ([(number, READ)], [])
    finally:
        close(number, keep)


@contextlib.contextmanager
def leftover(loop, *steps, handler=fail):
    """A number that is ready and closed; a duplicate of its file is not.

    `steps` are what is done with its registration, os.close() among them.
    """
    with pair() as (a, b):
        number, keep = os.dup(a.fileno()), os.dup(a.fileno())
        try:
            loop.add_handler(number, handler, READ)
            for step in steps or (os.close, loop.remove_handler):
                step(number)
            b.send(b"x")
            yield number
        finally:
            close(keep)


def rebuild(loop, leftover_logged):
    """Have the loop build its poller anew."""
    with leftover(loop):
        turn(loop, 2)
        leftover_logged()


@pytest.mark.row("A3")
@pytest.mark.parametrize("order", ["close, remove", "remove, close", "close"])
def test_duplicate_of_a_closed_fd_does_not_spin(
    loop, sock, peer, calls, order, leftover_logged
):
    """Also if its handler, which can neither read nor know, is never removed."""
    names = {"close": os.close, "remove": loop.remove_handler}
    steps = [names[name] for name in order.split(", ")]
    loop.add_handler(sock, calls, READ)
    removed = "remove" in order
    with leftover(loop, *steps, handler=fail if removed else Recorder()) as number:
        idle(loop, polls=10 if removed else 100)
        assert calls == []
        if order != "remove, close":
            leftover_logged()
        peer.send(b"x")
        turn(loop)
        assert calls == [(sock, READ)]
        loop.remove_handler(number)


@pytest.mark.row("A3")
def test_duplicate_of_a_closed_fd_whose_number_is_used_again(
    loop, sock, peer, calls, leftover_logged
):
    with leftover(loop) as number:
        os.dup2(sock.fileno(), number)
        loop.add_handler(number, calls, READ)
        idle(loop, polls=10)
        assert calls == []
        leftover_logged()
        peer.send(b"x")
        turn(loop)
        assert calls == [(number, READ)]
        os.close(number)


@pytest.mark.row("A3")
def test_several_kernel_leftovers_at_once(loop, calls, leftover_logged):
    """Rebuilding the set once must do for all; what is registered stays."""
    with pairs(4) as made, contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(leftover(loop))
        for a, _ in made:
            loop.add_handler(a, calls, READ)
        idle(loop, polls=10)
        assert calls == []
        leftover_logged()
        for _, b in made:
            b.send(b"x")
        turn(loop)
        assert {fd for fd, _ in calls} == {a for a, _ in made}


@pytest.mark.row("A3")
def test_leftovers_again_and_again(loop, poller, expect_log):
    """The set is rebuilt at most ten times a second, and so is the log written."""
    with contextlib.ExitStack() as stack:
        for seconds in (0.001, 0.001, 0.001, 0.15):
            if seconds < 0.1:
                stack.enter_context(leftover(loop))
            loop.call_later(seconds, loop.stop)
            loop.start()
        idle(loop, polls=10)
    assert len(expect_log) == (2 if poller.name == "epoll" else 0)
    while expect_log:
        expect_log.take("closed before remove_handler")


class OuterEpoll:
    """Somebody else's loop: tells whether a file descriptor is readable."""

    def __init__(self, fd):
        self.poller = select.epoll()
        self.poller.register(fd, select.EPOLLIN)

    def ready(self, seconds=0.0):
        return bool(self.poller.poll(seconds))

    def close(self):
        self.poller.close()


class OuterPoll(OuterEpoll):
    def __init__(self, fd):
        self.poller = select.poll()
        self.poller.register(fd, select.POLLIN)

    def ready(self, seconds=0.0):
        return bool(self.poller.poll(seconds * 1000))

    def close(self):
        pass


class OuterLoop(OuterEpoll):
    def __init__(self, fd):
        self.loop, self.calls = ioloop.IOLoop(), Recorder()
        self.loop.add_handler(fd, self.calls, READ)

    def ready(self, seconds=0.0):
        self.loop.run_once(seconds)
        return bool(self.calls.take())

    def close(self):
        self.loop.close()


@pytest.fixture(params=[OuterEpoll, OuterPoll, OuterLoop])
def outer(request, loop):
    """A poller that watches the loop's fileno() from now on."""
    with contextlib.closing(request.param(loop.fileno())) as made:
        yield made


@not_select
def test_an_outer_poller_notices_no_rebuild(loop, outer, leftover_logged, calls):
    with pairs(2) as [(a, b), (c, d)]:
        loop.add_handler(a, calls, READ)
        fileno = loop.fileno()
        rebuild(loop, leftover_logged)
        assert loop.fileno() == fileno
        assert not outer.ready()
        loop.add_handler(c, calls, READ)
        for sock, peer in ((a, b), (c, d)):
            peer.send(b"x")
            assert outer.ready(10)
            turn(loop)
            assert calls.take() == [(sock, READ)]
            sock.recv(9)
            turn(loop)
            assert not outer.ready()
        loop.add_callback(calls, None, None)
        assert outer.ready(10)
        turn(loop)
        assert not outer.ready()


@not_select
def test_what_is_ready_during_a_rebuild_is_seen_from_outside(
    loop, outer, leftover_logged, sock, peer, calls
):
    loop.add_handler(sock, calls, READ | WRITE)
    rebuild(loop, leftover_logged)
    assert calls
    assert outer.ready(10)
    loop.update_handler(sock, READ)
    turn(loop)
    assert not outer.ready()
    peer.send(b"x")
    assert outer.ready(10)


@not_select
def test_fileno_is_the_same_before_and_after_it_has_something_to_tell(loop, outer):
    fileno = loop.fileno()
    with pair() as (a, b):
        loop.add_handler(a, Recorder(), READ)
        assert not outer.ready()
        b.send(b"x")
        assert outer.ready(10)
        turn(loop)
        assert outer.ready()
        loop.remove_handler(a)
        assert not outer.ready()
    assert loop.fileno() == fileno == loop._impl.fileno()


@not_select
def test_fileno_from_another_thread_while_the_loop_sleeps(loop, sock, peer, calls):
    """Made by the first call, wherever that comes from."""
    with sleeping(loop):
        fileno = loop.fileno()
        assert in_thread(loop.fileno) == fileno
    assert not select.select([fileno], [], [], 0)[0]
    loop.add_handler(sock, calls, READ)
    peer.send(b"x")
    assert select.select([fileno], [], [], 10)[0]
    turn(loop)
    assert calls == [(sock, READ)]


@not_select
def test_a_hangup_with_no_events_asked_wakes_an_outer_poller_once(loop, outer):
    with pipe() as (reader, writer):
        loop.add_handler(reader, Recorder(), NONE)
        turn(loop)
        os.close(writer)
        turn(loop)
        assert not outer.ready()


only_an_outer_epoll = pytest.mark.parametrize("outer", [OuterEpoll], indirect=True)

NEARER = {
    "call_later": lambda loop, module: loop.call_later(60, int),
    "call_at": lambda loop, module: loop.call_at(loop.time() + 60, int),
    "add_timeout": lambda loop, module: loop.add_timeout(loop.time() + 60, int),
    "due": lambda loop, module: loop.call_later(-1, int),
    "periodic": lambda loop, module: module.PeriodicCallback(int, 60_000, loop).start(),
}


@not_select
@only_an_outer_epoll
@pytest.mark.parametrize("way", NEARER)
@pytest.mark.parametrize("others", [0, 100])
def test_a_nearer_timeout_wakes_an_outer_poller(loop, poller, outer, way, others):
    """Whoever has asked next_timeout() would sleep for too long."""
    for _ in range(others):
        loop.call_later(FOREVER, int)
    turn(loop)
    assert not outer.ready()
    NEARER[way](loop, poller.module)
    assert outer.ready()
    assert loop.next_timeout() <= 60
    turn(loop)
    turn(loop)
    assert not outer.ready()


@not_select
@only_an_outer_epoll
def test_a_farther_timeout_wakes_no_outer_poller(loop, outer):
    handle = loop.call_later(60, int)
    turn(loop, 2)
    for seconds in (60, 61, FOREVER, float("inf")):
        loop.call_later(seconds, int)
    assert not outer.ready()
    handle.cancel()
    assert not outer.ready()
    loop.call_later(30, int)
    assert outer.ready()


@not_select
@only_an_outer_epoll
def test_timeouts_added_in_an_iteration_leave_an_outer_poller_asleep(loop, outer):
    """The host asks next_timeout() after it."""
    loop.add_callback(loop.call_later, 60, int)
    loop.call_later(0, lambda: loop.call_later(30, int))
    turn(loop, 3)
    assert loop.next_timeout() <= 30
    assert not outer.ready()


@pytest.mark.parametrize("events", [READ, NONE])
def test_a_rebuild_takes_no_other_file_for_the_one_registered(
    loop, poller, leftover_logged, events, calls
):
    """It finds a file on the number, but that is not the one it was."""
    with pairs(2) as [(a, _), (b, b_peer)]:
        number = a.fileno()
        loop.add_handler(number, calls, events)
        os.dup2(b.fileno(), number)
        rebuild(loop, leftover_logged)
        b_peer.send(b"x")
        turn(loop, 2)
        told = poller.name == "select" and events
        assert calls == [(number, ERROR)] * bool(told)
        loop.add_handler(number, calls, READ)
        turn(loop)
        assert calls[-1] == (number, READ)


@pytest.mark.row("A6")
def test_remove_never_raises(loop, sock):
    number = os.dup(sock.fileno())
    loop.remove_handler(number)
    loop.add_handler(number, Recorder(), READ)
    os.close(number)
    loop.remove_handler(number)
    loop.remove_handler(number)
    assert loop.stats()["handlers"] == 0
    turn(loop)


@pytest.mark.row("A16")
@pytest.mark.parametrize("events", [NONE, READ])
def test_closed_fd_harms_no_other(loop, poller, events):
    """Closed without remove_handler(): select, which could see no other event
    for it, answers one ERROR; epoll and kqueue have forgotten it."""
    with pairs(2) as [(a, _), (b, b_peer)]:
        calls, others = Recorder(), Recorder()
        number = os.dup(a.fileno())
        loop.add_handler(number, calls, events)
        loop.add_handler(b, others, READ)
        os.close(number)
        idle(loop)
        told = poller.name == "select" and events
        assert [fd for fd, _ in calls] == ([number] if told else [])
        assert all(events & ERROR for _, events in calls)
        b_peer.send(b"x")
        turn(loop)
        assert others == [(b, READ)]
        loop.remove_handler(number)


@pytest.mark.row("A16")
def test_fd_closed_by_a_handler_of_the_same_batch(loop):
    with pairs(2) as [(a, a_peer), (b, b_peer)]:
        numbers = {os.dup(a.fileno()), os.dup(b.fileno())}
        calls = []

        def handler(fd, events):
            calls.append(fd)
            for other in numbers - {fd}:
                loop.remove_handler(other)
                os.close(other)
            loop.remove_handler(fd)

        for number in numbers:
            loop.add_handler(number, handler, READ)
        a_peer.send(b"x")
        b_peer.send(b"x")
        turn(loop, 3)
        close(*calls)
        assert len(calls) == 1


@pytest.mark.row("A32")
def test_fd_closed_by_a_thread_while_the_loop_sleeps(loop, calls):
    with pairs(2) as [(a, _), (b, b_peer)]:
        others, number = Recorder(), os.dup(a.fileno())
        loop.add_handler(number, calls, READ)
        loop.add_handler(b, others, READ)

        def closer():
            os.close(number)
            b_peer.send(b"x")
            loop.add_callback(loop.stop)

        thread = when_asleep(closer)
        loop.start()
        thread.join()
        run_until(loop, lambda: others)
        assert others[0] == (b, READ)
        # The number goes to another file: nothing of the old registration shows.
        calls.clear()
        os.dup2(b.fileno(), number)
        try:
            loop.add_handler(number, calls, READ)
            turn(loop)
            assert calls == [(number, READ)]
        finally:
            os.close(number)


# -- Batches ------------------------------------------------------------------


@pytest.mark.row("A25")
def test_removing_all_others_of_the_batch(loop):
    with pairs(3) as made:
        calls = []

        def handler(fd, events):
            calls.append(fd)
            for a, _ in made:
                if a is not fd:
                    loop.remove_handler(a)

        for a, b in made:
            loop.add_handler(a, handler, READ)
            b.send(b"x")
        turn(loop, 2)
        assert len(calls) == 2
        assert len(set(calls)) == 1


@pytest.mark.row("A25")
@pytest.mark.parametrize("mask", [NONE, WRITE])
def test_update_drops_what_is_already_collected(loop, mask):
    with pairs(3) as made:
        calls = []

        def handler(fd, events):
            calls.append((fd, events))
            if len(calls) == 1:
                for a, _ in made:
                    if a is not fd:
                        loop.update_handler(a, mask)

        for a, b in made:
            loop.add_handler(a, handler, READ)
            b.send(b"x")
        turn(loop)
        assert len(calls) == 1
        turn(loop)
        first = calls[0][0]
        expected = [(a, mask) for a, _ in made if a is not first and mask]
        assert sorted(calls[1:], key=str) == sorted([(first, READ), *expected], key=str)


@pytest.mark.row("A26")
def test_remove_and_add_again_waits_for_the_next_poll(loop):
    with pairs(3) as made:
        calls = []

        def handler(fd, events):
            calls.append(fd)
            for a, _ in made:
                loop.remove_handler(a)
                loop.add_handler(a, handler, READ)

        for a, b in made:
            loop.add_handler(a, handler, READ)
            b.send(b"x")
        turn(loop)
        assert len(calls) == 1
        turn(loop, 30)
        assert len(calls) == 31


@contextlib.contextmanager
def crowd(loop, poller, calls):
    """(how many files there are to be, those there are, a function that adds one).

    They are always ready; after the block each is called in time.
    """
    count, fds = 900 if poller.name == "select" else 3000, []

    def add():
        fds.append(os.eventfd(1, os.EFD_NONBLOCK))
        loop.add_handler(fds[-1], calls, READ)

    with limit(resource.RLIMIT_NOFILE, count + 100):
        try:
            yield count, fds, add
            assert len(fds) == count
            turn(loop, 60)
            assert {fd for fd, _ in calls} == set(fds)
            for fd in fds:
                loop.remove_handler(fd)
        finally:
            close(*fds)


@pytest.mark.row("A23", "F13")
def test_no_ready_fd_starves(loop, poller, calls):
    with crowd(loop, poller, calls) as (count, _, add):
        for _ in range(count):
            add()


@pytest.mark.row("A24")
def test_a_handler_may_add_thousands(loop, poller, calls):
    firsts = []
    with crowd(loop, poller, calls) as (count, fds, add), pairs(4) as made:

        def handler(fd, events):
            firsts.append(fd)
            loop.remove_handler(fd)
            while len(fds) < len(firsts) * count // 4:
                add()

        for a, b in made:
            loop.add_handler(a, handler, READ)
            b.send(b"x")
        turn(loop)
        assert len(firsts) == 4
        assert calls == []


@pytest.mark.row("A24")
def test_a_handler_may_poll(loop):
    """The nested poll uses the array of events that is being delivered."""
    with pairs(8) as made:
        calls = []

        def handler(fd, events):
            calls.append((fd, events))
            assert loop._impl.poll(0)
            for a, _ in made[:7]:
                loop.remove_handler(a)
            assert [n for n, _ in loop._impl.poll(0)] == [made[7][0].fileno()]

        for a, b in made:
            loop.add_handler(a, handler, READ)
            b.send(b"x")
        turn(loop)
        assert {events for _, events in calls} == {READ}
        calls.clear()
        turn(loop)
        assert calls == [(made[7][0], READ)]


# -- What can't be registered -------------------------------------------------


def refused_alike(loop, path, events):
    """The refusal says what the file may be, and that it needs no loop."""
    fd = os.open(path, os.O_RDONLY)
    try:
        said = r"(?s)(?=.*regular file)(?=.*device).*\b(threads?|ready|read)\b"
        with pytest.raises(PermissionError, match=said) as refusal:
            loop.add_handler(fd, fail, events)
        assert refusal.value.errno == errno.EPERM
        assert loop.stats()["handlers"] == 0
        turn(loop)
    finally:
        os.close(fd)


@pytest.mark.row("A9")
@pytest.mark.parametrize("path", [__file__, "/"], ids=["file", "directory"])
@pytest.mark.parametrize("events", [NONE, READ, WRITE, READ | WRITE])
def test_files_are_refused_alike(loop, path, events):
    refused_alike(loop, path, events)


@pytest.mark.row("A9")
@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/dev/full"])
@pytest.mark.parametrize("poller", ["epoll", "select"], indirect=True)
@pytest.mark.parametrize("events", [NONE, READ])
def test_devices_without_poll(loop, path, events):
    refused_alike(loop, path, events)


@pytest.mark.row("A9")
def test_a_regular_file_on_the_number_of_a_lost_registration(loop):
    """The same refusal as without one."""
    refusals = []
    with pipe() as (reader, _), open(__file__, "rb") as file:
        loop.add_handler(reader, Recorder(), READ)
        os.dup2(file.fileno(), reader)
        for _ in range(2):
            with pytest.raises(PermissionError) as refusal:
                loop.add_handler(reader, Recorder(), READ)
            refusals.append(str(refusal.value))
            loop.remove_handler(reader)
    assert refusals[0] == refusals[1]


@pytest.mark.row("A8")
@pytest.mark.parametrize("events", [NONE, READ, WRITE, READ | WRITE])
def test_closed_fd_leaves_no_entry(loop, events, sock, peer, calls):
    number = free_number()
    with pytest.raises(OSError) as refusal:
        loop.add_handler(number, Recorder(), events)
    assert refusal.value.errno == errno.EBADF
    assert loop.stats()["handlers"] == 0
    with pytest.raises(FileNotFoundError):
        loop.update_handler(number, READ)
    os.dup2(sock.fileno(), number)
    try:
        loop.add_handler(number, calls, READ)
        peer.send(b"x")
        turn(loop)
    finally:
        os.close(number)
    assert calls == [(number, READ)]


@pytest.mark.row("A8")
def test_update_of_a_closed_fd_changes_nothing(loop, sock, peer, calls):
    """The old mask holds when the same file is back on the number."""
    number = os.dup(sock.fileno())
    loop.add_handler(number, calls, READ)
    os.close(number)
    with pytest.raises(OSError) as refusal:
        loop.update_handler(number, WRITE)
    assert refusal.value.errno == errno.EBADF
    assert loop.stats()["handlers"] == 1
    os.dup2(sock.fileno(), number)
    peer.send(b"x")
    try:
        loop.update_handler(number, READ)
        turn(loop)
    finally:
        os.close(number)
    assert (number, READ) in calls


@pytest.mark.row("A10")
@not_select
def test_the_loop_can_not_watch_itself(loop):
    with pytest.raises(OSError) as refusal:
        loop.add_handler(loop.fileno(), Recorder(), READ)
    assert refusal.value.errno in (errno.ELOOP, errno.EINVAL)
    assert loop.stats()["handlers"] == 0
    turn(loop)


@pytest.mark.row("A10")
@only_epoll
def test_loops_that_watch_each_other(make_loop):
    a, b = make_loop(), make_loop(impl=None)
    a.add_handler(b.fileno(), Recorder(), READ)
    with pytest.raises(OSError) as refusal:
        b.add_handler(a.fileno(), Recorder(), READ)
    assert refusal.value.errno in (errno.ELOOP, errno.EINVAL)
    assert (a.stats()["handlers"], b.stats()["handlers"]) == (1, 0)
    turn(b)


@pytest.mark.row("A10")
@not_select
def test_a_loop_in_a_loop(make_loop, poller, sock, peer, calls):
    outer, inner = make_loop(), make_loop(impl=poller.impl())
    inner.add_handler(sock, calls, READ)
    outer.add_handler(inner.fileno(), lambda *_: inner.run_once(0), READ)
    turn(outer)
    assert calls == []
    peer.send(b"x")
    turn(outer)
    assert calls == [(sock, READ)]


@only_select
def test_select_has_no_fileno(loop):
    with pytest.raises(io.UnsupportedOperation):
        loop.fileno()


@not_select
def test_fileno_is_an_open_descriptor(loop):
    assert stat.S_IFMT(os.fstat(loop.fileno()).st_mode) == 0  # an anonymous inode


@pytest.mark.row("A14")
def test_memory_does_not_follow_the_number(loop, poller, calls):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    number = min(100_000, hard - 1)
    with pytest.raises(ValueError if poller.name == "select" else OSError):
        loop.add_handler(2**31 - 1, Recorder(), READ)
    with pair() as (a, b), limit(resource.RLIMIT_NOFILE, number + 1):
        os.dup2(a.fileno(), number)
        try:
            if poller.name == "select":
                with pytest.raises(ValueError):
                    loop.add_handler(number, calls, READ)
                return
            loop.add_handler(number, calls, READ)
            b.send(b"x")
            turn(loop)
            assert calls == [(number, READ)]
            loop.remove_handler(number)
        finally:
            os.close(number)


@pytest.mark.row("A15")
@pytest.mark.parametrize("number", [FD_SETSIZE - 1, FD_SETSIZE, 2000, 4000])
@pytest.mark.parametrize("events", [NONE, READ, READ | WRITE])
def test_numbers_around_fd_setsize(loop, poller, number, events, calls):
    with limit(resource.RLIMIT_NOFILE, 4096), pair() as (a, b):
        os.dup2(a.fileno(), number)
        b.send(b"x")
        try:
            if poller.name == "select" and number >= FD_SETSIZE:
                with pytest.raises(ValueError):
                    loop.add_handler(number, calls, events)
                assert loop.stats()["handlers"] == 0
            else:
                loop.add_handler(number, calls, events)
                turn(loop)
                assert calls == ([(number, events)] if events else [])
                loop.remove_handler(number)
            loop.add_handler(a, calls, READ)
            calls.clear()
            turn(loop)
            assert calls == [(a, READ)]
        finally:
            os.close(number)


@pytest.mark.row("A7", "A11", "A12")
@pytest.mark.parametrize("code", ["EBADF", "ENOSPC", "ENOMEM"])
def test_epoll_ctl_fails(seccomp, code):
    run_python(
        f"""
        import errno, kernel, os, socket
        loop = ioloop.IOLoop(ioloop._EPoll())
        a, b = socket.socketpair()
        calls = []
        loop.add_handler(a, lambda *call: calls.append(call), loop.READ)
        kernel.deny("epoll_ctl", errno.{code})
        try:
            loop.add_handler(b, print, loop.READ)
        except OSError as error:
            assert error.errno == errno.{code}, error
        else:
            raise SystemExit("no error")
        assert loop.stats()["handlers"] == 1
        b.send(b"x")
        loop.run_once(0)
        assert calls == [(a, loop.READ)]
        loop.remove_handler(a)  # the kernel keeps it: no call, no crash
        loop.remove_handler(b)
        loop.run_once(0)
        assert len(calls) == 1
        loop.close()
        a.close(), b.close()
        """
    )


# -- The poller's own resources -----------------------------------------------


@pytest.mark.row("A28")
def test_all_descriptors_are_close_on_exec(poller, counted_files):
    with poller.module.IOLoop(poller.impl()) as loop:
        turn(loop)
        assert len(counted_files()) == 3  # the waker's two, a set or a witness
        if poller.name != "select":
            loop.fileno()
            assert len(counted_files()) == 4
        for fd in counted_files():
            assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert not counted_files()


@pytest.mark.row("A29")
def test_close_on_exec_from_birth(seccomp):
    """No window for a fork in another thread: FD_CLOEXEC is never set after."""
    run_python(
        """
        import errno, fcntl, kernel
        kernel.deny("fcntl", errno.EPERM, second=fcntl.F_SETFD)
        for impl in (ioloop._EPoll, ioloop._Select):
            ioloop.IOLoop(impl()).close()
        """
    )


@pytest.mark.row("A30")
@pytest.mark.parametrize("closed", [(0, 1, 2), (1, 2), (2,), (1,), (0,)])
def test_never_on_the_numbers_of_stdio(poller, closed):
    """However many are free: the loop's own move up one by one."""
    poller.run(
        f"""
        import os
        report = os.dup(2)
        for fd in {closed}:
            os.close(fd)
        loop = ioloop.IOLoop(impl())
        loop.add_callback(loop.stop)
        loop.start()
        for fd in {closed}:
            try:
                os.fstat(fd)
            except OSError:
                continue
            os.write(report, b"%d is open" % fd)
            os._exit(1)
        loop.close()
        os._exit(0)
        """
    )


@pytest.mark.row("A33")
@pytest.mark.parametrize("spare", range(4))
def test_construction_is_all_or_nothing(poller, counted_files, spare):
    with nothing_free(spare):
        if spare == 3:
            poller.module.IOLoop(poller.impl()).close()
        else:
            with pytest.raises(OSError) as refusal:
                poller.module.IOLoop(poller.impl())
            assert refusal.value.errno == errno.EMFILE
    assert not counted_files()


@pytest.mark.row("A33")
@pytest.mark.parametrize("name", ["epoll_create1", "pipe2"])
def test_construction_fails_cleanly_on_a_refused_call(seccomp, name):
    run_python(
        f"""
        import errno, gc, kernel, os
        before = os.listdir("/proc/self/fd")
        kernel.deny({name!r}, errno.EPERM)  # ENOSYS would have musl use pipe()
        for _ in range(10):
            try:
                ioloop.IOLoop(ioloop._EPoll())
            except OSError as error:
                assert error.errno == errno.EPERM
            else:
                raise SystemExit("no error")
        gc.collect()
        assert os.listdir("/proc/self/fd") == before
        """
    )


@pytest.mark.row("A34")
@pytest.mark.parametrize("code", ["ENOSYS", "EPERM"])
def test_epoll_pwait2_is_missing(seccomp, code):
    """An old kernel or a sandbox: the timeout is rounded up to milliseconds."""
    run_python(
        f"""
        import errno, kernel, socket, time
        kernel.deny("epoll_pwait2", errno.{code})
        with ioloop.IOLoop(ioloop._EPoll()) as loop:
            for delay in (0, 1e-9, 0.0005, 0.01):
                due = time.monotonic() + delay
                loop.call_later(delay, loop.stop)
                polls = loop.stats()["polls"]
                loop.start()
                late = time.monotonic() - due
                assert 0 <= late < 5, late
                assert loop.stats()["polls"] - polls <= 3
            a, b = socket.socketpair()
            with a, b:
                loop.add_handler(a, lambda *_: loop.stop(), loop.READ)
                b.send(b"x")
                loop.start()
        """
    )


@pytest.mark.row("A35")
@only_epoll
def test_the_pollers_fd_closed_by_the_user(poller, counted_files):
    with poller.module.IOLoop(poller.impl()) as loop:
        [handle] = [fd for fd, name in counted_files().items() if "eventpoll" in name]
        loop.add_callback(os.close, handle)
        with pytest.raises(OSError) as error:
            loop.start()
        assert error.value.errno == errno.EBADF
        assert not loop.running()


@not_select
def test_fileno_closed_by_the_user_does_not_end_the_loop(loop, sock, peer, calls):
    """It is there for others: the loop goes on."""
    os.close(loop.fileno())
    loop.add_handler(sock, calls, READ)
    peer.send(b"x")
    turn(loop)
    assert calls == [(sock, READ)]


@not_select
def test_no_room_for_fileno(poller, counted_files, calls):
    """It fails, the loop does not, and the next call makes it."""
    with pair() as (a, b), poller.module.IOLoop(poller.impl()) as loop:
        loop.add_handler(a, calls, READ)
        with nothing_free():
            with pytest.raises(OSError) as error:
                loop.fileno()
            assert error.value.errno == errno.EMFILE
        b.send(b"x")
        turn(loop)
        assert calls == [(a, READ)]
        assert select.select([loop.fileno()], [], [], 0)[0]
    assert not [fd for fd, name in counted_files().items() if "eventpoll" in name]


def test_impl_is_closed_with_the_loop(poller, counted_files):
    loop = poller.module.IOLoop(poller.impl())
    assert counted_files()
    loop.close()
    assert not counted_files()


@pytest.mark.row("F1")
def test_adding_and_removing_leaks_nothing(loop, counted_files, sock):
    before = counted_files()
    for events in (NONE, READ, WRITE, READ | WRITE) * 50:
        loop.add_handler(sock, Recorder(), events)
        turn(loop)
        loop.remove_handler(sock)
    assert counted_files() == before


@pytest.mark.row("B18")
def test_reinit_keeps_the_handlers(loop, sock, peer, calls):
    loop.add_handler(sock, calls, READ)
    loop.add_handler(peer, calls, NONE)
    with child() as inside:
        if inside:
            loop.reinit()
            peer.send(b"x")
            turn(loop)
            assert calls == [(sock, READ)]
            loop.update_handler(peer, WRITE)
            loop.remove_handler(sock)
            turn(loop)
            assert calls == [(sock, READ), (peer, WRITE)]
            loop.close()
    assert loop.stats()["handlers"] == 2
    turn(loop)
    assert calls == [(sock, READ)]


@pytest.mark.row("A12", "F15")
def test_no_memory(poller):
    """Every allocation of the three calls fails once: error or success, no crash."""
    nomemory()
    poller.run(
        """
        import socket
        from _testcapi import remove_mem_hooks, set_nomemory
        pairs = [socket.socketpair() for _ in range(3)]
        for a, b in pairs:
            b.send(b"x")
        (a, _), (b, _), (c, _) = pairs
        ran = []
        for start in range(40):
            loop = ioloop.IOLoop(impl())
            loop.add_handler(a, lambda *_: ran.append("a"), loop.READ)
            failed = False
            set_nomemory(start, start + 1)
            try:
                loop.add_handler(b, len, loop.READ | loop.WRITE)
                loop.update_handler(b, loop.NONE)
                loop.update_handler(b, loop.WRITE)
                loop.remove_handler(b)
                loop.add_handler(c, len, loop.READ)
            except MemoryError:
                failed = True
            finally:
                remove_mem_hooks()
            ioloop._verify(loop)
            handlers = loop.stats()["handlers"]
            assert handlers == 2 if not failed else handlers in (1, 2), handlers
            loop.handle_callback_exception = lambda callback: None
            ran.clear()
            loop.run_once(0)
            assert ran == ["a"]
            loop.close()
        """
    )


NO_ROOM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <sys/epoll.h>

size_t refused, event = sizeof(struct epoll_event);

void *realloc(void *p, size_t n) {
    static void *(*real)(void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "realloc");
    return refused && n == refused ? NULL : real(p, n);
}
"""


@pytest.mark.row("F15")
def test_no_memory_for_a_larger_batch(tmp_path):
    """What there was room for is delivered: the kernel reports it only once."""
    source = tmp_path / "no_room.c"
    source.write_text(NO_ROOM)
    run_python(
        """
        import ctypes, os
        refused = ctypes.c_size_t.in_dll(ctypes.CDLL(None), "refused")
        event = ctypes.c_size_t.in_dll(ctypes.CDLL(None), "event")
        calls = []
        with ioloop.IOLoop(ioloop._EPoll()) as loop:
            fds = [os.eventfd(1) for _ in range(300)]
            for fd in fds:
                loop.add_handler(fd, lambda fd, _: calls.append(fd), 1 | 1 << 30)
            refused.value = 2 * 256 * event.value
            for _ in range(3):
                loop.run_once(0)
        assert sorted(calls) == fds
        """,
        LD_PRELOAD=str(compile_library(source)),
    )


# -- epoll's own flags --------------------------------------------------------


@only_epoll
def test_rdhup_for_those_who_ask(loop, sock, peer, calls):
    loop.add_handler(sock, calls, READ | loop._EPOLLRDHUP)
    peer.shutdown(socket.SHUT_WR)
    turn(loop)
    assert calls == [(sock, READ | loop._EPOLLRDHUP)]


def test_rdhup_is_no_error_where_it_is_unknown(loop, sock, peer, calls):
    loop.add_handler(sock, calls, READ | loop._EPOLLRDHUP)
    peer.send(b"x")
    turn(loop)
    assert calls == [(sock, READ)]


@only_epoll
def test_urgent_data_for_those_who_ask(loop, calls):
    with tcp_pair() as (a, b):
        loop.add_handler(a, calls, loop._EPOLLPRI)
        b.send(b"!", socket.MSG_OOB)
        run_until(loop, lambda: calls)
        assert calls == [(a, loop._EPOLLPRI)]


SETS = ["same", "rebuild", "reinit", "rebuild and reinit"]


@pytest.fixture(params=SETS)
def anew(request, loop, leftover_logged):
    """A context manager: inside, the loop has a new set (perhaps in a child)."""

    @contextlib.contextmanager
    def enter():
        if "rebuild" in request.param:
            rebuild(loop, leftover_logged)
        if "reinit" not in request.param:
            yield True
            return
        with child() as inside:
            if inside:
                loop.reinit()
            yield inside

    return enter


def test_a_paused_handler_is_not_watched(loop, anew):
    """In a new set neither."""
    gate, calls = concurrent.futures.Future(), []
    with pair() as (a, b):
        loop.add_handler(a, lambda *_: calls.append(1) or gate, READ)
        b.send(b"x")
        turn(loop, 2)
        with anew() as inside:
            if inside:
                idle(loop, 0.01)
                assert calls == [1]
                gate.set_result(None)
                turn(loop, 2)
                assert len(calls) > 1


@only_epoll
@pytest.mark.parametrize("mask", [READ, WRITE, READ | WRITE, ERROR])
def test_oneshot_that_has_fired_stays_fired(loop, anew, mask, calls):
    """In a new set too, until update_handler() arms it again."""
    with pipe() as (reader, writer):
        fd = writer if mask == WRITE else reader
        loop.add_handler(fd, calls, mask | loop._EPOLLONESHOT)
        if mask == ERROR:
            os.close(writer)
        else:
            os.write(writer, b"x")
        turn(loop, 2)
        [(called, events)] = calls.take()
        assert called == fd and events & mask
        with anew() as inside:
            if inside:
                idle(loop, 0.01)
                assert calls == []
                loop.update_handler(fd, mask | loop._EPOLLONESHOT)
                turn(loop, 3)
                assert len(calls) == 1


@only_epoll
def test_oneshot_that_has_not_fired_fires_once(loop, anew, calls):
    with pairs(3) as [(a, a_peer), (b, b_peer), (c, c_peer)]:
        mask = READ | loop._EPOLLONESHOT
        for fd, peer in ((a, a_peer), (b, b_peer)):
            loop.add_handler(fd, calls, mask)
            peer.send(b"x")
        turn(loop, 2)
        calls.clear()
        loop.update_handler(a, mask)  # armed again, not fired since
        loop.remove_handler(b)
        loop.add_handler(b, calls, mask)  # another registration
        loop.add_handler(c, calls, mask)
        a.recv(9), b.recv(9)
        with anew() as inside:
            if inside:
                turn(loop)
                assert calls == []
                for peer in (a_peer, b_peer, c_peer):
                    peer.send(b"x")
                turn(loop, 3)
                assert sorted(fd.fileno() for fd, _ in calls) == sorted(
                    fd.fileno() for fd in (a, b, c)
                )


@only_epoll
def test_oneshot_that_has_fired_is_fired_in_each_new_set(loop, leftover_logged, calls):
    """Whatever else is changed meanwhile."""
    with pairs(2) as [(a, a_peer), (b, b_peer)]:
        loop.add_handler(a, calls, READ | loop._EPOLLONESHOT)
        loop.add_handler(b, calls, READ)
        a_peer.send(b"x")
        b_peer.send(b"x")
        turn(loop)
        loop.remove_handler(b)
        calls.clear()
        rebuild(loop, leftover_logged)
        with child() as inside:
            if inside:
                loop.reinit()
                with child() as inside:
                    if inside:
                        loop.reinit()
                        turn(loop, 2)
                        assert calls == []
                        loop.update_handler(a, READ)
                        turn(loop, 2)
                        assert calls == [(a, READ)] * 2
                turn(loop, 2)
                assert calls == []


def interrupt(loop, made, flag, reads=False):
    """Have the first handler that is called raise; return all whose fds are called."""
    called = []

    def handler(sock, events):
        called.append(sock.fileno())
        if reads:
            drain(sock)  # a child may have read it
        if len(called) == 1:
            raise Exit

    for a, b in made:
        loop.add_handler(a, handler, READ | flag)
        b.send(b"x")
    with pytest.raises(Exit):
        loop.start()
    assert len(called) == 1
    return called


@pytest.mark.row("D3")
@only_epoll
@pytest.mark.parametrize(
    ("flag", "reads", "anew"),
    [
        *(("_EPOLLONESHOT", False, which) for which in SETS),
        *(("_EPOLLONESHOT", True, which) for which in SETS),
        *(("_EPOLLET", True, which) for which in SETS),
        ("_EPOLLET", False, "same"),  # a new set tells what is still there
    ],
    indirect=["anew"],
)
def test_events_that_the_kernel_reports_once_are_kept(loop, anew, flag, reads):
    """Not delivered because of a BaseException: they have fired, and are due."""
    with pairs(3) as made:
        called = interrupt(loop, made, getattr(loop, flag), reads)
        with anew() as inside:
            if inside:
                turn(loop, 3)
                assert sorted(called) == sorted(a.fileno() for a, _ in made)
        turn(loop, 3)
        assert sorted(called) == sorted(a.fileno() for a, _ in made)


@pytest.mark.row("D3")
@pytest.mark.parametrize("impl", [ioloop._EPoll, select.epoll])
@pytest.mark.parametrize("embedded", ["before", "after"])
def test_kept_events_are_due_at_once(impl, embedded):
    """Also for whoever polls fileno(): the kernel knows of nothing."""
    with pairs(2) as made, ioloop.IOLoop(impl=impl()) as loop:
        if embedded == "before":
            loop.fileno()
        called = interrupt(loop, made, loop._EPOLLONESHOT)
        assert loop.next_timeout() == 0
        assert select.select([loop.fileno()], [], [], 0)[0]
        turn(loop)
        assert len(called) == 2
        assert loop.next_timeout() is None
        turn(loop)
        assert not select.select([loop.fileno()], [], [], 0)[0]


@only_epoll
def test_edge_triggered(loop, sock, peer, calls):
    loop.add_handler(sock, calls, READ | loop._EPOLLET)
    peer.send(b"x")
    turn(loop, 3)
    assert calls.take() == [(sock, READ)]
    peer.send(b"x")
    turn(loop, 3)
    assert calls == [(sock, READ)]


@only_epoll
def test_error_alone_sees_a_hangup(loop, sock, peer, calls):
    loop.add_handler(sock, calls, ERROR)
    peer.send(b"x")
    turn(loop)
    assert calls == []
    peer.close()
    turn(loop)
    assert [events & ~ERROR for _, events in calls] == [0]


# -- The pollers as objects ---------------------------------------------------


def test_poller_methods_of_its_own(poller):
    """What makes them an `impl` like any other."""
    impl = poller.impl()
    with pair() as (a, b):
        number = a.fileno()
        impl.register(a, READ | WRITE)
        assert impl.poll(0) == [(number, WRITE)]
        b.send(b"x")
        assert impl.poll() == [(number, READ | WRITE)]
        impl.modify(number, READ)
        assert impl.poll(-1) == [(number, READ)]
        impl.modify(number, WRITE)
        assert impl.poll(None) == [(number, WRITE)]
        impl.unregister(a)
        impl.unregister(number)
        assert impl.poll(0) == impl.poll(0.0) == impl.poll(0.001) == []
        for method in (impl.register, impl.modify):
            for wrong in (None, -1, 2**40):
                with pytest.raises((TypeError, ValueError, OverflowError)):
                    method(wrong, READ)
                with pytest.raises((TypeError, ValueError, OverflowError)):
                    method(number, wrong)
    impl.close()
    impl.close()


def test_a_subclass_that_overrides_nothing_is_the_poller_that_it_is(
    make_loop, poller, calls
):
    """As fast: not asked on every pass while callbacks wait."""

    class Named(poller.impl):
        def __init__(self, name):
            self.name = name

        def close(self):
            closed.append(self.name)
            super().close()

    closed = []
    loop = make_loop(impl=Named("mine"))
    for _ in range(50):
        loop.add_callback(loop.add_callback, int)
        turn(loop)
    assert loop.stats()["polls"] < 50
    with pair() as (a, b):
        loop.add_handler(a, calls, READ)
        b.send(b"x")
        turn(loop, 2)
        assert calls == [(a, READ)] * 2
    assert loop._impl.name == "mine"
    loop.close()
    assert closed == ["mine"]


@pytest.mark.parametrize("name", ["register", "modify", "unregister", "poll"])
def test_a_subclass_that_overrides_a_method_has_it_called(
    make_loop, poller, name, calls
):
    log = []

    def method(self, *args):
        log.append(args)
        return getattr(poller.impl, name)(self, *args)

    logging = type("Logging", (poller.impl,), {name: method})
    loop = make_loop(impl=type("Further", (logging,), {})())
    with pair() as (a, b):
        loop.add_handler(a, calls, READ)
        loop.update_handler(a, READ | WRITE)
        turn(loop)
        assert calls.take() == [(a, WRITE)]
        b.send(b"x")
        turn(loop)
        assert calls.take() == [(a, READ | WRITE)]
        loop.update_handler(a, NONE)
        loop.remove_handler(a)
        turn(loop)
        assert calls == []
        number = a.fileno()
    assert log
    if name in ("modify", "unregister"):
        assert log[0][0] == number


@not_select
def test_a_poller_is_one_loops_alone(make_loop, poller, counted_files):
    impl = poller.impl()
    loop = make_loop(impl=impl)
    files = counted_files()
    with pytest.raises(ValueError):
        make_loop(impl=impl)
    assert counted_files() == files
    thread = Thread(loop.stop)
    loop.start()
    thread.join()


def test_a_closed_poller(poller):
    impl = poller.impl()
    if poller.name == "select":  # has nothing to close
        impl.close()
        assert impl.poll(0) == []
        return
    number = impl.fileno()
    impl.close()
    with pytest.raises(OSError):
        os.fstat(number)
    for call in (impl.fileno, lambda: impl.poll(0)):
        with pytest.raises(ValueError, match="closed"):
            call()
    with pair() as (a, _), pytest.raises(OSError):
        impl.register(a, READ)


def test_a_closed_poller_ends_the_loop_that_has_it(loop, poller):
    loop.add_callback(loop._impl.close)
    if poller.name == "select":
        loop.add_callback(loop.stop)
        loop.start()
    else:
        with pytest.raises(ValueError, match="closed"):
            loop.start()
    assert not loop.running()


# -- The choice ---------------------------------------------------------------


def test_the_best_poller_is_chosen():
    assert ioloop._poll is ioloop._EPoll
    with ioloop.IOLoop() as loop:
        assert type(loop._impl) is ioloop._EPoll


def test_the_constants_are_epolls():
    loop = ioloop.IOLoop
    assert (loop.NONE, loop.READ, loop.WRITE, loop.ERROR) == (0, 0x1, 0x4, 0x18)
    for name in ("IN", "PRI", "OUT", "ERR", "HUP", "RDHUP", "ONESHOT", "ET"):
        assert getattr(loop, f"_EPOLL{name}") == getattr(select, f"EPOLL{name}") % 2**32
