"""Exceptions: one hook for all, EPIPE, what is no Exception, and hostile objects."""

import concurrent.futures
import contextlib
import errno
import gc
import itertools
import logging
import os
import shutil
import socket
import sys
import traceback
import weakref
from pathlib import Path

import pytest
from fakes import (
    READ,
    WRITE,
    Exit,
    FakeClock,
    Hostile,
    Recorder,
    ScriptedPoller,
    fail,
    run_until,
    turn,
)
from kernel import close, pair, pairs, pipe, readable, tcp_pair
from processes import run_python

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


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError])
def test_default_hook_logs(loop, where, expect_log, error):
    where(lambda: fail(error("what")))
    turn(loop)
    record = expect_log.take("^Exception in callback <function", error)
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


async def coroutine():
    raise ValueError


def failed_future():
    future = concurrent.futures.Future()
    future.set_exception(ValueError())
    return future


@pytest.mark.row("D8")
@pytest.mark.parametrize(
    "hook", [lambda callback: fail(KeyError), None], ids=["", "None"]
)
@pytest.mark.parametrize("raises", [fail, coroutine, failed_future])
def test_an_exception_of_the_hook_is_unraisable(loop, where, unraisable, raises, hook):
    """And the one that it was called for is told first, also that of a future."""
    loop.handle_callback_exception = hook
    where(raises)
    log = []
    loop.add_callback(log.append, 1)
    turn(loop, 4)
    assert unraisable == [ValueError, KeyError if hook else TypeError]
    assert log == [1]


def test_when_the_override_fails_both_tracebacks_are_told(
    make_loop, poller, monkeypatch
):
    """Of the callback that failed, and of the hook."""

    class Sub(poller.module.IOLoop):
        def handle_callback_exception(self, callback):
            self.no_such_attribute  # noqa: B018

    def broken():
        raise ZeroDivisionError

    told = []

    def note(unraisable):
        last = list(traceback.walk_tb(unraisable.exc_traceback))[-1][0]
        told.append((unraisable.exc_type, last.f_code.co_name))

    monkeypatch.setattr(sys, "unraisablehook", note)
    loop = make_loop(Sub)
    loop.add_callback(broken)
    turn(loop)
    assert told == [
        (ZeroDivisionError, "broken"),
        (AttributeError, "handle_callback_exception"),
    ]


@pytest.mark.parametrize("lost", ["logging", "numbers"])
def test_when_nothing_can_be_logged_the_exception_is_told(poller, lost):
    """There is no logging module, or no descriptor is left to import it by."""
    done = poller.run(
        f"""
        import kernel, resource, sys
        def broken():
            raise ZeroDivisionError("what broke")
        loop = ioloop.IOLoop(impl=impl())
        loop.add_callback(broken)
        sys.modules.pop("logging", None)
        if {lost!r} == "logging":
            sys.modules["logging"] = None
            loop.run_once(0)
        else:
            with kernel.nothing_free():
                loop.run_once(0)
        loop.close()
        """
    )
    first, _, second = done.stderr.partition("what broke")
    assert "in broken" in first
    assert "Error: " in second


def test_what_the_hook_raises_again_is_told(loop, unraisable):
    """It is the same exception, and not its own context."""

    def hook(callback):
        raise

    loop.handle_callback_exception = hook
    loop.add_callback(fail)
    turn(loop)
    assert unraisable and set(unraisable) == {ValueError}


@pytest.mark.row("D8")
@pytest.mark.parametrize("error", BASE)
def test_a_base_exception_of_the_hook_leaves_start(loop, where, error):
    loop.handle_callback_exception = lambda callback: fail(error)
    where(fail)
    with pytest.raises(error):
        loop.start()
    assert not loop.running()


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
    assert sorted(log) == [1, 2]


# -- What is no Exception ------------------------------------------------------


@pytest.mark.row("D6", "D7")
@pytest.mark.parametrize("error", [*BASE, GeneratorExit])
def test_base_exceptions_leave_start(loop, where, error):
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


@pytest.mark.row("D3")
@pytest.mark.parametrize("error", [*BASE, GeneratorExit])
@pytest.mark.parametrize("reads", [False, True], ids=["", "reads"])
@pytest.mark.parametrize("reused", [False, True], ids=["", "reused"])
def test_a_base_exception_in_a_handler_loses_no_event(loop, error, reads, reused):
    """What is not delivered is reported again; and to nobody else."""
    with pairs(3) as socks, pair() as (quiet, _):
        raised, delivered, strange = [], Recorder(), Recorder()
        fds = sorted(os.dup(a.fileno()) for a, _ in socks)

        def handler(fd, events):
            if raised or reads:
                delivered(fd, os.read(fd, 1))
            if not raised:
                raised.append(fd)
                raise error

        for (_, b), fd in zip(socks, fds, strict=True):
            b.send(b"x")
            loop.add_handler(fd, handler, READ)
        with pytest.raises(error):
            loop.start()
        assert len(delivered) == reads
        wanted = list(fds)
        if reused:
            number = min({*fds} - {*raised})
            wanted.remove(number)
            loop.remove_handler(number)
            os.dup2(quiet.fileno(), number)
            loop.add_handler(number, strange, READ)
        turn(loop, 3)
        assert sorted(delivered) == [(fd, b"x") for fd in wanted]
        assert strange == []
        for fd in fds:
            loop.remove_handler(fd)
        close(*fds)


# An interrupt may come at any bytecode of a future that is written in Python.


class Future:
    """A future without locks, which an interrupt could leave locked."""

    def __init__(self, ended):
        self.ended = ended
        self.callbacks = []

    def add_done_callback(self, callback):
        if self.ended:
            callback(self)
        else:
            self.callbacks.append(callback)

    def finish(self):
        self.ended = True
        for callback in self.callbacks:
            callback(self)

    def done(self):
        return self.ended

    def cancelled(self):
        return False

    def result(self):
        return "result"


@contextlib.contextmanager
def interrupt_at(n):
    """Raise KeyboardInterrupt at the n-th bytecode of what the loop asks a Future."""
    asked = Future.add_done_callback, Future.done, Future.cancelled, Future.result
    codes = {method.__code__ for method in asked}
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        if event == "opcode" and count == n:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # 3.12 wants that of any frame before
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupted_runs(run):
    """Call `run(n)` for the n-th bytecode, until it is not interrupted any more."""
    for n in itertools.count(1):
        if not run(n):
            break
    assert n > 5, "no bytecode was seen"


@pytest.mark.parametrize("ended", [False, True], ids=["", "ended"])
def test_an_interrupt_at_any_bytecode_stops_no_periodic_callback(ended):
    """It leaves start() once, and the ticks are as they would have been."""

    def run(n):
        def work():
            ticks.append(round(clock.now, 6))
            future = Future(ended)
            loop.call_later(0.05, future.finish)
            return future

        ticks, clock, interrupts = [], FakeClock(0.0), 0
        impl = ScriptedPoller(clock=clock)
        with ioloop.IOLoop(impl=impl, time_func=clock) as loop, interrupt_at(n):
            periodic = ioloop.PeriodicCallback(work, 100, loop)
            periodic.start()
            while clock.now < 0.35:
                try:
                    loop.run_once()
                except KeyboardInterrupt:
                    interrupts += 1
            assert ticks == [0.1, 0.2, 0.3]
            assert periodic.is_running()
        assert interrupts <= 1
        return interrupts

    interrupted_runs(run)


@pytest.mark.parametrize("ended", [False, True], ids=["", "ended"])
def test_an_interrupt_at_any_bytecode_pauses_no_handler_for_ever(
    loop, ended, expect_log
):
    """One that has returned a future is called again, and told of it at most once."""

    def run(n):
        calls, interrupts = [], 0

        def handler(sock, events):
            calls.append(1)
            future = Future(ended)
            loop.call_later(0, loop.call_later, 0, future.finish)
            return future

        with readable() as (a, _), interrupt_at(n):
            loop.add_handler(a, handler, READ)
            for _ in range(12):
                try:
                    turn(loop)
                except KeyboardInterrupt:
                    interrupts += 1
            assert len(calls) > 2
            loop.remove_handler(a)
        expect_log.clear()  # of the pauses, if there were any
        assert interrupts <= 1
        return interrupts

    interrupted_runs(run)


class Step(Future):
    """Raises `error` in add_done_callback(), once: before or after it did its work."""

    def __init__(self, when, error):
        super().__init__(False)
        self.when, self.error = when, error

    def add_done_callback(self, callback):
        when, self.when = self.when, None
        if when == "before":
            raise self.error
        super().add_done_callback(callback)
        if when == "after":
            raise self.error


@pytest.mark.parametrize("error", BASE)
@pytest.mark.parametrize("when", ["before", "after"])
def test_run_sync_that_is_interrupted_as_it_begins_to_wait(loop, when, error):
    with pytest.raises(error):
        loop.run_sync(lambda: Step(when, error))
    assert not loop.running()
    assert loop.run_sync(lambda: Future(True), timeout=5) == "result"


@pytest.mark.parametrize("error", BASE)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_interrupted_with_its_future_is_called_again(loop, when, error):
    """Nobody would tell the loop that the future is done."""
    calls = []

    def handler(sock, events):
        calls.append(1)
        return Step(when, error) if len(calls) == 1 else None

    with readable() as (a, _):
        loop.add_handler(a, handler, READ)
        with pytest.raises(error):
            turn(loop)
        turn(loop, 3)
        loop.remove_handler(a)
    assert len(calls) > 1


# -- EPIPE ---------------------------------------------------------------------


def broken_pipe(fd):
    raise BrokenPipeError(errno.EPIPE, "gone")


def os_error(fd):
    raise OSError(errno.EPIPE, "gone")


def write(fd):
    os.write(fd, b"x")


@pytest.mark.parametrize("raises", [broken_pipe, os_error, write])
@pytest.mark.parametrize(("of", "events"), [(pair, READ), (pair, WRITE), (pipe, WRITE)])
def test_epipe_of_a_handler_is_ignored(loop, of, events, raises):
    """If its peer is gone, which the loop sees for itself."""
    calls = []

    def handler(fd, events):
        calls.append(fd)
        raises(fd)

    with of() as (a, b):
        writer = b if of is pipe else b.fileno()
        close(a) if of is pipe else a.close()
        loop.add_handler(writer, handler, events)
        turn(loop, 2)
        loop.remove_handler(writer)
    assert calls == [writer] * 2


def test_epipe_of_a_tcp_connection_that_was_closed_is_ignored(loop):
    """The first data is answered by a reset, and what is sent then fails."""
    errors = []

    def handler(sock, events):
        try:
            sock.send(b"x")
        except OSError as error:
            errors.append(error.errno)
            raise

    with tcp_pair() as (a, b):
        b.close()
        loop.add_handler(a, handler, WRITE)
        run_until(loop, lambda: errors.count(errno.EPIPE) >= 2)
        loop.remove_handler(a)


@pytest.mark.parametrize("registered", [False, True], ids=["", "registered"])
def test_epipe_of_another_file_is_reported(loop, expect_log, registered):
    """A log's pipe, or the other side of a proxy, was not watched here."""

    def handler(sock, events):
        os.write(writer, b"x")

    with readable() as (a, _), pipe() as (reader, writer):
        if registered:
            loop.add_handler(writer, int, 0)
        os.close(reader)
        loop.add_handler(a, handler, READ)
        turn(loop, 2)
        loop.remove_handler(a)
        loop.remove_handler(writer)
    for _ in range(2):
        expect_log.take("Exception in callback .*handler", BrokenPipeError)


@pytest.mark.parametrize("make", [pair, tcp_pair])
def test_epipe_after_ones_own_shutdown_is_reported(loop, expect_log, make):
    """The peer is there: it is an error of the program."""
    with make() as (a, _):
        a.shutdown(socket.SHUT_WR)
        loop.add_handler(a, lambda sock, events: sock.send(b"x"), WRITE)
        turn(loop)
        loop.remove_handler(a)
    expect_log.take("Exception in callback", BrokenPipeError)


class Mine(ValueError):
    errno = errno.EPIPE


@pytest.mark.parametrize(
    ("error", "args"),
    [
        (OSError, (errno.ECONNRESET, "text")),
        (OSError, (errno.EBADF, "text")),
        (OSError, (errno.EIO, "text")),
        (OSError, ()),
        (BrokenPipeError, (errno.EPIPE, "the peer is there")),
        (Mine, ()),  # its errno is no OSError's
    ],
)
def test_other_errors_of_a_handler_are_not_ignored(loop, expect_log, error, args):
    with readable() as (a, _):
        loop.add_handler(a, lambda *_: fail(error(*args)), READ)
        turn(loop)
        loop.remove_handler(a)
    expect_log.take("Exception in callback", error)


def test_epipe_of_others_is_not_ignored(loop, expect_log):
    error = BrokenPipeError(errno.EPIPE, "gone")
    loop.add_callback(fail, error)
    loop.call_later(0, fail, error)
    turn(loop)
    for _ in range(2):
        expect_log.take("Exception in callback", BrokenPipeError)


# -- Hostile objects -----------------------------------------------------------


@pytest.mark.row("D9")
@pytest.mark.parametrize("configured", ["", "logging.basicConfig()"])
def test_what_is_logged_never_leaves_the_loop(poller, configured):
    """In a process of its own: pytest's handlers raise what logging does not."""
    poller.run(
        f"""
        import io, logging, os, socket, sys
        from fakes import Hostile, Raises, fail
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
    gc.collect()
    assert references[0]() is None


@pytest.mark.row("D26")
def test_a_handler_that_always_fails_is_logged_once_a_poll(loop, expect_log):
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


# -- What stands under the name of the module ----------------------------------


@pytest.mark.parametrize("code", ["None", "object()", "3", "Odd()", "Odd", "Hostile()"])
def test_a_vendored_copy_is_imported_whatever_has_its_name(tmp_path, code):
    """None is how a test hides a module.  It is left where it is."""
    vendor = tmp_path / "acme" / "_vendor"
    vendor.mkdir(parents=True)
    file = Path(ioloop.__file__)
    shutil.copy(file, vendor / f"ioloop{''.join(file.suffixes)}")
    run_python(
        f"""
        import sys
        from fakes import Hostile
        class Odd:
            @property
            def __dict__(self):
                raise KeyError("odd")
        odd = sys.modules["ioloop"] = {code}
        import acme._vendor.ioloop as vendored
        assert sys.modules["ioloop"] is odd
        assert vendored.__name__ == "acme._vendor.ioloop"
        with vendored.IOLoop() as loop:
            loop.add_callback(loop.stop)
            loop.start()
        """,
        prelude=f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n",
    )
