"""The loop against a small reference model, by random programs (hypothesis).

A program is a list of actions; callbacks, timeouts and handlers run programs, so
whatever can be done in one place is done in all others.  The same programs run on
an IOLoop, with a scripted poller and a fake clock, and on the model, which is as
plain as it can be; what happened must be the same.
"""

import errno
import os

import pytest
from fakes import ERROR, NONE, READ, WRITE, Exit, FakeClock, ScriptedPoller, ScriptEnded

import ioloop

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

EXAMPLES = int(os.environ.get("IOLOOP_TEST_EXAMPLES", "200"))
SLOTS = range(3)


class Interpreter:
    """Runs programs; what the actions do is up to the world."""

    def __init__(self):
        self.log = []
        self.handles = []

    def run(self, name, program, *args):
        self.log.append((name, *args))
        for i, (action, *operands) in enumerate(program):
            getattr(self, action)(f"{name}.{i}", *operands)

    def fail(self, name, error):
        raise OSError(errno.EPIPE, "EPIPE") if error is BrokenPipeError else error(name)


class File:
    """A descriptor that is open, and never polled for real."""

    def __init__(self):
        self.reader, self.writer = os.pipe()

    def fileno(self):
        return self.reader

    def close(self):
        os.close(self.reader)
        os.close(self.writer)


class Real(Interpreter):
    """The loop itself."""

    def __init__(self):
        super().__init__()
        self.files = [File() for _ in SLOTS]
        self.clock = FakeClock(0.0)
        self.poller = ScriptedPoller(clock=self.clock)
        self.loop = ioloop.IOLoop(impl=self.poller, time_func=self.clock)
        self.loop.handle_callback_exception = lambda callback: self.log.append("hook")

    def callback(self, name, program):
        self.loop.add_callback(self.run, name, program)

    def timeout(self, name, delay, program):
        handle = self.loop.call_later(delay, self.run, name, program)
        self.handles.append(handle)

    def cancel(self, name, n):
        if self.handles:
            self.handles[n % len(self.handles)].cancel()

    def add(self, name, slot, events, program):
        def handler(file, events):
            self.run(name, program, self.files.index(file), events)

        self.loop.add_handler(self.files[slot], handler, events)

    def update(self, name, slot, events):
        self.loop.update_handler(self.files[slot], events)

    def remove(self, name, slot):
        self.loop.remove_handler(self.files[slot])

    def stop(self, name):
        self.loop.stop()

    def advance(self, name, seconds):
        self.clock.advance(seconds)

    def events(self, batch):
        watched = self.poller.registered
        events = [(self.files[slot].fileno(), mask) for slot, mask in batch]
        self.poller.batches.append(lambda: [e for e in events if e[0] in watched])

    def start(self):
        self.loop.start()

    def turn(self):
        self.loop.run_once(0)

    def state(self):
        stats = self.loop.stats()
        pending = ("pending_callbacks", "pending_timeouts", "handlers")
        return (
            self.log,
            [stats[key] for key in pending],
            [handle.callback is not None for handle in self.handles],
            self.poller.polls,
            self.clock.now,
            self.loop.running(),
        )

    def close(self):
        self.loop.close()
        for file in self.files:
            file.close()


class Model(Interpreter):
    """A loop as simple as can be, which does what the documentation says."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.callbacks = []
        self.timeouts = []
        self.handlers = {}
        self.batches = []
        self.kept = []
        self.polls = []
        self.stopping = False
        self.added = 0

    def callback(self, name, program):
        self.callbacks.append((name, program))

    def timeout(self, name, delay, program):
        self.added += 1
        timeout = (self.now + delay, self.added, name, program)
        self.timeouts.append(timeout)
        self.handles.append(timeout)

    def cancel(self, name, n):
        if self.handles:
            timeout = self.handles[n % len(self.handles)]
            if timeout in self.timeouts:
                self.timeouts.remove(timeout)

    def add(self, name, fd, events, program):
        if fd in self.handlers:
            raise FileExistsError
        self.handlers[fd] = [events, name, program]

    def update(self, name, fd, events):
        if fd not in self.handlers:
            raise FileNotFoundError
        self.handlers[fd][0] = events

    def remove(self, name, fd):
        self.handlers.pop(fd, None)

    def stop(self, name):
        self.stopping = True

    def advance(self, name, seconds):
        self.now += seconds

    def events(self, batch):
        self.batches.append(batch)

    def call(self, name, program, *args):
        try:
            self.run(name, program, *args)
        except Exception:
            self.log.append("hook")

    def iterate(self, limit=None):
        for _ in range(len(self.callbacks)):
            self.call(*self.callbacks.pop(0))
        now = self.now
        for timeout in sorted(self.timeouts, key=lambda timeout: timeout[:2]):
            if timeout[0] <= now and timeout in self.timeouts:
                self.timeouts.remove(timeout)
                self.call(*timeout[2:])
        if self.stopping:
            return False
        self.deliver(self.kept or self.poll(limit))
        return True

    def poll(self, limit):
        waits = [limit] if limit is not None else []
        waits += [max(0, timeout[0] - self.now) for timeout in self.timeouts]
        wait = 0 if self.callbacks else min(waits, default=-1)
        self.polls.append(wait)
        if self.batches:
            watched = {fd: h for fd, h in self.handlers.items() if h[0]}
            batch = self.batches.pop(0)
            return [(fd, mask, watched[fd]) for fd, mask in batch if fd in watched]
        if wait < 0:
            raise ScriptEnded
        self.now += wait
        return []

    def deliver(self, events):
        self.kept = list(events)
        while self.kept:
            fd, mask, handler = self.kept.pop(0)
            if self.handlers.get(fd) is handler:
                mask &= handler[0] | ERROR
                if handler[0] and mask:
                    self.call(*handler[1:], fd, mask)

    def start(self):
        try:
            going = not self.stopping
            while going:
                going = self.iterate()
        finally:
            self.stopping = False

    def turn(self):
        if not self.iterate(0):
            self.stopping = False

    def state(self):
        return (
            self.log,
            [len(self.callbacks), len(self.timeouts), len(self.handlers)],
            [handle in self.timeouts for handle in self.handles],
            self.polls,
            self.now,
            False,
        )


slots = st.sampled_from(SLOTS)
masks = st.sampled_from([NONE, READ, WRITE, READ | WRITE])
delays = st.sampled_from([-5, -1, 0, 0, 1, 1, 2, 7])
errors = st.sampled_from([ValueError, BrokenPipeError, Exit, KeyboardInterrupt])
programs = st.deferred(lambda: st.lists(actions, max_size=3))
actions = st.one_of(
    st.tuples(st.just("stop")),
    st.tuples(st.just("fail"), errors),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("advance"), st.integers(0, 3)),
    st.tuples(st.just("remove"), slots),
    st.tuples(st.just("update"), slots, masks),
    st.tuples(st.just("add"), slots, masks, programs),
    st.tuples(st.just("callback"), programs),
    st.tuples(st.just("timeout"), delays, programs),
)
batches = st.lists(
    st.tuples(slots, st.sampled_from([READ, WRITE, READ | WRITE, ERROR, READ | ERROR])),
    unique_by=lambda event: event[0],
    max_size=3,
)


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.real, self.model = Real(), Model()

    def both(self, method, *args):
        """Do it in both worlds; they must end in the same way."""
        ends = []
        for world in (self.real, self.model):
            try:
                getattr(world, method)(*args)
            except BaseException as error:
                if isinstance(error, AssertionError):
                    raise
                ends.append(type(error))
            else:
                ends.append(None)
        assert ends[0] == ends[1], ends

    @rule(program=st.lists(actions, min_size=1, max_size=5))
    def act(self, program):
        """Outside of the loop; an exception ends the program."""
        self.both("run", "main", program)

    @rule(batch=batches)
    def ready(self, batch):
        self.both("events", batch)

    @rule()
    def start(self):
        self.both("start")

    @rule()
    def turn(self):
        self.both("turn")

    @invariant()
    def same(self):
        assert self.real.state() == self.model.state()
        ioloop._verify(self.real.loop)

    def teardown(self):
        self.real.close()


# It looks for who holds its random numbers, and finds nobody: gc.get_referrers() leaves
# out what the fixture `frozen` has frozen.
@pytest.mark.filterwarnings(
    "ignore:It looks like `register_random`:hypothesis.errors.HypothesisWarning"
)
def test_loop_and_model_agree():
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=25,
            derandomize=EXAMPLES == 200,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
