"""Loops with a face that are closed, nested, forked, and asked for while they run."""

import asyncio
import contextlib
import gc
import os
import select
import signal
import sys
import threading
import warnings
import weakref

import pytest
from fakes import (
    FOREVER,
    READ,
    Exit,
    ScriptedPoller,
    block,
    either,
    fail,
    finished,
    our_ways,
    outcome,
    run_by,
    run_until,
    running,
    turn,
    ways,
)
from kernel import pair, readable
from processes import (
    at_once,
    child,
    forking,
    in_child,
    in_thread,
    sleeping,
)

import ioloop
from ioloop import IOLoop

closes = pytest.mark.parametrize("close", ["IOLoop", "asyncio"])


def nothing():
    pass


async def nothing_to_await():
    pass


# -- close() -------------------------------------------------------------------


@pytest.mark.row("B15")
@closes
@pytest.mark.parametrize("again", ["IOLoop", "asyncio"])
def test_either_close_closes_both(loop, face, close, again):
    """A second one does nothing."""
    either(loop, close, "close")()
    for each in close, again:
        assert face.is_closed()
        assert "closed" in repr(loop)
        with pytest.raises(RuntimeError, match="IOLoop is closed"):
            loop.add_callback(fail)
        with pytest.raises(RuntimeError, match="Event loop is closed"):
            face.call_soon(fail)
        (loop if each == "IOLoop" else face).close()


@pytest.mark.row("B14")
@closes
@ways
def test_a_running_loop_is_not_closed(loop, face, log, close, way):
    method = either(loop, close, "close")
    run_by(loop, way, lambda: log.append(outcome(method)))
    [error] = log
    assert type(error) is RuntimeError and "running" in str(error)
    assert not face.is_closed()
    turn(loop)


@closes
def test_a_poller_that_fails_to_close(close):
    """Both faces are closed all the same."""

    class Poller(ScriptedPoller):
        close = staticmethod(fail)

    loop = IOLoop(impl=Poller())
    face = loop.asyncio_loop
    with pytest.raises(ValueError):
        either(loop, close, "close")()
    assert face.is_closed() and "closed" in repr(loop)
    face.close()


def closed_methods(face):
    """Calls of methods that a closed loop refuses."""
    return {
        "call_soon": lambda: face.call_soon(fail),
        "call_soon_threadsafe": lambda: face.call_soon_threadsafe(fail),
        "call_later": lambda: face.call_later(0, fail),
        "call_at": lambda: face.call_at(0, fail),
        "add_reader": lambda: face.add_reader(0, fail),
        "add_writer": lambda: face.add_writer(0, fail),
        "remove_reader": lambda: face.remove_reader(0),
        "remove_writer": lambda: face.remove_writer(0),
        "add_signal_handler": lambda: face.add_signal_handler(signal.SIGUSR1, fail),
        "remove_signal_handler": lambda: face.remove_signal_handler(signal.SIGUSR1),
        "run_forever": lambda: face.run_forever(),
        "run_until_complete": lambda: face.run_until_complete(finished()),
        "run_in_executor": lambda: face.run_in_executor(None, fail),
        "stop": lambda: face.stop(),
        "close": lambda: face.close(),
        "is_running": lambda: face.is_running(),
        "get_debug": lambda: face.get_debug(),
    }


@pytest.mark.row("B15")
@closes
@pytest.mark.parametrize("name", closed_methods(None))
def test_methods_of_a_closed_face(loop, face, stock, close, name):
    """They do what asyncio's do, to the word."""
    either(loop, close, "close")()
    stock.close()
    ours, theirs = [outcome(closed_methods(each)[name]) for each in (face, stock)]
    assert type(ours) is type(theirs)
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("debug", [False, True])
def test_create_task_is_asyncios(face, stock, debug):
    """Its options, and those that it refuses, a factory's task, and debug mode."""

    async def coroutine():
        pass

    def make(loop, coroutine, **options):
        made.append(options)
        return asyncio.Task(coroutine, loop=loop, **options)

    outcomes, made = [], []
    for each in face, stock:
        each.set_debug(debug)
        task = each.create_task(coroutine(), name="named")
        each.run_until_complete(task)
        outcome = [type(task), task.get_name(), bool(task._source_traceback)]
        refused = coroutine()
        for options in {"loop": each}, {"unknown": 1}:
            with pytest.raises(TypeError):
                each.create_task(refused, **options)
        refused.close()
        each.set_task_factory(make)
        task = each.create_task(coroutine(), name="made")
        each.run_until_complete(task)
        outcomes.append([*outcome, task.get_name(), made.pop()])
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][:3] == [asyncio.Task, "named", debug]


def test_tasks_and_futures_are_of_the_classes_that_asyncio_has_now(face, monkeypatch):
    """Some programs replace them, such as by those in Python."""

    class Task(asyncio.Task):
        pass

    class Future(asyncio.Future):
        pass

    monkeypatch.setattr(asyncio.tasks, "Task", Task)
    monkeypatch.setattr(asyncio.futures, "Future", Future)
    task = face.create_task(nothing_to_await())
    assert (type(task), type(face.create_future())) == (Task, Future)
    face.run_until_complete(task)


def test_tasks_and_futures_are_of_the_loop_that_makes_them(face, stock):
    """In its own run, in none, and in that of another one."""

    async def main():
        task = face.create_task(nothing_to_await())
        await task
        return task.get_loop(), face.create_future().get_loop()

    async def others():
        return face.create_future().get_loop()

    assert face.run_until_complete(main()) == (face, face)
    assert face.create_future().get_loop() is face
    assert stock.run_until_complete(others()) is face


def test_a_closed_loop_goes_without_the_garbage_collector():
    face = ioloop.new_event_loop()
    face.run_until_complete(nothing_to_await())
    face.close()
    dead = weakref.ref(face)
    gc.disable()
    try:
        del face
        assert dead() is None
    finally:
        gc.enable()


def test_create_task_of_a_closed_face(face):
    face.close()
    coroutine = nothing_to_await()
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        face.create_task(coroutine)
    coroutine.close()


@closes
def test_close_lets_go_of_executor_and_signals(loop, face, close):
    async def main():
        return await face.run_in_executor(None, pow, 2, 10)

    assert loop.run_sync(main) == 1024
    face.add_signal_handler(signal.SIGUSR1, fail)
    executor = face._default_executor
    either(loop, close, "close")()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(fail)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_close_of_all_fds_leaves_asyncios(loop, face):
    """Whose transports and programs close them."""
    with pair() as (a, b), pair() as (c, d):
        loop.add_handler(a, fail, READ)
        face.add_reader(b, fail)
        face.add_writer(c, fail)
        loop.close(all_fds=True)
        assert a.fileno() == -1
        assert b.fileno() >= 0 and c.fileno() >= 0 and d.fileno() >= 0


def test_close_of_all_fds_though_asyncios_fails(loop, face):
    """As asyncio's close() does in another thread, where it can't free a signal."""
    face.add_signal_handler(signal.SIGUSR1, fail)
    try:
        with pair() as (a, _):
            loop.add_handler(a, fail, READ)
            with pytest.raises(ValueError, match="main thread"):
                in_thread(loop.close, True)
            assert a.fileno() == -1
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


@pytest.mark.row("D19")
@pytest.mark.parametrize("last", ["IOLoop", "asyncio"])
def test_an_unclosed_pair_warns_once(poller, counted_files, last):
    """Asyncio's warning; and whichever face goes last, nothing is left open."""
    loop = poller.module.IOLoop(impl=poller.impl(), make_current=False)
    face = loop.asyncio_loop
    run_by(loop, "run_until_complete", int)
    dead = weakref.ref(loop), weakref.ref(face)
    with pytest.warns(ResourceWarning) as warned:
        if last == "IOLoop":
            del face
            del loop
        else:
            del loop
            del face
        gc.collect()
    assert ["unclosed event loop" in str(each.message) for each in warned] == [True]
    warned.clear()  # they hold the loop
    gc.collect()
    assert [each() for each in dead] == [None, None]
    assert counted_files() == {}


def test_the_instance_is_not_called_unclosed(counted_files):
    """It lives until the process ends, or is forgotten."""
    loop = IOLoop.instance()
    face = loop.asyncio_loop
    run_by(loop, "run_until_complete", int)
    dead = weakref.ref(loop), weakref.ref(face)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        del loop, face
        IOLoop.clear_instance()
        gc.collect()
    assert [each() for each in dead] == [None, None]
    assert warned == []
    assert counted_files() == {}


# -- Loops inside of loops -----------------------------------------------------


@pytest.fixture(params=["face", "asyncio"])
def outer(request, make_loop):
    """A loop of either kind for another one to run inside of."""
    if request.param == "face":
        return make_loop(make_current=False).asyncio_loop
    return request.getfixturevalue("stock")


@pytest.mark.parametrize("way", ["run_forever", "run_until_complete"])
def test_asyncios_runs_refuse_to_be_nested(outer, loop, face, way):
    """In the words of asyncio."""

    async def main():
        future = face.create_future()
        future.set_result(None)
        arguments = [future] if way == "run_until_complete" else []
        with pytest.raises(RuntimeError, match="while another loop is running"):
            getattr(face, way)(*arguments)
        return running()

    assert outer.run_until_complete(main())[0] is outer
    assert not face.is_running()


@pytest.mark.row("B13")
@ways
def test_a_loop_does_not_run_twice(loop, face, log, way):
    def again():
        for name in "start", "run_once":
            log.append(outcome(getattr(loop, name)))
        log.append(outcome(face.run_forever))

    run_by(loop, way, again)
    assert [type(error) for error in log] == [RuntimeError] * 3
    assert [str(error) for error in log] == [
        "IOLoop is already running",
        "IOLoop is already running",
        "This event loop is already running",
    ]


@pytest.mark.row("D28", "D30")
@our_ways
@pytest.mark.parametrize("ends", [None, KeyboardInterrupt])
def test_an_ioloop_inside_of_a_loop(outer, make_loop, log, way, ends):
    """It is the running loop, and afterwards the outer one and its task are."""
    inner = make_loop(make_current=False)
    face = inner.asyncio_loop

    def function():
        log.append(running())
        if ends is not None:
            raise ends

    def nested():
        before = running()
        with pytest.raises(ends) if ends else contextlib.nullcontext():
            run_by(inner, way, function)
        assert running() == before

    async def main():
        assert running() == (outer, asyncio.current_task())
        nested()
        await asyncio.sleep(0)
        nested()
        outer.call_soon(nested)
        await asyncio.sleep(0)
        return running()[0]

    assert outer.run_until_complete(main()) is outer
    assert log == [(face, None)] * 3
    assert running() == (None, None)


@pytest.mark.row("D30")
def test_tasks_of_two_loops(outer, loop, log):
    """Each is the current one, when it is its turn."""

    async def inner():
        log.append(running())
        await asyncio.sleep(0)
        log.append(running())
        return asyncio.current_task()

    async def main():
        task = loop.run_sync(inner)
        assert log == [(loop.asyncio_loop, task)] * 2
        return running()

    task = outer.create_task(main())
    assert outer.run_until_complete(task) == (outer, task)


@pytest.mark.row("D30")
@our_ways
def test_an_ioloop_without_a_face_inside_of_a_loop(outer, make_loop, log, way):
    """The running loop stays what it was."""
    inner = make_loop(make_current=False)

    async def main():
        run_by(inner, way, lambda: log.append(running()))
        return running()

    task = outer.create_task(main())
    assert outer.run_until_complete(task) == (outer, task)
    assert log == [(outer, task)]


@pytest.mark.row("D30")
@our_ways
def test_an_inner_loop_that_gets_its_face_meanwhile(outer, make_loop, log, way):
    """From its next iteration on, it is the running loop in place of the outer one."""
    inner = make_loop(make_current=False)

    def function():
        log.append(running()[0])
        face = inner.asyncio_loop
        inner.add_callback(lambda: log.append(running() == (face, None)))

    async def main():
        run_by(inner, way, function)
        turn(inner)
        return running()

    task = outer.create_task(main())
    assert outer.run_until_complete(task) == (outer, task)
    assert log == [outer, True]


# -- A face made while the loop runs -------------------------------------------


@our_ways
def test_a_face_made_in_a_callback(loop, log, way):
    def function():
        assert running() == (None, None)
        log.append(loop.asyncio_loop)
        assert running() == (log[0], None)
        assert log[0].is_running()

    run_by(loop, way, function)
    assert log == [loop.asyncio_loop]
    assert running() == (None, None)


@pytest.mark.row("D30")
@pytest.mark.parametrize("inner", ["IOLoop", "asyncio"])
def test_a_face_made_while_another_loop_runs_inside(loop, make_loop, log, inner):
    """It begins when that one has ended."""
    other = make_loop(make_current=False)

    async def main():
        log.append(loop.asyncio_loop)
        await asyncio.sleep(0)
        return running()

    def callback():
        if inner == "IOLoop":
            ran, _ = other.run_sync(main)
            assert ran is other.asyncio_loop
        else:
            with contextlib.closing(asyncio.SelectorEventLoop()) as stock:
                ran, _ = stock.run_until_complete(main())
                assert ran is stock
        loop.add_callback(lambda: log.append(running()))
        loop.add_callback(loop.stop)

    loop.add_callback(callback)
    loop.start()
    assert log == [loop.asyncio_loop, (loop.asyncio_loop, None)]
    assert running() == (None, None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Exit])
def test_a_face_that_could_not_be_made(loop, monkeypatch, error):
    """The loop is as it was, and asked again it makes one."""
    loop.add_callback(loop.stop)
    make = asyncio.SelectorEventLoop.__init__

    def make_half(*args):
        raise error

    def make_nearly(*args):
        make(*args)
        raise error

    for base, broken in (
        (asyncio.BaseEventLoop, make_half),
        (asyncio.SelectorEventLoop, make_nearly),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(base, "__init__", broken)
            with pytest.raises(error):
                _ = loop.asyncio_loop
    gc.collect()
    loop.start()
    assert loop.asyncio_loop.run_until_complete(asyncio.sleep(0.001, 7)) == 7


def test_a_face_made_by_another_thread(loop):
    """Its coroutines run at once, even if the loop is asleep."""

    async def main():
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    with sleeping(loop):
        face = loop.asyncio_loop
        assert face.is_running()
        assert asyncio.run_coroutine_threadsafe(main(), face).result(10) is face


def test_a_face_made_twice_at_once(loop, monkeypatch):
    """The first one that is complete stays, and the other one is not left open."""
    faces, make = [], asyncio.SelectorEventLoop.__init__

    def make_slowly(self, *args):
        make(self, *args)
        if threading.current_thread() is threading.main_thread():
            faces.append(in_thread(getattr, loop, "asyncio_loop"))

    monkeypatch.setattr(asyncio.SelectorEventLoop, "__init__", make_slowly)
    assert [loop.asyncio_loop] == faces
    gc.collect()
    assert faces[0].run_until_complete(asyncio.sleep(0.001, 7)) == 7


@pytest.mark.parametrize("runs", [False, True])
def test_a_face_asked_for_by_many_threads(make_loop, runs):
    """All get the same one, and nobody is told of another one that was not closed."""
    for _ in range(20):
        loop = make_loop()
        with sleeping(loop) if runs else contextlib.nullcontext():
            [face] = set(at_once(4, lambda loop=loop: loop.asyncio_loop))
            assert loop.asyncio_loop is face
        assert face.run_until_complete(asyncio.sleep(0.001, 7)) == 7
        gc.collect()


# -- Asynchronous generators ---------------------------------------------------


@pytest.mark.row("D30")
@our_ways
def test_the_hooks_of_asynchronous_generators_are_borrowed(loop, face, log, way):
    outer = sys.get_asyncgen_hooks()
    mine = (None, fail)
    sys.set_asyncgen_hooks(*mine)
    try:
        run_by(loop, way, lambda: log.append(sys.get_asyncgen_hooks()))
        assert sys.get_asyncgen_hooks() == mine
    finally:
        sys.set_asyncgen_hooks(*outer)
    assert log[0].finalizer == face._asyncgen_finalizer_hook


async def numbers(log):
    try:
        yield 1
    finally:
        await asyncio.sleep(0)
        log.append("closed")


def test_a_generator_that_is_dropped_is_closed(loop, log):
    """By the loop, in its own time."""

    async def main():
        async for number in numbers(log):
            return number

    assert loop.run_sync(main) == 1
    gc.collect()
    run_until(loop, lambda: log)
    assert log == ["closed"]


def test_shutdown_asyncgens(loop, face, log):
    """Closes those that are still there."""

    async def main():
        generator = numbers(log)
        await generator.__anext__()
        return generator

    generator = face.run_until_complete(main())
    assert log == []
    face.run_until_complete(face.shutdown_asyncgens())
    assert log == ["closed"]
    del generator


# -- A forked child ------------------------------------------------------------

IN_CHILD = {
    "call_soon": (int,),
    "call_soon_threadsafe": (int,),
    "call_later": (0, int),
    "call_at": (0, int),
    "add_reader": (0, int),
    "add_writer": (0, int),
    "remove_reader": (0,),
    "remove_writer": (0,),
    "run_forever": (),
    "stop": (),
}


@pytest.mark.row("B18")
def test_a_child_is_refused_until_reinit(loop, face, log):
    """The parent never notices."""
    with readable() as (a, _):
        face.add_reader(a, lambda: (log.append("reader"), face.remove_reader(a)))
        with child() as inside:
            if inside:
                for name, arguments in IN_CHILD.items():
                    with pytest.raises(RuntimeError, match="fork.*reinit"):
                        getattr(face, name)(*arguments)
                with pytest.raises(RuntimeError, match="fork.*reinit"):
                    loop.asyncio_loop.call_soon(int)
                coroutine = nothing_to_await()
                with pytest.raises(RuntimeError, match="fork.*reinit"):
                    face.run_until_complete(coroutine)
                coroutine.close()
                loop.reinit()
                assert face.run_until_complete(asyncio.sleep(0.001, 7)) == 7
                assert log == ["reader"]
                face.close()
        assert log == []
        assert face.run_until_complete(asyncio.sleep(0.001, 7)) == 7
        assert log == ["reader"]


@pytest.mark.parametrize("way", ["run_sync", "run_until_complete"])
def test_a_child_forked_in_a_task_goes_on(loop, face, way):
    """With what was pending."""
    with forking() as fork:

        async def main():
            timer = face.create_future()
            face.call_later(0.001, timer.set_result, 7)
            if fork() == 0:
                loop.reinit()
            assert running() == (face, asyncio.current_task())
            await asyncio.sleep(0)
            return await timer

        if way == "run_sync":
            assert loop.run_sync(main) == 7
        else:
            assert face.run_until_complete(main()) == 7
        assert running() == (None, None)
        loop.close()


@pytest.mark.row("B18")
def test_run_sync_ends_in_a_child(loop):
    """And runs nothing there that is the parent's."""
    parent, pids = os.getpid(), []

    with forking() as fork:

        async def main():
            loop.add_callback(lambda: pids.append(os.getpid()))
            fork()
            await asyncio.sleep(0)

        if os.getpid() == parent:
            try:
                loop.run_sync(main)
            except RuntimeError as error:
                assert os.getpid() != parent and "fork" in str(error)
        if os.getpid() == parent:
            assert pids == [parent]
        else:
            assert pids == []
            loop.close()


@pytest.mark.parametrize("way", ["start", "run_until_complete"])
def test_a_child_that_closes_its_loop_in_a_run(loop, way):
    """The run ends by an error, and puts everything back."""
    hooks, children = sys.get_asyncgen_hooks(), []

    def callback():
        if fork() == 0:
            children.append(os.getpid())
            loop.close()

    with forking() as fork:
        loop.asyncio_loop.call_soon(callback)
        try:
            run_by(loop, way, int)
            assert not children
        except RuntimeError as error:
            assert children and "IOLoop is closed" in str(error)
        assert running() == (None, None)
        assert sys.get_asyncgen_hooks() == hooks


@pytest.mark.row("D30")
def test_a_child_forked_in_an_inner_loop(loop, face, make_loop, log):
    """That one is its running loop, in whatever order the two begin anew."""
    inner = make_loop(make_current=False)

    def inside():
        if fork() == 0:
            inner.reinit()
            loop.reinit()
        log.append(running())

    def outside():
        run_by(inner, "start", inside)
        log.append(running())

    with forking() as fork:
        assert inner.asyncio_loop is not None
        run_by(loop, "start", outside)
        assert log == [(inner.asyncio_loop, None), (face, None)]
        assert running() == (None, None)
        inner.close()
        loop.close()


@pytest.mark.parametrize("way", ["start", "run_until_complete"])
@pytest.mark.parametrize("close", [False, True])
def test_a_child_forked_in_a_run_begins_anew(loop, face, way, close):
    """On another loop, whether it has closed the inherited one or not."""

    def in_the_child():
        if close:
            loop.close()
        assert running() == (None, None)
        for make in ioloop.new_event_loop, asyncio.SelectorEventLoop:
            with contextlib.closing(make()) as other:
                assert other.run_until_complete(asyncio.sleep(0.001, 7)) == 7

    run_by(loop, way, lambda: in_child(in_the_child))
    assert face.run_until_complete(asyncio.sleep(0.001, 7)) == 7


@pytest.mark.row("B21")
def test_a_child_forked_by_another_thread(loop, face):
    """Nobody runs the loop there until the child does."""

    def in_the_child():
        loop.reinit()
        assert not face.is_running()
        assert face.run_until_complete(asyncio.sleep(0.001, 7)) == 7
        face.close()

    face.call_soon(in_thread, in_child, in_the_child)
    turn(loop)
    assert face.run_until_complete(asyncio.sleep(0.001, 7)) == 7


# -- Embedded in another loop --------------------------------------------------


@pytest.mark.parametrize("how", ["call_soon", "call_soon_threadsafe", "call_later"])
def test_asyncios_calls_make_an_embedded_loop_readable(loop, poller, face, how):
    if poller.name == "select":
        pytest.skip("select has no descriptor")
    arguments = [1] if how == "call_later" else []
    assert loop.next_timeout() is None
    assert not is_readable(loop.fileno())
    getattr(face, how)(*arguments, nothing)
    assert is_readable(loop.fileno())
    assert loop.next_timeout() <= (1 if how == "call_later" else 0)
    turn(loop)
    assert not is_readable(loop.fileno())


def is_readable(fd):
    return bool(select.select([fd], [], [], 0)[0])


# -- Counters and the watchdog -------------------------------------------------


def test_stats_count_asyncios_work(loop, face):
    with pair() as (a, b):
        face.call_soon(int)
        loop.add_callback(int)
        face.call_later(0, int)
        never = face.call_later(FOREVER, fail)
        face.add_reader(a, fail)
        face.add_writer(b, int)
        stats = loop.stats()
        assert stats["pending_callbacks"] == 2
        assert stats["pending_timeouts"] == 2
        assert stats["handlers"] == 2
        turn(loop)
        stats = loop.stats()
        assert (stats["callbacks"], stats["timeouts"]) == (2, 1)
        assert stats["pending_timeouts"] == 1
        assert stats["events"] == stats["pending_callbacks"] == 1
        never.cancel()
        face.remove_reader(a)
        face.remove_writer(b)
        stats = loop.stats()
        assert stats["pending_timeouts"] == stats["handlers"] == 0


@pytest.mark.parametrize("via", ["call_soon", "task"])
def test_the_watchdog_sees_asyncios_work(loop, face, log, via):
    async def main():
        block()

    def log_stack(number, frame):
        log.append(frame.f_code.co_name)

    loop.log_stack = log_stack
    loop.set_blocking_log_threshold(0.02)
    task = face.create_task(main()) if via == "task" else None
    handle = face.call_soon(block) if via == "call_soon" else None
    turn(loop)
    assert "block" in log
    del task, handle
