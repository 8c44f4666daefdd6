"""_KQueue where only kqueue can go wrong, on the fake of fake_kqueue.h, and the
fake itself where the tests lean on it.  What all pollers share is elsewhere."""

import ctypes
import errno
import fcntl
import os
import select
import signal
import socket

import pytest
from helpers import (
    ERROR,
    NONE,
    READ,
    WRITE,
    Recorder,
    child,
    close,
    idle,
    pair,
    pairs,
    pipe,
    turn,
)

import ioloop

pytestmark = pytest.mark.parametrize("poller", ["kqueue"], indirect=True)


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


# -- Events -------------------------------------------------------------------


def test_A20_eof_with_unread_data_is_read(loop):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ | WRITE)
        b.send(b"abc")
        b.shutdown(socket.SHUT_WR)
        turn(loop)
        assert calls.take() == [(a, READ | WRITE)]
        assert a.recv(9) == b"abc"
        turn(loop)
        assert calls == [(a, READ | WRITE)]
        assert a.recv(9) == b""


def test_A20_eof_of_both_filters(loop):
    """The peer has gone for good: READ for what is left, ERROR for the writer."""
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ | WRITE)
        b.send(b"abc")
        b.close()
        turn(loop)
        [(_, events)] = calls
        assert events & READ
        assert events & ERROR
        assert a.recv(9) == b"abc"


@pytest.mark.parametrize("asked", [READ, WRITE])
def test_A20_eof_of_the_one_filter_asked_for(loop, asked):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, asked)
        b.close()
        turn(loop)
        [(_, events)] = calls
        assert events & (READ if asked == READ else ERROR)


def test_A22_two_filters_one_call(loop):
    with pairs(20) as made:
        calls = Recorder()
        for a, b in made:
            loop.add_handler(a, calls, READ | WRITE)
            b.send(b"x")
        turn(loop)
        assert len(calls) == 20
        assert {events for _, events in calls} == {READ | WRITE}


def test_A22_removed_between_its_two_events(loop):
    with pair() as (a, b):
        calls = []

        def handler(fd, events):
            calls.append(events)
            loop.remove_handler(fd)

        loop.add_handler(a, handler, READ | WRITE)
        b.send(b"x")
        turn(loop, 3)
        assert calls == [READ | WRITE]


def test_A22_merged_also_when_the_two_come_apart(loop):
    """More filters ready than a poll can answer: no call twice in one batch."""
    count = 300
    fds = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(count)]
    try:
        calls = Recorder()
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


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("code", ["ENOMEM", "ENOSPC"])
def test_A21_add_is_all_or_nothing(loop, fail_add, n, code):
    error = getattr(errno, code)
    with pair() as (a, b):
        old, new = Recorder(), Recorder()
        fail_add(n, error)
        with pytest.raises(OSError) as refusal:
            loop.add_handler(a, old, READ | WRITE)
        assert refusal.value.errno == error
        assert loop.stats()["handlers"] == 0
        b.send(b"x")
        idle(loop)  # the half that was applied must be gone, or it spins
        loop.add_handler(a, new, READ)
        turn(loop)
        assert (old, new) == ([], [(a, READ)])


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("before", [NONE, READ, WRITE])
def test_A21_update_is_all_or_nothing(loop, fail_add, before, n):
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, before)
        fail_add(n, errno.ENOMEM)
        with pytest.raises(OSError):
            loop.update_handler(a, READ | WRITE)
        b.send(b"x")
        turn(loop)
        assert calls == ([(a, before)] if before else [])
        calls.clear()
        loop.update_handler(a, READ | WRITE)
        turn(loop)
        assert calls == [(a, READ | WRITE)]


def test_A21_delete_after_auto_removal(loop):
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
        calls = Recorder()
        loop.add_handler(b, calls, READ)
        b_peer.send(b"x")
        turn(loop)
        assert calls == [(b, READ)]


@pytest.mark.parametrize("after", [READ, WRITE, READ | WRITE])
def test_A21_update_after_auto_removal(loop, after):
    with pairs(2) as [(a, _), (b, b_peer)]:
        calls = Recorder()
        number = a.fileno()
        loop.add_handler(number, calls, READ | WRITE)
        os.dup2(b.fileno(), number)
        b_peer.send(b"x")
        loop.update_handler(number, after)
        turn(loop)
        assert calls == [(number, after)]


def test_A21_a_signal_in_the_wait_loses_no_change(loop):
    """EINTR comes after the changes were applied; the wait goes on."""
    with pair() as (a, b):
        calls, signals = Recorder(), []

        def on_signal(*_):
            signals.append("signal")
            if len(signals) == 3:
                signal.setitimer(signal.ITIMER_REAL, 0)
                b.send(b"x")

        before = signal.signal(signal.SIGALRM, on_signal)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
            loop.add_handler(a, lambda *call: (calls(*call), loop.stop()), READ)
            loop.start()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert calls == [(a, READ)]
        assert len(signals) == 3


def test_write_end_of_a_pipe_closed_before_it_is_added(loop):
    with pipe() as (reader, writer):
        os.close(reader)
        calls = Recorder()
        loop.add_handler(writer, calls, WRITE)
        turn(loop)
        assert calls[0][1] & ERROR


# -- The queue ----------------------------------------------------------------


def test_A28_close_on_exec_which_the_kernel_does_not_set(loop):
    assert fcntl.fcntl(loop.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_fileno_polls_as_readable(loop):
    with pair() as (a, b):
        loop.add_handler(a, lambda fd, events: fd.recv(9), READ)
        queue = loop.fileno()
        turn(loop)
        assert select.select([queue], [], [], 0)[0] == []
        b.send(b"x")
        assert select.select([queue], [], [], 0)[0] == [queue]
        turn(loop)
        assert select.select([queue], [], [], 0)[0] == []


def test_B18_the_queue_is_not_inherited(loop):
    """In the child its number may belong to somebody else by now."""
    with pair() as (a, b):
        calls = Recorder()
        loop.add_handler(a, calls, READ)
        queue = loop.fileno()
        with child() as inside:
            if inside:
                with pytest.raises(OSError):
                    os.fstat(queue)
                theirs = os.dup2(b.fileno(), queue)
                loop.close()
                os.fstat(theirs)
                os.write(theirs, b"from the child")
        turn(loop)
        assert calls == [(a, READ)]
        assert a.recv(99) == b"from the child"


def test_B18_reinit_leaves_the_old_number_alone(loop):
    with pair() as (_, b):
        queue = loop.fileno()
        with child() as inside:
            if inside:
                theirs = os.dup2(b.fileno(), queue)
                loop.reinit()
                assert loop.fileno() != queue
                os.fstat(theirs)
                loop.close()
                os.fstat(theirs)
