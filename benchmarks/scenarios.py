"""The scenarios, each written once for all loops, and the table of cases.

A scenario takes an adapter (see loops.py) and its parameters and answers a dict
of figures.  floor.c and door.pyx hold the same scenarios, under the same names
and with the same parameters, in C and for C-level handlers.  What only programs of
asyncio's do is in asyncio_scenarios.py.
"""

import contextvars
import gc
import json
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks import targets
from benchmarks.loops import LOOPS, PEERS, READ, WRITE, installed, nothing

clock = time.perf_counter_ns

# Where build.py has put the compiled parts.
TOOLS = Path(os.environ.get("BENCHMARKS_TOOLS", ""))
LOAD = [TOOLS / "load"]

# The server and its load have a core each, where there are two.
SERVER_CORE, LOAD_CORE = (pick(os.sched_getaffinity(0)) for pick in (min, max))


class Stopwatch:
    """Wall time and the process's user CPU time since it was made, in ns."""

    def __init__(self):
        self.user = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        self.wall = clock()

    def per(self, count):
        wall = clock() - self.wall
        user = resource.getrusage(resource.RUSAGE_SELF).ru_utime - self.user
        return {"wall": wall / count, "user": user * 1e9 / count}


def resident():
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def spread(count, shortest, longest):
    """The same delays, in seconds, for every loop."""
    chance = random.Random(count)
    return [chance.uniform(shortest, longest) for _ in range(count)]


def shuffled(items):
    items = list(items)
    random.Random(len(items)).shuffle(items)
    return items


# -- callbacks ---------------------------------------------------------------------


def chain(loop, count):
    """A callback that adds itself again, `count` times."""
    call, left = loop.call, count

    def step():
        nonlocal left
        left -= 1
        if left:
            call(step)
        else:
            loop.stop()

    call(step)
    watch = Stopwatch()
    loop.run()
    return watch.per(count)


def batch(loop, count):
    """`count` callbacks are added, then run."""
    call = loop.call
    watch = Stopwatch()
    for _ in range(count):
        call(nothing)
    call(loop.stop)
    loop.run()
    return watch.per(count)


def crossthread(loop, count):
    """Another thread hands `count` callbacks to a running loop."""
    call = loop.call_from_thread

    def hand_over():
        for _ in range(count):
            call(nothing)
        call(loop.stop)

    thread = threading.Thread(target=hand_over)
    watch = Stopwatch()
    loop.call(thread.start)
    loop.run()
    figures = watch.per(count)
    thread.join()
    return figures


def pingpong(loop, count):
    """Two loops in two threads hand one callback to and fro: sleep, wake, sleep."""
    other, ready, left = None, threading.Event(), count

    def serve():
        nonlocal other
        other = type(loop)()
        other.call(ready.set)
        other.run()
        other.close()

    def ping():
        nonlocal left
        left -= 1
        other.call_from_thread(pong if left else other.stop)
        if not left:
            loop.stop()

    def pong():
        loop.call_from_thread(ping)

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait()
    loop.call(ping)
    watch = Stopwatch()
    loop.run()
    figures = watch.per(count)
    thread.join()
    return figures


# -- timers ------------------------------------------------------------------------


def timers_cancel(loop, count):
    """`count` timers are set, then cancelled in another order; one pass follows."""
    later, cancel = loop.later, loop.cancel
    delays, order = spread(count, 60, 600), shuffled(range(count))
    watch = Stopwatch()
    timers = [later(delay, nothing) for delay in delays]
    for index in order:
        cancel(timers[index])
    loop.call(loop.stop)
    loop.run()
    return watch.per(count)


def timers_fire(loop, count):
    """`count` timers are set and fire; all are due by the time the last is set."""
    later, left = loop.later, count
    delays = spread(count, 0, 1e-3)

    def fire():
        nonlocal left
        left -= 1
        if not left:
            loop.stop()

    watch = Stopwatch()
    for delay in delays:
        later(delay, fire)
    loop.run()
    return watch.per(count)


def rearm(loop, live, count):
    """`live` idle timeouts; each event cancels one and sets it anew, 100 a pass."""
    call, later, cancel = loop.call, loop.later, loop.cancel
    timers = [later(delay, nothing) for delay in spread(live, 30, 60)]
    order = shuffled(range(live)) * (count // live + 1)
    done = 0

    def activity():
        nonlocal done
        for index in order[done : done + 100]:
            cancel(timers[index])
            timers[index] = later(60, nothing)
        done += 100
        if done < count:
            call(activity)
        else:
            loop.stop()

    call(activity)
    watch = Stopwatch()
    loop.run()
    return watch.per(count)


def million(loop, count):
    """`count` live timers: the time to set and to cancel one, and its memory."""
    later, cancel = loop.later, loop.cancel
    delays, order = spread(count, 60, 6000), shuffled(range(count))
    timers = [None] * count
    before = resident()
    start = clock()
    for index, delay in enumerate(delays):
        timers[index] = later(delay, nothing)
    added = clock()
    memory = resident() - before
    restart = clock()
    for index in order:
        cancel(timers[index])
    loop.call(loop.stop)
    loop.run()
    return {
        "add": (added - start) / count,
        "cancel": (clock() - restart) / count,
        "memory": memory / count,
    }


def lateness(loop, count):
    """One timer at a time, 0.1 to 20 ms ahead: by how much is it late?"""
    late = []
    delays = iter(spread(count, 0.1e-3, 20e-3))
    due = 0

    def fire():
        late.append(clock() - due)
        arm()

    def arm():
        nonlocal due
        delay = next(delays, None)
        if delay is None:
            loop.stop()
        else:
            due = clock() + int(delay * 1e9)
            loop.later(delay, fire)

    loop.call(arm)
    loop.run()
    return summary_of(late)


def summary_of(late):
    late.sort()
    return {
        "least": late[0] / 1e3,
        "p50": late[len(late) // 2] / 1e3,
        "p99": late[len(late) * 99 // 100] / 1e3,
    }


# -- fds ---------------------------------------------------------------------------


def ring(loop, pairs, active, count):
    """libevent's: `active` bytes travel round a ring of `pairs` socketpairs."""
    ends = [socket.socketpair() for _ in range(pairs)]
    for pair in ends:
        for end in pair:
            end.setblocking(False)
    fds = [(reader.fileno(), writer.fileno()) for reader, writer in ends]
    following = {fd: fds[(i + 1) % pairs][1] for i, (fd, _) in enumerate(fds)}
    read, write = os.read, os.write
    to_write, to_read = count - active, count

    def ready(fd, events):
        nonlocal to_write, to_read
        read(fd, 1)
        if to_write:
            to_write -= 1
            write(following[fd], b"e")
        to_read -= 1
        if not to_read:
            loop.stop()

    for reader, _ in fds:
        loop.watch(reader, ready)
    loop.call(loop.stop)
    loop.run()
    for index in range(active):
        write(fds[index * pairs // active][1], b"e")
    watch = Stopwatch()
    loop.run()
    return watch.per(count)


def churn(loop, fds, count):
    """`fds` pipes are registered, modified and unregistered, a poll after each."""
    # The read end of a pipe is never ready to be written: no event disturbs.
    pipes = [os.pipe() for _ in range(fds)]
    readers = [reader for reader, _ in pipes]
    left = count // fds

    def register():
        for fd in readers:
            loop.watch(fd, nothing)
        loop.later(0, modify)

    def modify():
        for fd in readers:
            loop.rewatch(fd, READ | WRITE)
        loop.later(0, unregister)

    def unregister():
        nonlocal left
        for fd in readers:
            loop.unwatch(fd)
        left -= 1
        if left:
            loop.later(0, register)
        else:
            loop.stop()

    loop.call(register)
    watch = Stopwatch()
    loop.run()
    return watch.per(count // fds * fds)


def echo(loop, load=LOAD, **parameters):
    """TCP echo; load.c, on the other core, counts."""
    return echo_with(
        loop.serve_echo,
        loop.call_from_thread,
        loop.run,
        loop.stop,
        load,
        **parameters,
    )


def echo_with(serve, call_from_thread, run, stop, load, size, connections, seconds):
    figures = {}

    def drive():
        try:
            figures.update(
                run_load(load, port, os.getpid(), size, connections, seconds)
            )
        finally:
            call_from_thread(stop)

    for thread in os.listdir("/proc/self/task"):  # some loops have several
        os.sched_setaffinity(int(thread), {SERVER_CORE})
    listener = socket.create_server(("127.0.0.1", 0), backlog=connections)
    port = listener.getsockname()[1]
    serve(listener)
    thread = threading.Thread(target=drive)
    call_from_thread(thread.start)
    run()
    thread.join()
    if not figures:
        raise RuntimeError("the load failed")
    return figures


def run_load(load, port, pid, size, connections, seconds):
    arguments = [*load, LOAD_CORE, port, pid, size, connections, seconds]
    answer = subprocess.run(
        [str(argument) for argument in arguments],
        stdout=subprocess.PIPE,
        timeout=60 + 10 * seconds,
        check=True,
    )
    return json.loads(answer.stdout)


# -- two loops at once -------------------------------------------------------------


def threads(loop, work, rounds, **parameters):
    """Another scenario on one loop, then on two in threads of their own.

    `gain` is how much more is done in the same time: 2 is all that two cores can give.
    """

    def elapsed(count):
        barrier = threading.Barrier(count + 1)

        def run():
            # Made here: an object is used fastest in the thread that made it.
            own = type(loop)()
            barrier.wait()
            work(own, **parameters)
            barrier.wait()
            own.close()

        threads = [threading.Thread(target=run) for _ in range(count)]
        for thread in threads:
            thread.start()
        barrier.wait()
        start = clock()
        barrier.wait()
        taken = clock() - start
        for thread in threads:
            thread.join()
        return taken / count / parameters["count"]

    # One and two alternate, so that a disturbance hits both alike.
    times = [(elapsed(1), elapsed(2)) for _ in range(rounds)]
    one, two = map(median, zip(*times, strict=True))
    return {"one": one, "two": two, "gain": median(a / b for a, b in times)}


# -- what it costs to have it ------------------------------------------------------


def idle(loop, seconds):
    """CPU time and wake-ups of a loop that has nothing to do."""
    reader, _ = os.pipe()
    loop.watch(reader, nothing)
    loop.later(seconds, loop.stop)
    before = resource.getrusage(resource.RUSAGE_SELF)
    loop.run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu * 1e6, "wakeups": after.ru_nvcsw - before.ru_nvcsw}


def importing(loop):
    """A fresh interpreter imports the loop's module."""
    program = (
        "import sys, time; start = time.perf_counter_ns();"
        f"import {loop.module};"
        "print(time.perf_counter_ns() - start, int('asyncio' in sys.modules))"
    )
    times = []
    for _ in range(5):
        answer = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, check=True
        )
        elapsed, asyncio = map(int, answer.stdout.split())
        times.append(elapsed)
    return {"time": sorted(times)[2] / 1e6, "asyncio": asyncio}


def footprint(loop, count, handlers):
    """Bytes of memory per handler, timer and queued callback, contexts included."""
    pairs = [socket.socketpair() for _ in range(handlers // 2)]
    fds = [end.fileno() for pair in pairs for end in pair]
    kept = [None] * count
    delays = spread(count, 60, 600)

    before = resident()
    for fd in fds:
        loop.watch(fd, nothing)
    handler = (resident() - before) / len(fds)

    before = resident()
    for index, delay in enumerate(delays):
        kept[index] = loop.later(delay, nothing)
    timer = (resident() - before) / count

    before = resident()
    for _ in range(count):
        loop.call(nothing)
    callback = (resident() - before) / count

    return {"handler": handler, "timer": timer, "callback": callback}


def extras(loop, count):
    """ioloop's own: what context capture, the watchdog and stats() cost."""

    def best(work, repeat=7):
        return min(work() for _ in range(repeat))

    def through_context():
        start = clock()
        for _ in range(count):
            contextvars.copy_context().run(nothing)
        return (clock() - start) / count

    def directly():
        start = clock()
        for _ in range(count):
            nothing()
        return (clock() - start) / count

    def stats():
        answer = loop.loop.stats
        start = clock()
        for _ in range(count):
            answer()
        return (clock() - start) / count

    # On and off alternate, so that a disturbance hits both alike.
    off, on = [], []
    for _ in range(9):
        off.append(chain(loop, count)["wall"])
        loop.loop.set_blocking_log_threshold(1.0)
        on.append(chain(loop, count)["wall"])
        loop.loop.set_blocking_log_threshold(None)

    return {
        "context": best(through_context) - best(directly),
        "watchdog": (min(on) / min(off) - 1) * 100,
        "stats": best(stats),
    }


# -- the cases ---------------------------------------------------------------------


@dataclass
class Row:
    """One figure of a case: one line of the table."""

    figure: str
    unit: str
    targets: tuple = ()


@dataclass
class Case:
    name: str
    run: object
    parameters: dict
    quick: dict
    rows: list
    rounds: int = 0  # 0: as the command line says
    adapters: dict = field(default_factory=lambda: LOOPS)
    peers: list = field(default_factory=lambda: PEERS)
    warm_up: bool = True
    charted: str = ""

    def applies_to(self, peer):
        return peer in self.peers and installed(peer)


ALL_PYTHON = [*LOOPS]
FASTEST = (targets.Fastest(1.3), targets.Seed(5))
KERNEL = (targets.Floor(1.15), targets.DoorFloor(1.05))
LEAST = (targets.Least(),)
TIMERS = (*FASTEST, targets.DoorFloor(1.05))
HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
GAIN = () if HAS_GIL else (targets.AtLeast(1.9),)


def ring_case(pairs, active):
    return Case(
        f"ring {pairs}/{active}",
        ring,
        {"pairs": pairs, "active": active, "count": 200_000},
        {"pairs": 20, "active": min(active, 10), "count": 2_000},
        [Row("wall", "ns", KERNEL), Row("user", "ns", LEAST)],
        charted="wall",
    )


def echo_case(size, connections):
    return Case(
        f"echo {size // 1024}K x{connections}",
        echo,
        {"size": size, "connections": connections, "seconds": 1.5},
        {"size": size, "connections": min(connections, 20), "seconds": 0.1},
        [
            Row("wall", "us", KERNEL),
            Row("rate", "1/s"),
            Row("p99", "us"),
            Row("cpu", "us"),
            Row("user", "us", LEAST),
            Row("system", "us"),
        ],
        warm_up=False,  # the load does
        charted="user" if (size, connections) == (1024, 100) else "",
    )


def threads_case(work, parameters, quick):
    return Case(
        f"threads {work.__name__}",
        threads,
        {"work": work, "rounds": 5, **parameters},
        {"work": work, "rounds": 1, **quick},
        [Row("one", "ns"), Row("two", "ns"), Row("gain", "x", GAIN)],
        rounds=1,  # it has rounds of its own
        peers=ALL_PYTHON,
    )


CASES = [
    Case(
        "chain",
        chain,
        {"count": 200_000},
        {"count": 2_000},
        [Row("wall", "ns", FASTEST)],
        charted="wall",
    ),
    Case(
        "batch",
        batch,
        {"count": 200_000},
        {"count": 2_000},
        [Row("wall", "ns", FASTEST)],
        charted="wall",
    ),
    Case(
        "timers_cancel",
        timers_cancel,
        {"count": 100_000},
        {"count": 2_000},
        [Row("wall", "ns", TIMERS)],
        charted="wall",
    ),
    Case(
        "timers_fire",
        timers_fire,
        {"count": 100_000},
        {"count": 2_000},
        [Row("wall", "ns", TIMERS)],
        charted="wall",
    ),
    Case(
        "rearm",
        rearm,
        {"live": 10_000, "count": 200_000},
        {"live": 100, "count": 2_000},
        [Row("wall", "ns", TIMERS)],
        charted="wall",
    ),
    Case(
        "million",
        million,
        {"count": 1_000_000},
        {"count": 5_000},
        [Row("add", "ns"), Row("cancel", "ns"), Row("memory", "B")],
        rounds=1,
    ),
    ring_case(100, 1),
    ring_case(1000, 100),
    ring_case(5000, 1000),
    Case(
        "churn",
        churn,
        {"fds": 100, "count": 50_000},
        {"fds": 10, "count": 500},
        [Row("wall", "ns")],
    ),
    Case(
        "crossthread",
        crossthread,
        {"count": 100_000},
        {"count": 2_000},
        [Row("wall", "ns", FASTEST)],
        charted="wall",
    ),
    Case(
        "pingpong",
        pingpong,
        {"count": 20_000},
        {"count": 200},
        [Row("wall", "ns")],
    ),
    threads_case(chain, {"count": 300_000}, {"count": 2_000}),
    threads_case(timers_fire, {"count": 100_000}, {"count": 2_000}),
    threads_case(
        ring,
        {"pairs": 100, "active": 10, "count": 100_000},
        {"pairs": 20, "active": 10, "count": 2_000},
    ),
    *(
        echo_case(size, connections)
        for size in (1024, 10240, 102400)
        for connections in (10, 100, 1000)
    ),
    Case(
        "lateness",
        lateness,
        {"count": 300},
        {"count": 10},
        [
            Row("least", "us", (targets.AtLeast(0),)),
            Row("p50", "us", (targets.Below(80),)),
            Row("p99", "us", (targets.Below(300),)),
        ],
        charted="p50",
    ),
    Case(
        "idle",
        idle,
        {"seconds": 10},
        {"seconds": 0.2},
        [Row("cpu", "us"), Row("wakeups", "")],
        rounds=1,
        warm_up=False,
        peers=[*ALL_PYTHON, "C"],
    ),
    Case(
        "import",
        importing,
        {},
        {},
        [
            Row("time", "ms", (targets.Below(3),)),
            Row("asyncio", "", (targets.Below(1),)),
        ],
        peers=ALL_PYTHON,
    ),
    Case(
        "footprint",
        footprint,
        {"count": 200_000, "handlers": 10_000},
        {"count": 5_000, "handlers": 100},
        [
            Row("handler", "B"),
            Row("timer", "B", (targets.Below(100),)),
            Row("callback", "B"),
        ],
        rounds=1,
        peers=ALL_PYTHON,
    ),
    Case(
        "extras",
        extras,
        {"count": 100_000},
        {"count": 1_000},
        [
            Row("context", "ns"),
            Row("watchdog", "%", (targets.Below(2),)),
            Row("stats", "ns"),
        ],
        peers=["ioloop"],
    ),
]
