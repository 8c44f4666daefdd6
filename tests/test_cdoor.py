"""The C API: what a Cython or C extension gets from ioloop.pxd.

The extensions are built against the ioloop that is installed, once for each state of
the sources.  cdoor_client.pyx calls every function of the door from Python; for the
fake kqueue it is loaded once more, bound to that build of the module.
"""

import ctypes
import errno
import gc
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import weakref
from unittest import mock

import pytest
from building import (
    HERE,
    PXD,
    c_echo,
    cached,
    compile_extension,
    compile_library,
    extension,
    load,
)
from fakes import (
    ERROR,
    FOREVER,
    NONE,
    READ,
    WRITE,
    Exit,
    FakeClock,
    Recorder,
    ScriptedPoller,
    fail,
    idle,
    run_until,
    turn,
)
from kernel import broken_bell, pair, pairs, pipe, readable
from processes import (
    Thread,
    assert_shares_gil,
    busy_in_thread,
    child,
    in_thread,
    run_python,
    sleeping,
    wait_until,
)

import ioloop

MS = 1_000_000
NEVER = 2**63 - 1


# -- Shorthands ----------------------------------------------------------------


class Owner:
    """What the loop keeps alive: it can be called, and referred to weakly."""

    def __init__(self, function=lambda *args: None):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


@pytest.fixture
def noting(log):
    """`noting(what)`: a function that appends `what` to the log, and is kept alive."""
    made = []

    def make(what):
        made.append(lambda *args: log.append(what))
        return made[-1]

    yield make


def hook(loop):
    """Record the calls of handle_callback_exception: (owner, type of exception)."""
    calls = []
    loop.handle_callback_exception = lambda owner: calls.append(
        (owner, sys.exc_info()[0])
    )
    return calls


# -- Handlers ------------------------------------------------------------------


def test_constants_are_those_of_python(client, poller):
    cls = poller.module.IOLoop
    assert client.CONSTANTS == {name: getattr(cls, name) for name in client.CONSTANTS}


def test_handler_gets_loop_fd_and_events(client, loop, log):
    function = Owner(lambda *args: log.append(args))
    with pair() as (a, b):
        client.add_handler(loop, a.fileno(), READ, function, None)
        turn(loop)
        assert log == []
        b.send(b"x")
        turn(loop, 2)  # level-triggered: nobody has read
        assert log == [(loop, a.fileno(), READ)] * 2
        a.recv(1)
        turn(loop)
        assert len(log) == 2
        client.remove_handler(loop, a.fileno())


def test_handler_gets_its_arg(client, loop):
    with readable() as (a, _), readable() as (b, _):
        args = [client.Arg(), client.Arg()]
        args[0].handle(loop, a.fileno())
        args[1].handle(loop, b.fileno())
        turn(loop, 2)
        client.remove_handler(loop, a.fileno())
        turn(loop, 3)
        assert [arg.value for arg in args] == [2, 5]


def test_update_handler(client, loop):
    calls = Recorder()
    function = Owner(lambda loop, fd, events: calls(fd, events))
    with readable() as (a, _):
        fd = a.fileno()
        client.add_handler(loop, fd, WRITE, function, function)
        turn(loop)
        assert calls.take() == [(fd, WRITE)]
        client.update_handler(loop, fd, READ)
        turn(loop)
        assert calls.take() == [(fd, READ)]
        client.update_handler(loop, fd, READ | WRITE)
        turn(loop)
        assert calls.take() == [(fd, READ | WRITE)]


def test_error_is_told(client, loop, poller):
    calls = Recorder()
    function = Owner(lambda loop, fd, events: calls(fd, events))
    with pipe() as (reader, writer):
        client.add_handler(loop, writer, WRITE, function, function)
        os.close(reader)
        turn(loop)
        ((fd, events),) = calls.take()
        assert fd == writer
        assert events & (WRITE if poller.name == "select" else ERROR)
        client.remove_handler(loop, writer)


def test_events_of_none_hear_nothing(client, loop, log, noting):
    with pair() as (a, b):
        fd = a.fileno()
        client.add_handler(loop, fd, NONE, noting("called"), None)
        b.send(b"x")
        b.close()
        idle(loop)
        assert log == []
        assert loop.stats()["handlers"] == 1
        client.update_handler(loop, fd, READ)
        turn(loop)
        client.update_handler(loop, fd, NONE)
        idle(loop)
        assert log == ["called"]


def test_handler_removes_itself(client, loop, log):
    with readable() as (a, _):

        def function(loop, fd, events):
            log.append(fd)
            client.remove_handler(loop, fd)

        client.add_handler(loop, a.fileno(), READ, function, None)
        turn(loop, 3)
        assert log == [a.fileno()]
        client.remove_handler(loop, a.fileno())


def test_handler_removes_all_others(client, loop, log):
    """None of them is called any more, though all were found ready together."""
    with pairs(20) as made:

        def function(loop, fd, events):
            log.append(fd)
            for a, _ in made:
                client.remove_handler(loop, a.fileno())

        for a, b in made:
            b.send(b"x")
            client.add_handler(loop, a.fileno(), READ, function, None)
        turn(loop, 3)
        assert len(log) == 1


def test_tables_grow_while_a_handler_runs(client, loop, log, noting):
    with pair() as (a, _), pairs(200) as made:

        def function(loop, fd, events):
            for sock, _ in made:
                client.add_handler(loop, sock.fileno(), READ, noting("no"), None)
            client.update_handler(loop, fd, NONE)
            log.append(events)

        client.add_handler(loop, a.fileno(), WRITE, function, None)
        turn(loop, 3)
        assert log == [WRITE]


def test_python_manages_what_c_has_added(client, loop, log, noting):
    """There is one table: each side finds what the other has added."""
    with readable() as (a, _):
        client.add_handler(loop, a.fileno(), NONE, noting("C"), None)
        with pytest.raises(FileExistsError):
            loop.add_handler(a, log.append, READ)
        loop.update_handler(a, READ)
        turn(loop)
        loop.remove_handler(a)
        loop.add_handler(a, lambda *args: log.append("Python"), NONE)
        with pytest.raises(FileExistsError):
            client.add_handler(loop, a.fileno(), READ, noting("no"), None)
        client.update_handler(loop, a.fileno(), READ)
        turn(loop)
        client.remove_handler(loop, a.fileno())
        turn(loop)
        assert log == ["C", "Python"]


def test_descriptor_used_again(client, loop, log, noting):
    """What was registered for a closed fd hears nothing of its number's next user."""
    with pair() as (a, b), readable() as (c, _):
        fd = a.fileno()
        client.add_handler(loop, fd, READ, noting("first"), None)
        os.dup2(c.fileno(), fd)
        client.add_handler(loop, fd, READ, noting("second"), None)
        turn(loop)
        assert log == ["second"]
        client.remove_handler(loop, fd)


def test_handler_errors(client, loop, noting):
    function = noting("called")
    with pair() as (a, _), open(__file__) as file:
        client.add_handler(loop, a.fileno(), READ, function, None)
        with pytest.raises(FileExistsError):
            client.add_handler(loop, a.fileno(), READ, function, None)
        with pytest.raises(PermissionError):
            client.add_handler(loop, file.fileno(), READ, function, None)
        with pytest.raises(FileNotFoundError):
            client.update_handler(loop, file.fileno(), READ)
        with pytest.raises(ValueError):
            client.add_handler(loop, -1, READ, function, None)
        with pytest.raises(ValueError):
            client.add_nothing(loop, "handler")
        number = os.dup(0)
        os.close(number)
        with pytest.raises(OSError) as caught:
            client.add_handler(loop, number, READ, function, None)
        assert caught.value.errno == errno.EBADF
        assert loop.stats()["handlers"] == 1
        client.remove_handler(loop, number)
        client.remove_handler(loop, a.fileno())


def test_negative_descriptors(client, loop):
    """What a C client has left when it has closed its own."""
    for fd in (-1, -1000, -(2**31)):
        client.remove_handler(loop, fd)
        with pytest.raises((FileNotFoundError, ValueError)):
            client.update_handler(loop, fd, READ)


def test_handler_owner(client, loop):
    """It lives for as long as the registration, and no longer."""
    with pair() as (a, _), pair() as (b, _):
        for sock in (a, b):
            owner = Owner()
            owned = weakref.ref(owner)
            client.add_handler(loop, sock.fileno(), READ, owner, owner)
            refused = Owner()
            refusal = weakref.ref(refused)
            with pytest.raises(FileExistsError):
                client.add_handler(loop, sock.fileno(), READ, refused, refused)
            del owner, refused
            assert refusal() is None
            client.update_handler(loop, sock.fileno(), NONE)
            assert owned() is not None
            if sock is a:
                client.remove_handler(loop, a.fileno())
                assert owned() is None
        loop.close()
        assert owned() is None


def test_handler_owner_lives_while_it_is_called(client, loop, log):
    with readable() as (a, _):

        def function(loop, fd, events):
            client.remove_handler(loop, fd)
            gc.collect()
            log.append(owned() is not None)

        owner = Owner(function)
        owned = weakref.ref(owner)
        client.add_handler(loop, a.fileno(), READ, owner, owner)
        del owner, function
        turn(loop)
        assert log == [True]
        assert owned() is None


def test_handler_on_a_python_poller(clients, log):
    client = clients(ioloop)
    function = Owner(lambda loop, fd, events: log.append((fd, events)))
    with ioloop.IOLoop(select.epoll()) as loop, readable() as (a, _):
        client.add_handler(loop, a.fileno(), READ, function, function)
        turn(loop)
        client.remove_handler(loop, a.fileno())
        turn(loop)
        assert log == [(a.fileno(), READ)]


# -- Timers --------------------------------------------------------------------


@pytest.fixture
def timed(make_loop):
    """A loop on a fake clock, which is its `clock`."""
    clock = FakeClock()
    loop = make_loop(time_func=clock)
    loop.clock = clock
    return loop


def advance(loop, nanoseconds):
    loop.clock.advance(nanoseconds / 1e9)
    turn(loop)


def test_timer(client, timed, log, noting):
    timer = client.new_timer(timed, noting("fired"), None)
    advance(timed, 100 * MS)
    assert (log, timed.next_timeout()) == ([], None)
    for _ in range(3):
        client.start_timer(timer, 10 * MS)
        assert timed.next_timeout() == pytest.approx(0.01, abs=1e-6)
        advance(timed, 9 * MS)
        assert log == []
        advance(timed, 2 * MS)
        assert log == ["fired"]
        advance(timed, 100 * MS)
        assert log == ["fired"]
        log.clear()
    assert timed.stats()["timeouts"] == 3


def test_timer_is_never_early(client, loop, log):
    def function(loop):
        log.append(time.monotonic_ns())
        loop.stop()

    timer = client.new_timer(loop, function, None)
    for delay in (50_000, MS, 5 * MS):
        before = time.monotonic_ns()
        client.start_timer(timer, delay)
        loop.start()
        assert log.pop() - before >= delay


def test_starting_again_moves_it(client, timed, log, noting):
    timer = client.new_timer(timed, noting("fired"), None)
    client.start_timer(timer, 10 * MS)
    client.start_timer(timer, 30 * MS)
    assert timed.stats()["pending_timeouts"] == 1
    advance(timed, 20 * MS)
    assert log == []
    client.start_timer(timer, 5 * MS)
    advance(timed, 6 * MS)
    assert log == ["fired"]
    advance(timed, 100 * MS)
    assert log == ["fired"]


def test_stop_timer(client, timed, log, noting):
    timer = client.new_timer(timed, noting("fired"), None)
    client.stop_timer(timer)
    client.start_timer(timer, MS)
    client.stop_timer(timer)
    client.stop_timer(timer)
    assert timed.stats()["pending_timeouts"] == 0
    advance(timed, 10 * MS)
    assert log == []
    client.start_timer(timer, MS)
    advance(timed, 2 * MS)
    client.stop_timer(timer)
    assert log == ["fired"]


def test_timers_and_timeouts_fire_in_one_order(client, timed):
    """By (deadline, order of adding), and it is starting that adds."""
    log, kept, expected = [], [], []
    for number, milliseconds in enumerate([5, 2, 5, 2, 9, 2, 5, 9, 0, 0, 5, 2]):
        expected.append((milliseconds, number))

        def function(*args, what=expected[-1]):
            log.append(what)

        if number % 3:
            timer = client.new_timer(timed, function, function)
            client.start_timer(timer, NEVER)
            client.start_timer(timer, milliseconds * MS)
            kept.append(timer)
        else:
            timed.call_later(milliseconds / 1000, function)
    advance(timed, 20 * MS)
    assert log == sorted(expected)


def test_starting_again_is_adding_anew(client, timed, log, noting):
    timers = [client.new_timer(timed, noting(name), None) for name in "abc"]
    for timer in timers:
        client.start_timer(timer, MS)
    timed.call_later(0.001, log.append, "Python")
    client.start_timer(timers[0], MS)
    advance(timed, 2 * MS)
    assert log == ["b", "c", "Python", "a"]


@pytest.mark.parametrize("delay", [0, 1, -1, -MS, -(2**63)])
def test_started_while_timers_run_waits_for_the_next_pass(
    client, timed, log, noting, delay
):
    def start_all(loop):
        log.append("again")
        for timer in timers:
            client.start_timer(timer, delay)

    timers = [client.new_timer(timed, start_all, None)]
    timers.append(client.new_timer(timed, noting("other"), None))
    timers.append(client.new_timer(timed, start_all, None))
    client.start_timer(timers[0], 0)
    advance(timed, MS)
    for _ in range(3):
        assert log == ["again"]
        log.clear()
        # The last one goes on: not all of them, for they start each other.
        client.stop_timer(timers[1])
        client.stop_timer(timers[2])
        advance(timed, MS)
    client.stop_timer(timers[0])
    log.clear()
    client.start_timer(timers[1], delay)
    client.start_timer(timers[0], delay)
    client.start_timer(timers[2], delay)
    advance(timed, MS)
    # Moved by the first of them that ran, the last did not: it is for the next.
    assert log == ["other", "again"]
    client.stop_timer(timers[0])
    advance(timed, MS)
    assert log == ["other", "again", "other", "again"]


def test_stopped_in_the_same_pass_does_not_fire(client, timed, log):
    def stop_all(loop):
        log.append("fired")
        for timer in timers:
            client.stop_timer(timer)
        handle.cancel()

    timers = [client.new_timer(timed, stop_all, None) for _ in range(20)]
    handle = timed.call_later(0, log.append, "Python")
    timed.remove_timeout(handle)
    for timer in timers:
        client.start_timer(timer, MS)
    handle = timed.call_later(0.001, log.append, "Python")
    advance(timed, 5 * MS)
    advance(timed, 5 * MS)
    assert log == ["fired"]


def test_delays_without_end(client, timed, log, noting):
    timer = client.new_timer(timed, noting("fired"), None)
    client.start_timer(timer, NEVER)
    assert timed.next_timeout() is None or timed.next_timeout() > 1e9
    advance(timed, FOREVER * 1000 * MS)
    assert log == []
    client.start_timer(timer, -NEVER - 1)
    assert timed.next_timeout() == 0
    turn(timed)
    assert log == ["fired"]


@pytest.mark.parametrize("end", ["fired", "stopped", "closed", "cycle"])
def test_timer_owner(client, make_loop, end):
    """The loop keeps what is armed, and the timer its owner."""
    clock, owner = FakeClock(), Owner()
    loop, owned = make_loop(time_func=clock), weakref.ref(owner)
    timer = client.new_timer(loop, owner, owner)
    client.start_timer(timer, MS)
    if end == "cycle":
        owner.loop, owner.timer = loop, timer
    if end == "stopped":
        client.stop_timer(timer)
    else:
        timer = None
    owner = None
    gc.collect()
    assert owned() is not None
    if end == "fired":
        clock.advance(1)
        turn(loop)
    elif end == "stopped":
        timer = None
    else:
        loop.close()
        if end == "cycle":
            loop = make_loop = None
            gc.collect()
    assert owned() is None


def test_timer_after_close(client, make_loop, log, noting):
    """Also when nobody else has the loop any more."""
    loop = make_loop()
    timers = [client.new_timer(loop, noting("fired"), None) for _ in range(2)]
    client.start_timer(timers[0], NEVER)
    loop.close()
    for _ in range(2):
        for timer in timers:
            client.stop_timer(timer)
            with pytest.raises(RuntimeError):
                client.start_timer(timer, 0)
            repr(timer)
        loop = make_loop = None
    assert log == []


def test_timer_on_a_clock_that_fails(client, make_loop, log, noting):
    """A call that fails changes nothing."""
    clock = FakeClock()
    loop = make_loop(time_func=lambda: clock() if clock.now else fail(OSError))
    timer = client.new_timer(loop, noting("fired"), None)
    client.start_timer(timer, MS)
    now, clock.now = clock.now, 0
    with pytest.raises(OSError):
        client.start_timer(timer, FOREVER)
    clock.now = now + 1
    turn(loop)
    assert log == ["fired"]


def test_timer_on_a_clock_that_interferes(client, make_loop, log, noting):
    """The clock is the user's code, which may start, stop or close as well."""
    tricks = []

    def clock():
        if tricks:
            tricks.pop()()
        return 1000.0

    loop = make_loop(time_func=clock)
    timer = client.new_timer(loop, noting("fired"), None)
    for trick in (
        lambda: client.start_timer(timer, 0),
        lambda: client.stop_timer(timer),
    ):
        client.start_timer(timer, MS)
        tricks.append(trick)
        client.start_timer(timer, 0)
        assert loop.stats()["pending_timeouts"] == 1
        turn(loop, 2)
        assert log == ["fired"]
        log.clear()
    tricks.append(loop.close)
    with pytest.raises(RuntimeError):
        client.start_timer(timer, 0)


def test_timer_started_by_a_destructor_while_the_heap_grows(client, make_loop, poller):
    """Up to CPython 3.11 any object that is made may collect garbage."""

    class Garbage:
        def __init__(self):
            self.me = self

        def __del__(self):
            client.start_timer(timer, NEVER)

    def clock():
        if litter:
            litter.pop()()
        return 1000.0

    def collect_soon():
        Garbage()
        kept.extend([] for _ in range(100))  # a list used again would collect nothing
        gc.set_threshold(1)
        gc.enable()

    litter, kept, fired, threshold = [], [], [], gc.get_threshold()
    loop = make_loop(time_func=clock)
    fire = fired.append
    timer = client.new_timer(loop, fire, fire)
    gc.disable()
    try:
        for count in range(1, 200):
            loop.call_later(FOREVER, int)
            litter.append(collect_soon)
            client.start_timer(timer, MS)
            gc.disable()
            assert loop.stats()["pending_timeouts"] == count + 1
            client.stop_timer(timer)
            assert loop.stats()["pending_timeouts"] == count
    finally:
        gc.set_threshold(*threshold)
        gc.enable()
        del Garbage.__del__  # of those that are left, with which nothing is to happen
    poller.module._verify(loop)
    assert fired == []


def test_not_a_timer(client, loop):
    handle = loop.call_later(FOREVER, int)
    for timer in (None, 1, object(), loop, handle):
        with pytest.raises(TypeError):
            client.start_timer(timer, 0)
        with pytest.raises(TypeError):
            client.stop_timer(timer)
    with pytest.raises(ValueError):
        client.add_nothing(loop, "timer")


# -- The callback queue --------------------------------------------------------


def adders(client, loop):
    """The three ways into the queue, each to be called with a function."""
    door = client.Door(loop)
    return [
        lambda function: client.add_callback(loop, function),
        lambda function: loop.add_callback(function, loop),
        door.post,
    ]


def test_callbacks_run_in_one_order(client, loop, log, noting):
    ways = adders(client, loop)
    for number in range(1000):
        ways[number * number % 7 % 3](noting(number))
    assert loop.stats()["pending_callbacks"] == 1000
    turn(loop)
    assert log == [*range(1000)]
    assert loop.stats()["pending_callbacks"] == 0
    assert loop.stats()["callbacks"] >= 1000


@pytest.mark.parametrize("whose", ["Python's", "C's"])
def test_a_callback_that_can_not_ring_is_taken_back(clients, log, noting, whose):
    """And what C queues behind it does not wait for it."""
    client = clients(ioloop)

    def poll():
        with broken_bell(impl.waker), pytest.raises(OSError):
            if whose == "C's":
                client.add_callback(loop, noting("refused"))
            else:
                loop.add_callback(log.append, "refused")
        assert loop.stats()["pending_callbacks"] == 0
        client.add_callback(loop, noting("posted"))
        return []

    impl = ScriptedPoller(poll)
    with ioloop.IOLoop(impl=impl) as loop:
        loop.run_once()
        turn(loop)
        assert log == ["posted"]
        assert loop.stats()["pending_callbacks"] == 0


def test_a_callback_of_a_callback_runs_in_the_next_iteration(client, loop, log, noting):
    ways = adders(client, loop)
    next_one = noting("next")

    def again(loop):
        log.append(loop.stats()["iterations"])
        for way in ways:
            way(next_one)
        if len(log) == 1:
            ways[0](again)
            ways[1](again)
            ways[2](again)

    first = loop.stats()["iterations"]
    ways[0](again)
    turn(loop)
    assert log == [first + 1]
    turn(loop)
    assert log[1:] == ["next"] * 3 + [first + 2] * 3
    turn(loop)
    assert log[7:] == ["next"] * 9


def test_a_chain_starves_nobody(client, loop, log):
    """C callbacks that go on for ever, and still there are timeouts and I/O."""
    counter = client.Counter()
    with readable() as (a, _):
        loop.add_handler(a, lambda *args: (log.append("I/O"), loop.stop()), READ)
        client.play_callback(loop, counter)
        loop.start()
        loop.remove_handler(a)
        loop.call_later(0.001, loop.stop)
        loop.start()
        assert log
        assert counter.value > 10


def test_callback_from_other_threads(client, loop, log, noting):
    ways = adders(client, loop)
    with sleeping(loop):
        for number, way in enumerate(ways):
            done = threading.Event()
            function = Owner(lambda loop, done=done: done.set())
            in_thread(way, function)
            assert done.wait(10), number


def test_post_wakes_a_loop_that_sleeps(client, loop):
    counter = client.Counter()
    door = client.Door(loop)
    with sleeping(loop):
        for number in range(1, 200):
            assert client.Posters(door, counter, 1, 1).join() == 0
            wait_until(lambda number=number: counter.value == number)
    assert counter.value == 199


def test_post_from_threads_without_the_gil(client, loop):
    """Four threads of C and two of Python: no callback is lost or run twice."""
    counter = client.Counter()
    posted, added, calls = 4 * 50_000, 2 * 5_000, []
    posters = client.Posters(client.Door(loop), counter, 4, posted // 4)

    def add():
        for _ in range(added // 2):
            loop.add_callback(calls.append, None)

    threads = [Thread(add) for _ in range(2)]
    try:
        end = time.monotonic() + 30
        while counter.value < posted or len(calls) < added:
            assert time.monotonic() < end, (counter.value, len(calls))
            loop.run_once(0.01)
    finally:
        assert posters.join() == 0
        for thread in threads:
            thread.join()
    turn(loop)
    assert (counter.value, len(calls)) == (posted, added)


@pytest.fixture(params=["handlers", "timer", "callback"])
def play(request, client, loop):
    """A function: handlers, a timer or a callback of C that go on for ever."""
    with pair() as (a, b):
        fds = (a.fileno(), b.fileno()) if request.param == "handlers" else ()
        start = getattr(client, f"play_{request.param}")
        yield lambda counter: start(loop, counter, *fds)
        loop.close()


@pytest.mark.row("F9")
def test_other_threads_run_while_the_loop_is_busy_in_c(client, loop, play):
    """Nothing but C runs, and still a thread that waits for the GIL gets it."""
    play(counter := client.Counter())
    with busy_in_thread(loop):
        assert_shares_gil(loop)
    assert counter.value > 0


def test_posts_while_the_ring_grows(client, make_loop):
    """The loop takes what is first while threads make room for more."""
    for _ in range(3):
        loop = make_loop()
        counter = client.Counter(4 * 20_000)
        posters = client.Posters(client.Door(loop), counter, 4, 20_000)
        loop.start()
        assert posters.join() == 0
        turn(loop)
        assert counter.value == 80_000


def test_fork_while_threads_post(client, loop, log, noting):
    """A thread that is no more may have held the lock."""
    door, counter = client.Door(loop), client.Counter()
    function = noting("child")
    for _ in range(5):
        posters = client.Posters(door, counter, 4, 50_000)
        with child() as inside:
            if inside:
                signal.alarm(20)
                loop.reinit()
                client.add_callback(loop, function)
                turn(loop)
                assert log == ["child"]
                loop.close()
        assert posters.join() == 0
        turn(loop)
    assert counter.value == 5 * 4 * 50_000


def test_forks_while_threads_post_and_the_queue_grows(clients):
    """What a child has of the queue is whole, and can be used at once."""
    client = clients(ioloop)
    for _ in range(40):
        with ioloop.IOLoop() as loop:
            counter = client.Counter()
            posters = client.Posters(client.Door(loop), counter, 4, 2_000)
            with child() as inside:
                if inside:
                    signal.alarm(20)
                    loop.reinit()
                    client.play_callback(loop, last := client.Counter(3))
                    loop.start()
                    assert last.value == 3 and counter.value <= 8_000
            assert posters.join() == 0
            turn(loop)
            assert counter.value == 8_000


def test_forks_while_another_thread_makes_and_closes_loops(clients):
    """Each has a lock that a fork waits for; those of closed ones are forgotten."""
    client = clients(ioloop)
    done = threading.Event()

    def make_and_close():
        while not done.is_set():
            with ioloop.IOLoop(make_current=False) as other:
                client.Door(other).post(function)

    function = Owner()
    thread = Thread(make_and_close)
    try:
        for _ in range(20):
            with child() as inside:
                if inside:
                    signal.alarm(20)
                    with ioloop.IOLoop() as loop:
                        loop.add_callback(loop.stop)
                        loop.start()
    finally:
        done.set()
        thread.join()


def test_a_fork_of_c_while_threads_post(client, loop):
    """One of which Python hears nothing: the parent goes on."""
    fork = ctypes.PyDLL(None).fork
    counter, count = client.Counter(), 30_000
    posters = client.Posters(client.Door(loop), counter, 4, count)
    for _ in range(5):
        pid = fork()
        if pid == 0:
            os._exit(0)
        turn(loop)
        assert os.waitpid(pid, 0)[1] == 0
    assert posters.join() == 0
    turn(loop)
    assert counter.value == 4 * count


def test_queue_after_close(client, loop, log, noting):
    """What is queued is dropped, and no more is taken."""
    ways = adders(client, loop)
    for way in ways:
        way(noting("called"))
    counter = client.Counter()
    door = client.Door(loop)
    loop.close()
    assert door.post(noting("called")) == errno.ESHUTDOWN
    assert client.Posters(door, counter, 2, 100).join() == errno.ESHUTDOWN
    for way in ways[:2]:
        with pytest.raises(RuntimeError):
            way(noting("called"))
    assert (log, counter.value) == ([], 0)


def test_close_while_threads_post(client, make_loop):
    for _ in range(20):
        loop = make_loop()
        counter = client.Counter()
        posters = client.Posters(client.Door(loop), counter, 2, 20_000)
        turn(loop, 2)
        loop.close()
        assert posters.join() in (0, errno.ESHUTDOWN)


SLOW_RING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>

int slow, begun;

ssize_t write(int fd, const void *data, size_t n) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    if (slow && n == 1 && *(const char *)data == 0) {
        __atomic_store_n(&begun, 1, __ATOMIC_SEQ_CST);
        usleep(200000);
    }
    return real(fd, data, n);
}
"""


# In a process that has a library preloaded: the client and the symbols of both.
LOAD_CLIENT = """
import ctypes, gc, importlib.machinery, importlib.util, os, sys
import ioloop, processes
path, directory = sys.argv[1:]
name = "cdoor_client"
loader = importlib.machinery.ExtensionFileLoader(name, path)
spec = importlib.util.spec_from_file_location(name, path, loader=loader)
client = importlib.util.module_from_spec(spec)
loader.exec_module(client)
library = ctypes.CDLL(None)
"""


def run_preloaded(clients, directory, source, code):
    """Run `code` after LOAD_CLIENT, with C functions replaced by those of `source`."""
    file = directory / "preloaded.c"
    file.write_text(source)
    library = compile_library(file)
    arguments = clients(ioloop).__file__, str(directory)
    run_python(code, *arguments, prelude=LOAD_CLIENT, LD_PRELOAD=str(library))


@pytest.mark.row("B4")
def test_a_ring_in_the_middle_of_close(clients, tmp_path):
    """Of a thread without the GIL: its byte must not end in a foreign file."""
    run_preloaded(
        clients,
        tmp_path,
        SLOW_RING,
        """
        loop = ioloop.IOLoop(ioloop._EPoll())
        loop.fileno()  # somebody else polls it: as good as asleep
        door, counter = client.Door(loop), client.Counter()
        ctypes.c_int.in_dll(library, "slow").value = 1
        begun = ctypes.c_int.in_dll(library, "begun")
        posters = client.Posters(door, counter, 1, 1)
        processes.wait_until(lambda: begun.value)
        loop.close()
        files = [open(f"{directory}/{i}", "wb", buffering=0) for i in range(4)]
        posters.join()
        assert [os.fstat(file.fileno()).st_size for file in files] == [0] * 4
        for file in files:
            file.close()
        """,
    )


SLOW_FREE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

pthread_t quick;
int armed, begun;

void free(void *block) {
    static void (*real)(void *);
    if (!real) real = dlsym(RTLD_NEXT, "free");
    if (!armed || pthread_equal(pthread_self(), quick)) {
        real(block);
        return;
    }
    /* Nobody may use it from now on. */
    if (block) memset(block, 0xa5, malloc_usable_size(block));
    __atomic_store_n(&begun, 1, __ATOMIC_SEQ_CST);
    usleep(200000);
    real(block);
}

void arm(void) {
    quick = pthread_self();
    armed = 1;
}
"""


def test_a_fork_while_a_post_makes_room(clients, tmp_path):
    """The child finds the old queue or the new one, not the one that is freed."""
    run_preloaded(
        clients,
        tmp_path,
        SLOW_FREE,
        """
        loop = ioloop.IOLoop(ioloop._EPoll())
        door, counter = client.Door(loop), client.Counter()
        assert client.Posters(door, counter, 1, 64).join() == 0
        begun = ctypes.c_int.in_dll(library, "begun")
        library.arm()
        posters = client.Posters(door, counter, 1, 1)
        processes.wait_until(lambda: begun.value)
        with processes.child() as inside:
            if inside:
                loop.reinit()
                loop.run_once(0)
                assert counter.value >= 64
                loop.close()
                del loop, door
                gc.collect()
        assert posters.join() == 0
        loop.run_once(0)
        assert counter.value == 65
        loop.close()
        """,
    )


def test_no_function(client, loop):
    with pytest.raises(ValueError):
        client.add_nothing(loop, "callback")
    assert client.Door(loop).post_nothing() == errno.EINVAL


# -- Exceptions ----------------------------------------------------------------


def test_exceptions_reach_the_hook_with_the_owner(client, loop):
    calls = hook(loop)
    function, owner = Owner(lambda *args: fail(KeyError)), object()
    with readable() as (a, _):
        client.add_handler(loop, a.fileno(), READ, function, owner)
        turn(loop)
        client.remove_handler(loop, a.fileno())
    assert calls == [(owner, KeyError)]
    timer = client.new_timer(loop, function, owner)
    client.start_timer(timer, 0)
    turn(loop)
    assert calls[1:] == [(owner, KeyError)]
    client.add_callback(loop, function)
    client.Door(loop).post(function)
    turn(loop)
    assert calls[2:] == [(None, KeyError)] * 2
    assert sys.exc_info() == (None, None, None)


def test_exceptions_are_logged(client, loop, expect_log):
    client.add_callback(loop, fail_with_key := Owner(lambda loop: fail(KeyError)))
    turn(loop)
    expect_log.take("Exception in callback None", KeyError)
    timer = client.new_timer(loop, fail_with_key, "the owner")
    client.start_timer(timer, 0)
    turn(loop)
    expect_log.take("Exception in callback 'the owner'", KeyError)


@pytest.mark.parametrize("whose", ["its own", "another"])
def test_broken_pipe_of_a_handler_is_ignored(client, loop, whose):
    """If it is its own, as it is with Python's handlers."""
    calls = hook(loop)
    function = Owner(lambda *args: fail(BrokenPipeError(errno.EPIPE, "")))
    with readable() as (a, b):
        if whose == "its own":
            b.close()
        client.add_handler(loop, a.fileno(), READ, function, function)
        turn(loop)
        client.remove_handler(loop, a.fileno())
    assert calls == ([] if whose == "its own" else [(function, BrokenPipeError)])


def test_when_the_hook_fails_both_exceptions_are_told(client, loop, monkeypatch):
    """Of handlers, timers, callbacks and posts."""
    told, function = [], Owner(lambda *args: fail(KeyError))
    monkeypatch.setattr(sys, "unraisablehook", lambda u: told.append(u.exc_type))
    loop.handle_callback_exception = lambda owner: fail(ZeroDivisionError)
    with readable() as (a, _):
        client.add_handler(loop, a.fileno(), READ, function, None)
        timer = client.new_timer(loop, function, None)
        client.start_timer(timer, 0)
        client.add_callback(loop, function)
        client.Door(loop).post(function)
        turn(loop)
        client.remove_handler(loop, a.fileno())
    assert told == [KeyError, ZeroDivisionError] * 4


def test_what_is_no_exception_leaves_start(client, loop, log, noting):
    """And nothing that waits is lost."""
    calls = hook(loop)
    exits = Owner(lambda *args: fail(Exit))
    client.add_callback(loop, exits)
    client.add_callback(loop, noting("callback"))
    client.Door(loop).post(noting("post"))
    timers = [client.new_timer(loop, exits, None)]
    timers.append(client.new_timer(loop, noting("timer"), None))
    for timer in timers:
        client.start_timer(timer, 0)
    with pairs(3) as made:
        for number, (a, b) in enumerate(made):
            b.send(b"x")
            function = Owner(
                lambda loop, fd, events, number=number: (
                    client.remove_handler(loop, fd),
                    log.append(number),
                    fail(Exit),
                )
            )
            client.add_handler(loop, a.fileno(), READ, function, function)
        client.add_callback(loop, noting("last"))
        for _ in range(5):
            with pytest.raises(Exit):
                loop.start()
        loop.add_callback(loop.stop)
        loop.start()
    assert log[:4] == ["callback", "post", "last", "timer"]
    assert sorted(log[4:]) == [0, 1, 2]
    assert calls == []


# -- Wrong loops, wrong threads ------------------------------------------------


def calls_of(client, loop, fd, function):
    """Everything that takes a loop, by name; all valid for an open one."""
    return {
        "add_handler": lambda: client.add_handler(loop, fd, READ, function, None),
        "update_handler": lambda: client.update_handler(loop, fd, READ),
        "remove_handler": lambda: client.remove_handler(loop, fd),
        "new_timer": lambda: client.new_timer(loop, function, None),
        "add_callback": lambda: client.add_callback(loop, function),
        "door": lambda: client.Door(loop),
    }


def test_what_is_no_open_loop(client, poller, make_loop, fake_kqueue, noting):
    """Nor is one of another build of the module, nor one that has no __init__()."""
    cls = poller.module.IOLoop
    another = ioloop if poller.module is fake_kqueue else fake_kqueue
    closed = make_loop()
    closed.close()
    mocked = mock.create_autospec(cls)
    with another.IOLoop() as foreign, pair() as (a, _):
        for error, message, loops in (
            (TypeError, "", (None, 1, object(), cls, mocked, foreign)),
            (RuntimeError, "__init__", (cls.__new__(cls),)),
            (RuntimeError, "closed", (closed,)),
        ):
            for loop in loops:
                calls = calls_of(client, loop, a.fileno(), noting("no"))
                if loop is closed:
                    del calls["remove_handler"]
                for call in calls.values():
                    with pytest.raises(error, match=message or None):
                        call()


def test_a_subclass_is_a_loop(client, make_loop, poller, log, noting):
    loop = make_loop(type("Loop", (poller.module.IOLoop,), {}))
    client.add_callback(loop, noting("called"))
    turn(loop)
    assert log == ["called"]


def test_removal_after_close_does_nothing(client, loop, noting):
    """Also in a thread that is not the one that ran the loop."""
    timer = client.new_timer(loop, noting("no"), None)
    with pair() as (a, _):
        client.add_handler(loop, a.fileno(), READ, noting("no"), None)
        client.start_timer(timer, NEVER)
        turn(loop)
        loop.close()
        for fd in (a.fileno(), 2**30, -1):
            client.remove_handler(loop, fd)
            in_thread(client.remove_handler, loop, fd)
    in_thread(client.stop_timer, timer)
    client.stop_timer(timer)


def test_wrong_thread(client, loop, log, noting):
    with pair() as (a, _), pair() as (b, _):
        function = noting("called")
        client.add_handler(loop, a.fileno(), READ, function, None)
        timers = [client.new_timer(loop, function, None) for _ in range(2)]
        client.start_timer(timers[0], NEVER)
        with sleeping(loop):
            before = loop.stats()
            for refused in (
                lambda: client.add_handler(loop, b.fileno(), READ, function, None),
                lambda: client.update_handler(loop, a.fileno(), WRITE),
                lambda: client.remove_handler(loop, a.fileno()),
                lambda: client.start_timer(timers[0], 0),
                lambda: client.start_timer(timers[1], 0),
                lambda: client.stop_timer(timers[0]),
            ):
                with pytest.raises(RuntimeError, match="thread"):
                    refused()
            after = loop.stats()
            for key in ("pending_timeouts", "handlers"):
                assert before[key] == after[key]
        assert log == []
        client.remove_handler(loop, a.fileno())


# -- No Python object for an event ---------------------------------------------


def test_no_object_is_made(client, loop, poller, play, request):
    what = request.node.callspec.params["play"]
    if what == "handlers" and poller.name == "kqueue":
        pytest.skip("_KQueue makes a dict for each poll, in which it merges filters")
    # What sleeps is slower, and so are the other pollers.
    events = 5_000 if what == "timer" else 100_000 if poller.name == "epoll" else 20_000
    counter = client.Counter(events)
    play(counter)
    assert_no_object_is_made(client, loop, counter, events)


def assert_no_object_is_made(client, loop, counter, events):
    blocks = sys.getallocatedblocks()
    # Not in the main thread, where the look at the wakeup fd before a sleep makes one.
    made = in_thread(client.allocations_of, loop.start)
    assert counter.value == events
    assert made < events / 100
    assert abs(sys.getallocatedblocks() - blocks) < 200


# -- Stale clients, and plain C ------------------------------------------------

STALE = {
    "signature": (
        ("c_start_timer(object timer, int64_t delay)", "c_start_timer(object timer)"),
        "ioloop.c_start_timer(None)",
        r"TypeError: .*\bc_start_timer\b.*signature",
    ),
    "result": (
        ("cdef int c_remove_handler", "cdef int64_t c_remove_handler"),
        "ioloop.c_remove_handler(None, 1)",
        r"TypeError: .*\bc_remove_handler\b.*signature",
    ),
    "type": (
        ("ioloop_callback_v1", "ioloop_callback_v2"),
        "ioloop.c_add_callback(None, NULL, NULL)",
        r"TypeError: .*\bc_add_callback\b.*signature .*_v2.*_v1",
    ),
    "missing": (
        ("cdef int c_remove_handler", "cdef int c_forget_handler"),
        "ioloop.c_forget_handler(None, 1)",
        r"ImportError: .*\bc_forget_handler\b",
    ),
}


def build_stale(directory):
    """One client for each change of the pxd between its build and its import."""
    pxd = PXD.read_text()
    for name, ((old, new), call, _) in STALE.items():
        assert old in pxd
        changed = directory / name
        changed.mkdir()
        (changed / "ioloop.pxd").write_text(pxd.replace(old, new))
        source = directory / f"stale_{name}.pyx"
        source.write_text(f"cimport ioloop\n\ndef call():\n    {call}\n")
        compile_extension(source, directory, changed)


@pytest.fixture(scope="session")
def stale():
    return cached("stale", [STALE], build_stale)


@pytest.mark.slow
@pytest.mark.parametrize("name", STALE)
def test_stale_client_fails_at_import(stale, name):
    code = f"import sys; sys.path.insert(0, {str(stale)!r}); import stale_{name}"
    done = run_python(code, check=False)
    assert done.returncode == 1
    assert re.match(STALE[name][2], done.stderr.splitlines()[-1])


@pytest.fixture(scope="session")
def plain():
    return load(extension(HERE / "cdoor_plain.c"))


def test_plain_c(plain):
    with ioloop.IOLoop() as loop, pair() as (a, b):
        plain.serve(loop, a.fileno())
        for number in range(1, 10):
            b.send(b"%d" % number)
            turn(loop)
            assert b.recv(100) == b"%d" % number
            assert plain.count() == number
        b.close()
        turn(loop)
        assert loop.stats()["handlers"] == 0
        with pytest.raises(TypeError):
            plain.serve(None, a.fileno())


def test_the_example_makes_no_object_for_a_message(clients):
    """Its messages are passed back by C, too: all that is made would be its own."""
    client = clients(ioloop)
    server_module = load(next(c_echo().glob("_c_echo*.so")))
    counter = client.Counter(100_000)
    with ioloop.IOLoop() as loop, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        server = server_module.Server(loop, listener.fileno(), 60)
        with socket.create_connection(listener.getsockname()) as sock:
            sock.setblocking(False)
            turn(loop)
            client.play_handlers(loop, counter, sock.fileno())
            assert_no_object_is_made(client, loop, counter, 100_000)
            loop.remove_handler(sock)
        run_until(loop, lambda: loop.stats()["handlers"] == 1)
        server.close()
        assert loop.stats()["handlers"] == 0
        assert loop.stats()["pending_timeouts"] == 0
