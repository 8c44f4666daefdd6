# cython: language_level=3
# cython: annotation_typing=False
# cython: auto_pickle=False
"""A level-triggered event loop for sockets, timers and threads.

This is the IOLoop of Tornado 1.2-2.0, compiled, for today's CPython::

    loop = ioloop.IOLoop.instance()
    server = socket.create_server(("127.0.0.1", 8888))
    server.setblocking(False)
    loop.add_handler(server, lambda sock, events: serve(sock.accept()), loop.READ)
    loop.call_later(60, loop.stop)
    loop.start()

One iteration of the loop has five steps:

1. Run the callbacks that were queued when the iteration began, in order.
2. Sample the clock once and run every timeout that is due.
3. Leave if `stop()` was asked for.
4. Poll: not waiting if callbacks are queued, else until the nearest timeout,
   else for ever.
5. Run the handlers of the file descriptors that are ready.

A step does not run what it adds itself: a callback that adds a callback, or a
timeout a timeout, has it run in the next iteration, so none of the three can
starve the others.

Threads: a loop belongs to the thread that runs it.  `add_callback`,
`add_callback_from_signal`, `spawn_callback`, `add_future`, `stop`, `time`,
`running`, `stats` and `fileno` may be called from any thread; every other
method raises RuntimeError when another thread runs the loop.

Signals: Python's signal handlers run between the steps, in the main thread, at
once, also when the loop sleeps.  They may call `add_callback` and `stop`.  While
the loop runs there, it is the signal wakeup fd, and serves the one before.
"""

# The C modules behind `functools`, `signal`, `threading` and `weakref`: those take
# longer to import than this one, and bring no more.
import os
import sys
from _functools import partial
from _thread import _local
from _weakref import ref
import _signal

cimport cython
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_DECREF
from libc.errno cimport (
    EAGAIN, EBADF, EEXIST, EINTR, EINVAL, ENOENT, ENOMEM, ENOSYS, EPERM, EPIPE, errno)
from libc.limits cimport INT_MAX
from libc.math cimport HUGE_VAL, ceil, floor, isnan
from libc.stdint cimport (
    INT64_MAX, INT64_MIN, UINT64_MAX, int64_t, uint32_t, uint64_t, uintptr_t)
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memset
from posix.fcntl cimport F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, FD_CLOEXEC, fcntl
from posix.select cimport FD_CLR, FD_ISSET, FD_SET, FD_SETSIZE, fd_set, pselect
from posix.signal cimport (
    SIG_UNBLOCK, sigaction, sigaction_t, sigaddset, sigemptyset)
from posix.types cimport sigset_t
from posix.stat cimport S_ISDIR, S_ISREG, fstat, struct_stat
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport close, read, write

# Cython lets a vendored copy have this name too, if nobody has it yet.
if __name__ != "ioloop":
    _twin = sys.modules.get("ioloop")
    if type(_twin) is type(sys) and vars(_twin) is globals():
        del sys.modules["ioloop"]
    del _twin

__version__ = "0.1.0"
__all__ = ["IOLoop", "PeriodicCallback", "TimeoutError"]

TimeoutError = TimeoutError  # as in Tornado: what run_sync() raises


# -- The platform --------------------------------------------------------------
#
# Everything that differs between kernels, C libraries and CPython's APIs.  The
# IOLOOP_HAVE_* are always 0 or 1 and what is missing has an inert stand-in, so
# the code below is plain `if`s that the C compiler resolves.

cdef extern from *:
    r"""
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <time.h>
    #include <unistd.h>

    #ifndef IOLOOP_DEBUG
    #  define IOLOOP_DEBUG 0
    #endif

    /* epoll */
    #if defined(__linux__)
    #  include <sys/epoll.h>
    #  define IOLOOP_HAVE_EPOLL 1
    #  if !defined(__GLIBC__) || !__GLIBC_PREREQ(2, 35)
    #    include <sys/syscall.h>
    #    ifndef SYS_epoll_pwait2
    #      define SYS_epoll_pwait2 441
    #    endif
    #    define ioloop_epoll_wait_ns(ep, events, n, timeout) \
            (int)syscall(SYS_epoll_pwait2, ep, events, n, timeout, NULL, 8)
    #  else
    #    define ioloop_epoll_wait_ns(ep, events, n, timeout) \
            epoll_pwait2(ep, events, n, timeout, NULL)
    #  endif
    #else
    #  define IOLOOP_HAVE_EPOLL 0
    typedef union { void *ptr; int fd; uint32_t u32; uint64_t u64; } epoll_data_t;
    struct epoll_event { uint32_t events; epoll_data_t data; };
    enum { EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL };
    #  define epoll_create1(flags) ((void)(flags), errno = ENOSYS, -1)
    #  define epoll_ctl(ep, op, fd, ev) \
        ((void)(ep), (void)(op), (void)(fd), (void)(ev), errno = ENOSYS, -1)
    #  define epoll_wait(ep, ev, n, ms) \
        ((void)(ep), (void)(ev), (void)(n), (void)(ms), errno = ENOSYS, -1)
    #  define ioloop_epoll_wait_ns(ep, ev, n, ts) \
        ((void)(ep), (void)(ev), (void)(n), (void)(ts), errno = ENOSYS, -1)
    #endif

    /* kqueue; the tests bring a fake one */
    #if defined(IOLOOP_FAKE_KQUEUE)
    #  include "fake_kqueue.h"
    #  define IOLOOP_HAVE_KQUEUE 1
    #elif defined(__APPLE__) || defined(__FreeBSD__) || defined(__NetBSD__) \
        || defined(__OpenBSD__) || defined(__DragonFly__)
    #  include <sys/types.h>
    #  include <sys/event.h>
    #  define IOLOOP_HAVE_KQUEUE 1
    #else
    #  define IOLOOP_HAVE_KQUEUE 0
    struct kevent { uintptr_t ident; short filter; unsigned short flags;
                    unsigned fflags; intptr_t data; void *udata; };
    enum { EVFILT_READ = -1, EVFILT_WRITE = -2, EV_ADD = 1, EV_DELETE = 2,
           EV_ENABLE = 4, EV_DISABLE = 8, EV_ERROR = 0x4000, EV_EOF = 0x8000 };
    #  define kqueue() (errno = ENOSYS, -1)
    #  define kevent(kq, c, nc, e, ne, ts) \
        ((void)(kq), (void)(c), (void)(nc), (void)(e), (void)(ne), (void)(ts), \
         errno = ENOSYS, -1)
    #endif

    /* pipe2 */
    #if defined(__APPLE__)
    static int ioloop_pipe(int fds[2]) {
        if (pipe(fds) < 0)
            return -1;
        for (int i = 0; i < 2; i++) {
            fcntl(fds[i], F_SETFD, FD_CLOEXEC);
            fcntl(fds[i], F_SETFL, O_NONBLOCK);
        }
        return 0;
    }
    #else
    #  define ioloop_pipe(fds) pipe2(fds, O_CLOEXEC | O_NONBLOCK)
    #endif

    /* A clock that is cheap to read and ticks every few milliseconds. */
    #if defined(CLOCK_MONOTONIC_COARSE)
    #  define IOLOOP_CLOCK_COARSE CLOCK_MONOTONIC_COARSE
    #elif defined(CLOCK_MONOTONIC_FAST)
    #  define IOLOOP_CLOCK_COARSE CLOCK_MONOTONIC_FAST
    #else
    #  define IOLOOP_CLOCK_COARSE CLOCK_MONOTONIC
    #endif

    /* Memory shared with threads that do not hold the GIL.  A store followed by a load
       needs a fence between, where another thread does the opposite. */
    #define ioloop_load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
    #define ioloop_store(p, value) __atomic_store_n(p, value, __ATOMIC_RELEASE)
    #define ioloop_swap(p, value) __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST)
    #define ioloop_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)

    /* A list used as an array of references that the garbage collector sees.
       `peek` borrows, `place` moves a reference in over one that moved away,
       `put` replaces a None, `take` leaves a None. */
    #ifdef Py_LIMITED_API
    #  define ioloop_peek(list, i) PyList_GetItem(list, i)
    static inline void ioloop_place(PyObject *list, Py_ssize_t i, PyObject *item) {
        Py_XINCREF(PyList_GetItem(list, i));
        PyList_SetItem(list, i, item);
    }
    #else
    #  define ioloop_peek(list, i) PyList_GET_ITEM(list, i)
    #  define ioloop_place(list, i, item) PyList_SET_ITEM(list, i, item)
    #endif
    static inline void ioloop_put(PyObject *list, Py_ssize_t i, PyObject *item) {
        Py_INCREF(item);
        ioloop_place(list, i, item);
        Py_DECREF(Py_None);
    }
    static inline PyObject *ioloop_take(PyObject *list, Py_ssize_t i) {
        PyObject *item = ioloop_peek(list, i);
        Py_INCREF(Py_None);
        ioloop_place(list, i, Py_None);
        return item;
    }

    /* Contexts: None stands for an empty one, which costs nothing to capture.
       `blank` is the loop's own empty context, good for the next call as long
       as the last one left it empty and kept no reference to it. */
    #ifdef Py_LIMITED_API
    PyAPI_FUNC(PyObject *) PyContext_New(void);
    PyAPI_FUNC(PyObject *) PyContext_CopyCurrent(void);
    PyAPI_FUNC(int) PyContext_Enter(PyObject *);
    PyAPI_FUNC(int) PyContext_Exit(PyObject *);
    #  define ioloop_context_size(context) PyObject_Size(context)
    static PyObject *ioloop_capture(void) {
        PyObject *context = PyContext_CopyCurrent();
        if (context && ioloop_context_size(context) == 0) {
            Py_INCREF(Py_None);
            Py_DECREF(context);
            return Py_None;
        }
        return context;
    }
    #else
    #  define ioloop_context_size(context) \
        Py_TYPE(context)->tp_as_mapping->mp_length(context)
    static inline PyObject *ioloop_capture(void) {
        PyObject *context = PyThreadState_Get()->context;
        if (context == NULL || ioloop_context_size(context) == 0) {
            Py_INCREF(Py_None);
            return Py_None;
        }
        return PyContext_Copy(context);
    }
    #endif
    #define ioloop_is_blank(context) \
        (Py_REFCNT(context) == 1 && ioloop_context_size(context) == 0)

    /* Calls.  `args` is a tuple, `kwargs` a dict or None. */
    #define ioloop_call_with(function, args, kwargs) \
        PyObject_Call(function, args, (kwargs) == Py_None ? NULL : (kwargs))
    #ifdef Py_LIMITED_API
    #  define ioloop_call0(function) PyObject_CallObject(function, NULL)
    static inline PyObject *ioloop_call2(PyObject *function, PyObject *a, PyObject *b) {
        return PyObject_CallFunctionObjArgs(function, a, b, NULL);
    }
    #else
    #  define ioloop_call0(function) PyObject_CallNoArgs(function)
    static inline PyObject *ioloop_call2(PyObject *function, PyObject *a, PyObject *b) {
        PyObject *args[3] = {NULL, a, b};
        return PyObject_Vectorcall(function, args + 1,
                                   2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    }
    #endif

    /* A method with the calling convention that CPython specialises for: Cython's
       own makes a dict for **kwargs at every call, a third of add_callback's time.
       The limited API can't replace methods, and keeps Cython's. */
    static PyObject *ioloop_tuple(PyObject *const *items, Py_ssize_t n) {
        PyObject *tuple;
        if (n <= 0) {
            Py_INCREF(Py_None);
            return Py_None;
        }
        tuple = PyTuple_New(n);
        for (Py_ssize_t i = 0; tuple && i < n; i++) {
            Py_INCREF(items[i]);
            PyTuple_SetItem(tuple, i, items[i]);
        }
        return tuple;
    }
    #ifdef Py_LIMITED_API
    #  define ioloop_replace(type, name, doc, function) \
        ((void)(type), (void)(name), (void)(doc), (void)(function), 0)
    #else
    static int ioloop_replace(PyObject *type, const char *name, const char *doc,
                              void *function) {
        /* As long as the type: until the process ends. */
        PyMethodDef *def = (PyMethodDef *)calloc(1, sizeof(PyMethodDef));
        PyObject *method = NULL;
        int rc = -1;
        if (def && (def->ml_doc = strdup(doc)) && (def->ml_name = strdup(name))) {
            def->ml_meth = (PyCFunction)(void (*)(void))function;
            def->ml_flags = METH_FASTCALL | METH_KEYWORDS;
            method = PyDescr_NewMethod((PyTypeObject *)type, def);
        }
        else
            PyErr_NoMemory();
        if (method)
            rc = PyDict_SetItemString(((PyTypeObject *)type)->tp_dict, name, method);
        Py_XDECREF(method);
        PyType_Modified((PyTypeObject *)type);
        return rc;
    }
    #endif

    /* For a function that found an exception already set. */
    #define ioloop_raise() (-1)
    """
    const bint HAVE_EPOLL "IOLOOP_HAVE_EPOLL"
    const bint HAVE_KQUEUE "IOLOOP_HAVE_KQUEUE"
    const bint DEBUG "IOLOOP_DEBUG"

    union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    enum: EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL
    int epoll_create1(int flags) nogil
    int epoll_ctl(int ep, int op, int fd, epoll_event *event) nogil
    int epoll_wait(int ep, epoll_event *events, int n, int ms) nogil
    int epoll_wait_ns "ioloop_epoll_wait_ns"(
        int ep, epoll_event *events, int n, const timespec *timeout) nogil

    struct kevent_t "kevent":
        uintptr_t ident
        short filter
        unsigned short flags
        void *udata
    enum: EVFILT_READ, EVFILT_WRITE
    enum: EV_ADD, EV_DELETE, EV_ENABLE, EV_DISABLE, EV_EOF, EV_ERROR
    int kqueue() nogil
    int kevent(int kq, const kevent_t *changes, int n, kevent_t *events, int m,
               const timespec *timeout) nogil

    int open_pipe "ioloop_pipe"(int *fds) nogil
    enum: CLOCK_COARSE "IOLOOP_CLOCK_COARSE"

    int load "ioloop_load"(int *p) nogil
    uint64_t load64 "ioloop_load"(uint64_t *p) nogil
    void store "ioloop_store"(int *p, int value) nogil
    void store64 "ioloop_store"(uint64_t *p, uint64_t value) nogil
    int swap "ioloop_swap"(int *p, int value) nogil
    void fence "ioloop_fence"() nogil

    PyObject *peek "ioloop_peek"(list slots, Py_ssize_t i)
    void place "ioloop_place"(list slots, Py_ssize_t i, PyObject *item)
    void put "ioloop_put"(list slots, Py_ssize_t i, object item)
    object take "ioloop_take"(list slots, Py_ssize_t i)

    object new_context "PyContext_New"()
    int enter_context "PyContext_Enter"(PyObject *context) except -1
    int exit_context "PyContext_Exit"(PyObject *context) except -1
    object capture_context "ioloop_capture"()
    bint is_blank "ioloop_is_blank"(PyObject *context)

    PyObject *call0 "ioloop_call0"(PyObject *function)
    PyObject *call_with "ioloop_call_with"(PyObject *function, PyObject *args,
                                           PyObject *kwargs)
    PyObject *call2 "ioloop_call2"(PyObject *function, PyObject *a, PyObject *b)
    int raise_pending "ioloop_raise"() except -1

    object as_tuple "ioloop_tuple"(PyObject **items, Py_ssize_t n)
    int replace_method "ioloop_replace"(object type, const char *name, const char *doc,
                                        void *function) except -1

cdef extern from "Python.h" nogil:
    unsigned long get_thread "PyThread_get_thread_ident"()
    ctypedef void *PyThread_type_lock
    PyThread_type_lock PyThread_allocate_lock()
    void PyThread_free_lock(PyThread_type_lock)
    int PyThread_acquire_lock_timed(PyThread_type_lock, long long us, int intr)
    void PyThread_release_lock(PyThread_type_lock)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events, revents
    enum: POLLERR, POLLHUP
    int poll_now "poll"(pollfd *files, unsigned int n, int ms)

cdef extern from "<signal.h>" nogil:
    enum: SIGALRM
    ctypedef void (*sighandler_t)(int)
    sighandler_t SIG_DFL
    sighandler_t default_signal "signal"(int signum, sighandler_t handler)
    int pthread_sigmask(int how, const sigset_t *new, sigset_t *old)
    int raise_signal "raise"(int signum)

cdef extern from "Python.h":
    void PyErr_WriteUnraisable(object context)
    void PyErr_SetObject(object type, object value)
    int PyErr_ResourceWarning(object source, Py_ssize_t level, const char *format,
                              ...) except -1
    void Py_XDECREF(PyObject *)

cdef extern from "<errno.h>" nogil:
    enum: ESHUTDOWN

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_atfork(void (*before)() noexcept nogil, void (*parent)() noexcept nogil,
                       void (*child)() noexcept nogil)


# -- Small helpers -------------------------------------------------------------

cdef enum:
    # epoll's numbers; the other pollers translate to and from them.
    READ = IOLOOP_READ
    PRI = 0x002
    WRITE = IOLOOP_WRITE
    ERROR = IOLOOP_ERROR
    ONESHOT = 1 << 30
    EDGE = 1 << 31
    SECOND = 1000000000     # in nanoseconds
    FOREVER = -1


cdef inline int check(int rc) except -1:
    """The one idiom for a system call: -1 becomes the OSError of errno."""
    if rc == -1:
        PyErr_SetFromErrno(OSError)
    return rc


cdef void *reallocate(void *block, size_t size) except NULL:
    cdef void *moved = realloc(block, size)
    if moved == NULL:
        raise MemoryError
    return moved


cdef inline int64_t monotonic() noexcept nogil:
    return _read_clock(CLOCK_MONOTONIC)


cdef inline int64_t _read_clock(int clock) noexcept nogil:
    cdef timespec t
    clock_gettime(clock, &t)
    return <int64_t>t.tv_sec * SECOND + t.tv_nsec


cdef inline int64_t nanoseconds(double seconds, bint up) except? -1:
    """Exact to the nanosecond, also for UNIX times, and saturating."""
    cdef double whole = floor(seconds)
    cdef double rest = (seconds - whole) * 1e9
    if isnan(seconds):
        raise ValueError("a time can't be NaN")
    if whole >= 9.2e9:
        return INT64_MAX
    if whole <= -9.2e9:
        return INT64_MIN
    return <int64_t>whole * SECOND + <int64_t>(ceil(rest) if up else floor(rest))


cdef inline int64_t later(int64_t base, int64_t delay) noexcept nogil:
    """Their sum, or the end of time."""
    if delay > 0 and base > INT64_MAX - delay:
        return INT64_MAX
    if delay < 0 and base < INT64_MIN - delay:
        return INT64_MIN
    return base + delay


cdef inline int require_callable(object callback) except -1:
    if not callable(callback):
        raise TypeError(f"a callable is required, not {type(callback).__name__}")


cdef inline bint has(object thing, str name) except -1:
    """Tell whether its class, not just the instance, has an attribute.

    As asyncio does: a Mock has whatever it is asked for, and one with a `spec` has the
    class that it stands for.
    """
    return hasattr(thing.__class__, name)


cdef int fd_number(object fd) except -1:
    """The int in `fd`, which is an int or has fileno()."""
    number = fd
    if not isinstance(fd, int):
        try:
            fileno = fd.fileno
        except AttributeError:
            raise TypeError("fd must be an int or have a fileno() method, "
                            f"not {type(fd).__name__}") from None
        number = fileno()
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"a file descriptor is an int, not {type(number).__name__}")
    if number < 0:
        raise ValueError(f"a file descriptor can't be negative: {number}")
    if number > INT_MAX:
        raise OverflowError(f"file descriptor too large: {number}")
    return number


cdef uint32_t event_mask(object events) except? 0xFFFFFFFF:
    if not isinstance(events, int):
        raise TypeError(f"events is an int, not {type(events).__name__}")
    if events < 0:
        raise ValueError(f"events can't be negative: {events}")
    if events > 0xFFFFFFFF:
        raise OverflowError(f"events has more than 32 bits: {events:#x}")
    return events


cdef int above_stdio(int fd) except -1:
    """`fd`, moved out of 0-2, where a program may find it as its stdout."""
    cdef int moved
    if fd > 2:
        return fd
    moved = fcntl(fd, F_DUPFD_CLOEXEC, 3)
    close(fd)
    return check(moved)


def _log():
    import logging  # which takes longer than all the rest
    return logging.getLogger("ioloop")


# -- IOLoop --------------------------------------------------------------------

# What is one per process (the instance) or one per thread (the current loop).
_process = {}  # "loop": the instance; a dict's setdefault() is atomic
_threads = _local()
_loops = {}  # weak references to all there are, by id


@cython.internal
cdef class _Referable:
    # Cython 3.3 can't give a type of the limited API both this and a __dict__.
    cdef object __weakref__


cdef class IOLoop(_Referable):
    """IOLoop(impl=None, *, time_func=None, make_current=None)

    A level-triggered event loop.

    `impl` is the poller: `_EPoll()`, `_KQueue()` or `_Select()`, by default the
    best that the platform has, or any object with `register(fd, events)`,
    `modify(fd, events)`, `unregister(fd)` and `poll(seconds)`, which returns
    pairs of fd and events; -1 seconds is for ever.  (Seconds: most pollers
    of other packages count in milliseconds.)  The loop closes it.
    `time_func` returns the time in seconds; the loop's deadlines are on its
    clock.  By default they are UNIX times, kept by the monotonic clock from the
    moment they are set, so that setting the system's clock moves none of them.
    `make_current`: None makes the loop the thread's current one, until it is
    dropped or closed, if there is none; True raises RuntimeError if there is one.

    A loop is a context manager that closes itself.  Of what a subclass overrides
    it calls only `handle_callback_exception` and `log_stack`.  Source: Tornado
    1.2-2.0; `make_current`: 4.2.
    """

    cdef dict __dict__
    cdef readonly object _impl
    cdef _Poller poller
    cdef _Table table
    cdef _Queue queue
    cdef _Timers timers
    cdef _Watcher watcher       # of this run, if there is a threshold
    cdef int64_t threshold      # of the watcher, in nanoseconds; 0 is none
    cdef object action          # of the signal threshold
    cdef bint by_signal         # it is one
    cdef object blank           # an empty context, for whatever captured none
    cdef object outer           # the current loop that start() put aside
    cdef unsigned long thread   # the one that runs the loop, or 0
    cdef bint opened, forked, stopping, shared, embedded
    cdef bint has_wakeup_fd     # our pipe is the signal wakeup fd,
    cdef int outer_wakeup       # in the place of this one, or -1
    cdef int alarms             # SIGALRMs that the pipe told of, not handled yet
    cdef uint64_t polled        # callbacks run before the last poll among them
    cdef int held               # polls and events since the GIL was offered
    cdef bint eager             # the last poll found events at once
    cdef int64_t tick           # the coarse time of the last poll
    cdef int64_t renewed        # when the poller was last rebuilt
    cdef uint64_t iterations, polls, events
    cdef int64_t asleep, woken, longest_busy

    NONE = IOLOOP_NONE
    READ = _EPOLLIN = IOLOOP_READ
    WRITE = _EPOLLOUT = IOLOOP_WRITE
    ERROR = IOLOOP_ERROR
    _EPOLLPRI = 0x002
    _EPOLLERR = 0x008
    _EPOLLHUP = 0x010
    _EPOLLRDHUP = 0x2000
    _EPOLLONESHOT = 1 << 30
    _EPOLLET = 1 << 31

    def __init__(self, impl=None, *, time_func=None, make_current=None):
        if self.opened:
            raise RuntimeError("IOLoop is already initialised")
        if time_func is not None:
            require_callable(time_func)
        if make_current and _current_loop() is not None:
            raise RuntimeError("the thread has a current IOLoop already")
        queue = _Queue()
        impl = _poll() if impl is None else impl
        poller = impl if _is_native(impl) else _Foreign(impl)
        if (<_Poller>poller).taken:
            raise ValueError("the poller is another IOLoop's")
        self.table = _Table()
        self.timers = _Timers(queue, time_func)
        self.blank = new_context()
        self.poller = poller
        if self.poller.foreign:
            (<_Foreign>poller).table = self.table
        self.queue = queue
        _add_doorbell(self)
        self._impl = impl
        self.poller.taken = True
        _loops[id(self)] = ref(self, partial(_loops.pop, id(self)))
        self.opened = True
        if make_current:
            _threads.loop = self
        elif make_current is None and _current_loop() is None:
            _threads.loop = ref(self)

    # Which loop

    @classmethod
    def instance(cls):
        """Return the process's loop, made by the first call.  Any thread."""
        cdef IOLoop loop = _process.get("loop")
        if loop is None:
            loop = cls()
            loop.shared = True
            if _process.setdefault("loop", loop) is not loop:
                loop.close()  # another thread was quicker
                return cls.instance()
        return loop

    @staticmethod
    def initialized():
        """Tell whether the process's loop exists.  Any thread."""
        return "loop" in _process

    @staticmethod
    def clear_instance():
        """Forget the process's loop, which is not closed.  Any thread."""
        _process.pop("loop", None)

    def install(self):
        """Make this the process's loop; RuntimeError if there is one.  Any thread."""
        _check_open(self)
        if _process.setdefault("loop", self) is not self:
            raise RuntimeError("the process has an IOLoop.instance() already")
        self.shared = True

    @staticmethod
    def current(instance=True):
        """Return the loop that runs in this thread or was made its current one.

        That is the first loop made in the thread, unless `make_current` said
        otherwise.  Without one, return `instance()`, or None where `instance` is
        false.  Source: Tornado 4.2.
        """
        loop = _current_loop()
        return IOLoop.instance() if loop is None and instance else loop

    def make_current(self):
        """Make this the current loop of the calling thread."""
        _check_open(self)
        _threads.loop = self

    @staticmethod
    def clear_current():
        """Leave the calling thread without a current loop."""
        _threads.loop = None

    # File descriptors

    def add_handler(self, fd, handler, events):
        """Call `handler(fd, events)` whenever one of `events` is true of `fd`.

        `fd` is a file descriptor or an object with `fileno()`; the handler gets
        what was passed.  `events` is a mask of READ and WRITE (or poll bits of
        the kernel, as `_EPOLLRDHUP`); ERROR, an error or a hang-up, is always
        added.  With a mask of NONE the fd is known but not watched.  The loop
        is level-triggered: the handler is called again until it has dealt with
        the event or asked for another mask.  It runs in the context
        (`contextvars`) that add_handler was called in.

        Raises FileExistsError for an fd that has a handler, PermissionError for
        a regular file, OSError for what the kernel refuses, ValueError,
        OverflowError or TypeError for what is no fd, no mask, no callable.
        Loop thread only.
        """
        _check_thread(self)
        require_callable(handler)
        cdef uint32_t mask = event_mask(events)
        cdef int number = fd_number(fd)
        _check_thread(self)  # fileno() may have closed the loop
        _add_handler(self, number, mask, NULL, NULL,
                     _Handler.__new__(_Handler, fd, handler, capture_context()))

    def update_handler(self, fd, events):
        """Ask for `events` from now on; also drops what is already collected.

        Raises FileNotFoundError for an fd without a handler, else as
        add_handler.  Loop thread only.
        """
        _check_thread(self)
        cdef uint32_t mask = event_mask(events)
        cdef int number = fd_number(fd)
        _check_thread(self)
        _update_handler(self, number, mask)

    def remove_handler(self, fd):
        """Forget `fd`, before it is closed; does nothing if it has no handler.

        Its handler is not called any more, not even for an event already
        collected.  An object is found also when its `fileno()` fails, as that
        of a closed file does.  Loop thread only.
        """
        if _is_closed(self):
            return
        _check_thread(self)
        cdef int number = _registered_number(self.table, fd)
        if self.opened:  # still, after fileno()
            _check_thread(self)
            if number >= 0 and number != self.queue.door.reader:
                _remove_handler(self, number)

    @staticmethod
    def split_fd(fd):
        """Return `fd` as a pair: the int and what was passed.  Any thread."""
        return fd_number(fd), fd

    @staticmethod
    def close_fd(fd):
        """Close `fd`, by its own `close()` if it has one; EBADF is ignored.

        Any thread.
        """
        _close_file(fd)

    # Callbacks

    def add_callback(self, callback, *args, **kwargs):
        """Call `callback(*args, **kwargs)` in the next iteration.

        In order of adding, in the context (`contextvars`) of this call.  What
        was accepted is run, in this `start()` or a later one, unless the loop
        is closed.  May be called from any thread, from a signal handler and
        from `__del__`.

        Raises RuntimeError if the loop is closed, TypeError for what is not
        callable, and OSError if the loop sleeps and the kernel refuses to wake
        it.
        """
        _queue_call(self, callback, args or None, kwargs, capture_context())

    def add_callback_from_signal(self, callback, *args, **kwargs):
        """As add_callback, which may be called from a signal handler too."""
        _queue_call(self, callback, args or None, kwargs, capture_context())

    def spawn_callback(self, callback, *args, **kwargs):
        """As add_callback, in an empty context.  Any thread."""
        _queue_call(self, callback, args or None, kwargs, None)

    def add_future(self, future, callback):
        """Call `callback(future)` in the loop once `future` is done.

        A future is any object with `add_done_callback`, of this thread or of
        another (`concurrent.futures`).  Any thread.
        """
        _check_open(self)
        require_callable(callback)
        future.add_done_callback(partial(_relay, self, callback, capture_context()))

    # Timeouts

    def time(self):
        """Return the time in seconds on the clock of `add_timeout`.  Any thread."""
        if self.timers is None or self.timers.time_func is None:
            return <double>_read_clock(CLOCK_REALTIME) / 1e9
        return self.timers.time_func()

    def add_timeout(self, deadline, callback, *args, **kwargs):
        """Call `callback(*args, **kwargs)` at `deadline`; return its handle.

        `deadline` is a time in seconds on the clock of `time()` or a
        `timedelta` from now.  Never early, late by microseconds; in the order
        of (deadline, adding).  A deadline in the past is due in the next pass,
        infinity never.  Raises ValueError for NaN, TypeError for what is no
        time.  Loop thread only.
        """
        return _time_call(self, deadline, _deadline, callback, args or None, kwargs)

    def call_later(self, delay, callback, *args, **kwargs):
        """As add_timeout, `delay` seconds from now.  Loop thread only."""
        return _time_call(self, delay, _delay, callback, args or None, kwargs)

    def call_at(self, when, callback, *args, **kwargs):
        """As add_timeout, at `when` seconds on the clock of `time()`.

        Loop thread only.
        """
        return _time_call(self, when, _deadline, callback, args or None, kwargs)

    def remove_timeout(self, timeout):
        """Cancel a handle; does nothing if it has run or was cancelled.

        Raises TypeError for what is no handle, ValueError for another loop's.
        Loop thread only.
        """
        if _is_closed(self):
            return
        _check_thread(self)
        if not isinstance(timeout, _Timeout):
            raise TypeError(f"a handle of add_timeout, not {type(timeout).__name__}")
        if (<_Timeout>timeout).timers not in (NULL, <PyObject *>self.timers):
            raise ValueError("the timeout belongs to another IOLoop")
        _cancel(<_Timeout>timeout)

    # Start and stop

    def start(self):
        """Run until `stop()` is called, or a BaseException ends it.

        Everything not yet delivered is kept for the next start.  Returns at
        once if stop() was called before.  The calling thread is the loop's until
        then.  Raises RuntimeError if the loop runs.
        """
        _check_thread(self)
        _check_idle(self)
        try:
            if not self.stopping:
                _enter(self)
                try:
                    while _iterate(self, INT64_MAX):
                        pass
                finally:
                    _leave(self)
        finally:
            self.stopping = False

    def stop(self):
        """Let `start()` return once the iteration is complete.

        Before a start: the next one returns at once.  Wakes a sleeping loop.
        May be called from any thread and from a signal handler.
        """
        cdef bint before = self.stopping
        _check_open(self)
        self.stopping = True
        try:
            _wake(self.queue)
        except OSError:
            self.stopping = before
            raise

    def running(self):
        """Tell whether the loop runs.  Any thread."""
        return self.opened and self.thread != 0

    def run_sync(self, func, timeout=None):
        """Run the loop until `func()` is done; return its value.

        `func` is a plain function, or one that returns a coroutine or a future,
        which is waited for.  Raises what it raises, TimeoutError after
        `timeout` seconds, RuntimeError if the loop was stopped before; what is
        not done by then is cancelled.  As start(), from any thread.
        """
        _check_thread(self)
        _check_idle(self)
        require_callable(func)
        return _run_sync(self, func, timeout)

    def run_once(self, timeout=None):
        """Run one iteration, for embedding the loop into another.

        Poll for at most `timeout` seconds, as long as `start()` would if None.
        To be called when `fileno()` is readable or `next_timeout()` is over.
        After stop(), the next one that would poll does not.  As start(), from
        any thread.
        """
        cdef int64_t limit = INT64_MAX
        _check_thread(self)
        _check_idle(self)
        if timeout is not None:
            limit = max(0, nanoseconds(timeout, True))
        _check_idle(self)
        _enter(self)
        try:
            if not _iterate(self, limit):
                self.stopping = False
        finally:
            _leave(self)

    def next_timeout(self):
        """Return how long the loop would sleep, in seconds, or None for ever.

        Loop thread only.
        """
        _check_thread(self)
        cdef int64_t wait = 0
        if not _is_awake(self) and not self.poller.kept:
            wait = _time_to_wait(self, INT64_MAX)
        return None if wait == FOREVER else <double>wait / SECOND

    def fileno(self):
        """Return a file descriptor that is readable when `run_once` is due.

        Or when `next_timeout()` has become less.  It stays the same until the loop is
        closed.  Raises io.UnsupportedOperation if the poller has none.  Any thread.
        """
        _check_open(self)
        number = self.poller.fileno()
        self.embedded = True
        if self.thread == 0:
            _doze(self)
        return number

    def close(self, all_fds=False):
        """Free the loop; `all_fds` closes every fd and object it has handlers of.

        What is queued is dropped.  Does nothing the second time.  Raises
        RuntimeError while the loop runs.  Any thread.
        """
        cdef _Timeout timeout  # kept alive while it is cancelled
        cdef _Timers timers = self.timers
        cdef _Queue queue = self.queue
        if not self.opened:
            return
        if self.thread != 0 and not self.forked:
            raise RuntimeError("a running IOLoop can't be closed")
        cdef list files = _registrations(self) if all_fds else []
        self.opened = False
        if self.shared and _process.get("loop") is self:
            del _process["loop"]
        if getattr(_threads, "loop", None) is self:
            _threads.loop = None
        _close_door(queue.door)
        self.table.size = self.table.count = 0
        self.table.handlers.clear()
        timers.closed = True
        _add_late(timers)
        while timers.count:
            timeout = <_Timeout>timers.heap[timers.count - 1].timeout
            _cancel(timeout)
        while queue.head != queue.tail:
            queue.head += 1
            take(queue.ring, <Py_ssize_t>((queue.head - 1) & queue.mask))
        try:
            self.poller.close()  # last, since that of a user may raise
        finally:
            for _, handler in files:
                try:
                    _close_file((<_Handler>handler).file)
                except Exception:
                    _report(self, (<_Handler>handler).file)

    def reinit(self):
        """Make the loop usable in a forked child.

        With a poller and a doorbell of its own it keeps the handlers, callbacks
        and timeouts, and leaves the parent's loop alone.  An `impl` given to
        the constructor must have a `reinit()` of its own (RuntimeError).  Does
        nothing where there was no fork.
        """
        if not self.opened:
            _refuse(self)
        if self.forked:
            _reinit(self)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        state = ("closed" if not self.opened else "forked" if self.forked
                 else "running" if self.thread else "idle")
        return f"<{type(self).__name__} {state} at {<uintptr_t><void *>self:#x}>"

    def __del__(self):
        if self.opened and not self.shared and not self.forked:
            PyErr_ResourceWarning(self, 1, b"unclosed IOLoop at %p", <void *>self)

    # Errors and blocking

    def handle_callback_exception(self, callback):
        """Log the exception (`sys.exc_info()`) that `callback` raised.

        Called for callbacks, timeouts and handlers; override it in a subclass
        or on the instance.  If it raises an exception itself, both go to
        `sys.unraisablehook`.  Called by the loop's thread.
        """
        _log().error("Exception in callback %r", callback, exc_info=True)

    def set_blocking_signal_threshold(self, seconds, action):
        """Call `action(signal, frame)` when the loop blocks for over `seconds`.

        By SIGALRM, within a quarter of the time more and once for each time that it
        blocks; an `action` of None lets the signal kill the process, even when it
        is stuck in C code.  None for `seconds` turns it off at once.  While the loop
        runs, SIGALRM's handler is `action`.  A handler that the program had set
        before gets every SIGALRM that is not the loop's own, and while a callback
        has set one, the loop sends none.  Main thread only (RuntimeError).
        """
        _check_thread(self)
        if action is not None:
            require_callable(action)
        import threading
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("SIGALRM can be handled in the main thread only")
        _set_threshold(self, seconds, True, action)

    def set_blocking_log_threshold(self, seconds):
        """Log a stack trace when the loop blocks for over `seconds`.

        By `log_stack`, in the thread that watches; no signal is sent.  None turns it
        off at once.  Loop thread only.
        """
        _check_thread(self)
        _set_threshold(self, seconds, False, None)

    def log_stack(self, signal, frame):
        """Log the stack of `frame`, which blocks the loop.

        Called by the thread that watches; may serve as an action as well.
        """
        import traceback
        _log().warning("IOLoop blocked for %f seconds in\n%s", self.threshold / 1e9,
                       "".join(traceback.format_stack(frame)))

    def stats(self):
        """Return counters as a dict.  Any thread.

        `iterations`, `polls`, `events`, `callbacks` and `timeouts` count what
        was run, `pending_callbacks`, `pending_timeouts` and `handlers` what is
        there; `asleep` is the time spent waiting and `longest_busy` the longest
        between two waits, both in seconds.
        """
        _check_open(self)
        return {
            "iterations": self.iterations,
            "polls": self.polls,
            "events": self.events,
            "callbacks": _count_run(self.queue),
            "timeouts": self.timers.fired,
            "pending_callbacks": _pending(self.queue),
            "pending_timeouts": self.timers.count + self.timers.lates,
            "handlers": self.table.count - 1,
            "asleep": self.asleep / 1e9,
            "longest_busy": self.longest_busy / 1e9,
        }

    @property
    def _handlers(self):
        """A dict of the handlers by file descriptor, a copy."""
        _check_open(self)
        return {fd: (<_Handler>item).callback for fd, item in _registrations(self)}


cdef object _current_loop():
    """The thread's loop, or None; one that is current for being the first may go."""
    loop = getattr(_threads, "loop", None)
    if type(loop) is ref:
        loop = loop()
    return loop if loop is not None and (<IOLoop>loop).opened else None


cdef inline bint _is_closed(IOLoop loop) noexcept:
    return not loop.opened and loop.poller is not None


cdef inline int _check_open(IOLoop loop) except -1:
    if not loop.opened or loop.forked:
        _refuse(loop)


cdef inline int _check_thread(IOLoop loop) except -1:
    if not loop.opened or loop.forked or (
            loop.thread != 0 and loop.thread != get_thread()):
        _refuse(loop)


cdef int _refuse(IOLoop loop) except -1:
    if loop.poller is None:
        raise RuntimeError("IOLoop.__init__() has not been called")
    if not loop.opened:
        raise RuntimeError("IOLoop is closed")
    if loop.forked:
        raise RuntimeError("this IOLoop was made before a fork: call its reinit() "
                           "or make a new one in the child process")
    raise RuntimeError("IOLoop runs in another thread, "
                       "and this method is not thread-safe")


cdef int _check_idle(IOLoop loop) except -1:
    if not loop.opened:
        _refuse(loop)
    if loop.thread != 0:
        raise RuntimeError("IOLoop is already running")


cdef int _enter(IOLoop loop) except -1:
    """Take the loop for this thread."""
    loop.thread = loop.timers.thread = get_thread()
    try:
        loop.outer = getattr(_threads, "loop", None)
        _threads.loop = loop
        _take_wakeup_fd(loop)
        store(&loop.queue.door.asleep, 0)
        _start_watcher(loop)
        loop.woken = monotonic()
    except BaseException:
        _leave(loop)
        raise


cdef int _leave(IOLoop loop) except -1:
    """Give everything back that _enter took; the loop is restartable."""
    try:
        try:
            _stop_watcher(loop)
        finally:
            if loop.has_wakeup_fd:
                _give_wakeup_fd(loop)
    finally:
        loop.thread = loop.timers.thread = 0
        _note_busy(loop, monotonic())
        _doze(loop)
        _threads.loop, loop.outer = loop.outer, None


# -- The iteration -------------------------------------------------------------

cdef enum:
    # While callbacks wait, a native poller is asked for events once in so many of
    # them, or once a tick of the coarse clock, a few milliseconds: a system call
    # costs more than a short callback.
    CALLBACKS_PER_POLL = 64

    BATCHES_PER_LOOK = 64   # one fd in so many batches is looked at
    SLACK = 50000           # nanoseconds, unless prctl() has set another
    LONGEST = 86400         # seconds to sleep; some kernels refuse years

    # A poll that found events at once is followed by one that doesn't wait, which
    # keeps the GIL and reads no clock.
    EAGER = 5000            # nanoseconds that are at once
    SHARE = 64              # polls and events, after which the GIL is offered

# Any Python function gives the GIL away to a thread that has waited for it for a switch
# interval.  Just to release it doesn't help: the waiter wakes too late and waits again.
_share = eval("lambda: None")


cdef int _iterate(IOLoop loop, int64_t limit) except -1:
    """One iteration, waiting for at most `limit` ns; false if it was the last."""
    cdef int n
    store64(&loop.iterations, loop.iterations + 1)
    store(&loop.queue.door.asleep, 0)
    loop.alarms = 0
    _run_callbacks(loop)
    if loop.timers.count:
        _run_timeouts(loop)
    if loop.stopping:
        return False
    n = _poll_events(loop, limit)
    if n:
        _run_handlers(loop, n)
    if DEBUG:
        _verify(loop)
    return True


cdef int _run_callbacks(IOLoop loop) except -1:
    """Step 1: what was queued when the iteration began, C's and Python's."""
    cdef _Queue queue = loop.queue
    cdef _Door *door = queue.door
    cdef uint64_t last_post = load64(&door.tail), last = queue.tail, next_call
    cdef _Post post
    cdef object call
    while True:
        if door.head < last_post:
            next_call = queue.head if queue.head < last else UINT64_MAX
            pthread_mutex_lock(&door.lock)
            post = door.posts[door.head & (door.capacity - 1)]
            if post.after <= next_call:
                store64(&door.head, door.head + 1)
            pthread_mutex_unlock(&door.lock)
            if post.after <= next_call:
                try:
                    post.function(loop, post.arg)
                except Exception:
                    _report(loop, None)
                continue
        if queue.head >= last:
            return 0
        call = take(queue.ring, <Py_ssize_t>(queue.head & queue.mask))
        queue.head += 1
        _invoke(loop, call)


cdef int _run_timeouts(IOLoop loop) except -1:
    """Step 2: what is due at one sample of the clock."""
    cdef _Timers timers = loop.timers
    cdef object call
    cdef int64_t now = _now(timers)
    if timers.count == 0 or timers.heap[0].deadline > now:
        return 0
    timers.pass_time = now
    timers.passing = True
    try:
        while timers.count and timers.heap[0].deadline <= now:
            call = _release(timers, _extract(timers, 0))
            timers.fired += 1
            if type(call) is _Timer:
                try:
                    (<_Timer>call).function(loop, (<_Timer>call).arg)
                except Exception:
                    _report(loop, (<_Timer>call).owner)
            else:
                _invoke(loop, call)
            call = None  # whose destructor may cancel the next one
    finally:
        timers.passing = False
        _add_late(timers)


cdef int64_t _time_to_wait(IOLoop loop, int64_t limit) except -2:
    """How long to sleep: 0, nanoseconds, or FOREVER."""
    cdef _Timers timers = loop.timers
    if limit and timers.count and timers.heap[0].deadline != INT64_MAX:
        limit = min(limit, max(0, later(timers.heap[0].deadline, -_now(timers))))
    return FOREVER if limit == INT64_MAX else limit


cdef int _poll_events(IOLoop loop, int64_t limit) except -1:
    """Step 4: the number of events now in the poller's array."""
    cdef _Poller poller = loop.poller
    cdef int64_t wait = 0, tick
    cdef uint64_t ran
    cdef int n = 0
    _check_open(loop)  # a callback may have forked, and its child have closed it
    if poller.kept:
        n, poller.kept = poller.kept, 0
        return n
    if not _is_awake(loop):
        wait = _time_to_wait(loop, limit)
    elif not poller.foreign:
        ran, tick = _count_run(loop.queue), _read_clock(CLOCK_COARSE)
        if ran - loop.polled < CALLBACKS_PER_POLL and tick == loop.tick:
            return 0
        loop.polled, loop.tick = ran, tick
    store64(&loop.polls, loop.polls + 1)
    if wait == 0 or loop.eager:
        if loop.held >= SHARE:
            loop.held = 0
            _share()  # which may raise: nothing has been collected yet
        n = poller.wait(0)
        loop.held += 1 + n
        loop.eager = n > 0 and not poller.foreign
    if n == 0 and wait != 0:
        n = _sleep(loop, wait)
    loop.table.batch += 1
    try:
        _check_signals(loop)
    except BaseException:
        _keep_events(loop, 0, n)
        raise
    return n


cdef int _sleep(IOLoop loop, int64_t wait) except -1:
    """Poll without the GIL, and keep the accounts of how long."""
    cdef int *asleep = &loop.queue.door.asleep
    cdef int64_t before = monotonic(), now = before, left = wait, slack
    cdef bint native = not loop.poller.foreign
    cdef int n = 0
    _note_busy(loop, before)
    _shrink_queue(loop.queue)
    # First the flag, then another look at the queue: whoever adds does it the
    # other way round, so one of the two sees the other.
    store(asleep, 1)
    fence()
    try:
        while True:
            _check_signals(loop)  # those that came before the pipe told of them
            if _keep_wakeup_fd(loop):
                _check_signals(loop)  # and those that came while another one was set
            # Linux sleeps longer by the thread's timer slack, or by 0.1 %.  Should it
            # not, then the rest is slept in a second poll.
            left = min(left, LONGEST * <int64_t>SECOND) if native else left
            slack = max(SLACK, left // 1000) if HAVE_EPOLL and native else left
            left = 0 if _is_awake(loop) else left - slack if left > slack else left
            n = loop.poller.wait(left)
            now = monotonic()
            if not loop.poller.interrupted:
                break
            left = wait if wait == FOREVER else max(0, wait - (now - before))
    finally:
        store(asleep, 0)
        if loop.watcher is not None:
            _unpark_watcher(loop.watcher)
        loop.woken = now
        loop.asleep += now - before
    loop.eager = n > 0 and now - before < EAGER and native
    return n


cdef inline void _note_busy(IOLoop loop, int64_t now) noexcept:
    """It has been awake until now."""
    if loop.woken:
        loop.longest_busy = max(loop.longest_busy, now - loop.woken)
    loop.woken = 0


cdef inline int _check_signals(IOLoop loop) except -1:
    """Run the handlers of signals; in the child that one forked, the loop ends."""
    PyErr_CheckSignals()
    return _check_open(loop)


cdef inline bint _is_awake(IOLoop loop) noexcept:
    """Tell whether there is something to do already."""
    return loop.stopping or _pending(loop.queue)


cdef int _run_handlers(IOLoop loop, int n) except -1:
    """Step 5: deliver `n` events, each to the registration that it is for."""
    cdef _Table table = loop.table
    cdef _Poller poller = loop.poller
    cdef _Ready *ready
    cdef _Slot *slot
    cdef _Handler handler
    cdef uint32_t events
    cdef bint stray = False
    cdef int i = 0
    if table.batch % BATCHES_PER_LOOK == 0:
        # Now and then, see whether an fd that has events is still open.
        ready = &poller.ready[(table.batch // BATCHES_PER_LOOK) % n]
        stray = fcntl(ready.fd, F_GETFD) == -1 and _slot(table, ready.fd) != NULL
    loop.events += n
    try:
        while i < n:
            ready = &poller.ready[i]
            i += 1
            if ready.fd >= table.size:
                stray = True
                continue
            slot = &table.slots[ready.fd]
            if slot.generation != ready.generation or slot.generation == 0:
                # Removed by a handler of this batch, or unknown from the start?
                stray |= slot.ended != table.batch
                continue
            events = ready.events & (slot.events | ERROR)
            if not events or not slot.events or slot.muted:
                continue
            slot.muted = slot.events & ONESHOT and poller.oneshot
            if slot.function != NULL:
                _run_c_handler(loop, ready.fd, slot, events)
                continue
            handler = <_Handler>peek(table.handlers, ready.fd)
            if handler.pending is None or not _pause_handler(loop, handler):
                _run_handler(loop, handler, events)
            handler = None  # whose destructor may remove the next one
    except BaseException:
        _keep_events(loop, i, n)
        raise
    if stray and loop.opened and not loop.forked:
        _renew_poller(loop)


cdef int _run_handler(IOLoop loop, _Handler handler, uint32_t events) except -1:
    cdef object fd = handler.file, callback = handler.callback, mask = events
    cdef PyObject *context = _enter_context(loop, handler.context)
    try:
        _settle(loop, callback, call2(
            <PyObject *>callback, <PyObject *>fd, <PyObject *>mask), handler)
    finally:
        exit_context(context)
        if handler.context is None and not is_blank(context):
            # What a handler sets in its context is there when it is called again.
            handler.context, loop.blank = loop.blank, new_context()


cdef int _run_c_handler(IOLoop loop, int fd, _Slot *slot, uint32_t events) except -1:
    # The slots may move and the owner may go while the handler runs.
    cdef object owner = (<_Handler>peek(loop.table.handlers, fd)).callback
    try:
        slot.function(loop, fd, events, slot.arg)
    except Exception as error:
        if not _has_lost_peer(fd, error):
            _report(loop, owner)


# Below: what the steps share.

cdef int _invoke(IOLoop loop, object call) except -1:
    """Run a call of a user in its context."""
    cdef object callback = call, context = None
    cdef PyObject *entered
    if type(call) is _Call:
        callback, context = (<_Call>call).callback, (<_Call>call).context
    entered = _enter_context(loop, context)
    try:
        if type(call) is _Call:
            _settle(loop, callback, call_with(
                <PyObject *>callback, <PyObject *>(<_Call>call).args,
                <PyObject *>(<_Call>call).kwargs), None)
        else:
            _settle(loop, callback, call0(<PyObject *>callback), None)
    finally:
        exit_context(entered)
        if context is None and not is_blank(entered):
            loop.blank = new_context()


cdef inline PyObject *_enter_context(IOLoop loop, object context) except NULL:
    cdef PyObject *entered = <PyObject *>(loop.blank if context is None else context)
    enter_context(entered)
    return entered


cdef inline int _settle(IOLoop loop, object callback, PyObject *result,
                        _Handler handler) except -1:
    """Deal with what a callable, maybe a handler, returned, or raised (NULL)."""
    if result == <PyObject *>None:
        Py_XDECREF(result)  # the quick way
    else:
        _finish_call(loop, callback, result, handler)


cdef int _finish_call(IOLoop loop, object callback, PyObject *result,
                      _Handler handler) except -1:
    """Report an exception; drive a coroutine to its end, as a future."""
    cdef object future
    try:
        if result == NULL:
            raise_pending()
        future = _as_future(loop, <object>result)
        if future is not None:
            future.add_done_callback(partial(
                _relay, loop, partial(_conclude, loop, callback, future, handler),
                capture_context()))
            if handler is not None:
                handler.pending = future
    except Exception as error:  # KeyboardInterrupt and its like leave start()
        if handler is None or not _has_lost_peer(handler.number, error):
            _report(loop, callback)
    finally:
        Py_XDECREF(result)


cdef bint _has_lost_peer(int fd, object error) except -1:
    """Tell whether a handler's EPIPE is of its own fd, of which an event tells too."""
    cdef pollfd query
    if not isinstance(error, OSError) or error.errno != EPIPE:
        return False
    query.fd, query.events = fd, 0
    return poll_now(&query, 1, 0) == 1 and query.revents & (POLLERR | POLLHUP)


cdef int _report(IOLoop loop, object callback) except -1:
    """Give the exception being handled to the hook, or both to sys.unraisablehook."""
    cdef object error = sys.exc_info()[1], failure = None
    try:
        loop.handle_callback_exception(callback)
    except Exception as raised:
        failure = raised
    if failure is not None:
        _unraisable(callback, error)
        _unraisable(callback, failure)


cdef void _unraisable(object where, object error) noexcept:
    PyErr_SetObject(type(error), error)
    PyErr_WriteUnraisable(where)


# -- Coroutines and futures ----------------------------------------------------

_generator = type(eval("(_ for _ in ())"))
_plain = frozenset((bool, bytes, dict, float, int, list, str, tuple))  # the quick way


cdef object _as_future(IOLoop loop, object result):
    """A future for `result`, or None if it is a plain value."""
    if type(result) in _plain:
        return None
    if has(result, "add_done_callback"):
        return result
    if has(result, "__await__"):
        return _Task(loop, result.__await__())
    # 0x100: inspect's flag of what types.coroutine() made
    if type(result) is _generator and result.gi_code.co_flags & 0x100:
        return _Task(loop, result)
    return None


def _steps(iterator):
    # A plain iterator has no send() and throw().
    return (yield from iterator)


def _relay(IOLoop loop not None, callback, context, future):
    """Queue what waits for a future that is done, unless nobody does any more."""
    if loop.opened:
        _push(loop.queue, make_call(callback, (future,), None, context))


def _conclude(IOLoop loop not None, callback, awaited, _Handler handler, future):
    """Report the exception of a future that a callable returned."""
    try:
        if not (has(future, "cancelled") and future.cancelled()):
            future.result()
    except Exception:
        _report(loop, callback)
    finally:
        if handler is not None and handler.pending is awaited:
            handler.pending = None
            if handler.paused:
                _resume_handler(loop, handler)


@cython.final
cdef class _Task:
    """A coroutine on its way, and the future of its result.

    It may await whatever yields None, to go on in the next iteration, or a
    future, to go on when that is done; each step runs in the same context.
    """

    cdef object __weakref__
    cdef IOLoop loop
    cdef object steps, value, error, context
    cdef uint64_t waits         # the number of this wait
    cdef bint finished, dropped
    cdef list callbacks

    def __cinit__(self, IOLoop loop not None, steps):
        self.loop = loop
        self.steps = steps if hasattr(steps, "send") else _steps(steps)
        self.context = capture_context() or new_context()
        self.callbacks = []
        _push(loop.queue, make_call(self, None, None, self.context))

    def __call__(self, future=None, error=None):
        """Go on, with the result of the future that was awaited, or an error."""
        if self.finished:
            return
        try:
            if error is not None:
                awaited = self.steps.throw(error)
            elif future is None:
                awaited = self.steps.send(None)
            else:
                awaited = self._resume(future)
        except StopIteration as stop:
            self._finish(stop.value, None)
        except Exception as error:
            self._finish(None, error)
        except BaseException:
            self.dropped = True  # it is reported once, by leaving start()
            self._finish(None, None)
            raise
        else:
            self._wait_for(self.waits, awaited)

    def _wake(self, wait, future, error=None):
        if wait == self.waits:  # else it went on, and has been told twice
            self.waits += 1
            self(future, error)

    def _resume(self, future):
        try:
            value = future.result()
        except BaseException as error:
            return self.steps.throw(error)
        return self.steps.send(value)

    def _wait_for(self, wait, awaited):
        if awaited is None:
            _push(self.loop.queue, make_call(self, None, None, self.context))
            return
        if wait != self.waits:
            return
        wake = partial(self._wake, wait)
        try:
            if not has(awaited, "add_done_callback"):
                raise TypeError(f"a coroutine on an IOLoop can't await {awaited!r}")
            awaited.add_done_callback(partial(_relay, self.loop, wake, self.context))
        except Exception as error:
            _push(self.loop.queue,
                  make_call(wake, (None, error), None, self.context))
        except BaseException:
            # Nobody knows whether it was added: try again.
            _push(self.loop.queue,
                  make_call(self._wait_for, (wait, awaited), None, self.context))
            raise

    def _finish(self, value, error):
        self.finished, self.value, self.error = True, value, error
        callbacks, self.callbacks = self.callbacks, None
        for callback in callbacks:
            callback(self)

    def add_done_callback(self, callback):
        """Call `callback(self)` once the coroutine has ended."""
        if self.finished:
            callback(self)
        else:
            self.callbacks.append(callback)

    def done(self):
        """Tell whether the coroutine has ended."""
        return self.finished

    def cancel(self):
        """Close the coroutine, if it has not ended."""
        if not self.finished:
            self.finished = self.dropped = True
            self.callbacks = None
            self.steps.close()

    def cancelled(self):
        """Tell whether it was closed, or ended by what is no Exception."""
        return self.dropped

    def result(self):
        """Return what the coroutine returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self.value


@cython.final
@cython.internal
cdef class _Sync:
    """One call of run_sync."""

    cdef IOLoop loop
    cdef object func, future, value, error
    cdef bint begun, done, expired, over

    def __cinit__(self, IOLoop loop not None, func):
        self.loop, self.func = loop, func

    def run(self):
        if self.over:
            return
        self.begun = True
        try:
            self.value = self.func()
            self.future = _as_future(self.loop, self.value)
            if self.future is not None:
                return self.loop.add_future(self.future, self.finish)
        except Exception as error:
            self.error = error
        self.done = True
        self.loop.stop()

    def finish(self, future):
        if self.over:
            return
        try:
            self.value = future.result()
        except Exception as error:
            self.error = error
        self.done = True
        self.loop.stop()

    def expire(self):
        self.expired = True
        self.loop.stop()

    def give_up(self):
        self.over = True
        try:
            if has(self.future, "cancel"):
                self.future.cancel()
        except Exception:
            _report(self.loop, self.func)

    def outcome(self, timeout):
        if self.error is not None:
            raise self.error
        if self.done:
            return self.value
        self.give_up()
        if self.expired:
            raise TimeoutError(f"no result after {timeout} seconds")
        raise RuntimeError("IOLoop was stopped before the function was done")


cdef object _run_sync(IOLoop loop, object func, object timeout):
    cdef _Sync call = _Sync(loop, func)
    cdef object handle = None
    cdef object queued = make_call(call.run, None, None, capture_context())
    try:
        if timeout is not None:
            handle = loop.call_later(timeout, call.expire)
        _push(loop.queue, queued)
        loop.start()
    except BaseException:
        call.give_up()
        raise
    finally:
        if not call.begun:
            _take_back(loop.queue, queued)
        if handle is not None and loop.opened:
            loop.remove_timeout(handle)
    return call.outcome(timeout)


# -- Callback queue ------------------------------------------------------------
#
# Python's callbacks are in a ring of calls.  A call is the callable itself, or a
# _Call where it has arguments or a context.  The ring is a list, so that the
# garbage collector sees what is in it.
#
# What other threads need without the GIL is the door: their own queue of C
# callbacks, and the doorbell, a pipe that wakes the loop.  A C callback carries
# the number of Python callbacks queued before it, which puts the two in order.
#
# No Python code can run while the ring changes or the door's lock is held:
# whatever allocates or drops a reference does it before or after.

cdef struct _Post:
    ioloop_callback_v1 function
    void *arg
    uint64_t after          # how many of Python's callbacks go first

cdef struct _Door:
    pthread_mutex_t lock    # in the list of those that a fork takes
    _Door *next
    _Post *posts            # a ring
    uint64_t head, tail, capacity
    uint64_t queued         # Python's callbacks so far
    int reader, writer      # the doorbell
    int asleep              # the loop waits or is about to
    int rung                # and somebody has rung
    int closed

cdef enum:
    RING = 64               # callbacks that fit from the start
    SPACIOUS = 1024         # callbacks, or timeouts, for which there may be room


@cython.final
@cython.internal
cdef class _Queue:
    """Callbacks in order, and the doorbell that says that there are some."""

    cdef list ring
    cdef uint64_t head, tail, mask      # of callbacks: taken, added, room - 1
    cdef _Door *door

    def __cinit__(self):
        self.ring = [None] * RING
        self.mask = RING - 1
        self.door = <_Door *>calloc(1, sizeof(_Door))
        if self.door == NULL:
            raise MemoryError
        self.door.reader = self.door.writer = -1
        pthread_mutex_init(&self.door.lock, NULL)
        _list_door(self.door, True)
        _open_door(self.door)

    def __dealloc__(self):
        if self.door != NULL:
            _close_door(self.door)
            _list_door(self.door, False)
            pthread_mutex_destroy(&self.door.lock)
            free(self.door.posts)
            free(self.door)


@cython.final
@cython.internal
cdef class _Call:
    """A callable, with what it is called with and in."""

    cdef object callback, context
    cdef tuple args
    cdef dict kwargs


cdef inline object make_call(object callback, object args, dict kwargs, object context):
    """A call; None for arguments or a context that it has not."""
    cdef _Call call
    if args is None and context is None and not kwargs:
        return callback
    call = _Call.__new__(_Call)
    call.callback, call.context, call.kwargs = callback, context, kwargs or None
    call.args = () if args is None else <tuple>args
    return call


cdef inline int _queue_call(IOLoop loop, object callback, object args, dict kwargs,
                            object context) except -1:
    _check_open(loop)
    require_callable(callback)
    return _push(loop.queue, make_call(callback, args, kwargs, context))


cdef inline uint64_t _count_run(_Queue queue) noexcept:
    return queue.head + load64(&queue.door.head)


cdef inline uint64_t _pending(_Queue queue) noexcept:
    return (queue.tail - queue.head) + (load64(&queue.door.tail) - queue.door.head)


cdef inline int _push(_Queue queue, object call) except -1:
    """Queue a call; wake the loop if it sleeps."""
    while queue.tail - queue.head > queue.mask:
        _resize_ring(queue, 2 * (queue.mask + 1))
    put(queue.ring, <Py_ssize_t>(queue.tail & queue.mask), call)
    queue.tail += 1
    store64(&queue.door.queued, queue.tail)
    if load(&queue.door.asleep):
        try:
            _wake(queue)
        except OSError:
            _take_back(queue, call)
            raise


cdef int _take_back(_Queue queue, object call) except -1:
    """Undo the last _push: the caller is told that it failed."""
    cdef Py_ssize_t last
    last = <Py_ssize_t>((queue.tail - 1) & queue.mask)
    if queue.tail > queue.head and peek(queue.ring, last) == <PyObject *>call:
        queue.tail -= 1
        take(queue.ring, last)


cdef int _resize_ring(_Queue queue, uint64_t room) except -1:
    """Give the ring room for so many calls, a power of two."""
    # The allocation may collect garbage, and that may queue callbacks.
    cdef list ring = [None] * <Py_ssize_t>room, old
    cdef uint64_t n
    old, n = queue.ring, queue.head
    if queue.tail - n <= room:
        while n != queue.tail:
            put(ring, <Py_ssize_t>(n & (room - 1)),
                take(old, <Py_ssize_t>(n & queue.mask)))
            n += 1
        queue.ring, queue.mask = ring, room - 1


cdef inline int _shrink_queue(_Queue queue) except -1:
    """Give half of the ring back, if it is large and hardly used."""
    if queue.mask >= SPACIOUS and queue.tail - queue.head < queue.mask // 8:
        try:
            _resize_ring(queue, (queue.mask + 1) // 2)
        except MemoryError:
            pass


cdef int c_post(ioloop_door_v1 *opaque, ioloop_callback_v1 function,
                void *arg) noexcept nogil:
    """Queue a C callback; 0 or an errno."""
    cdef _Door *door = <_Door *>opaque
    cdef int error = 0
    cdef _Post *slot
    cdef uint64_t number = 0
    if function == NULL:
        return EINVAL
    pthread_mutex_lock(&door.lock)
    if door.closed:
        error = ESHUTDOWN
    elif door.tail - door.head == door.capacity and not _grow_posts(door):
        error = ENOMEM
    else:
        slot = &door.posts[door.tail & (door.capacity - 1)]
        slot.function, slot.arg, slot.after = function, arg, load64(&door.queued)
        number = door.tail
        store64(&door.tail, number + 1)
    pthread_mutex_unlock(&door.lock)
    if error:
        return error
    fence()
    error = _ring(door)
    if error:
        pthread_mutex_lock(&door.lock)
        if door.tail == number + 1 and door.head <= number:
            store64(&door.tail, number)
        pthread_mutex_unlock(&door.lock)
    return error


cdef bint _grow_posts(_Door *door) noexcept nogil:
    cdef uint64_t room = 2 * door.capacity if door.capacity else 64
    cdef uint64_t n = door.head
    cdef _Post *posts = <_Post *>malloc(room * sizeof(_Post))
    if posts == NULL:
        return False
    while n != door.tail:
        posts[n & (room - 1)] = door.posts[n & (door.capacity - 1)]
        n += 1
    free(door.posts)
    door.posts, door.capacity = posts, room
    return True


# -- Waker and signals ----------------------------------------------------------
#
# A pipe used as a doorbell: nobody cares what is in it, only that there is
# something.  It is rung at most once until the loop has answered, and only
# while the loop sleeps or is about to.
#
# While the loop runs in the main thread, the pipe is Python's signal wakeup fd too,
# so that a signal ends the poll, whichever thread the kernel gave it to.  The byte
# that rings is 0, any other is the number of a signal: it is passed on to the fd
# that would have got it without the loop.

cdef int _open_door(_Door *door) except -1:
    """Make the pipe, anew in a forked child."""
    cdef int fds[2]
    check(open_pipe(fds))
    _close_bell(door)
    try:
        door.reader = above_stdio(fds[0])
    except BaseException:
        close(fds[1])
        raise
    door.writer = above_stdio(fds[1])
    door.rung = door.closed = 0


cdef void _close_door(_Door *door) noexcept nogil:
    """Nobody rings, or posts, from now on."""
    pthread_mutex_lock(&door.lock)
    door.closed = 1
    _close_bell(door)
    door.head = door.tail
    pthread_mutex_unlock(&door.lock)


cdef void _close_bell(_Door *door) noexcept nogil:
    if door.reader >= 0:
        close(door.reader)
    if door.writer >= 0:
        close(door.writer)
    door.reader = door.writer = -1


cdef int _ring(_Door *door) noexcept nogil:
    """Wake the loop if it sleeps; 0 or an errno, and leave errno alone."""
    cdef int saved = errno, error = 0
    if not load(&door.asleep) or swap(&door.rung, 1):
        return 0
    pthread_mutex_lock(&door.lock)
    if not door.closed:
        while door.writer >= 0 and write(door.writer, b"\0", 1) == -1:
            if errno != EINTR:
                error = 0 if errno == EAGAIN else errno  # full: it is rung
                break
    if error:
        store(&door.rung, 0)
    pthread_mutex_unlock(&door.lock)
    (&errno)[0] = saved
    return error


cdef int _wake(_Queue queue) except -1:
    cdef int error = _ring(queue.door)
    if error:
        raise OSError(error, "the IOLoop sleeps and can't be woken: "
                      + os.strerror(error))


cdef int _doze(IOLoop loop) noexcept:
    """Between iterations: somebody else may poll our fileno()."""
    store(&loop.queue.door.asleep, loop.embedded)
    fence()
    if loop.embedded and (_pending(loop.queue) or loop.poller.kept):
        _ring(loop.queue.door)


cdef int _on_doorbell(object loop, int fd, uint32_t events, void *arg) except -1:
    """Empty the pipe, and pass on what is not ours."""
    cdef object host = (<IOLoop>loop).outer
    cdef int outer = (<IOLoop>loop).outer_wakeup
    cdef unsigned char buffer[512]
    cdef ssize_t n = sizeof(buffer), i, count
    while n == sizeof(buffer):
        n, count = read(fd, buffer, sizeof(buffer)), 0
        for i in range(n):
            if buffer[i]:
                (<IOLoop>loop).alarms += buffer[i] == SIGALRM
                buffer[count] = buffer[i]
                count += 1
        if count and outer >= 0:
            write(outer, buffer, count)  # lost if that is full, as ever
            if isinstance(host, IOLoop) and (<IOLoop>host).queue.door.writer == outer:
                _on_doorbell(host, (<IOLoop>host).queue.door.reader, READ, NULL)
    # First empty, then ready to be rung again: the queue is looked at after.
    store(&(<IOLoop>loop).queue.door.rung, 0)


cdef int _add_doorbell(IOLoop loop) except -1:
    return _add_handler(loop, loop.queue.door.reader, READ, _on_doorbell, NULL,
                        _Handler.__new__(_Handler, loop.queue, None, None))


cdef int _take_wakeup_fd(IOLoop loop) except -1:
    try:
        # Whether the one before was to warn of a full buffer can't be known.
        loop.outer_wakeup = _signal.set_wakeup_fd(
            loop.queue.door.writer, warn_on_full_buffer=False)
    except ValueError:
        return 0  # not the main thread, which is the one that gets signals
    loop.has_wakeup_fd = True
    if loop.outer_wakeup == loop.queue.door.writer:
        loop.outer_wakeup = -1  # somebody kept ours from an earlier run


cdef bint _keep_wakeup_fd(IOLoop loop) except -1:
    """Take it again from whoever has set another, who is served from now on."""
    cdef int found
    if not loop.has_wakeup_fd:
        return False
    found = _swap_wakeup_fd(loop.queue.door.writer)
    if found == loop.queue.door.writer:
        return False
    loop.outer_wakeup = found
    return True


cdef int _give_wakeup_fd(IOLoop loop) except -1:
    """Set what was there before, or what somebody has set since."""
    cdef int found = _swap_wakeup_fd(loop.outer_wakeup)
    loop.has_wakeup_fd = False
    if found != loop.queue.door.writer:
        loop.outer_wakeup = found
        _swap_wakeup_fd(found)
    _on_doorbell(loop, loop.queue.door.reader, READ, NULL)


cdef int _swap_wakeup_fd(int fd) except? -2:
    """Set it if it is open; return the one before, which nothing else tells."""
    for _ in range(2):
        try:
            return _signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
        except (OSError, ValueError):
            fd = -1
        except MemoryError:
            pass
    return _signal.set_wakeup_fd(fd)


# -- Timeouts ------------------------------------------------------------------
#
# Three arrays of one length, and a handle for the user:
#
#   heap      pairs of a deadline and a handle, with four children to a node, in the
#             order of (deadline, adding); it owns the handles.  At its other end
#             are the late ones: added in step 2, they have to wait for the next.
#   calls     what to call: a list, so that the garbage collector sees it
#   spare     the slots of `calls` that are free, as a stack
#
# A handle refers to no Python object, so it costs the garbage collector nothing.
# It knows its slot, and its index in the heap: it is removed in O(log n), for good.
#
# Deadlines are nanoseconds on the loop's clock: CLOCK_MONOTONIC, or time_func.
# INT64_MAX is never.

cdef enum:
    CLOCK_IS_SET = 10000    # the wall clock is, if it jumps by so many nanoseconds
    WALL = -1               # the slot of a dead timeout whose time() is the wall clock

cdef struct _Entry:
    int64_t deadline
    PyObject *timeout


@cython.internal
@cython.final
cdef class _Timers:
    """The heap, and the clock that it is kept by."""

    cdef object time_func           # None: the monotonic clock
    cdef _Queue queue               # whose doorbell tells of a new nearest timeout
    cdef list calls
    cdef _Entry *heap
    cdef int *spare
    cdef Py_ssize_t count           # timeouts in the heap
    cdef Py_ssize_t spares          # free slots
    cdef Py_ssize_t room            # slots
    cdef int64_t added
    cdef uint64_t fired
    cdef int64_t wall_offset        # of the wall clock, as long as nobody sets it
    cdef unsigned long thread       # as in IOLoop
    cdef bint passing               # step 2 runs
    cdef int64_t pass_time          # its sample of the clock
    cdef Py_ssize_t lates           # timeouts that it must not run
    cdef bint closed

    def __cinit__(self, _Queue queue not None, time_func):
        self.queue, self.time_func = queue, time_func
        self.calls = []

    def __dealloc__(self):
        cdef Py_ssize_t i
        _add_late(self)
        for i in range(self.count):
            (<_Timeout>self.heap[i].timeout).timers = NULL
            Py_XDECREF(self.heap[i].timeout)
        free(self.heap)
        free(self.spare)


@cython.final
cdef class _Timeout:
    """A handle of `add_timeout`, which is where it comes from."""

    cdef PyObject *timers           # where it is; NULL: it has run or was cancelled
    cdef int64_t stamp              # the order of adding; the deadline of a dead one
    cdef int index
    cdef int slot                   # of a dead one: WALL, or 0 with a time_func

    def __init__(self):
        raise TypeError("a timeout is made by IOLoop.add_timeout()")

    def cancel(self):
        """Cancel the timeout; does nothing if it has run or was cancelled.

        Loop thread only.
        """
        if self.timers != NULL:
            _check_owner(<_Timers>self.timers)
            _cancel(self)

    @property
    def callback(self):
        """The callable, or None once the timeout has run or was cancelled."""
        if self.timers == NULL or (<_Timers>self.timers).calls is None:
            return None
        call = (<_Timers>self.timers).calls[self.slot]
        return (<_Call>call).callback if type(call) is _Call else call

    @property
    def deadline(self):
        """The time in seconds on the clock of the loop's `time()`."""
        cdef _Timers timers
        if self.timers == NULL:
            return as_seconds(self.stamp, _measure_offset() if self.slot == WALL else 0)
        timers = <_Timers>self.timers
        return as_seconds(timers.heap[self.index].deadline,
                          _wall_offset(timers) if timers.time_func is None else 0)

    def __repr__(self):
        state = "dead" if self.timers == NULL else f"at {self.deadline:.6f}"
        return f"<ioloop._Timeout {state}>"


cdef int _check_owner(_Timers timers) except -1:
    if timers.thread != 0 and timers.thread != get_thread():
        raise RuntimeError("IOLoop runs in another thread, "
                           "and a timeout is not thread-safe")


# The clock

cdef inline int64_t _now(_Timers timers) except? -1:
    if timers.time_func is None:
        return monotonic()
    return nanoseconds(timers.time_func(), False)


cdef int64_t _deadline(_Timers timers, object when) except? -1:
    """A time on the clock of time(), or a timedelta, as nanoseconds of ours."""
    cdef int64_t target
    if type(when) is not float and has(when, "total_seconds"):
        return later(_now(timers), nanoseconds(when.total_seconds(), True))
    target = nanoseconds(when, True)
    if timers.time_func is not None or target == INT64_MAX or target == INT64_MIN:
        return target
    return later(target, -_wall_offset(timers))


cdef int64_t _delay(_Timers timers, object seconds) except? -1:
    cdef int64_t delay = nanoseconds(seconds, True)
    return later(_now(timers), delay)


cdef inline double as_seconds(int64_t deadline, int64_t offset) noexcept:
    """The reverse."""
    return (<double>later(deadline, offset) / SECOND if deadline != INT64_MAX
            else HUGE_VAL)


cdef int64_t _wall_offset(_Timers timers) noexcept:
    """How far the wall clock is ahead of the monotonic one.

    The same as before unless the clock was set, so that equal deadlines stay equal.
    """
    cdef int64_t wall = _read_clock(CLOCK_REALTIME)
    cdef int64_t offset = wall - monotonic()
    if not -CLOCK_IS_SET < offset - timers.wall_offset < CLOCK_IS_SET:
        offset = _measure_offset()  # as it is, if there was a pause in between
        if not -CLOCK_IS_SET < offset - timers.wall_offset < CLOCK_IS_SET:
            timers.wall_offset = offset
    return timers.wall_offset


cdef int64_t _measure_offset() noexcept:
    """By the quickest of some samples; rather too small: then deadlines get later."""
    cdef int64_t before, wall, after, offset = 0, shortest = INT64_MAX
    for _ in range(5):
        before = monotonic()
        wall = _read_clock(CLOCK_REALTIME)
        after = monotonic()
        if after - before < shortest:
            shortest, offset = after - before, wall - after
    return offset


# Adding and removing

ctypedef int64_t (*_clock_function)(_Timers timers, object when) except? -1


cdef inline _Timeout _time_call(IOLoop loop, object when, _clock_function clock,
                                object callback, object args, dict kwargs):
    cdef int64_t deadline
    _check_thread(loop)
    require_callable(callback)
    deadline = clock(loop.timers, when)
    _check_thread(loop)  # a hostile __float__ or time_func may have closed it
    return _new_timeout(loop.timers, deadline,
                        make_call(callback, args, kwargs, capture_context()))


cdef inline _Timeout _new_timeout(_Timers timers, int64_t deadline, object call):
    cdef _Timeout timeout = _Timeout.__new__(_Timeout)
    _arm(timers, timeout, deadline, call)
    return timeout


cdef int _arm(_Timers timers, _Timeout timeout, int64_t deadline,
              object call) except -1:
    """Put a dead timeout into the heap, or aside if this pass is not its."""
    cdef _Entry entry
    while timers.spares == 0:
        _grow_timers(timers)
    # From here on nothing can run that would use up what is spare.
    timers.spares -= 1
    timeout.slot = timers.spare[timers.spares]
    put(timers.calls, timeout.slot, call)
    timeout.timers = <PyObject *>timers
    timeout.stamp = timers.added
    timers.added += 1
    entry.deadline, entry.timeout = deadline, <PyObject *>timeout
    Py_INCREF(timeout)
    if timers.passing and deadline <= timers.pass_time:
        timers.lates += 1
        _place(timers.heap, timers.room - timers.lates, entry)
        return 0
    timers.count += 1
    _sift_up(timers.heap, timers.count - 1, entry)
    return _tell_nearer(timers, timeout)


cdef inline int _tell_nearer(_Timers timers, _Timeout timeout) except -1:
    """Wake whoever polls our fileno(), and knows of a later timeout or none."""
    if timeout.index == 0 and load(&timers.queue.door.asleep):
        try:
            _wake(timers.queue)
        except OSError:
            _cancel(timeout)
            raise


cdef void _add_late(_Timers timers) noexcept:
    """After the pass: what it was not to run."""
    cdef _Entry entry
    while timers.lates:
        entry = timers.heap[timers.room - timers.lates]
        timers.lates -= 1
        timers.count += 1
        _sift_up(timers.heap, timers.count - 1, entry)


cdef int _cancel(_Timeout timeout) except -1:
    """Remove a timeout and drop what it refers to, unless it is dead."""
    cdef _Timers timers
    if timeout.timers == NULL:
        return 0
    timers = <_Timers>timeout.timers
    if timers.calls is None:
        return 0  # the garbage collector has been here
    _extract(timers, timeout.index)
    _release(timers, timeout)
    if timers.room > SPACIOUS and timers.room - timers.spares < timers.room // 4:
        try:
            _shrink_timers(timers, timers.room // 2)
        except MemoryError:
            pass  # it is cancelled all the same


cdef inline object _release(_Timers timers, _Timeout timeout):
    """Free the slot of a timeout that has left the heap; return the call."""
    cdef int slot = timeout.slot
    timeout.timers = NULL
    timeout.slot = WALL if timers.time_func is None else 0
    timers.spare[timers.spares] = slot
    timers.spares += 1
    return take(timers.calls, slot)


cdef int _grow_timers(_Timers timers) except -1:
    # The allocation may collect garbage, and that may add and cancel timeouts.
    cdef list more = [None] * (timers.room // 2 + 64)
    cdef Py_ssize_t room = timers.room + len(more), i
    timers.heap = <_Entry *>reallocate(timers.heap, room * sizeof(_Entry))
    timers.spare = <int *>reallocate(timers.spare, room * sizeof(int))
    timers.calls.extend(more)
    for i in range(1, timers.lates + 1):
        _place(timers.heap, room - i, timers.heap[timers.room - i])
    for i in range(room - 1, timers.room - 1, -1):
        timers.spare[timers.spares] = <int>i
        timers.spares += 1
    timers.room = room


cdef int _shrink_timers(_Timers timers, Py_ssize_t room) except -1:
    """Move to fewer slots, unless there are too many timeouts for them."""
    # The allocation may collect garbage, and that may add and cancel timeouts.
    cdef list calls = [None] * room, old
    cdef _Entry *heap = <_Entry *>malloc(room * sizeof(_Entry))
    cdef int *spare = <int *>malloc(room * sizeof(int))
    cdef Py_ssize_t used = 0, i
    if heap == NULL or spare == NULL or timers.room - timers.spares > room:
        free(heap)
        free(spare)
        if heap == NULL or spare == NULL:
            raise MemoryError
        return 0
    old = timers.calls
    for i in range(timers.count):
        heap[i] = timers.heap[i]
        used = _move_call(<_Timeout>heap[i].timeout, old, calls, used)
    for i in range(1, timers.lates + 1):
        _place(heap, room - i, timers.heap[timers.room - i])
        used = _move_call(<_Timeout>heap[room - i].timeout, old, calls, used)
    for i in range(used, room):
        spare[room - 1 - i] = <int>i
    free(timers.heap)
    free(timers.spare)
    timers.heap, timers.spare, timers.calls = heap, spare, calls
    timers.room, timers.spares = room, room - used


cdef inline Py_ssize_t _move_call(_Timeout timeout, list old, list new,
                                  Py_ssize_t slot) noexcept:
    put(new, slot, take(old, timeout.slot))
    timeout.slot = <int>slot
    return slot + 1


# The heap itself.  `_sift_*` put an entry, for which `index` is free, in its place.

cdef _Timeout _extract(_Timers timers, Py_ssize_t index):
    """Take a timeout out of the heap; its slot is still its own."""
    cdef _Timeout timeout = <_Timeout>timers.heap[index].timeout
    cdef _Entry last
    Py_DECREF(timeout)
    timeout.stamp = timers.heap[index].deadline
    if index >= timers.count:  # a late one
        _place(timers.heap, index, timers.heap[timers.room - timers.lates])
        timers.lates -= 1
        return timeout
    timers.count -= 1
    if index != timers.count:
        last = timers.heap[timers.count]
        _sift(timers.heap, timers.count, index, last)
    return timeout


cdef inline bint _precedes(_Entry *one, _Entry *other) noexcept:
    if one.deadline != other.deadline:
        return one.deadline < other.deadline
    return (<_Timeout>one.timeout).stamp < (<_Timeout>other.timeout).stamp


cdef inline void _place(_Entry *heap, Py_ssize_t index, _Entry entry) noexcept:
    heap[index] = entry
    (<_Timeout>entry.timeout).index = <int>index


cdef inline void _sift(_Entry *heap, Py_ssize_t count, Py_ssize_t index,
                       _Entry entry) noexcept:
    if index and _precedes(&entry, &heap[(index - 1) >> 2]):
        _sift_up(heap, index, entry)
    else:
        _sift_down(heap, count, index, entry)


cdef void _sift_up(_Entry *heap, Py_ssize_t index, _Entry entry) noexcept:
    cdef Py_ssize_t parent
    while index > 0:
        parent = (index - 1) >> 2
        if not _precedes(&entry, &heap[parent]):
            break
        _place(heap, index, heap[parent])
        index = parent
    _place(heap, index, entry)


cdef void _sift_down(_Entry *heap, Py_ssize_t count, Py_ssize_t index,
                     _Entry entry) noexcept:
    cdef Py_ssize_t child = 4 * index + 1, best, sibling
    while child < count:
        best = child
        for sibling in range(child + 1, min(child + 4, count)):
            if _precedes(&heap[sibling], &heap[best]):
                best = sibling
        if _precedes(&entry, &heap[best]):
            break
        _place(heap, index, heap[best])
        index = best
        child = 4 * index + 1
    _place(heap, index, entry)


# -- PeriodicCallback ----------------------------------------------------------

cdef class PeriodicCallback(_Referable):
    """PeriodicCallback(callback, callback_time, io_loop=None, jitter=0)

    Call `callback()` every `callback_time` milliseconds (or `timedelta`).

    The first call is one period after `start()`, later ones (without jitter) a
    whole number of periods after the first: the period does not drift, and what
    a slow callback missed is left out.  A callback that returns a coroutine or a
    future is not called again before that is done, or stop() and start() are
    called.  Whatever is raised, the calls go on.  `jitter` is the fraction of the
    period by which it varies at random.  Raises ValueError for a period that is
    not positive.  Loop thread only.  Source: Tornado.
    """

    cdef dict __dict__
    cdef public object callback
    cdef readonly double jitter             # a fraction
    cdef readonly IOLoop io_loop
    cdef double milliseconds
    cdef _Timeout timeout                   # the next tick
    cdef object awaited                     # the future of the last one, until done
    cdef bint on
    cdef int64_t due                        # when the next tick is, or the last was

    def __init__(self, callback, callback_time, io_loop=None, jitter=0):
        require_callable(callback)
        if not 0 <= jitter <= 2:
            raise ValueError(f"jitter is a fraction of the period, not {jitter!r}")
        self.callback = callback
        self.callback_time = callback_time
        self.jitter = jitter
        self.io_loop = IOLoop.current() if io_loop is None else io_loop

    @property
    def callback_time(self):
        """The period in milliseconds; a new one holds from the next call on."""
        return self.milliseconds

    @callback_time.setter
    def callback_time(self, period):
        cdef double ms = (period.total_seconds() * 1e3 if has(period, "total_seconds")
                          else period)
        if not ms > 0 or nanoseconds(ms / 1e3, True) < 1:
            raise ValueError(f"a period must be positive, not {period!r}")
        self.milliseconds = ms

    def start(self):
        """Start calling; does nothing if it has been started.

        Raises RuntimeError from the wrong thread or for a closed loop.
        """
        if self.io_loop is None:
            raise RuntimeError("PeriodicCallback is not initialised")
        _check_thread(self.io_loop)
        if not self.on:
            self.due = _now(self.io_loop.timers)
            _schedule(self, later(self.due, _period(self)))

    def stop(self):
        """Stop calling; `start()` starts afresh.  Loop thread only."""
        if self.on:
            _check_owner(self.io_loop.timers)
            if self.timeout is not None:
                _cancel(self.timeout)
        self.on = False
        self.timeout = self.awaited = None

    def is_running(self):
        """Tell whether `start()` has been called, and `stop()` not since.

        Any thread.
        """
        return self.on

    def _tick(self):
        """Call the callback, and set the next tick when it is done."""
        self.timeout = None
        try:
            future = _as_future(self.io_loop, self.callback())
            if future is not None:
                if self.on and self.timeout is None:  # not stopped, nor started again
                    self.awaited = future
                future.add_done_callback(partial(
                    _relay, self.io_loop, partial(self._done, future),
                    capture_context()))
        except BaseException as error:
            self.awaited = None
            if not isinstance(error, Exception):
                raise
            _report(self.io_loop, self.callback)
        finally:
            if self.awaited is None:
                _next_tick(self)

    def _done(self, awaited, future):
        try:
            _conclude(self.io_loop, self.callback, None, None, future)
        finally:
            if self.awaited is awaited:
                self.awaited = None
                _next_tick(self)


cdef int64_t _period(PeriodicCallback periodic) except -1:
    """The next period in nanoseconds."""
    cdef double seconds = periodic.milliseconds / 1e3
    if periodic.jitter:
        import random
        seconds *= 1 + periodic.jitter * (random.random() - 0.5)
    return max(1, nanoseconds(seconds, True))


cdef int _schedule(PeriodicCallback periodic, int64_t due) except -1:
    periodic.on = False  # should this fail
    periodic.timeout = _new_timeout(
        periodic.io_loop.timers, due,
        make_call(periodic._tick, None, None, capture_context()))
    periodic.due = due
    periodic.on = True


cdef int _next_tick(PeriodicCallback periodic) except -1:
    """Set the first tick that is still to come, however many were missed."""
    cdef int64_t now, due = periodic.due
    cdef int64_t period = nanoseconds(periodic.milliseconds / 1e3, True)
    if not periodic.on or periodic.timeout is not None or not periodic.io_loop.opened:
        return 0
    try:
        period = _period(periodic)
        now = _now(periodic.io_loop.timers)
        if now > due:
            due = later(due, (now - due) // period * period)
    finally:  # also if a time_func fails
        if periodic.on and periodic.timeout is None:  # still
            _schedule(periodic, later(due, period))


# -- Handlers ------------------------------------------------------------------
#
# What the loop knows of a file descriptor is in two tables, indexed by it: the
# numbers that decide about an event in an array of slots, the Python objects in
# a list.  Each registration has a generation, which the poller gives back with
# its events: an event is for that registration or for nobody.

cdef struct _Slot:
    uint32_t generation         # 0: no registration
    uint32_t events
    bint muted                  # the poller watches for none of them for now,
    bint lost                   # or not at all: the fd was closed
    uint32_t ended              # the batch in which the last registration ended
    ioloop_handler_v1 function  # of the C-level door, or NULL
    void *arg


@cython.final
@cython.internal
cdef class _Handler:
    """What add_handler was given; `callback` is the owner of a C-level one."""

    cdef object file, callback, context
    cdef int number             # the fd
    cdef object pending         # the coroutine or future that it returned, until done
    cdef bint paused, warned    # an event waits for that; and this was logged

    def __cinit__(self, file, callback, context):
        self.file, self.callback, self.context = file, callback, context


@cython.final
@cython.internal
cdef class _Table:
    """The registrations by file descriptor."""

    cdef _Slot *slots
    cdef list handlers          # of _Handler or None
    cdef Py_ssize_t size, count
    cdef uint32_t generation    # the last one given
    cdef uint32_t batch         # number of the poll whose events are delivered

    def __cinit__(self):
        self.handlers = []
        self.batch = 1

    def __dealloc__(self):
        free(self.slots)


cdef inline _Slot *_slot(_Table table, int fd) noexcept:
    """The slot of a registered fd, or NULL."""
    if 0 <= fd < table.size and table.slots[fd].generation != 0:
        return &table.slots[fd]
    return NULL


cdef int _add_handler(IOLoop loop, int fd, uint32_t events, ioloop_handler_v1 function,
                      void *arg, _Handler handler) except -1:
    cdef _Table table = loop.table
    cdef _Slot *slot = _slot(table, fd)
    cdef uint32_t generation = table.generation + 1 or 1
    cdef bint replaced = slot != NULL, added = False
    if slot != NULL and (
            fd == loop.queue.door.reader or not loop.poller.has_lost(fd)):
        raise FileExistsError(EEXIST, f"fd {fd} has a handler already")
    try:
        loop.poller.add(fd, events, generation)
        added = True
        _reserve(table, <Py_ssize_t>fd + 1)
    except BaseException:
        if added or not loop.poller.foreign:
            loop.poller.drop(fd)
        raise
    if _slot(table, fd) == NULL:
        table.count += 1
    elif not replaced:
        # By a destructor, while the tables grew: the poller knows that one now.
        raise FileExistsError(EEXIST, f"fd {fd} has a handler already")
    table.generation = generation
    slot = &table.slots[fd]
    slot.ended = table.batch
    slot.generation, slot.events = generation, events
    slot.muted = slot.lost = False
    slot.function, slot.arg = function, arg
    handler.number = fd
    table.handlers[fd] = handler


cdef int _update_handler(IOLoop loop, int fd, uint32_t events) except -1:
    cdef _Slot *slot = _slot(loop.table, fd)
    cdef _Handler handler
    if slot == NULL or fd == loop.queue.door.reader:
        raise FileNotFoundError(ENOENT, f"fd {fd} has no handler")
    handler = <_Handler>peek(loop.table.handlers, fd)
    if not handler.paused:
        loop.poller.modify_(fd, events, slot.generation)
    slot = _slot(loop.table, fd)  # a Python poller may have done anything
    if slot != NULL:
        slot.events = events
        slot.muted, slot.lost = handler.paused, False


cdef int _remove_handler(IOLoop loop, int fd) except -1:
    cdef bint known = _slot(loop.table, fd) != NULL
    cdef object handler = _forget(loop.table, fd)
    if known:
        loop.poller.drop(fd)
    del handler  # not earlier: its destructor may add one for the same fd


# A handler is not called again before the coroutine that it returned is done.

cdef bint _pause_handler(IOLoop loop, _Handler handler) except -1:
    """Tell whether an event has to wait, and see to it that it is not reported."""
    cdef _Slot *slot
    try:
        if has(handler.pending, "done") and handler.pending.done():
            return False
    except Exception:
        _report(loop, handler.callback)
    except BaseException:
        handler.paused = True  # so that the event is asked for again
        raise
    slot = _handler_slot(loop, handler)
    if slot != NULL:
        handler.paused = slot.muted = True
        try:
            loop.poller.modify_(handler.number, 0, slot.generation)
        except OSError:
            loop.poller.drop(handler.number)  # it was closed, most likely
    if not handler.warned:
        handler.warned = True
        _warn(loop, f"the handler of fd {handler.number} returned a coroutine or "
              "future and is not called again before that is done")
    return True


cdef _Slot *_handler_slot(IOLoop loop, _Handler handler) noexcept:
    """Its slot, or NULL if it was removed."""
    cdef _Slot *slot = _slot(loop.table, handler.number)
    if slot == NULL or peek(loop.table.handlers, handler.number) != <PyObject *>handler:
        return NULL
    return slot


cdef int _resume_handler(IOLoop loop, _Handler handler) except -1:
    cdef _Slot *slot = _handler_slot(loop, handler)
    handler.paused = False
    if slot != NULL:
        slot.muted = False
        if not loop.forked:  # else reinit() does it
            try:
                loop.poller.drop(handler.number)
                loop.poller.add(handler.number, slot.events, slot.generation)
            except OSError:
                pass  # it was closed


cdef object _forget(_Table table, int fd):
    """Take a registration out of the tables; return its handler, or None."""
    cdef _Slot *slot = _slot(table, fd)
    cdef object handler = None
    if slot != NULL:
        slot.generation = 0
        slot.ended = table.batch
        table.count -= 1
        handler = take(table.handlers, fd)
    return handler


cdef int _reserve(_Table table, Py_ssize_t size) except -1:
    """Make the tables that long, at least."""
    cdef list more
    cdef Py_ssize_t room
    while table.size < size:
        more = [None] * (max(size, 2 * table.size, 32) - table.size)
        # That may have collected garbage, and that added handlers: count from here.
        room = table.size + len(more)
        table.slots = <_Slot *>reallocate(table.slots, room * sizeof(_Slot))
        memset(&table.slots[table.size], 0, len(more) * sizeof(_Slot))
        table.handlers.extend(more)
        table.size = room


cdef list _registrations(IOLoop loop):
    """Pairs of fd and _Handler, without the doorbell."""
    return [(fd, handler) for fd, handler in enumerate(loop.table.handlers)
            if handler is not None and fd != loop.queue.door.reader]


cdef int _close_file(object file) except -1:
    if isinstance(file, int):
        if close(fd_number(file)) == -1 and errno != EBADF:
            PyErr_SetFromErrno(OSError)
        return 0
    try:
        file.close()
    except OSError as error:
        if error.errno != EBADF:
            raise


cdef int _registered_number(_Table table, object file) except -2:
    """The fd that `file` is registered as, or -1; whatever its fileno() does."""
    cdef _Handler handler
    cdef object error = None
    cdef int number = -1
    try:
        number = fd_number(file)
    except (OSError, OverflowError, ValueError):
        pass  # as of a closed file
    except Exception as raised:
        error = raised
    if not isinstance(file, int) and (
            _slot(table, number) == NULL or
            (<_Handler>peek(table.handlers, number)).file is not file):
        for handler in table.handlers:
            if handler is not None and handler.file is file:
                return handler.number
    if error is not None:
        raise error
    return number if _slot(table, number) != NULL else -1


cdef int _keep_events(IOLoop loop, int first, int n) except -1:
    """Keep what is not delivered yet and the poller would not report again."""
    cdef _Poller poller = loop.poller
    cdef _Slot *slot
    cdef int i
    poller.kept = 0
    for i in range(first, n):
        slot = _slot(loop.table, poller.ready[i].fd)
        if slot != NULL and (poller.foreign or slot.events & (EDGE | ONESHOT)):
            poller.ready[poller.kept] = poller.ready[i]
            poller.kept += 1


# An epoll set may hold what has no registration: an fd was closed before it was
# removed, while a duplicate of it lives on.  Nothing can remove it but a new set.

cdef int _renew_poller(IOLoop loop) except -1:
    """Build the poller's set anew, at most ten times a second."""
    cdef int64_t now = monotonic()
    cdef int fd
    if loop.poller.foreign or (loop.renewed and now - loop.renewed < SECOND // 10):
        return 0
    loop.renewed = now
    for fd in range(<int>loop.table.size):
        if _slot(loop.table, fd) != NULL:
            loop.table.slots[fd].lost = _has_lost(loop.poller, fd)
    try:
        loop.poller.renew(loop.table)
    except OSError:
        return 0  # the old set is as it was, and has one more event to tell
    return _warn(loop, "a file descriptor was closed before remove_handler() while a "
                 "duplicate of it is open; the poller was rebuilt without it")


cdef int _warn(IOLoop loop, str message) except -1:
    try:
        _log().warning(message)
    except Exception as error:
        _unraisable(loop, error)


# -- Pollers -------------------------------------------------------------------
#
# The contract, the same methods in the same order:
#
#   leave     in a forked child: let go of the set, which is the parent's
#   renew     start over with a set of what is registered; else raise and keep the old
#   open_set  make a new set; return its file descriptor
#   enclose   put the set into `outer`, another one that somebody else can watch
#   add       watch an fd for events, and remember its generation
#   modify_   watch it for other events
#   drop      do not watch it; never fails
#   has_lost  tell whether an fd that was added is another open file now
#   wait      fill `ready` with events, each with the generation of its fd, and
#             return how many; ns is 0 (it keeps the GIL), a time or FOREVER; a
#             signal means 0 events and `interrupted`
#   close     free the set; the second time does nothing
#
# Events are READ, WRITE, ERROR and whatever bits the kernel knows besides.  An fd with
# none of them stays in the set, which hears nothing of it, not even a hang-up.

cdef struct _Ready:
    int fd
    uint32_t events
    uint32_t generation


cdef class _Poller(_Referable):
    """What the pollers share: the array of events, and Python's view of them."""

    cdef dict __dict__
    cdef _Ready *ready
    cdef int room               # in it
    cdef int kept               # events at its start not delivered yet
    cdef bint foreign           # a Python object's
    cdef bint taken             # a loop has it
    cdef bint interrupted       # the last wait was, by a signal
    cdef bint oneshot           # it knows ONESHOT
    cdef int handle             # the kernel's, or -1
    cdef int outer              # a set with nothing in it but `handle`, or -1
    cdef dict watched           # a kqueue's fds and their filters
    cdef _Poller witness        # of one that can't tell files apart, or None

    def __cinit__(self, *args):
        self.handle = self.outer = -1
        self.room = 256
        self.ready = <_Ready *>reallocate(NULL, self.room * sizeof(_Ready))

    def __dealloc__(self):
        free(self.ready)
        _close_sets(self)

    def register(self, fd, events):
        """Watch `fd` for `events`."""
        self.add(fd_number(fd), event_mask(events), 0)

    def modify(self, fd, events):
        """Watch `fd` for other events."""
        self.modify_(fd_number(fd), event_mask(events), 0)

    def unregister(self, fd):
        """Do not watch `fd` any more."""
        self.drop(fd_number(fd))

    def poll(self, timeout=-1):
        """Return a list of (fd, events), after `timeout` seconds at the latest.

        A negative timeout waits for ever.
        """
        cdef int64_t ns = FOREVER
        cdef int n
        if timeout is not None and timeout >= 0:
            ns = nanoseconds(timeout, True)
        n = self.wait(ns)
        PyErr_CheckSignals()
        return [(self.ready[i].fd, self.ready[i].events) for i in range(n)]

    def fileno(self):
        """Return a file descriptor that is readable when there are events."""
        if self.handle < 0:
            raise ValueError("the poller is closed")
        if self.outer < 0:
            self.outer = self.open_set()
            try:
                self.enclose()
            except BaseException:
                close(self.outer)
                self.outer = -1
                raise
        return self.outer

    def close(self):
        """Close the poller; does nothing the second time."""
        if self.witness is not None:
            self.witness.close()
        _close_sets(self)

    cdef int leave(self) except -1:
        if self.witness is not None:
            self.witness.leave()
        _close_sets(self)

    cdef int renew(self, _Table table) except -1:
        cdef int old = self.handle
        cdef dict watched = self.watched
        self.handle, self.watched = self.open_set(), {}
        try:
            _fill(self, table)
            if self.outer >= 0:
                self.enclose()
        except BaseException:
            close(self.handle)
            self.handle, self.watched = old, watched
            raise
        if old >= 0:
            close(old)

    # The rest of the contract, for a witness that knows nothing but what is open.

    cdef int open_set(self) except -2: return -1
    cdef int enclose(self) except -1: return 0
    cdef int add(self, int fd, uint32_t events, uint32_t generation) except -1:
        return 0

    cdef int modify_(self, int fd, uint32_t events, uint32_t generation) except -1:
        return 0

    cdef int drop(self, int fd) except -1: return 0
    cdef bint has_lost(self, int fd) except -1: return check(fcntl(fd, F_GETFD)) < 0
    cdef int wait(self, int64_t ns) except -1: return 0


cdef void _close_sets(_Poller poller) noexcept:
    if poller.handle >= 0:
        close(poller.handle)
    if poller.outer >= 0:
        close(poller.outer)
    poller.handle = poller.outer = -1


cdef bint _is_native(object impl) except -1:
    """Tell whether it is a poller of ours, with no method of it overridden."""
    if not isinstance(impl, (_EPoll, _KQueue, _Select)):
        return False
    for name in ("register", "modify", "unregister", "poll"):
        if getattr(type(impl), name) is not getattr(_Poller, name):
            return False
    return True


cdef bint _has_lost(_Poller poller, int fd) except -1:
    """Tell whether the number is no longer that of the open file that was added."""
    cdef int error = 0
    try:
        return poller.has_lost(fd)
    except OSError as raised:
        error = raised.errno
    # Of one that can't be polled, or of none at all; else nobody knows.
    return error == EPERM or fcntl(fd, F_GETFD) == -1


cdef inline int _note(_Poller poller, int n, int fd, uint32_t events,
                      uint32_t generation) except -1:
    """Put the n-th event into the array; return n + 1."""
    if n == poller.room:
        poller.ready = <_Ready *>reallocate(poller.ready, 2 * n * sizeof(_Ready))
        poller.room = 2 * n
    poller.ready[n].fd, poller.ready[n].events = fd, events
    poller.ready[n].generation = generation
    return n + 1


cdef int _fill(_Poller poller, _Table table) except -1:
    """Add all that is registered."""
    cdef _Slot *slot
    cdef int fd
    for fd in range(<int>table.size):
        slot = &table.slots[fd]
        if slot.generation and not slot.lost and not _is_own(poller, fd):
            try:
                poller.add(fd, 0 if slot.muted else slot.events, slot.generation)
            except OSError as error:
                if error.errno not in (EBADF, EPERM):
                    raise
                # It was closed: as if the kernel had dropped it.


cdef bint _is_own(_Poller poller, int fd) noexcept:
    return fd in (poller.handle, poller.outer) or (
        poller.witness is not None and _is_own(poller.witness, fd))


cdef inline timespec as_timespec(int64_t ns) noexcept nogil:
    cdef timespec t
    t.tv_sec, t.tv_nsec = ns // SECOND, ns % SECOND
    return t


cdef object not_pollable(int fd):
    return PermissionError(
        EPERM, f"fd {fd} can't be polled: a regular file, a directory or a device like "
        "/dev/null is always ready; use it from a callback, or from a thread")


# Facts about epoll
#
# - What is registered is the open file description behind the fd.  The kernel
#   drops it when the last duplicate is closed, not when the fd is: hence ENOENT
#   and EEXIST where the fd's number is used again, and events for an fd that is
#   closed.  The 64 bits of data that come back tell which registration it was.
# - ERR and HUP are always reported, even if nothing is asked for; with ONESHOT just
#   once, after which the fd stays in the set, where it is not heard.
# - Regular files get EPERM.
# - epoll_wait counts in milliseconds, epoll_pwait2 (5.11) in nanoseconds, but a
#   seccomp filter may refuse it with EPERM, as an old kernel does with ENOSYS.

cdef class _EPoll(_Poller):
    """The poller on Linux's epoll."""

    cdef epoll_event *buffer
    cdef int buffer_room
    cdef bint coarse            # there is no epoll_pwait2

    def __cinit__(self, *args):
        self.buffer_room = 256
        self.buffer = <epoll_event *>reallocate(
            NULL, self.buffer_room * sizeof(epoll_event))
        self.handle = self.open_set()
        self.oneshot = True

    def __dealloc__(self):
        free(self.buffer)

    cdef int open_set(self) except -2:
        return above_stdio(check(epoll_create1(EPOLL_CLOEXEC)))

    cdef int enclose(self) except -1:
        check(_control(self.outer, EPOLL_CTL_ADD, self.handle, READ, 0))

    cdef int add(self, int fd, uint32_t events, uint32_t generation) except -1:
        if _control(self.handle, EPOLL_CTL_ADD, fd, events, generation) == -1:
            if errno == EPERM:
                raise not_pollable(fd)
            if errno != EEXIST:
                PyErr_SetFromErrno(OSError)
            check(_control(self.handle, EPOLL_CTL_MOD, fd, events, generation))

    cdef int modify_(self, int fd, uint32_t events, uint32_t generation) except -1:
        if _control(self.handle, EPOLL_CTL_MOD, fd, events, generation) == -1:
            if errno != ENOENT:
                PyErr_SetFromErrno(OSError)
            check(_control(self.handle, EPOLL_CTL_ADD, fd, events, generation))

    cdef int drop(self, int fd) except -1:
        _control(self.handle, EPOLL_CTL_DEL, fd, 0, 0)

    cdef bint has_lost(self, int fd) except -1:
        # Only the kernel knows: it lets an fd in only if it does not have it.
        if _control(self.handle, EPOLL_CTL_ADD, fd, 0, 0) == -1:
            if errno == EEXIST:
                return False
            if errno == EPERM:
                raise not_pollable(fd)
            PyErr_SetFromErrno(OSError)
        return self.drop(fd) == 0

    cdef int wait(self, int64_t ns) except -1:
        cdef epoll_event *event
        cdef void *buffer
        cdef int i, count, n = 0
        if self.handle < 0:
            raise ValueError("the poller is closed")
        if ns == 0:
            count = epoll_wait(self.handle, self.buffer, self.buffer_room, 0)
        else:
            with nogil:
                count = _sleep_in_epoll(self, ns)
        self.interrupted = count == -1 and errno == EINTR
        if self.interrupted:
            return 0
        check(count)
        for i in range(count):
            event = &self.buffer[i]
            n = _note(self, n, <int><uint32_t>event.data.u64, event.events,
                      <uint32_t>(event.data.u64 >> 32))
        if count == self.buffer_room:
            buffer = realloc(self.buffer, 2 * count * sizeof(epoll_event))
            if buffer != NULL:  # else the rest of the events comes with the next poll
                self.buffer, self.buffer_room = <epoll_event *>buffer, 2 * count
        return n


cdef inline int _control(int epoll, int op, int fd, uint32_t events,
                         uint32_t generation) noexcept nogil:
    cdef epoll_event event
    memset(&event, 0, sizeof(event))
    event.events = events or ONESHOT
    event.data.u64 = <uint64_t>generation << 32 | <uint32_t>fd
    return epoll_ctl(epoll, op, fd, &event)


cdef int _sleep_in_epoll(_EPoll poller, int64_t ns) noexcept nogil:
    """epoll_wait, in nanoseconds."""
    cdef int room = poller.buffer_room, count
    cdef timespec timeout = as_timespec(max(ns, 0))
    if ns == FOREVER:
        return epoll_wait(poller.handle, poller.buffer, room, -1)
    if not poller.coarse:
        count = epoll_wait_ns(poller.handle, poller.buffer, room, &timeout)
        if count >= 0 or (errno != ENOSYS and errno != EPERM):
            return count
        poller.coarse = True
    ns = min(ns, 1000000 * <int64_t>(INT_MAX - 1))
    return epoll_wait(poller.handle, poller.buffer, room,
                      <int>((ns + 999999) // 1000000))


# Facts about kqueue
#
# - READ and WRITE are two filters with an event each, merged here.  A filter is
#   added or deleted by a change; one change a call, since a failing one may leave
#   those behind it undone.
# - EV_EOF on the READ filter comes with data still unread: it is READ, and the
#   end is where read() says so.  On the WRITE filter it is a refused connection
#   or a reader that has gone: ERROR, and nothing can be written.
# - The kernel drops the filters of an fd that is closed: to enable or disable one fails
#   with ENOENT then, which tells that it was lost.  So each fd has a filter, which is
#   disabled where no event is asked for.
# - A kqueue is not inherited by a forked child.
# - Regular files are accepted and always ready; refused here, as by epoll.

cdef enum:
    DISABLED = 1 << 29          # a READ filter that stands for no event at all


cdef class _KQueue(_Poller):
    """The poller on BSD's and macOS's kqueue."""

    cdef kevent_t *buffer
    cdef int buffer_room
    cdef int *position          # by fd: its event in `ready`, if that is of this fd
    cdef int positions

    def __cinit__(self, *args):
        self.buffer_room = 256
        self.buffer = <kevent_t *>reallocate(NULL, self.buffer_room * sizeof(kevent_t))
        self.handle, self.watched = self.open_set(), {}

    def __dealloc__(self):
        free(self.buffer)
        free(self.position)

    cdef int leave(self) except -1:
        self.handle = self.outer = -1  # not inherited: the numbers may be others' now

    cdef int open_set(self) except -2:
        cdef int handle = above_stdio(check(kqueue()))
        check(fcntl(handle, F_SETFD, FD_CLOEXEC))
        return handle

    cdef int enclose(self) except -1:
        check(_change(self.outer, self.handle, EVFILT_READ, EV_ADD, 0))

    cdef int add(self, int fd, uint32_t events, uint32_t generation) except -1:
        cdef struct_stat status
        if fd == self.outer and not _change(fd, self.handle, EVFILT_READ, EV_ENABLE, 0):
            raise OSError(EINVAL, "the loop can't watch itself")
        check(fstat(fd, &status))
        if S_ISREG(status.st_mode) or S_ISDIR(status.st_mode):
            raise not_pollable(fd)
        return self.modify_(fd, events, generation)

    cdef int modify_(self, int fd, uint32_t events, uint32_t generation) except -1:
        cdef uint32_t filters = events & (READ | WRITE) or READ | DISABLED
        cdef uint32_t old = self.watched.get(fd, 0)
        cdef short switch = EV_DISABLE if filters & DISABLED else EV_ENABLE
        cdef int room
        check(fcntl(fd, F_GETFD))
        if fd >= self.positions:
            room = 2 * (fd + 32)
            self.position = <int *>reallocate(self.position, room * sizeof(int))
            memset(&self.position[self.positions], 0,
                   (room - self.positions) * sizeof(int))
            self.positions = room
        # All or nothing: first those that are wanted, then away with the others.
        if filters & WRITE:
            check(_change(self.handle, fd, EVFILT_WRITE, EV_ADD, generation))
        if filters & READ and _change(
                self.handle, fd, EVFILT_READ, EV_ADD | switch, generation) == -1:
            try:
                PyErr_SetFromErrno(OSError)
            finally:
                if filters & ~old & WRITE:
                    _change(self.handle, fd, EVFILT_WRITE, EV_DELETE, 0)
        if old & ~filters & READ:
            _change(self.handle, fd, EVFILT_READ, EV_DELETE, 0)
        if old & ~filters & WRITE:
            _change(self.handle, fd, EVFILT_WRITE, EV_DELETE, 0)
        self.watched[fd] = filters

    cdef int drop(self, int fd) except -1:
        cdef uint32_t filters = self.watched.pop(fd, 0)
        if filters & READ:
            _change(self.handle, fd, EVFILT_READ, EV_DELETE, 0)
        if filters & WRITE:
            _change(self.handle, fd, EVFILT_WRITE, EV_DELETE, 0)

    cdef bint has_lost(self, int fd) except -1:
        cdef uint32_t filters = self.watched.get(fd, 0)
        cdef short which = EVFILT_READ if filters & READ else EVFILT_WRITE
        cdef short as_it_is = EV_DISABLE if filters & DISABLED else EV_ENABLE
        return _change(self.handle, fd, which, as_it_is, 0) == -1 and (
            errno == ENOENT or errno == EBADF)

    cdef int wait(self, int64_t ns) except -1:
        cdef timespec timeout = as_timespec(max(ns, 0))
        cdef timespec *limit = NULL if ns == FOREVER else &timeout
        cdef uint32_t events, generation
        cdef int fd, at, i, count, n = 0
        if self.handle < 0:
            raise ValueError("the poller is closed")
        if ns == 0:
            count = kevent(self.handle, NULL, 0, self.buffer, self.buffer_room, limit)
        else:
            with nogil:
                count = kevent(self.handle, NULL, 0, self.buffer, self.buffer_room,
                               limit)
        self.interrupted = count == -1 and errno == EINTR
        if self.interrupted:
            return 0
        check(count)
        for i in range(count):
            fd = <int>self.buffer[i].ident
            generation = <uint32_t><uintptr_t>self.buffer[i].udata
            events = READ if self.buffer[i].filter == EVFILT_READ else WRITE
            if self.buffer[i].flags & EV_ERROR or (
                    self.buffer[i].flags & EV_EOF and events == WRITE):
                events = ERROR
            at = self.position[fd]
            if (at < n and self.ready[at].fd == fd
                    and self.ready[at].generation == generation):
                self.ready[at].events |= events
            else:
                self.position[fd] = n
                n = _note(self, n, fd, events, generation)
        return n


cdef int _change(int kq, int fd, short which, unsigned short flags,
                 uint32_t generation) noexcept nogil:
    cdef kevent_t change
    cdef int rc
    memset(&change, 0, sizeof(change))
    change.ident, change.filter, change.flags = fd, which, flags
    change.udata = <void *><uintptr_t>generation
    rc = kevent(kq, &change, 1, NULL, 0, NULL)
    while rc == -1 and errno == EINTR:  # the change was made all the same
        rc = kevent(kq, &change, 1, NULL, 0, NULL)
    return rc


# Facts about select
#
# - An fd_set is a bit array of FD_SETSIZE: a larger fd would be written to
#   somewhere else in memory.
# - One closed fd fails the whole call with EBADF, and it does not say which.
# - What is watched is whatever the number refers to now.  Whether that is the file that
#   was added, no property of it tells: a witness does, another poller that has the same
#   fds and is never asked for events.
# - It knows no hang-up: a closed peer is READ, a refused connection READ | WRITE.
# - Exceptional conditions are out-of-band data: PRI.

cdef struct _Watched:
    bint known
    uint32_t generation


cdef _Poller _new_witness():
    """A poller that is never asked for events; one that knows nothing if need be."""
    try:
        return _EPoll() if HAVE_EPOLL else _KQueue() if HAVE_KQUEUE else _Poller()
    except OSError as error:
        if error.errno not in (ENOSYS, EPERM):
            raise
    return _Poller()


cdef class _Select(_Poller):
    """The poller on select(2), for where there is nothing else."""

    cdef _Watched *watched      # by fd
    cdef fd_set[3] sets         # for READ, WRITE and PRI
    cdef int end                # all fds are below

    def __cinit__(self, *args):
        self.watched = <_Watched *>calloc(FD_SETSIZE, sizeof(_Watched))
        if self.watched == NULL:
            raise MemoryError
        memset(self.sets, 0, sizeof(self.sets))
        self.witness = _new_witness()

    def __dealloc__(self):
        free(self.watched)

    def fileno(self):
        """Raise io.UnsupportedOperation: select has no file descriptor."""
        import io
        raise io.UnsupportedOperation("select has no file descriptor")

    def close(self):
        """Forget everything."""
        _Poller.close(self)
        memset(self.watched, 0, FD_SETSIZE * sizeof(_Watched))
        memset(self.sets, 0, sizeof(self.sets))
        self.end = 0

    cdef int renew(self, _Table table) except -1:
        cdef int fd
        self.witness.renew(table)
        for fd in range(self.end):
            if _slot(table, fd) == NULL:
                self.drop(fd)
        return _fill(self, table)

    cdef int add(self, int fd, uint32_t events, uint32_t generation) except -1:
        if fd >= FD_SETSIZE:
            raise ValueError(f"fd {fd} is too large for select: "
                             f"FD_SETSIZE is {FD_SETSIZE}")
        self.witness.add(fd, 0, 0)
        self.put(fd, events)
        self.watched[fd].known, self.watched[fd].generation = True, generation
        self.end = max(self.end, fd + 1)

    cdef int modify_(self, int fd, uint32_t events, uint32_t generation) except -1:
        return self.add(fd, events, generation)

    cdef int drop(self, int fd) except -1:
        if fd < FD_SETSIZE:
            self.witness.drop(fd)
            self.put(fd, 0)
            self.watched[fd].known = False
        while self.end and not self.watched[self.end - 1].known:
            self.end -= 1

    cdef void put(self, int fd, uint32_t events) noexcept:
        cdef uint32_t *bits = [READ, WRITE, PRI]
        cdef int i
        for i in range(3):
            if events & bits[i]:
                FD_SET(fd, &self.sets[i])
            else:
                FD_CLR(fd, &self.sets[i])

    cdef bint has_lost(self, int fd) except -1:
        return _has_lost(self.witness, fd)

    cdef int wait(self, int64_t ns) except -1:
        cdef fd_set reads = self.sets[0], writes = self.sets[1], others = self.sets[2]
        cdef timespec timeout = as_timespec(max(ns, 0))
        cdef timespec *limit = NULL if ns == FOREVER else &timeout
        cdef int fd, n = 0, count, end = self.end
        cdef uint32_t events
        with nogil:
            count = pselect(end, &reads, &writes, &others, limit, NULL)
        self.interrupted = count == -1 and errno == EINTR
        if self.interrupted:
            return 0
        if count == -1 and errno == EBADF:
            # One was closed.  Each of those is dropped, and told so by one ERROR.
            for fd in range(end):
                if self.watched[fd].known and _has_lost(self.witness, fd):
                    n = _note(self, n, fd, ERROR, self.watched[fd].generation)
                    self.drop(fd)
            return n
        check(count)
        for fd in range(end if count else 0):
            events = (READ if FD_ISSET(fd, &reads) else 0) | (
                WRITE if FD_ISSET(fd, &writes) else 0) | (
                PRI if FD_ISSET(fd, &others) else 0)
            if events and _has_lost(self.witness, fd):
                self.drop(fd)
                events = ERROR
            if events:
                n = _note(self, n, fd, events, self.watched[fd].generation)
        return n


# A Python object given as `impl`.  Its events have no generation: they are for
# whoever has the fd when they are collected.  What it does not know either, whether a
# number was closed and used again, a witness does.

@cython.final
@cython.internal
cdef class _Foreign(_Poller):

    cdef object impl
    cdef _Table table

    def __cinit__(self, impl):
        if isinstance(impl, type):
            raise TypeError(f"impl is a poller, not a class: {impl!r}")
        for name in ("register", "modify", "unregister", "poll"):
            if not callable(getattr(impl, name, None)):
                raise TypeError(f"impl has no method {name}(): {impl!r}")
        for cls in type(impl).__mro__:
            if "poll" in vars(cls):
                if cls.__name__ == "poll" or cls.__module__.partition(".")[0] == "zmq":
                    raise TypeError(f"impl counts in seconds, and {cls.__module__}."
                                    f"{cls.__name__} in milliseconds")
                break
        self.impl = impl
        self.foreign = self.oneshot = True
        self.witness = _new_witness()

    def fileno(self):
        if not hasattr(self.impl, "fileno"):
            import io
            raise io.UnsupportedOperation("the poller has no file descriptor")
        return self.impl.fileno()

    def close(self):
        _Poller.close(self)
        if hasattr(self.impl, "close"):
            self.impl.close()

    def reinit(self):
        """In a forked child: a set of its own, empty."""
        if not hasattr(self.impl, "reinit"):
            raise RuntimeError("the poller has no reinit(): make a new IOLoop")
        self.impl.reinit()

    cdef int renew(self, _Table table) except -1:
        self.witness.renew(table)
        return _fill(self, table)

    cdef int add(self, int fd, uint32_t events, uint32_t generation) except -1:
        if fd >= 1 << 24:  # a kernel would refuse far fewer
            raise OverflowError(f"file descriptor too large: {fd}")
        try:
            self.witness.add(fd, 0, 0)
        except OSError:
            pass  # the impl may know better, or it is no real one
        if events:
            try:
                self.impl.register(fd, events | ERROR)
            except FileExistsError:
                self.impl.modify(fd, events | ERROR)

    cdef int modify_(self, int fd, uint32_t events, uint32_t generation) except -1:
        cdef _Slot *slot = _slot(self.table, fd)
        if not events:
            self.drop(fd)
        if not events or slot != NULL and (slot.muted or not slot.events):
            return self.add(fd, events, generation)
        try:
            self.impl.modify(fd, events | ERROR)
        except FileNotFoundError:
            self.impl.register(fd, events | ERROR)

    cdef int drop(self, int fd) except -1:
        self.witness.drop(fd)
        try:
            self.impl.unregister(fd)
        except Exception:
            pass  # closed before it was removed, most likely

    cdef bint has_lost(self, int fd) except -1:
        try:
            return self.witness.has_lost(fd)
        except OSError:
            return False

    cdef int wait(self, int64_t ns) except -1:
        cdef int n = 0, fd
        cdef uint32_t events
        cdef _Slot *slot
        seconds = -1 if ns == FOREVER else <double>ns / SECOND
        self.interrupted = False
        try:
            pairs = self.impl.poll(seconds)
        except InterruptedError:
            self.interrupted = True
            return 0
        for number, mask in list(pairs):
            fd, events = fd_number(number), event_mask(mask)
            slot = _slot(self.table, fd)
            if slot == NULL:
                self.drop(fd)
            else:
                n = _note(self, n, fd, events, slot.generation)
        return n


_poll = _EPoll if HAVE_EPOLL else _KQueue if HAVE_KQUEUE else _Select


# -- Watcher -------------------------------------------------------------------
#
# A thread for each run of a loop that has a threshold.  It borrows nothing: the loop
# counts its iterations and polls in any case, and says when it sleeps.  Four times
# within the threshold the watcher looks, without the GIL: a loop that is awake and has
# not moved for four looks is blocked.  It parks while the loop sleeps.

cdef enum:
    LOOKS = 4
    LOOKING = 1             # the watcher waits for the next look,
    PARKED = 2              # or for the loop to wake up
    PATIENCE = 1            # seconds for an action that is still running


@cython.final
@cython.internal
cdef class _Watcher:
    """What the thread shares with the one that runs the loop."""

    cdef IOLoop loop
    cdef unsigned long ident    # of the loop's thread
    cdef uint64_t seen          # iterations and polls at the last look
    cdef int quiet              # looks since then that saw no more
    cdef bint fatal             # the process is to be killed
    cdef PyThread_type_lock lock
    cdef int waiting            # whoever sets it to 0 releases the lock
    cdef int ended              # the run is over
    cdef object thread
    cdef bint sent              # SIGALRM is on its way
    cdef object handler, old_handler    # SIGALRM's
    cdef sigaction_t action, old_action

    def __cinit__(self, IOLoop loop not None):
        import threading
        self.loop, self.ident = loop, loop.thread
        self.fatal = loop.by_signal and loop.action is None
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            raise MemoryError
        PyThread_acquire_lock_timed(self.lock, -1, 0)
        self.thread = threading.Thread(
            target=self.run, name="ioloop watchdog", daemon=True)

    def __dealloc__(self):
        if self.lock != NULL:
            PyThread_free_lock(self.lock)

    def run(self):
        cdef bint blocked = True
        while blocked:
            with nogil:
                blocked = _watch(self)
            if blocked and not _alert(self):
                self.quiet = LOOKS - 1  # once more with the next look

    def on_alarm(self, signum, frame):
        """SIGALRM's handler where the program had one before, whose others are."""
        cdef bint sent = self.sent
        self.sent = False
        # Python calls this once for all that came meanwhile; each left a byte.
        if _count_alarms(self.loop) > 1 or not sent:
            self.old_handler(signum, frame)
        if sent:
            self.loop.action(signum, frame)


cdef bint _watch(_Watcher self) noexcept nogil:
    """Look until the loop is found blocked; false if its run is over."""
    cdef sigset_t alarm
    cdef uint64_t moves
    cdef bint due
    while True:
        due = _wait_to_look(self)
        if load(&self.ended):
            return False
        moves = load64(&self.loop.iterations) + load64(&self.loop.polls)
        if not due or load(&self.loop.queue.door.asleep) or moves != self.seen:
            self.seen, self.quiet = moves, 0
            continue
        self.quiet += 1
        if self.quiet == LOOKS:
            if self.fatal:
                # By SIGALRM, whatever the program has made of it.
                sigemptyset(&alarm)
                sigaddset(&alarm, SIGALRM)
                default_signal(SIGALRM, SIG_DFL)
                pthread_sigmask(SIG_UNBLOCK, &alarm, NULL)
                raise_signal(SIGALRM)
            return True


cdef bint _wait_to_look(_Watcher self) noexcept nogil:
    """Wait for the next look (true), or until the loop wakes or ends (false)."""
    cdef long long us = max(1, self.loop.threshold // (1000 * LOOKS))
    cdef int how = PARKED if load(&self.loop.queue.door.asleep) else LOOKING
    store(&self.waiting, how)
    fence()
    if load(&self.ended):
        us = 0
    elif how == PARKED and load(&self.loop.queue.door.asleep):
        us = -1
    if PyThread_acquire_lock_timed(self.lock, us, 0) == 1:
        return False
    if swap(&self.waiting, 0) == 0:  # the lock is just being released
        PyThread_acquire_lock_timed(self.lock, -1, 0)
        return False
    return True


cdef void _unpark_watcher(_Watcher self) noexcept nogil:
    """The loop is awake."""
    fence()
    if load(&self.waiting) == PARKED and swap(&self.waiting, 0):
        PyThread_release_lock(self.lock)


cdef bint _alert(_Watcher self) except -1:
    """Tell of a blocked loop, unless a callback has SIGALRM for itself."""
    cdef sigaction_t now
    if not self.loop.by_signal:
        try:
            self.loop.log_stack(SIGALRM, sys._current_frames().get(self.ident))
        except BaseException as error:
            _unraisable(self.loop, error)
        return True
    if load64(&self.loop.iterations) + load64(&self.loop.polls) != self.seen:
        return True  # it was blocked until we had the GIL
    sigaction(SIGALRM, NULL, &now)
    if (_signal.getsignal(SIGALRM) is not self.handler
            or now.sa_handler != self.action.sa_handler):
        _count_alarms(self.loop)  # what has come so far is for the handler there
        return False
    self.sent = True
    _signal.pthread_kill(self.ident, SIGALRM)
    return True


cdef int _count_alarms(IOLoop loop) except -1:
    """How many SIGALRMs the pipe has told of since this was called."""
    cdef int came
    _on_doorbell(loop, loop.queue.door.reader, READ, NULL)
    came, loop.alarms = loop.alarms, 0
    return came


cdef int _set_threshold(IOLoop loop, object seconds, bint by_signal,
                        object action) except -1:
    cdef int64_t threshold = 0
    if seconds is not None:
        threshold = nanoseconds(seconds, True)
        if threshold <= 0:
            raise ValueError(f"a threshold must be positive, not {seconds!r}")
    _stop_watcher(loop)
    loop.threshold, loop.by_signal, loop.action = threshold, by_signal, action
    if loop.thread != 0:
        _start_watcher(loop)


cdef int _start_watcher(IOLoop loop) except -1:
    cdef _Watcher self
    if loop.threshold == 0:
        return 0
    if loop.by_signal and not loop.has_wakeup_fd:
        raise RuntimeError("a loop with a blocking signal threshold runs in the "
                           "main thread only")
    if type(sys.modules["_thread"].start_new_thread) is not type(len):
        raise RuntimeError("a blocking threshold needs threads that are not patched")
    self = _Watcher(loop)
    if loop.action is not None:
        sigaction(SIGALRM, NULL, &self.old_action)
        self.old_handler = _signal.getsignal(SIGALRM)
        handler = self.on_alarm if callable(self.old_handler) else loop.action
        _signal.signal(SIGALRM, handler)  # which runs pending handlers before
        _count_alarms(loop)
        self.handler = handler
        sigaction(SIGALRM, NULL, &self.action)
    loop.watcher = self
    try:
        self.thread.start()
    except BaseException:
        _stop_watcher(loop)
        raise


cdef int _stop_watcher(IOLoop loop) except -1:
    cdef _Watcher self = loop.watcher
    cdef object error = None
    if self is None:
        return 0
    loop.watcher = None
    store(&self.ended, 1)
    fence()
    if swap(&self.waiting, 0):
        PyThread_release_lock(self.lock)
    for _ in range(2):  # once more if a signal's handler raises
        try:
            if self.thread.is_alive():
                self.thread.join(PATIENCE)
            break
        except BaseException as raised:
            error = raised
    try:
        if error is not None:
            raise error
        PyErr_CheckSignals()  # while their handler is there
        if self.sent and hasattr(_signal, "sigtimedwait"):
            _signal.sigtimedwait((SIGALRM,), 0)  # a blocked one is not to come later
    finally:
        _restore_alarm(self)
        self.handler = self.thread = None


cdef int _restore_alarm(_Watcher self) except -1:
    """Put back SIGALRM's handler, unless somebody has set another since."""
    if self.handler is None or _signal.getsignal(SIGALRM) is not self.handler:
        return 0
    if self.old_handler is not None:
        try:
            _signal.signal(SIGALRM, self.old_handler)
        except BaseException:  # of a pending handler, which runs before
            _signal.signal(SIGALRM, self.old_handler)
            raise
    sigaction(SIGALRM, &self.old_action, NULL)


# -- Forks ---------------------------------------------------------------------
#
# A fork copies the memory as it is: so it takes the locks that threads without the GIL
# may hold, and frees them on both sides.  The list of them is the module's only state
# in C, since pthread_atfork() passes no argument.  The child gives up what it shares
# with its parent at once, while the numbers are still those of the loop's files.

cdef _Door *_doors = NULL
cdef pthread_mutex_t _doors_lock

pthread_mutex_init(&_doors_lock, NULL)
pthread_atfork(_before_fork, _after_fork, _after_fork)


cdef void _before_fork() noexcept nogil:
    cdef _Door *door
    pthread_mutex_lock(&_doors_lock)
    door = _doors
    while door != NULL:
        pthread_mutex_lock(&door.lock)
        door = door.next


cdef void _after_fork() noexcept nogil:
    cdef _Door *door = _doors
    while door != NULL:
        pthread_mutex_unlock(&door.lock)
        door = door.next
    pthread_mutex_unlock(&_doors_lock)


cdef void _list_door(_Door *door, bint alive) noexcept nogil:
    """Enter it into the list, or take it out."""
    global _doors
    cdef _Door **link = &_doors
    pthread_mutex_lock(&_doors_lock)
    if alive:
        door.next, _doors = _doors, door
    else:
        while link[0] != door:
            link = &link[0].next
        link[0] = door.next
    pthread_mutex_unlock(&_doors_lock)


def _after_fork_in_child():
    outer = {}  # by our wakeup fds: those in whose place they are
    loops = [reference() for reference in list(_loops.values())]
    for _ in loops:  # one that runs inside of others has to be the first
        for loop in loops:
            if loop is not None and (<IOLoop>loop).watcher is not None:
                _restore_alarm((<IOLoop>loop).watcher)
    for loop in loops:
        if loop is not None:
            _orphan(loop, outer)
    if outer:
        fd = _signal.set_wakeup_fd(-1)
        while fd in outer:
            fd = outer.pop(fd)
        _swap_wakeup_fd(fd)


os.register_at_fork(after_in_child=_after_fork_in_child)


cdef int _orphan(IOLoop loop, dict outer) except -1:
    """Let go of what is the parent's."""
    cdef _Door *door = loop.queue.door
    if loop.has_wakeup_fd:
        outer[door.writer] = loop.outer_wakeup
    loop.forked = True
    loop.has_wakeup_fd = False
    store(&door.asleep, 0)
    _forget(loop.table, door.reader)
    _close_bell(door)
    loop.poller.leave()
    loop.watcher = None


cdef int _reinit(IOLoop loop) except -1:
    """Replace what a child shared with its parent."""
    cdef _Door *door = loop.queue.door
    cdef _Handler handler
    cdef int fd
    if loop.poller.foreign:
        (<_Foreign>loop.poller).reinit()
    _open_door(door)
    loop.poller.renew(loop.table)
    loop.poller.kept = 0  # the new set tells of them again
    # The child may have closed what it has handlers for: these numbers are ours now.
    for fd in range(<int>loop.table.size):
        if fd in (door.reader, door.writer) or _is_own(loop.poller, fd):
            _forget(loop.table, fd)
    _add_doorbell(loop)
    if loop.thread != 0 and loop.thread != get_thread():
        # The thread that ran the loop is not in this child: end what it had begun.
        loop.thread = loop.timers.thread = 0
        loop.outer = None
        loop.timers.passing = False
        _add_late(loop.timers)
        # It may have been inside of a context, which nobody will leave now.
        loop.blank = new_context()
        for _, handler in _registrations(loop):
            if handler.context is not None:
                handler.context = handler.context.copy()
    loop.forked = False
    if loop.thread != 0:
        _take_wakeup_fd(loop)
        _start_watcher(loop)
    else:
        _doze(loop)


# -- The C-level door ----------------------------------------------------------
#
# Documented in ioloop.pxd.

cdef int c_add_handler(object loop, int fd, uint32_t events, ioloop_handler_v1 function,
                       void *arg, object owner) except -1:
    _check_thread(<IOLoop?>loop)
    if function == NULL:
        raise ValueError("the function is NULL")
    return _add_handler(<IOLoop>loop, fd_number(fd), events, function, arg,
                        _Handler.__new__(_Handler, fd, owner, None))


cdef int c_update_handler(object loop, int fd, uint32_t events) except -1:
    _check_thread(<IOLoop?>loop)
    return _update_handler(<IOLoop>loop, fd_number(fd), events)


cdef int c_remove_handler(object loop, int fd) except -1:
    if not _is_closed(<IOLoop?>loop):
        _check_thread(<IOLoop>loop)
        if fd != (<IOLoop>loop).queue.door.reader:
            _remove_handler(<IOLoop>loop, fd)


@cython.final
@cython.internal
cdef class _Timer:
    """A timer of the door: a call that knows its timeout."""

    cdef ioloop_callback_v1 function
    cdef void *arg
    cdef object owner
    cdef _Timers timers
    cdef _Timeout timeout


cdef object c_new_timer(object loop, ioloop_callback_v1 function, void *arg,
                        object owner):
    cdef _Timer timer = _Timer.__new__(_Timer)
    _check_open(<IOLoop?>loop)
    if function == NULL:
        raise ValueError("the function is NULL")
    timer.function, timer.arg, timer.owner = function, arg, owner
    timer.timers = (<IOLoop>loop).timers
    timer.timeout = _Timeout.__new__(_Timeout)
    return timer


cdef int c_start_timer(object timer, int64_t delay) except -1:
    cdef _Timer self = <_Timer?>timer
    cdef int64_t deadline
    cdef _Entry entry
    if self.timers is None or self.timers.closed:
        raise RuntimeError("IOLoop is closed")
    _check_owner(self.timers)
    deadline = later(_now(self.timers), delay)
    while self.timers.spares == 0:
        _grow_timers(self.timers)  # here: it may run what starts or stops the timer
    if self.timers.closed:
        raise RuntimeError("IOLoop is closed")
    if self.timeout.timers != NULL:
        if not self.timers.passing:
            # Cancel and arm at once.
            entry.deadline, entry.timeout = deadline, <PyObject *>self.timeout
            self.timeout.stamp = self.timers.added
            self.timers.added += 1
            _sift(self.timers.heap, self.timers.count, self.timeout.index, entry)
            return _tell_nearer(self.timers, self.timeout)
        _extract(self.timers, self.timeout.index)
        _release(self.timers, self.timeout)
    return _arm(self.timers, self.timeout, deadline, self)


cdef int c_stop_timer(object timer) except -1:
    cdef _Timer self = <_Timer?>timer
    if self.timers is not None and not self.timers.closed:
        _check_owner(self.timers)
        _cancel(self.timeout)


cdef int c_add_callback(object loop, ioloop_callback_v1 function, void *arg) except -1:
    cdef int error
    _check_open(<IOLoop?>loop)
    error = c_post((<IOLoop>loop).queue.door, function, arg)
    if error == EINVAL:
        raise ValueError("the function is NULL")
    if error:
        raise OSError(error, os.strerror(error))


cdef ioloop_door_v1 *c_door(object loop) except NULL:
    _check_open(<IOLoop?>loop)
    return (<IOLoop>loop).queue.door


# -- Entrances -----------------------------------------------------------------
#
# The methods that take a callable and its arguments, once more, with CPython's fastest
# calling convention: they replace those of the class, which serve the limited API and
# hold the docstrings.  Their own parameters may be given by name as well.

_replaced = {}  # by name: the method of the class, and the names of its parameters


cdef inline object _enter_queue(IOLoop loop, str name, PyObject **args, Py_ssize_t n,
                                PyObject *names, object context):
    if n < 1:
        return _by_name(name, loop, args, n, names)
    _queue_call(loop, <object>args[0], as_tuple(args + 1, n - 1),
                _keywords(args + n, names), context)


cdef object _enter_soon(IOLoop loop, PyObject **args, Py_ssize_t n, PyObject *names):
    return _enter_queue(loop, "add_callback", args, n, names, capture_context())


cdef object _enter_spawn(IOLoop loop, PyObject **args, Py_ssize_t n, PyObject *names):
    return _enter_queue(loop, "spawn_callback", args, n, names, None)


cdef inline object _enter_time(IOLoop loop, str name, _clock_function clock,
                               PyObject **args, Py_ssize_t n, PyObject *names):
    if n < 2:
        return _by_name(name, loop, args, n, names)
    return _time_call(loop, <object>args[0], clock, <object>args[1],
                      as_tuple(args + 2, n - 2), _keywords(args + n, names))


cdef object _enter_timeout(IOLoop loop, PyObject **args, Py_ssize_t n, PyObject *names):
    return _enter_time(loop, "add_timeout", _deadline, args, n, names)


cdef object _enter_later(IOLoop loop, PyObject **args, Py_ssize_t n, PyObject *names):
    return _enter_time(loop, "call_later", _delay, args, n, names)


cdef object _enter_at(IOLoop loop, PyObject **args, Py_ssize_t n, PyObject *names):
    return _enter_time(loop, "call_at", _deadline, args, n, names)


cdef object _by_name(str name, IOLoop loop, PyObject **args, Py_ssize_t n,
                     PyObject *names):
    """Leave it to the method that was replaced."""
    cdef dict keywords = _keywords(args + n, names) or {}
    method, parameters = _replaced[name]
    for missing in parameters[n:]:
        if missing not in keywords:
            raise TypeError(f"{name}() is missing its argument {missing!r}")
    return method(loop, *[<object>args[i] for i in range(n)], **keywords)


cdef inline dict _keywords(PyObject **values, PyObject *names):
    if names == NULL:
        return None
    return {name: <object>values[i] for i, name in enumerate(<tuple>names)}


cdef int _replace(str name, str parameters, void *function) except -1:
    _replaced[name] = getattr(IOLoop, name), parameters.split(", ")
    doc = f"{name}($self, {parameters}, *args, **kwargs)\n--\n\n"
    doc += getattr(IOLoop, name).__doc__
    return replace_method(IOLoop, name.encode(), doc.encode(), function)


_replace("add_callback", "callback", <void *>_enter_soon)
_replace("add_callback_from_signal", "callback", <void *>_enter_soon)
_replace("spawn_callback", "callback", <void *>_enter_spawn)
_replace("add_timeout", "deadline, callback", <void *>_enter_timeout)
_replace("call_later", "delay, callback", <void *>_enter_later)
_replace("call_at", "when, callback", <void *>_enter_at)


# -- Invariants ----------------------------------------------------------------

def _verify(IOLoop loop not None):
    """Raise AssertionError unless the loop's tables agree with each other.

    Called in every iteration of a build with IOLOOP_DEBUG.
    """
    cdef _Timers timers = loop.timers
    cdef _Queue queue = loop.queue
    cdef _Table table = loop.table
    cdef _Timeout timeout
    cdef Py_ssize_t i, count = 0
    cdef uint64_t n
    _check_open(loop)
    _expect(len(timers.calls) == timers.room, "the number of slots")
    _expect(timers.count + timers.lates + timers.spares == timers.room,
            "the number of free slots")
    for i in range(timers.count):
        timeout = <_Timeout>timers.heap[i].timeout
        _expect(timeout.index == i and timeout.timers == <PyObject *>timers,
                "a timeout's index")
        _expect(timers.calls[timeout.slot] is not None, "a timeout's call")
        _expect(i == 0 or not _precedes(&timers.heap[i], &timers.heap[(i - 1) >> 2]),
                "the heap's order")
    for i in range(timers.spares):
        _expect(timers.calls[timers.spare[i]] is None, "a free slot")
    _expect(len(queue.ring) == <Py_ssize_t>(queue.mask + 1), "the ring's size")
    _expect(queue.tail - queue.head <= queue.mask + 1, "the ring's ends")
    for n in range(queue.tail, queue.head + queue.mask + 1):
        _expect(queue.ring[n & queue.mask] is None, "a free slot of the ring")
    for i in range(table.size):
        _expect((table.slots[i].generation != 0) == (table.handlers[i] is not None),
                "an fd's slot and its handler")
        count += table.slots[i].generation != 0
    _expect(count == table.count, "the number of handlers")


cdef int _expect(bint true, str what) except -1:
    if not true:
        raise AssertionError(f"ioloop: {what} is wrong")
