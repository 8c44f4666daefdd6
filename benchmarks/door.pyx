# cython: language_level=3, boundscheck=False, wraparound=False
"""The scenarios of scenarios.py with C-level handlers: `cimport ioloop` at work.

No Python object is made per event.  Built by build.py against the installed
ioloop; names, parameters and figures are those of scenarios.py and floor.c.
"""

cimport ioloop

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport close, read, write

import os
import resource
import socket
import threading

from ioloop import IOLoop

from benchmarks import scenarios
cdef int64_t now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec


def run(scenario, load, **parameters):
    loop = IOLoop()
    try:
        return SCENARIOS[scenario](loop, load, **parameters)
    finally:
        loop.close()


# -- callbacks ---------------------------------------------------------------------


cdef int nothing(object loop, void *arg) except -1:
    return 0


cdef int stop(object loop, void *arg) except -1:
    loop.stop()
    return 0


cdef int step(object loop, void *arg) except -1:
    cdef int64_t *left = <int64_t *>arg
    left[0] -= 1
    return ioloop.c_add_callback(loop, step if left[0] else stop, arg)


def chain(loop, load, int64_t count):
    cdef int64_t left = count, start = now()
    ioloop.c_add_callback(loop, step, &left)
    loop.start()
    return {"wall": (now() - start) / count}


def batch(loop, load, int64_t count):
    cdef int64_t start = now()
    for _ in range(count):
        ioloop.c_add_callback(loop, nothing, NULL)
    ioloop.c_add_callback(loop, stop, NULL)
    loop.start()
    return {"wall": (now() - start) / count}


def crossthread(loop, load, int64_t count):
    cdef ioloop.ioloop_door_v1 *door = ioloop.c_door(loop)

    def hand_over():
        cdef int64_t i
        with nogil:
            for i in range(count):
                ioloop.c_post(door, nothing, NULL)
            ioloop.c_post(door, stop, NULL)

    thread = threading.Thread(target=hand_over)
    cdef int64_t start = now()
    loop.add_callback(thread.start)
    loop.start()
    cdef int64_t elapsed = now() - start
    thread.join()
    return {"wall": elapsed / count}


cdef struct Match:
    ioloop.ioloop_door_v1 *here
    ioloop.ioloop_door_v1 *there
    int64_t left


cdef int ping(object loop, void *arg) except -1:
    cdef Match *match = <Match *>arg
    match.left -= 1
    ioloop.c_post(match.there, pong if match.left else stop, match)
    if not match.left:
        loop.stop()
    return 0


cdef int pong(object loop, void *arg) except -1:
    ioloop.c_post((<Match *>arg).here, ping, arg)
    return 0


def pingpong(loop, load, int64_t count):
    other = IOLoop()
    cdef Match match
    match.here, match.there = ioloop.c_door(loop), ioloop.c_door(other)
    match.left = count
    thread = threading.Thread(target=other.start)
    thread.start()
    ioloop.c_add_callback(loop, ping, &match)
    cdef int64_t start = now()
    loop.start()
    cdef int64_t elapsed = now() - start
    thread.join()
    other.close()
    return {"wall": elapsed / count}


# -- timers ------------------------------------------------------------------------


cdef list new_timers(loop, int64_t count):
    return [ioloop.c_new_timer(loop, nothing, NULL, None) for _ in range(count)]


cdef class Delays:
    """The delays of scenarios.py, in nanoseconds."""

    cdef int64_t *ns

    def __cinit__(self, size_t count, double shortest, double longest):
        self.ns = <int64_t *>PyMem_Malloc(count * sizeof(int64_t))
        if self.ns == NULL:
            raise MemoryError
        for i, delay in enumerate(scenarios.spread(count, shortest, longest)):
            self.ns[i] = int(delay * 1e9)

    def __dealloc__(self):
        PyMem_Free(self.ns)


def timers_cancel(loop, load, int64_t count):
    cdef list timers = new_timers(loop, count)
    cdef list others = scenarios.shuffled(timers)
    cdef Delays delays = Delays(count, 60, 600)
    cdef int64_t i, start = now()
    for i in range(count):
        ioloop.c_start_timer(timers[i], delays.ns[i])
    for i in range(count):
        ioloop.c_stop_timer(others[i])
    ioloop.c_add_callback(loop, stop, NULL)
    loop.start()
    return {"wall": (now() - start) / count}


cdef int fire(object loop, void *arg) except -1:
    cdef int64_t *left = <int64_t *>arg
    left[0] -= 1
    if not left[0]:
        loop.stop()
    return 0


def timers_fire(loop, load, int64_t count):
    cdef int64_t left = count
    cdef list timers = [
        ioloop.c_new_timer(loop, fire, &left, None) for _ in range(count)
    ]
    cdef Delays delays = Delays(count, 0, 1e-3)
    cdef int64_t i, start = now()
    for i in range(count):
        ioloop.c_start_timer(timers[i], delays.ns[i])
    loop.start()
    return {"wall": (now() - start) / count}


cdef class Activity:
    cdef list timers
    cdef int64_t live, done, count


cdef int activity(object loop, void *arg) except -1:
    cdef Activity self = <Activity>arg
    for _ in range(100):
        ioloop.c_start_timer(self.timers[self.done % self.live], 60000000000)
        self.done += 1
    return ioloop.c_add_callback(
        loop, activity if self.done < self.count else stop, arg
    )


def rearm(loop, load, int64_t live, int64_t count):
    cdef Delays delays = Delays(live, 30, 60)
    cdef Activity self = Activity()
    self.timers = new_timers(loop, live)
    self.live, self.done, self.count = live, 0, count
    for i in range(live):
        ioloop.c_start_timer(self.timers[i], delays.ns[i])
    self.timers = scenarios.shuffled(self.timers)
    ioloop.c_add_callback(loop, activity, <void *>self)
    cdef int64_t start = now()
    loop.start()
    return {"wall": (now() - start) / count}


def million(loop, load, int64_t count):
    cdef Delays delays = Delays(count, 60, 6000)
    cdef list timers = [None] * count
    cdef list order = scenarios.shuffled(range(count))
    before = scenarios.resident()
    cdef int64_t i, start = now()
    for i in range(count):
        timer = ioloop.c_new_timer(loop, nothing, NULL, None)
        ioloop.c_start_timer(timer, delays.ns[i])
        timers[i] = timer
    cdef int64_t added = now()
    memory = scenarios.resident() - before
    cdef int64_t restart = now()
    for index in order:
        ioloop.c_stop_timer(timers[index])
    ioloop.c_add_callback(loop, stop, NULL)
    loop.start()
    return {
        "add": (added - start) / count,
        "cancel": (now() - restart) / count,
        "memory": memory / count,
    }


cdef class Lateness:
    cdef Delays delays
    cdef list late
    cdef object timer
    cdef int64_t due, count


cdef int was_due(object loop, void *arg) except -1:
    cdef Lateness self = <Lateness>arg
    self.late.append(now() - self.due)
    if len(self.late) == self.count:
        loop.stop()
        return 0
    cdef int64_t delay = self.delays.ns[len(self.late)]
    self.due = now() + delay
    return ioloop.c_start_timer(self.timer, delay)


def lateness(loop, load, int64_t count):
    cdef Lateness self = Lateness()
    self.late = []
    self.count = count
    self.delays = Delays(count, 0.1e-3, 20e-3)
    self.timer = ioloop.c_new_timer(loop, was_due, <void *>self, None)
    self.due = now() + self.delays.ns[0]
    ioloop.c_start_timer(self.timer, self.delays.ns[0])
    loop.start()
    return scenarios.summary_of(self.late)


# -- fds ---------------------------------------------------------------------------


cdef struct Ring:
    int64_t to_write, to_read
    int next[20000]


cdef int pass_on(object loop, int fd, uint32_t events, void *arg) except -1:
    cdef Ring *ring = <Ring *>arg
    cdef char byte
    read(fd, &byte, 1)
    if ring.to_write:
        ring.to_write -= 1
        write(ring.next[fd], b"e", 1)
    ring.to_read -= 1
    if not ring.to_read:
        loop.stop()
    return 0


def ring(loop, load, int pairs, int active, int64_t count):
    cdef Ring *state = <Ring *>malloc(sizeof(Ring))
    if state == NULL:
        raise MemoryError
    ends = [socket.socketpair() for _ in range(pairs)]
    fds = [(reader.fileno(), writer.fileno()) for reader, writer in ends]
    for i, (reader, writer) in enumerate(fds):
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        state.next[<int>reader] = fds[(i + 1) % pairs][1]
        ioloop.c_add_handler(loop, reader, ioloop.IOLOOP_READ, pass_on, state, None)
    state.to_write, state.to_read = count - active, count
    for i in range(active):
        os.write(fds[i * pairs // active][1], b"e")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    cdef int64_t start = now()
    loop.start()
    cdef int64_t elapsed = now() - start
    user = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    for reader, _ in fds:
        ioloop.c_remove_handler(loop, reader)
    free(state)
    return {"wall": elapsed / count, "user": user * 1e9 / count}


cdef class Churn:
    cdef list readers
    cdef int64_t left
    cdef int step
    cdef object timer


cdef int not_ready(object loop, int fd, uint32_t events, void *arg) except -1:
    raise AssertionError("a pipe with nothing in it is ready")


cdef int churn_step(object loop, void *arg) except -1:
    cdef Churn self = <Churn>arg
    cdef int fd
    for fd in self.readers:
        if self.step == 0:
            ioloop.c_add_handler(
                loop, fd, ioloop.IOLOOP_READ, not_ready, NULL, None
            )
        elif self.step == 1:
            ioloop.c_update_handler(
                loop, fd, ioloop.IOLOOP_READ | ioloop.IOLOOP_WRITE
            )
        else:
            ioloop.c_remove_handler(loop, fd)
    self.step = (self.step + 1) % 3
    self.left -= not self.step
    if self.left:
        return ioloop.c_start_timer(self.timer, 0)
    loop.stop()
    return 0


def churn(loop, load, int fds, int64_t count):
    cdef Churn self = Churn()
    self.readers = [os.pipe()[0] for _ in range(fds)]
    self.left = count // fds
    self.timer = ioloop.c_new_timer(loop, churn_step, <void *>self, None)
    ioloop.c_start_timer(self.timer, 0)
    cdef int64_t start = now()
    loop.start()
    return {"wall": (now() - start) / (count // fds * fds)}


cdef enum:
    CHUNK = 131072

cdef char chunk[CHUNK]


cdef class Connection:
    """What the kernel would not take yet; the loop keeps it alive as the owner."""

    cdef size_t begin, end
    cdef char *unsent

    def __dealloc__(self):
        free(self.unsent)

    cdef int keep(self, const char *data, size_t size) except -1:
        if self.unsent == NULL:
            self.unsent = <char *>malloc(CHUNK)
            if self.unsent == NULL:
                raise MemoryError
        memcpy(self.unsent, data, size)
        self.begin, self.end = 0, size
        return 0


cdef int echo_ready(object loop, int fd, uint32_t events, void *arg) except -1:
    cdef Connection self = <Connection>arg
    cdef ssize_t size, sent
    if self.end:
        sent = write(fd, self.unsent + self.begin, self.end - self.begin)
        self.begin += max(sent, 0)
        if self.begin == self.end:
            self.begin = self.end = 0
            ioloop.c_update_handler(loop, fd, ioloop.IOLOOP_READ)
        return 0
    size = read(fd, chunk, CHUNK)
    if size <= 0:
        ioloop.c_remove_handler(loop, fd)
        close(fd)
        return 0
    sent = max(write(fd, chunk, size), 0)
    if sent < size:
        self.keep(chunk + sent, size - sent)
        ioloop.c_update_handler(loop, fd, ioloop.IOLOOP_WRITE)
    return 0


def echo(loop, load, **parameters):
    def accept(listener, events):
        cdef Connection connection
        try:
            while True:
                client, _ = listener.accept()
                client.setblocking(False)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection()
                ioloop.c_add_handler(
                    loop, client.detach(), ioloop.IOLOOP_READ,
                    echo_ready, <void *>connection, connection,
                )
        except BlockingIOError:
            pass

    def serve(listener):
        listener.setblocking(False)
        loop.add_handler(listener, accept, loop.READ)

    return scenarios.echo_with(
        serve, loop.add_callback, loop.start, loop.stop, load, **parameters
    )


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        chain, batch, crossthread, pingpong, timers_cancel, timers_fire, rearm,
        million, lateness, ring, churn, echo,
    )
}
