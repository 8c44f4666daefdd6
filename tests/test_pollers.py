"""What every poller does alike, and where it can't: rows A1-A36 of the failure
catalogue, each on epoll, select and (the fake) kqueue."""

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
from helpers import (
    ERROR,
    NONE,
    READ,
    WRITE,
    Recorder,
    can_deny,
    child,
    close,
    free_number,
    idle,
    limit,
    nothing_free,
    pair,
    pairs,
    pipe,
    run_python,
    run_until,
    tcp_pair,
    turn,
)
from support import FOREVER, Thread, compile_library, in_thread, sleeping

import ioloop

FD_SETSIZE = 1024

only_epoll = pytest.mark.parametrize("poller", ["epoll"], indirect=True)
only_select = pytest.mark.parametrize("poller", ["select"], indirect=True)
not_select = pytest.mark.parametrize("poller", ["epoll", "kqueue"], indirect=True)


@pytest.fixture(scope="session")
def seccomp():
    if not can_deny():
        pytest.skip("needs seccomp and known system call numbers")


# -- Readiness ----------------------------------------------------------------


def test_read_is_level_triggered(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ)
        turn(loop)
        assert calls.take() == []
        b.send(b"x")
        turn(loop, 3)
        assert calls.take() == [(a, READ)] * 3
        a.recv(9)
        turn(loop)
        assert calls == []


def test_write_is_level_triggered(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, WRITE)
        turn(loop, 3)
        assert calls.take() == [(a, WRITE)] * 3
        with pytest.raises(BlockingIOError):
            while True:
                a.send(bytes(65536))
        turn(loop)
        assert calls.take() == []
        while select.select([b], [], [], 0)[0]:
            b.recv(1 << 20)
        turn(loop)
        assert calls == [(a, WRITE)]


@pytest.mark.parametrize("asked", [READ, WRITE, READ | WRITE])
def test_one_call_with_all_that_was_asked_and_no_more(loop, asked):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, asked)
        b.send(b"x")
        turn(loop)
        assert calls == [(a, asked)]


@pytest.mark.parametrize("before", [NONE, READ, WRITE, READ | WRITE])
@pytest.mark.parametrize("after", [NONE, READ, WRITE, READ | WRITE])
def test_update_replaces_the_mask(loop, before, after):
    with pair() as (a, b):
        calls = Recorder()
        b.send(b"x")
        loop.add_handler(a, calls, before)
        turn(loop)
        calls.clear()
        loop.update_handler(a, after)
        turn(loop)
        assert calls == ([(a, after)] if after else [])


def test_a_sleeping_loop_wakes_for_a_descriptor(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, lambda *call: (calls(*call), loop.stop()), READ)
        loop.add_callback(b.send, b"x")
        loop.start()
        assert calls == [(a, READ)]


def test_listening_socket_is_readable(loop):
    with socket.create_server(("127.0.0.1", 0)) as server:
        calls = Recorder()
        loop.add_handler(server, calls, READ)
        turn(loop)
        assert calls == []
        with socket.create_connection(server.getsockname()):
            run_until(loop, lambda: calls)
        assert calls == [(server, READ)]


def test_an_idle_loop_does_not_poll_again(loop):
    with pair() as (a, _):
        loop.add_handler(a, Recorder(), READ)
        idle(loop)


@pytest.mark.parametrize("after", [READ, NONE, None])
def test_no_interest_is_left_behind(loop, after):
    """What is not asked for any more does not wake the loop either."""
    with pair() as (a, _):
        calls = Recorder()
        loop.add_handler(a, calls, READ | WRITE)
        turn(loop)
        assert calls.take() == [(a, WRITE)]
        if after is None:
            loop.remove_handler(a)
        else:
            loop.update_handler(a, after)
        idle(loop)
        assert calls == []


def test_many_descriptors_at_once(loop):
    with pairs(100) as made:
        calls = Recorder()
        for a, b in made:
            loop.add_handler(a, calls, READ | WRITE)
            b.send(b"x")
        turn(loop, 5)
        assert {a for a, _ in calls} == {a for a, _ in made}
        assert {events for _, events in calls} == {READ | WRITE}


# -- Closed peers -------------------------------------------------------------


@pytest.mark.parametrize("pairs_of", [pair, tcp_pair], ids=["unix", "tcp"])
def test_A19_half_close_loses_no_data(loop, pairs_of):
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


@pytest.mark.parametrize("pairs_of", [pair, tcp_pair, pipe])
def test_A20_closed_peer_reads_as_read_while_data_is_left(loop, pairs_of):
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


def test_A18_reset_reaches_a_reader(loop, poller):
    with tcp_pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ)
        b.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        b.close()
        run_until(loop, lambda: calls)
        assert calls[0][1] & READ
        assert (calls[0][1] & ERROR != 0) == (poller.name == "epoll")
        with pytest.raises(ConnectionResetError):
            a.recv(9)


@pytest.mark.parametrize("full", [False, True])
def test_A18_closed_reader_reaches_the_write_end_of_a_pipe(loop, poller, full):
    with pipe() as (reader, writer):
        if full:
            with pytest.raises(BlockingIOError):
                while True:
                    os.write(writer, bytes(65536))
        calls = Recorder()
        loop.add_handler(writer, calls, WRITE)
        if full:
            turn(loop)
            assert calls == []
        os.close(reader)
        turn(loop)
        [(_, events)] = calls
        assert events & (WRITE if poller.name == "select" else ERROR)


def test_refused_connection_is_an_error(loop, poller):
    with socket.socket() as taken, socket.socket() as client:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        client.setblocking(False)
        calls = Recorder()
        assert client.connect_ex(taken.getsockname()) in (
            errno.EINPROGRESS,
            errno.ECONNREFUSED,
        )
        loop.add_handler(client, calls, WRITE)
        run_until(loop, lambda: calls)
        assert calls[0][1] & (WRITE if poller.name == "select" else ERROR)
        refused = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        assert refused == errno.ECONNREFUSED


def test_A17_hangup_with_no_events_asked_does_not_spin(loop):
    with pipe() as (reader, writer):
        calls = Recorder()
        loop.add_handler(reader, calls, NONE)
        os.close(writer)
        idle(loop)
        assert calls == []
        loop.update_handler(reader, READ)
        turn(loop)
        [(_, events)] = calls
        assert events & READ or events & ERROR


def test_A17_hangup_after_update_to_none_does_not_spin(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ | WRITE)
        loop.update_handler(a, NONE)
        b.close()
        idle(loop)
        assert calls == []
        assert loop.stats()["handlers"] == 1
        loop.update_handler(a, READ)
        turn(loop)
        assert calls[0][1] & READ


@contextlib.contextmanager
def hung_up(kind, order, add):
    """An fd that is added by `add(fd)` before or after its peer goes."""
    kinds = {"reader": pipe, "writer": pipe, "socket": pair, "reset": tcp_pair}
    with kinds[kind]() as (a, b):
        fd, peer = (b, a) if kind == "writer" else (a, b)
        if order == "added first":
            add(fd)
        if kind == "reset":
            peer.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        if isinstance(peer, int):
            os.close(peer)
        else:
            peer.close()
        if order == "added last":
            add(fd)
        yield fd


@pytest.mark.parametrize("order", ["added first", "added last"])
@pytest.mark.parametrize("kind", ["reader", "writer", "socket", "reset"])
def test_no_kind_of_hangup_is_heard_with_no_events_asked(loop, kind, order):
    calls = Recorder()
    with hung_up(kind, order, lambda fd: loop.add_handler(fd, calls, NONE)) as fd:
        idle(loop, 0.01)
        loop.update_handler(fd, NONE)
        idle(loop, 0.01)
        assert calls == []
        loop.update_handler(fd, WRITE if kind == "writer" else READ)
        turn(loop)
        assert calls


def test_a_hangup_with_no_events_asked_does_not_spin_in_a_child(loop):
    calls = Recorder()
    with hung_up("reader", "added first", lambda fd: loop.add_handler(fd, calls, NONE)):
        idle(loop)
        with child() as inside:
            if inside:
                loop.reinit()
                idle(loop)
                assert calls == []


def test_no_events_asked_and_then_some(loop):
    """What the poller keeps for an fd with no events never outlives them."""
    with pair() as (a, b):
        calls = Recorder()
        b.send(b"x")
        loop.add_handler(a, calls, NONE)
        for events in (READ, NONE, WRITE, NONE, READ | WRITE, NONE, READ):
            loop.update_handler(a, events)
            turn(loop, 2)
            assert calls.take() == ([(a, events)] * 2 if events else [])


def test_a_masked_handler_can_be_removed_and_added_again(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, NONE)
        loop.remove_handler(a)
        loop.add_handler(a, calls, READ)
        b.send(b"x")
        turn(loop)
        assert calls == [(a, READ)]


# -- Numbers that change hands ------------------------------------------------


@pytest.mark.parametrize("removed", [True, False], ids=["A1-removed", "A2-forgotten"])
def test_A1_A2_stale_event_after_reuse(loop, removed):
    """In one batch: the first handler closes the other fd, its number is reused."""
    with pairs(3) as [(a, a_peer), (b, b_peer), (quiet, talker)]:
        both, calls, fresh = {a.fileno(), b.fileno()}, [], Recorder()

        def handler(fd, events):
            calls.append(fd)
            os.read(fd, 9)
            [victim] = both - {fd}
            if removed:
                loop.remove_handler(victim)
            os.dup2(quiet.fileno(), victim)
            loop.add_handler(victim, fresh, READ)

        for fd in both:
            loop.add_handler(fd, handler, READ)
        a_peer.send(b"x")
        b_peer.send(b"x")
        turn(loop, 3)
        assert len(calls) == 1
        assert fresh == []
        talker.send(b"x")
        turn(loop)
        assert fresh == [((both - set(calls)).pop(), READ)]


def test_A4_update_after_the_kernel_dropped_a_closed_fd(loop):
    with pairs(2) as [(a, _), (b, b_peer)]:
        calls = Recorder()
        number = a.fileno()
        loop.add_handler(number, calls, READ)
        os.dup2(b.fileno(), number)
        loop.update_handler(number, READ)
        turn(loop)
        assert calls == []
        b_peer.send(b"x")
        turn(loop)
        assert calls == [(number, READ)]


@pytest.mark.parametrize("events", [NONE, READ])
def test_A4_add_replaces_a_registration_whose_fd_was_closed(loop, events):
    with pairs(2) as [(a, _), (b, b_peer)]:
        old, new = Recorder(), Recorder()
        number = a.fileno()
        loop.add_handler(number, old, events)
        os.dup2(b.fileno(), number)
        loop.add_handler(number, new, READ)
        b_peer.send(b"x")
        turn(loop)
        assert (old, new) == ([], [(number, READ)])
        assert loop.stats()["handlers"] == 1


def test_A4_an_updated_registration_is_a_registration(loop):
    """What update_handler() moved to the new file is not replaced by add."""
    with pairs(2) as [(a, _), (b, b_peer)]:
        first, second = Recorder(), Recorder()
        number = a.fileno()
        loop.add_handler(number, first, READ)
        os.dup2(b.fileno(), number)
        loop.update_handler(number, READ)
        with pytest.raises(FileExistsError):
            loop.add_handler(number, second, READ)
        b_peer.send(b"x")
        turn(loop)
        assert (first, second) == ([(number, READ)], [])


def test_A4_number_used_again_behind_the_loops_back(loop):
    """Nobody has told the loop: what is ready was never asked about."""
    with pairs(2) as [(a, _), (b, b_peer)]:
        calls = Recorder()
        number = a.fileno()
        loop.add_handler(number, calls, READ)
        os.dup2(b.fileno(), number)
        b_peer.send(b"x")
        turn(loop, 3)
        assert all(events & ERROR for _, events in calls)
        assert len(calls) <= 1


def test_A4_a_new_connection_on_an_old_number(loop):
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


def test_A5_add_when_the_kernel_still_knows_the_number(loop):
    """Removed while closed, so the kernel kept it; then the number came back."""
    with pair() as (a, b):
        old, new = Recorder(), Recorder()
        number, keep = os.dup(a.fileno()), os.dup(a.fileno())
        try:
            loop.add_handler(number, old, READ | WRITE)
            os.close(number)
            loop.remove_handler(number)
            os.dup2(keep, number)
            loop.add_handler(number, new, READ)
            b.send(b"x")
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


# Files that have one device and inode, so that fstat() does not tell them apart.

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


@pytest.fixture(
    params=[Eventfds, Timerfds, Signalfds, Inotifys, Pidfds, Epolls, Fifos, Ttys],
    ids=lambda kind: kind.__name__.lower()[:-1],
)
def twins(request, tmp_path):
    """Files of a kind: `open()` makes one, `wake(fd)` has it readable."""
    with contextlib.ExitStack() as stack:
        yield request.param(stack, tmp_path)


def replace(number, fd):
    """Close what has a number and put an open file there."""
    os.dup2(fd, number, inheritable=False)
    os.close(fd)


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


def test_a_number_used_again_behind_the_loops_back(loop, poller, twins):
    """The old handler hears of an ERROR at most, and nothing spins."""
    for mask in (NONE, READ, WRITE):
        calls = Recorder()
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
            assert calls == [(number, READ)]
            loop.remove_handler(number)
        finally:
            os.close(number)


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "forgotten"])
def test_a_number_used_again_by_a_file_that_looks_the_same_in_one_batch(
    loop, twins, removed
):
    """Its event has been collected already, and is the old file's."""
    numbers, calls, fresh = {twins.open(), twins.open()}, [], Recorder()

    def handler(fd, events):
        calls.append(fd)
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
        assert len(calls) == 1
        assert fresh == []
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


@pytest.mark.parametrize("first", ["close", "remove"])
def test_A3_duplicate_of_a_closed_fd_does_not_spin(loop, first, leftover_logged):
    with pairs(2) as [(a, b), (c, d)]:
        calls, others = Recorder(), Recorder()
        number, keep = os.dup(a.fileno()), os.dup(a.fileno())
        try:
            loop.add_handler(number, calls, READ)
            loop.add_handler(c, others, READ)
            steps = [os.close, loop.remove_handler]
            for step in steps if first == "close" else reversed(steps):
                step(number)
            b.send(b"x")
            idle(loop, polls=10)
            assert calls == others == []
            if first == "close":
                leftover_logged()
            d.send(b"x")
            turn(loop)
            assert others == [(c, READ)]
        finally:
            close(keep)


def test_A3_duplicate_of_a_closed_fd_whose_number_is_used_again(loop, leftover_logged):
    with pairs(2) as [(a, b), (c, d)]:
        calls, fresh = Recorder(), Recorder()
        number, keep = os.dup(a.fileno()), os.dup(a.fileno())
        try:
            loop.add_handler(number, calls, READ)
            os.close(number)
            loop.remove_handler(number)
            b.send(b"x")
            os.dup2(c.fileno(), number)
            loop.add_handler(number, fresh, READ)
            idle(loop, polls=10)
            assert calls == fresh == []
            leftover_logged()
            d.send(b"x")
            turn(loop)
            assert fresh == [(number, READ)]
        finally:
            close(number, keep)


def test_A3_closed_but_never_removed_does_not_spin(loop, leftover_logged):
    """A duplicate keeps it alive, and its handler can neither read nor know."""
    with pairs(2) as [(a, b), (c, d)]:
        others = Recorder()
        number, keep = os.dup(a.fileno()), os.dup(a.fileno())
        try:
            loop.add_handler(number, Recorder(), READ)
            loop.add_handler(c, others, READ)
            os.close(number)
            b.send(b"x")
            idle(loop, polls=100)
            leftover_logged()
            d.send(b"x")
            turn(loop)
            assert others == [(c, READ)]
            loop.remove_handler(number)
        finally:
            close(keep)


@only_epoll
def test_A3_the_new_set_has_the_number_of_the_old(loop, leftover_logged):
    """Which somebody else may poll."""
    with pairs(2) as [(a, b), (c, d)]:
        number, keep = os.dup(a.fileno()), os.dup(a.fileno())
        try:
            outer = loop.fileno()
            loop.add_handler(number, Recorder(), READ)
            loop.add_handler(c, Recorder(), READ)
            os.close(number)
            loop.remove_handler(number)
            b.send(b"x")
            turn(loop, 2)
            leftover_logged()
            assert loop.fileno() == outer
            assert not select.select([outer], [], [], 0)[0]
            d.send(b"x")
            assert select.select([outer], [], [], 10)[0]
        finally:
            close(keep)


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


def rebuild(loop, leftover_logged):
    """Have the loop build its poller anew; true if it has."""
    with pair() as (a, b):
        number, keep = os.dup(a.fileno()), os.dup(a.fileno())
        try:
            loop.add_handler(number, Recorder(), READ)
            os.close(number)
            loop.remove_handler(number)
            b.send(b"x")
            turn(loop, 2)
            leftover_logged()
        finally:
            close(keep)


@not_select
def test_an_outer_poller_notices_no_rebuild(loop, outer, leftover_logged):
    with pairs(2) as [(a, b), (c, d)]:
        calls = Recorder()
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
    loop, outer, leftover_logged
):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ | WRITE)
        rebuild(loop, leftover_logged)
        assert calls
        assert outer.ready(10)
        loop.update_handler(a, READ)
        turn(loop)
        assert not outer.ready()
        b.send(b"x")
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
def test_fileno_from_another_thread_while_the_loop_sleeps(loop):
    """Made by the first call, wherever that comes from."""
    with sleeping(loop):
        fileno = loop.fileno()
        assert in_thread(loop.fileno) == fileno
    with pair() as (a, b):
        assert not select.select([fileno], [], [], 0)[0]
        calls = Recorder()
        loop.add_handler(a, calls, READ)
        b.send(b"x")
        assert select.select([fileno], [], [], 10)[0]
        turn(loop)
        assert calls == [(a, READ)]


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
    loop, poller, leftover_logged, events
):
    """It finds a file on the number, but that is not the one it was."""
    with pairs(2) as [(a, _), (b, b_peer)]:
        calls = Recorder()
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


def test_A3_several_kernel_leftovers_at_once(loop, leftover_logged):
    """Rebuilding the set once must do for all; what is registered stays."""
    with pairs(8) as made:
        calls = Recorder()
        keep = []
        try:
            for a, b in made[:4]:
                number = os.dup(a.fileno())
                keep.append(os.dup(number))
                loop.add_handler(number, calls, READ)
                os.close(number)
                loop.remove_handler(number)
                b.send(b"x")
            for a, _ in made[4:]:
                loop.add_handler(a, calls, READ)
            idle(loop, polls=10)
            assert calls == []
            leftover_logged()
            for _, b in made[4:]:
                b.send(b"x")
            turn(loop)
            assert {fd for fd, _ in calls} == {a for a, _ in made[4:]}
        finally:
            close(*keep)


def test_A3_leftovers_again_and_again(loop, poller, expect_log):
    """The set is rebuilt at most ten times a second, and so is the log written."""
    with pairs(3) as made:
        keep = []
        try:
            for a, b in made:
                number = os.dup(a.fileno())
                keep.append(os.dup(number))
                loop.add_handler(number, Recorder(), READ)
                os.close(number)
                loop.remove_handler(number)
                b.send(b"x")
                loop.call_later(0.001, loop.stop)
                loop.start()
            loop.call_later(0.15, loop.stop)
            loop.start()
            idle(loop, polls=10)
        finally:
            close(*keep)
        assert len(expect_log) == (2 if poller.name == "epoll" else 0)
        while expect_log:
            expect_log.take("closed before remove_handler")


def test_A6_remove_never_raises(loop):
    with pair() as (a, _):
        number = os.dup(a.fileno())
        loop.remove_handler(number)
        loop.add_handler(number, Recorder(), READ)
        os.close(number)
        loop.remove_handler(number)
        loop.remove_handler(number)
        assert loop.stats()["handlers"] == 0
        turn(loop)


@pytest.mark.parametrize("events", [NONE, READ])
def test_A16_closed_fd_harms_no_other(loop, poller, events):
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


def test_A16_fd_closed_by_a_handler_of_the_same_batch(loop):
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


def test_A32_fd_closed_by_a_thread_while_the_loop_sleeps(loop):
    with pairs(2) as [(a, _), (b, b_peer)]:
        calls, others = Recorder(), Recorder()
        number = os.dup(a.fileno())
        loop.add_handler(number, calls, READ)
        loop.add_handler(b, others, READ)
        about_to_sleep = threading.Event()

        def closer():
            about_to_sleep.wait()
            os.close(number)
            b_peer.send(b"x")
            loop.add_callback(loop.stop)

        thread = threading.Thread(target=closer)
        thread.start()
        loop.add_callback(about_to_sleep.set)
        loop.start()
        thread.join()
        run_until(loop, lambda: others)
        assert others[0] == (b, READ)
        # The number goes to another file: nothing of the old registration shows.
        fresh = Recorder()
        os.dup2(b.fileno(), number)
        try:
            loop.add_handler(number, fresh, READ)
            turn(loop)
            assert fresh == [(number, READ)]
        finally:
            os.close(number)


# -- Batches ------------------------------------------------------------------


def test_A25_removing_all_others_of_the_batch(loop):
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


@pytest.mark.parametrize("mask", [NONE, WRITE])
def test_A25_update_drops_what_is_already_collected(loop, mask):
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


def test_A26_remove_and_add_again_waits_for_the_next_poll(loop):
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


def test_A23_no_ready_fd_starves(loop, poller):
    count = 900 if poller.name == "select" else 3000
    with limit(resource.RLIMIT_NOFILE, count + 100):
        fds = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(count)]
        try:
            calls = Recorder()
            for fd in fds:
                loop.add_handler(fd, calls, READ)
            turn(loop, 60)
            assert {fd for fd, _ in calls} == set(fds)
            for fd in fds:
                loop.remove_handler(fd)
        finally:
            close(*fds)


def test_A24_a_handler_may_add_thousands(loop, poller):
    count = 900 if poller.name == "select" else 3000
    with limit(resource.RLIMIT_NOFILE, count + 100), pairs(4) as made:
        fds, calls, firsts = [], Recorder(), []

        def handler(fd, events):
            firsts.append(fd)
            loop.remove_handler(fd)
            while len(fds) < len(firsts) * count // 4:
                fds.append(os.eventfd(1, os.EFD_NONBLOCK))
                loop.add_handler(fds[-1], calls, READ)

        for a, b in made:
            loop.add_handler(a, handler, READ)
            b.send(b"x")
        try:
            turn(loop)
            assert len(firsts) == 4
            assert len(fds) == count
            assert calls == []
            turn(loop, 60)
            assert {fd for fd, _ in calls} == set(fds)
            for fd in fds:
                loop.remove_handler(fd)
        finally:
            close(*fds)


def test_A24_a_handler_may_poll(loop):
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


class Boom(BaseException):
    pass


def test_D3_a_base_exception_delays_the_rest_of_the_batch(loop):
    with pairs(3) as made:
        calls = []

        def handler(fd, events):
            calls.append(fd)
            fd.recv(9)
            if len(calls) == 1:
                raise Boom

        for a, b in made:
            loop.add_handler(a, handler, READ)
            b.send(b"x")
        with pytest.raises(Boom):
            loop.start()
        assert len(calls) == 1
        turn(loop, 2)
        assert sorted(map(id, calls)) == sorted(id(a) for a, _ in made)


@only_epoll
@pytest.mark.parametrize("flag", ["_EPOLLET", "_EPOLLONESHOT"])
def test_D3_events_that_the_kernel_reports_once_are_kept(loop, flag):
    with pairs(3) as made:
        calls = []

        def handler(fd, events):
            calls.append(fd)
            if len(calls) == 1:
                raise Boom

        for a, b in made:
            loop.add_handler(a, handler, READ | getattr(loop, flag))
            b.send(b"x")
        with pytest.raises(Boom):
            loop.start()
        turn(loop, 3)
        assert sorted(map(id, calls)) == sorted(id(a) for a, _ in made)


@pytest.mark.parametrize("impl", [ioloop._EPoll, select.epoll])
@pytest.mark.parametrize("embedded", ["before", "after"])
def test_D3_kept_events_are_due_at_once(impl, embedded):
    """Also for whoever polls fileno(): the kernel knows of nothing."""
    with pairs(2) as made, ioloop.IOLoop(impl=impl()) as loop:
        calls = []

        def handler(fd, events):
            calls.append(fd)
            if len(calls) == 1:
                raise Boom

        if embedded == "before":
            loop.fileno()
        for a, b in made:
            loop.add_handler(a, handler, READ | loop._EPOLLONESHOT)
            b.send(b"x")
        with pytest.raises(Boom):
            turn(loop)
        assert loop.next_timeout() == 0
        assert select.select([loop.fileno()], [], [], 0)[0]
        turn(loop)
        assert len(calls) == 2
        assert loop.next_timeout() is None
        turn(loop)
        assert not select.select([loop.fileno()], [], [], 0)[0]


def test_D3_events_left_by_a_base_exception_are_never_stale(loop):
    with pairs(3) as [(a, a_peer), (b, b_peer), (quiet, _)]:
        both, calls, fresh = {a.fileno(), b.fileno()}, [], Recorder()

        def handler(fd, events):
            calls.append(fd)
            os.read(fd, 9)
            raise Boom

        for fd in both:
            loop.add_handler(fd, handler, READ)
        a_peer.send(b"x")
        b_peer.send(b"x")
        with pytest.raises(Boom):
            loop.start()
        [victim] = both - set(calls)
        loop.remove_handler(victim)
        os.dup2(quiet.fileno(), victim)
        loop.add_handler(victim, fresh, READ)
        turn(loop, 3)
        assert len(calls) == 1
        assert fresh == []


# -- What can't be registered -------------------------------------------------


@pytest.mark.parametrize("path", [__file__, "/"], ids=["file", "directory"])
@pytest.mark.parametrize("events", [NONE, READ, WRITE, READ | WRITE])
def test_A9_files_are_refused_alike(loop, path, events):
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(PermissionError) as refusal:
            loop.add_handler(fd, Recorder(), events)
        assert refusal.value.errno == errno.EPERM
        assert loop.stats()["handlers"] == 0
        turn(loop)
    finally:
        os.close(fd)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/dev/full"])
@pytest.mark.parametrize("poller", ["epoll", "select"], indirect=True)
@pytest.mark.parametrize("events", [NONE, READ])
def test_A9_devices_without_poll(loop, path, events):
    with open(path, "rb") as device, pytest.raises(PermissionError, match="device"):
        loop.add_handler(device, Recorder(), events)
    assert loop.stats()["handlers"] == 0
    turn(loop)


def test_A9_the_refusal_of_a_regular_file_says_what_to_do(loop):
    with open(__file__, "rb") as file, pytest.raises(PermissionError) as refusal:
        loop.add_handler(file, Recorder(), READ)
    assert re_words(str(refusal.value)) & {"thread", "threads", "ready", "read"}


def test_A9_a_regular_file_on_the_number_of_a_lost_registration(loop):
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


def re_words(text):
    return set("".join(c if c.isalpha() else " " for c in text.lower()).split())


@pytest.mark.parametrize("events", [NONE, READ, WRITE, READ | WRITE])
def test_A8_closed_fd_leaves_no_entry(loop, events):
    number = free_number()
    with pytest.raises(OSError) as refusal:
        loop.add_handler(number, Recorder(), events)
    assert refusal.value.errno == errno.EBADF
    assert loop.stats()["handlers"] == 0
    with pytest.raises(FileNotFoundError):
        loop.update_handler(number, READ)
    with pair() as (a, b):
        os.dup2(a.fileno(), number)
        calls = Recorder()
        try:
            loop.add_handler(number, calls, READ)
            b.send(b"x")
            turn(loop)
        finally:
            os.close(number)
        assert calls == [(number, READ)]


def test_A8_update_of_a_closed_fd_changes_nothing(loop):
    """The old mask holds when the same file is back on the number."""
    with pair() as (a, b):
        calls = Recorder()
        number = os.dup(a.fileno())
        loop.add_handler(number, calls, READ)
        os.close(number)
        with pytest.raises(OSError) as refusal:
            loop.update_handler(number, WRITE)
        assert refusal.value.errno == errno.EBADF
        assert loop.stats()["handlers"] == 1
        os.dup2(a.fileno(), number)
        b.send(b"x")
        try:
            loop.update_handler(number, READ)
            turn(loop)
        finally:
            os.close(number)
        assert (number, READ) in calls


@not_select
def test_A10_the_loop_can_not_watch_itself(loop):
    with pytest.raises(OSError) as refusal:
        loop.add_handler(loop.fileno(), Recorder(), READ)
    assert refusal.value.errno in (errno.ELOOP, errno.EINVAL)
    assert loop.stats()["handlers"] == 0
    turn(loop)


@only_epoll
def test_A10_loops_that_watch_each_other(make_loop):
    a, b = make_loop(), make_loop(impl=None)
    a.add_handler(b.fileno(), Recorder(), READ)
    with pytest.raises(OSError) as refusal:
        b.add_handler(a.fileno(), Recorder(), READ)
    assert refusal.value.errno in (errno.ELOOP, errno.EINVAL)
    assert (a.stats()["handlers"], b.stats()["handlers"]) == (1, 0)
    turn(b)


@not_select
def test_A10_a_loop_in_a_loop(make_loop, poller):
    outer, inner = make_loop(), make_loop(impl=poller.impl())
    with pair() as (a, b):
        calls = Recorder()
        inner.add_handler(a, calls, READ)
        outer.add_handler(inner.fileno(), lambda *_: inner.run_once(0), READ)
        turn(outer)
        assert calls == []
        b.send(b"x")
        turn(outer)
        assert calls == [(a, READ)]


@only_select
def test_select_has_no_fileno(loop):
    with pytest.raises(io.UnsupportedOperation):
        loop.fileno()


@not_select
def test_fileno_is_an_open_descriptor(loop):
    assert stat.S_IFMT(os.fstat(loop.fileno()).st_mode) == 0  # an anonymous inode


def test_A14_memory_does_not_follow_the_number(loop, poller):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    number = min(100_000, hard - 1)
    with pytest.raises(ValueError if poller.name == "select" else OSError):
        loop.add_handler(2**31 - 1, Recorder(), READ)
    with pair() as (a, b), limit(resource.RLIMIT_NOFILE, number + 1):
        os.dup2(a.fileno(), number)
        try:
            calls = Recorder()
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


@pytest.mark.parametrize("number", [FD_SETSIZE - 1, FD_SETSIZE, 2000, 4000])
@pytest.mark.parametrize("events", [NONE, READ, READ | WRITE])
def test_A15_numbers_around_fd_setsize(loop, poller, number, events):
    with limit(resource.RLIMIT_NOFILE, 4096), pair() as (a, b):
        os.dup2(a.fileno(), number)
        calls = Recorder()
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


@pytest.mark.parametrize("code", ["EBADF", "ENOSPC", "ENOMEM"])
def test_A7_A11_A12_epoll_ctl_fails(seccomp, code):
    run_python(
        f"""
        import errno, helpers, os, socket
        loop = ioloop.IOLoop(ioloop._EPoll())
        a, b = socket.socketpair()
        calls = []
        loop.add_handler(a, lambda *call: calls.append(call), loop.READ)
        helpers.deny("epoll_ctl", errno.{code})
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


def test_A28_all_descriptors_are_close_on_exec(poller, counted_files):
    with poller.module.IOLoop(poller.impl()) as loop:
        turn(loop)
        assert len(counted_files()) == 3  # the doorbell's two, a set or a witness
        if poller.name != "select":
            loop.fileno()
            assert len(counted_files()) == 4
        for fd in counted_files():
            assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert not counted_files()


def test_A29_close_on_exec_from_birth(seccomp):
    """No window for a fork in another thread: FD_CLOEXEC is never set after."""
    run_python(
        """
        import errno, fcntl, helpers
        helpers.deny("fcntl", errno.EPERM, second=fcntl.F_SETFD)
        for impl in (ioloop._EPoll, ioloop._Select):
            ioloop.IOLoop(impl()).close()
        """
    )


@pytest.mark.parametrize("closed", [(0, 1, 2), (1, 2), (2,), (1,), (0,)])
def test_A30_never_on_the_numbers_of_stdio(poller, closed):
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


@pytest.mark.parametrize("spare", range(4))
def test_A33_construction_is_all_or_nothing(poller, counted_files, spare):
    with nothing_free(spare):
        if spare == 3:
            poller.module.IOLoop(poller.impl()).close()
        else:
            with pytest.raises(OSError) as refusal:
                poller.module.IOLoop(poller.impl())
            assert refusal.value.errno == errno.EMFILE
    assert not counted_files()


@pytest.mark.parametrize("name", ["epoll_create1", "pipe2"])
def test_A33_construction_fails_cleanly_on_a_missing_call(seccomp, name):
    run_python(
        f"""
        import errno, gc, helpers, os
        before = os.listdir("/proc/self/fd")
        helpers.deny({name!r}, errno.ENOSYS)
        for _ in range(10):
            try:
                ioloop.IOLoop(ioloop._EPoll())
            except OSError as error:
                assert error.errno == errno.ENOSYS
            else:
                raise SystemExit("no error")
        gc.collect()
        assert os.listdir("/proc/self/fd") == before
        """
    )


@pytest.mark.parametrize("code", ["ENOSYS", "EPERM"])
def test_A34_epoll_pwait2_is_missing(seccomp, code):
    """An old kernel or a sandbox: the timeout is rounded up to milliseconds."""
    run_python(
        f"""
        import errno, helpers, socket, time
        helpers.deny("epoll_pwait2", errno.{code})
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


@only_epoll
def test_A35_the_pollers_fd_closed_by_the_user(poller, counted_files):
    with poller.module.IOLoop(poller.impl()) as loop:
        [handle] = [fd for fd, name in counted_files().items() if "eventpoll" in name]
        loop.add_callback(os.close, handle)
        with pytest.raises(OSError) as error:
            loop.start()
        assert error.value.errno == errno.EBADF
        assert not loop.running()


@not_select
def test_fileno_closed_by_the_user_does_not_end_the_loop(loop):
    """It is there for others: the loop goes on."""
    os.close(loop.fileno())
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ)
        b.send(b"x")
        turn(loop)
        assert calls == [(a, READ)]


@not_select
def test_no_room_for_fileno(poller, counted_files):
    """It fails, the loop does not, and the next call makes it."""
    with pair() as (a, b), poller.module.IOLoop(poller.impl()) as loop:
        calls = Recorder()
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


def test_F1_adding_and_removing_leaks_nothing(loop, counted_files):
    with pair() as (a, _):
        before = counted_files()
        for events in (NONE, READ, WRITE, READ | WRITE) * 50:
            loop.add_handler(a, Recorder(), events)
            turn(loop)
            loop.remove_handler(a)
        assert counted_files() == before


def test_B18_a_child_leaves_the_parents_poller_alone(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ)
        with child() as inside:
            if inside:
                for call in (
                    lambda: turn(loop),
                    lambda: loop.remove_handler(a),
                    lambda: loop.update_handler(a, NONE),
                    lambda: loop.add_handler(b, calls, READ),
                ):
                    with pytest.raises(RuntimeError, match=r"fork.*reinit\(\)"):
                        call()
                loop.close()
        b.send(b"x")
        turn(loop)
        assert calls == [(a, READ)]


def test_B18_reinit_keeps_the_handlers(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ)
        loop.add_handler(b, calls, NONE)
        with child() as inside:
            if inside:
                loop.reinit()
                b.send(b"x")
                turn(loop)
                assert calls == [(a, READ)]
                loop.update_handler(b, WRITE)
                loop.remove_handler(a)
                turn(loop)
                assert calls == [(a, READ), (b, WRITE)]
                loop.close()
        assert loop.stats()["handlers"] == 2
        turn(loop)
        assert calls == [(a, READ)]


def test_A12_no_memory(poller):
    """Every allocation of the three calls fails once: error or success, no crash."""
    poller.run(
        """
        import socket
        try:
            from _testcapi import remove_mem_hooks, set_nomemory
        except ImportError:
            raise SystemExit
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

size_t refused;

void *realloc(void *p, size_t n) {
    static void *(*real)(void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "realloc");
    return refused && n == refused ? NULL : real(p, n);
}
"""


def test_F15_no_memory_for_a_larger_batch(tmp_path):
    """What there was room for is delivered: the kernel reports it only once."""
    source = tmp_path / "no_room.c"
    source.write_text(NO_ROOM)
    run_python(
        """
        import ctypes, os, platform
        refused = ctypes.c_size_t.in_dll(ctypes.CDLL(None), "refused")
        calls = []
        with ioloop.IOLoop(ioloop._EPoll()) as loop:
            fds = [os.eventfd(1) for _ in range(300)]
            for fd in fds:
                loop.add_handler(fd, lambda fd, _: calls.append(fd), 1 | 1 << 30)
            refused.value = 2 * 256 * (12 if platform.machine() == "x86_64" else 16)
            for _ in range(3):
                loop.run_once(0)
        assert sorted(calls) == fds
        """,
        LD_PRELOAD=str(compile_library(source, tmp_path / "no_room.so")),
    )


# -- epoll's own flags --------------------------------------------------------


@only_epoll
def test_rdhup_for_those_who_ask(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ | loop._EPOLLRDHUP)
        b.shutdown(socket.SHUT_WR)
        turn(loop)
        assert calls == [(a, READ | loop._EPOLLRDHUP)]


def test_rdhup_is_no_error_where_it_is_unknown(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ | loop._EPOLLRDHUP)
        b.send(b"x")
        turn(loop)
        assert calls == [(a, READ)]


@only_epoll
def test_urgent_data_for_those_who_ask(loop):
    with tcp_pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, loop._EPOLLPRI)
        b.send(b"!", socket.MSG_OOB)
        run_until(loop, lambda: calls)
        assert calls == [(a, loop._EPOLLPRI)]


@only_epoll
def test_oneshot(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ | loop._EPOLLONESHOT)
        b.send(b"x")
        turn(loop, 3)
        assert calls.take() == [(a, READ)]
        loop.update_handler(a, READ | loop._EPOLLONESHOT)
        turn(loop, 3)
        assert calls == [(a, READ)]


@pytest.fixture(params=["rebuild", "reinit", "rebuild and reinit"])
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


@only_epoll
@pytest.mark.parametrize("mask", [READ, WRITE, READ | WRITE, ERROR])
def test_oneshot_that_has_fired_stays_fired_in_a_new_set(loop, anew, mask):
    """Until update_handler() arms it again."""
    with pipe() as (reader, writer):
        fd = writer if mask == WRITE else reader
        calls = Recorder()
        loop.add_handler(fd, calls, mask | loop._EPOLLONESHOT)
        if mask == ERROR:
            os.close(writer)
        else:
            os.write(writer, b"x")
        turn(loop, 2)
        assert len(calls.take()) == 1
        with anew() as inside:
            if inside:
                idle(loop, 0.01)
                assert calls == []
                loop.update_handler(fd, mask | loop._EPOLLONESHOT)
                turn(loop, 3)
                assert len(calls) == 1


@only_epoll
def test_oneshot_that_has_not_fired_fires_once_in_a_new_set(loop, anew):
    with pairs(3) as [(a, a_peer), (b, b_peer), (c, c_peer)]:
        calls = Recorder()
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
def test_oneshot_that_has_fired_is_fired_in_each_new_set(loop, leftover_logged):
    """Whatever else is changed meanwhile."""
    with pairs(2) as [(a, a_peer), (b, b_peer)]:
        calls = Recorder()
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


@only_epoll
@pytest.mark.parametrize("flag", ["_EPOLLONESHOT", "_EPOLLET"])
def test_oneshot_events_that_are_kept_are_told_once_in_a_child_too(loop, flag):
    """Not delivered because of a BaseException: they have fired, and are due."""
    with pairs(3) as made:
        calls = []

        def handler(fd, events):
            calls.append(fd)
            fd.recv(9)
            if len(calls) == 1:
                raise Boom

        for a, b in made:
            loop.add_handler(a, handler, READ | getattr(loop, flag))
            b.send(b"x")
        with pytest.raises(Boom):
            loop.start()
        with child() as inside:
            if inside:
                loop.reinit()
                turn(loop, 3)
                assert sorted(map(id, calls)) == sorted(id(a) for a, _ in made)
        assert len(calls) == 1


@only_epoll
def test_oneshot_event_that_is_kept_leaves_it_fired(loop, leftover_logged):
    """Nobody reads: told once all the same, also when the set is built anew."""
    with pairs(3) as made:
        calls = []

        def handler(fd, events):
            calls.append(fd)
            if len(calls) == 1:
                raise Boom

        for a, b in made:
            loop.add_handler(a, handler, READ | loop._EPOLLONESHOT)
            b.send(b"x")
        with pytest.raises(Boom):
            loop.start()
        with child() as inside:
            if inside:
                loop.reinit()
                turn(loop, 3)
                assert sorted(map(id, calls)) == sorted(id(a) for a, _ in made)
        rebuild(loop, leftover_logged)
        turn(loop, 3)
        assert sorted(map(id, calls)) == sorted(id(a) for a, _ in made)


@only_epoll
def test_edge_triggered(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ | loop._EPOLLET)
        b.send(b"x")
        turn(loop, 3)
        assert calls.take() == [(a, READ)]
        b.send(b"x")
        turn(loop, 3)
        assert calls == [(a, READ)]


@only_epoll
def test_error_alone_sees_a_hangup(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, ERROR)
        b.send(b"x")
        turn(loop)
        assert calls == []
        b.close()
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


def test_a_subclass_that_overrides_nothing_is_the_poller_that_it_is(make_loop, poller):
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
        calls = Recorder()
        loop.add_handler(a, calls, READ)
        b.send(b"x")
        turn(loop, 2)
        assert calls == [(a, READ)] * 2
    assert loop._impl.name == "mine"
    loop.close()
    assert closed == ["mine"]


@pytest.mark.parametrize("name", ["register", "modify", "unregister", "poll"])
def test_a_subclass_that_overrides_a_method_has_it_called(make_loop, poller, name):
    log = []

    def method(self, *args):
        log.append(args)
        return getattr(poller.impl, name)(self, *args)

    logging = type("Logging", (poller.impl,), {name: method})
    loop = make_loop(impl=type("Further", (logging,), {})())
    with pair() as (a, b):
        calls = Recorder()
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
