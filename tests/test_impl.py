"""`impl` as any Python object: scripted readiness, real wrappers, and pollers
that misbehave.  What is here runs with no kernel's help and is exact."""

import fcntl
import gc
import io
import operator
import os
import resource
import select
import signal
import weakref

import pytest
import test_pollers
from fakes import (
    ERROR,
    NONE,
    READ,
    WRITE,
    Exit,
    FakeClock,
    Recorder,
    ScriptedPoller,
    ScriptEnded,
    fail,
    permutations,
    run_until,
    turn,
)
from kernel import nomemory, on_signal, pair, pairs, pend
from processes import child, when_asleep
from test_pollers import (  # noqa: F401
    test_a_number_used_again_by_a_file_that_looks_the_same,
    test_add_when_the_kernel_still_knows_the_number,
    test_no_events_asked_and_then_some,
    test_stale_event_after_reuse,
    test_update_after_the_kernel_dropped_a_closed_fd,
)

import ioloop

# The tests imported above are run with pollers in Python too: what the impl can't tell
# the loop sees, and what epoll answers by ENOENT or EEXIST is tried the other way.
# These are fixtures of theirs, and `loop` is below.
sockets, sock, peer = test_pollers.sockets, test_pollers.sock, test_pollers.peer
calls, twins = test_pollers.calls, test_pollers.twins


@pytest.fixture
def scripted():
    """A function: (loop, poller) with the given batches."""
    loops = []

    def make(*batches, **options):
        poller = ScriptedPoller(*batches, **options)
        loops.append(ioloop.IOLoop(impl=poller, time_func=poller.clock))
        return loops[-1], poller

    yield make
    while loops:
        loops.pop().close()


@pytest.fixture
def fds():
    """Three real descriptors: a loop may look at them."""
    made = [os.eventfd(0) for _ in range(3)]
    yield made
    for fd in made:
        os.close(fd)


def watched(poller):
    """{fd: what the poller is to look for, besides errors}"""
    return {fd: events & ~ERROR for fd, events in poller.registered.items()}


# -- The contract -------------------------------------------------------------


def test_the_waker_is_registered_first_for_reading(scripted):
    loop, poller = scripted()
    assert watched(poller) == {poller.waker: READ}
    assert os.fstat(poller.waker)
    assert loop._impl is poller


def test_the_waker_is_nobodys_to_take(scripted):
    loop, poller = scripted()
    for fd in (poller.waker, open_object(poller.waker)):
        with pytest.raises(FileExistsError):
            loop.add_handler(fd, Recorder(), READ)
        loop.remove_handler(fd)
        try:
            loop.update_handler(fd, NONE)
        except FileNotFoundError:
            pass
    assert watched(poller) == {poller.waker: READ}
    assert loop.stats()["handlers"] == 0


def open_object(number):
    class File:
        def fileno(self):
            return number

    return File()


def test_calls_of_the_handler_methods(scripted, fds):
    loop, poller = scripted()
    poller.log.clear()
    fd = fds[0]
    loop.add_handler(fd, Recorder(), READ)
    loop.update_handler(fd, READ | WRITE)
    loop.remove_handler(fd)
    assert [call[:2] for call in poller.log] == [
        ("register", fd),
        ("modify", fd),
        ("unregister", fd),
    ]
    assert poller.log[0][2] & ~ERROR == READ
    assert poller.log[1][2] & ~ERROR == READ | WRITE
    assert list(poller.registered) == [poller.waker]


def test_none_is_not_registered(scripted, fds):
    """events=0 leaves the poller's set, so that HUP can't spin."""
    loop, poller = scripted()
    fd = fds[0]
    loop.add_handler(fd, Recorder(), NONE)
    assert fd not in poller.registered
    loop.update_handler(fd, READ)
    assert poller.registered[fd] & ~ERROR == READ
    loop.update_handler(fd, NONE)
    assert fd not in poller.registered
    loop.remove_handler(fd)
    assert fd not in poller.registered


def test_seconds_of_poll(scripted):
    clock = FakeClock()
    loop, poller = scripted(clock=clock)
    with pytest.raises(ScriptEnded):
        loop.start()
    assert poller.polls == [-1]

    poller.polls.clear()
    loop.call_later(2.5, loop.stop)
    loop.add_callback(lambda: loop.add_callback(lambda: None))
    loop.start()
    assert poller.polls == [0, pytest.approx(2.5)]
    assert all(type(seconds) in (int, float) for seconds in poller.polls)
    assert clock.now >= 1002.5


def test_run_once_limits_the_wait(scripted):
    loop, poller = scripted(clock=FakeClock())
    for timeout in (0, 1.5):
        loop.run_once(timeout)
    loop.call_later(7, print)
    loop.run_once(5)
    loop.run_once(1e300)
    assert poller.polls == [0, *map(pytest.approx, (1.5, 5, 2))]


def test_polled_on_every_pass_while_callbacks_wait(scripted):
    loop, poller = scripted()

    def again(left):
        if left:
            loop.add_callback(again, left - 1)
        else:
            loop.stop()

    loop.add_callback(again, 50)
    loop.start()
    assert poller.polls == [0] * 50


def test_a_poll_that_returns_early_is_no_timeout(scripted):
    clock = FakeClock()
    early = [[], [], []]
    loop, poller = scripted(*early, clock=clock)
    fired = []
    loop.call_later(3, lambda: (fired.append(clock.now), loop.stop()))
    loop.start()
    assert len(poller.polls) == 4
    assert fired == [pytest.approx(1003)]


@pytest.mark.parametrize("kind", [list, tuple, iter, dict.items], ids=str)
def test_what_a_poll_may_answer(scripted, fds, kind, calls):
    pairs_ = {fds[0]: READ, fds[1]: WRITE}
    answer = kind(pairs_ if kind is dict.items else list(pairs_.items()))
    loop, _ = scripted(answer)
    loop.add_handler(fds[0], calls, READ | WRITE)
    loop.add_handler(fds[1], calls, READ | WRITE)
    turn(loop)
    assert sorted(calls) == sorted(pairs_.items())


def test_delivered_is_what_was_asked_or_an_error(scripted, fds, calls):
    a, b, c = fds
    everything = 0x7FFFFFFF
    loop, _ = scripted([(a, everything), (b, everything), (c, WRITE)])
    loop.add_handler(a, calls, READ)
    loop.add_handler(b, calls, WRITE)
    loop.add_handler(c, calls, READ)
    turn(loop)
    assert sorted(calls) == sorted([(a, READ | ERROR), (b, WRITE | ERROR)])


def test_an_impl_whose_poll_is_interrupted_polls_again(scripted):
    """Within the iteration: run_once() has the rest of its time."""
    loop, poller = scripted(lambda: fail(InterruptedError), [])
    loop.run_once(60)
    assert len(poller.polls) == 2


def test_close_of_the_impl_is_optional_and_called_once(scripted):
    class Closing(ScriptedPoller):
        closed = 0

        def close(self):
            self.closed += 1

    poller = Closing()
    loop = ioloop.IOLoop(impl=poller)
    loop.close()
    loop.close()
    assert poller.closed == 1


@pytest.mark.row("D28")
def test_a_close_of_the_impl_that_raises(counted_files):
    """All else is closed and let go of all the same."""

    class Stuck(ScriptedPoller):
        def close(self):
            raise ZeroDivisionError

    def thing(*args):
        pass

    loop = ioloop.IOLoop(impl=Stuck())
    with pair() as (a, _):
        loop.add_handler(a, thing, READ)
        loop.add_callback(thing)
        loop.call_later(60, thing)
        reference = weakref.ref(thing)
        del thing
        with pytest.raises(ZeroDivisionError):
            loop.close(all_fds=True)
        loop.close()
        assert a.fileno() == -1
        assert reference() is None
    assert not counted_files()


def test_fileno_of_the_impl_is_optional():
    class Numbered(ScriptedPoller):
        def fileno(self):
            return 77

    with ioloop.IOLoop(impl=Numbered()) as loop:
        assert loop.fileno() == 77
    with ioloop.IOLoop(impl=ScriptedPoller()) as loop:
        with pytest.raises(io.UnsupportedOperation):
            loop.fileno()


@pytest.mark.parametrize("missing", ["register", "modify", "unregister", "poll"])
def test_what_is_no_impl_is_refused_at_once(missing, counted_files):
    class Partial:
        pass

    for name in {"register", "modify", "unregister", "poll"} - {missing}:
        setattr(Partial, name, lambda self, *args: [])
    with pytest.raises((TypeError, AttributeError)):
        ioloop.IOLoop(impl=Partial())
    assert not counted_files()


@pytest.mark.parametrize("impl", [ioloop._EPoll, select.epoll])
def test_a_class_is_no_impl_though_it_has_the_methods(impl, counted_files):
    with pytest.raises(TypeError, match="class"):
        ioloop.IOLoop(impl=impl)
    assert not counted_files()


def poller_class(name, module, *bases):
    return type(name, bases or (ScriptedPoller,), {"__module__": module})


def gevents():
    """As gevent.select.poll: it has a poll() of its own."""
    body = {"__module__": "gevent.select", "poll": lambda self, timeout=None: []}
    return type("poll", (ScriptedPoller,), body)


def zmqs():
    return pytest.importorskip("zmq").Poller


@pytest.mark.parametrize(
    "make",
    [
        lambda: select.poll,
        gevents,
        lambda: type("Derived", (gevents(),), {}),
        zmqs,
        lambda: type("Derived", (zmqs(),), {}),
    ],
    ids=["select", "gevent", "derived from it", "zmq", "derived from that"],
)
def test_what_counts_in_milliseconds_is_refused(make, counted_files):
    """It would spin."""
    impl = make()()
    with pytest.raises(TypeError, match="milliseconds"):
        ioloop.IOLoop(impl=impl)
    assert not counted_files()


@pytest.mark.parametrize(
    "impl",
    [
        poller_class("Poll", "gevent.select"),
        poller_class("poller", "acme"),
        poller_class("Poller", "zmq_tools.poll"),
        poller_class("Poller", "acme.zmq"),
    ],
    ids=lambda impl: f"{impl.__module__}.{impl.__name__}",
)
def test_what_has_another_name_is_not_refused(impl):
    with ioloop.IOLoop(impl=impl()) as loop:
        turn(loop)


def test_a_subclass_that_counts_in_seconds_is_accepted():
    """Its poll() is its own, whatever it derives from."""

    class Seconds(gevents()):
        def poll(self, seconds):
            return []

    with ioloop.IOLoop(impl=Seconds()) as loop:
        turn(loop)


@pytest.mark.row("A33")
def test_an_impl_that_fails_to_register_the_waker(counted_files):
    class Full(ScriptedPoller):
        def register(self, fd, events):
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        ioloop.IOLoop(impl=Full())
    assert not counted_files()


# -- Order and change within one batch ----------------------------------------


def remove(loop, fd):
    loop.remove_handler(fd)


def mask(loop, fd):
    loop.update_handler(fd, NONE)


def replace(loop, fd, handler=fail):
    loop.remove_handler(fd)
    loop.add_handler(fd, handler, READ)


@pytest.mark.row("A25", "A26")
@permutations(3)
@pytest.mark.parametrize("change", [remove, mask, replace])
@pytest.mark.parametrize("victims", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_changes_apply_to_what_is_left_of_the_batch(
    scripted, fds, order, change, victims
):
    """The first handler called changes the `victims`: of the rest, those are not
    called in this batch and the others are."""
    loop, _ = scripted([(fds[i], READ | ERROR) for i in order])
    called = []

    def handler(fd, events):
        called.append(fd)
        if len(called) == 1:
            for victim in victims:
                change(loop, fds[victim])

    for fd in fds:
        loop.add_handler(fd, handler, READ)
    turn(loop)
    first = called[0]
    expected = {fd for i, fd in enumerate(fds) if fd == first or i not in victims}
    assert set(called) == expected
    assert len(called) == len(expected)


@pytest.mark.row("D24")
def test_one_fd_twice_in_a_batch(scripted, fds, calls):
    a = fds[0]
    loop, _ = scripted([(a, READ), (a, WRITE)])
    loop.add_handler(a, calls, READ | WRITE)
    turn(loop)
    assert sum(events for _, events in calls) == READ | WRITE


@pytest.mark.row("A26")
def test_removed_and_added_in_its_own_handler_with_duplicates(scripted, fds):
    a = fds[0]
    loop, _ = scripted([(a, READ), (a, READ)], [(a, READ)])
    calls = []

    def handler(fd, events):
        calls.append(events)
        replace(loop, a, handler)

    loop.add_handler(a, handler, READ)
    turn(loop)
    assert calls == [READ]
    turn(loop)
    assert calls == [READ, READ]


@pytest.mark.row("A25")
def test_a_narrowed_mask_narrows_a_collected_event(scripted, fds, calls):
    """Whichever of the two is called first, which is not promised."""
    both = set(fds[:2])
    loop, _ = scripted([(fd, READ | WRITE) for fd in both])

    def handler(fd, events):
        calls(fd, events)
        [other] = both - {fd}
        loop.update_handler(other, WRITE)

    for fd in both:
        loop.add_handler(fd, handler, READ | WRITE)
    turn(loop)
    assert [events for _, events in calls] == [READ | WRITE, WRITE]
    assert {fd for fd, _ in calls} == both


@pytest.mark.row("D3")
@permutations(3)
@pytest.mark.parametrize("error", [Exit, KeyboardInterrupt, SystemExit])
def test_base_exception_keeps_the_rest_of_the_batch(scripted, fds, order, error):
    """The impl reports each event once, so only the loop can keep it."""
    loop, _ = scripted([(fds[i], READ) for i in order])
    called = []

    def handler(fd, events):
        called.append(fd)
        if len(called) == 1:
            raise error

    for fd in fds:
        loop.add_handler(fd, handler, READ)
    with pytest.raises(error):
        loop.start()
    assert len(called) == 1
    turn(loop)
    assert sorted(called) == sorted(fds)


@pytest.mark.row("D3")
def test_a_signal_that_comes_with_the_events(scripted, fds, calls):
    """Its handler raises before the first of them is delivered: none is lost."""
    raise_, number = pend(signal.SIGUSR1)
    # No Python function between the signal and the end of the poll.
    masks = map(operator.or_, map(raise_, [number]), [READ])
    loop, _ = scripted(zip(fds[:1], masks, strict=True))
    loop.add_handler(fds[0], calls, READ)
    with on_signal(signal.SIGUSR1, lambda *_: fail(Exit)):
        with pytest.raises(Exit):
            loop.run_once(0)
    assert calls == []
    turn(loop)
    assert calls == [(fds[0], READ)]


@pytest.mark.row("D3")
def test_kept_events_respect_what_changed_meanwhile(scripted, fds):
    loop, _ = scripted([(fd, READ) for fd in fds])
    called = []

    def handler(fd, events):
        called.append(fd)
        raise KeyboardInterrupt

    for fd in fds:
        loop.add_handler(fd, handler, READ)
    with pytest.raises(KeyboardInterrupt):
        loop.start()
    rest = [fd for fd in fds if fd not in called]
    remove(loop, rest[0])
    replace(loop, rest[1])
    turn(loop, 2)
    assert len(called) == 1


# -- Pollers that misbehave ---------------------------------------------------


@pytest.mark.row("D24")
def test_unknown_descriptors_are_ignored_and_unregistered(scripted, fds, calls):
    known, unknown = fds[0], 101
    loop, poller = scripted([(unknown, READ), (known, READ), (2**31 - 1, READ)])
    loop.add_handler(known, calls, READ)
    poller.registered[unknown] = READ
    turn(loop, 2)
    assert calls == [(known, READ)]
    assert set(poller.registered) == {poller.waker, known}


@pytest.mark.row("D24")
@pytest.mark.parametrize(
    "answer",
    [
        None,
        7,
        [7],
        [None],
        [(1,)],
        [(1, 2, 3)],
        [("a", READ)],
        [(1.5, READ)],
        [(1, "r")],
        [(1, None)],
        [(10**400, READ)],
        [(1, 10**400)],
    ],
    ids=repr,
)
def test_a_wrong_answer_leaves_start_once(scripted, answer):
    loop, poller = scripted(answer)
    with pytest.raises((TypeError, ValueError, OverflowError)):
        loop.start()
    assert not loop.running()
    loop.run_once(0)
    assert len(poller.polls) == 2


@pytest.mark.row("D24")
@pytest.mark.parametrize(
    ("fd", "events"),
    [(None, -1), (None, 2**32), (None, 2**40), (-1, READ), (-(2**31), READ)],
)
def test_numbers_that_are_no_mask_or_no_descriptor(scripted, fds, calls, fd, events):
    loop, poller = scripted([(fds[0] if fd is None else fd, events)])
    loop.add_handler(fds[0], calls, READ)
    try:
        loop.run_once(0)
    except (ValueError, OverflowError):
        assert not loop.running()
    turn(loop)
    assert len(poller.polls) == 2
    assert all(mask & ~(READ | ERROR) == 0 for _, mask in calls)


@pytest.mark.row("D24")
def test_an_answer_that_fails_half_way(scripted, fds, calls):
    def answer():
        yield fds[0], READ
        raise ZeroDivisionError

    loop, _ = scripted(answer)
    loop.add_handler(fds[0], calls, READ)
    with pytest.raises(ZeroDivisionError):
        loop.start()
    turn(loop)
    assert len(calls) <= 1


@pytest.mark.row("D24")
@pytest.mark.parametrize("error", [OSError, ZeroDivisionError, KeyboardInterrupt])
def test_a_poll_that_raises(scripted, error):
    def answer():
        raise error

    loop, poller = scripted(answer)
    ran = []
    loop.call_later(0.0, ran.append, "timeout")
    with pytest.raises(error):
        loop.start()
    assert not loop.running()
    loop.add_callback(loop.stop)
    loop.start()
    assert ran == ["timeout"]


@pytest.mark.row("A8")
def test_a_register_that_raises_leaves_no_entry(scripted, fds):
    loop, poller = scripted()
    poller.register = lambda fd, events: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loop.add_handler(fds[0], print, READ)
    assert loop.stats()["handlers"] == 0
    del poller.register
    loop.add_handler(fds[0], print, READ)
    assert poller.registered[fds[0]]


@pytest.mark.row("A8")
def test_a_modify_that_raises_leaves_the_old_mask(scripted, fds, calls):
    loop, poller = scripted([(fds[0], READ | WRITE)])
    loop.add_handler(fds[0], calls, READ)
    poller.modify = lambda fd, events: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loop.update_handler(fds[0], WRITE)
    turn(loop)
    assert calls == [(fds[0], READ)]


@pytest.mark.row("A6")
@pytest.mark.parametrize("error", [OSError, KeyError, ValueError])
def test_an_unregister_that_raises_is_harmless(scripted, fds, error):
    def unregister(fd):
        raise error

    loop, poller = scripted()
    loop.add_handler(fds[0], print, READ)
    poller.unregister = unregister
    loop.remove_handler(fds[0])
    assert loop.stats()["handlers"] == 0


@pytest.mark.row("D25")
def test_an_impl_that_uses_the_loop_while_it_polls(scripted, fds):
    a, b, _ = fds
    calls, ran = Recorder(), []

    def meddle():
        loop.add_callback(ran.append, "callback")
        loop.add_handler(b, calls, READ)
        loop.remove_handler(a)
        with pytest.raises(RuntimeError):
            loop.close()
        with pytest.raises(RuntimeError):
            loop.start()
        loop.stop()
        return [(a, READ), (b, READ)]

    loop, _ = scripted(meddle)
    loop.add_handler(a, calls, READ)
    loop.start()
    # A registration made after the poll began did not ask for its events.
    assert a not in [fd for fd, _ in calls]
    assert ran == ["callback"]


@pytest.mark.row("D25")
def test_an_impl_that_uses_the_loop_when_told_of_a_handler(scripted, fds):
    loop, poller = scripted()
    a = fds[0]

    def register(fd, events):
        ScriptedPoller.register(poller, fd, events)
        loop.add_callback(print)
        if fd == a:
            loop.remove_handler(a)

    poller.register = register
    loop.add_handler(a, print, READ)
    loop.remove_handler(a)
    assert loop.stats()["handlers"] == 0


def test_an_impl_that_closes_the_loop_when_told_of_a_handler():
    """The handler is refused, and not kept."""

    class Impl(ScriptedPoller):
        def register(self, fd, events):
            if fd == 50:
                loop.close()

    class Handler:
        def __call__(self, fd, events):
            pass

    loop, handler = ioloop.IOLoop(impl=Impl()), Handler()
    with pytest.raises(RuntimeError, match="closed"):
        loop.add_handler(50, handler, READ)
    reference = weakref.ref(handler)
    del handler
    gc.collect()
    assert reference() is None


@pytest.mark.row("D25")
@pytest.mark.parametrize("trick", ["adds", "removes"])
def test_an_impl_that_changes_the_table_when_told_to_drop(scripted, fds, trick, calls):
    a = fds[0]
    loop, poller = scripted([(a, READ)])
    large = fcntl.fcntl(a, fcntl.F_DUPFD_CLOEXEC, 900)

    def unregister(fd):
        del poller.unregister
        poller.unregister(fd)
        if trick == "adds":
            loop.add_handler(large, calls, READ)
        else:
            loop.remove_handler(a)

    loop.add_handler(a, calls, READ)
    poller.unregister = unregister
    try:
        loop.remove_handler(a)
        assert loop.stats()["handlers"] == (trick == "adds")
        assert a not in poller.registered
        with pytest.raises(FileNotFoundError):
            loop.update_handler(a, WRITE)
        turn(loop)
        assert calls == []
        loop.add_handler(a, calls, READ)
    finally:
        os.close(large)


@pytest.mark.row("A14")
@pytest.mark.parametrize("fd", [2**24, 2**31 - 1])
def test_a_number_that_no_descriptor_has(fd):
    """No table is that long, though the poller took it: OverflowError."""
    with child() as inside:
        if inside:
            resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
            poller = ScriptedPoller()
            with ioloop.IOLoop(impl=poller) as loop:
                with pytest.raises(OverflowError):
                    loop.add_handler(fd, print, READ)
                assert loop.stats()["handlers"] == 0
                assert list(poller.registered) == [poller.waker]
                turn(loop)


@pytest.mark.row("A8")
@pytest.mark.parametrize("which", range(4))
def test_no_memory_after_register(scripted, fds, which):
    """What the poller was told is taken back: all or nothing."""
    memory, (loop, poller) = nomemory(), scripted()
    large = fcntl.fcntl(fds[0], fcntl.F_DUPFD_CLOEXEC, 900)

    def register(fd, events):
        ScriptedPoller.register(poller, fd, events)
        memory.set_nomemory(which, which + 1)

    poller.register = register
    try:
        loop.add_handler(large, print, READ)
    except MemoryError:
        pass
    finally:
        memory.remove_mem_hooks()
        os.close(large)
    assert (large in poller.registered) == loop.stats()["handlers"]


@pytest.mark.row("D25")
def test_an_impl_that_makes_the_tables_grow_when_told_of_a_mask(scripted, fds):
    loop, poller = scripted([(fds[0], READ | WRITE)])
    calls, high = Recorder(), os.dup2(fds[1], 900)

    def modify(fd, events):
        ScriptedPoller.modify(poller, fd, events)
        loop.add_handler(high, fail, READ)

    try:
        loop.add_handler(fds[0], calls, READ)
        poller.modify = modify
        loop.update_handler(fds[0], READ | WRITE)
        turn(loop)
        assert calls == [(fds[0], READ | WRITE)]
        loop.remove_handler(high)
    finally:
        os.close(high)


# -- Real pollers in Python ---------------------------------------------------


class PollWrapper:
    """select.poll() counts in milliseconds."""

    def __init__(self):
        self.impl = select.poll()
        self.register = self.impl.register
        self.modify = self.impl.modify
        self.unregister = self.impl.unregister

    def poll(self, seconds):
        return self.impl.poll(None if seconds < 0 else seconds * 1000)


@pytest.fixture(params=[select.epoll, PollWrapper])
def loop(request):
    """Also of the tests that are imported from test_pollers.py."""
    with ioloop.IOLoop(impl=request.param()) as made:
        yield made


@pytest.mark.parametrize("impl", [select.epoll, PollWrapper])
def test_real_impls_of_the_standard_library(impl, counted_files):
    with pairs(2) as [(a, b), (c, d)], ioloop.IOLoop(impl=impl()) as loop:
        got = bytearray()

        def reader(fd, events):
            got.extend(fd.recv(9))
            if len(got) >= 4:
                loop.stop()

        loop.add_handler(a, reader, READ)
        loop.add_handler(c, reader, READ)
        b.send(b"ab")
        loop.add_callback(d.send, b"cd")
        loop.start()
        assert sorted(got) == sorted(b"abcd")
        loop.update_handler(a, NONE)
        loop.call_later(0.001, loop.stop)
        loop.start()
        loop.update_handler(a, READ)
        loop.remove_handler(c)
        b.send(b"e")
        run_until(loop, lambda: len(got) == 5)
    assert not counted_files()


def test_real_impls_are_woken_by_threads(loop):
    thread = when_asleep(loop.add_callback, loop.stop)
    loop.start()
    thread.join()


def test_oneshot_that_has_fired_stays_fired_with_a_python_impl(calls):
    """One that has a set of its own in the child."""

    class Epoll:
        def __init__(self):
            self.reinit()

        def reinit(self):
            self.epoll = select.epoll()
            for name in ("register", "modify", "unregister", "poll", "close"):
                setattr(self, name, getattr(self.epoll, name))

    with pairs(2) as [(a, b), (c, d)], ioloop.IOLoop(impl=Epoll()) as loop:
        for fd in (a, c):
            loop.add_handler(fd, calls, READ | loop._EPOLLONESHOT)
        b.send(b"x")
        turn(loop, 2)
        assert calls.take() == [(a, READ)]
        with child() as inside:
            if inside:
                loop.reinit()
                turn(loop)
                assert calls == []
                d.send(b"x")
                turn(loop, 2)
                assert calls.take() == [(c, READ)]
                loop.update_handler(a, READ)
                turn(loop)
                assert calls == [(a, READ)]


def test_a_nearer_timeout_wakes_who_watches_a_python_impl():
    with ioloop.IOLoop(impl=select.epoll()) as loop, select.epoll() as outer:
        outer.register(loop.fileno(), select.EPOLLIN)
        turn(loop)
        assert not outer.poll(0)
        loop.call_later(60, int)
        assert outer.poll(0)
        turn(loop, 2)
        assert not outer.poll(0)


@pytest.mark.row("A4")
@pytest.mark.parametrize("kind", ["no file", "regular file"])
def test_a_second_handler_for_what_only_the_impl_knows(kind):
    """Nothing tells whether it is another file by now: the first handler stays."""
    with open(__file__) as file, ioloop.IOLoop(impl=ScriptedPoller()) as loop:
        fd = file.fileno() if kind == "regular file" else 5000
        loop.add_handler(fd, fail, READ)
        with pytest.raises(FileExistsError):
            loop.add_handler(fd, fail, READ)
        loop.remove_handler(fd)
