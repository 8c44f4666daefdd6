"""The five steps, stop() wherever it is called, restarts, embedding, which loop."""

import asyncio
import copy
import ctypes
import functools
import gc
import io
import os
import pickle
import select
import signal
import threading
import weakref

import pytest
from fakes import (
    FOREVER,
    OPEN_LOOP_ONLY,
    READ,
    Exit,
    FakeClock,
    ScriptedPoller,
    fail,
    turn,
)
from kernel import on_signal, pair, pairs, readable
from processes import Thread, at_once, in_thread, sleeping, switch_interval

import ioloop
from ioloop import IOLoop

# -- The five steps ------------------------------------------------------------


@pytest.fixture
def script(log):
    """A loop of three handlers that are ready in every poll; `log` gets it all."""

    class Poller(ScriptedPoller):
        def poll(self, seconds):
            log.append("poll")
            return [(fd, READ) for fd in self.registered if fd != self.waker]

    with pairs(3) as socks, IOLoop(impl=Poller(), time_func=FakeClock()) as loop:
        loop.socks = [a for a, _ in socks]
        for i, sock in enumerate(loop.socks):
            loop.add_handler(sock, lambda *_, i=i: log.append(f"h{i}"), READ)
        yield loop


def test_order_of_the_steps(script, log):
    script.add_callback(log.append, "c0")
    script.add_callback(log.append, "c1")
    script.call_later(-1, log.append, "t1")
    script.call_later(-2, log.append, "t0")
    turn(script)
    assert log == ["c0", "c1", "t0", "t1", "poll", "h0", "h1", "h2"]


def test_what_callbacks_add_is_due_in_the_same_iteration_only_as_a_timeout(script, log):
    """A timeout added in step 1 runs in step 2 if it is due."""
    script.add_callback(script.call_later, 0, log.append, "t")
    script.add_callback(script.add_callback, log.append, "c")
    turn(script)
    assert log == ["t", "poll", "h0", "h1", "h2"]
    log.clear()
    turn(script)
    assert log[:2] == ["c", "poll"]


# -- stop() --------------------------------------------------------------------


def test_stop_in_a_callback(script, log):
    """The rest of the batch and the due timeouts run, and no poll."""
    script.add_callback(log.append, "c0")
    script.add_callback(script.stop)
    script.add_callback(log.append, "c1")
    script.add_callback(script.add_callback, log.append, "c2")
    script.call_later(0, log.append, "t")
    script.start()
    assert log == ["c0", "c1", "t"]
    assert script.stats()["pending_callbacks"] == 1


def test_stop_in_a_timeout(script, log):
    script.call_later(0, script.stop)
    script.call_later(0, log.append, "t1")
    script.call_later(0, script.add_callback, log.append, "c")
    script.start()
    assert log == ["t1"]
    assert script.stats()["pending_callbacks"] == 1


@pytest.mark.parametrize("which", [0, 1, 2])
def test_stop_in_a_handler(script, log, which):
    """The other handlers run, then what is due already; and no other poll."""

    def stop(*_):
        log.append(f"h{which}")
        script.add_callback(log.append, "c")
        script.call_later(0, log.append, "t")
        script.call_later(1, fail)
        script.stop()

    script.remove_handler(script.socks[which])
    script.add_handler(script.socks[which], stop, READ)
    script.start()
    assert log[0] == "poll"
    assert sorted(log[1:4]) == ["h0", "h1", "h2"]
    assert log[4:] == ["c", "t"]


def test_stop_before_start(script, log):
    """The next start() returns at once, once, and has no effect on run_once()."""
    script.add_callback(log.append, "c")
    script.stop()
    script.start()
    assert log == []
    script.add_callback(script.stop)
    script.start()
    assert log == ["c"]
    before = script.stats()["iterations"]
    script.stop()
    script.start()
    assert script.stats()["iterations"] == before
    turn(script)
    assert "poll" in log


@pytest.mark.row("B10")
def test_stop_before_start_on_every_poller(loop):
    loop.stop()
    loop.start()
    loop.call_later(0, loop.stop)
    loop.start()
    assert loop.stats()["timeouts"] == 1


@pytest.mark.row("B11")
def test_stop_twice_is_once(script, log):
    script.add_callback(script.stop)
    script.add_callback(script.stop)
    script.call_later(0, script.stop)
    script.start()
    script.add_callback(script.add_callback, script.stop)
    script.start()
    assert log[0] == "poll"


def test_stop_and_an_exception_in_one_iteration(script, log):
    """The exception wins, and the loop can be started again."""
    script.add_callback(script.stop)
    script.add_callback(fail, Exit)
    with pytest.raises(Exit):
        script.start()
    script.add_callback(log.append, "c")
    script.add_callback(script.stop)
    script.start()
    assert log == ["c"]


@pytest.mark.row("B9")
def test_stop_from_another_thread(loop):
    """It wakes a loop that sleeps for ever."""
    handle = loop.call_later(FOREVER, fail)
    with sleeping(loop):
        pass
    handle.cancel()


def test_stop_from_a_signal_handler(loop):
    with on_signal(signal.SIGUSR1, lambda *_: loop.stop()):
        thread = Thread(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        loop.call_later(FOREVER, fail)
        loop.start()
        thread.join()


def test_stop_from_del(loop):
    class Stopper:
        def __del__(self):
            loop.stop()

    loop.add_callback(Stopper)
    loop.start()


# -- start() again -------------------------------------------------------------


@pytest.mark.row("B13", "B14")
@pytest.mark.parametrize(
    ("name", "args"),
    [
        *(("start", ()), ("run_once", ()), ("run_sync", (int,))),
        *(("close", ()), ("close", (True,))),
    ],
)
def test_what_is_refused_while_the_loop_runs(loop, name, args):
    """In callbacks, timeouts and handlers; nothing is changed, and it goes on."""
    log = []

    def nested(*_):
        with pytest.raises(RuntimeError, match="running"):
            getattr(loop, name)(*args)
        assert loop.running()
        log.append(1)

    with readable() as (a, _):
        loop.add_handler(a, nested, READ)
        loop.add_callback(nested)
        loop.call_later(0, nested)
        turn(loop, 2)
        assert a.fileno() >= 0
        loop.remove_handler(a)
    assert log == [1, 1, 1, 1]


@pytest.mark.row("B13")
def test_stop_of_a_loop_is_not_taken_by_a_nested_start(script, log):
    def nested():
        script.stop()
        with pytest.raises(RuntimeError):
            script.start()

    script.add_callback(nested)
    script.start()
    assert log == []


def test_a_loop_inside_another(make_loop, poller):
    outer, inner = make_loop(), make_loop()
    current = poller.module.IOLoop.current
    seen = []

    def nested():
        inner.add_callback(lambda: seen.append(current()))
        inner.add_callback(inner.stop)
        inner.start()
        seen.append(current())
        outer.stop()

    outer.add_callback(nested)
    outer.start()
    assert seen == [inner, outer]
    assert current(instance=False) is outer
    assert signal.set_wakeup_fd(-1) == -1


def by_stop(loop):
    loop.add_callback(loop.stop)


def by_callback(loop):
    loop.add_callback(fail, Exit)


def by_timeout(loop):
    loop.call_later(0, fail, Exit)


def by_handler(loop):
    a, b = loop.pair
    b.send(b"x")
    loop.add_handler(a, lambda *_: a.recv(1) and fail(Exit), READ)


def by_hook(loop):
    def hook(callback):
        del loop.handle_callback_exception
        raise Exit

    loop.handle_callback_exception = hook
    loop.add_callback(fail)


def by_signal(loop):
    def raise_exit(*_):
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        raise Exit

    signal.signal(signal.SIGUSR1, raise_exit)
    loop.add_callback(os.kill, os.getpid(), signal.SIGUSR1)


def by_interrupt(loop):
    loop.add_callback(signal.raise_signal, signal.SIGINT)


WAYS_OUT = [
    by_stop,
    by_callback,
    by_timeout,
    by_handler,
    by_hook,
    by_signal,
    by_interrupt,
]


@pytest.mark.row("D4")
@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("watched", [False, True], ids=["", "watchdog"])
def test_restart_after_every_way_out(make_loop, poller, way, watched):
    """Flag, thread, wakeup fd, timers and current loop are restored."""
    other, loop = make_loop(), make_loop()
    state = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    if watched:
        loop.set_blocking_log_threshold(60)
    with pair() as loop.pair:
        for leave in (way, way, by_stop):
            leave(loop)
            try:
                loop.start()
            except (Exit, KeyboardInterrupt):
                assert leave is not by_stop
            else:
                assert leave is by_stop
            assert not loop.running()
            assert poller.module.IOLoop.current(instance=False) is other
            assert signal.set_wakeup_fd(-1) == -1
            assert state == (
                signal.getsignal(signal.SIGALRM),
                signal.getitimer(signal.ITIMER_REAL),
            )
            loop.remove_handler(loop.pair[0])
    in_thread(loop.run_once, 0)
    del loop.pair


def test_restart_in_another_thread(loop):
    """The owner is whoever runs it."""
    log = []
    for _ in range(3):
        loop.add_callback(lambda: log.append(threading.get_ident()))
        loop.add_callback(loop.stop)
        in_thread(loop.start)
    loop.add_callback(loop.stop)
    loop.start()
    assert len(log) == 3


def test_running(loop):
    seen = []
    assert loop.running() is False
    loop.add_callback(lambda: seen.append(loop.running()))
    turn(loop)
    assert seen == [True]
    assert loop.running() is False


@pytest.mark.row("D18")
def test_start_holds_the_loop(poller):
    """A loop that nobody else refers to runs to its end."""
    log = []

    def run():
        loop = poller.module.IOLoop(impl=poller.impl())
        loop.add_callback(gc.collect)
        loop.add_callback(log.append, 1)
        loop.call_later(0.001, loop.stop)
        loop.add_callback(lambda reference: log.append(reference()), weakref.ref(loop))
        start = loop.start
        del loop
        start()
        start.__self__.close()

    run()
    assert len(log) == 2 and log[1] is not None
    log.clear()


# -- close() -------------------------------------------------------------------


METHODS = {**OPEN_LOOP_ONLY, "add_future": (None, int), "reinit": ()}


@pytest.mark.row("B6", "B15")
def test_closed(loop, poller):
    """Every method says so, and the loop is nobody's current one."""
    loop.close()
    for name in METHODS.keys() - {"remove_handler", "remove_timeout"}:
        with pytest.raises(RuntimeError, match="closed"):
            getattr(loop, name)(*METHODS[name])
    assert not poller.module.IOLoop.initialized()
    assert poller.module.IOLoop.current(instance=False) is None


@pytest.mark.row("B16")
def test_what_is_removed_after_close_is_gone_already(loop, poller):
    """In any order of a program's end, and in any thread."""
    with pair() as (a, _):
        loop.add_handler(a, fail, READ)
        handle = loop.call_later(FOREVER, fail)
        periodic = poller.module.PeriodicCallback(fail, FOREVER, loop)
        periodic.start()
        turn(loop)
        loop.close()
        for call in (
            handle.cancel,
            periodic.stop,
            lambda: loop.remove_timeout(handle),
            lambda: loop.remove_handler(a),
            lambda: loop.remove_handler(a.fileno()),
        ):
            assert call() is in_thread(call) is None
    assert not periodic.is_running() and handle.callback is None


@pytest.mark.row("B15")
def test_what_a_closed_loop_still_answers(loop):
    loop.close()
    loop.close()
    loop.close(all_fds=True)
    assert loop.running() is False
    assert loop.time() > 1e9
    assert "closed" in repr(loop)


@pytest.mark.row("D22")
def test_not_initialised(poller):
    """A subclass may forget super().__init__(): a RuntimeError, and no crash."""
    loop = poller.module.IOLoop.__new__(poller.module.IOLoop)
    for name in METHODS:
        with pytest.raises(RuntimeError, match="__init__"):
            getattr(loop, name)(*METHODS[name])
    assert repr(loop)
    assert loop.running() is False
    loop.time()
    loop.close()


@pytest.mark.row("D22")
def test_partly_made_objects(poller):
    module = poller.module
    periodic = module.PeriodicCallback.__new__(module.PeriodicCallback)
    for name in ("stop", "is_running"):
        getattr(periodic, name)()
    with pytest.raises(RuntimeError):
        periodic.start()
    timeout = module._Timeout.__new__(module._Timeout)
    timeout.cancel()
    assert timeout.callback is None
    assert repr(timeout) and isinstance(timeout.deadline, float)

    class Sub(module.IOLoop):
        def __init__(self):
            pass

    with pytest.raises(RuntimeError):
        Sub().start()


@pytest.mark.row("D22")
def test_initialised_twice(loop):
    """Also when it is closed, maybe inside of one of its methods."""
    with pytest.raises(RuntimeError):
        loop.__init__()
    turn(loop)

    class Hostile(float):
        def __float__(self):
            loop.close()
            loop.__init__()

    for again in (loop.__init__, functools.partial(loop.call_later, Hostile(), int)):
        with pytest.raises(RuntimeError):
            again()
        loop.close()


@pytest.mark.row("D22")
@pytest.mark.parametrize("operation", ["copy", "deepcopy", "pickle"])
def test_not_to_be_copied(loop, operation):
    work = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickle.dumps}
    handle = loop.call_later(1, int)
    for thing in (loop, handle):
        with pytest.raises(TypeError):
            work[operation](thing)


@pytest.mark.row("B15")
def test_close_drops_what_is_queued(loop, poller):
    class Thing:
        def __call__(self, *args):
            raise AssertionError

    things = [Thing() for _ in range(4)]
    references = [weakref.ref(thing) for thing in things]
    with pair() as (a, _):
        loop.add_callback(things[0])
        loop.call_later(0, things[1])
        loop.add_handler(a, things[2], READ)
        poller.module.PeriodicCallback(things[3], 1, loop).start()
        things.clear()
        loop.close()
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_close_while_finalizers_use_the_loop(loop):
    """What close() drops may call back; it is too late for that."""
    errors = []

    class Thing:
        def __call__(self):
            pass

        def __del__(self):
            for name in ("add_callback", "call_later", "stop"):
                try:
                    getattr(loop, name)(*METHODS[name])
                except RuntimeError as error:
                    errors.append(error)
            loop.close()

    for _ in range(100):
        loop.add_callback(Thing())
        loop.call_later(1, Thing())
    loop.close()
    gc.collect()
    assert len(errors) == 3 * 200


def test_context_manager(poller, counted_files):
    with poller.module.IOLoop(impl=poller.impl()) as loop:
        assert counted_files()
        turn(loop)
    assert not counted_files()
    with pytest.raises(Exit), poller.module.IOLoop(impl=poller.impl()) as loop:
        raise Exit
    assert not counted_files()
    assert "closed" in repr(loop)


# -- run_once(), next_timeout(), fileno(): inside another loop -----------------


def test_run_once_is_one_iteration(loop):
    log = []
    with readable() as (a, _):
        loop.add_handler(a, lambda *_: log.append("h"), READ)
        loop.add_callback(loop.add_callback, log.append, "c")
        loop.run_once()
        assert log in ([], ["h"])
        loop.run_once()
        loop.run_once()
        loop.remove_handler(a)
    assert log.count("c") == 1 and "h" in log


@pytest.mark.parametrize("timeout", [0, 0.001, -1, 0.0])
def test_run_once_waits_no_longer_than_told(loop, timeout):
    loop.call_later(FOREVER, fail)
    loop.run_once(timeout)
    assert loop.stats()["iterations"] == 1


def test_run_once_waits_for_what_comes(loop):
    log = []
    loop.call_later(0.002, log.append, 1)
    loop.call_later(0.002, loop.stop)  # if it is due by now: not to sleep after it
    loop.run_once()
    loop.run_once(0)
    assert log == [1]


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="prctl() is Linux's")
def test_run_once_sleeps_to_the_end(loop):
    """A poll is told to sleep less by the timer slack, and here there is none."""
    log = []

    def run():
        set_timer_slack = 29
        assert ctypes.CDLL(None).prctl(set_timer_slack, 1, 0, 0, 0) == 0
        for i in range(200):
            loop.call_later(0.001, log.append, i)
            loop.run_once(0.1)  # not for ever, if it is due by now
            loop.run_once(0)
            assert log == list(range(i + 1))

    Thread(run).join()


@pytest.mark.parametrize("timeout", ["1", [], float("nan")])
def test_run_once_with_nonsense(loop, timeout):
    with pytest.raises((TypeError, ValueError)):
        loop.run_once(timeout)
    assert not loop.running()
    turn(loop)


@pytest.mark.parametrize("where", ["before", "callback", "timeout", "handler"])
def test_stop_costs_run_once_one_iteration(loop, where):
    """The one that leaves because of it; there is I/O in all others."""
    calls = []

    def handler(*_):
        calls.append(1)
        if where == "handler" and len(calls) == 1:
            loop.stop()

    with readable() as (a, _):
        loop.add_handler(a, handler, READ)
        if where == "before":
            loop.stop()
        elif where == "callback":
            loop.add_callback(loop.stop)
        elif where == "timeout":
            loop.call_later(0, loop.stop)
        turn(loop, 5)
        assert len(calls) >= 4
        assert loop.next_timeout() is None
        loop.add_callback(loop.add_callback, calls.clear)
        loop.add_callback(loop.add_callback, loop.stop)
        loop.start()
        assert len(calls) <= 1, "start() ended before its own stop()"
        loop.remove_handler(a)


def test_fileno_is_the_pollers(loop, poller):
    """select() has none; elsewhere it stays the same."""
    if poller.name == "select":
        with pytest.raises(io.UnsupportedOperation):
            loop.fileno()
    else:
        number = loop.fileno()
        os.fstat(number)
        turn(loop)
        assert loop.fileno() == number


def is_readable(fd, seconds=0):
    return bool(select.select([fd], [], [], seconds)[0])


with_fileno = pytest.mark.parametrize("poller", ["epoll", "kqueue"], indirect=True)


@pytest.fixture
def embedded(loop):
    loop.fileno()
    return loop


@with_fileno
def test_embedding_by_fileno(embedded):
    log = []
    with pair() as (a, b):
        embedded.add_handler(a, lambda *_: log.append(a.recv(9)), READ)
        assert not is_readable(embedded.fileno())
        b.send(b"x")
        assert is_readable(embedded.fileno(), 10)
        turn(embedded)
        assert log == [b"x"]
        assert not is_readable(embedded.fileno())
        embedded.remove_handler(a)


@with_fileno
@pytest.mark.parametrize("name", ["add_callback", "stop"])
def test_embedding_is_woken_from_a_thread(embedded, name):
    """Whoever polls fileno() learns that run_once() is due."""
    turn(embedded)
    thread = Thread(getattr(embedded, name), *METHODS[name])
    assert is_readable(embedded.fileno(), 10)
    thread.join()
    turn(embedded, 2)
    if name == "add_callback":
        assert not is_readable(embedded.fileno())
        assert embedded.stats()["callbacks"] == 1


@with_fileno
def test_embedding_what_was_queued_before(loop):
    loop.add_callback(loop.add_callback, int)
    assert is_readable(loop.fileno())
    turn(loop)
    assert is_readable(loop.fileno())
    turn(loop)
    assert loop.next_timeout() is None


def test_embedding_into_another_ioloop(make_loop, poller):
    outer = make_loop()
    inner = ioloop.IOLoop(impl=ioloop._EPoll())
    with inner, pair() as (a, b):
        inner.add_handler(a, lambda *_: (a.recv(9), outer.stop()), READ)
        outer.add_handler(inner, lambda *_: inner.run_once(0), READ)
        outer.call_later(0, b.send, b"x")
        outer.start()
        outer.remove_handler(inner)


@with_fileno
def test_embedding_into_asyncio(embedded):
    async def main():
        done = asyncio.Event()
        running = asyncio.get_running_loop()
        running.add_reader(embedded.fileno(), embedded.run_once, 0)
        in_thread(embedded.add_callback, done.set)
        await asyncio.wait_for(done.wait(), 10)
        running.remove_reader(embedded.fileno())

    asyncio.run(main())


# -- Which loop ----------------------------------------------------------------


@pytest.fixture
def cls(poller):
    """The IOLoop class of the poller's module, without an instance at the end."""
    yield poller.module.IOLoop
    poller.module.IOLoop.clear_current()
    if poller.module.IOLoop.initialized():
        poller.module.IOLoop.instance().close()


def test_instance(cls):
    assert cls.initialized() is False
    loop = cls.instance()
    assert cls.initialized() is True
    assert cls.instance() is loop
    assert in_thread(cls.instance) is loop
    loop.close()
    assert cls.initialized() is False
    other = cls.instance()
    assert other is not loop


def test_clear_instance(cls):
    """The loop goes on; it is only no longer what instance() answers."""
    with cls.instance() as loop:
        for _ in range(2):
            cls.clear_instance()
            assert cls.initialized() is False
        other = cls.instance()
        assert other is not loop
        turn(loop)
    assert cls.instance() is other


@pytest.mark.row("F7")
@pytest.mark.parametrize("round_", range(5))
def test_instance_is_made_once(cls, round_):
    with switch_interval(1e-6):
        assert len(set(map(id, at_once(20, cls.instance)))) == 1


def test_install(cls, loop):
    loop.install()
    loop.install()
    assert cls.instance() is loop
    assert cls.initialized()
    with cls() as other:
        with pytest.raises(RuntimeError):
            other.install()
    assert cls.instance() is loop
    loop.close()
    assert not cls.initialized()


def test_instance_of_a_subclass(cls):
    class Sub(cls):
        pass

    assert type(Sub.instance()) is Sub
    assert cls.instance() is Sub.instance()


def test_current_is_the_instance_without_another(cls):
    assert cls.current(instance=False) is None
    assert cls.current(False) is None
    assert cls.current() is cls.instance()


def test_make_current(cls, loop, make_loop):
    other = make_loop()
    other.make_current()
    assert cls.current() is other
    assert in_thread(cls.current, False) is None
    cls.clear_current()
    assert cls.current(instance=False) is None


def test_the_first_loop_of_a_thread_is_its_current_one(cls, make_loop, poller):
    """As in Tornado 4; there is no second loop that nobody runs."""
    first = make_loop()
    second = make_loop()
    assert cls.current() is first
    assert poller.module.PeriodicCallback(int, 10).io_loop is first
    assert not cls.initialized()
    turn(second), turn(first)
    assert cls.current() is first

    def in_another():
        assert cls.current(instance=False) is None
        with cls(impl=poller.impl()) as loop:
            assert cls.current() is loop

    in_thread(in_another)


def test_the_next_loop_is_the_current_one(cls, make_loop):
    """After clear_current(), and after one that was made not to be current."""
    make_loop()
    cls.clear_current()
    assert make_loop() is cls.current()
    cls.clear_current()
    make_loop(make_current=False)
    assert cls.current(instance=False) is None
    assert make_loop(make_current=None) is cls.current()


def test_made_to_be_current(cls, make_loop, poller, counted_files):
    """That is refused, and leaves nothing, if the thread has a loop."""
    loop = make_loop(make_current=True)
    assert cls.current() is loop
    files = counted_files()
    for first in (loop, make_loop(make_current=False)):
        cls.clear_current()
        first.make_current()
        files = counted_files()
        with pytest.raises(RuntimeError, match="current"):
            cls(impl=poller.impl(), make_current=True)
        gc.collect()
        assert counted_files() == files
        assert cls.current() is first


def test_made_to_be_current_it_is_kept(cls, poller):
    """By the thread, as by make_current(); the first one is not, and may go."""
    reference = weakref.ref(cls(impl=poller.impl(), make_current=True))
    gc.collect()
    assert cls.current() is reference()
    reference().close()
    assert reference() is None


@pytest.mark.parametrize("ran", [False, True], ids=["", "ran"])
def test_the_first_loop_is_let_go(cls, poller, ran, warns_unclosed):
    """It is current for as long as somebody has it."""
    loop = cls(impl=poller.impl())
    if ran:
        turn(loop, 2)
    reference = weakref.ref(loop)
    with warns_unclosed():
        del loop
        gc.collect()
    gc.collect()  # the warning had brought it back, as its source
    assert reference() is None
    assert cls.current(instance=False) is None


def test_a_loop_that_is_made_while_another_runs_is_not_current(cls, loop, poller):
    """In a callback, the one that runs is; it may be made current later on."""
    made = []

    def make():
        with pytest.raises(RuntimeError, match="current"):
            cls(impl=poller.impl(), make_current=True)
        made.append(cls(impl=poller.impl()))
        assert cls.current() is loop

    cls.clear_current()
    loop.add_callback(make)
    turn(loop)
    assert cls.current(instance=False) is None
    made.pop().close()


def test_a_loop_that_can_not_be_made_is_not_current(cls, loop, counted_files):
    cls.clear_current()
    for args, kwargs in (
        ((None, print), {}),
        ((None, None, True), {}),
        ((), {"time_func": 1}),
        ((), {"impl": object()}),
        ((), {"impl": loop._impl}),
    ):
        for make_current in (None, True):
            error = ValueError if kwargs.get("impl") is loop._impl else TypeError
            with pytest.raises(error):
                cls(*args, make_current=make_current, **kwargs)
            assert cls.current(instance=False) is None
    assert not counted_files()


def test_the_instance_is_current_where_it_is_made_first(cls, make_loop):
    """Where there is another loop, that stays the current one."""
    instance = cls.instance()
    assert cls.current() is instance
    instance.close()
    loop = make_loop()
    assert cls.instance() is not loop
    assert cls.current() is loop


@pytest.mark.parametrize("run", ["start", "run_once"])
@pytest.mark.parametrize("made", [False, True], ids=["first", "made current"])
def test_a_loop_is_current_while_it_runs(cls, make_loop, run, made):
    """Then it is again the one that was."""
    other, loop = make_loop(), make_loop()
    if made:
        other.make_current()
    seen = []
    loop.add_callback(lambda: seen.append(cls.current()))
    loop.add_callback(loop.stop)
    getattr(loop, run)()
    assert seen == [loop]
    assert cls.current() is other


@pytest.mark.row("F6")
@pytest.mark.parametrize("call", [lambda close: close(), in_thread])
@pytest.mark.parametrize("made", [False, True], ids=["first", "made current"])
def test_a_closed_loop_is_not_current(cls, make_loop, call, made):
    """It gives way to the next one, whichever thread has closed it."""
    for _ in range(2):
        loop = make_loop()
        if made:
            loop.make_current()
        assert cls.current(instance=False) is loop
        call(loop.close)
        assert cls.current(instance=False) is None


# -- Construction --------------------------------------------------------------


def test_subclass_with_attributes(make_loop, cls):
    class Sub(cls):
        def __init__(self, name, **options):
            super().__init__(**options)
            self.name = name

        def start(self):
            self.started = True
            super().start()

    loop = make_loop(lambda **options: Sub("mine", **options))
    loop.add_callback(loop.stop)
    loop.start()
    assert (loop.name, loop.started) == ("mine", True)
    loop.anything = 1
    assert weakref.ref(loop)() is loop
    assert repr(loop).startswith("<Sub idle")


def test_constants():
    assert IOLoop.NONE == 0
    assert (IOLoop.READ, IOLoop.WRITE) == (select.EPOLLIN, select.EPOLLOUT)
    assert IOLoop.ERROR == select.EPOLLERR | select.EPOLLHUP
    for name in "IN PRI OUT ERR HUP RDHUP ONESHOT ET".split():
        wanted = getattr(select, f"EPOLL{name}") & 0xFFFFFFFF
        assert getattr(IOLoop, f"_EPOLL{name}") == wanted
