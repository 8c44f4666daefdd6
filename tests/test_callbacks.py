"""What the loop calls: order, batches, contexts, arguments, return values.

Callbacks above all; test_timeouts.py has what is special to timeouts.
"""

import contextlib
import contextvars
import functools
import gc
import itertools
import math
import sys
import time

import pytest
from fakes import READ, Exit, Recorder, context_with, fail, turn
from kernel import pair, readable

ADDERS = ["add_callback", "add_callback_from_signal", "spawn_callback"]
# Methods that add a timeout, and the name of its time.
TIMERS = {"add_timeout": "deadline", "call_later": "delay", "call_at": "when"}
var = contextvars.ContextVar("var", default="unset")


@pytest.fixture(params=ADDERS)
def add(loop, request):
    """Each method that queues a callback."""
    return getattr(loop, request.param)


@pytest.fixture(params=[*ADDERS, *TIMERS])
def put(loop, request):
    """Each method that has a function called in the next iteration."""
    # Equal deadlines: on a clock that goes on, others would not be.
    when = [-math.inf] if request.param in TIMERS else []
    return functools.partial(getattr(loop, request.param), *when)


# -- Order and batches ---------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1000, 20_000])
def test_order_of_adding(loop, put, count):
    log = []
    for i in range(count):
        put(log.append, i)
    turn(loop)
    assert log == list(range(count))
    assert loop.stats()["callbacks"] + loop.stats()["timeouts"] == count


def test_added_by_a_callback_waits_for_the_next_iteration(loop, add):
    log = []

    def first():
        log.append("first")
        add(log.append, "third")

    add(first)
    add(log.append, "second")
    turn(loop)
    assert log == ["first", "second"]
    turn(loop)
    assert log == ["first", "second", "third"]


def test_added_by_a_timeout_or_a_handler_waits_for_the_next_iteration(loop):
    log = []
    with readable() as (a, _):
        loop.add_handler(a, lambda *_: loop.add_callback(log.append, "h"), READ)
        loop.call_later(0, lambda: loop.add_callback(log.append, "t"))
        loop.run_once(0)
        assert log == []
        loop.remove_handler(a)
        loop.run_once(0)
    assert log == ["t"] or log == ["t", "h"]


def test_order_is_kept_while_the_queue_grows(loop):
    """The ring is made larger when its ends are anywhere."""
    log, expected = [], []
    n = 0
    for size in (10, 60, 30, 100, 5, 300, 700):
        for _ in range(size):
            loop.add_callback(log.append, n)
            expected.append(n)
            n += 1
        loop.add_callback(lambda: [loop.add_callback(log.append, "x")] * 2)
        expected.append("x")
        turn(loop, 2)
    assert log == expected


@pytest.mark.row("D13")
def test_a_callback_that_queues_itself_does_not_starve_io_or_timeouts(loop):
    calls, rounds = Recorder(), 0

    def again():
        nonlocal rounds
        rounds += 1
        if len(calls) < 3 or not fired:
            loop.add_callback(again)
        else:
            loop.stop()

    fired = []
    with readable() as (a, _):
        loop.add_handler(a, calls, READ)
        loop.call_later(0, fired.append, True)
        loop.add_callback(again)
        loop.start()
    # Served within the bound that the module documents: 64 callbacks to a poll.
    assert rounds <= 64 * 4


@pytest.mark.parametrize("width", [1, 10, 64, 1000])
def test_polled_once_in_64_callbacks(loop, width):
    """However long the chain of callbacks is, and in every pass of many."""
    passes = 640 // width or 5

    def again(left):
        if left:
            loop.add_callback(again, left - 1)

    for _ in range(width):
        loop.add_callback(again, passes)
    before = loop.stats()["polls"]
    for _ in range(passes):
        loop.run_once()
    # The last callbacks of a pass may be those that make up the number.
    assert loop.stats()["polls"] - before >= min(passes, 9)


# -- Arguments and contexts ----------------------------------------------------


def test_arguments(loop, put):
    log = []

    def note(*args, **kwargs):
        log.append((args, kwargs))

    for args, kwargs in [
        ((), {}),
        ((1,), {}),
        ((1, "two", None), {}),
        ((), {"a": 1}),
        ((1, 2), {"callback": 3, "self": 4, "args": 5, "kwargs": 6}),
    ]:
        put(note, *args, **kwargs)
        turn(loop)
        assert log.pop() == (args, kwargs)


@pytest.mark.row("D21")
def test_arguments_are_not_shared(loop, put):
    """What the caller or one call does to its dict is nobody else's business."""
    seen = []

    def spoil(**kwargs):
        seen.append(dict(kwargs))
        kwargs.clear()

    options = {"a": 1}
    put(spoil, **options)
    put(spoil, **options)
    options["b"] = 2
    turn(loop)
    assert seen == [{"a": 1}, {"a": 1}]


def test_what_is_not_callable_is_refused_at_the_call(loop, put):
    for callback in (None, 0, "name", object(), [], ()):
        with pytest.raises(TypeError):
            put(callback)
    assert loop.stats()["pending_callbacks"] == 0
    assert loop.stats()["pending_timeouts"] == 0


def test_a_callback_is_required(loop, put):
    for kwargs in ({}, {"a": 1}):
        with pytest.raises(TypeError, match="callback"):
            put(**kwargs)


def test_a_callback_by_keyword(loop, put):
    log = []

    def note(**kwargs):
        log.append(kwargs)

    put(callback=note)
    put(callback=note, a=1)
    put(note, callback=3)
    turn(loop)
    assert log == [{}, {"a": 1}, {"callback": 3}]


@pytest.mark.parametrize("name", [*ADDERS, *TIMERS])
def test_keywords_do_not_reach_an_override_again(make_loop, poller, name):
    """One that calls what it overrides by keyword does not call itself."""
    calls, base = [], poller.module.IOLoop

    def override(self, **kwargs):
        calls.append("override")
        return getattr(base, name)(self, **kwargs)

    loop = make_loop(type("Sub", (base,), {name: override}))
    own = {TIMERS[name]: 0} if name in TIMERS else {}
    getattr(loop, name)(callback=functools.partial(calls.append, "ran"), **own)
    turn(loop)
    assert calls == ["override", "ran"]


class Method:
    def __init__(self):
        self.log = []

    def method(self):
        self.log.append("method")

    def __call__(self):
        self.log.append("call")

    @staticmethod
    def static(log):
        log.append("static")

    @classmethod
    def of_class(cls, log):
        log.append(cls)


def test_kinds_of_callables(loop, put):
    one = Method()
    put(one.method)
    put(one)
    put(one.static, one.log)
    put(Method.of_class, one.log)
    put(functools.partial(one.log.append, "partial"))
    put(one.log.append, "builtin")
    put(Method)
    turn(loop)
    assert one.log == ["method", "call", "static", Method, "partial", "builtin"]


@pytest.mark.row("D20")
@pytest.mark.parametrize("put", [*ADDERS[:2], *TIMERS], indirect=True)
def test_context_of_the_call(loop, put):
    log = []

    def note():
        log.append(var.get())
        var.set("changed")

    for context in (
        context_with(var, "a"),
        context_with(var, "b"),
        contextvars.Context(),
    ):
        context.run(put, note)
        context.run(put, note)
    turn(loop)
    assert log == ["a", "a", "b", "b", "unset", "unset"]
    assert var.get() == "unset"


@pytest.mark.row("D20")
def test_context_of_spawn_callback_is_empty(loop):
    log = []
    context_with(var, "a").run(loop.spawn_callback, lambda: log.append(var.get()))
    turn(loop)
    assert log == ["unset"]


@pytest.mark.row("D20")
def test_no_callback_sees_what_another_set(loop, add):
    """An empty context costs nothing, and is still one's own."""
    log = []

    def note():
        log.append(var.get())
        var.set("leaked")

    def run():
        for _ in range(3):
            add(note)
        turn(loop)

    contextvars.Context().run(run)
    assert log == ["unset"] * 3


@pytest.mark.row("D20")
def test_a_context_that_was_kept_stays_as_it_was(loop):
    kept = []

    def keep():
        kept.append(contextvars.copy_context())
        var.set("mine")
        kept.append(contextvars.copy_context())

    def run():
        loop.add_callback(keep)
        loop.add_callback(var.set, "other")
        turn(loop)

    contextvars.Context().run(run)
    assert [context.get(var) for context in kept] == [None, "mine"]


@pytest.mark.row("D20")
def test_a_token_is_of_the_callback_that_got_it(loop):
    """An empty context that somebody refers to is not used again."""
    tokens = []

    def first():
        token = var.set("one")
        tokens.append(var.set("two"))
        var.reset(token)

    def second():
        with pytest.raises(ValueError):
            var.reset(tokens.pop())
        tokens.append(var.get())

    def run():
        loop.add_callback(first)
        loop.add_callback(second)
        turn(loop)

    contextvars.Context().run(run)
    assert tokens == ["unset"]


@pytest.mark.row("D20")
def test_context_is_left_when_a_callback_raises(loop, expect_log):
    def spoil(error):
        var.set("spoilt")
        raise error

    loop.add_callback(spoil, ValueError)
    loop.add_callback(spoil, Exit)
    with pytest.raises(Exit):
        turn(loop)
    expect_log.take("Exception in callback", ValueError)
    assert var.get() == "unset"


# -- What callbacks return and raise -------------------------------------------


@pytest.mark.row("D23")
def test_return_values_are_ignored(loop, put):
    calls = []
    values = [{}, [], 0, 1, "text", Ellipsis, object(), iter(()), (i for i in ())]
    for value in values:
        put(lambda value=value: calls.append(1) or value)
    turn(loop, 3)
    assert calls == [1] * len(values)


@pytest.mark.row("D1", "D2")
@pytest.mark.parametrize("error", [Exit, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_base_exception_keeps_the_rest_of_the_batch(loop, put, error, first):
    """It leaves start(); what was queued behind it runs in the next one."""
    log = []
    for i in range(3):
        put(fail if i == first else log.append, error if i == first else i)
    with pytest.raises(error):
        loop.start()
    assert log == list(range(first))
    assert not loop.running()
    stats = loop.stats()
    assert stats["pending_callbacks"] + stats["pending_timeouts"] == 2 - first
    loop.add_callback(loop.stop)
    loop.start()
    assert log == [i for i in range(3) if i != first]


def test_exceptions_do_not_stop_the_batch(loop, put, expect_log):
    log = []
    for i in range(5):
        put(log.append, i)
        put(fail, ZeroDivisionError)
    turn(loop)
    assert log == list(range(5))
    for _ in range(5):
        expect_log.take("Exception in callback .*fail", ZeroDivisionError)


# -- Queues and the garbage collector ------------------------------------------


class Finalizer:
    """Calls `function` when it is collected, as a part of a cycle."""

    def __init__(self, function):
        self.function = function
        self.me = self

    def __del__(self):
        self.function()


@pytest.fixture
def eager_gc():
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    yield
    gc.set_threshold(*threshold)


@pytest.mark.row("B8")
def test_garbage_collected_while_the_queue_changes(loop, add, eager_gc):
    """A __del__ that queues a callback may run inside any allocation."""
    log, count = [], 500
    for i in range(count):
        Finalizer(functools.partial(add, log.append, "del"))
        add(log.append, i)
    gc.collect()
    turn(loop, 2)
    assert log.count("del") == count
    assert [i for i in log if i != "del"] == list(range(count))


@pytest.mark.row("B8")
def test_garbage_that_fills_the_queue_while_it_grows(loop):
    """It takes all the room that was to be made: more is needed."""
    log, threshold = [], gc.get_threshold()

    def note():
        log.append(len(log))

    def fill():
        for _ in range(64):
            loop.spawn_callback(note)

    fill()
    gc.collect()
    Finalizer(fill)
    gc.set_threshold(1)
    loop.spawn_callback(note)
    gc.set_threshold(*threshold)
    gc.collect()
    turn(loop)
    assert log == list(range(129))


@pytest.mark.row("D17")
def test_finalizers_that_change_the_loop(loop, eager_gc):
    log = []
    with pair() as (a, _):

        def meddle():
            loop.remove_handler(a)
            loop.add_handler(a, print, READ)
            loop.call_later(0, log.append, 1).cancel()
            loop.call_later(0, log.append, 2)
            loop.add_callback(log.append, 3)

        for _ in range(50):
            loop.add_callback(Finalizer(meddle).__init__, meddle)
            loop.call_later(0, Finalizer(meddle).__init__, meddle)
            turn(loop)
        gc.collect()
        turn(loop, 2)
        assert log.count(2) == log.count(3) == 100
        loop.remove_handler(a)


@pytest.mark.row("D16")
def test_a_callback_that_drops_the_last_reference_to_itself(loop):
    log = []

    class Callback:
        def __call__(self):
            holder.clear()
            gc.collect()
            log.append(self)

    holder = [Callback()]
    loop.call_later(0, holder[0])
    loop.add_callback(holder[0])
    turn(loop)
    assert len(log) == 2


@pytest.mark.row("D11")
def test_recursion_limit_in_a_callback(loop, expect_log):
    def deep():
        deep()

    log = []
    loop.add_callback(deep)
    loop.add_callback(log.append, 1)
    turn(loop)
    assert log == [1]
    expect_log.take("Exception in callback", RecursionError)


def set_lowest_recursion_limit(room):
    for limit in itertools.count(20):
        with contextlib.suppress(RecursionError):
            sys.setrecursionlimit(limit)
            sys.setrecursionlimit(limit + room)
            return


@pytest.mark.row("D11")
@pytest.mark.parametrize("room", range(0, 24, 3))
def test_run_near_the_recursion_limit(loop, expect_log, monkeypatch, room):
    """Whatever fails for want of stack, the loop goes on from there."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    log = []
    loop.add_callback(lambda: log.append(1))
    loop.call_later(0, lambda: log.append(2))
    limit = sys.getrecursionlimit()
    set_lowest_recursion_limit(room)
    try:
        loop.run_once(0)
    except RecursionError:
        pass
    finally:
        sys.setrecursionlimit(limit)
    expect_log.clear()
    turn(loop)
    loop.add_callback(log.append, 3)
    turn(loop)
    assert log[-1] == 3
    assert not loop.running()


# -- stats() -------------------------------------------------------------------


def test_stats(loop):
    assert set(loop.stats()) == {
        *("iterations", "polls", "events", "callbacks", "timeouts"),
        *("pending_callbacks", "pending_timeouts", "handlers"),
        *("asleep", "longest_busy"),
    }
    before = loop.stats()
    assert not any(before.values())
    with readable() as (a, _):
        loop.add_handler(a, Recorder(), READ)
        for _ in range(3):
            loop.add_callback(int)
        loop.call_later(0, int)
        loop.call_later(3600, int)
        waiting = loop.stats()
        assert waiting["pending_callbacks"] == 3
        assert waiting["pending_timeouts"] == 2
        assert waiting["handlers"] == 1
        turn(loop)
        after = loop.stats()
        loop.remove_handler(a)
    assert after["iterations"] == after["polls"] == after["events"] == 1
    assert after["callbacks"] == 3
    assert after["timeouts"] == 1
    assert after["pending_callbacks"] == 0
    assert after["pending_timeouts"] == 1


def test_stats_of_time(loop):
    loop.call_later(0.02, loop.stop)
    loop.start()
    assert 0 < loop.stats()["asleep"] < 30


@pytest.mark.parametrize("run", ["start", "run_once"])
def test_stats_of_the_first_and_last_batch(loop, run):
    """What keeps the loop from ever going to sleep counts as well."""

    def work():
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            pass
        loop.stop()

    loop.add_callback(work)
    getattr(loop, run)()
    assert loop.stats()["longest_busy"] >= 0.01


def test_stats_of_the_longest_busy_time(loop):
    """Between two waits of one run; a shorter one later does not replace it."""
    loop.call_later(0.001, time.sleep, 0.03)
    loop.call_later(0.05, int)
    loop.call_later(0.06, loop.stop)
    loop.start()
    longest = loop.stats()["longest_busy"]
    assert 0.03 <= longest < 30
    time.sleep(longest + 0.05)
    loop.call_later(0.001, loop.stop)
    loop.start()
    assert loop.stats()["longest_busy"] == longest


def test_callbacks_of_one_loop_are_not_those_of_another(make_loop):
    one, two = make_loop(), make_loop()
    log = []
    one.add_callback(log.append, 1)
    two.add_callback(log.append, 2)
    turn(two)
    assert log == [2]
    turn(one)
    assert log == [2, 1]
