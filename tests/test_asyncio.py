"""The two faces of a loop: one queue, one heap, one run."""

import asyncio
import contextlib
import gc
import random
import signal
import sys
import time

import pytest
from fakes import (
    FOREVER,
    READ,
    Exit,
    FakeClock,
    ScriptedPoller,
    either,
    fail,
    finished,
    our_ways,
    permutations,
    run_by,
    run_until,
    running,
    turn,
    ways,
)
from kernel import kill, on_signal, pair, readable
from processes import when_asleep

import ioloop
from ioloop import IOLoop

endless = pytest.mark.parametrize("run", ["start", "run_forever"])
stops = pytest.mark.parametrize("stop", ["IOLoop", "asyncio"])


# -- Three names ---------------------------------------------------------------


def test_a_loop_has_one_face_for_life(loop, face):
    assert isinstance(face, asyncio.SelectorEventLoop)
    assert face.ioloop is loop
    turn(loop)
    assert loop.asyncio_loop is face


def test_a_new_event_loop_has_an_ioloop_of_its_own():
    """Which is not the thread's current one, nor is it asyncio's."""
    with contextlib.closing(ioloop.new_event_loop()) as face:
        assert isinstance(face, asyncio.SelectorEventLoop)
        assert face.ioloop.asyncio_loop is face
        assert IOLoop.current(instance=False) is None
        with contextlib.closing(ioloop.new_event_loop()) as other:
            assert other.ioloop is not face.ioloop
        assert face.run_until_complete(asyncio.sleep(0, 7)) == 7


@pytest.mark.skipif(sys.version_info < (3, 11), reason="new in Python 3.11")
def test_a_runner_takes_it_for_its_factory():
    async def main():
        return asyncio.get_running_loop()

    with asyncio.Runner(loop_factory=ioloop.new_event_loop) as runner:
        face = runner.run(main())
        assert face is runner.get_loop()
        assert not face.ioloop.running()
    assert "closed" in repr(face.ioloop)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="new in Python 3.11")
def test_a_runner_turns_an_interrupt_into_a_cancellation(poller, log):
    async def main():
        try:
            await asyncio.sleep(FOREVER)
        finally:
            await asyncio.sleep(0)
            log.append("closed")

    def new_event_loop():
        return poller.module.IOLoop(impl=poller.impl(), make_current=False).asyncio_loop

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        with when_asleep(kill), pytest.raises(KeyboardInterrupt):
            runner.run(main())
    assert log == ["closed"]


@pytest.mark.parametrize(
    "use",
    ["loop.asyncio_loop", "ioloop.new_event_loop().close()", "loop.run_sync(main)"],
)
def test_asyncio_is_imported_when_it_is_needed(poller, use):
    poller.run(
        f"""
        import os

        async def main():
            pass

        def handler(fd, events):
            log.append(os.read(fd, 1))
            loop.remove_handler(fd)

        log = []
        reader, writer = os.pipe()
        with ioloop.IOLoop(impl=impl()) as loop:
            loop.add_handler(reader, handler, loop.READ)
            loop.add_callback(os.write, writer, b"x")
            loop.spawn_callback(log.append, 1)
            loop.call_later(0, log.append, 2)
            periodic = ioloop.PeriodicCallback(lambda: log.append(3), 1, loop)
            periodic.start()
            while len(log) < 5:
                loop.run_once()
            periodic.stop()
            assert loop.run_sync(lambda: 7) == 7
            assert "asyncio" not in sys.modules
            {use}
            assert "asyncio" in sys.modules
        """
    )


# -- One queue, one heap, one clock --------------------------------------------


def test_one_queue(loop, face, log):
    """Whatever adds, from either face, the order of adding counts."""
    adds = [
        face.call_soon,
        loop.add_callback,
        face.call_soon_threadsafe,
        loop.spawn_callback,
        loop.add_callback_from_signal,
    ]
    for i, add in enumerate(adds * 2):
        add(log.append, i)
    turn(loop)
    assert log == list(range(10))


def test_what_a_callback_queues_runs_in_the_next_iteration(loop, face, log):
    face.call_soon(loop.add_callback, log.append, "IOLoop")
    loop.add_callback(face.call_soon, log.append, "asyncio")
    turn(loop)
    assert log == []
    turn(loop)
    assert log == ["IOLoop", "asyncio"]


@permutations(4)
def test_one_heap(make_loop, log, order):
    """In the order of the deadlines, and not before them."""
    clock = FakeClock()
    loop = make_loop(time_func=clock)
    face = loop.asyncio_loop
    adds = [
        lambda: face.call_later(1, log.append, 0),
        lambda: loop.call_later(2, log.append, 1),
        lambda: face.call_at(clock.now + 3, log.append, 2),
        lambda: loop.add_timeout(clock.now + 4, log.append, 3),
    ]
    for i in order:
        adds[i]()
    for i in range(4):
        clock.advance(0.75)
        turn(loop)
        assert log == list(range(i))
        clock.advance(0.25)
        turn(loop)
        assert log == list(range(i + 1))


@pytest.mark.row("C9")
def test_equal_deadlines_in_the_order_of_adding(make_loop, log):
    clock = FakeClock()
    loop = make_loop(time_func=clock)
    face = loop.asyncio_loop
    when = clock.now + 1
    for i, add in enumerate([face.call_at, loop.call_at] * 3):
        add(when, log.append, i)
    clock.advance(1)
    turn(loop)
    assert log == list(range(6))


@pytest.mark.row("C3")
def test_a_timer_is_never_early(loop, face, log):
    for i in range(40):
        when = face.time() + i * 0.000123
        face.call_at(when, lambda when=when: log.append(face.time() - when))
    run_until(loop, lambda: len(log) == 40)
    assert min(log) >= 0


def test_a_delay_in_the_past_and_one_for_ever(loop, face, log):
    face.call_later(-1, log.append, 1)
    face.call_at(0, log.append, 2)
    never = face.call_later(float("inf"), fail)
    turn(loop)
    assert log == [2, 1]
    assert loop.stats()["pending_timeouts"] == 1
    never.cancel()


@pytest.mark.parametrize("name", ["call_later", "call_at"])
@pytest.mark.parametrize("value", [None, "1", float("nan")])
def test_what_is_no_time_is_refused(loop, face, name, value):
    with pytest.raises((TypeError, ValueError)):
        getattr(face, name)(value, fail)
    assert loop.stats()["pending_timeouts"] == 0


def test_each_face_has_its_own_clock(loop, face):
    """Asyncio's is monotonic."""
    assert time.monotonic() <= face.time() <= time.monotonic()
    assert time.time() <= loop.time() <= time.time()


def test_a_clock_and_a_poller_that_follow_a_script(log):
    """Are those of both faces."""
    clock = FakeClock()
    script = ScriptedPoller(clock=clock)

    async def main():
        log.append(asyncio.get_running_loop().time())
        await asyncio.sleep(5)
        log.append(asyncio.get_running_loop().time())
        await gate

    with readable() as (a, _), IOLoop(impl=script, time_func=clock) as loop:
        gate = loop.asyncio_loop.create_future()
        loop.asyncio_loop.add_reader(a, gate.set_result, None)
        loop.run_sync(lambda: asyncio.sleep(0))
        script.batches.extend([[], [], [(a.fileno(), READ)]])
        loop.run_sync(main)
        loop.asyncio_loop.remove_reader(a)
    assert log == [1000, 1005]
    assert 5 in script.polls


# -- Asyncio's order -----------------------------------------------------------
# The programs run on a loop of asyncio's own as well, which sets the order.


def as_on_stock(program, face, stock):
    """What a program returns on either loop, which has to be the same."""
    ours, theirs = program(face), program(stock)
    assert ours == theirs
    return ours


@pytest.mark.row("D31")
def test_an_event_queues_its_handle(face, stock):
    """Behind what was queued before the poll, and ahead of the timers."""

    def program(face):
        log = []

        def read():
            face.remove_reader(a)
            log.append("reader")

        def begin():
            log.append("begin")
            face.add_reader(a, read)
            face.call_soon(log.append, "queued before the poll")
            face.call_soon(face.call_soon, face.stop)

        with readable() as (a, _):
            face.call_soon(begin)
            face.call_at(face.time() - 1, log.append, "timer")
            face.run_forever()
        return log

    log = as_on_stock(program, face, stock)
    assert log == ["begin", "timer", "queued before the poll", "reader"]


@pytest.mark.row("D31")
def test_what_a_callback_adds_is_behind_what_it_has_queued(face, stock):
    """Also a timer that is due."""

    def program(face):
        log = []

        def callback():
            face.call_soon(log.append, "queued")
            face.call_at(face.time() - 1, log.append, "timer")
            face.call_soon(log.append, "queued")
            face.call_soon(face.call_soon, face.stop)

        face.call_soon(callback)
        face.run_forever()
        return log

    assert as_on_stock(program, face, stock) == ["queued", "queued", "timer"]


@pytest.mark.row("D31")
@pytest.mark.parametrize("seed", range(10))
def test_random_programs(face, stock, seed):
    """Of callbacks and due timers that add callbacks and due timers."""

    def program(face):
        log, numbers, base, left = [], random.Random(seed), face.time() - 1, 0

        def callback(name):
            nonlocal left
            log.append(name)
            for i in range(numbers.randrange(4) if len(log) < 200 else 0):
                add(f"{name}{i}")
            left -= 1
            if not left:
                face.stop()

        def add(name):
            nonlocal left
            left += 1
            if numbers.random() < 0.6:
                face.call_soon(callback, name)
            else:
                face.call_at(base - numbers.random(), callback, name)

        for name in "abcdef":
            add(name)
        face.run_forever()
        return log

    assert len(as_on_stock(program, face, stock)) > 5


@pytest.mark.row("D31")
def test_every_iteration_polls(loop, face, stock):
    """However busy, if it has files: `await sleep(0)` lets I/O happen."""

    def program(face):
        async def main():
            face.add_reader(a, done.set_result, None)
            sleeps = 0
            while not done.done():
                await asyncio.sleep(0)
                sleeps += 1
            face.remove_reader(a)
            return sleeps

        done = face.create_future()
        with readable() as (a, _):
            return face.run_until_complete(main())

    assert as_on_stock(program, face, stock) < 4
    with pair() as (a, _):
        face.add_reader(a, fail)
        before = loop.stats()["polls"]
        face.call_soon(face.call_soon, int)
        turn(loop, 3)
        assert loop.stats()["polls"] == before + 3
        face.remove_reader(a)


@pytest.mark.row("D31")
def test_run_forever_polls_first(face, stock):
    """Also after stop(): what is ready gets its turn."""

    def program(face):
        log = []
        with readable() as (a, _):
            face.add_reader(a, log.append, "reader")
            face.call_soon(log.append, "queued")
            face.call_soon(face.call_soon, log.append, "not in this run")
            face.stop()
            face.run_forever()
            face.remove_reader(a)
        return log

    assert as_on_stock(program, face, stock) == ["queued", "reader"]


# -- stop() --------------------------------------------------------------------


@endless
@stops
@pytest.mark.parametrize("via", ["call_soon", "add_callback", "call_later", "task"])
def test_either_stop_ends_either_run(loop, face, log, run, stop, via):
    """Once the iteration is complete, and just one run."""

    async def task():
        end()

    end = either(loop, stop, "stop")
    add = {
        "call_soon": lambda: face.call_soon(end),
        "add_callback": lambda: loop.add_callback(end),
        "call_later": lambda: face.call_later(0, end),
        "task": lambda: loop.add_callback(task),
    }[via]
    for _ in range(2):
        add()
        face.call_soon(log.append, 1)
        (loop.start if run == "start" else face.run_forever)()
        assert log.pop() == 1
        assert not loop.running()


@pytest.mark.row("B9")
@endless
@stops
def test_either_stop_from_another_thread(loop, face, run, stop):
    """It wakes a loop that sleeps for ever."""
    with when_asleep(either(loop, stop, "stop")):
        (loop.start if run == "start" else face.run_forever)()


@endless
@stops
def test_either_stop_from_a_signal_handler(loop, face, run, stop):
    end = either(loop, stop, "stop")
    with on_signal(signal.SIGUSR1, lambda *_: end()):
        with when_asleep(kill, signal.SIGUSR1):
            (loop.start if run == "start" else face.run_forever)()


@pytest.mark.row("B10")
@stops
def test_stop_before_start(loop, face, log, stop):
    """The next start() returns at once, even if it was meant for run_forever()."""
    loop.add_callback(log.append, 1)
    either(loop, stop, "stop")()
    loop.start()
    assert log == []
    assert loop.stats()["polls"] == 0
    loop.add_callback(loop.stop)
    loop.start()
    assert log == [1]


@stops
def test_stop_before_run_forever(loop, face, log, stop):
    """It polls once, runs what was queued, and leaves."""
    face.call_soon(log.append, 1)
    face.call_soon(face.call_soon, log.append, 2)
    either(loop, stop, "stop")()
    face.run_forever()
    assert log == [1]
    assert loop.stats()["polls"] == loop.stats()["iterations"] == 1
    face.call_soon(face.stop)
    face.run_forever()
    assert log == [1, 2]


def test_stop_and_an_interrupt_in_one_iteration(face, log):
    """The next run does not end by that stop()."""
    face.call_soon(face.stop)
    face.call_soon(fail, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        face.run_forever()
    face.call_soon(face.call_soon, log.append, 1)
    face.call_soon(face.call_soon, face.stop)
    face.run_forever()
    assert log == [1]


def test_run_until_complete_without_an_end(loop, face):
    """As asyncio has it."""
    loop.add_callback(loop.stop)
    with pytest.raises(RuntimeError, match="stopped before Future completed"):
        face.run_until_complete(face.create_future())


# -- Which loop runs -----------------------------------------------------------


@ways
def test_both_faces_know_whether_the_loop_runs(loop, face, log, way):
    def look():
        return loop.running(), face.is_running()

    run_by(loop, way, lambda: log.append(look()))
    assert log == [(True, True)]
    assert look() == (False, False)


@pytest.mark.row("D4", "D28")
@our_ways
@pytest.mark.parametrize("error", [Exit, KeyboardInterrupt])
def test_an_error_ends_the_run_for_both(loop, face, way, error):
    with pytest.raises(error):
        run_by(loop, way, lambda: fail(error))
    assert not loop.running() and not face.is_running()
    assert running() == (None, None)


@ways
def test_the_face_is_the_running_loop_in_whatever_the_loop_runs(make_loop, poller, way):
    """And the IOLoop is the thread's current one."""
    loop = make_loop(make_current=False)
    face, current = loop.asyncio_loop, poller.module.IOLoop.current
    found = {}

    def note(where, *_):
        found[where] = asyncio.get_running_loop(), current()

    async def coroutine(where):
        await asyncio.sleep(0)
        note(where)

    async def all_noted():
        while len(found) < 11:
            await asyncio.sleep(0)

    async def stop_then():
        await all_noted()
        loop.stop()

    def handler(sock, _):
        loop.remove_handler(sock)
        note("handler")

    def reader(sock):
        face.remove_reader(sock)
        note("reader")

    periodic = poller.module.PeriodicCallback(lambda: coroutine("periodic"), 1, loop)
    periodic.start()
    with readable() as (a, _), readable() as (b, _):
        loop.add_callback(note, "callback")
        loop.spawn_callback(note, "spawned")
        loop.add_callback(coroutine, "coroutine")
        loop.call_later(0, note, "timeout")
        loop.add_handler(a, handler, READ)
        loop.add_future(finished(), lambda _: note("future"))
        face.call_soon(note, "call_soon")
        face.call_later(0, note, "call_later")
        face.add_reader(b, reader, b)
        task = face.create_task(coroutine("task"))
        if way == "run_once":
            run_until(loop, lambda: len(found) == 11)
        elif way == "run_sync":
            loop.run_sync(all_noted)
        elif way == "run_until_complete":
            face.run_until_complete(all_noted())
        else:
            loop.add_callback(stop_then)
            loop.start() if way == "start" else face.run_forever()
    periodic.stop()
    assert task.done()
    assert set(found.values()) == {(face, loop)}
    assert current(instance=False) is None
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


# -- Exceptions ----------------------------------------------------------------


@pytest.fixture
def hooks(loop, face):
    """What each face's hook is told."""

    def hook(callback):
        theirs.append((callback, sys.exc_info()[1]))

    theirs, reports = [], []
    loop.handle_callback_exception = hook
    face.set_exception_handler(lambda _, report: reports.append(report))
    return theirs, reports


@pytest.mark.parametrize(
    "via", ["call_soon", "call_soon_threadsafe", "timer", "reader"]
)
@pytest.mark.parametrize("error", [ValueError, Exit, asyncio.CancelledError])
@pytest.mark.parametrize("debug", [False, True])
def test_a_handles_exception_goes_to_asyncios_hook(
    loop, face, hooks, via, error, debug
):
    """Whichever it is, but for two; and the loop goes on."""
    face.set_debug(debug)
    error = error()
    with readable() as (a, _):
        if via == "timer":
            handle = face.call_later(0, fail, error)
        elif via == "reader":
            handle = face._add_reader(a, fail, error)
        else:
            handle = getattr(face, via)(fail, error)
        turn(loop, 2 if via == "reader" else 1)
        face.remove_reader(a)
    theirs, [report] = hooks
    assert theirs == []
    assert report["message"].startswith("Exception in callback fail(")
    assert report["exception"] is error
    assert report["handle"] is handle
    assert ("source_traceback" in report) == debug
    if debug:
        assert report["source_traceback"][-1].filename == __file__
    reports = hooks[1]
    report = reports.clear()


def test_asyncios_report_is_its_own(loop, face, stock):
    """To the word, also in debug mode."""

    def report(face, debug):
        face.set_debug(debug)
        face.call_soon(fail, error)
        face.call_soon(face.stop)
        face.run_forever()
        del reports[0]["handle"]
        found = {**reports.pop(), "source_traceback": debug}
        return found

    reports, error = [], ValueError("why")
    for debug in False, True:
        for each in face, stock:
            each.set_exception_handler(lambda _, report: reports.append(report))
        assert report(face, debug) == report(stock, debug)


def test_asyncios_hook_logs_by_default(loop, face, expect_log):
    face.call_soon(fail)
    turn(loop)
    record = expect_log.take(r"Exception in callback fail\(\)", ValueError)
    assert record.name == "asyncio"


@pytest.mark.parametrize("via", ["callback", "timeout", "handler", "coroutine"])
def test_a_callbacks_exception_goes_to_the_ioloops_hook(loop, hooks, via):
    """And that of its coroutine, of which asyncio has nothing left to tell."""

    async def coroutine():
        await asyncio.sleep(0)
        raise error

    def handler(sock, _):
        loop.remove_handler(sock)
        raise error

    error, (theirs, reports) = ValueError(), hooks
    with readable() as (a, _):
        if via == "handler":
            loop.add_handler(a, handler, READ)
        elif via == "timeout":
            loop.call_later(0, fail, error)
        else:
            loop.add_callback(*{"callback": (fail, error)}.get(via, (coroutine,)))
        run_until(loop, lambda: theirs)
    gc.collect()
    turn(loop)
    [(callback, raised)] = theirs
    assert callback is {"handler": handler, "coroutine": coroutine}.get(via, fail)
    assert raised is error
    assert reports == []


def test_a_tasks_exception_that_nobody_asks_for(loop, face, hooks):
    """Is told to asyncio's hook, as asyncio has it."""

    async def main():
        raise ValueError

    face.create_task(main())
    turn(loop)
    gc.collect()
    theirs, [report] = hooks
    assert theirs == []
    assert report["message"] == "Task exception was never retrieved"
    hooks[1].clear()


@pytest.mark.row("D1", "D6")
@endless
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    "via", ["call_soon", "timer", "task", "add_callback", "coroutine", "reader"]
)
def test_an_interrupt_leaves_either_run(loop, face, hooks, log, run, error, via):
    """Once, and nothing that was queued is lost."""

    async def coroutine():
        await asyncio.sleep(0)
        raise error

    def read():
        face.remove_reader(a)
        raise error

    def stop_at_the_end():
        loop.stop() if len(log) == 8 else face.call_soon(stop_at_the_end)

    start = loop.start if run == "start" else face.run_forever
    with readable() as (a, _):
        if via == "task":
            task = face.create_task(coroutine())
        elif via == "coroutine":
            loop.add_callback(coroutine)
        elif via == "timer":
            face.call_later(0, fail, error)
        elif via == "reader":
            face.add_reader(a, read)
        else:
            either(loop, "IOLoop" if "add" in via else "asyncio", via)(fail, error)
        for i in range(4):
            face.call_soon(face.call_soon, loop.add_callback, log.append, i)
            loop.call_later(0, face.call_soon, log.append, i + 10)
        with pytest.raises(error):
            start()
        assert not loop.running() and running() == (None, None)
        loop.add_callback(stop_at_the_end)
        start()
    assert sorted(log) == [*range(4), *range(10, 14)]
    assert hooks == ([], [])
    if via == "task":
        assert isinstance(task.exception(), error)


@pytest.mark.row("D6")
@endless
def test_an_interrupt_ends_either_sleep(loop, face, run):
    with when_asleep(kill), pytest.raises(KeyboardInterrupt):
        (loop.start if run == "start" else face.run_forever)()
    assert not loop.running() and running() == (None, None)
    turn(loop)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Exit, ValueError])
def test_run_until_complete_raises_what_its_coroutine_does(loop, face, hooks, error):
    """Once."""

    async def main():
        await asyncio.sleep(0)
        raise error

    with pytest.raises(error):
        face.run_until_complete(main())
    assert not loop.running() and running() == (None, None)
    turn(loop, 3)
    gc.collect()
    assert hooks == ([], [])


@pytest.mark.row("D7")
@endless
@pytest.mark.parametrize("via", ["callback", "coroutine"])
def test_other_base_exceptions_of_the_ioloops_leave_either_run(
    loop, face, hooks, run, via
):
    async def coroutine():
        await asyncio.sleep(0)
        raise Exit

    loop.add_callback(*{"callback": (fail, Exit)}.get(via, (coroutine,)))
    start = loop.start if run == "start" else face.run_forever
    with pytest.raises(Exit):
        start()
    loop.add_callback(loop.stop)
    start()
    gc.collect()
    assert hooks == ([], [])
