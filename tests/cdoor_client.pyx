# cython: language_level=3
# cython: freethreading_compatible=True
"""A client of the C API, for test_cdoor.py: all that ioloop.pxd has.

What takes a `function` calls it from a C callback, with the function as `arg`: the
caller keeps it alive, if only as the `owner`.
"""

cimport ioloop
from libc.stdint cimport int64_t, uint32_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    int pthread_create(pthread_t *, void *, void *(*)(void *) noexcept nogil, void *)
    int pthread_join(pthread_t, void **)

cdef extern from "Python.h":
    ctypedef enum PyMemAllocatorDomain:
        PYMEM_DOMAIN_OBJ
    ctypedef struct PyMemAllocatorEx:
        void *ctx
        void *(*malloc)(void *ctx, size_t size) noexcept nogil
        void *(*calloc)(void *ctx, size_t n, size_t size) noexcept nogil
        void *(*realloc)(void *ctx, void *old, size_t size) noexcept nogil
        void (*free)(void *ctx, void *old) noexcept nogil
    void PyMem_GetAllocator(PyMemAllocatorDomain, PyMemAllocatorEx *)
    void PyMem_SetAllocator(PyMemAllocatorDomain, PyMemAllocatorEx *)

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int, void *, size_t)
    ssize_t write(int, const void *, size_t)

CONSTANTS = {
    "NONE": ioloop.IOLOOP_NONE,
    "READ": ioloop.IOLOOP_READ,
    "WRITE": ioloop.IOLOOP_WRITE,
    "ERROR": ioloop.IOLOOP_ERROR,
}


# -- Each function of the pxd, with a Python callable ----------------------------

cdef int call_handler(object loop, int fd, uint32_t events, void *arg) except -1:
    (<object>arg)(loop, fd, events)
    return 0


cdef int call_callback(object loop, void *arg) except -1:
    (<object>arg)(loop)
    return 0


cdef int keep_arg(object loop, int fd, uint32_t events, void *arg) except -1:
    (<int *>arg)[0] += 1
    return 0


def add_handler(loop, int fd, uint32_t events, function, owner):
    ioloop.c_add_handler(loop, fd, events, call_handler, <void *>function, owner)


def update_handler(loop, int fd, uint32_t events):
    ioloop.c_update_handler(loop, fd, events)


def remove_handler(loop, int fd):
    ioloop.c_remove_handler(loop, fd)


def new_timer(loop, function, owner):
    return ioloop.c_new_timer(loop, call_callback, <void *>function, owner)


def start_timer(timer, int64_t delay):
    ioloop.c_start_timer(timer, delay)


def stop_timer(timer):
    ioloop.c_stop_timer(timer)


def add_callback(loop, function):
    ioloop.c_add_callback(loop, call_callback, <void *>function)


def add_nothing(loop, str which):
    """Give a NULL for the function."""
    if which == "handler":
        ioloop.c_add_handler(loop, 0, ioloop.IOLOOP_READ, NULL, NULL, None)
    elif which == "timer":
        ioloop.c_new_timer(loop, NULL, NULL, None)
    else:
        ioloop.c_add_callback(loop, NULL, NULL)


cdef class Door:
    """A door, and the loop that keeps it valid."""

    cdef ioloop.ioloop_door_v1 *door
    cdef object loop

    def __cinit__(self, loop):
        self.loop, self.door = loop, ioloop.c_door(loop)

    def post(self, function):
        """Post without the GIL; 0 or an errno."""
        cdef void *arg = <void *>function
        cdef int error
        with nogil:
            error = ioloop.c_post(self.door, call_callback, arg)
        return error

    def post_nothing(self):
        return ioloop.c_post(self.door, NULL, NULL)


# -- In C from end to end --------------------------------------------------------

cdef class Counter:
    """What C callbacks count, and the loop that they stop at the end."""

    cdef readonly int64_t value
    cdef int64_t goal
    cdef object timer

    def __init__(self, int64_t goal=-1):
        self.goal = goal


cdef int count(object loop, void *arg) except -1:
    cdef Counter counter = <Counter>arg
    counter.value += 1
    if counter.value == counter.goal:
        loop.stop()
    return 0


cdef struct Job:
    ioloop.ioloop_door_v1 *door
    void *counter
    int64_t times
    int error


cdef void *post(void *arg) noexcept nogil:
    cdef Job *job = <Job *>arg
    for _ in range(job.times):
        job.error = job.error or ioloop.c_post(job.door, count, job.counter)
    return NULL


cdef class Posters:
    """Threads that Python knows nothing of, each posting `count` so many times."""

    cdef pthread_t threads[16]
    cdef Job job
    cdef int n
    cdef object owners

    def __init__(self, Door door, Counter counter, int threads, int64_t times):
        self.owners = door, counter
        self.job.door, self.job.counter = door.door, <void *>counter
        self.job.times = times
        for _ in range(threads):
            if pthread_create(&self.threads[self.n], NULL, post, &self.job):
                raise RuntimeError("pthread_create")
            self.n += 1

    def join(self):
        """Wait for them; 0 or an errno."""
        cdef int i
        with nogil:
            for i in range(self.n):
                pthread_join(self.threads[i], NULL)
        return self.job.error


cdef int pass_on(object loop, int fd, uint32_t events, void *arg) except -1:
    cdef char data = 0
    if read(fd, &data, 1) == 1:
        write(fd, &data, 1)
    return count(loop, arg)


def play_handlers(loop, Counter counter, *fds):
    """Each sends back the byte that it gets; the first one begins."""
    for fd in fds:
        ioloop.c_add_handler(
            loop, fd, ioloop.IOLOOP_READ, pass_on, <void *>counter, counter
        )
    write(fds[0], b"x", 1)


cdef int start_again(object loop, void *arg) except -1:
    ioloop.c_start_timer((<Counter>arg).timer, 1000)
    return count(loop, arg)


def play_timer(loop, Counter counter):
    """A timer that arms itself."""
    counter.timer = ioloop.c_new_timer(loop, start_again, <void *>counter, counter)
    ioloop.c_start_timer(counter.timer, 0)
    return counter.timer


cdef int add_again(object loop, void *arg) except -1:
    ioloop.c_add_callback(loop, add_again, arg)
    return count(loop, arg)


def play_callback(loop, Counter counter):
    """A callback that adds itself."""
    ioloop.c_add_callback(loop, add_again, <void *>counter)


cdef class Arg:
    """An int in C, counted up by a handler that gets its address."""

    cdef readonly int value
    cdef object __weakref__

    def handle(self, loop, int fd):
        ioloop.c_add_handler(
            loop, fd, ioloop.IOLOOP_READ, keep_arg, &self.value, self
        )


# -- Objects made ----------------------------------------------------------------

cdef PyMemAllocatorEx real
cdef int64_t allocations = 0


cdef void *counting_malloc(void *ctx, size_t size) noexcept nogil:
    global allocations
    allocations += 1
    return real.malloc(real.ctx, size)


cdef void *counting_calloc(void *ctx, size_t n, size_t size) noexcept nogil:
    global allocations
    allocations += 1
    return real.calloc(real.ctx, n, size)


def allocations_of(function):
    """How often `function()` makes Python allocate memory for an object."""
    global allocations
    cdef PyMemAllocatorEx counting
    PyMem_GetAllocator(PYMEM_DOMAIN_OBJ, &real)
    counting = real
    counting.malloc, counting.calloc = counting_malloc, counting_calloc
    allocations = 0
    PyMem_SetAllocator(PYMEM_DOMAIN_OBJ, &counting)
    try:
        function()
    finally:
        PyMem_SetAllocator(PYMEM_DOMAIN_OBJ, &real)
    return allocations
