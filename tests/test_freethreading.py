"""Several threads at once: each call is whole, and all counts are exact.

With a GIL the threads take turns, as often as the switch interval makes them.  Without
one (free-threaded CPython) they really run at once.  The rules are the same.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import functools
import gc
import itertools
import os
import random
import signal
import threading
import time
import weakref

import pytest
from building import FREE_THREADED
from fakes import FOREVER, READ, FakeClock, in_time, outcome, turn
from kernel import alarm, pair, pairs, readable
from processes import (
    Thread,
    at_once,
    busy_in_thread,
    child,
    switch_interval,
    together,
)

import ioloop

# Without a GIL nothing makes the threads take turns: it takes longer until two of them
# are at the same place.  TSan sees a race without that.
TIMES = 10 if FREE_THREADED and "IOLOOP_SANITIZE" not in os.environ else 1


@pytest.fixture(autouse=True)
def fast_switching():
    with switch_interval(1e-6):
        yield


def nothing(*_):
    pass


def refused(error, *words):
    """Whether it is a RuntimeError that gives one of these reasons."""
    return type(error) is RuntimeError and any(word in str(error) for word in words)


def look(loop):
    """Whatever is only read, and whether it makes sense."""
    for _ in range(50 * TIMES):
        stats = loop.stats()
        assert all(value >= 0 for value in stats.values()), stats
        assert len(loop._handlers) >= 0
        assert loop.next_timeout() is None or loop.next_timeout() >= 0
        assert "idle" in repr(loop) and not loop.running() and loop.time() > 0


# -- The GIL -------------------------------------------------------------------


@pytest.mark.row("B30")
@pytest.mark.skipif(not FREE_THREADED, reason="there is always a GIL")
def test_the_gil_stays_off(poller):
    """An import would switch it on, with a warning, for a module not made for that."""
    poller.run("assert not sys._is_gil_enabled()", PYTHON_GIL="")


# -- A loop that runs ----------------------------------------------------------


def ways_to_queue(loop, client):
    """Functions that have the loop call another one, with or without an argument."""
    door = client.Door(loop)

    def post(function):
        assert door.post(function) == 0

    def complete(function):
        future = concurrent.futures.Future()
        loop.add_future(future, function)
        future.set_result(None)

    return [
        loop.add_callback,
        loop.add_callback_from_signal,
        loop.spawn_callback,
        complete,
        functools.partial(client.add_callback, loop),
        post,
    ]


@pytest.mark.row("B25")
def test_producers(loop, poller, client):
    """What they queue runs once, each producer's in its order, whichever way it came.

    Beside threads that Python knows nothing of.
    """
    count, posts, log, kept = 400 * TIMES, 4000 * TIMES, [], []
    ways = ways_to_queue(loop, client)
    producers = [*([way] for way in ways), ways, ways[::-1]]
    left = len(producers)

    def note(name, i, *_):
        log.append((name, i))

    def end():
        nonlocal left
        left -= 1
        if not left:
            loop.stop()

    def produce(name):
        calls = [functools.partial(note, name, i) for i in range(count)]
        kept.append(calls)  # C does not
        for call, add in zip(calls, itertools.cycle(producers[name]), strict=False):
            add(call)
        loop.add_callback(end)

    counter = client.Counter()
    posters = client.Posters(client.Door(loop), counter, 2, posts)
    threads = [Thread(produce, name) for name in range(left)]
    with in_time(loop):
        loop.start()
    for thread in threads:
        thread.join()
    assert posters.join() == 0
    turn(loop)
    for name in range(len(producers)):
        assert [i for who, i in log if who == name] == list(range(count))
    assert counter.value == 2 * posts
    assert loop.stats()["callbacks"] == len(producers) * (count + 1) + 2 * posts
    poller.module._verify(loop)


def test_loops_that_call_each_other(make_loop):
    """Each in a thread of its own, by callbacks and timeouts."""
    loops, tokens, hops = [make_loop() for _ in range(3)], 10, 100 * TIMES
    arrived = []

    def hop(n):
        loop = loops[n % 3]
        if n < hops:
            loop.call_later(0, loops[(n + 1) % 3].add_callback, hop, n + 1)
            return
        arrived.append(n)
        if len(arrived) == tokens:
            for each in loops:
                each.stop()

    for _ in range(tokens):
        loops[0].add_callback(hop, 0)
    for thread in [Thread(loop.start) for loop in loops]:
        thread.join()
    assert arrived == [hops] * tokens
    assert sum(loop.stats()["callbacks"] for loop in loops) == tokens * (hops + 1)
    assert sum(loop.stats()["timeouts"] for loop in loops) == tokens * hops


@pytest.mark.row("B12")
@pytest.mark.parametrize("way", ["start", "run_once", "run_sync"])
def test_one_thread_runs_a_loop(loop, poller, way):
    """The others are refused, at whatever moment they ask."""
    count = 4

    def run():
        error = outcome(getattr(loop, way), *arguments)
        if error is not None:
            waiting.release()
        return error

    def hold():
        for _ in range(count - 1):
            waiting.acquire(timeout=5)
        if way == "start":
            loop.stop()

    arguments = {"start": (), "run_once": (0,), "run_sync": (nothing,)}[way]
    for _ in range(20):
        waiting = threading.Semaphore(0)
        loop.add_callback(hold)
        errors = at_once(count, run)
        assert errors.count(None) == 1
        assert all(
            refused(error, "another thread") for error in errors if error is not None
        )
        assert not loop.running()
        poller.module._verify(loop)


@pytest.mark.row("B5")
def test_stop_from_anywhere(loop):
    """Each start() ends, and what was queued meanwhile is run."""
    threads, count, log, left = 3, 200 * TIMES, [], 3

    def end():
        nonlocal left
        left -= 1
        loop.stop()

    def stop(name):
        for i in range(count):
            loop.add_callback(log.append, (name, i))
            loop.stop()
        loop.add_callback(end)

    started = [Thread(stop, name) for name in range(threads)]
    with in_time(loop):
        while left:
            loop.start()
    for thread in started:
        thread.join()
    for name in range(threads):
        assert [i for who, i in log if who == name] == list(range(count))


@pytest.mark.row("B16", "B28")
def test_other_threads_between_the_runs(loop, poller):
    """A call is refused, or done as a whole before the next run."""
    count, fired = 300 * TIMES, []

    def call(function, *args):
        """Whether it was accepted, and what it returned."""
        result = outcome(function, *args)
        if isinstance(result, Exception):
            assert refused(result, "another thread"), result
            return False, None
        return True, result

    def set_and_cancel():
        due = pending = 0
        for _ in range(count):
            due += call(loop.call_later, 0, fired.append, 1)[0]
            accepted, handle = call(loop.call_later, FOREVER, int)
            pending += accepted and not call(handle.cancel)[0]
        return due, pending

    threads = [Thread(set_and_cancel) for _ in range(3)]
    while any(thread.is_alive() for thread in threads):
        loop.run_once(0)
    due, pending = map(sum, zip(*[thread.join() for thread in threads], strict=True))
    turn(loop)
    assert loop.stats()["timeouts"] == len(fired) == due
    assert loop.stats()["pending_timeouts"] == pending
    poller.module._verify(loop)


# -- An idle loop --------------------------------------------------------------


@pytest.mark.row("B28")
def test_handlers_of_different_fds(loop, poller):
    """Each thread has fds of its own, and the table grows meanwhile."""
    events = []

    def work(own):
        for a, b in own:
            for _ in range(5 * TIMES):
                loop.add_handler(a, lambda *_: None, READ)
                loop.add_handler(b, lambda *_: None, 0)
                loop.update_handler(b, READ)
                loop.remove_handler(a)
                loop.remove_handler(b)
            loop.add_handler(a, lambda sock, _: events.append(sock), 0)
            loop.update_handler(a, READ)

    look_at_it = functools.partial(look, loop)
    with pairs(120) as made:
        shares = [functools.partial(work, made[i::3]) for i in range(3)]
        together(*shares, look_at_it, look_at_it)
        poller.module._verify(loop)
        assert sorted(loop._handlers) == sorted(a.fileno() for a, _ in made)
        for a, b in made:
            b.send(b"x")
            loop.run_once(0)
            assert events == [a]
            a.recv(1)
            events.clear()
        for a, _ in made:
            loop.remove_handler(a)


@pytest.mark.row("B28")
def test_handlers_of_one_fd(loop, poller):
    """One thread adds it; afterwards the kernel has what the loop has."""
    calls = []

    def add():
        handler = functools.partial(calls.append)
        return outcome(loop.add_handler, a, handler, READ) or handler

    update = functools.partial(outcome, loop.update_handler)
    with pair() as (a, b):
        b.send(b"x")
        for _ in range(30):
            results = at_once(4, add)
            assert sum(type(each) is FileExistsError for each in results) == 3
            assert loop._handlers[a.fileno()] in results
            poller.module._verify(loop)
            changes = together(
                lambda: update(a, 0),
                lambda: loop.remove_handler(a),
                lambda: update(a, READ),
                lambda: loop.remove_handler(a),
            )
            assert {type(each) for each in changes} <= {type(None), FileNotFoundError}
            assert loop._handlers == {}
            poller.module._verify(loop)
            loop.add_handler(a, lambda *_: calls.append("event"), READ)
            turn(loop)
            loop.remove_handler(a)
            assert calls == ["event"]
            calls.clear()


@pytest.mark.row("B28")
def test_timeouts_of_each_other(make_loop, poller):
    """What was not cancelled is run, in order."""
    clock, threads, count = FakeClock(), 4, 800
    loop = make_loop(time_func=clock)
    made, ran, numbers = [], [], random.Random(0)
    deadlines = numbers.sample(range(10_000), threads * count)

    def work(name):
        cancelled, choose = set(), random.Random(name)
        for n in deadlines[name::threads]:
            made.append((n, loop.add_timeout(clock.now + n, ran.append, n)))
            if choose.random() < 0.6:
                m, handle = choose.choice(made[-50:])
                cancel = choose.choice(
                    [handle.cancel, lambda handle=handle: loop.remove_timeout(handle)]
                )
                assert handle.deadline == clock.now + m
                cancel()
                assert handle.callback is None and "dead" in repr(handle)
                cancelled.add(m)
        return cancelled

    look_at_it = functools.partial(look, loop)
    works = [functools.partial(work, name) for name in range(threads)]
    found = together(*works, look_at_it)
    alive = sorted(set(deadlines).difference(*found[:threads]))
    poller.module._verify(loop)
    assert sorted(n for n, handle in made if handle.callback is not None) == alive
    assert loop.stats()["pending_timeouts"] == len(alive)
    clock.advance(5000)
    turn(loop)
    assert ran == [n for n in alive if n <= 5000]
    # Each by all threads at once, and the heap becomes smaller meanwhile.
    at_once(threads, lambda: [handle.cancel() for _, handle in made])
    poller.module._verify(loop)
    assert loop.stats()["pending_timeouts"] == 0


@pytest.mark.row("B28")
def test_periodic_callbacks(loop, poller):
    """Started and stopped by several threads: there is one timeout, or none."""
    periodic = poller.module.PeriodicCallback(int, 1e6, loop)

    def work():
        for _ in range(20 * TIMES):
            periodic.start()
            periodic.stop()
            periodic.start()

    for last in (work, periodic.stop) * 10:
        together(work, work, periodic.start, last)
        poller.module._verify(loop)
        assert loop.stats()["pending_timeouts"] == periodic.is_running()
    periodic.stop()
    assert loop.stats()["pending_timeouts"] == 0


@pytest.mark.row("B25")
def test_queue_of_an_idle_loop(loop, poller, client):
    """It grows while it is filled by everybody."""
    count, log = 2000 * TIMES, []

    def fill(name):
        for i in range(count):
            loop.add_callback(log.append, (name, i))

    counter = client.Counter()
    posters = client.Posters(client.Door(loop), counter, 2, count)
    fillers = [functools.partial(fill, name) for name in range(3)]
    together(*fillers, functools.partial(look, loop))
    assert posters.join() == 0
    poller.module._verify(loop)
    assert loop.stats()["pending_callbacks"] == 5 * count
    turn(loop)
    assert counter.value == 2 * count
    for name in range(3):
        assert [i for who, i in log if who == name] == list(range(count))


# -- close() -------------------------------------------------------------------


def until_closed(loop, use):
    """Use a loop until another thread has closed it, which is all that may fail."""
    uses = 0
    while "closed" not in repr(loop):
        error = outcome(use)
        assert not isinstance(error, Exception) or refused(
            error, "closed", "another thread", "already running"
        ), error
        uses += 1
    return uses


def uses(loop, poller, client, made):
    """Whatever threads do with a loop; what they give it is noted in `made`."""
    periodic = poller.module.PeriodicCallback(int, 1e6, loop)
    door, timer = client.Door(loop), client.new_timer(loop, id, None)
    ways = itertools.cycle(ways_to_queue(loop, client)[:4])

    def thing():
        made.append(functools.partial(nothing))
        return made[-1]

    def queue():
        next(ways)(thing())

    def post():
        assert door.post(id) in (0, errno.ESHUTDOWN)

    def set_timeouts():
        handles = [loop.call_later(FOREVER, thing()) for _ in range(3)]
        handles[0].cancel()
        loop.remove_timeout(handles[1])
        assert handles[1].callback is None and handles[1].deadline > 0

    def handle():
        with pair() as (a, _):
            try:
                loop.add_handler(a, thing(), READ)
                loop.update_handler(a, 0)
            finally:
                loop.remove_handler(a)

    def start_timer():
        client.start_timer(timer, 10**12)
        client.stop_timer(timer)

    def repeat():
        periodic.start()
        periodic.stop()

    def watch():
        loop.set_blocking_log_threshold(60)
        loop.set_blocking_log_threshold(None)

    def read():
        loop.stats()
        len(loop._handlers)
        loop.next_timeout()

    return [
        *(queue, post, loop.stop, set_timeouts),
        *(handle, start_timer, repeat, watch, read),
    ]


@pytest.mark.row("B5", "B29")
@pytest.mark.parametrize("running", [False, True], ids=["idle", "now and then running"])
def test_close_against_everything(make_loop, poller, client, running):
    """Each call is before it or after it, and what was queued goes with the loop."""
    kept = []
    for n in range(15):
        loop, made = make_loop(), []
        calls = uses(loop, poller, client, made)
        if running:
            calls.append(functools.partial(loop.run_once, 0))

        def close(loop=loop, n=n):
            for _ in range(3 * n * TIMES):
                outcome(loop.stop)
            while outcome(loop.close) is not None:
                pass

        users = [functools.partial(until_closed, loop, each) for each in calls]
        together(*users, close, close)
        assert refused(outcome(loop.add_callback, int), "closed")
        kept.extend(weakref.ref(each) for each in made)
        del calls, users
        made.clear()
    gc.collect()
    assert [each for each in kept if each() is not None] == []


@pytest.mark.row("B29")
def test_posts_while_a_loop_is_closed(make_loop, client):
    """From threads that Python knows nothing of: each is accepted or refused."""
    threads, count = 2, 3000 * TIMES
    for n in range(30):
        loop, counter = make_loop(), client.Counter()
        door = client.Door(loop)
        posters = client.Posters(door, counter, threads, count)
        for _ in range(n % 5):
            loop.run_once(0)
        ran = counter.value
        loop.close()
        assert posters.join() in (0, errno.ESHUTDOWN)
        assert door.post(id) == errno.ESHUTDOWN
        assert counter.value == ran <= threads * count


@pytest.mark.row("B29")
@pytest.mark.filterwarnings("ignore:unclosed IOLoop:ResourceWarning")
@pytest.mark.parametrize("way", ["dropped", "collected", "closed"])
def test_timeouts_of_a_loop_that_goes(poller, way):
    """Another thread may still have their handles."""
    for _ in range(20):
        handles, ready = [], threading.Barrier(3)

        def have_a_loop(handles=handles, ready=ready):
            loop = poller.module.IOLoop(impl=poller.impl())
            handles.extend(loop.call_later(FOREVER, int) for _ in range(100 * TIMES))
            if way == "collected":
                loop.me = loop
            ready.wait()
            if way == "closed":
                loop.close()
            del loop
            if way == "collected":
                gc.collect()

        def use(handles=handles, ready=ready):
            ready.wait()
            for handle in handles:
                assert handle.callback in (int, None)
                assert handle.deadline > FOREVER
                assert repr(handle).startswith("<ioloop._Timeout ")
                handle.cancel()

        for thread in [Thread(have_a_loop), Thread(use), Thread(use)]:
            thread.join()
        assert all(handle.callback is None for handle in handles)
        assert all("dead" in repr(handle) for handle in handles)


# -- asyncio -------------------------------------------------------------------


@pytest.mark.row("B25", "B33")
def test_asyncios_producers(loop, poller):
    """What they queue runs once, in their order, unless it is cancelled."""
    face, threads, count, log, left = loop.asyncio_loop, 4, 400 * TIMES, [], 4

    def end():
        nonlocal left
        left -= 1
        if not left:
            face.stop()

    def produce(name):
        adds = [face.call_soon, face.call_soon_threadsafe]
        for i in range(count):
            handle = adds[i % 2](log.append, (name, i))
            if i % 3 == 0:
                handle.cancel()
                assert handle.cancelled()
        face.call_soon(end)

    started = [Thread(produce, name) for name in range(threads)]
    with in_time(loop):
        face.run_forever()
    for thread in started:
        thread.join()
    for name in range(threads):
        ran = [i for who, i in log if who == name]
        assert ran == sorted(set(ran))
        assert set(ran) >= {i for i in range(count) if i % 3}
    assert loop.stats()["callbacks"] == threads * (count + 1)
    poller.module._verify(loop)


@pytest.mark.row("B27")
@pytest.mark.parametrize("how", ["call_soon", "call_soon_threadsafe", "call_later"])
def test_cancel_against_a_callback_that_runs(loop, poller, how):
    """It is called once or not at all, and dropped in either case.

    What call_soon_threadsafe() has queued can't run any more after cancel(), from
    CPython 3.14 on.
    """

    class Callback:
        cancelled = late = calls = 0

        def __call__(self):
            self.calls += 1
            self.late |= self.cancelled

    def cancel():
        ready.wait()
        for callback, handle in zip(callbacks, handles, strict=True):
            handle.cancel()
            callback.cancelled = True

    face, count = loop.asyncio_loop, 300
    waits = hasattr(asyncio.events, "_ThreadSafeHandle") and "safe" in how
    for _ in range(5):
        ready = threading.Barrier(3)
        callbacks = [Callback() for _ in range(count)]
        face.call_soon(ready.wait)
        add = getattr(face, how)
        arguments = [0] if how == "call_later" else []
        handles = [add(*arguments, each) for each in callbacks]
        started = [Thread(cancel) for _ in range(2)]
        turn(loop, 2)
        for thread in started:
            thread.join()
        turn(loop)
        assert {each.calls for each in callbacks} <= {0, 1}
        assert not (waits and any(each.late for each in callbacks))
        assert all(handle.cancelled() for handle in handles)
        dead = [weakref.ref(each) for each in callbacks]
        callbacks.clear()
        assert [each for each in dead if each() is not None] == []
        assert loop.stats()["pending_timeouts"] == 0
        poller.module._verify(loop)


@pytest.mark.row("B25")
def test_one_handle_cancelled_by_many_threads(loop):
    """What it refers to is dropped once."""
    face = loop.asyncio_loop
    for how in face.call_soon, face.call_soon_threadsafe, face.call_later:
        for _ in range(10 * TIMES):
            arguments = [FOREVER] if how == face.call_later else []
            kept = functools.partial(nothing)
            handle, dead = how(*arguments, kept), weakref.ref(kept)
            del kept
            at_once(4, handle.cancel)
            assert dead() is None and handle.cancelled()
    turn(loop)
    assert loop.stats()["pending_timeouts"] == 0


@pytest.mark.row("B28")
@pytest.mark.parametrize("running", [False, True], ids=["idle", "running"])
def test_faces_asked_for_by_many_threads(make_loop, running):
    """All get the same one, which works, as its loop does or has begun to."""
    for _ in range(10 * TIMES):
        loop = make_loop(make_current=False)
        with busy_in_thread(loop) if running else contextlib.nullcontext():
            faces = at_once(4, lambda loop=loop: loop.asyncio_loop)
            assert len(set(faces)) == 1
            if running:
                future = asyncio.run_coroutine_threadsafe(asyncio.sleep(0, 7), faces[0])
                assert future.result(10) == 7
        assert faces[0].run_until_complete(asyncio.sleep(0, 7)) == 7


@pytest.mark.row("B29")
def test_asyncios_files_looked_at_by_other_threads(loop):
    """As the repr() of a transport does."""
    face = loop.asyncio_loop
    done = threading.Event()

    def look_at(fds):
        while not done.is_set():
            for fd in fds:
                try:
                    assert face._selector.get_key(fd).events in (0, 1)
                except KeyError:
                    pass

    def change(fds, count):
        for fd in fds:
            face.add_reader(fd, nothing)
            face.remove_reader(fd)
        if count:
            face.call_soon(change, fds, count - 1)
        else:
            loop.stop()

    with pairs(4) as made:
        fds = [a.fileno() for a, _ in made]
        face.call_soon(change, fds, 1000 * TIMES)
        with Thread(look_at, fds), Thread(look_at, fds):
            try:
                loop.start()
            finally:
                done.set()


def test_close_against_asyncios_methods(make_loop):
    """Each call is before it or after it, and what was queued goes with the loop."""
    kept = []
    for n in range(10 * TIMES):
        loop, made = make_loop(make_current=False), []
        face = loop.asyncio_loop

        def thing(made=made):
            made.append(functools.partial(nothing))
            return made[-1]

        def set_timer(face=face, thing=thing):
            face.call_later(FOREVER, thing())
            face.call_later(FOREVER, thing()).cancel()

        def read(face=face, thing=thing):
            with pair() as (a, _):
                face.add_reader(a, thing())
                face.remove_reader(a)

        def close(loop=loop, face=face, n=n):
            for _ in range(n):
                face.call_soon_threadsafe(nothing)
            (loop if n % 2 else face).close()

        users = [
            functools.partial(until_closed, loop, each)
            for each in (
                lambda face=face, thing=thing: face.call_soon(thing()),
                lambda face=face, thing=thing: face.call_soon_threadsafe(thing()),
                *(set_timer, read, face.time, face.is_running),
            )
        ]
        together(*users, close)
        assert face.is_closed()
        assert refused(outcome(face.call_soon, nothing), "Event loop is closed")
        kept.extend(weakref.ref(each) for each in made)
        del users, thing, set_timer, read, close, face, loop
        made.clear()
    gc.collect()
    assert [each for each in kept if each() is not None] == []


@pytest.mark.row("B29")
def test_close_against_faces_asked_for(make_loop):
    """There is one face, or none any more; none is left open."""
    for _ in range(10 * TIMES):
        loop = make_loop(make_current=False)
        [*found, closed] = together(
            *[lambda loop=loop: outcome(getattr, loop, "asyncio_loop")] * 3, loop.close
        )
        assert closed is None
        faces = {each for each in found if not isinstance(each, Exception)}
        assert len(faces) < 2 and all(face.is_closed() for face in faces)
        assert all(
            refused(each, "closed") for each in found if isinstance(each, Exception)
        )
        gc.collect()


# -- Which loop ----------------------------------------------------------------


@pytest.mark.row("F7")
def test_one_instance():
    """Whoever asks at the same time gets the same loop."""
    for _ in range(20):
        found = at_once(4, ioloop.IOLoop.instance)
        assert len(set(map(id, found))) == 1
        assert ioloop.IOLoop.instance() is found[0]
        found[0].close()
        assert not ioloop.IOLoop.initialized()


def test_one_is_installed(make_loop, poller):
    """The others are told so."""
    cls = poller.module.IOLoop
    for _ in range(20):
        loops = [make_loop() for _ in range(4)]
        errors = together(*(functools.partial(outcome, each.install) for each in loops))
        assert errors.count(None) == 1
        assert sum(refused(error, "already") for error in errors) == 3
        assert cls.instance() is loops[errors.index(None)]
        at_once(2, cls.clear_instance)
        assert not cls.initialized()
        for each in loops:
            each.close()


def test_instances_that_come_and_go():
    """Each thread always gets a loop that works, its own current one or another."""
    cls, found = ioloop.IOLoop, []

    def work():
        for _ in range(20):
            found.append(cls.instance())
            cls.clear_instance()
            with cls() as own:
                own.make_current()
                assert cls.current() is own
                own.add_callback(int)
                own.run_once(0)
            cls.initialized()

    at_once(4, work)
    cls.clear_instance()
    for loop in found:
        loop.close()


# -- A poller without a loop ---------------------------------------------------


def with_poller(method, *args):
    """What it returns, once no other thread uses the poller."""
    while True:
        result = outcome(method, *args)
        if not refused(result, "another thread"):
            return result


@pytest.fixture
def ready_fds():
    """Many descriptors, all of them ready to be read."""
    with readable() as (a, _):
        fds = [os.dup(a.fileno()) for _ in range(300)]
        yield fds
        for fd in fds:
            os.close(fd)


@pytest.mark.row("B31")
def test_one_poller_for_two_threads(poller, ready_fds):
    """Each finds its fds ready, and never one that is not registered."""
    impl = poller.impl()

    def work(own):
        for _ in range(5 * TIMES):
            for fd in own:
                assert with_poller(impl.register, fd, READ) is None
            missing = set(own)
            for _ in range(50):
                events = with_poller(impl.poll, 1)
                assert {mask for _, mask in events} == {READ}
                assert {fd for fd, _ in events} <= set(ready_fds)
                missing -= {fd for fd, _ in events}
                if not missing:
                    break
            assert not missing
            for fd in own:
                assert with_poller(impl.modify, fd, 0) is None
                assert with_poller(impl.unregister, fd) is None

    together(*(functools.partial(work, ready_fds[i::2]) for i in range(2)))
    assert impl.poll(0) == []
    impl.close()


@pytest.mark.row("B31")
def test_an_event_goes_to_one_thread(ready_fds):
    """Of two that poll, and none is lost."""
    impl, ended = ioloop._EPoll(), threading.Event()

    def register():
        for fd in ready_fds:
            mask = READ | ioloop.IOLoop._EPOLLONESHOT
            assert with_poller(impl.register, fd, mask) is None
        ended.set()

    def take():
        taken = []
        while True:
            last = ended.is_set()
            events = with_poller(impl.poll, 0.001)
            taken.extend(events)
            if last and not events:
                return taken

    _, one, other = together(register, take, take)
    assert sorted(one + other) == [(fd, READ) for fd in sorted(ready_fds)]
    impl.close()


@pytest.mark.row("B31")
def test_a_poller_that_another_thread_closes(poller, ready_fds):
    for _ in range(20):
        impl = poller.impl()

        def use(impl=impl, fd=ready_fds[0]):
            for _ in range(50 * TIMES):
                for result in (
                    outcome(impl.register, fd, READ),
                    outcome(impl.poll, 0),
                    outcome(impl.unregister, fd),
                ):
                    closed = isinstance(result, OSError) and result.errno == errno.EBADF
                    assert (
                        closed
                        or result in (None, [], [(fd, READ)])
                        or isinstance(result, ValueError)
                        or refused(result, "another thread")
                    ), result

        def close(impl=impl):
            for _ in range(20 * TIMES):
                with_poller(impl.poll, 0)
            assert with_poller(impl.close) is None

        together(use, close, close)


# -- Signals, the watchdog and forks -------------------------------------------


def test_signals_beside_busy_threads(loop):
    """One callback for each signal, and one for each call."""
    count, log, threads, arrived = 2000, [], [], 0

    def on_alarm(*_):
        nonlocal arrived
        arrived += 1
        loop.add_callback_from_signal(log.append, "signal")

    def work():
        for _ in range(count):
            loop.add_callback(log.append, "call")
            assert refused(outcome(loop.call_later, 0, int), "another thread")

    def end():
        if arrived > 20 and not any(thread.is_alive() for thread in threads):
            loop.stop()
        else:
            loop.call_later(0.001, end)

    loop.add_callback(lambda: threads.extend(Thread(work) for _ in range(3)))
    loop.add_callback(end)
    with in_time(loop), alarm(0.001, on_alarm, 0.001):
        loop.start()
    for thread in threads:
        thread.join()
    turn(loop, 2)
    assert (log.count("signal"), log.count("call")) == (arrived, 3 * count)


@pytest.mark.parametrize("means", ["log", "signal"])
def test_watchdog_beside_busy_threads(loop, means):
    """A callback that blocks is reported, and nothing else is lost."""
    log, reports, ended = [], [], threading.Event()

    def work():
        for added in itertools.count():
            if ended.is_set():
                return added
            loop.add_callback(log.append, 1)
            error = outcome(loop.set_blocking_log_threshold, None)
            assert refused(error, "another thread")
            while loop.stats()["pending_callbacks"] > 1000 and not ended.is_set():
                pass

    def block():
        end = time.monotonic() + 20
        while not reports and time.monotonic() < end:
            pass
        ended.set()
        for thread in threads:
            added.append(thread.join())
        loop.stop()

    loop.log_stack = lambda number, frame: reports.append(number)
    if means == "log":
        loop.set_blocking_log_threshold(0.05)
    else:
        loop.set_blocking_signal_threshold(0.05, loop.log_stack)
    loop.add_callback(lambda: threads.extend(Thread(work) for _ in range(3)))
    loop.call_later(0.01, block)
    threads, added = [], []
    loop.start()
    turn(loop, 2)
    assert len(log) == sum(added)
    assert set(reports) == {signal.SIGALRM}


@pytest.mark.row("B32")
def test_forks_beside_busy_threads(loop, poller, client):
    """The child's copy of the loop is whole, whatever the threads were at."""
    ended = threading.Event()

    def work(use):
        while not ended.is_set():
            use()

    busy = uses(loop, poller, client, [])
    threads = [Thread(work, use) for use in busy[3:]]  # which leave nothing behind
    for _ in range(5):
        with child() as inside:
            if inside:
                signal.alarm(20)
                loop.reinit()
                poller.module._verify(loop)
                before = loop.stats()
                loop.add_callback(nothing)
                loop.call_later(0, nothing)
                turn(loop)
                after = loop.stats()
                assert after["callbacks"] == before["callbacks"] + 1
                assert after["timeouts"] == before["timeouts"] + 1
                loop.close()
    ended.set()
    for thread in threads:
        thread.join()
    poller.module._verify(loop)
    loop.close()
