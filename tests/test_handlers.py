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
import subprocess
import weakref

import pytest
from fakes import (
    ERROR,
    NONE,
    READ,
    WRITE,
    Await,
    Recorder,
    ScriptedPoller,
    fail,
    idle,
    run_until,
    turn,
)
from kernel import drain, free_number, pair, pairs, pipe, readable
from processes import Thread, in_thread, sleeping

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


class Number(int):
    pass


@pytest.fixture
def ready():
    """A socket that has something to read."""
    with readable() as (sock, _):
        yield sock


@pytest.fixture
def calls():
    """A handler that records its calls."""
    return Recorder()


# -- What is passed, and what comes back --------------------------------------


@pytest.mark.row("D27")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda sock: sock,
        lambda sock: sock.fileno(),
        lambda sock: Number(sock.fileno()),
        lambda sock: Fileno(sock.fileno()),
        lambda sock: Hostile(sock.fileno()),
    ],
    ids=["socket", "int", "int subclass", "fileno", "hostile"],
)
def test_handler_gets_what_was_passed(loop, ready, calls, wrap):
    """It is known by its number only."""
    fd = wrap(ready)
    loop.add_handler(fd, calls, READ)
    turn(loop)
    loop.update_handler(fd, NONE)
    turn(loop)
    loop.remove_handler(fd)
    [(got, events)] = calls
    assert got is fd
    assert (events, type(events)) == (READ, int)


def test_fileno_is_called_once_per_call(loop, ready):
    fd = Fileno(ready.fileno())
    loop.add_handler(fd, Recorder(), READ)
    assert fd.asked == 1
    turn(loop, 3)
    assert fd.asked == 1
    loop.update_handler(fd, NONE)
    assert fd.asked == 2
    loop.remove_handler(fd)
    assert fd.asked <= 3


def test_number_and_object_name_the_same_registration(loop, ready, calls):
    loop.add_handler(ready, calls, NONE)
    loop.update_handler(ready.fileno(), READ)
    turn(loop)
    assert calls.take() == [(ready, READ)]
    loop.remove_handler(Fileno(ready.fileno()))
    turn(loop)
    assert calls == []
    loop.add_handler(ready.fileno(), calls, READ)
    loop.remove_handler(ready)
    turn(loop)
    assert calls == []


@pytest.mark.row("A13")
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
def test_what_is_no_descriptor(loop, fd, error):
    with pytest.raises(error):
        loop.add_handler(fd, Recorder(), READ)
    with pytest.raises(error):
        loop.update_handler(fd, READ)
    assert loop.stats()["handlers"] == 0
    turn(loop)


@pytest.mark.row("A13")
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
def test_what_is_no_mask(loop, ready, events, error, calls):
    with pytest.raises(error):
        loop.add_handler(ready, calls, events)
    assert loop.stats()["handlers"] == 0
    loop.add_handler(ready, calls, READ)
    with pytest.raises(error):
        loop.update_handler(ready, events)
    turn(loop)
    assert calls == [(ready, READ)]


@pytest.mark.parametrize("handler", [None, 1, "print", object()], ids=repr)
def test_what_is_no_handler(loop, ready, handler):
    with pytest.raises(TypeError):
        loop.add_handler(ready, handler, READ)
    assert loop.stats()["handlers"] == 0


def test_keywords_are_the_seeds(loop, ready, calls):
    loop.add_handler(fd=ready, handler=calls, events=NONE)
    loop.update_handler(fd=ready, events=READ)
    turn(loop)
    loop.remove_handler(fd=ready)
    assert len(calls) == 1


# -- fileno() that does more than answer --------------------------------------


@pytest.mark.row("A13")
def test_fileno_that_closes_the_loop(loop, ready):
    class Closing(Fileno):
        def fileno(self):
            loop.close()
            return super().fileno()

    with pytest.raises(RuntimeError, match="closed"):
        loop.add_handler(Closing(ready.fileno()), Recorder(), READ)


@pytest.mark.row("A13")
def test_fileno_that_adds_itself(loop, ready):
    class Greedy(Fileno):
        def fileno(self):
            if not self.asked:
                self.asked = 1
                loop.add_handler(self.number, first, READ)
            return self.number

    first, second = Recorder(), Recorder()
    with pytest.raises(FileExistsError):
        loop.add_handler(Greedy(ready.fileno()), second, READ)
    turn(loop)
    assert (len(first), len(second)) == (1, 0)


@pytest.mark.row("A13")
@pytest.mark.parametrize("method", ["update_handler", "remove_handler"])
def test_fileno_that_removes_itself(loop, ready, method):
    class Shy(Fileno):
        def fileno(self):
            loop.remove_handler(self.number)
            return self.number

    fd = ready.fileno()
    loop.add_handler(fd, Recorder(), READ)
    if method == "update_handler":
        with pytest.raises(FileNotFoundError):
            loop.update_handler(Shy(fd), READ)
    else:
        loop.remove_handler(Shy(fd))
    assert loop.stats()["handlers"] == 0
    turn(loop)


# -- Known and unknown --------------------------------------------------------


@pytest.mark.parametrize("events", [READ, NONE])
def test_a_second_handler_raises_and_changes_nothing(loop, ready, calls, events):
    loop.add_handler(ready, calls, events)
    for fd in (ready, ready.fileno(), Fileno(ready.fileno())):
        for others in (READ, WRITE):
            with pytest.raises(FileExistsError) as refusal:
                loop.add_handler(fd, fail, others)
            assert refusal.value.errno == errno.EEXIST
    turn(loop)
    assert calls.take() == ([(ready, READ)] if events else [])
    assert loop.stats()["handlers"] == 1
    loop.update_handler(ready, READ)
    turn(loop)
    assert calls == [(ready, READ)]


def test_update_of_an_unknown_fd(loop, ready):
    for fd in (ready, ready.fileno(), 2**31 - 1):
        with pytest.raises(FileNotFoundError) as refusal:
            loop.update_handler(fd, READ)
        assert refusal.value.errno == errno.ENOENT


@pytest.mark.row("A6")
@pytest.mark.parametrize("fd", [0, free_number(), 2**31 - 1, 2**40])
def test_remove_of_an_unknown_fd_is_silent(loop, fd):
    loop.remove_handler(fd)
    loop.remove_handler(Fileno(fd))


# -- Removing what can't say its number any more --------------------------------


ERRORS = [OSError, RuntimeError, KeyError, AttributeError, ZeroDivisionError, TypeError]


@pytest.mark.parametrize(
    "number",
    [*ERRORS, -1, None, "3", True, 2.5, 2**40, free_number()],
    ids=lambda number: getattr(number, "__name__", repr(number)),
)
def test_remove_when_fileno_raises_or_answers_nonsense(loop, ready, calls, number):
    """Whatever it is: the object itself names its registration."""
    fd = Fileno(ready.fileno())
    with pair() as (b, _):
        loop.add_handler(fd, fail, READ)
        loop.add_handler(b, calls, READ)
        fd.number = number
        loop.remove_handler(fd)
        assert loop._handlers.keys() == {b.fileno()}
        turn(loop)
    assert calls == []


def test_remove_when_fileno_is_interrupted(loop, ready):
    """What is no Exception leaves, and all is as it was before."""
    fd = Fileno(ready.fileno())
    loop.add_handler(fd, Recorder(), READ)
    fd.number = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        loop.remove_handler(fd)
    assert loop.stats()["handlers"] == 1


def unix_socket():
    with pair() as (a, b):
        return a.dup(), [b.dup()]


def connection():
    one, two = multiprocessing.Pipe()
    return one, [two]


def tls_socket():
    ssl = pytest.importorskip("ssl", reason="this CPython has no ssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    sock, others = unix_socket()
    sock.setblocking(False)
    return context.wrap_socket(sock, do_handshake_on_connect=False), others


def pipe_of_a_process():
    process = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    process.wait()
    return process.stdin, []


def epoll():
    return (select.epoll if hasattr(select, "epoll") else select.kqueue)(), []


FILES = [unix_socket, connection, tls_socket, pipe_of_a_process, epoll]


@pytest.mark.row("A6")
@pytest.mark.parametrize("make", FILES)
def test_remove_of_files_of_all_kinds_that_were_closed_first(loop, ready, calls, make):
    """They have no number by now; the object still names its registration."""
    file, others = make()
    loop.add_handler(ready, calls, READ)
    loop.add_handler(file, fail, READ)
    file.close()
    for _ in range(2):
        loop.remove_handler(file)
        assert loop.stats()["handlers"] == 1
    turn(loop)
    assert calls == [(ready, READ)]
    for other in others:
        other.close()


def test_remove_when_fileno_answers_another_registered_number(loop, calls):
    """The registration of the object goes, and not that of its number of now."""
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


def test_remove_when_fileno_closes_the_loop(loop, ready):
    """Then there is nothing left to remove."""

    class Closing(Fileno):
        def fileno(self):
            loop.close()
            return super().fileno()

    loop.add_handler(ready, Recorder(), READ)
    loop.remove_handler(Closing(ready.fileno()))


def test_remove_of_a_file_whose_number_has_another_owner(loop, calls):
    """The order that servers get wrong: close, accept the next, remove the first."""
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


def test_split_fd(ready):
    number = ready.fileno()
    assert ioloop.IOLoop.split_fd(ready) == (number, ready)
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


def test_close_leaves_the_users_files_open(loop, ready):
    loop.add_handler(ready, Recorder(), READ)
    loop.close()
    assert ready.recv(9) == b"x"


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


@pytest.mark.row("A31")
def test_all_fds_are_closed_once(loop):
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


@pytest.mark.row("A31")
def test_a_close_that_fails_does_not_stop_the_others(loop, expect_log):
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


@pytest.mark.row("A31")
def test_closed_files_are_closed_again_silently(loop):
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


def test_a_handler_runs_in_the_context_of_its_registration(loop, ready):
    variable = contextvars.ContextVar("variable", default="none")
    seen = []
    variable.set("adding")
    loop.add_handler(ready, lambda *_: seen.append(variable.get()), READ)
    variable.set("later")
    turn(loop, 2)
    loop.update_handler(ready, READ)
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


@pytest.mark.row("D23")
@pytest.mark.parametrize("value", [0, 1, {}, [], "", object(), iter([])], ids=repr)
def test_what_a_handler_returns_is_ignored(loop, ready, value):
    calls = []
    loop.add_handler(ready, lambda *_: calls.append(1) or value, READ)
    turn(loop, 3)
    assert calls == [1, 1, 1]


def test_a_coroutine_handler_is_driven_to_its_end(loop, ready):
    done = []

    async def handler(fd, events):
        loop.remove_handler(fd)
        await Await()
        done.append(fd.recv(9))
        loop.stop()

    loop.add_handler(ready, handler, READ)
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
    turn(loop, 6)


@pytest.fixture
def paused(loop, ready, waiting):
    """`waiting` as a handler that was called once, and has events since."""
    loop.add_handler(ready, waiting, READ)
    turn(loop, 3)
    assert waiting.calls == [(ready, READ)]
    return waiting


def test_a_handler_is_not_called_before_it_is_done(loop, ready, paused, gate):
    """It is logged once, and the loop sleeps meanwhile."""
    idle(loop)
    assert paused.calls.take() == [(ready, READ)]
    gate.set_result(None)
    turn(loop, 6)
    assert (ready, READ) in paused.calls
    finish(loop, ready)


def test_a_sleeping_loop_resumes_a_handler(loop, ready, paused, gate):
    """Another thread says that it is done."""
    thread = Thread(gate.set_result, None)
    run_until(loop, lambda: len(paused.calls) > 1)
    thread.join()
    finish(loop, ready)


@pytest.mark.parametrize("end", ["exception", "cancel"])
def test_a_handler_that_failed_or_was_cancelled_is_done(
    loop, ready, gate, expect_log, end
):
    calls = []
    loop.add_handler(ready, lambda *_: calls.append(1) or gate, READ)
    turn(loop, 2)
    gate.cancel() if end == "cancel" else gate.set_exception(ZeroDivisionError())
    turn(loop, 2)
    assert len(calls) > 1
    if end == "exception":
        expect_log.take("Exception in callback", ZeroDivisionError)
        expect_log.clear()  # of the calls since


def test_a_prompt_coroutine_gets_each_event(loop):
    """It is done within a few iterations, and gets each event."""
    got = []

    async def handler(sock, events):
        got.append(sock.recv(1))

    with pair() as (a, b):
        loop.add_handler(a, handler, READ)
        for i in range(20):
            b.send(b"%c" % i)
            turn(loop, 4)
        loop.remove_handler(a)
    assert got == [b"%c" % i for i in range(20)]


def test_a_slow_coroutine_gets_the_events_that_come_after_it(loop, gate):
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
        for n in range(1, 5):
            turn(loop, 6)
            assert done == [1] * n
            b.send(b"x")
        finish(loop, a)


def test_a_handler_that_arms_itself_again_waits_for_its_coroutine(loop, ready, gate):
    """What it asks for is watched once it is done, also after a one-shot event."""
    calls, mask = [], READ | loop._EPOLLONESHOT

    async def handler(fd, events):
        calls.append("begun")
        loop.update_handler(fd, mask)
        await Await(gate)
        calls.append("done")

    loop.add_handler(ready, handler, mask)
    turn(loop, 5)
    assert calls == ["begun"]
    gate.set_result(None)
    turn(loop, 6)
    assert calls[:3] == ["begun", "done", "begun"]
    finish(loop, ready)


@pytest.mark.parametrize("poller", ["epoll"], indirect=True)
def test_a_one_shot_event_is_not_armed_again_by_its_coroutine(loop, ready, gate):
    """Whoever asked for one event gets one."""
    calls = []
    mask = READ | loop._EPOLLONESHOT
    loop.add_handler(ready, lambda *_: calls.append(1) or gate, mask)
    turn(loop, 2)
    gate.set_result(None)
    turn(loop, 4)
    assert calls == [1]
    finish(loop, ready)


def test_others_are_called_while_a_handler_is_paused(loop, ready, waiting):
    others = Recorder()
    with pair() as (b, b_peer):
        loop.add_handler(ready, waiting, READ)
        loop.add_handler(b, others, READ)
        b_peer.send(b"x")
        turn(loop, 5)
        loop.remove_handler(b)
    assert (len(waiting.calls), len(others)) == (1, 5)


def test_a_paused_handler_remembers_its_last_update(loop, ready, paused, gate):
    for events in (WRITE, READ | WRITE, NONE, WRITE):
        loop.update_handler(ready, events)
        turn(loop, 2)
    idle(loop)  # nobody watches it meanwhile
    assert paused.calls.take() == [(ready, READ)]
    gate.set_result(None)
    turn(loop, 6)
    assert set(paused.calls) == {(ready, WRITE)}
    finish(loop, ready)


def test_a_paused_handler_that_was_masked_stays_silent(loop, ready, paused, gate):
    loop.update_handler(ready, NONE)
    gate.set_result(None)
    turn(loop, 6)
    assert paused.calls.take() == [(ready, READ)]
    loop.update_handler(ready, READ)
    turn(loop, 3)
    assert (ready, READ) in paused.calls
    finish(loop, ready)


@pytest.mark.parametrize("turns", [1, 2], ids=["", "paused"])
def test_a_handler_that_is_not_done_can_be_removed(loop, ready, waiting, gate, turns):
    """The end of its future calls nobody."""
    loop.add_handler(ready, waiting, READ)
    turn(loop, turns)
    loop.remove_handler(ready)
    gate.set_result(None)
    turn(loop, 3)
    assert len(waiting.calls) <= 1
    assert loop.stats()["handlers"] == 0


@pytest.mark.parametrize("ended", ["before", "after"])
def test_a_new_registration_does_not_wait_for_the_old_one(
    loop, ready, paused, gate, ended
):
    """Nor does the end of the old one end its own pause."""
    loop.remove_handler(ready)
    if ended == "before":
        gate.set_result(None)
    calls, never = Recorder(), concurrent.futures.Future()
    loop.add_handler(ready, lambda fd, events: calls(fd, events) or never, READ)
    turn(loop, 2)
    if ended == "after":
        gate.set_result(None)
    turn(loop, 4)
    assert calls == [(ready, READ)]


def test_a_paused_handler_whose_file_was_closed_gives_way(loop, gate):
    """Its number is free for another file, as that of every other handler."""
    calls, others = [], Recorder()
    with pair() as (a, b), pair() as (c, d):
        b.send(b"x")
        d.send(b"x")
        number = os.dup(a.fileno())
        loop.add_handler(number, lambda *_: calls.append(1) or gate, READ)
        turn(loop, 3)
        os.dup2(c.fileno(), number)
        drain(a)
        loop.add_handler(number, others, READ)
        gate.set_result(None)
        turn(loop, 3)
        assert calls == [1]
        assert set(others) == {(number, READ)}
        loop.remove_handler(number)
        os.close(number)


def test_a_hang_up_waits_for_a_paused_handler(loop, gate, calls):
    """It does not spin meanwhile, and it is not lost."""

    def handler(fd, events):
        calls(fd, events)
        return gate

    with pipe() as (reader, writer):
        os.write(writer, b"x")
        loop.add_handler(reader, handler, READ)
        turn(loop, 2)
        os.close(writer)
        idle(loop)
        assert len(calls.take()) == 1
        os.read(reader, 9)
        gate.set_result(None)
        turn(loop, 3)
        assert calls[0][1] & (READ | ERROR)
        loop.remove_handler(reader)


def test_a_python_poller_pauses_too(waiting, gate):
    """What it reports all the same is for nobody."""
    with pair() as (a, _):
        fd = a.fileno()
        impl = ScriptedPoller(*[[(fd, READ)]] * 5)
        with ioloop.IOLoop(impl=impl) as loop:
            loop.add_handler(fd, waiting, READ)
            turn(loop, 4)
            assert waiting.calls.take() == [(fd, READ)]
            assert fd not in impl.registered
            gate.set_result(None)
            turn(loop, 4)
            assert impl.registered[fd] & READ
            finish(loop, fd)


def test_a_call_is_not_ended_by_the_future_of_the_one_before():
    """That is done in time for an event, which comes too early all the same."""
    gates, made = [], concurrent.futures.Future

    def poll():
        if len(gates) == 1 and not gates[0].done():
            gates[0].set_result(None)
        return [(fd, READ)]

    with pair() as (a, _):
        fd = a.fileno()
        with ioloop.IOLoop(impl=ScriptedPoller(*[poll] * 6)) as loop:
            loop.add_handler(fd, lambda *_: gates.append(made()) or gates[-1], READ)
            turn(loop, 6)
            assert len(gates) == 2
            loop.remove_handler(fd)


@pytest.mark.parametrize("end", ["first", "second"])
def test_a_paused_handler_whose_file_is_closed_disturbs_nobody(loop, gate, end):
    """Whether its future ends before or after it is removed."""
    others = Recorder()
    with pair() as (a, b), pair() as (c, d):
        b.send(b"x")
        d.send(b"x")
        loop.add_handler(a, lambda *_: gate, READ)
        turn(loop, 3)
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


class Unfinished:
    """A future that can't be waited for."""

    def add_done_callback(self, callback):
        raise ZeroDivisionError


def test_a_handler_with_a_future_that_fails_is_called_again(loop, ready, expect_log):
    """There is nothing to wait for."""
    calls = []
    loop.add_handler(ready, lambda *_: calls.append(1) or Unfinished(), READ)
    turn(loop, 3)
    assert len(calls) == 3
    for _ in range(3):
        expect_log.take("Exception in callback", ZeroDivisionError)


@pytest.mark.parametrize("closed", [False, True], ids=["", "closed"])
def test_a_loop_with_a_paused_handler_is_collected(
    poller, ready, closed, warns_unclosed
):
    """With the future that it waits for, which refers to it."""
    futures = [concurrent.futures.Future()]
    loop = poller.module.IOLoop(impl=poller.impl())
    loop.add_handler(ready, lambda *_: futures[0], READ)
    turn(loop, 3)
    reference = weakref.ref(loop)
    if closed:
        loop.close()
        del loop
    else:
        with warns_unclosed():
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


@pytest.mark.row("D14")
def test_an_always_ready_fd_starves_nobody(loop, ready):
    order = []

    def handler(fd, events):
        order.append("handler")
        loop.add_callback(order.append, "callback")
        loop.call_later(0, order.append, "timeout")

    loop.add_handler(ready, handler, READ)
    turn(loop, 4)
    assert order == ["handler"] + ["callback", "timeout", "handler"] * 3


@pytest.mark.row("D16")
def test_a_handler_may_drop_its_last_reference(loop, ready):
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
    loop.add_handler(ready, handler, READ)
    del handler
    turn(loop)
    assert seen == [("alive", dead)]
    assert dead == ["dead"]


@pytest.mark.row("D17")
def test_destructors_that_change_the_table(loop):
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


@pytest.mark.row("D17")
def test_a_destructor_that_removes_what_is_next(loop):
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


def test_removed_handlers_are_freed_at_once(loop, ready):
    def handler(fd, events):
        pass

    fd = Fileno(ready.fileno())
    references = [weakref.ref(handler), weakref.ref(fd)]
    for steps in ((), (READ, NONE), (WRITE,)):
        loop.add_handler(fd, handler, READ)
        for events in steps:
            loop.update_handler(fd, events)
        loop.remove_handler(fd)
    del fd, handler
    assert [reference() for reference in references] == [None, None]


# -- Threads and the closed loop ----------------------------------------------


def test_wrong_thread_is_told_so(loop, ready):
    with sleeping(loop):
        for method, *args in (
            (loop.add_handler, ready, print, READ),
            (loop.update_handler, ready, READ),
            (loop.remove_handler, ready),
        ):
            with pytest.raises(RuntimeError, match="thread"):
                method(*args)


@pytest.mark.row("B15")
def test_after_close(loop, ready):
    """What is left to do in a `finally` does nothing; all else is refused."""
    loop.add_handler(ready, fail, READ)
    loop.close()
    with pytest.raises(RuntimeError, match="IOLoop is closed"):
        loop.add_handler(ready, print, READ)
    with pytest.raises(RuntimeError, match="IOLoop is closed"):
        loop.update_handler(ready, READ)
    for fd in (ready, ready.fileno(), free_number(), Fileno(OSError)):
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


EXCLUSIVE = 1 << 28


@pytest.mark.parametrize("poller", ["epoll"], indirect=True)
def test_a_handler_that_can_not_be_paused_by_another_mask(loop, ready, gate):
    """The kernel refuses to change an exclusive registration."""
    calls = []

    def handler(sock, events):
        calls.append(1)
        return None if gate.done() else gate

    loop.add_handler(ready, handler, READ | EXCLUSIVE)
    turn(loop, 2)
    idle(loop)
    assert calls == [1]
    gate.set_result(None)
    turn(loop, 3)
    assert len(calls) > 1
    loop.remove_handler(ready)
