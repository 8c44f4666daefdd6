"""_KQueue where only kqueue can go wrong, on the fake of fake_kqueue.h, and the
fake itself where the tests lean on it.  What all pollers share is elsewhere."""

import ctypes
import errno
import os
import signal
import socket

import pytest
import test_pollers
from building import HERE, compile_library
from fakes import ERROR, NONE, READ, WRITE, Recorder, idle, turn
from kernel import alarm, close, pairs
from processes import child

import ioloop

pytestmark = pytest.mark.parametrize("poller", ["kqueue"], indirect=True)

# Fixtures, as there.
sockets, sock, peer = test_pollers.sockets, test_pollers.sock, test_pollers.peer
calls = test_pollers.calls


@pytest.fixture
def fail_add(poller):
    """A function: the n-th EV_ADD from now on fails with `error`."""
    fault = (ctypes.c_int * 2).in_dll(
        ctypes.CDLL(poller.module.__file__), "fake_kqueue_fault"
    )

    def fail(n, error):
        fault[0], fault[1] = n, error

    yield fail
    left, fault[0] = fault[0], 0
    assert left <= 0, "the fault was not used"


def test_the_fake_is_no_part_of_the_module(poller):
    """Inert where there is no kqueue, and after epoll where there are both."""
    with pytest.raises(OSError) as error:
        ioloop.IOLoop(ioloop._KQueue())
    assert error.value.errno == errno.ENOSYS
    assert poller.module is not ioloop
    assert poller.module._poll is poller.module._EPoll


FAKE = """
#include <Python.h>
#include "fake_kqueue.h"

int make_queue(void) { return kqueue(); }

int change(int kq, int fd, short filter, unsigned short flags)
{
    struct kevent change;
    EV_SET(&change, fd, filter, flags, 0, 0, NULL);
    return kevent(kq, &change, 1, NULL, 0, NULL) < 0 ? errno : 0;
}

int ready(int kq, int *fds)
{
    struct kevent events[8];
    struct timespec now = {0, 0};
    int i, n = kevent(kq, NULL, 0, events, 8, &now);
    for (i = 0; i < n; i++)
        fds[i] = events[i].ident;
    return n;
}
"""
EV_READ, EV_WRITE = -1, -2
ADD, DELETE, ENABLE, DISABLE = 1, 2, 4, 8


@pytest.fixture(scope="session")
def fake(tmp_path_factory):
    """The fake by itself: make_queue(), change(...) and ready(...)."""
    source = tmp_path_factory.mktemp("fake") / "fake.c"
    source.write_text(FAKE)
    header = HERE / "fake_kqueue.h"
    library = compile_library(source, f"-I{HERE}", depends=[header])
    return ctypes.CDLL(str(library))


class Queue:
    def __init__(self, fake):
        self.fake, self.number = fake, fake.make_queue()

    def change(self, fd, which, flags):
        """Make a change to a filter; 0 or an errno."""
        return self.fake.change(self.number, fd, which, flags)

    def ready(self):
        """The fds that have events."""
        fds = (ctypes.c_int * 8)()
        return fds[: self.fake.ready(self.number, fds)]


@pytest.fixture
def queues(fake, poller):
    """Two queues of the fake."""
    made = [Queue(fake), Queue(fake)]
    yield made
    close(*(queue.number for queue in made))


@pytest.fixture
def queue(queues):
    return queues[0]


def test_the_fake_enables_and_disables_as_bsd(queue, sock, peer):
    """Adding a filter that is there changes nothing of that."""
    peer.send(b"x")
    fd = sock.fileno()
    assert queue.change(fd, EV_READ, ENABLE) == errno.ENOENT
    for flags, ready in (
        (ADD, [fd]),
        (DISABLE, []),
        (ADD, []),
        (ENABLE, [fd]),
        (ADD | DISABLE, []),
        (ADD | ENABLE, [fd]),
        (ADD, [fd]),
    ):
        assert queue.change(fd, EV_READ, flags) == 0
        assert queue.ready() == ready
    assert queue.change(fd, EV_READ, DELETE) == 0
    assert queue.change(fd, EV_READ, DISABLE) == errno.ENOENT
    assert queue.change(fd, EV_READ, ADD | DISABLE) == 0
    assert queue.change(fd, EV_WRITE, DELETE) == errno.ENOENT
    assert queue.ready() == []


@pytest.mark.parametrize("flags", [ADD, ADD | DISABLE])
def test_the_fake_drops_the_filters_of_a_closed_file(queue, flags):
    """Also of those that have one inode, and where the old one comes back."""
    a, b = os.eventfd(0), os.eventfd(1)
    number = os.dup(a)
    try:
        assert queue.change(number, EV_READ, flags) == 0
        assert queue.change(number, EV_READ, DISABLE) == 0
        os.dup2(b, number)
        assert queue.change(number, EV_READ, ENABLE) == errno.ENOENT
        assert queue.ready() == []
        assert queue.change(number, EV_READ, ADD) == 0
        assert queue.ready() == [number]
        os.dup2(a, number)
        os.eventfd_write(a, 1)
        assert queue.change(number, EV_READ, ENABLE) == errno.ENOENT
        assert queue.ready() == []
        assert queue.change(number, EV_READ, ADD) == 0
        os.close(number)
        assert queue.ready() == []
        assert queue.change(number, EV_READ, ENABLE) == errno.EBADF
    finally:
        close(a, b, number)


def test_the_fake_keeps_queues_apart(queues):
    """What one forgets the other has still; what is closed is lost to both."""
    queue, other = queues
    a, b = os.eventfd(1), os.eventfd(1)
    number = os.dup(a)
    try:
        assert other.change(number, EV_READ, ADD) == 0
        assert queue.change(number, EV_READ, ADD) == 0
        assert queue.change(number, EV_READ, DELETE) == 0
        assert other.change(number, EV_READ, ENABLE) == 0
        os.dup2(b, number)
        assert queue.change(number, EV_READ, ADD) == 0
        os.dup2(a, number)
        assert other.change(number, EV_READ, ENABLE) == errno.ENOENT
        assert queue.ready() == []
    finally:
        close(a, b, number)


# -- Events -------------------------------------------------------------------


@pytest.mark.row("A20")
def test_eof_with_unread_data_is_read(loop, sock, peer, calls):
    loop.add_handler(sock, calls, READ | WRITE)
    peer.send(b"abc")
    peer.shutdown(socket.SHUT_WR)
    turn(loop)
    assert calls.take() == [(sock, READ | WRITE)]
    assert sock.recv(9) == b"abc"
    turn(loop)
    assert calls == [(sock, READ | WRITE)]
    assert sock.recv(9) == b""


@pytest.mark.row("A20")
@pytest.mark.parametrize("asked", [READ, WRITE, READ | WRITE])
def test_eof_of_each_filter_asked_for(loop, sock, peer, calls, asked):
    """The peer has gone for good: READ for what is left, ERROR for the writer."""
    loop.add_handler(sock, calls, asked)
    peer.send(b"abc")
    peer.close()
    turn(loop)
    [(_, events)] = calls
    assert bool(events & READ) == bool(asked & READ)
    assert bool(events & ERROR) == bool(asked & WRITE)
    assert sock.recv(9) == b"abc"


@pytest.mark.row("A22")
def test_removed_between_its_two_events(loop, sock, peer):
    calls = []

    def handler(fd, events):
        calls.append(events)
        loop.remove_handler(fd)

    loop.add_handler(sock, handler, READ | WRITE)
    peer.send(b"x")
    turn(loop, 3)
    assert calls == [READ | WRITE]


@pytest.mark.row("A22")
def test_merged_also_when_the_two_come_apart(loop, calls):
    """More filters ready than a poll can answer: no call twice in one batch."""
    count = 300
    fds = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(count)]
    try:
        for fd in fds:
            loop.add_handler(fd, calls, READ | WRITE)
        seen = dict.fromkeys(fds, 0)
        for _ in range(20):
            turn(loop)
            batch = calls.take()
            assert len({fd for fd, _ in batch}) == len(batch)
            for fd, events in batch:
                seen[fd] |= events
        assert set(seen.values()) == {READ | WRITE}
    finally:
        for fd in fds:
            loop.remove_handler(fd)
        close(*fds)


# -- Changes ------------------------------------------------------------------


@pytest.mark.row("A21")
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("code", ["ENOMEM", "ENOSPC"])
def test_add_is_all_or_nothing(loop, fail_add, n, code, sock, peer):
    error = getattr(errno, code)
    old, new = Recorder(), Recorder()
    fail_add(n, error)
    with pytest.raises(OSError) as refusal:
        loop.add_handler(sock, old, READ | WRITE)
    assert refusal.value.errno == error
    assert loop.stats()["handlers"] == 0
    peer.send(b"x")
    idle(loop)  # the half that was applied must be gone, or it spins
    loop.add_handler(sock, new, READ)
    turn(loop)
    assert (old, new) == ([], [(sock, READ)])


@pytest.mark.row("A21")
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("before", [NONE, READ, WRITE])
def test_update_is_all_or_nothing(loop, fail_add, before, n, sock, peer, calls):
    loop.add_handler(sock, calls, before)
    fail_add(n, errno.ENOMEM)
    with pytest.raises(OSError):
        loop.update_handler(sock, READ | WRITE)
    peer.send(b"x")
    turn(loop)
    assert calls == ([(sock, before)] if before else [])
    if not before:
        idle(loop, 0.01)
    calls.clear()
    loop.update_handler(sock, READ | WRITE)
    turn(loop)
    assert calls == [(sock, READ | WRITE)]


@pytest.mark.row("A21")
def test_delete_after_auto_removal(loop, calls):
    """The kernel has dropped the filters: ENOENT and EBADF are no news."""
    with pairs(2) as [(a, _), (b, b_peer)]:
        for events in (READ, WRITE, READ | WRITE):
            number = os.dup(a.fileno())
            loop.add_handler(number, Recorder(), events)
            os.close(number)
            loop.remove_handler(number)  # EBADF
            os.dup2(b.fileno(), number)
            loop.add_handler(number, Recorder(), events)
            os.dup2(a.fileno(), number)
            loop.remove_handler(number)  # ENOENT
            os.close(number)
        assert loop.stats()["handlers"] == 0
        loop.add_handler(b, calls, READ)
        b_peer.send(b"x")
        turn(loop)
        assert calls == [(b, READ)]


@pytest.mark.row("A21")
def test_a_signal_in_the_wait_loses_no_change(loop, sock, peer, calls):
    """EINTR comes after the changes were applied; the wait goes on."""
    signals = []

    def on_signal(*_):
        signals.append("signal")
        if len(signals) == 3:
            signal.setitimer(signal.ITIMER_REAL, 0)
            peer.send(b"x")

    with alarm(0.002, on_signal, interval=0.002):
        loop.add_handler(sock, lambda *call: (calls(*call), loop.stop()), READ)
        loop.start()
    assert calls == [(sock, READ)]
    assert len(signals) == 3


@pytest.mark.parametrize("events", [READ, WRITE, READ | WRITE])
def test_no_events_asked_and_then_an_add_that_fails(
    loop, fail_add, events, sock, peer, calls
):
    """What stands for no events is as quiet after it as before."""
    peer.send(b"x")
    loop.add_handler(sock, calls, events)
    loop.update_handler(sock, NONE)
    fail_add(1, errno.ENOMEM)
    with pytest.raises(OSError):
        loop.update_handler(sock, events)
    peer.close()
    idle(loop, 0.01)
    assert calls == []
    with pytest.raises(FileExistsError):
        loop.add_handler(sock, calls, events)


# -- The queue ----------------------------------------------------------------


@pytest.mark.row("B18")
def test_the_queue_is_not_inherited(loop, sock, peer, calls):
    """In the child its number may belong to somebody else by now."""
    loop.add_handler(sock, calls, READ)
    queue = loop.fileno()
    with child() as inside:
        if inside:
            with pytest.raises(OSError):
                os.fstat(queue)
            theirs = os.dup2(peer.fileno(), queue)
            loop.close()
            os.fstat(theirs)
            os.write(theirs, b"from the child")
    turn(loop)
    assert calls == [(sock, READ)]
    assert sock.recv(99) == b"from the child"
