"""add_handler, update_handler, remove_handler and their kin: what they take,
what a handler gets, and that a call that fails changes nothing."""

import concurrent.futures
import contextvars
import errno
import functools
import gc
import multiprocessing
import os
import select
import ssl
import subprocess
import sys
import threading
import weakref

import pytest
from helpers import (
    ERROR,
    NONE,
    READ,
    WRITE,
    Recorder,
    ScriptedPoller,
    free_number,
    idle,
    pair,
    pairs,
    pipe,
    run_until,
    turn,
)
from support import Await, Thread, drain, fail, in_thread, readable

import ioloop


class Fileno:
    """A descriptor as an object; `number` may be anything, or an exception class."""

    def __init__(self, number):
        self.number = number
        self.asked = 0

    def fileno(self):
        self.asked += 1
        if isinstance(self.number, type):
            raise self.number
        return self.number


class Hostile(Fileno):
    """Compares and hashes with an error: only its number may be used."""

    def __eq__(self, other):
        raise AssertionError("compared")

    def __hash__(self):
        raise AssertionError("hashed")

    def __bool__(self):
        raise AssertionError("tested")


@pytest.fixture
def ends():
    """A connected pair in which the first has something to read."""
    with pair() as (a, b):
        b.send(b"x")
        yield a, b


# -- What is passed, and what comes back --------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [lambda s: s, lambda s: s.fileno(), lambda s: Fileno(s.fileno())],
    ids=["socket", "int", "fileno"],
)
def test_handler_gets_what_was_passed(loop, ends, wrap):
    fd = wrap(ends[0])
    calls = Recorder()
    loop.add_handler(fd, calls, READ)
    turn(loop)
    [(got, events)] = calls
    assert got is fd
    assert (events, type(events)) == (READ, int)


def test_fileno_is_called_once_per_call(loop, ends):
    fd = Fileno(ends[0].fileno())
    loop.add_handler(fd, Recorder(), READ)
    assert fd.asked == 1
    turn(loop, 3)
    assert fd.asked == 1
    loop.update_handler(fd, NONE)
    assert fd.asked == 2
    loop.remove_handler(fd)
    assert fd.asked <= 3


def test_number_and_object_name_the_same_registration(loop, ends):
    a, _ = ends
    calls = Recorder()
    loop.add_handler(a, calls, NONE)
    loop.update_handler(a.fileno(), READ)
    turn(loop)
    assert calls.take() == [(a, READ)]
    loop.remove_handler(Fileno(a.fileno()))
    turn(loop)
    assert calls == []
    loop.add_handler(a.fileno(), calls, READ)
    loop.remove_handler(a)
    turn(loop)
    assert calls == []


def test_D27_objects_are_known_by_their_number_only(loop, ends):
    fd = Hostile(ends[0].fileno())
    calls = Recorder()
    loop.add_handler(fd, calls, READ)
    turn(loop)
    loop.update_handler(fd, NONE)
    loop.remove_handler(fd)
    assert len(calls) == 1
    assert calls[0][0] is fd


def test_an_int_subclass_is_a_descriptor(loop, ends):
    class Number(int):
        pass

    fd = Number(ends[0].fileno())
    calls = Recorder()
    loop.add_handler(fd, calls, READ)
    turn(loop)
    assert calls[0][0] is fd


@pytest.mark.parametrize(
    ("fd", "error"),
    [
        (None, TypeError),
        ("3", TypeError),
        (3.0, TypeError),
        (True, TypeError),
        (object(), TypeError),
        (-1, ValueError),
        (-(2**40), ValueError),
        (2**31, OverflowError),
        (2**40, OverflowError),
        (10**400, OverflowError),
        (Fileno(None), TypeError),
        (Fileno("3"), TypeError),
        (Fileno(3.0), TypeError),
        (Fileno(True), TypeError),
        (Fileno(-1), ValueError),
        (Fileno(2**31), OverflowError),
        (Fileno(ZeroDivisionError), ZeroDivisionError),
        (Fileno(KeyboardInterrupt), KeyboardInterrupt),
    ],
    ids=lambda value: f"{getattr(value, 'number', value)!r}"[:30],
)
def test_A13_what_is_no_descriptor(loop, fd, error):
    with pytest.raises(error):
        loop.add_handler(fd, Recorder(), READ)
    with pytest.raises(error):
        loop.update_handler(fd, READ)
    assert loop.stats()["handlers"] == 0
    turn(loop)


@pytest.mark.parametrize(
    ("events", "error"),
    [
        (None, TypeError),
        ("1", TypeError),
        (1.0, TypeError),
        (-1, ValueError),
        (2**32, OverflowError),
        (10**400, OverflowError),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_A13_what_is_no_mask(loop, ends, events, error):
    a, _ = ends
    calls = Recorder()
    with pytest.raises(error):
        loop.add_handler(a, calls, events)
    assert loop.stats()["handlers"] == 0
    loop.add_handler(a, calls, READ)
    with pytest.raises(error):
        loop.update_handler(a, events)
    turn(loop)
    assert calls == [(a, READ)]


@pytest.mark.parametrize("handler", [None, 1, "print", object()], ids=repr)
def test_what_is_no_handler(loop, ends, handler):
    with pytest.raises(TypeError):
        loop.add_handler(ends[0], handler, READ)
    assert loop.stats()["handlers"] == 0


def test_keywords_are_the_seeds(loop, ends):
    calls = Recorder()
    loop.add_handler(fd=ends[0], handler=calls, events=NONE)
    loop.update_handler(fd=ends[0], events=READ)
    turn(loop)
    loop.remove_handler(fd=ends[0])
    assert len(calls) == 1


# -- fileno() that does more than answer --------------------------------------


def test_A13_fileno_that_closes_the_loop(loop, ends):
    class Closing(Fileno):
        def fileno(self):
            loop.close()
            return super().fileno()

    with pytest.raises(RuntimeError, match="closed"):
        loop.add_handler(Closing(ends[0].fileno()), Recorder(), READ)


def test_A13_fileno_that_adds_itself(loop, ends):
    class Greedy(Fileno):
        def fileno(self):
            if not self.asked:
                self.asked = 1
                loop.add_handler(self.number, first, READ)
            return self.number

    first, second = Recorder(), Recorder()
    with pytest.raises(FileExistsError):
        loop.add_handler(Greedy(ends[0].fileno()), second, READ)
    turn(loop)
    assert (len(first), len(second)) == (1, 0)


@pytest.mark.parametrize("method", ["update_handler", "remove_handler"])
def test_A13_fileno_that_removes_itself(loop, ends, method):
    class Shy(Fileno):
        def fileno(self):
            loop.remove_handler(self.number)
            return self.number

    fd = ends[0].fileno()
    loop.add_handler(fd, Recorder(), READ)
    if method == "update_handler":
        with pytest.raises(FileNotFoundError):
            loop.update_handler(Shy(fd), READ)
    else:
        loop.remove_handler(Shy(fd))
    assert loop.stats()["handlers"] == 0
    turn(loop)


# -- Known and unknown --------------------------------------------------------


def test_a_second_handler_raises_and_changes_nothing(loop, ends):
    a, _ = ends
    first, second = Recorder(), Recorder()
    loop.add_handler(a, first, READ)
    for fd in (a, a.fileno(), Fileno(a.fileno())):
        with pytest.raises(FileExistsError) as refusal:
            loop.add_handler(fd, second, WRITE)
        assert refusal.value.errno == errno.EEXIST
    turn(loop)
    assert (first, second) == ([(a, READ)], [])
    assert loop.stats()["handlers"] == 1


def test_a_second_handler_is_refused_while_the_first_is_masked(loop, ends):
    a, _ = ends
    first, second = Recorder(), Recorder()
    loop.add_handler(a, first, NONE)
    with pytest.raises(FileExistsError):
        loop.add_handler(a, second, READ)
    turn(loop)
    loop.update_handler(a, READ)
    turn(loop)
    assert (first, second) == ([(a, READ)], [])


def test_update_of_an_unknown_fd(loop, ends):
    for fd in (ends[0], ends[0].fileno(), 2**31 - 1):
        with pytest.raises(FileNotFoundError) as refusal:
            loop.update_handler(fd, READ)
        assert refusal.value.errno == errno.ENOENT


@pytest.mark.parametrize("fd", [0, free_number(), 2**31 - 1, 2**40])
def test_A6_remove_of_an_unknown_fd_is_silent(loop, fd):
    loop.remove_handler(fd)
    loop.remove_handler(Fileno(fd))


def test_A6_remove_of_a_socket_that_was_closed_first(loop):
    """Its fileno() answers -1 by now; the object still names its registration."""
    with pairs(2) as [(a, _), (b, b_peer)]:
        calls = Recorder()
        loop.add_handler(a, Recorder(), READ)
        loop.add_handler(b, calls, READ)
        a.close()
        loop.remove_handler(a)
        assert loop.stats()["handlers"] == 1
        loop.remove_handler(a)
        b_peer.send(b"x")
        turn(loop)
        assert calls == [(b, READ)]


# -- Removing what can't say its number any more --------------------------------


@pytest.mark.parametrize(
    "error",
    [OSError, RuntimeError, KeyError, AttributeError, ZeroDivisionError, TypeError],
)
def test_remove_when_fileno_raises(loop, ends, error):
    """Whatever it raises: the object itself names its registration."""
    calls = Recorder()
    fd = Fileno(ends[0].fileno())
    with pair() as (b, _):
        loop.add_handler(fd, calls, READ)
        loop.add_handler(b, calls, READ)
        fd.number = error
        loop.remove_handler(fd)
        assert loop._handlers.keys() == {b.fileno()}
        turn(loop)
    assert calls == []


@pytest.mark.parametrize("number", [-1, None, "3", True, 2.5, 2**40], ids=repr)
def test_remove_when_fileno_answers_nonsense(loop, ends, number):
    fd = Fileno(ends[0].fileno())
    loop.add_handler(fd, Recorder(), READ)
    fd.number = number
    loop.remove_handler(fd)
    assert loop.stats()["handlers"] == 0


def test_remove_when_fileno_is_interrupted(loop, ends):
    """What is no Exception leaves, and all is as it was before."""
    fd = Fileno(ends[0].fileno())
    loop.add_handler(fd, Recorder(), READ)
    fd.number = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        loop.remove_handler(fd)
    assert loop.stats()["handlers"] == 1


def connection():
    one, two = multiprocessing.Pipe()
    return one, [two]


def tls_socket():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    with pair() as (a, b):
        a, b = a.dup(), b.dup()
    a.setblocking(False)
    return context.wrap_socket(a, do_handshake_on_connect=False), [b]


def pipe_of_a_process():
    process = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    process.wait()
    return process.stdin, []


def epoll():
    return select.epoll(), []


@pytest.mark.parametrize("make", [connection, tls_socket, pipe_of_a_process, epoll])
def test_remove_of_files_of_all_kinds_that_were_closed_first(loop, make):
    file, others = make()
    loop.add_handler(file, Recorder(), READ)
    file.close()
    loop.remove_handler(file)
    assert loop.stats()["handlers"] == 0
    for other in others:
        other.close()


def test_remove_when_fileno_answers_another_registered_number(loop):
    """The registration of the object goes, and not that of its number of now."""
    calls = Recorder()
    with pairs(2) as [(a, a_peer), (b, b_peer)]:
        fd = Fileno(a.fileno())
        loop.add_handler(fd, calls, READ)
        loop.add_handler(b, calls, READ)
        fd.number = b.fileno()
        loop.remove_handler(fd)
        a_peer.send(b"x")
        b_peer.send(b"x")
        turn(loop)
        assert calls == [(b, READ)]
        # It has none of its own any more: now it is known by its number.
        loop.remove_handler(fd)
        assert loop.stats()["handlers"] == 0


def test_remove_of_an_object_that_was_added_under_two_numbers(loop):
    """The one of now goes first."""
    with pairs(2) as [(a, _), (b, _)]:
        fd = Fileno(a.fileno())
        loop.add_handler(fd, Recorder(), READ)
        fd.number = b.fileno()
        loop.add_handler(fd, Recorder(), READ)
        loop.remove_handler(fd)
        assert loop._handlers.keys() == {a.fileno()}
        loop.remove_handler(fd)
        assert loop.stats()["handlers"] == 0


def test_remove_when_fileno_closes_the_loop(loop, ends):
    """Then there is nothing left to remove."""

    class Closing(Fileno):
        def fileno(self):
            loop.close()
            return super().fileno()

    loop.add_handler(ends[0], Recorder(), READ)
    loop.remove_handler(Closing(ends[0].fileno()))


def test_remove_when_fileno_answers_an_unknown_number(loop, ends):
    fd = Fileno(ends[0].fileno())
    loop.add_handler(fd, Recorder(), READ)
    fd.number = free_number()
    loop.remove_handler(fd)
    assert loop.stats()["handlers"] == 0


def test_remove_of_a_file_whose_number_has_another_owner(loop):
    """The order that servers get wrong: close, accept the next, remove the first."""
    calls = Recorder()
    with pairs(2) as [(a, _), (b, b_peer)]:
        number = a.fileno()
        loop.add_handler(a, Recorder(), READ)
        a.close()
        os.dup2(b.fileno(), number)
        loop.add_handler(number, calls, READ)
        loop.remove_handler(a)
        b_peer.send(b"x")
        turn(loop)
        assert calls == [(number, READ)]
        loop.remove_handler(number)
        os.close(number)


# -- split_fd, close_fd, close(all_fds) ---------------------------------------


def test_split_fd(ends):
    a, _ = ends
    number = a.fileno()
    assert ioloop.IOLoop.split_fd(a) == (number, a)
    assert ioloop.IOLoop.split_fd(number) == (number, number)
    for wrong in (None, "3", 3.5):
        with pytest.raises(TypeError):
            ioloop.IOLoop.split_fd(wrong)


def test_close_fd_of_both_kinds():
    with pair() as (a, b):
        number = os.dup(a.fileno())
        ioloop.IOLoop.close_fd(number)
        with pytest.raises(OSError):
            os.fstat(number)
        ioloop.IOLoop.close_fd(number)  # EBADF is ignored
        ioloop.IOLoop.close_fd(b)
        assert b.fileno() == -1


def test_close_fd_passes_other_errors_on():
    class Sick:
        def close(self):
            raise OSError(errno.EIO, "sick")

    with pytest.raises(OSError) as error:
        ioloop.IOLoop.close_fd(Sick())
    assert error.value.errno == errno.EIO


def test_close_leaves_the_users_files_open(loop, ends):
    a, _ = ends
    loop.add_handler(a, Recorder(), READ)
    loop.close()
    assert a.recv(9) == b"x"


class Counted(Fileno):
    """Counts its close()s, and does something in them."""

    def __init__(self, number, action=lambda: None):
        super().__init__(number)
        self.action = action
        self.closed = 0

    def close(self):
        self.closed += 1
        self.action()
        os.close(self.number)


def test_A31_all_fds_are_closed_once(loop):
    with pairs(3) as made:
        files = [Counted(os.dup(a.fileno())) for a, _ in made]
        files[0].action = lambda: loop.remove_handler(files[1])
        files[1].action = loop.close
        plain = os.dup(made[0][0].fileno())
        for file, events in zip(files, (READ, WRITE, NONE), strict=True):
            loop.add_handler(file, Recorder(), events)
        loop.add_handler(plain, Recorder(), READ)
        files[0].action = files[2].action = loop.close
        loop.close(all_fds=True)
        assert [file.closed for file in files] == [1, 1, 1]
        with pytest.raises(OSError):
            os.fstat(plain)
        loop.close(all_fds=True)
        assert [file.closed for file in files] == [1, 1, 1]


def test_A31_a_close_that_fails_does_not_stop_the_others(loop, expect_log):
    def fail():
        raise ZeroDivisionError

    with pairs(3) as made:
        files = [Counted(os.dup(a.fileno())) for a, _ in made]
        for file in files:
            loop.add_handler(file, Recorder(), READ)
        files[1].action = fail
        loop.close(all_fds=True)
        assert [file.closed for file in files] == [1, 1, 1]
        expect_log.take("Exception in callback", ZeroDivisionError)
        os.close(files[1].number)


def test_A31_closed_files_are_closed_again_silently(loop):
    with pair() as (a, _):
        number = os.dup(a.fileno())
        loop.add_handler(number, Recorder(), READ)
        loop.add_handler(a, Recorder(), READ)
        os.close(number)
        a.close()
        loop.close(all_fds=True)


def test_files_that_remove_themselves_when_they_are_closed(loop):
    """As a stream does in its close(): no error, and no other is lost."""
    with pairs(3) as made:
        files = [Counted(os.dup(a.fileno())) for a, _ in made]
        for file in files:
            file.action = functools.partial(loop.remove_handler, file)
            loop.add_handler(file, Recorder(), READ)
        loop.close(all_fds=True)
        assert [file.closed for file in files] == [1, 1, 1]


# -- The call -----------------------------------------------------------------


def test_a_handler_runs_in_the_context_of_its_registration(loop, ends):
    variable = contextvars.ContextVar("variable", default="none")
    seen = []
    variable.set("adding")
    loop.add_handler(ends[0], lambda *_: seen.append(variable.get()), READ)
    variable.set("later")
    turn(loop, 2)
    loop.update_handler(ends[0], READ)
    turn(loop)
    assert seen == ["adding"] * 3
    assert variable.get() == "later"


def test_a_handlers_own_changes_to_its_context_stay_there(loop):
    variable = contextvars.ContextVar("variable", default=0)
    with pairs(2) as made:
        seen = {}

        def handler(fd, events):
            seen.setdefault(fd, []).append(variable.get())
            variable.set(variable.get() + 1)

        for a, b in made:
            contextvars.Context().run(loop.add_handler, a, handler, READ)
            b.send(b"x")
        turn(loop, 3)
        assert list(seen.values()) == [[0, 1, 2]] * 2
        assert variable.get() == 0


def test_no_variable_leaks_from_one_handler_to_another(loop):
    variable = contextvars.ContextVar("variable", default="none")
    with pairs(2) as [(a, a_peer), (b, b_peer)]:
        seen = []
        loop.add_handler(a, lambda *_: variable.set("leak"), READ)
        a_peer.send(b"x")
        turn(loop)
        loop.add_handler(b, lambda *_: seen.append(variable.get()), READ)
        loop.add_callback(lambda: seen.append(variable.get()))
        b_peer.send(b"x")
        turn(loop)
        assert seen == ["none", "none"]


def test_an_exception_goes_to_the_hook_with_the_handler(loop, ends):
    def handler(fd, events):
        raise ZeroDivisionError

    seen = []
    loop.handle_callback_exception = lambda callback: seen.append(
        (callback, sys.exc_info()[0])
    )
    loop.add_handler(ends[0], handler, READ)
    turn(loop, 2)
    assert seen == [(handler, ZeroDivisionError)] * 2
    assert sys.exc_info() == (None, None, None)


def test_an_exception_is_logged(loop, ends, expect_log):
    def handler(fd, events):
        raise ZeroDivisionError

    with pairs(1) as [(b, b_peer)]:
        others = Recorder()
        loop.add_handler(ends[0], handler, READ)
        loop.add_handler(b, others, READ)
        b_peer.send(b"x")
        turn(loop)
        record = expect_log.take("Exception in callback .*handler", ZeroDivisionError)
        assert record.levelname == "ERROR"
        assert others == [(b, READ)]


@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
def test_epipe_from_a_handler_is_ignored(loop, ends, error):
    """By the peer that is gone: it has nothing to do with what the handler did."""

    def handler(fd, events):
        calls(fd, events)
        raise error(errno.EPIPE, "broken pipe")

    calls = Recorder()
    loop.add_handler(ends[0], handler, READ)
    ends[1].close()
    turn(loop, 2)
    assert len(calls) == 2


def test_epipe_from_a_handler_whose_peer_is_there_is_not(loop, ends, expect_log):
    def handler(fd, events):
        raise BrokenPipeError(errno.EPIPE, "broken pipe")

    loop.add_handler(ends[0], handler, READ)
    turn(loop)
    expect_log.take("Exception in callback", BrokenPipeError)


@pytest.mark.parametrize("error", [OSError, lambda: OSError(errno.EIO, "io")])
def test_other_oserrors_are_not(loop, ends, expect_log, error):
    def handler(fd, events):
        raise error()

    loop.add_handler(ends[0], handler, READ)
    turn(loop)
    expect_log.take("Exception in callback", OSError)


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt, SystemExit, GeneratorExit, type("Own", (BaseException,), {})],
)
def test_a_base_exception_leaves_start_and_the_loop_restarts(loop, ends, error):
    def handler(fd, events):
        calls(fd, events)
        if len(calls) == 1:
            raise error
        loop.stop()

    calls = Recorder()
    loop.add_handler(ends[0], handler, READ)
    with pytest.raises(error):
        loop.start()
    assert not loop.running()
    loop.start()
    assert len(calls) == 2


@pytest.mark.parametrize("value", [0, 1, {}, [], "", object(), iter([])], ids=repr)
def test_D23_what_a_handler_returns_is_ignored(loop, ends, value):
    calls = []
    loop.add_handler(ends[0], lambda *_: calls.append(1) or value, READ)
    turn(loop, 3)
    assert calls == [1, 1, 1]


def test_a_coroutine_handler_is_driven_to_its_end(loop, ends):
    class Pause:
        def __await__(self):
            yield

    done = []

    async def handler(fd, events):
        loop.remove_handler(fd)
        await Pause()
        done.append(fd.recv(9))
        loop.stop()

    loop.add_handler(ends[0], handler, READ)
    loop.start()
    assert done == [b"x"]


# -- A handler whose coroutine or future is not done ----------------------------


@pytest.fixture
def gate():
    return concurrent.futures.Future()


@pytest.fixture(params=["coroutine", "future"])
def waiting(request, gate):
    """A handler that is done when `gate` is; its `calls` are noted."""

    async def coroutine(fd, events):
        waiting.calls(fd, events)
        await Await(gate)

    def future(fd, events):
        waiting.calls(fd, events)
        return gate

    waiting = {"coroutine": coroutine, "future": future}[request.param]
    waiting.calls = Recorder()
    return waiting


def finish(loop, fd):
    """Remove a handler, and let the coroutine that it made last run to its end."""
    loop.remove_handler(fd)
    turn(loop, 3)


def takes_pause(expect_log):
    """What is logged of a handler that is paused."""
    record = expect_log.take("not called again")
    assert record.levelname == "WARNING"
    assert expect_log == []


def test_a_handler_is_not_called_before_it_is_done(
    loop, ends, waiting, gate, expect_log
):
    """It is logged once, and the loop sleeps meanwhile."""
    a, _ = ends
    loop.add_handler(a, waiting, READ)
    turn(loop, 3)
    assert waiting.calls == [(a, READ)]
    takes_pause(expect_log)
    idle(loop)
    assert waiting.calls.take() == [(a, READ)]
    gate.set_result(None)
    turn(loop, 6)
    assert (a, READ) in waiting.calls
    finish(loop, a)
    assert expect_log == []


def test_a_sleeping_loop_resumes_a_handler(loop, ends, waiting, gate, expect_log):
    """Another thread says that it is done."""
    loop.add_handler(ends[0], waiting, READ)
    turn(loop, 3)
    takes_pause(expect_log)
    thread = Thread(gate.set_result, None)
    run_until(loop, lambda: len(waiting.calls) > 1)
    thread.join()
    finish(loop, ends[0])


@pytest.mark.parametrize("end", ["exception", "cancel"])
def test_a_handler_that_failed_or_was_cancelled_is_done(
    loop, ends, gate, expect_log, end
):
    calls = []
    loop.add_handler(ends[0], lambda *_: calls.append(1) or gate, READ)
    turn(loop, 2)
    takes_pause(expect_log)
    gate.cancel() if end == "cancel" else gate.set_exception(ZeroDivisionError())
    turn(loop, 2)
    assert len(calls) > 1
    if end == "exception":
        expect_log.take("Exception in callback", ZeroDivisionError)
        expect_log.clear()  # of the calls since


def test_a_prompt_coroutine_is_never_paused(loop):
    """It is done by the next poll, and gets each event."""
    got = []

    async def handler(sock, events):
        got.append(sock.recv(1))

    with pair() as (a, b):
        loop.add_handler(a, handler, READ)
        for i in range(20):
            b.send(b"%c" % i)
            turn(loop, 2)
        loop.remove_handler(a)
    assert got == [b"%c" % i for i in range(20)]


def test_a_slow_coroutine_without_events_is_never_paused(loop, gate):
    """It takes its time, but nobody sends anything meanwhile."""
    done = []

    async def handler(sock, events):
        sock.recv(9)
        await Await(gate)
        done.append(1)

    with pair() as (a, b):
        loop.add_handler(a, handler, READ)
        b.send(b"x")
        turn(loop, 5)
        gate.set_result(None)
        turn(loop, 3)
        for _ in range(3):
            b.send(b"x")
            turn(loop, 3)
        loop.remove_handler(a)
    assert done == [1] * 4


def test_a_pause_is_told_once_for_a_registration(loop, ends, expect_log):
    calls, gates = [], []

    def handler(fd, events):
        calls.append(fd)
        gates.append(concurrent.futures.Future())
        return gates[-1]

    loop.add_handler(ends[0], handler, READ)
    for count in range(1, 4):
        turn(loop, 3)
        assert len(calls) == count
        gates[-1].set_result(None)
    takes_pause(expect_log)
    loop.remove_handler(ends[0])
    loop.add_handler(ends[0], handler, READ)
    turn(loop, 3)
    takes_pause(expect_log)


def test_others_are_called_while_a_handler_is_paused(loop, ends, waiting, expect_log):
    others = Recorder()
    with pair() as (b, b_peer):
        loop.add_handler(ends[0], waiting, READ)
        loop.add_handler(b, others, READ)
        b_peer.send(b"x")
        turn(loop, 5)
        loop.remove_handler(b)
    assert (len(waiting.calls), len(others)) == (1, 5)
    takes_pause(expect_log)


def test_a_paused_handler_remembers_its_last_update(
    loop, ends, waiting, gate, expect_log
):
    a, _ = ends
    loop.add_handler(a, waiting, READ)
    turn(loop, 3)
    takes_pause(expect_log)
    for events in (WRITE, READ | WRITE, NONE, WRITE):
        loop.update_handler(a, events)
        turn(loop, 2)
    assert waiting.calls.take() == [(a, READ)]
    gate.set_result(None)
    turn(loop, 6)
    assert set(waiting.calls) == {(a, WRITE)}
    finish(loop, a)


def test_a_paused_handler_that_was_masked_stays_silent(
    loop, ends, waiting, gate, expect_log
):
    a, _ = ends
    loop.add_handler(a, waiting, READ)
    turn(loop, 3)
    takes_pause(expect_log)
    loop.update_handler(a, NONE)
    gate.set_result(None)
    turn(loop, 6)
    assert waiting.calls.take() == [(a, READ)]
    loop.update_handler(a, READ)
    turn(loop, 3)
    assert (a, READ) in waiting.calls
    finish(loop, a)


@pytest.mark.parametrize("paused", [False, True], ids=["", "paused"])
def test_a_handler_that_is_not_done_can_be_removed(
    loop, ends, waiting, gate, expect_log, paused
):
    """The end of its future calls nobody."""
    loop.add_handler(ends[0], waiting, READ)
    turn(loop, 2 if paused else 1)
    if paused:
        takes_pause(expect_log)
    loop.remove_handler(ends[0])
    gate.set_result(None)
    turn(loop, 3)
    assert len(waiting.calls) <= 1
    assert loop.stats()["handlers"] == 0


@pytest.mark.parametrize("ended", ["before", "after"])
def test_a_new_registration_does_not_wait_for_the_old_one(
    loop, ends, waiting, gate, expect_log, ended
):
    """Nor does the end of the old one end its own pause."""
    a, _ = ends
    loop.add_handler(a, waiting, READ)
    turn(loop, 3)
    takes_pause(expect_log)
    loop.remove_handler(a)
    if ended == "before":
        gate.set_result(None)
    calls, never = Recorder(), concurrent.futures.Future()
    loop.add_handler(a, lambda fd, events: calls(fd, events) or never, READ)
    turn(loop, 2)
    if ended == "after":
        gate.set_result(None)
    turn(loop, 4)
    assert calls == [(a, READ)]
    takes_pause(expect_log)


def test_a_paused_handler_whose_file_was_closed_gives_way(loop, gate, expect_log):
    """Its number is free for another file, as that of every other handler."""
    calls, others = [], Recorder()
    with pair() as (a, b), pair() as (c, d):
        b.send(b"x")
        d.send(b"x")
        number = os.dup(a.fileno())
        loop.add_handler(number, lambda *_: calls.append(1) or gate, READ)
        turn(loop, 3)
        takes_pause(expect_log)
        os.dup2(c.fileno(), number)
        drain(a)
        loop.add_handler(number, others, READ)
        gate.set_result(None)
        turn(loop, 3)
        assert calls == [1]
        assert set(others) == {(number, READ)}
        loop.remove_handler(number)
        os.close(number)


def test_a_hang_up_waits_for_a_paused_handler(loop, gate, expect_log):
    """It does not spin meanwhile, and it is not lost."""
    calls = Recorder()

    def handler(fd, events):
        calls(fd, events)
        return gate

    with pipe() as (reader, writer):
        os.write(writer, b"x")
        loop.add_handler(reader, handler, READ)
        turn(loop, 2)
        takes_pause(expect_log)
        os.close(writer)
        idle(loop)
        assert len(calls.take()) == 1
        os.read(reader, 9)
        gate.set_result(None)
        turn(loop, 3)
        assert calls[0][1] & (READ | ERROR)
        loop.remove_handler(reader)


def test_a_python_poller_pauses_too(waiting, gate, expect_log):
    """What it reports all the same is for nobody."""
    with pair() as (a, _):
        fd = a.fileno()
        impl = ScriptedPoller(*[[(fd, READ)]] * 5)
        with ioloop.IOLoop(impl=impl) as loop:
            loop.add_handler(fd, waiting, READ)
            turn(loop, 4)
            takes_pause(expect_log)
            assert waiting.calls.take() == [(fd, READ)]
            assert fd not in impl.registered
            gate.set_result(None)
            turn(loop, 4)
            assert impl.registered[fd] & READ
            finish(loop, fd)


def test_a_call_is_not_ended_by_the_future_of_the_one_before(expect_log):
    """That was done in time for the event, and is looked after only then."""
    gates, made = [], concurrent.futures.Future

    def poll():
        if len(gates) == 1:
            gates[0].set_result(None)
        return [(fd, READ)]

    with pair() as (a, _):
        fd = a.fileno()
        with ioloop.IOLoop(impl=ScriptedPoller(*[poll] * 6)) as loop:
            loop.add_handler(fd, lambda *_: gates.append(made()) or gates[-1], READ)
            turn(loop, 6)
            assert len(gates) == 2
            takes_pause(expect_log)
            loop.remove_handler(fd)


@pytest.mark.parametrize("end", ["first", "second"])
def test_a_paused_handler_whose_file_is_closed_disturbs_nobody(
    loop, gate, expect_log, end
):
    """Whether its future ends before or after it is removed."""
    others = Recorder()
    with pair() as (a, b), pair() as (c, d):
        b.send(b"x")
        d.send(b"x")
        loop.add_handler(a, lambda *_: gate, READ)
        turn(loop, 3)
        takes_pause(expect_log)
        loop.add_handler(c, others, READ)
        a.close()
        if end == "second":
            loop.remove_handler(a)
        gate.set_result(None)
        turn(loop, 3)
        loop.remove_handler(a)
        assert loop._handlers.keys() == {c.fileno()}
        loop.remove_handler(c)
    assert len(others) == 3


def test_a_future_that_can_not_say_whether_it_is_done_is_not(loop, ends, expect_log):
    """Its error is told once, and not with every event."""

    class Future:
        def add_done_callback(self, callback):
            self.callback = callback

        def done(self):
            raise ZeroDivisionError

    calls, future = [], Future()
    loop.add_handler(ends[0], lambda *_: calls.append(1) or future, READ)
    turn(loop, 2)
    expect_log.take("Exception in callback", ZeroDivisionError)
    takes_pause(expect_log)
    idle(loop)
    assert calls == [1]
    loop.remove_handler(ends[0])


class Unfinished:
    """A future that can't be waited for."""

    def add_done_callback(self, callback):
        raise ZeroDivisionError


def test_a_handler_with_a_future_that_fails_is_called_again(loop, ends, expect_log):
    """There is nothing to wait for."""
    calls = []
    loop.add_handler(ends[0], lambda *_: calls.append(1) or Unfinished(), READ)
    turn(loop, 3)
    assert len(calls) == 3
    for _ in range(3):
        expect_log.take("Exception in callback", ZeroDivisionError)


@pytest.mark.parametrize("closed", [False, True], ids=["", "closed"])
def test_a_loop_with_a_paused_handler_is_collected(poller, ends, expect_log, closed):
    """With the future that it waits for, which refers to it."""
    futures = [concurrent.futures.Future()]
    loop = poller.module.IOLoop(impl=poller.impl())
    loop.add_handler(ends[0], lambda *_: futures[0], READ)
    turn(loop, 3)
    takes_pause(expect_log)
    reference = weakref.ref(loop)
    if closed:
        loop.close()
        del loop
    else:
        with pytest.warns(ResourceWarning, match="unclosed"):
            del loop
            futures.clear()
            gc.collect()
    futures.clear()
    gc.collect()
    assert reference() is None


# -- From within a handler ----------------------------------------------------


def test_stop_in_a_handler_lets_the_others_run(loop):
    with pairs(3) as made:
        calls, after = [], []

        def handler(fd, events):
            calls.append(fd)
            loop.remove_handler(fd)
            loop.stop()
            loop.add_callback(after.append, "callback")
            loop.call_later(0, after.append, "timeout")

        for a, b in made:
            loop.add_handler(a, handler, READ)
            b.send(b"x")
        loop.start()
        assert len(calls) == 3
        assert after == ["callback"] * 3 + ["timeout"] * 3


def test_D14_an_always_ready_fd_starves_nobody(loop, ends):
    order = []

    def handler(fd, events):
        order.append("handler")
        loop.add_callback(order.append, "callback")
        loop.call_later(0, order.append, "timeout")

    loop.add_handler(ends[0], handler, READ)
    turn(loop, 4)
    assert order == ["handler"] + ["callback", "timeout", "handler"] * 3


def test_D16_a_handler_may_drop_its_last_reference(loop, ends):
    class Handler:
        def __init__(self):
            self.word = "alive"

        def __call__(self, fd, events):
            loop.remove_handler(fd)
            gc.collect()
            seen.append((self.word, dead))

    seen, dead = [], []
    handler = Handler()
    weakref.finalize(handler, dead.append, "dead")
    loop.add_handler(ends[0], handler, READ)
    del handler
    turn(loop)
    assert seen == [("alive", dead)]
    assert dead == ["dead"]


def test_D17_destructors_that_change_the_table(loop):
    """Dropping the first handler removes the others and adds one more."""

    class Handler:
        def __call__(self, fd, events):
            calls.append(fd)

        def __del__(self):
            dead.append(self)
            if len(dead) == 1:
                for a, _ in made:
                    loop.remove_handler(a)
                loop.add_handler(made[0][0], late, READ)

    calls, dead, late = [], [], Recorder()
    with pairs(50) as made:
        for a, b in made:
            loop.add_handler(a, Handler(), READ)
            b.send(b"x")
        loop.remove_handler(made[25][0])
        assert calls == []
        turn(loop)
        assert late == [(made[0][0], READ)]
        assert loop.stats()["handlers"] == 1
        assert len(dead) == 50


def test_D17_a_destructor_that_removes_what_is_next(loop):
    """A handler that has just run and dies when the next one is about to."""

    class Handler:
        def __call__(self, fd, events):
            calls.append(fd)
            loop.remove_handler(fd)

        def __del__(self):
            for a, _ in made:
                loop.remove_handler(a)

    calls = []
    with pairs(3) as made:
        for a, b in made:
            loop.add_handler(a, Handler(), READ)
            b.send(b"x")
        turn(loop)
        assert len(calls) == 1
        assert loop.stats()["handlers"] == 0


def test_removed_handlers_are_freed_at_once(loop, ends):
    def handler(fd, events):
        pass

    fd = Fileno(ends[0].fileno())
    references = [weakref.ref(handler), weakref.ref(fd)]
    for steps in ((), (READ, NONE), (WRITE,)):
        loop.add_handler(fd, handler, READ)
        for events in steps:
            loop.update_handler(fd, events)
        loop.remove_handler(fd)
    del fd, handler
    assert [reference() for reference in references] == [None, None]


def test_D15_the_sleeping_loop_holds_no_handler(loop):
    """Handlers that ran and were removed are gone before the next poll."""
    with pair() as (a, b):

        class Handler:
            def __call__(self, fd, events):
                loop.remove_handler(a)

        handler = Handler()
        reference = weakref.ref(handler)
        loop.add_handler(Fileno(a.fileno()), handler, READ)
        del handler
        b.send(b"x")
        seen = []
        polls = []

        def look():
            # Asleep, or about to be: the loop's second poll has begun.
            while loop.stats()["polls"] < 2 and not polls:
                pass
            seen.append(reference())
            loop.add_callback(loop.stop)

        thread = threading.Thread(target=look)
        thread.start()
        loop.start()
        polls.append("over")
        thread.join()
        assert seen == [None]


def test_a_loop_in_a_cycle_with_its_handlers_is_collected(poller, ends):
    loop = poller.module.IOLoop(poller.impl())
    loop.add_handler(ends[0], functools.partial(print, loop), READ)
    loop.handler = loop.add_handler
    loop.close()
    reference = weakref.ref(loop)
    del loop
    gc.collect()
    assert reference() is None


def test_an_open_loop_in_a_cycle_is_collected_too(poller, ends, counted_files):
    loop = poller.module.IOLoop(poller.impl())
    loop.add_handler(ends[0], functools.partial(print, loop), READ)
    loop.add_callback(print, loop)
    reference = weakref.ref(loop)
    with pytest.warns(ResourceWarning, match="unclosed"):
        del loop
        gc.collect()
    gc.collect()  # the warning had brought the loop back, as its source
    assert reference() is None
    assert not counted_files()


# -- Threads and the closed loop ----------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda loop, fd: loop.add_handler(fd, print, READ),
        lambda loop, fd: loop.update_handler(fd, READ),
        lambda loop, fd: loop.remove_handler(fd),
    ],
    ids=["add_handler", "update_handler", "remove_handler"],
)
def test_wrong_thread(loop, ends, call):
    errors = []

    def intruder():
        with pytest.raises(RuntimeError, match="thread") as error:
            call(loop, ends[0])
        errors.append(error.type)
        loop.add_callback(loop.stop)

    thread = threading.Thread(target=intruder)
    loop.add_callback(thread.start)
    loop.start()
    thread.join()
    assert errors == [RuntimeError]
    # Not running, it belongs to nobody.
    thread = threading.Thread(target=loop.add_handler, args=(ends[0], print, NONE))
    thread.start()
    thread.join()
    assert loop.stats()["handlers"] == 1


def test_B15_after_close(loop, ends):
    """What is left to do in a `finally` does nothing; all else is refused."""
    loop.add_handler(ends[0], fail, READ)
    loop.close()
    for call in (
        lambda: loop.add_handler(ends[0], print, READ),
        lambda: loop.update_handler(ends[0], READ),
    ):
        with pytest.raises(RuntimeError, match="IOLoop is closed"):
            call()
    for fd in (ends[0], ends[0].fileno(), free_number(), Fileno(OSError)):
        loop.remove_handler(fd)
        in_thread(loop.remove_handler, fd)


def test_stats_count_handlers_events_and_polls(loop):
    with pairs(2) as made:
        assert loop.stats()["handlers"] == 0
        for a, b in made:
            loop.add_handler(a, lambda fd, events: fd.recv(9), READ)
            b.send(b"x")
        before = loop.stats()
        turn(loop, 2)
        after = loop.stats()
        assert after["handlers"] == 2
        assert after["events"] - before["events"] == 2
        assert after["polls"] - before["polls"] == 2
        assert after["iterations"] - before["iterations"] == 2


@pytest.mark.parametrize("poller", ["epoll"], indirect=True)
def test_error_reaches_a_handler_that_did_not_ask(loop, ends):
    """select() knows no hang-up, and kqueue's READ filter answers it as READ."""
    a, b = ends
    calls = Recorder()
    b.close()
    loop.add_handler(a, calls, READ)
    turn(loop)
    assert calls[0][1] & ERROR


EXCLUSIVE = 1 << 28


@pytest.mark.parametrize("poller", ["epoll"], indirect=True)
def test_a_handler_that_can_not_be_paused_by_another_mask(loop, expect_log):
    """The kernel refuses to change an exclusive registration."""
    calls, future = [], concurrent.futures.Future()

    def handler(sock, events):
        calls.append(1)
        return None if future.done() else future

    with readable() as (a, _):
        loop.add_handler(a, handler, READ | EXCLUSIVE)
        turn(loop, 2)
        expect_log.take("not called again")
        idle(loop)
        assert calls == [1]
        future.set_result(None)
        turn(loop, 3)
        assert len(calls) > 1
        loop.remove_handler(a)
