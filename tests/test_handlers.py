"""add_handler, update_handler, remove_handler and their kin: what they take,
what a handler gets, and that a call that fails changes nothing."""

import contextvars
import errno
import functools
import gc
import os
import sys
import threading
import weakref

import pytest
from helpers import ERROR, NONE, READ, WRITE, Recorder, free_number, pair, pairs, turn

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
    def handler(fd, events):
        calls(fd, events)
        raise error(errno.EPIPE, "broken pipe")

    calls = Recorder()
    loop.add_handler(ends[0], handler, READ)
    turn(loop, 2)
    assert len(calls) == 2


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
    loop.close()
    for call in (
        lambda: loop.add_handler(ends[0], print, READ),
        lambda: loop.update_handler(ends[0], READ),
        lambda: loop.remove_handler(ends[0]),
    ):
        with pytest.raises(RuntimeError, match="IOLoop is closed"):
            call()


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
