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
from helpers import (
    READ,
    WRITE,
    FakeClock,
    Recorder,
    ScriptedPoller,
    pair,
    pairs,
    pipe,
    run_python,
    run_until,
    tcp_pair,
    turn,
)
from support import Await, Exit, Hostile, Thread, fail, readable, wait_until

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
    """And the one that it was called for is told first."""
    loop.handle_callback_exception = lambda callback: fail(KeyError)
    where(fail)
    log = []
    loop.add_callback(log.append, 1)
    turn(loop)
    del loop.handle_callback_exception
    assert unraisable == [ValueError, KeyError]
    assert log == [1]


async def coroutine():
    raise ValueError


def failed_future():
    future = concurrent.futures.Future()
    future.set_exception(ValueError())
    return future


@pytest.mark.parametrize("result", [coroutine, failed_future])
def test_when_the_hook_fails_what_a_future_raised_is_told_too(
    loop, where, unraisable, result
):
    loop.handle_callback_exception = lambda callback: fail(KeyError)
    where(result)
    turn(loop, 4)
    del loop.handle_callback_exception
    assert unraisable == [ValueError, KeyError]


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
        import helpers, resource, sys
        def broken():
            raise ZeroDivisionError("what broke")
        loop = ioloop.IOLoop(impl=impl())
        loop.add_callback(broken)
        sys.modules.pop("logging", None)
        if {lost!r} == "logging":
            sys.modules["logging"] = None
            loop.run_once(0)
        else:
            with helpers.nothing_free():
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
    del loop.handle_callback_exception
    assert unraisable and set(unraisable) == {ValueError}


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
    assert unraisable == [ValueError, TypeError]


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
def test_an_interrupt_at_any_bytecode_drops_no_coroutine(loop, ended):
    """It goes on once, be it by the result or by the interrupt."""

    def run(n):
        async def work():
            try:
                log.append(await Await(future))
            except KeyboardInterrupt:
                log.append("interrupt")
            await Await()
            log.append("end")

        log, interrupts, future = [], 0, Future(ended)
        loop.add_callback(work)
        with interrupt_at(n):
            for i in range(9):
                if i == 5:
                    future.finish()
                try:
                    turn(loop)
                except KeyboardInterrupt:
                    interrupts += 1
        assert log in (["result", "end"], ["interrupt", "end"])
        told = interrupts + log.count("interrupt")
        assert told <= 1
        return told

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
def test_a_coroutine_interrupted_as_it_begins_to_wait_goes_on_once(loop, when, error):
    """Nor is it taken out of its next wait, should the first future tell twice."""
    log, one, two = [], Step(when, error), Future(False)

    async def work():
        log.append(await Await(one))
        log.append(await Await(two))

    loop.add_callback(work)
    with pytest.raises(error):
        turn(loop, 3)
    turn(loop, 3)
    assert log == []
    one.finish()
    turn(loop, 3)
    assert log == ["result"]
    two.finish()
    turn(loop, 3)
    assert log == ["result", "result"]


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


@pytest.mark.parametrize("error", [OSError, BrokenPipeError])
def test_epipe_of_a_handler_is_ignored(loop, error):
    """If its peer is gone, which the loop sees for itself."""

    def handler(fd, events):
        loop.remove_handler(fd)
        raise error(errno.EPIPE, "gone")

    with pair() as (a, b):
        loop.add_handler(a, handler, READ)
        b.close()
        turn(loop)


def test_epipe_for_real(loop):
    with pair() as (a, b):
        b.close()
        loop.add_handler(a, lambda sock, events: sock.send(b"x"), WRITE)
        turn(loop)
        loop.remove_handler(a)


def test_epipe_of_a_pipe_without_a_reader_is_ignored(loop):
    with pipe() as (reader, writer):
        loop.add_handler(writer, lambda fd, events: os.write(fd, b"x"), WRITE)
        os.close(reader)
        turn(loop, 2)
        loop.remove_handler(writer)


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
        from support import Hostile
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
