"""Exceptions: one hook for all, EPIPE, what is no Exception, and hostile objects."""

import errno
import gc
import logging
import os
import sys
import weakref

import pytest
from helpers import READ, WRITE, Recorder, ScriptedPoller, pair, pairs, turn
from support import Exit, Hostile, Thread, fail, readable, wait_until

import ioloop

BASE = [Exit, KeyboardInterrupt, SystemExit]


def in_callback(loop, function):
    loop.add_callback(function)


def in_timeout(loop, function):
    loop.call_later(0, function)


def in_handler(loop, function):
    def handler(fd, events):
        loop.remove_handler(fd)
        return function()

    loop.add_handler(loop.sock, handler, READ)


@pytest.fixture(params=[in_callback, in_timeout, in_handler])
def where(loop, request):
    """Each way to have a function called by the loop."""
    with readable() as (loop.sock, _):
        yield lambda function: request.param(loop, function)
        if hasattr(loop, "sock"):
            del loop.sock


# -- The hook ------------------------------------------------------------------


def test_default_hook_logs(loop, where, expect_log):
    where(lambda: fail(ZeroDivisionError("what")))
    turn(loop)
    record = expect_log.take("^Exception in callback <function", ZeroDivisionError)
    assert (record.name, record.levelno) == ("ioloop", logging.ERROR)
    assert "what" in str(record.exc_info[1])


def test_hook_of_a_subclass(make_loop, poller):
    class Sub(poller.module.IOLoop):
        def handle_callback_exception(self, callback):
            seen.append((callback, sys.exc_info()[0]))

    seen = []
    loop = make_loop(Sub)
    with readable() as (a, _):

        def handler(fd, events):
            raise KeyError

        def raises():
            raise ValueError

        loop.add_handler(a, handler, READ)
        loop.add_callback(raises)
        loop.call_later(0, raises)
        turn(loop)
        loop.remove_handler(a)
    assert seen == [(raises, ValueError)] * 2 + [(handler, KeyError)]


def test_hook_of_an_instance(loop, where):
    seen = []
    loop.handle_callback_exception = lambda callback: seen.append(sys.exc_info()[0])
    where(fail)
    turn(loop)
    del loop.handle_callback_exception
    assert seen == [ValueError]


def test_the_hook_gets_what_the_user_passed(loop):
    """Also with arguments and keywords."""
    seen = []
    loop.handle_callback_exception = seen.append

    def raises(*args, **kwargs):
        raise ValueError

    loop.add_callback(raises, 1, a=2)
    loop.call_later(0, raises, 1, a=2)
    loop.spawn_callback(raises, a=2)
    turn(loop)
    del loop.handle_callback_exception
    assert seen == [raises] * 3


def test_no_exception_is_left_behind(loop, where, expect_log):
    where(fail)
    where = None
    seen = []
    loop.add_callback(loop.add_callback, lambda: seen.append(sys.exc_info()))
    turn(loop, 2)
    expect_log.take("Exception")
    assert seen == [(None, None, None)]
    assert sys.exc_info() == (None, None, None)


@pytest.fixture
def unraisable(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: seen.append(u.exc_type))
    return seen


def test_D8_an_exception_of_the_hook_is_unraisable(loop, where, unraisable):
    loop.handle_callback_exception = lambda callback: fail(KeyError)
    where(fail)
    log = []
    loop.add_callback(log.append, 1)
    turn(loop)
    del loop.handle_callback_exception
    assert unraisable == [KeyError]
    assert log == [1]


@pytest.mark.parametrize("error", BASE)
def test_D8_a_base_exception_of_the_hook_leaves_start(loop, where, error):
    loop.handle_callback_exception = lambda callback: fail(error)
    where(fail)
    with pytest.raises(error):
        loop.start()
    del loop.handle_callback_exception
    assert not loop.running()


def test_hook_that_is_no_callable(loop, unraisable):
    loop.handle_callback_exception = None
    loop.add_callback(fail)
    turn(loop)
    del loop.handle_callback_exception
    assert unraisable == [TypeError]


def test_hook_may_use_the_loop(loop, where):
    log = []

    def hook(callback):
        loop.add_callback(log.append, 1)
        loop.call_later(0, log.append, 2)
        loop.stop()

    loop.handle_callback_exception = hook
    where(fail)
    loop.start()
    turn(loop, 2)
    del loop.handle_callback_exception
    assert sorted(log) == [1, 2]


# -- What is no Exception ------------------------------------------------------


@pytest.mark.parametrize("error", BASE)
def test_D6_D7_base_exceptions_leave_start(loop, where, error):
    """And the loop is restartable, with everything that was not delivered."""
    log = []
    where(lambda: fail(error))
    loop.call_later(60, log.append, "later")
    with pytest.raises(error):
        loop.start()
    assert not loop.running()
    assert loop.stats()["pending_timeouts"] == 1
    loop.add_callback(log.append, "again")
    turn(loop)
    assert log == ["again"]


@pytest.mark.parametrize("error", BASE)
@pytest.mark.parametrize("after", ["restart", "reuse"])
def test_D3_a_base_exception_in_a_handler_loses_no_event(loop, error, after):
    """What is not delivered is reported again; and to nobody else."""
    with pairs(3) as socks:
        delivered, raised = [], []

        def handler(sock, events):
            if not raised:
                raised.append(sock)
                raise error
            delivered.append((sock, sock.recv(1)))

        for a, b in socks:
            b.send(b"x")
            loop.add_handler(a, handler, READ)
        with pytest.raises(error):
            loop.start()
        wanted = {(a, b"x") for a, _ in socks}
        strange = Recorder()
        if after == "reuse":
            [(a, _)] = [s for s in socks if s[0] is not raised[0]][:1]
            number = a.fileno()
            loop.remove_handler(a)
            wanted.remove((a, b"x"))
            with pair() as (quiet, _):
                a.close()
                os.dup2(quiet.fileno(), number)
                loop.add_handler(number, strange, READ)
                turn(loop, 3)
                loop.remove_handler(number)
                os.close(number)
        else:
            turn(loop, 3)
        assert set(delivered) == wanted and len(delivered) == len(wanted)
        assert strange == []
        for a, _ in socks:
            loop.remove_handler(a)


@pytest.mark.parametrize("error", BASE)
def test_D3_events_of_a_python_poller_are_kept(error):
    """It may not report them twice: the rest of the batch is for the next start."""
    with pairs(3) as socks:
        fds = [a.fileno() for a, _ in socks]
        impl = ScriptedPoller([(fd, READ) for fd in fds], [])
        with ioloop.IOLoop(impl=impl) as loop:
            log = []

            def handler(fd, events):
                log.append(fd)
                if len(log) == 1:
                    raise error

            for fd in fds:
                loop.add_handler(fd, handler, READ)
            with pytest.raises(error):
                loop.run_once(0)
            assert log == fds[:1]
            turn(loop)
            assert log == fds


# -- EPIPE ---------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError, BrokenPipeError])
def test_epipe_of_a_handler_is_ignored(loop, error):
    def handler(fd, events):
        loop.remove_handler(fd)
        raise error(errno.EPIPE, "gone")

    with readable() as (a, _):
        loop.add_handler(a, handler, READ)
        turn(loop)


def test_epipe_for_real(loop):
    with pair() as (a, b):
        b.close()
        loop.add_handler(a, lambda sock, events: sock.send(b"x"), WRITE)
        turn(loop)
        loop.remove_handler(a)


@pytest.mark.parametrize("number", [errno.ECONNRESET, errno.EBADF, None])
def test_other_errors_of_a_handler_are_not_ignored(loop, expect_log, number):
    def handler(fd, events):
        loop.remove_handler(fd)
        raise OSError(*([number, "text"] if number else []))

    with readable() as (a, _):
        loop.add_handler(a, handler, READ)
        turn(loop)
    expect_log.take("Exception in callback", OSError)


def test_epipe_of_others_is_not_ignored(loop, expect_log):
    error = BrokenPipeError(errno.EPIPE, "gone")
    loop.add_callback(fail, error)
    loop.call_later(0, fail, error)
    turn(loop)
    for _ in range(2):
        expect_log.take("Exception in callback", BrokenPipeError)


def test_an_errno_that_is_no_os_errors_is_none(loop, expect_log):
    class Mine(ValueError):
        errno = errno.EPIPE

    def handler(fd, events):
        loop.remove_handler(fd)
        raise Mine

    with readable() as (a, _):
        loop.add_handler(a, handler, READ)
        turn(loop)
    expect_log.take("Exception in callback", Mine)


# -- Hostile objects -----------------------------------------------------------


@pytest.mark.parametrize("configured", ["", "logging.basicConfig()"])
def test_D9_what_is_logged_never_leaves_the_loop(poller, configured):
    """In a process of its own: pytest's handlers raise what logging does not."""
    poller.run(
        f"""
        import io, logging, os, socket, sys
        from support import Hostile, Raises, fail
        {configured}

        def with_stderr(stream):
            def function(*_):
                sys.stderr = stream
                raise ValueError
            return function

        closed = io.StringIO()
        closed.close()
        log = []
        a, b = socket.socketpair()
        b.send(b"x")
        for function in [
            Hostile(ValueError()),
            Hostile(Raises()),
            lambda *_: fail(ValueError("\\udc80\\ud800")),
            with_stderr(closed),
            with_stderr(None),
            with_stderr(Hostile()),
        ]:
            with ioloop.IOLoop(impl=impl()) as loop:
                loop.add_handler(a, function, loop.READ)
                loop.add_callback(function)
                loop.call_later(0, function)
                loop.add_callback(log.append, 1)
                loop.run_once(0)
                loop.run_once(0)
        os._exit(log != [1] * 6)
        """
    )


def test_hostile_values_are_returned_and_passed(loop, where):
    where(Hostile())
    loop.add_callback(Hostile(), Hostile())
    turn(loop, 2)


class Property:
    """Looks like a future and then fails."""

    @property
    def add_done_callback(self):
        raise RuntimeError("hostile")


class NotQuite:
    def add_done_callback(self, callback):
        raise RuntimeError("hostile")


@pytest.mark.parametrize("result", [Property, NotQuite])
def test_futures_that_fail(loop, where, expect_log, result):
    where(result)
    turn(loop, 3)
    expect_log.take("Exception in callback", RuntimeError)


def test_a_memory_error_is_an_exception(loop, where, expect_log):
    where(lambda: fail(MemoryError))
    turn(loop)
    expect_log.take("Exception in callback", MemoryError)


# -- References ----------------------------------------------------------------


def test_nothing_holds_the_exception(loop, where):
    references = []

    class Mine(Exception):
        pass

    def raises():
        error = Mine()
        references.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    loop.handle_callback_exception = lambda callback: None
    where(raises)
    turn(loop, 2)
    del loop.handle_callback_exception
    gc.collect()
    assert references[0]() is None


def test_D15_nothing_is_held_while_the_loop_sleeps(loop):
    """Not the last callback, timeout or handler, nor what they were given."""

    class Thing:
        def __call__(self, *args):
            if len(args) == 2:
                loop.remove_handler(args[0])

    things = [Thing() for _ in range(6)]
    references = [weakref.ref(thing) for thing in things]
    with readable() as (a, _):
        loop.add_callback(things[0], things[1])
        loop.call_later(0, things[2], things[3])
        loop.add_handler(a, things[4], READ)
        del things
        thread = Thread(loop.start)
        try:
            wait_until(lambda: [r() for r in references] == [None] * 6)
        finally:
            loop.stop()
            thread.join()


def test_D26_a_handler_that_always_fails_is_logged_once_a_poll(loop, expect_log):
    """Level-triggered: it is up to the handler; the loop serves the others."""
    calls = Recorder()
    with readable() as (a, _), readable() as (b, _):
        loop.add_handler(a, lambda *_: fail(), READ)
        loop.add_handler(b, calls, READ)
        turn(loop, 3)
        loop.remove_handler(a)
        loop.remove_handler(b)
    assert len(calls) == 3
    for _ in range(3):
        expect_log.take("Exception in callback", ValueError)
