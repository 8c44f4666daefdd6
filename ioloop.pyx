# cython: language_level=3
# cython: annotation_typing=False
# cython: auto_pickle=False
# cython: freethreading_compatible=True
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
2. Read the clock once and run every timeout that is due.
3. Leave if `stop()` was called.
4. Poll: without waiting if callbacks are queued, else until the nearest timeout,
   else for ever.
5. Run the handlers of the file descriptors that are ready.

What a step adds to itself runs in the next iteration: a callback that adds a
callback, or a timeout that adds a timeout, can't starve the other steps.

Every loop has a second face, an asyncio event loop: see `IOLoop.asyncio_loop`.

Threads: a loop belongs to the thread that runs it.  `add_callback`,
`add_callback_from_signal`, `spawn_callback`, `add_future`, `stop`, `time`, `running`,
`stats`, `fileno` and `asyncio_loop` may be used in any thread; methods that say "Loop
thread only" raise RuntimeError while another thread runs the loop.  Between runs any
thread may call them; two calls at once are made one after the other, with or without
the GIL.

Signals: Python's signal handlers run in the main thread between the steps, at once,
even when the loop sleeps.  They may call `add_callback` and `stop`.
"""

# -- Map -----------------------------------------------------------------------
# The sections; a function's prefix says its section:
#
#   Platform           what differs between kernels
#   IOLoop             the public class; _loop_*
#   Helpers            functions that know nothing of a loop; no prefix
#   Iteration          the five steps, and errors; _run_*, _report_*
#   Queue              callbacks, from any thread; _queue_*, _inbox_*
#   Waker and signals  who wakes a sleeping loop; the wakeup fd; _waker_*, _wakeup_*
#   Timeouts           heap, clock, cancellation; _timers_*, _clock_*, _heap_*
#   PeriodicCallback   the second public class; _periodic_*
#   Coroutines         futures and tasks; _future_*
#   asyncio            the second face of a loop; _handle_*, _watch_*, _face_*
#   File descriptors   registrations, paused handlers; _table_*, _handler_*
#   Pollers            their contract; epoll, kqueue, select and Python's; _poller_*
#   Watchdog           blocked loops and SIGALRM; _watchdog_*
#   Forks              locks, the child, reinit(); _fork_*
#   C API              what ioloop.pxd exports; c_*
#   Fast methods       add_callback and the like, in every build; _fast_*
#   Invariants         _verify
#
# An IOLoop owns a _Queue (whose _Inbox is for threads without the GIL), _Timers, a
# _Table, a _Poller and, in a run, a _Watchdog.  The heap and the user own a _Timeout.
#
#   an fd event  _EPoll.wait, _run_poll, _run_handlers (stale? muted?), _run_handler
#   a callback   _fast_add_callback, _Queue.push, _run_callbacks, _run_call
#   a timeout    _fast_add_timeout, _Timers.arm, _run_timeouts, _run_call
#   a wake-up    _Queue.push or c_post, _waker_signal, _run_sleep, _waker_drain
#   a signal     its byte ends the poll in _run_sleep; _run_check_signals, _waker_drain
#   an error     call*(), _run_unusual_result: to the hook; a KeyboardInterrupt goes on,
#                out of _loop_run and start(); _run_keep_events keeps what it would lose
#   a fork       _fork_before, _fork_after, _fork_in_child; RuntimeError until reinit()
#
#   batch       the events of one poll         pass      the timeouts run in one step 2
#   generation  the number of a registration   deferred  added in a pass, for the next
#   stale       event of an old registration   call      a callback of Python's
#   stray       event of no registration       post      a callback of C's
#   muted       registered, not watched now    witness   a poller that tells files apart
#
# What it uses of CPython beyond the public API: PyThreadState.context, a type's tp_dict
# (Fast methods), PySignal_SetWakeupFd, a context's mp_length, and its reference count
# as the sign that nobody keeps it.  The limited API (stable ABI, abi3) does without the
# first four: look for LIMITED_API.  Without the GIL, an object's ob_mutex in a forked
# child.  Of asyncio, what begins with one underscore: `make conformance` tells whether
# it still fits.
#
# Without the GIL, the critical section of the loop takes its place: methods enter it,
# and like the GIL it is left by whoever blocks.  The thread that runs the loop needs
# none, since all others are refused.  The queue, which is for all, has a lock.
#
# A new CPython version: that list, classifiers in pyproject.toml, README, .ci/run.
# A new poller: the contract in "Pollers".

# The C modules behind `functools`, `signal`, `threading` and `weakref`: those take
# longer to import than this one does, and add nothing that it needs.
import os
import sys
from _functools import partial
from _thread import RLock, _local
from _weakref import ref
from _contextvars import Context, copy_context
import _signal

cimport cython
from cpython.exc cimport (
    PyErr_CheckSignals, PyErr_SetFromErrno, PyErr_SetObject, PyErr_WriteUnraisable)
from cpython.object cimport PyObject, PyObject_Call
from cpython.pythread cimport (
    PyThread_allocate_lock, PyThread_free_lock, PyThread_release_lock,
    PyThread_type_lock)
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from cpython.tuple cimport PyTuple_New, PyTuple_SetItem
from libc.errno cimport (
    EAGAIN, EBADF, EEXIST, EINTR, EINVAL, ENOENT, ENOMEM, ENOSYS, EPERM, EPIPE,
    ESHUTDOWN, errno)
from libc.limits cimport INT_MAX
from libc.math cimport HUGE_VAL, ceil, floor, isnan
from libc.signal cimport SIG_DFL, SIGALRM, raise_, signal as set_c_handler
from libc.stdint cimport (
    INT64_MAX, INT64_MIN, UINT64_MAX, int64_t, uint32_t, uint64_t, uintptr_t)
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset
from posix.fcntl cimport F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, FD_CLOEXEC, fcntl
from posix.select cimport FD_CLR, FD_ISSET, FD_SET, FD_SETSIZE, fd_set, pselect
from posix.signal cimport (
    SIG_UNBLOCK, sigaction, sigaction_t, sigaddset, sigemptyset, sigset_t)
from posix.stat cimport S_ISDIR, S_ISREG, fstat, struct_stat
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport close, read, write

# Cython also registers a module in sys.modules under its compile-time name, if that
# is free.  For a vendored copy, undo it.
if (__name__ != "ioloop" and type(sys.modules.get("ioloop")) is type(sys)
        and vars(sys.modules["ioloop"]) is globals()):
    del sys.modules["ioloop"]

# Cython leaves a module to the interpreter that imports it first, and refuses all
# others.  It asks for the ID before anything else: that of the main one is 0.
cdef extern from *:
    """
    static int64_t ioloop_refuse_subinterpreter(int64_t id) {
        if (id > 0)
            PyErr_SetString(PyExc_ImportError,
                            "ioloop can't be used in a subinterpreter");
        return id > 0 ? -1 : id;
    }
    #define PyInterpreterState_GetID(interpreter) \\
        ioloop_refuse_subinterpreter(PyInterpreterState_GetID(interpreter))
    """

__version__ = "0.2.0"
__all__ = ["IOLoop", "PeriodicCallback", "TimeoutError", "new_event_loop"]

TimeoutError = TimeoutError  # as in Tornado: what run_sync() raises


# -- Platform ------------------------------------------------------------------
# Everything that differs between kernels and C libraries.  The IOLOOP_HAVE_* are
# always 0 or 1 and what is missing has an inert stand-in, so the code below is
# plain `if`s that the C compiler resolves.

cdef extern from *:
    r"""
    #ifndef IOLOOP_DEBUG
    #  define IOLOOP_DEBUG 0
    #endif

    /* epoll */
    #if defined(__linux__)
    #  include <sys/epoll.h>
    #  define IOLOOP_HAVE_EPOLL 1
    /* epoll_pwait2, which glibc has from 2.35 on and musl does not.  The kernel's
       timespec is two numbers of 64 bits on every platform. */
    #  include <sys/syscall.h>
    #  ifndef SYS_epoll_pwait2
    #    define SYS_epoll_pwait2 441
    #  endif
    #  define ioloop_epoll_wait_ns(ep, events, n, timeout) \
        (int)syscall(SYS_epoll_pwait2, ep, events, n, \
                     (int64_t[]){(timeout)->tv_sec, (timeout)->tv_nsec}, NULL, 8)
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
    #  define ioloop_set_flags(fd) \
        (fcntl(fd, F_SETFD, FD_CLOEXEC), fcntl(fd, F_SETFL, O_NONBLOCK))
    #  define ioloop_pipe(fds) \
        (pipe(fds) ? -1 : (ioloop_set_flags(fds[0]), ioloop_set_flags(fds[1]), 0))
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

    /* The x87 computes with more bits than a double has: a millisecond would become
       1,000,001 nanoseconds. */
    #if __FLT_EVAL_METHOD__ == 2
    static inline double ioloop_as_double(double x) {
        volatile double rounded = x;
        return rounded;
    }
    #else
    #  define ioloop_as_double(x) (x)
    #endif

    /* A number that is read and written at once.  i386 would align it to 4 bytes, and
       it could be in two cache lines. */
    typedef uint64_t ioloop_atomic64 __attribute__((aligned(8)));
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
    double as_double "ioloop_as_double"(double x) nogil
    ctypedef uint64_t atomic64 "ioloop_atomic64"


# -- IOLoop --------------------------------------------------------------------

# One per process: the instance; one per thread: the current loop.
_process = {}  # "loop": the instance; a dict's setdefault() is atomic
_threads = _local()
_loops = {}  # weak references to all loops, by the id of their timers


@cython.internal
cdef class _Referable:
    # Cython 3.3 can't give a type of the limited API both this and a __dict__.
    cdef object __weakref__


cdef class IOLoop(_Referable):
    """IOLoop(impl=None, *, time_func=None, make_current=None)

    A level-triggered event loop.

    `impl` is the poller: `_EPoll()`, `_KQueue()` or `_Select()`, by default the best
    that the platform has, or any object with `register(fd, events)`, `modify(fd,
    events)`, `unregister(fd)` and `poll(seconds)`, which returns pairs of fd and
    events; -1 seconds means for ever.  (Seconds: most pollers of other packages count
    in milliseconds.)  The loop closes it.  `time_func` returns the time in seconds, and
    deadlines are on its clock.  By default they are UNIX times, kept by the monotonic
    clock from the moment they are set, so that setting the system's clock moves none of
    them.  `make_current`: None makes the loop the thread's current one if the thread
    has none, until the loop is dropped or closed; True makes it current, or raises
    RuntimeError if the thread has one.

    A loop is a context manager that closes itself.  Of the methods that a subclass may
    override it calls only `handle_callback_exception` and `log_stack`.  Source: Tornado
    1.2-2.0; `make_current`: 4.2.
    """
    cdef dict __dict__
    cdef readonly object _impl
    cdef _Poller poller
    cdef _Table table
    cdef _Queue queue
    cdef _Timers timers
    cdef _Face face             # asyncio's view of this loop, if somebody wants it,
    cdef bint runs_asyncio      # and it is asyncio's running loop
    cdef _Watchdog watchdog     # of this run, if there is a threshold,
    cdef int64_t threshold      # in nanoseconds; 0: none
    cdef bint by_signal         # which sends signals,
    cdef object action          # for this one
    cdef object empty_context   # for whatever captured none
    cdef object outer_loop      # the current loop before this run
    cdef int state              # NEW, OPEN, FORKED or CLOSED
    cdef int stopping
    cdef unsigned long thread_id    # of the thread that runs the loop, or 0
    cdef bint installed, embedded
    cdef bint has_wakeup_fd     # our pipe is the signal wakeup fd,
    cdef int outer_wakeup_fd    # in place of this one, or -1
    cdef int alarms             # SIGALRMs seen in the pipe, not handled yet
    cdef uint64_t calls_at_poll  # callbacks run by the last poll made while some waited
    cdef int64_t coarse_time    # of that poll
    cdef int since_offer        # polls and events since the GIL was offered
    cdef bint eager             # the last poll found events at once
    cdef int64_t rebuilt        # when the poller's set was rebuilt
    cdef atomic64 iterations, polls
    cdef uint64_t events
    cdef int64_t slept, woken, longest_busy

    NONE = IOLOOP_NONE
    READ = _EPOLLIN = IOLOOP_READ
    WRITE = _EPOLLOUT = IOLOOP_WRITE
    ERROR = IOLOOP_ERROR
    _EPOLLPRI, _EPOLLERR, _EPOLLHUP, _EPOLLRDHUP = 0x002, 0x008, 0x010, 0x2000
    _EPOLLONESHOT, _EPOLLET = 1 << 30, 1 << 31

    def __init__(self, impl=None, *, time_func=None, make_current=None):
        cdef _Poller poller
        if time_func is not None:
            require_callable(time_func)
        if make_current and _loop_current() is not None:
            raise RuntimeError("the thread already has a current IOLoop")
        queue, table = _Queue(), _Table()
        timers, forget = _Timers(queue, time_func), _loops.pop
        impl = _poll() if impl is None else impl
        poller = impl if _poller_is_native(impl) else _Foreign(impl, table)
        with cython.critical_section(self):
            if self.state != NEW:
                raise RuntimeError("IOLoop is already initialised")
            if swap(&poller.in_use, True):
                raise ValueError("the poller belongs to another IOLoop")
            try:
                self.poller, self.table, self.queue = poller, table, queue
                self.timers, self._impl = timers, impl
                self.empty_context = Context()
                _waker_register(self)
                _loops[id(timers)] = ref(self, partial(forget, id(timers)))
            except BaseException:
                poller.in_use = False
                raise
            store(&self.state, OPEN)
        if make_current:
            _threads.loop = self
        elif make_current is None and _loop_current() is None:
            _threads.loop = ref(self)

    # Which loop

    @classmethod
    def instance(cls):
        """Return the process's loop; the first call makes it.  Any thread.

        For a program with one loop, and for code far from where it was made.  A library
        should rather take a loop as an argument, or use `current()`: it may be called
        in a thread that has a loop of its own.  The usual mistake is to take
        `instance()` in a worker thread and call its methods there; from another thread,
        `add_callback` is the way into the loop.
        """
        cdef IOLoop loop = _process.get("loop")
        if loop is None:
            loop = cls()
            loop.installed = True
            if _process.setdefault("loop", loop) is not loop:
                loop.close()  # another thread was quicker
                return cls.instance()
        return loop

    @staticmethod
    def initialized():
        """Return whether the process's loop exists.  Any thread."""
        return "loop" in _process

    @staticmethod
    def clear_instance():
        """Forget the process's loop without closing it.  Any thread."""
        _process.pop("loop", None)

    def install(self):
        """Make this the process's loop; RuntimeError if there is one.  Any thread."""
        setdefault = _process.setdefault
        with cython.critical_section(self):
            _loop_check_open(self)
            if setdefault("loop", self) is not self:
                raise RuntimeError("the process already has an IOLoop.instance()")
            self.installed = True

    @staticmethod
    def current(instance=True):
        """Return the loop that runs in this thread, or the thread's current one.

        In a callback that is always the loop which called it, so this is what code
        wants that is run by a loop and not told by which.  Else it is the first loop
        made in the thread, unless `make_current` said otherwise.  Without one, return
        `instance()`, or None if `instance` is false.  Source: Tornado 4.2.
        """
        loop = _loop_current()
        return IOLoop.instance() if loop is None and instance else loop

    def make_current(self):
        """Make this the current loop of the calling thread."""
        _loop_check_open(self)
        _threads.loop = self

    @staticmethod
    def clear_current():
        """Leave the calling thread without a current loop."""
        _threads.loop = None

    # File descriptors

    @cython.critical_section
    def add_handler(self, fd, handler, events):
        """Call `handler(fd, events)` whenever `fd` is ready for one of `events`.

        `fd` is a file descriptor or an object with `fileno()`; the handler gets what
        was passed.  `events` is a mask of READ and WRITE (or poll bits of the kernel,
        such as `_EPOLLRDHUP`); ERROR, which is an error or a hang-up, is always added.
        With a mask of NONE the fd is known but not watched.  The handler runs in the
        context (`contextvars`) that add_handler was called in.

        The loop is level-triggered: the handler is called again until it has dealt with
        the event or asked for another mask.  So the file should not block, and one
        `recv` a call is enough.  A socket is nearly always ready to WRITE: ask for that
        only while there is something to send, or the loop never sleeps.  Call
        remove_handler before the fd is closed.

        Raises FileExistsError if the fd has a handler, PermissionError for a regular
        file, OSError for whatever else the kernel refuses, ValueError, OverflowError or
        TypeError for an invalid fd, mask or handler.  Loop thread only.
        """
        _loop_check_thread(self)
        require_callable(handler)
        cdef uint32_t mask = event_mask(events)
        cdef int number = fd_number(fd)
        _loop_check_thread(self)  # fileno() may have closed the loop
        _table_add(self, number, mask, NULL, NULL,
                   _Handler.__new__(_Handler, fd, handler, capture_context()))

    @cython.critical_section
    def update_handler(self, fd, events):
        """Watch `fd` for `events` from now on; also drops events already collected.

        The handler stays the same; for another one, remove this one and add that.
        Raises FileNotFoundError if the fd has no handler; otherwise raises what
        add_handler does.  Loop thread only.
        """
        _loop_check_thread(self)
        cdef uint32_t mask = event_mask(events)
        cdef int number = fd_number(fd)
        _loop_check_thread(self)
        _table_require(self, number)
        _table_update(self, number, mask)

    @cython.critical_section
    def remove_handler(self, fd):
        """Forget `fd`, before it is closed; does nothing if it has no handler.

        The handler is not called again, not even for an event already collected.  An
        object is found even if its `fileno()` fails, as that of a closed file does.
        Loop thread only.
        """
        if self.state == CLOSED:
            return
        _loop_check_thread(self)
        cdef int number = self.table.find(fd)
        if self.state != CLOSED:  # still, after fileno()
            _loop_check_thread(self)
            if _table_has(self, number):
                _table_remove(self, number)

    @staticmethod
    def split_fd(fd):
        """Return `fd` as a pair: the int and what was passed.  Any thread."""
        return fd_number(fd), fd

    @staticmethod
    def close_fd(fd):
        """Close `fd`, by its own `close()` if it has one; ignore EBADF.  Any thread."""
        try:
            os.close(fd_number(fd)) if isinstance(fd, int) else fd.close()
        except OSError as error:
            if error.errno != EBADF:
                raise

    # Callbacks and timeouts.  The methods that are a docstring only are replaced: see
    # "Fast methods".

    def add_callback(self, callback, *args, **kwargs):
        """Call `callback(*args, **kwargs)` in the next iteration.

        In order of adding, in the context (`contextvars`) of this call.  An accepted
        callback is run, in this `start()` or a later one, unless the loop is closed
        first.  May be called from any thread, from a signal handler and from `__del__`.

        Raises RuntimeError if the loop is closed, TypeError if `callback` is not
        callable, and OSError if the loop sleeps and the kernel refuses to wake it.
        """

    def add_callback_from_signal(self, callback, *args, **kwargs):
        """Same as add_callback, which may be called from a signal handler too."""

    def spawn_callback(self, callback, *args, **kwargs):
        """Like add_callback, in an empty context.  Any thread."""

    @property
    def asyncio_loop(self):
        """This loop as an event loop of asyncio's, the other face of the same loop.

        It is an `asyncio.SelectorEventLoop` whose callbacks, timers and file
        descriptors are this loop's; its `ioloop` leads back.  It is made, and asyncio
        imported, when it is first asked for, or when a coroutine is first run.  From
        then on `asyncio.get_running_loop()` returns it in whatever this loop runs.
        Either `stop()` ends a run of either, and either `close()` closes both.  Any
        thread.  Source: Tornado 5.
        """
        return _face_of(self)

    def add_future(self, future, callback):
        """Call `callback(future)` in the loop once `future` is done.

        A future is any object with `add_done_callback`, completed in this thread or in
        another (`concurrent.futures`).  Any thread.
        """
        _loop_check_open(self)
        require_callable(callback)
        relay = partial(_future_relay, self, callback, capture_context())
        future.add_done_callback(relay)

    def time(self):
        """Return the time in seconds on the clock of `add_timeout`.  Any thread."""
        if self.timers is None or self.timers.time_func is None:
            return <double>read_clock(CLOCK_REALTIME) / 1e9
        return self.timers.time_func()

    def add_timeout(self, deadline, callback, *args, **kwargs):
        """Call `callback(*args, **kwargs)` at `deadline`; return its handle.

        `deadline` is a time in seconds on the clock of `time()` or a `timedelta` from
        now.  Never early, late by microseconds; in the order of (deadline, adding).  A
        deadline in the past is due in the next pass, infinity never.  Raises ValueError
        for NaN, TypeError if `deadline` is not a time.  Loop thread only.
        """

    def call_later(self, delay, callback, *args, **kwargs):
        """Like add_timeout, `delay` seconds from now.  Loop thread only."""

    def call_at(self, when, callback, *args, **kwargs):
        """Like add_timeout, at a time in seconds of `time()`.  Loop thread only."""

    def remove_timeout(self, timeout):
        """Cancel a timeout; does nothing if it has run or was cancelled.

        Raises TypeError if `timeout` is not a handle of add_timeout, ValueError if it
        is another loop's.  Loop thread only.
        """
        if load(&self.state) == CLOSED:
            return
        if not isinstance(timeout, _Timeout):
            _loop_check_thread(self)
            raise TypeError("timeout must be what add_timeout returned, "
                            f"not {type(timeout).__name__}")
        cdef _Section section
        enter(&section, self)
        try:
            _loop_check_thread(self)
            if (<_Timeout>timeout).timers not in (NULL, <PyObject *>self.timers):
                raise ValueError("the timeout belongs to another IOLoop")
            _timers_cancel(<_Timeout>timeout)
        finally:
            leave(&section)

    # Start and stop

    def start(self):
        """Run until `stop()` is called, or a BaseException ends the run.

        This is where a program spends its life: handlers and callbacks do all else.  To
        get the result of one function or coroutine use `run_sync`, and inside of
        another event loop `run_once`.  An exception of a callback doesn't end the run,
        but goes to `handle_callback_exception`; a KeyboardInterrupt or SystemExit does.

        Everything not yet delivered is kept for the next start.  Returns at once if
        stop() was called before.  Until then the loop belongs to the calling thread.
        Raises RuntimeError if the loop is running.
        """
        _loop_claim(self)
        try:
            _loop_start(self)
        finally:
            _loop_release(self)

    def stop(self):
        """Make `start()` return once the current iteration is complete.

        Wakes a sleeping loop.  Before a start, the next one returns at once: that is
        no mistake of a thread which stops a loop that is about to start, but it is one
        to call stop() again after start() has returned.  Callbacks that are queued stay
        so for the next start; a program that has to finish them stops in the last one.
        May be called from any thread and from a signal handler.
        """
        cdef int before = load(&self.stopping)
        _loop_check_open(self)
        store(&self.stopping, True)
        try:
            _waker_wake(self.queue)
        except OSError:
            store(&self.stopping, before)
            raise

    def running(self):
        """Return whether the loop is running.  Any thread."""
        return load(&self.state) >= OPEN and load_id(&self.thread_id) != 0

    def run_sync(self, func, timeout=None):
        """Run the loop until `func()` is done; return its value.

        For a script, a test, or the main() of a program that is written with `await`;
        it is no way to wait inside of a callback, where the loop is running already.
        `func` is a plain function, or one that returns a coroutine or a future, which
        is waited for.  Raises what it raises, TimeoutError after `timeout` seconds,
        RuntimeError if the loop was stopped before.  What is not done by then is
        cancelled, and the loop runs until it is, or until another stop().  May be
        called from any thread while the loop is not running.
        """
        cdef _Sync call
        cdef _Timeout limit = None
        cdef bint expired = False
        require_callable(func)
        call = _Sync(self, func)
        queued = make_call(call.begin, None, None, capture_context())
        _loop_claim(self)
        try:
            try:
                if timeout is not None:
                    limit = _timers_call(self, timeout, True, call.end, None, None)
                self.queue.push(queued)
                _loop_start(self)
                if not call.done and call.has_result():
                    call.take_result()  # it was stopped in the iteration of the result
            finally:
                self.queue.take_back(queued)  # if it has not begun
                if limit is not None:
                    expired = limit.timers == NULL  # it has run
                    _timers_cancel(limit)
                if not call.done:
                    call.give_up()
        finally:
            _loop_release(self)
        if call.error is not None:
            raise call.error
        if call.done:
            return call.value
        if expired:
            raise TimeoutError(f"no result after {timeout} seconds")
        raise RuntimeError("IOLoop was stopped before the function was done")

    def run_once(self, timeout=None):
        """Run one iteration, to embed this loop in another one.

        Polls for at most `timeout` seconds, or as long as `start()` would if None.
        Call it when `fileno()` is readable or `next_timeout()` has passed.  After
        stop(), the next call that would poll does not.  May be called from any thread
        while the loop is not running.
        """
        cdef int64_t limit = INT64_MAX
        if timeout is not None:
            limit = max(0, nanoseconds(timeout, True))
        _loop_claim(self)
        try:
            _loop_run(self, limit, True)
        finally:
            _loop_release(self)

    @cython.critical_section
    def next_timeout(self):
        """Return how long the loop would sleep, in seconds, or None for ever.

        Loop thread only.
        """
        _loop_check_thread(self)
        cdef int64_t wait = 0
        if not _run_has_work(self) and not self.poller.undelivered:
            wait = self.timers.time_left(INT64_MAX)
        return None if wait == FOREVER else <double>wait / SECOND

    def fileno(self):
        """Return a file descriptor that is readable when `run_once` is due.

        It is also readable once `next_timeout()` has become less.  It stays the same
        until the loop is closed.  Raises io.UnsupportedOperation if the poller has
        none.  Any thread.
        """
        _loop_check_open(self)
        number = self.poller.fileno()
        with cython.critical_section(self):
            self.embedded = True
            if self.thread_id == 0:
                _waker_go_idle(self)
        return number

    def close(self, all_fds=False):
        """Free the loop; `all_fds` closes every fd and object that has a handler.

        An fd that asyncio watches is asyncio's to close.  Queued callbacks and timeouts
        are dropped.  A second call does nothing.  Raises RuntimeError while the loop is
        running.  Any thread.
        """
        cdef list handlers = []
        cdef _Face face = None
        with cython.critical_section(self):
            if self.state < OPEN:
                return
            if self.thread_id != 0 and self.state != FORKED:
                raise RuntimeError("a running IOLoop can't be closed")
            self.poller.check_thread()
            if all_fds:
                handlers = _table_handlers(self)
            store(&self.state, CLOSED)  # from now on, nobody adds anything
            self.timers.closed = True
            self.table.size = self.table.count = 0
            self.table.handlers = []
            _timers_clear(self)
            if self.runs_asyncio and self.thread_id == get_thread_id():
                _face_end(self.face)  # in a forked child
            face, self.face = self.face, None
        if self.installed and _process.get("loop") is self:
            _process.pop("loop", None)
        if getattr(_threads, "loop", None) is self:
            _threads.loop = None
        _inbox_close(&self.queue.inbox)
        while self.queue.pop() is not None:
            pass
        try:
            self.poller.close()  # which may raise, if it is a user's
        finally:
            try:
                for handler in handlers:
                    try:
                        IOLoop.close_fd((<_Handler>handler).file)
                    except Exception:
                        _report_exception(self, (<_Handler>handler).file)
            finally:
                if face is not None:
                    face.close()

    @cython.critical_section
    def reinit(self):
        """Make the loop usable in a forked child.

        It gets a poller and a waker of its own, keeps the handlers, callbacks and
        timeouts, and leaves the parent's loop alone.  An `impl` given to the
        constructor must have a `reinit()` of its own (RuntimeError).  Does nothing if
        there was no fork.
        """
        if self.state == FORKED:
            _fork_reinit(self)
        else:
            _loop_check_open(self)

    def __enter__(self): return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        cdef int state = load(&self.state)
        name = ("closed" if state < OPEN else "forked" if state == FORKED
                else "running" if load_id(&self.thread_id) else "idle")
        return f"<{type(self).__name__} {name} at {<uintptr_t><void *>self:#x}>"

    def __del__(self):
        if self.state == OPEN and not self.installed and self.face is None:
            PyErr_ResourceWarning(self, 1, b"unclosed IOLoop at %p", <void *>self)

    # Errors and blocking

    def handle_callback_exception(self, callback):
        """Log the exception (`sys.exc_info()`) that `callback` raised.

        Called for callbacks, timeouts and handlers; override it in a subclass or on the
        instance.  If it raises an exception itself, both go to `sys.unraisablehook`.
        Called by the loop's thread.
        """
        logger().error("Exception in callback %r", callback, exc_info=True)

    def set_blocking_signal_threshold(self, seconds, action):
        """Call `action(signal, frame)` when the loop blocks for over `seconds`.

        Uses SIGALRM, at most a quarter of the time late and once for each time that the
        loop blocks; with an `action` of None the signal kills the process, even one
        stuck in C code.  None for `seconds` turns it off at once.  While the loop runs,
        `action` is SIGALRM's handler.  A handler that the program had set before gets
        every SIGALRM that is not the loop's own, and while a callback has set one, the
        loop sends none.  Main thread only (RuntimeError).
        """
        _loop_check_thread(self)
        if action is not None:
            require_callable(action)
        import threading
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("SIGALRM can be handled in the main thread only")
        _watchdog_set(self, seconds, True, action)

    def set_blocking_log_threshold(self, seconds):
        """Log a stack trace when the loop blocks for over `seconds`.

        Calls `log_stack` in the watchdog's thread; no signal is sent.  None turns it
        off at once.  Loop thread only.
        """
        _watchdog_set(self, seconds, False, None)

    def log_stack(self, signal, frame):
        """Log the stack of `frame`, which blocks the loop.

        Called by the watchdog's thread; may serve as an action as well.
        """
        import traceback
        logger().warning("IOLoop blocked for %f seconds in\n%s", self.threshold / 1e9,
                         "".join(traceback.format_stack(frame)))

    def stats(self):
        """Return counters as a dict.  Any thread.

        `iterations`, `polls`, `events`, `callbacks` and `timeouts` count what was run,
        `pending_callbacks`, `pending_timeouts` and `handlers` what is registered now;
        `asleep` is the time spent waiting and `longest_busy` the longest time between
        two waits, both in seconds.  A busy loop polls without waiting, so the latter is
        load and not delay.
        """
        _loop_check_open(self)
        return {
            "iterations": self.iterations, "polls": self.polls, "events": self.events,
            "callbacks": self.queue.count_run(), "timeouts": self.timers.count_run,
            "pending_callbacks": self.queue.count_pending(),
            "pending_timeouts": self.timers.count + self.timers.deferred,
            "handlers": self.table.count - 1,
            "asleep": self.slept / 1e9, "longest_busy": self.longest_busy / 1e9,
        }

    @property
    def _handlers(self):
        """A dict of the handlers by file descriptor, a copy.  Loop thread only."""
        with cython.critical_section(self):
            _loop_check_thread(self)
            return {(<_Handler>handler).number: (<_Handler>handler).callback
                    for handler in _table_handlers(self)}


cdef object _loop_current():
    """The thread's loop, or None; the first loop is current by a weak reference."""
    loop = getattr(_threads, "loop", None)
    if type(loop) is ref:
        loop = loop()
    if loop is None or load(&(<IOLoop>loop).state) < OPEN:
        return None
    return loop


cdef inline int _loop_check_open(IOLoop loop) except -1:
    if load(&loop.state) != OPEN:
        _loop_refuse(loop)


cdef inline int _loop_check_thread(IOLoop loop) except -1:
    cdef unsigned long thread_id = load_id(&loop.thread_id)
    if load(&loop.state) != OPEN or thread_id and thread_id != get_thread_id():
        _loop_refuse(loop)


cdef int _loop_refuse(IOLoop loop) except -1:
    cdef int state = load(&loop.state)
    if state == NEW:
        raise RuntimeError("IOLoop.__init__() has not been called")
    if state == CLOSED:
        raise RuntimeError("IOLoop is closed")
    if state == FORKED:
        raise RuntimeError("this IOLoop was made before a fork: call its reinit() "
                           "or make a new one in the child process")
    raise RuntimeError("IOLoop runs in another thread; the method is not thread-safe")


cdef int _loop_claim(IOLoop loop) except -1:
    """Make this the thread that runs the loop: all others are refused from now on."""
    with cython.critical_section(loop, loop.poller):
        _loop_check_thread(loop)
        if loop.thread_id != 0:
            raise RuntimeError("IOLoop is already running")
        loop.poller.claim()
        store_id(&loop.timers.thread_id, get_thread_id())
        store_id(&loop.thread_id, get_thread_id())


cdef int _loop_release(IOLoop loop) except -1:
    with cython.critical_section(loop):
        _waker_go_idle(loop)
        loop.queue.track()
        store_id(&loop.timers.thread_id, 0)
        store_id(&loop.poller.thread_id, 0)
        store_id(&loop.thread_id, 0)


cdef int _loop_start(IOLoop loop) except -1:
    try:
        if not load(&loop.stopping):
            _loop_run(loop, INT64_MAX, False)
    finally:
        store(&loop.stopping, False)


cdef int _loop_run(IOLoop loop, int64_t limit, bint once,
                   bint poll_first=False) except -1:
    """Iterate once, or until told to stop; borrow what a run needs, and return it."""
    try:
        loop.outer_loop = getattr(_threads, "loop", None)
        _threads.loop = loop
        _wakeup_take(loop)
        store(&loop.queue.inbox.asleep, 0)
        _watchdog_start(loop)
        loop.woken = read_clock()
        _loop_iterate(loop, limit, once, poll_first)
    finally:
        try:
            try:
                _watchdog_stop(loop)
            finally:
                if loop.has_wakeup_fd:
                    _wakeup_give_back(loop)
        finally:
            _run_count_busy(loop, read_clock())
            _threads.loop, loop.outer_loop = loop.outer_loop, None


cdef int _loop_iterate(IOLoop loop, int64_t limit, bint once,
                       bint poll_first) except -1:
    """Iterate; if it has a face, be the thread's running loop for asyncio."""
    with cython.critical_section(loop):
        face = loop.face
    try:
        if face is not None:
            _face_begin(face)
        if poll_first:
            _run_events(loop, limit)
        while _run_iteration(loop, limit):
            if once:
                return 0
        store(&loop.stopping, False)
    finally:
        if loop.runs_asyncio:
            _face_end(loop.face)


# -- Helpers -------------------------------------------------------------------

cdef extern from "Python.h":
    unsigned long get_thread_id "PyThread_get_thread_ident"() nogil
    int PyThread_acquire_lock_timed(PyThread_type_lock, long long us, int intr) nogil
    int PyErr_ResourceWarning(object source, Py_ssize_t level, const char *format,
                              ...) except -1

cdef extern from *:
    r"""
    /* Memory shared with threads that do not hold the GIL.  A store followed by a load
       needs a fence between them when another thread does the opposite. */
    #define ioloop_load(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
    #define ioloop_store(p, value) __atomic_store_n(p, value, __ATOMIC_RELEASE)
    #define ioloop_swap(p, value) __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST)
    #define ioloop_increase(p, by) __atomic_fetch_add(p, by, __ATOMIC_SEQ_CST)
    #define ioloop_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)

    /* What the GIL guards, where there is one.  For the fast methods enter() and
       leave() do what cython.critical_section does, but count no reference. */
    #ifdef Py_GIL_DISABLED
    #  define IOLOOP_FREE_THREADED 1
    #  define ioloop_lock(inbox) pthread_mutex_lock(&(inbox)->lock)
    #  define ioloop_unlock(inbox) pthread_mutex_unlock(&(inbox)->lock)
    typedef PyCriticalSection ioloop_section;
    #  define ioloop_enter PyCriticalSection_Begin
    #  define ioloop_leave PyCriticalSection_End
    /* A thread that is not in a forked child may have been about to lock it. */
    static void ioloop_free_after_fork(PyObject *owner) {
        if (!PyThreadState_Get()->critical_section)  /* else it may be this thread's */
            owner->ob_mutex = (PyMutex){0};
    }
    #else
    #  define IOLOOP_FREE_THREADED 0
    #  define ioloop_lock(inbox) ((void)(inbox))
    #  define ioloop_unlock(inbox) ((void)(inbox))
    typedef char ioloop_section;
    #  define ioloop_enter(section, object) ((void)(section))
    #  define ioloop_leave(section) ((void)(section))
    #  define ioloop_free_after_fork(owner) ((void)(owner))
    #endif
    """
    const bint FREE_THREADED "IOLOOP_FREE_THREADED"
    int load "ioloop_load"(int *p) nogil
    uint64_t load64 "ioloop_load"(atomic64 *p) nogil
    unsigned long load_id "ioloop_load"(unsigned long *p) nogil
    PyObject *load_object "ioloop_load"(PyObject **p) nogil
    void store "ioloop_store"(int *p, int value) nogil
    void store64 "ioloop_store"(atomic64 *p, uint64_t value) nogil
    void store_id "ioloop_store"(unsigned long *p, unsigned long value) nogil
    void store_object "ioloop_store"(PyObject **p, PyObject *value) nogil
    int swap "ioloop_swap"(int *p, int value) nogil
    int increase "ioloop_increase"(int *p, int by) nogil
    void fence "ioloop_fence"() nogil

    void lock "ioloop_lock"(_Inbox *inbox) nogil
    void unlock "ioloop_unlock"(_Inbox *inbox) nogil
    ctypedef struct _Section "ioloop_section":
        pass
    void enter "ioloop_enter"(_Section *section, object owner)
    void leave "ioloop_leave"(_Section *section)
    void free_after_fork "ioloop_free_after_fork"(object owner)

cdef enum:
    # A loop's state; what is less than OPEN has nothing in it.
    NEW
    CLOSED
    OPEN
    FORKED                  # open, but the parent's, until reinit()

cdef enum:
    # epoll's numbers; the other pollers translate to and from them.
    READ = IOLOOP_READ
    PRI = 0x002
    WRITE = IOLOOP_WRITE
    ERROR = IOLOOP_ERROR
    DISABLED = 1 << 29      # kqueue's READ filter for no event at all
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


cdef inline int64_t read_clock(int clock=CLOCK_MONOTONIC) noexcept nogil:
    cdef timespec t
    clock_gettime(clock, &t)
    return <int64_t>t.tv_sec * SECOND + t.tv_nsec


cdef inline int64_t nanoseconds(double seconds, bint up) except? -1:
    """Exact to the nanosecond, also for UNIX times, and saturating."""
    cdef double whole = floor(seconds)
    cdef double rest = as_double((seconds - whole) * 1e9)
    if isnan(seconds):
        raise ValueError("a time can't be NaN")
    if whole >= 9.2e9:
        return INT64_MAX
    if whole <= -9.2e9:
        return INT64_MIN
    return <int64_t>whole * SECOND + <int64_t>(ceil(rest) if up else floor(rest))


cdef inline int64_t add_times(int64_t base, int64_t delay) noexcept nogil:  # saturates
    if delay > 0:
        return min(base, INT64_MAX - delay) + delay
    return max(base, INT64_MIN - delay) + delay


cdef inline timespec as_timespec(int64_t ns) noexcept nogil:
    return timespec(tv_sec=ns // SECOND, tv_nsec=ns % SECOND)


cdef inline int require_callable(object callback) except -1:
    if not callable(callback):
        raise TypeError(f"a callable is required, not {type(callback).__name__}")


cdef inline bint class_has(object thing, str name) except -1:
    # A Mock has every attribute, but the class of its spec, if it has one.
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
    """`fd`, moved out of 0-2, which a program may reopen as its stdout."""
    cdef int moved
    if fd > 2:
        return fd
    moved = fcntl(fd, F_DUPFD_CLOEXEC, 3)
    close(fd)
    return check(moved)


cdef object logger():
    import logging  # takes longer to import than everything else here
    return logging.getLogger("ioloop")


# -- Iteration -----------------------------------------------------------------

ctypedef PyObject *_Object

cdef extern from *:
    r"""
    /* Calls in a context, as Context.run() makes them: of contexts, the limited API
       knows only that method.  `args` is a tuple, `kwargs` a dict or None. */
    #ifdef Py_LIMITED_API
    #  define IOLOOP_LIMITED_API 1
    #  define ioloop_copy_context() (Py_INCREF(Py_None), Py_None)
    #  define ioloop_context_size(context) PyObject_Size(context)
    static PyObject *ioloop_run(PyObject *context) {
        static PyObject *run = NULL;  /* the type's, found once */
        return run ? run : (run = PyObject_GetAttrString(
            (PyObject *)Py_TYPE(context), "run"));
    }
    #  define ioloop_call0(context, function) \
        PyObject_CallFunctionObjArgs(ioloop_run(context), context, function, NULL)
    #  define ioloop_call2(context, function, a, b) \
        PyObject_CallFunctionObjArgs(ioloop_run(context), context, function, a, b, NULL)
    static PyObject *ioloop_call(PyObject *context, PyObject *function,
                                 PyObject *args, PyObject *kwargs) {
        PyObject *own = PyTuple_Pack(2, context, function), *result = NULL;
        PyObject *all = own ? PySequence_Concat(own, args) : NULL;
        kwargs = kwargs == Py_None ? NULL : kwargs;
        if (all)
            result = PyObject_Call(ioloop_run(context), all, kwargs);
        Py_XDECREF(all);
        Py_XDECREF(own);
        return result;
    }
    #else
    #  define IOLOOP_LIMITED_API 0
    #  define ioloop_context_size(context) \
        Py_TYPE(context)->tp_as_mapping->mp_length(context)
    static inline PyObject *ioloop_copy_context(void) {
        PyObject *context = PyThreadState_Get()->context;
        if (context && ioloop_context_size(context))
            return PyContext_Copy(context);
        Py_INCREF(Py_None);
        return Py_None;
    }
    static inline PyObject *ioloop_exit(PyObject *context, PyObject *result) {
        if (PyContext_Exit(context) < 0)
            Py_CLEAR(result);
        return result;
    }
    #  define IN_CONTEXT(call) /* which is made between the two */ \
        (PyContext_Enter(context) < 0 ? NULL : ioloop_exit(context, call))
    static inline PyObject *ioloop_call(PyObject *context, PyObject *function,
                                        PyObject *args, PyObject *kwargs) {
        kwargs = kwargs == Py_None ? NULL : kwargs;
        return IN_CONTEXT(PyObject_Call(function, args, kwargs));
    }
    static inline PyObject *ioloop_call0(PyObject *context, PyObject *function) {
        return IN_CONTEXT(PyObject_CallNoArgs(function));
    }
    static inline PyObject *ioloop_call2(PyObject *context, PyObject *function,
                                         PyObject *a, PyObject *b) {
        PyObject *args[3] = {NULL, a, b};
        Py_ssize_t n = 2 | PY_VECTORCALL_ARGUMENTS_OFFSET;
        return IN_CONTEXT(PyObject_Vectorcall(function, args + 1, n, NULL));
    }
    #endif
    #define ioloop_is_unused(context) \
        (Py_REFCNT(context) == 1 && ioloop_context_size(context) == 0)

    /* For a function that finds an exception already set. */
    #define ioloop_raise() (-1)
    """
    const bint LIMITED_API "IOLOOP_LIMITED_API"
    object copy_if_set "ioloop_copy_context"()
    _Object call "ioloop_call"(_Object context, _Object f, _Object args, _Object kwargs)
    _Object call0 "ioloop_call0"(_Object context, _Object f)
    _Object call2 "ioloop_call2"(_Object context, _Object f, _Object a, _Object b)
    bint is_unused "ioloop_is_unused"(PyObject *context)  # empty, and kept by nobody
    int raise_pending "ioloop_raise"() except -1

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events, revents
    enum: POLLERR, POLLHUP
    int poll_now "poll"(pollfd *files, unsigned int n, int ms)

cdef enum:
    # While callbacks wait, a native poller is asked for events once in so many of
    # them, or once a tick of the coarse clock, a few milliseconds: a system call
    # costs more than a short callback.
    CALLBACKS_PER_POLL = 64

    BATCHES_PER_CHECK = 64  # one fd in so many batches is checked
    SLACK = 50000           # nanoseconds, unless prctl() has set another
    LONGEST_SLEEP = 86400   # seconds; some kernels refuse years, some types overflow

    # A poll that found events at once is followed by one that doesn't wait, which
    # keeps the GIL and reads no clock: 30 % less time for one busy socket.
    AT_ONCE = 5000          # nanoseconds
    EVENTS_PER_OFFER = 64   # polls and events, after which the GIL is offered


cdef int _run_iteration(IOLoop loop, int64_t limit) except -1:
    """One iteration, waiting for at most `limit` ns; false if it was the last."""
    store64(&loop.iterations, loop.iterations + 1)
    store(&loop.queue.inbox.asleep, 0)
    store(&loop.alarms, 0)
    try:
        if loop.runs_asyncio:
            loop.timers.begin_pass()  # what callbacks add is behind what they queued
        _run_callbacks(loop)
        if loop.timers.count:
            _run_timeouts(loop)
    finally:
        loop.timers.end_pass()
    if load(&loop.stopping):
        return False
    _run_events(loop, limit)
    if DEBUG:
        _verify(loop)
    return True


cdef int _run_events(IOLoop loop, int64_t limit) except -1:
    """Steps 4 and 5."""
    cdef int n = _run_poll(loop, limit)
    if n:
        _run_handlers(loop, n)


cdef int _run_callbacks(IOLoop loop) except -1:
    """Step 1: the callbacks that were queued when the iteration began."""
    cdef _Queue queue = loop.queue
    cdef _Inbox *inbox = &queue.inbox
    cdef uint64_t last_post, last, next_call
    cdef _Post post
    lock(inbox)
    last_post, last = load64(&inbox.tail), load64(&inbox.calls)
    unlock(inbox)
    while True:
        if inbox.head < last_post:
            # C's and Python's callbacks run in the order in which they were added.
            next_call = queue.head if queue.head < last else UINT64_MAX
            pthread_mutex_lock(&inbox.lock)
            post = inbox.posts[inbox.head & (inbox.capacity - 1)]
            if post.calls_before <= next_call:
                store64(&inbox.head, inbox.head + 1)
            pthread_mutex_unlock(&inbox.lock)
            if post.calls_before <= next_call:
                try:
                    post.function(loop, post.arg)
                except Exception:
                    _report_exception(loop, None)
                continue
        if queue.head >= last:
            return 0
        called = queue.pop()
        if called is None:
            return 0
        _run_call(loop, called)


cdef int _run_timeouts(IOLoop loop) except -1:
    """Step 2, the pass: the timeouts that are due at one reading of the clock."""
    cdef _Timers timers = loop.timers
    if not timers.passing:
        timers.begin_pass()
    while timers.count and timers.heap[0].deadline <= timers.pass_time:
        called = timers.release(timers.extract(0))
        timers.count_run += 1
        if type(called) is _CTimer:
            try:
                (<_CTimer>called).function(loop, (<_CTimer>called).arg)
            except Exception:
                _report_exception(loop, (<_CTimer>called).owner)
        else:
            _run_call(loop, called)
        called = None  # its destructor may cancel the next one


cdef int _run_poll(IOLoop loop, int64_t limit) except -1:
    """Step 4: collect events; return how many are in the poller's array."""
    cdef _Poller poller = loop.poller
    cdef int64_t wait = 0, coarse_time
    cdef uint64_t calls
    cdef int n = 0
    _loop_check_open(loop)  # a callback may have forked, and its child have closed it
    if poller.undelivered:
        n, poller.undelivered = poller.undelivered, 0
        return n
    if not _run_has_work(loop):
        wait = loop.timers.time_left(limit)
    elif not poller.foreign and not (loop.runs_asyncio and loop.table.count > 1):
        calls, coarse_time = loop.queue.count_run(), read_clock(CLOCK_COARSE)
        if (calls - loop.calls_at_poll < CALLBACKS_PER_POLL
                and coarse_time == loop.coarse_time):
            return 0
        loop.calls_at_poll, loop.coarse_time = calls, coarse_time
    store64(&loop.polls, loop.polls + 1)
    if wait == 0 or loop.eager:
        if loop.since_offer >= EVENTS_PER_OFFER:
            loop.since_offer = 0
            _run_offer_gil()  # may raise, so before anything is collected
        n = poller.wait(0)
        loop.since_offer += 1 + n
        loop.eager = n > 0 and not poller.foreign
    if n == 0 and wait != 0:
        n = _run_sleep(loop, wait)
    loop.table.batch += 1
    try:
        _run_check_signals(loop)
    except BaseException:
        _run_keep_events(loop, 0, n)
        raise
    return n


cdef int _run_sleep(IOLoop loop, int64_t wait) except -1:
    """Poll without the GIL, and count how long."""
    cdef int *asleep = &loop.queue.inbox.asleep
    cdef int64_t before = read_clock(), now = before, left = wait, rest, slack
    cdef bint native = not loop.poller.foreign, early
    cdef int n = 0
    _run_count_busy(loop, before)
    loop.queue.shrink()
    # First the flag, then another look at the queue: a thread that adds something
    # does it the other way round, so one of the two sees the other.
    store(asleep, 1)
    fence()
    try:
        while True:
            _run_check_signals(loop)  # that came before our pipe was the wakeup fd,
            if loop.has_wakeup_fd and _wakeup_take(loop):
                _run_check_signals(loop)  # or while another one was
            # Linux sleeps longer by the thread's timer slack, or by 0.1 %.  If it does
            # not, a second poll sleeps the rest.
            left = min(left, LONGEST_SLEEP * <int64_t>SECOND) if native else left
            slack = max(SLACK, left // 1000) if HAVE_EPOLL and native else 0
            left = 0 if _run_has_work(loop) else left - slack if left > slack else left
            n = loop.poller.wait(left)
            now = read_clock()
            rest = wait - (now - before)
            early = n == 0 and left != 0 and 0 < rest <= slack
            if not early and not loop.poller.interrupted:
                break
            left = wait if wait == FOREVER else max(0, rest)
    finally:
        store(asleep, 0)
        if loop.watchdog is not None:
            loop.watchdog.unpark()
        loop.woken = now
        loop.slept += now - before
    loop.eager = n > 0 and now - before < AT_ONCE and native
    return n


cdef int _run_handlers(IOLoop loop, int n) except -1:
    """Step 5: deliver `n` events, each to the registration that it is for."""
    cdef _Table table = loop.table
    cdef _Poller poller = loop.poller
    cdef uint32_t events
    cdef bint stray = False
    cdef int i = 0
    if table.batch % BATCHES_PER_CHECK == 0:
        # Now and then, check whether an fd that has events is still open.
        ready = &poller.ready[(table.batch // BATCHES_PER_CHECK) % n]
        stray = fcntl(ready.fd, F_GETFD) == -1 and table.slot(ready.fd) != NULL
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
                # A stale event if its registration ended in this batch; one that ended
                # before can have no event: this one is stray.
                stray |= slot.changed_in != table.batch
                continue
            events = ready.events & (slot.events | ERROR)
            if not events or not slot.events or slot.muted:
                continue
            slot.muted = slot.events & ONESHOT and poller.oneshot
            handler = <_Handler>list_peek(table.handlers, ready.fd)
            if slot.function != NULL:
                try:
                    slot.function(loop, ready.fd, events, slot.arg)
                except Exception as error:
                    if not _run_has_lost_peer(handler.number, error):
                        _report_exception(loop, handler.callback)
            else:
                _run_handler(loop, handler, events)
            handler = None  # its destructor may remove the next one
    except BaseException:
        _run_keep_events(loop, i, n)
        raise
    if stray and loop.state == OPEN:
        _run_rebuild_poller(loop)


cdef int _run_handler(IOLoop loop, _Handler handler, uint32_t events) except -1:
    cdef object mask = events
    cdef PyObject *context = <PyObject *>(
        loop.empty_context if handler.context is None else handler.context)
    try:
        _run_result(loop, context, handler.callback, call2(
            context, <PyObject *>handler.callback, <PyObject *>handler.file,
            <PyObject *>mask), handler)
    finally:
        if handler.context is None and not is_unused(context):
            # What a handler sets in its context is there when it is called again.
            handler.context, loop.empty_context = loop.empty_context, Context()


cdef int _run_call(IOLoop loop, object called) except -1:
    """Run a callback or timeout of Python's in its context."""
    cdef object callback, context = None
    cdef PyObject *entered
    cdef PyObject *result
    if _handle_is_ours(called):
        return _handle_run(loop, <_Handle>called)
    callback, entered = called, <PyObject *>loop.empty_context
    if type(called) is _Call:
        callback, context = (<_Call>called).callback, (<_Call>called).context
        if context is not None:
            entered = <PyObject *>context
        result = call(entered, <PyObject *>callback, <PyObject *>(<_Call>called).args,
                      <PyObject *>(<_Call>called).kwargs)
    else:
        result = call0(entered, <PyObject *>callback)
    try:
        _run_result(loop, entered, callback, result, None)
    finally:
        if context is None and not is_unused(entered):
            loop.empty_context = Context()


cdef inline int _run_result(IOLoop loop, PyObject *context, object callback,
                            PyObject *result, _Handler handler) except -1:
    """Deal with what a callable, maybe a handler, returned, or raised (NULL)."""
    if result == <PyObject *>None:
        Py_XDECREF(result)
    else:
        _run_unusual_result(loop, context, callback, result, handler)


cdef int _run_unusual_result(IOLoop loop, PyObject *context, object callback,
                             PyObject *result, _Handler handler) except -1:
    """Report an exception; follow a coroutine or future to its end."""
    try:
        if result == NULL:
            raise_pending()
        if type(<object>result) not in _plain_types:
            value = <object>result
            (<object>context).run(_future_follow, loop, callback, value, handler)
    except Exception as error:  # KeyboardInterrupt and its like leave start()
        if handler is None or not _run_has_lost_peer(handler.number, error):
            (<object>context).run(_report_exception, loop, callback)
    finally:
        Py_XDECREF(result)


cdef bint _run_has_lost_peer(int fd, object error) except -1:
    """Return whether EPIPE is for the handler's own fd, which gets an event as well."""
    if not isinstance(error, OSError) or error.errno != EPIPE:
        return False
    query = pollfd(fd=fd, events=0, revents=0)
    return poll_now(&query, 1, 0) == 1 and query.revents & (POLLERR | POLLHUP)


# Any Python function hands the GIL to a thread that has waited for it for a switch
# interval.  Just releasing the GIL doesn't help: the waiter wakes up too late, and
# starts another full interval.
_run_offer_gil = eval("lambda: None")


cdef inline void _run_count_busy(IOLoop loop, int64_t now) noexcept:
    if loop.woken:
        loop.longest_busy = max(loop.longest_busy, now - loop.woken)
    loop.woken = 0


cdef inline int _run_check_signals(IOLoop loop) except -1:
    """Run the handlers of signals; in a child that one forked, the run ends."""
    PyErr_CheckSignals()
    return _loop_check_open(loop)


cdef inline bint _run_has_work(IOLoop loop) noexcept:
    """Return whether there is something to do without polling."""
    return load(&loop.stopping) or loop.queue.count_pending()


cdef int _run_keep_events(IOLoop loop, int first, int n) except -1:
    """Keep undelivered events that the poller would not report again."""
    cdef _Poller poller = loop.poller
    cdef int i
    poller.undelivered = 0
    for i in range(first, n):
        slot = loop.table.slot(poller.ready[i].fd)
        if slot != NULL and (poller.foreign or slot.events & (EDGE | ONESHOT)):
            poller.ready[poller.undelivered] = poller.ready[i]
            poller.undelivered += 1


cdef int _run_rebuild_poller(IOLoop loop) except -1:
    """Get rid of strays by building a new set, at most ten times a second.

    They are in an epoll set if an fd was closed before it was removed, while a
    duplicate of it lives on.
    """
    cdef int64_t now = read_clock()
    cdef int fd
    if loop.poller.foreign or (loop.rebuilt and now - loop.rebuilt < SECOND // 10):
        return 0
    loop.rebuilt = now
    for fd in range(<int>loop.table.size):
        if loop.table.slot(fd) != NULL:
            loop.table.slots[fd].lost = loop.poller.has_lost(fd)
    try:
        loop.poller.rebuild(loop.table)
    except OSError:
        return 0  # the old set is still there, and will report the stray again
    try:
        logger().warning(
            "a file descriptor was closed before remove_handler() while a duplicate of "
            "it is open; the poller was rebuilt without it")
    except Exception as error:
        _report_unraisable(loop, error)


def _report_exception(IOLoop loop not None, callback):
    """Give the exception being handled to the hook, or both to sys.unraisablehook."""
    error, failure = sys.exc_info()[1], None
    try:
        loop.handle_callback_exception(callback)
    except Exception as raised:
        failure = raised
    if failure is not None:
        _report_unraisable(callback, error)
        _report_unraisable(callback, failure)


cdef void _report_unraisable(object where, object error) noexcept:
    PyErr_SetObject(type(error), error)
    PyErr_WriteUnraisable(where)


# -- Queue ---------------------------------------------------------------------
# Python's callbacks are in a ring of calls.  A call is the callable itself, or a
# _Call if it has arguments or a context.  The ring is a list, so that the garbage
# collector sees what is in it.
#
# Whatever other threads need without the GIL is in the inbox: the ring of C's
# callbacks, called posts, and the waker's pipe.  A post carries the number of
# Python callbacks queued before it, which puts the two in order.
#
# No Python code can run while a ring changes or the inbox's lock is held:
# whatever allocates or drops a reference does so before or after.

cdef extern from *:
    r"""
    /* A list used as an array of references that the garbage collector sees.
       `peek` borrows, `set` moves a reference over one that has moved away,
       `put` replaces a None, `take` leaves a None. */
    #ifdef Py_LIMITED_API
    #  define ioloop_list_peek(list, i) PyList_GetItem(list, i)
    static inline void ioloop_list_set(PyObject *list, Py_ssize_t i, PyObject *item) {
        Py_XINCREF(PyList_GetItem(list, i));
        PyList_SetItem(list, i, item);
    }
    #else
    #  define ioloop_list_peek(list, i) PyList_GET_ITEM(list, i)
    #  define ioloop_list_set(list, i, item) PyList_SET_ITEM(list, i, item)
    #endif
    static inline void ioloop_list_put(PyObject *list, Py_ssize_t i, PyObject *item) {
        Py_INCREF(item);
        ioloop_list_set(list, i, item);
        Py_DECREF(Py_None);
    }
    static inline PyObject *ioloop_list_take(PyObject *list, Py_ssize_t i) {
        PyObject *item = ioloop_list_peek(list, i);
        Py_INCREF(Py_None);
        ioloop_list_set(list, i, Py_None);
        return item;
    }
    """
    bint PyObject_GC_IsTracked(PyObject *)
    void PyObject_GC_Track(PyObject *)
    void PyObject_GC_UnTrack(PyObject *)
    Py_ssize_t Py_REFCNT(PyObject *)
    PyObject *list_peek "ioloop_list_peek"(list items, Py_ssize_t i)
    void list_put "ioloop_list_put"(list items, Py_ssize_t i, object item)
    object list_take "ioloop_list_take"(list items, Py_ssize_t i)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_sigmask(int how, const sigset_t *new, sigset_t *old)
    int pthread_atfork(void (*before)() noexcept nogil, void (*parent)() noexcept nogil,
                       void (*child)() noexcept nogil)

cdef struct _Post:
    ioloop_callback_v1 function
    void *arg
    uint64_t calls_before   # how many of Python's callbacks go first

cdef struct _Inbox:
    pthread_mutex_t lock    # of posts, writer and closed, and calls without the GIL
    _Inbox *next            # in the list of them
    _Post *posts            # a ring
    atomic64 head, tail
    uint64_t capacity
    atomic64 calls          # Python's callbacks so far
    int reader, writer      # the waker's pipe
    int asleep              # the loop sleeps or is about to,
    int signalled           # and the pipe has a byte that will wake it
    int closed

cdef enum:
    SMALL_RING = 64         # callbacks that fit from the start
    LARGE = 1024            # callbacks or timeouts; capacity above is given back


@cython.final
cdef class _Queue:
    cdef list ring
    cdef uint64_t head, tail, mask      # callbacks taken, added; the capacity - 1
    cdef _Inbox inbox

    def __cinit__(self):
        # First what __dealloc__ undoes, and what can't fail.
        self.inbox.reader = self.inbox.writer = -1
        pthread_mutex_init(&self.inbox.lock, NULL)
        _fork_list(&self.inbox, True)
        self.ring = [None] * SMALL_RING
        self.mask = SMALL_RING - 1
        _waker_open(&self.inbox)

    def __dealloc__(self):
        _inbox_close(&self.inbox)
        _fork_list(&self.inbox, False)
        pthread_mutex_destroy(&self.inbox.lock)
        free(self.inbox.posts)

    cdef inline int push(self, object called) except -1:
        """Queue a call; wake the loop if it sleeps."""
        cdef uint64_t capacity
        lock(&self.inbox)
        while self.tail - self.head > self.mask:
            capacity = 2 * (self.mask + 1)
            unlock(&self.inbox)
            self.resize(capacity)
            lock(&self.inbox)
        if FREE_THREADED and self.inbox.closed:
            unlock(&self.inbox)
            return 0  # by another thread, after the caller had looked
        list_put(self.ring, <Py_ssize_t>(self.tail & self.mask), called)
        self.tail += 1
        store64(&self.inbox.calls, self.tail)
        unlock(&self.inbox)
        if load(&self.inbox.asleep):
            try:
                _waker_wake(self)
            except OSError:
                self.take_back(called)
                raise

    cdef inline object pop(self):
        """Take the next call out, or return None if it has been taken back."""
        lock(&self.inbox)
        called = list_take(self.ring, <Py_ssize_t>(self.head & self.mask))
        self.head += self.head != self.tail
        unlock(&self.inbox)
        return called

    cdef object take_back(self, object called):
        """Undo the last push, if it is of this call, whose caller gets an error."""
        cdef Py_ssize_t last
        taken = None
        lock(&self.inbox)
        last = <Py_ssize_t>((self.tail - 1) & self.mask)
        if self.tail > self.head and list_peek(self.ring, last) == <PyObject *>called:
            self.tail -= 1
            store64(&self.inbox.calls, self.tail)
            taken = list_take(self.ring, last)
        unlock(&self.inbox)
        return taken  # to be dropped without the lock

    cdef int resize(self, uint64_t capacity) except -1:
        """Move to a ring for so many calls, a power of two, if they fit."""
        # The allocation may collect garbage, and that may queue callbacks.
        cdef list ring = [None] * <Py_ssize_t>capacity, old
        cdef uint64_t n
        lock(&self.inbox)
        old, n = self.ring, self.head
        if self.tail - n <= capacity:
            while n != self.tail:
                list_put(ring, <Py_ssize_t>(n & (capacity - 1)),
                         list_take(old, <Py_ssize_t>(n & self.mask)))
                n += 1
            self.ring, self.mask = ring, capacity - 1
        unlock(&self.inbox)

    cdef int shrink(self) except -1:
        """After a burst: give back half of a large ring that is hardly used."""
        cdef uint64_t capacity, used
        lock(&self.inbox)
        capacity, used = self.mask + 1, self.tail - self.head
        unlock(&self.inbox)
        if capacity > LARGE and used < capacity // 8:
            try:
                self.resize(capacity // 2)
            except MemoryError:
                pass

    cdef int track(self) noexcept:
        """Show the garbage collector what a run has left."""
        cdef uint64_t n
        cdef PyObject *called
        for n in range(self.head, self.tail):
            called = list_peek(self.ring, <Py_ssize_t>(n & self.mask))
            if _handle_is_ours(<object>called) or type(<object>called) is _Call:
                _queue_track(called)

    cdef inline uint64_t count_run(self) noexcept:
        return self.head + load64(&self.inbox.head)

    cdef inline uint64_t count_pending(self) noexcept:
        cdef uint64_t count
        lock(&self.inbox)
        count = self.tail - self.head + load64(&self.inbox.tail) - self.inbox.head
        unlock(&self.inbox)
        return count


@cython.final
cdef class _Call:
    cdef object callback, context
    cdef tuple args
    cdef dict kwargs


cdef inline object make_call(object callback, object args, dict kwargs, object context):
    """A call; None stands for no arguments and for an empty context."""
    cdef _Call made
    if args is None and context is None and not kwargs:
        return callback
    made = _Call.__new__(_Call)
    made.callback, made.context, made.kwargs = callback, context, kwargs or None
    made.args = () if args is None else <tuple>args
    return made


cdef inline object capture_context():
    """A copy of the current context; None for an empty one, which costs nothing."""
    if LIMITED_API:
        context = copy_context()
        return context if len(context) else None
    return copy_if_set()


cdef inline int _queue_add(IOLoop loop, object callback, object args, dict kwargs,
                           object context) except -1:
    _loop_check_open(loop)
    require_callable(callback)
    called = make_call(callback, args, kwargs, context)
    if called is callback:
        return loop.queue.push(called)
    return _queue_push(loop, called)


# While a loop runs, nothing in its queue is garbage, and the garbage collector need not
# walk through thousands of calls to find that out.  It sees those again that somebody
# keeps when they are run, and those that are left when the run ends.

cdef inline int _queue_push(IOLoop loop, object called) except -1:
    """Queue a _Call or a _Handle that nobody else can have yet."""
    loop.queue.push(called)
    if not FREE_THREADED and loop.thread_id != 0:
        PyObject_GC_UnTrack(<PyObject *>called)


cdef inline int _queue_track(PyObject *called) noexcept:
    if not FREE_THREADED and not PyObject_GC_IsTracked(called):
        PyObject_GC_Track(called)


cdef bint _inbox_grow(_Inbox *inbox) noexcept nogil:
    cdef uint64_t capacity = 2 * inbox.capacity if inbox.capacity else SMALL_RING
    cdef uint64_t n = inbox.head
    cdef _Post *posts = <_Post *>malloc(capacity * sizeof(_Post))
    if posts == NULL:
        return False
    while n != inbox.tail:
        posts[n & (capacity - 1)] = inbox.posts[n & (inbox.capacity - 1)]
        n += 1
    free(inbox.posts)
    inbox.posts, inbox.capacity = posts, capacity
    return True


cdef void _inbox_close(_Inbox *inbox) noexcept nogil:
    pthread_mutex_lock(&inbox.lock)
    inbox.closed = 1
    _waker_close(inbox)
    inbox.head = inbox.tail
    pthread_mutex_unlock(&inbox.lock)


# -- Waker and signals ---------------------------------------------------------
# The waker is a pipe whose reader the poller watches: a byte in it wakes a loop that
# sleeps.  It is signalled at most once until the loop has drained it, and only while
# the loop sleeps or is about to.
#
# While the loop runs in the main thread, the pipe is Python's signal wakeup fd too,
# so that a signal ends the poll, whichever thread the kernel gave it to.  The waker's
# own byte is 0; any other is the number of a signal, and is passed on to the outer
# wakeup fd, which would have got it without the loop.

cdef extern from *:
    """
    /* signal.set_wakeup_fd() looks at the fd, which takes a microsecond, but before
     * CPython 3.13 there is nothing else for a module. */
    static int ioloop_is_wakeup_fd(int fd)
    {
    #if PY_VERSION_HEX >= 0x030d0000 && !defined(Py_LIMITED_API)
        int found = PySignal_SetWakeupFd(fd);
        if (found == fd)
            return 1;
        PySignal_SetWakeupFd(found);
    #endif
        (void)fd;
        return 0;
    }
    """
    bint is_wakeup_fd "ioloop_is_wakeup_fd"(int fd)     # false if nobody can tell

cdef int _waker_open(_Inbox *inbox) except -1:
    """Make the pipe; in a forked child, make a new one."""
    cdef int fds[2]
    check(open_pipe(fds))
    _waker_close(inbox)
    inbox.writer = fds[1]  # closed with the inbox if the next step fails
    inbox.reader = above_stdio(fds[0])
    inbox.writer = -1
    inbox.writer = above_stdio(fds[1])
    inbox.signalled = inbox.closed = 0


cdef void _waker_close(_Inbox *inbox) noexcept nogil:
    if inbox.reader >= 0:
        close(inbox.reader)
    if inbox.writer >= 0:
        close(inbox.writer)
    inbox.reader = inbox.writer = -1


cdef int _waker_register(IOLoop loop) except -1:
    """Watch the reader as a C handler, which needs no Python object."""
    return _table_add(loop, loop.queue.inbox.reader, READ, _waker_drain, NULL,
                      _Handler.__new__(_Handler, loop.queue, None, None))


cdef int _waker_signal(_Inbox *inbox) noexcept nogil:
    """Wake the loop if it sleeps; return 0 or an errno, and leave errno alone."""
    cdef int saved = errno, error = 0
    fence()
    if not load(&inbox.asleep) or swap(&inbox.signalled, 1):
        return 0
    pthread_mutex_lock(&inbox.lock)
    if not inbox.closed:
        while inbox.writer >= 0 and write(inbox.writer, b"\0", 1) == -1:
            if errno != EINTR:
                error = 0 if errno == EAGAIN else errno  # full, so it has a byte
                break
    if error:
        store(&inbox.signalled, 0)
    pthread_mutex_unlock(&inbox.lock)
    (&errno)[0] = saved
    return error


cdef int _waker_wake(_Queue queue) except -1:
    cdef int error = _waker_signal(&queue.inbox)
    if error:
        raise OSError(error, "the sleeping loop can't be woken: " + os.strerror(error))


cdef int _waker_go_idle(IOLoop loop) noexcept:
    """Between iterations: somebody else may poll our fileno()."""
    store(&loop.queue.inbox.asleep, loop.embedded)
    fence()
    if loop.embedded and (loop.queue.count_pending() or loop.poller.undelivered):
        _waker_signal(&loop.queue.inbox)


cdef int _waker_drain(object loop, int fd, uint32_t events, void *arg) except -1:
    """Empty the pipe, and pass on what is not ours."""
    cdef object outer = (<IOLoop>loop).outer_loop
    cdef int outer_fd = (<IOLoop>loop).outer_wakeup_fd
    cdef unsigned char buffer[512]
    cdef ssize_t n = sizeof(buffer), i, count
    while n == sizeof(buffer):
        n, count = read(fd, buffer, sizeof(buffer)), 0
        for i in range(n):
            if buffer[i]:
                increase(&(<IOLoop>loop).alarms, buffer[i] == SIGALRM)
                buffer[count] = buffer[i]
                count += 1
        if count and outer_fd >= 0:
            # Lost if that fd is full, as it would be without us.
            write(outer_fd, buffer, count)
            if (isinstance(outer, IOLoop)
                    and (<IOLoop>outer).queue.inbox.writer == outer_fd):
                _waker_drain(outer, (<IOLoop>outer).queue.inbox.reader, READ, NULL)
    # First empty, then ready to be signalled again: the queue is looked at after.
    store(&(<IOLoop>loop).queue.inbox.signalled, 0)


cdef bint _wakeup_take(IOLoop loop) except -1:
    """Make the pipe the wakeup fd, and serve the one found; false if it was ours."""
    cdef int found
    if loop.has_wakeup_fd and is_wakeup_fd(loop.queue.inbox.writer):
        return False
    try:
        found = _wakeup_swap(loop.queue.inbox.writer, loop.has_wakeup_fd)
    except ValueError:
        return False  # not the main thread, which is the one that handles signals
    if found == loop.queue.inbox.writer:
        if loop.has_wakeup_fd:
            return False
        found = -1  # somebody restored ours from an earlier run
    loop.has_wakeup_fd, loop.outer_wakeup_fd = True, found
    return True


cdef int _wakeup_give_back(IOLoop loop) except -1:
    """Restore the previous fd, or the one that somebody has set since."""
    cdef int found = _wakeup_swap(loop.outer_wakeup_fd, True)
    loop.has_wakeup_fd = False
    if found != loop.queue.inbox.writer:
        loop.outer_wakeup_fd = found
        _wakeup_swap(found, True)
    _waker_drain(loop, loop.queue.inbox.reader, READ, NULL)


cdef int _wakeup_swap(int fd, bint lenient) except? -2:
    """Set it, or none if it is closed; return the one before."""
    # The old warn_on_full_buffer can't be queried; False is the safer guess.
    for _ in range(2):
        try:
            return _signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
        except (OSError, ValueError):
            if not lenient:
                raise
            fd = -1
        except MemoryError:
            pass
    return _signal.set_wakeup_fd(fd)


# -- Timeouts ------------------------------------------------------------------
# Three arrays of one capacity, and a handle for the user:
#
#   heap       pairs of a deadline and a handle, with four children to a node, in the
#              order of (deadline, adding); it owns the handles.  At its other end
#              are the deferred ones: added during a pass and due already, they run
#              in the next pass, so that a pass ends.
#   calls      what to call: a list, so that the garbage collector sees it
#   free_keys  the indices of `calls` that are free, as a stack
#
# A handle refers to no Python object, so it costs the garbage collector nothing.
# It knows its key and its index in the heap: cancelling removes it in O(log n).
#
# Deadlines are nanoseconds on the loop's clock: CLOCK_MONOTONIC, or time_func.
# INT64_MAX is never.

cdef enum:
    CLOCK_WAS_SET = 10000   # a jump of the wall clock by so many nanoseconds

cdef struct _Entry:
    int64_t deadline
    PyObject *timeout


@cython.final
cdef class _Timers:
    cdef object time_func           # None: the monotonic clock
    cdef _Queue queue               # its waker tells of a new nearest timeout
    cdef list calls
    cdef _Entry *heap
    cdef int *free_keys
    cdef Py_ssize_t capacity        # of the three arrays
    cdef Py_ssize_t count           # timeouts in the heap,
    cdef Py_ssize_t deferred        # at its other end,
    cdef Py_ssize_t free            # and keys for more
    cdef int64_t added
    cdef uint64_t count_run
    cdef int64_t offset             # of the wall clock, as long as nobody sets it
    cdef unsigned long thread_id    # the same as the loop's
    cdef bint passing               # a pass has begun,
    cdef int64_t pass_time          # at this time
    cdef bint closed

    def __cinit__(self, _Queue queue not None, time_func):
        self.queue, self.time_func = queue, time_func
        self.calls = []

    def __dealloc__(self):
        cdef Py_ssize_t i
        self.end_pass()
        for i in range(self.count):
            store_object(&(<_Timeout>self.heap[i].timeout).timers, NULL)
            Py_XDECREF(self.heap[i].timeout)
        free(self.heap)
        free(self.free_keys)

    cdef inline bint is_ours(self) noexcept:
        """Whether this thread runs the loop, or none does."""
        return self.thread_id == 0 or self.thread_id == get_thread_id()

    cdef int check_thread(self) except -1:
        if not self.is_ours():
            raise RuntimeError("IOLoop runs in another thread")

    # The clock

    cdef inline int64_t now(self) except? -1:
        if self.time_func is None:
            return read_clock()
        return nanoseconds(self.time_func(), False)

    cdef int64_t deadline(self, object when, bint delay) except? -1:
        """A delay, a timedelta or a time of time(), as nanoseconds on our clock."""
        cdef int64_t target
        if not delay and type(when) is not float and class_has(when, "total_seconds"):
            when, delay = when.total_seconds(), True
        target = nanoseconds(when, True)
        if delay:
            return add_times(self.now(), target)
        if self.time_func is not None or target == INT64_MAX or target == INT64_MIN:
            return target
        return add_times(target, -self.wall_offset())

    cdef int64_t wall_offset(self) noexcept:
        """How far the wall clock is ahead; stays the same unless the clock is set."""
        cdef int64_t offset = read_clock(CLOCK_REALTIME) - read_clock()
        if not -CLOCK_WAS_SET < offset - self.offset < CLOCK_WAS_SET:
            offset = _clock_measure_offset()  # was there just a pause between the two?
            if not -CLOCK_WAS_SET < offset - self.offset < CLOCK_WAS_SET:
                self.offset = offset
        return self.offset

    cdef int64_t time_left(self, int64_t limit) except -2:
        """Until the nearest deadline: 0, nanoseconds up to a limit, or FOREVER."""
        if limit and self.count and self.heap[0].deadline != INT64_MAX:
            limit = min(limit, max(0, add_times(self.heap[0].deadline, -self.now())))
        return FOREVER if limit == INT64_MAX else limit

    # Adding and cancelling

    cdef inline _Timeout add(self, int64_t deadline, object called):
        timeout = <_Timeout>_Timeout.__new__(_Timeout)
        self.arm(timeout, deadline, called)
        return timeout

    cdef int arm(self, _Timeout timeout, int64_t deadline, object called) except -1:
        """Insert an inactive timeout, or defer it if it must not run in this pass."""
        self.reserve()
        # From here on nothing can run that would use up the free key.
        self.free -= 1
        timeout.key = self.free_keys[self.free]
        list_put(self.calls, timeout.key, called)
        store_object(&timeout.timers, <PyObject *>self)
        Py_INCREF(timeout)
        if self.passing and deadline <= self.pass_time:
            self.deferred += 1
            entry = self.stamp(timeout, deadline)
            _heap_set(self.heap, self.capacity - self.deferred, entry)
            return 0
        self.count += 1
        return self.place(timeout, self.count - 1, deadline)

    cdef inline _Entry stamp(self, _Timeout timeout, int64_t deadline) noexcept:
        self.added += 1
        timeout.due, timeout.order = deadline, 2 * self.added + (self.time_func is None)
        return _Entry(deadline, <PyObject *>timeout)

    cdef inline int place(self, _Timeout timeout, Py_ssize_t at, int64_t due) except -1:
        """Put it where it belongs, from a free place in the heap."""
        _heap_sift(self.heap, self.count, at, self.stamp(timeout, due))
        # Somebody who polls our fileno() only knows a later timeout, or none.
        if timeout.index == 0 and load(&self.queue.inbox.asleep):
            try:
                _waker_wake(self.queue)
            except OSError:
                _timers_cancel(timeout)
                raise

    cdef int begin_pass(self) except -1:
        """From now on, what is added and due already is deferred to the next pass."""
        self.pass_time = self.now() if self.count else INT64_MIN
        self.passing = True

    cdef inline void end_pass(self) noexcept:
        """Enter what was deferred into the heap."""
        self.passing = False
        while self.deferred:
            entry = self.heap[self.capacity - self.deferred]
            self.deferred -= 1
            self.count += 1
            _heap_sift(self.heap, self.count, self.count - 1, entry)

    cdef inline _Timeout extract(self, Py_ssize_t index):
        """Take a timeout out of the heap; it still has its key."""
        timeout = <_Timeout>self.heap[index].timeout
        Py_DECREF(timeout)
        if index >= self.count:  # a deferred one
            _heap_set(self.heap, index, self.heap[self.capacity - self.deferred])
            self.deferred -= 1
            return timeout
        self.count -= 1
        if index != self.count:
            _heap_sift(self.heap, self.count, index, self.heap[self.count])
        return timeout

    cdef inline object release(self, _Timeout timeout):
        """Free the key of a timeout that has left the heap; return its call."""
        cdef int key = timeout.key
        store_object(&timeout.timers, NULL)
        self.free_keys[self.free] = key
        self.free += 1
        return list_take(self.calls, key)

    cdef inline int reserve(self) except -1:
        while self.free == 0:
            self.resize(2 * self.capacity + 64)

    cdef int resize(self, Py_ssize_t capacity) except -1:
        """Move to arrays of another capacity, if the timeouts fit."""
        # The allocation may collect garbage, and that may add and cancel timeouts.
        cdef list calls = [None] * capacity, old
        cdef Py_ssize_t used = self.capacity - self.free, last = self.count - 1
        cdef Py_ssize_t i, source, target
        heap = <_Entry *>malloc(capacity * sizeof(_Entry))
        free_keys = <int *>malloc(capacity * sizeof(int))
        if heap == NULL or free_keys == NULL or used > capacity:
            free(heap)
            free(free_keys)
            if heap == NULL or free_keys == NULL:
                raise MemoryError
            return 0
        old = self.calls
        for i in range(used):
            source = target = i
            if i >= self.count:  # a deferred one, at the other end
                source, target = self.capacity + last - i, capacity + last - i
            _heap_set(heap, target, self.heap[source])
            timeout = <_Timeout>heap[target].timeout
            list_put(calls, i, list_take(old, timeout.key))
            timeout.key = <int>i
        for i in range(used, capacity):
            free_keys[capacity - 1 - i] = <int>i
        free(self.heap)
        free(self.free_keys)
        self.heap, self.free_keys, self.calls = heap, free_keys, calls
        self.capacity, self.free = capacity, capacity - used


@cython.final
@cython.freelist(64)
cdef class _Timeout:
    """The handle that `add_timeout` returns."""
    cdef PyObject *timers           # where it is; NULL: it has run or was cancelled
    cdef int64_t due                # its deadline
    cdef int64_t order              # among equal deadlines; odd without a time_func
    cdef int index, key             # in the heap, and in the calls

    def __init__(self):
        raise TypeError("a timeout is made by IOLoop.add_timeout()")

    def cancel(self):
        """Cancel the timeout, unless it has run or was cancelled.  Loop thread only."""
        cdef _Section section
        guard = _timers_guard(load_object(&self.timers))
        if guard is not None:
            enter(&section, guard)
            try:
                if self.timers != NULL:
                    (<_Timers>self.timers).check_thread()
                    _timers_cancel(self)
            finally:
                leave(&section)

    @property
    def callback(self):
        """The callable, or None once it has run or was cancelled.  Loop thread only."""
        guard = _timers_guard(load_object(&self.timers))
        if guard is not None:
            with cython.critical_section(guard):
                if self.timers != NULL and (<_Timers>self.timers).calls is not None:
                    (<_Timers>self.timers).check_thread()
                    called = (<_Timers>self.timers).calls[self.key]
                    return (<_Call>called).callback if type(called) is _Call else called

    @property
    def deadline(self):
        """The time in seconds on the clock of the loop's `time()`.  Any thread."""
        cdef PyObject *timers = load_object(&self.timers)
        cdef int64_t offset = 0
        guard = _timers_guard(timers)
        if self.due == INT64_MAX:
            return HUGE_VAL
        if self.order & 1:
            offset = (_clock_measure_offset() if guard is None
                      else (<_Timers>timers).wall_offset())
        return <double>add_times(self.due, offset) / SECOND

    def __repr__(self):
        dead = load_object(&self.timers) == NULL
        return f"<ioloop._Timeout {'dead' if dead else f'at {self.deadline:.6f}'}>"


cdef inline object _timers_guard(PyObject *timers):
    """Whose critical section guards a timeout there; None if there is no such loop."""
    if timers == NULL:
        return None
    if not FREE_THREADED:
        return <object>timers
    # Another thread may be dropping them: their address leads to a loop that lives.
    loop = _loops.get(<uintptr_t>timers)
    return None if loop is None else loop()


cdef inline _Timeout _timers_call(IOLoop loop, object when, bint delay,
                                  object callback, object args, dict kwargs):
    cdef int64_t deadline
    cdef _Section section
    enter(&section, loop)
    try:
        _loop_check_thread(loop)
        require_callable(callback)
        deadline = loop.timers.deadline(when, delay)
        _loop_check_thread(loop)  # a hostile __float__ or time_func may have closed it
        called = make_call(callback, args, kwargs, capture_context())
        return loop.timers.add(deadline, called)
    finally:
        leave(&section)


cdef int _timers_cancel(_Timeout timeout) except -1:
    """Remove a timeout and drop what it refers to; also during its own pass."""
    cdef _Timers timers
    if timeout.timers == NULL or (<_Timers>timeout.timers).calls is None:
        return 0  # inactive, or the garbage collector has been here
    timers = <_Timers>timeout.timers
    timers.extract(timeout.index)
    timers.release(timeout)
    if timers.capacity > LARGE and timers.capacity - timers.free < timers.capacity // 4:
        try:
            timers.resize(timers.capacity // 2)
        except MemoryError:
            pass  # it is cancelled all the same


cdef int _timers_clear(IOLoop loop) except -1:
    cdef _Timeout timeout  # kept alive while it is cancelled
    loop.timers.end_pass()
    while loop.timers.count:
        timeout = <_Timeout>loop.timers.heap[loop.timers.count - 1].timeout
        _timers_cancel(timeout)


cdef int64_t _clock_measure_offset() noexcept:
    """By the quickest of five samples, so that no preempted one shifts deadlines."""
    cdef int64_t before, wall, after, offset = 0, shortest = INT64_MAX
    for _ in range(5):
        before = read_clock()
        wall = read_clock(CLOCK_REALTIME)
        after = read_clock()
        if after - before < shortest:
            shortest, offset = after - before, wall - after
    return offset


cdef inline bint _heap_precedes(_Entry *one, _Entry *other) noexcept:
    if one.deadline != other.deadline:
        return one.deadline < other.deadline
    return (<_Timeout>one.timeout).order < (<_Timeout>other.timeout).order


cdef inline void _heap_set(_Entry *heap, Py_ssize_t index, _Entry entry) noexcept:
    heap[index] = entry
    (<_Timeout>entry.timeout).index = <int>index


cdef void _heap_sift(_Entry *heap, Py_ssize_t count, Py_ssize_t index,
                     _Entry entry) noexcept:
    """Move the free place at `index` up, or else down, to where the entry belongs."""
    cdef Py_ssize_t start = index, parent = (index - 1) >> 2, child, best, sibling
    while index > 0 and _heap_precedes(&entry, &heap[parent]):
        _heap_set(heap, index, heap[parent])
        index, parent = parent, (parent - 1) >> 2
    child = 4 * index + 1 if index == start else count
    while child < count:
        best = child
        for sibling in range(child + 1, min(child + 4, count)):
            if _heap_precedes(&heap[sibling], &heap[best]):
                best = sibling
        if _heap_precedes(&entry, &heap[best]):
            break
        _heap_set(heap, index, heap[best])
        index, child = best, 4 * best + 1
    _heap_set(heap, index, entry)


# -- PeriodicCallback ----------------------------------------------------------

cdef class PeriodicCallback(_Referable):
    """PeriodicCallback(callback, callback_time, io_loop=None, jitter=0)

    Call `callback()` every `callback_time` milliseconds (or `timedelta`).

    Milliseconds, as in Tornado, though all other times are in seconds.  Nothing happens
    before `start()`.  Use it for what belongs to the clock: statistics, a heartbeat.
    For an idle timeout, which moves with each message, cancel a `call_later`.

    The first call is one period after `start()`, later ones (without jitter) a whole
    number of periods after the first: the period does not drift, and calls missed
    because of a slow callback are skipped.  A callback that returns a coroutine or a
    future is not called again before that is done, or stop() and start() are called.
    Whatever is raised, the calls go on.  `jitter` is the fraction of the period by
    which it varies at random.  Raises ValueError for a period that is not positive.
    Loop thread only.  Source: Tornado.
    """
    cdef dict __dict__
    cdef object function                    # the callback
    cdef readonly double jitter             # a fraction
    cdef readonly IOLoop io_loop
    cdef double milliseconds
    cdef _Timeout timeout                   # of the next call
    cdef object awaited                     # the future of the last one, until done
    cdef int started
    cdef int64_t due                        # when the next call is, or the last was

    def __init__(self, callback, callback_time, io_loop=None, jitter=0):
        cdef double ms
        cdef IOLoop loop
        require_callable(callback)
        if not 0 <= jitter <= 2:
            raise ValueError(f"jitter is a fraction of the period, not {jitter!r}")
        ms = _periodic_milliseconds(callback_time)
        loop = IOLoop.current() if io_loop is None else io_loop
        with cython.critical_section(self):
            if self.io_loop is not None:
                raise RuntimeError("PeriodicCallback is already initialised")
            self.io_loop, self.function = loop, callback
            self.milliseconds, self.jitter = ms, jitter

    @property
    def callback(self):
        """What is called; a new one from the next call on.  Any thread."""
        with cython.critical_section(self):
            return self.function

    @callback.setter
    def callback(self, function):
        with cython.critical_section(self):
            self.function, function = function, self.function  # dropped later

    @property
    def callback_time(self):
        """The period in milliseconds; a new one takes effect after the next call."""
        return self.milliseconds

    @callback_time.setter
    def callback_time(self, period):
        self.milliseconds = _periodic_milliseconds(period)

    def start(self):
        """Start calling; does nothing if it has been started.

        Raises RuntimeError in the wrong thread or if the loop is closed.
        """
        cdef int64_t now, period
        if self.io_loop is None:
            raise RuntimeError("PeriodicCallback is not initialised")
        with cython.critical_section(self.io_loop):
            _loop_check_thread(self.io_loop)
            now, period = self.io_loop.timers.now(), self.period()
            _loop_check_thread(self.io_loop)  # a time_func may have done anything
            if not self.started:
                self.due = now
                self.schedule(add_times(now, period))

    def stop(self):
        """Stop calling; `start()` starts afresh.  Loop thread only."""
        with cython.critical_section(self.io_loop):
            if load(&self.started):
                self.io_loop.timers.check_thread()
                if self.timeout is not None:
                    _timers_cancel(self.timeout)
                store(&self.started, False)
                self.timeout = self.awaited = None

    def is_running(self):
        """Return whether it has been started and not stopped since.  Any thread."""
        return bool(load(&self.started))

    def _tick(self):
        """Call the callback, and schedule the next call once it is done."""
        self.timeout = None
        function = self.callback
        try:
            future = _future_of(self.io_loop, function())
            if future is not None:
                if self.started and self.timeout is None:  # it did not stop or restart
                    self.awaited = future
                future.add_done_callback(partial(
                    _future_relay, self.io_loop, partial(self._done, future),
                    capture_context()))
        except BaseException as error:
            self.awaited = None
            if not isinstance(error, Exception):
                raise
            _report_exception(self.io_loop, function)
        finally:
            if self.awaited is None:
                self.schedule_next()

    def _done(self, awaited, future):
        try:
            _future_conclude(self.io_loop, self.callback, None, None, future)
        finally:
            if self.awaited is awaited:
                self.awaited = None
                self.schedule_next()

    cdef int64_t period(self) except -1:
        cdef double seconds = self.milliseconds / 1e3
        if self.jitter:
            import random
            seconds *= 1 + self.jitter * (random.random() - 0.5)
        return max(1, nanoseconds(seconds, True))

    cdef int schedule(self, int64_t due) except -1:
        try:
            self.timeout = self.io_loop.timers.add(
                due, make_call(self._tick, None, None, capture_context()))
        except BaseException:
            store(&self.started, False)
            raise
        self.due = due
        store(&self.started, True)

    cdef int schedule_next(self) except -1:
        """Schedule the first call that is still to come, however many were missed."""
        cdef int64_t now, due = self.due
        cdef int64_t period = nanoseconds(self.milliseconds / 1e3, True)
        if not self.started or self.timeout is not None or (
                self.io_loop.state < OPEN):
            return 0
        try:
            period = self.period()
            now = self.io_loop.timers.now()
            if now > due:
                due = add_times(due, (now - due) // period * period)
        finally:  # even if a time_func fails
            if self.started and self.timeout is None:  # still
                self.schedule(add_times(due, period))


cdef double _periodic_milliseconds(object period) except -1:
    cdef double ms = (period.total_seconds() * 1e3
                      if class_has(period, "total_seconds") else period)
    if not ms > 0 or nanoseconds(ms / 1e3, True) < 1:
        raise ValueError(f"a period must be positive, not {period!r}")
    return ms


# -- Coroutines and futures ----------------------------------------------------
# What a callable returns is followed to its end if it is a coroutine or a future: an
# exception reaches the hook, and run_sync, PeriodicCallback and handlers wait for it.
# Futures are told by their type, never by what an instance has.

_generator = type(eval("(_ for _ in ())"))
_plain_types = frozenset((bool, bytes, dict, float, int, list, str, tuple))


cdef object _future_of(IOLoop loop, object result):
    """A future for `result`, or None if it is a plain value."""
    if type(result) in _plain_types:
        return None
    if class_has(result, "add_done_callback"):
        return result
    # 0x100: inspect's flag for what types.coroutine() made
    if class_has(result, "__await__") or (
            type(result) is _generator and <int>result.gi_code.co_flags & 0x100):
        from asyncio import ensure_future
        return ensure_future(result, loop=_face_of(loop))
    return None


cdef bint _future_is_cancelled(object future) except -1:
    return class_has(future, "cancelled") and future.cancelled()


def _future_relay(IOLoop loop not None, callback, context, future):
    """Queue the callback of a future that is done, unless the loop is closed."""
    if load(&loop.state) >= OPEN:
        _queue_push(loop, make_call(callback, (future,), None, context))


def _future_follow(IOLoop loop not None, callback, result, _Handler handler):
    """Wait for what a callable, maybe a handler, returned."""
    future = _future_of(loop, result)
    if future is not None:
        future.add_done_callback(partial(
            _future_relay, loop,
            partial(_future_conclude, loop, callback, future, handler),
            capture_context()))
        if handler is not None:
            _handler_pause(loop, handler, future)


def _future_conclude(IOLoop loop not None, callback, awaited, _Handler handler, future):
    """Report the exception of a future that is done; resume its handler."""
    try:
        if not _future_is_cancelled(future):
            future.result()
    except Exception:
        _report_exception(loop, callback)
    except (KeyboardInterrupt, SystemExit):
        if not class_has(future, "get_coro"):
            raise  # that of a task has left the run already
    finally:
        if handler is not None and handler.pending is awaited:
            _handler_resume(loop, handler)


@cython.final
cdef class _Sync:
    """The function that run_sync() waits for."""
    cdef IOLoop loop
    cdef object func, future, value, error
    cdef bint done, cancelling, over

    def __cinit__(self, IOLoop loop not None, func):
        self.loop, self.func = loop, func

    def begin(self):
        if self.over:
            return
        try:
            self.value = self.func()
            self.future = _future_of(self.loop, self.value)
            if self.future is not None:
                return self.loop.add_future(self.future, self.conclude)
        except Exception as error:
            self.error = error
        self.done = True
        self.end()

    def conclude(self, future):
        """Take the result of the future, or report what its cancellation raised."""
        if self.done or self.over:
            return
        self.end()
        if self.cancelling:
            _future_conclude(self.loop, self.func, None, None, future)
        else:
            self.take_result()

    def end(self):
        IOLoop.stop(self.loop)

    cdef bint has_result(self) except -1:
        return class_has(self.future, "done") and self.future.done()

    cdef int take_result(self) except -1:
        self.done = True
        try:
            self.value = self.future.result()
        except BaseException as error:
            if not (isinstance(error, Exception) or _future_is_cancelled(self.future)):
                raise
            self.error = error

    cdef int give_up(self) except -1:
        """Cancel the future, and run the loop until it is cancelled."""
        self.cancelling = True
        try:
            if load(&self.loop.state) != OPEN:
                pass  # in a forked child, where all is the parent's
            elif self.has_result():
                _future_conclude(self.loop, self.func, None, None, self.future)
            elif class_has(self.future, "cancel") and self.future.cancel() is True:
                if not self.has_result():
                    _loop_start(self.loop)
        except Exception:
            _report_exception(self.loop, self.func)
        finally:
            self.over = True


# -- asyncio -------------------------------------------------------------------
# The second face of a loop: an event loop of asyncio's.  Callbacks, timers, files,
# signals and running are the loop's own; transports, TLS, DNS, processes and executors
# are inherited from asyncio's class.  Four rules keep asyncio's order, which its
# programs rely on:
#
#   an event queues the handle of its fd, behind what was queued before the poll;
#   a timeout added by a callback, though due, is behind what that has queued;
#   every iteration polls, if there are files: `await sleep(0)` lets I/O happen;
#   run_forever() polls before it does anything else, even after stop().
#
# asyncio's word for a call is handle.  Ours is no subclass of asyncio's, but says so in
# __class__, which isinstance() and super() believe, so asyncio's own methods make its
# repr(), and asyncio need not be imported for the class to exist.


_asyncio = {}  # once it is needed: modules of it, and "EventLoop", all faces' class


@cython.freelist(256)
cdef class _Handle:
    """What `call_soon` returns, an `asyncio.Handle`."""
    cdef object __weakref__                 # no _Referable: only a base has a freelist
    cdef readonly _Face _loop
    cdef object callback, args              # None: cancelled; no arguments
    cdef object context                     # None: an empty one
    cdef tuple notes    # in debug mode: _source_traceback, _repr, whether cancelled

    def __init__(self):
        raise TypeError("a handle is made by an event loop")

    @property
    def __class__(self):
        from asyncio import events
        return events.Handle

    def __repr__(self): return self.__class__.__repr__(self)

    def _repr_info(self): return self.__class__._repr_info(self)

    def cancel(self):
        """Cancel the callback, unless it has begun.  Any thread."""
        _handle_cancel(self)

    def cancelled(self):
        """Return whether it was cancelled."""
        return self._cancelled

    @cython.critical_section
    def get_context(self):
        """Return the context that the callback runs in."""
        if self.context is None:
            self.context = Context()
        return self.context

    # What asyncio's debug mode, its tests and other libraries look at.

    def _run(self):
        if self._loop is not None:
            self.get_context()  # its own, since somebody may be in the empty one
            _handle_run(self._loop.ioloop, self)

    @property
    def _cancelled(self): return _handle_is_cancelled(self)

    @property
    def _context(self): return self.get_context()

    @property
    def _callback(self):
        with cython.critical_section(self):
            return self.callback

    @property
    def _args(self):
        with cython.critical_section(self):
            return () if self.args is None and self.callback is not None else self.args

    @property
    def _source_traceback(self):
        with cython.critical_section(self):
            return None if self.notes is None else self.notes[0]

    @property
    def _repr(self):
        with cython.critical_section(self):
            return None if self.notes is None else self.notes[1]


@cython.final
cdef class _ThreadSafeHandle(_Handle):
    """What `call_soon_threadsafe` returns from CPython 3.14 on."""
    cdef object lock                        # held to run it and to cancel it

    def __cinit__(self):
        self.lock = RLock()

    @property
    def __class__(self):
        from asyncio import events
        return events._ThreadSafeHandle

    def cancel(self):
        """Cancel the callback, or wait for its end if it has begun.  Any thread."""
        with self.lock:
            _handle_cancel(self)

    def cancelled(self):
        """Return whether it was cancelled."""
        with self.lock:
            return self._cancelled


@cython.final
cdef class _TimerHandle(_Handle):
    """What `call_at` and `call_later` return, an `asyncio.TimerHandle`."""
    cdef readonly double _when
    cdef _Timeout timeout

    @property
    def __class__(self):
        from asyncio import events
        return events.TimerHandle

    def cancel(self):
        """Cancel the callback, unless it has begun.  Any thread."""
        _handle_cancel(self)
        if self.timeout is not None:
            # From another thread it stays, and calls nothing.
            guard = _timers_guard(load_object(&self.timeout.timers))
            with cython.critical_section(guard):
                if guard is not None and self.timeout.timers != NULL and (
                        (<_Timers>self.timeout.timers).is_ours()):
                    _timers_cancel(self.timeout)

    def when(self):
        """Return when it is due, in seconds on the clock of the loop's time()."""
        return self._when

    def __richcmp__(self, other, int op):
        name = ("__lt__", "__le__", "__eq__", "__ne__", "__gt__", "__ge__")[op]
        return getattr(self.__class__, name)(self, other)

    def __hash__(self): return hash(self._when)

    @property
    def _scheduled(self):
        return self.timeout is not None and load_object(&self.timeout.timers) != NULL


cdef inline bint _handle_is_ours(object called) noexcept:
    """Return whether a call is of asyncio's side."""
    return (type(called) is _Handle or type(called) is _TimerHandle
            or type(called) is _ThreadSafeHandle)


cdef inline int _handle_fill(_Handle handle, _Face face, object callback, tuple args,
                             object context) except -1:
    handle._loop, handle.callback, handle.args = face, callback, args or None
    handle.context = capture_context() if context is None else context
    if face._debug:
        from asyncio.format_helpers import extract_stack
        handle.notes = extract_stack(sys._getframe()), None, False


cdef inline _Handle _handle_make(_Face face, object callback, tuple args,
                                 object context, bint locked=False):
    if locked:
        handle = <_Handle>_ThreadSafeHandle.__new__(_ThreadSafeHandle)
    else:
        handle = <_Handle>_Handle.__new__(_Handle)
    _handle_fill(handle, face, callback, args, context)
    return handle


cdef inline bint _handle_is_cancelled(_Handle handle) noexcept:
    cdef _Section section
    cdef bint cancelled
    enter(&section, handle)
    cancelled = handle.callback is None or (
        handle.notes is not None and <object>handle.notes[2] is True)
    leave(&section)
    return cancelled


cdef int _handle_cancel(_Handle handle) except -1:
    cdef _Section section
    try:
        if handle._loop is not None and handle._loop._debug:
            _handle_note(handle)
    finally:
        enter(&section, handle)
        callback, args = handle.callback, handle.args
        handle.callback = handle.args = None
        leave(&section)
        del callback, args  # not earlier: their destructors may do anything


cdef int _handle_note(_Handle handle) except -1:
    """In debug mode, keep what a handle was that is being cancelled."""
    cdef tuple before
    with cython.critical_section(handle):
        before = handle.notes or (None, None, False)
        if handle.callback is None or before[2]:
            return 0
        handle.notes = before[0], None, True
    text = repr(handle)
    with cython.critical_section(handle):
        handle.notes = before[0], text, True


cdef int _handle_run(IOLoop loop, _Handle handle) except -1:
    """Run a call of asyncio's, whose exceptions go to asyncio's hook."""
    if Py_REFCNT(<PyObject *>handle) > 1:
        _queue_track(<PyObject *>handle)
    if type(handle) is _ThreadSafeHandle:
        lock = (<_ThreadSafeHandle>handle).lock
        with lock:  # a cancellation in another thread waits for the end
            return _handle_run_held(loop, handle)
    return _handle_run_held(loop, handle)


cdef inline int _handle_run_held(IOLoop loop, _Handle handle) except -1:
    if handle._loop._debug:
        return _handle_run_timed(loop, handle)
    return _handle_call(loop, handle)


cdef int _handle_run_timed(IOLoop loop, _Handle handle) except -1:
    """In debug mode, warn if it takes long."""
    cdef _Face face = handle._loop
    cdef int64_t before = read_clock(), spent
    _queue_track(<PyObject *>handle)
    face._current_handle = handle
    try:
        _handle_call(loop, handle)
    finally:
        face._current_handle = None
        spent = read_clock() - before
        if spent >= face.slow_callback_duration * SECOND:
            from asyncio.base_events import _format_handle, logger as asyncio_logger
            asyncio_logger.warning("Executing %s took %.3f seconds",
                                   _format_handle(handle), spent / 1e9)


cdef int _handle_call(IOLoop loop, _Handle handle) except -1:
    cdef _Section section
    cdef PyObject *context
    cdef PyObject *result
    cdef bint in_empty
    enter(&section, handle)
    callback, args, context = handle.callback, handle.args, <PyObject *>handle.context
    leave(&section)
    if callback is None:
        return 0  # it was cancelled
    in_empty = context == <PyObject *>None
    if in_empty:
        context = <PyObject *>loop.empty_context
    if args is None:
        result = call0(context, <PyObject *>callback)
    else:
        result = call(context, <PyObject *>callback, <PyObject *>args, <PyObject *>None)
    if result == NULL:
        return _handle_report(loop, handle, callback, args or (), in_empty)
    Py_XDECREF(result)
    if in_empty and not is_unused(<PyObject *>loop.empty_context):
        _handle_keep_context(loop, handle)


cdef int _handle_keep_context(IOLoop loop, _Handle handle) except -1:
    """What a callback sets in an empty context is there when it is called again."""
    used, loop.empty_context = loop.empty_context, Context()
    if handle.context is None:
        handle.context = used


cdef int _handle_report(IOLoop loop, _Handle handle, object callback, tuple args,
                        bint in_empty) except -1:
    try:
        try:
            raise_pending()
        finally:
            if in_empty and not is_unused(<PyObject *>loop.empty_context):
                _handle_keep_context(loop, handle)  # in which the hook is called
    except (SystemExit, KeyboardInterrupt):
        raise  # out of the run
    except BaseException as error:
        from asyncio.format_helpers import _format_callback_source as describe
        _queue_track(<PyObject *>handle)
        # Newer versions leave the arguments out, except in debug mode.
        options = {"debug": handle._loop._debug} if describe.__kwdefaults__ else {}
        source = describe(callback, args, **options)
        report = {"message": f"Exception in callback {source}", "exception": error,
                  "handle": handle}
        if handle._source_traceback:
            report["source_traceback"] = handle._source_traceback
        handle._loop.call_exception_handler(report)


@cython.final
cdef class _Watch:
    """The reader and the writer of an fd, and a selector's key for it."""
    cdef _Handle reader, writer

    @property
    def events(self): return (self.reader is not None) | (self.writer is not None) << 1


@cython.final
cdef class _Selector:
    """What asyncio's transports and close() need of a selector."""
    cdef IOLoop loop

    def __cinit__(self, IOLoop loop not None):
        self.loop = loop

    def get_key(self, fd):
        cdef int number = _watch_number(fd)
        with cython.critical_section(self.loop):  # a transport's repr(): any thread
            watch = _watch_find(self.loop, number)
        if watch is None:
            raise KeyError(fd)
        return watch

    def close(self):
        IOLoop.close(self.loop)


@cython.no_gc_clear
cdef class _Face:
    """Our half of an asyncio event loop, the first base of its class."""
    cdef readonly IOLoop ioloop     # never None
    cdef public bint _debug, _closed
    cdef public object _task_factory
    cdef int ready                  # __init__() is done
    cdef bint locks_handles         # of call_soon_threadsafe(), as CPython 3.14 does
    cdef dict as_loop               # in a run: keyword arguments, made once
    cdef object outer, outer_task, outer_hooks  # asyncio's loop before this run

    def __cinit__(self, IOLoop loop not None):
        _loop_check_open(loop)
        self.ioloop, self._closed = loop, True

    def __init__(self, loop):
        from asyncio import events
        self.locks_handles = hasattr(events, "_ThreadSafeHandle")
        super().__init__(_Selector(loop))
        store(&self.ready, True)

    # Callbacks and timers

    def call_soon(self, callback, *args, context=None):
        """Call `callback(*args)` in the next iteration; return its handle."""
        _face_check(self, callback, "call_soon")
        handle = _handle_make(self, callback, args, context)
        _queue_push(self.ioloop, handle)
        return handle

    def call_soon_threadsafe(self, callback, *args, context=None):
        """Like call_soon, from any thread and from a signal handler."""
        _face_check(self, callback, "call_soon_threadsafe", any_thread=True)
        handle = _handle_make(self, callback, args, context, self.locks_handles)
        _queue_push(self.ioloop, handle)
        return handle

    def time(self):
        """Return the time in seconds on the clock of call_at()."""
        return <double>self.ioloop.timers.now() / SECOND

    def call_later(self, delay, callback, *args, context=None):
        """Call `callback(*args)` after `delay` seconds; return its handle."""
        cdef int64_t deadline
        cdef double when
        if delay is None:
            raise TypeError("delay must not be None")
        deadline = add_times(self.ioloop.timers.now(), nanoseconds(delay, True))
        when = <double>deadline / SECOND if deadline < INT64_MAX else HUGE_VAL
        _face_check(self, callback, "call_later")
        return _face_call_at(self, deadline, when, callback, args, context)

    def call_at(self, when, callback, *args, context=None):
        """Call `callback(*args)` at a time in seconds of time(); return its handle."""
        cdef int64_t deadline
        if when is None:
            raise TypeError("when cannot be None")
        deadline = nanoseconds(when, True)
        _face_check(self, callback, "call_at")
        return _face_call_at(self, deadline, when, callback, args, context)

    # Files

    def _add_reader(self, fd, callback, *args, context=None):
        return _watch_set(self, fd, READ, callback, args, context)

    def _add_writer(self, fd, callback, *args, context=None):
        return _watch_set(self, fd, WRITE, callback, args, context)

    def _remove_reader(self, fd): return _watch_clear(self, fd, READ)

    def _remove_writer(self, fd): return _watch_clear(self, fd, WRITE)

    # Running

    def run_forever(self):
        """Run until stop() is called, here or on the IOLoop."""
        self._check_closed()
        self._check_running()
        _loop_claim(self.ioloop)
        try:
            _loop_run(self.ioloop, INT64_MAX, False, True)
        finally:
            store(&self.ioloop.stopping, False)
            _loop_release(self.ioloop)

    def stop(self):
        """End the run after this iteration; before a run, let it make just one."""
        if not self._closed:
            IOLoop.stop(self.ioloop)

    def is_running(self):
        """Return whether the loop is running, through whichever of its faces."""
        return bool(load(&self.ready)) and IOLoop.running(self.ioloop)

    # What asyncio's own methods and tasks call

    def create_future(self):
        """Return a new `asyncio.Future` of this loop."""
        return PyObject_Call(_asyncio["futures"].Future, (),
                             self.as_loop or {"loop": self})

    def create_task(self, coro, **options):
        """Return a new `asyncio.Task` of this loop, which runs the coroutine."""
        if self._task_factory is not None or self._debug or self._closed:
            return super().create_task(coro, **options)
        if options:
            return _asyncio["tasks"].Task(coro, loop=self, **options)
        return PyObject_Call(_asyncio["tasks"].Task, (coro,),
                             self.as_loop or {"loop": self})

    def get_debug(self):
        """Return whether the loop is in debug mode."""
        return self._debug

    def _ensure_fd_no_transport(self, fd):
        # For an fd that is free, asyncio's raises and catches a KeyError, which takes
        # half the time of remove_reader().
        if type(fd) is not int or fd in self._transports.data:
            super()._ensure_fd_no_transport(fd)

    def _add_callback(self, _Handle handle not None):
        if handle._loop is None:
            raise TypeError("a handle is made by an event loop")
        if not _handle_is_cancelled(handle):
            self.ioloop.queue.push(handle)

    def _write_to_self(self):
        _waker_wake(self.ioloop.queue)

    def _make_self_pipe(self):
        self._ssock = self._csock = None  # the waker does it
        self._internal_fds += 1

    def _close_self_pipe(self):
        self._internal_fds -= 1

    def _begin(self):
        _face_begin(self)


def _face_class():
    """The class of all faces, made when asyncio is first needed."""
    if "EventLoop" in _asyncio:
        return _asyncio["EventLoop"]
    from asyncio import SelectorEventLoop, futures, tasks
    _asyncio.update(futures=futures, tasks=tasks)
    # To receive anything, a transport takes 256 KiB of memory.  glibc's malloc() maps
    # and unmaps a block of that size, until a larger one has been freed.
    bytes(384 << 10)

    class EventLoop(_Face, SelectorEventLoop):
        """An IOLoop as an event loop of asyncio's: see IOLoop.asyncio_loop."""
        __module__, __qualname__ = __name__, "EventLoop"

        # In this loop Python's signal handlers run at once, so one that queues the
        # callback will do.  The signal wakeup fd is the IOLoop's.

        def add_signal_handler(self, sig, callback, *args):
            """Call `callback(*args)` in the loop when the signal comes."""
            self._check_callback(callback, "add_signal_handler")
            self._check_signal(sig)
            self._check_closed()
            before = self._signal_handlers.get(sig)
            self._signal_handlers[sig] = _handle_make(self, callback, args, None)
            try:
                _signal.signal(sig, partial(_face_on_signal, ref(self)))
                _signal.siginterrupt(sig, False)
            except BaseException as error:
                if before is None:
                    del self._signal_handlers[sig]
                else:
                    self._signal_handlers[sig] = before
                if isinstance(error, ValueError):  # not in the main thread
                    raise RuntimeError(str(error)) from None
                if isinstance(error, OSError) and error.errno == EINVAL:
                    raise RuntimeError(f"sig {sig} cannot be caught") from None
                raise

        def remove_signal_handler(self, sig):
            """Restore the default handler; return whether there was a callback."""
            self._check_signal(sig)
            if sig not in self._signal_handlers:
                return False
            fd = _wakeup_swap(-1, True)
            try:
                return super().remove_signal_handler(sig)
            finally:
                _wakeup_swap(fd, True)

        def __del__(self):
            loop = (<_Face>self).ioloop
            # The process's loop is never closed, and a face that was not its loop's has
            # nothing to close.
            if loop.face is self and not loop.installed:
                super().__del__()

    return _asyncio.setdefault("EventLoop", EventLoop)


def _face_on_signal(face, signum, frame):
    face = face()  # a weak reference: a signal's handler doesn't keep the loop alive
    if face is not None:
        face._handle_signal(signum)


cdef _Face _face_of(IOLoop loop):
    """The loop's face, which begins in this run, if the loop is running."""
    cdef _Face made, face
    cdef unsigned long thread_id = 0
    _loop_check_open(loop)
    with cython.critical_section(loop):
        face = loop.face
    if face is not None:
        return face
    made = _face_class()(loop)
    from asyncio import _get_running_loop
    with cython.critical_section(loop):
        if loop.face is None and loop.state == OPEN:
            loop.face, thread_id = made, loop.thread_id
        face = loop.face
    if face is not made:
        _loop_check_open(loop)  # another thread was quicker, or has closed the loop
    elif thread_id == get_thread_id() and _get_running_loop() is None:
        _face_begin(face)
    elif thread_id:  # of another thread, or this callback runs another loop
        loop.queue.push(face._begin)
    return face


cdef inline int _face_check(_Face face, object callback, str method,
                            bint any_thread=False) except -1:
    """What asyncio checks when it is given a callback; in debug mode, more."""
    if face._closed:
        raise RuntimeError("Event loop is closed")
    _loop_check_open(face.ioloop)
    if face._debug and not any_thread:
        face._check_thread()
    if face._debug or not callable(callback):
        face._check_callback(callback, method)


cdef object _face_call_at(_Face face, int64_t deadline, double when, object callback,
                          tuple args, object context):
    cdef IOLoop loop = face.ioloop
    cdef _Section section
    handle = <_TimerHandle>_TimerHandle.__new__(_TimerHandle)
    _handle_fill(handle, face, callback, args, context)
    handle._when = when
    enter(&section, loop)
    try:
        _loop_check_thread(loop)
        handle.timeout = loop.timers.add(deadline, handle)
    finally:
        leave(&section)
    return handle


cdef int _face_begin(_Face face) except -1:
    """Be the thread's running loop for asyncio, in place of an outer one."""
    from asyncio import events, tasks
    cdef IOLoop loop = face.ioloop
    if loop.runs_asyncio:
        return 0
    face.outer_hooks = sys.get_asyncgen_hooks()
    face.outer, face.outer_task = events._get_running_loop(), None
    loop.runs_asyncio = True
    if not FREE_THREADED:  # where other threads might be reading it when it goes
        face.as_loop = {"loop": face}
    if (face.outer is not None and tasks.current_task(face.outer) is not None
            and hasattr(tasks, "_swap_current_task")):  # from CPython 3.12 on
        face.outer_task = tasks._swap_current_task(face.outer, None)
    events._set_running_loop(face)
    sys.set_asyncgen_hooks(face._asyncgen_firstiter_hook, face._asyncgen_finalizer_hook)
    face._thread_id = get_thread_id()
    face._set_coroutine_origin_tracking(face._debug)


cdef int _face_end(_Face face) except -1:
    """Restore what _face_begin() found."""
    from asyncio import events, tasks
    face.ioloop.runs_asyncio = False
    face.as_loop = face._thread_id = None
    sys.set_asyncgen_hooks(*face.outer_hooks)
    events._set_running_loop(face.outer)
    if face.outer_task is not None:
        tasks._swap_current_task(face.outer, face.outer_task)
    face.outer = face.outer_task = face.outer_hooks = None
    # Last, since it is Python code, in which a signal's handler may raise.
    face._set_coroutine_origin_tracking(False)


cdef int _watch_number(object file) except -1:
    """The int in `file`, by the rules of asyncio's selectors."""
    cdef object number = file
    try:
        if not isinstance(file, int):
            number = int(file.fileno())
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"Invalid file object: {file!r}") from None
    if not 0 <= number <= INT_MAX:
        raise ValueError(f"Invalid file descriptor: {number}")
    return number


cdef _Watch _watch_find(IOLoop loop, int fd):
    """Who reads and writes an fd for asyncio, or None."""
    slot = loop.table.slot(fd)
    if slot == NULL or slot.function != _watch_ready:
        return None
    return <_Watch>slot.arg


cdef object _watch_set(_Face face, object fd, uint32_t event, object callback,
                       tuple args, object context):
    """Make an event of an fd queue a new handle, in place of its present one."""
    cdef IOLoop loop = face.ioloop
    cdef int number
    cdef uint32_t events = event
    cdef _Watch watch
    _face_check(face, callback, "add_reader or add_writer", any_thread=True)
    number = _watch_number(fd)
    handle = _handle_make(face, callback, args, context)
    with cython.critical_section(loop):
        _loop_check_thread(loop)
        watch = _watch_find(loop, number)
        if watch is not None:
            events = loop.table.slot(number).events | event
            if events != event and loop.poller.has_lost(number):
                watch = None  # it was another file's, and so was the other handle
        if watch is not None:
            _table_update(loop, number, events)
        else:
            watch = _Watch.__new__(_Watch)
            _table_add(loop, number, event, _watch_ready, <void *>watch,
                       _Handler.__new__(_Handler, number, watch, None))
        if event == READ:
            old, watch.reader = watch.reader, handle
        else:
            old, watch.writer = watch.writer, handle
    if old is not None:
        _handle_cancel(old)
    return handle


cdef object _watch_clear(_Face face, object fd, uint32_t event):
    """Forget an fd's reader or writer; return whether there was one."""
    cdef IOLoop loop = face.ioloop
    cdef _Handle old = None
    cdef _Watch watch
    cdef int number
    if face._closed:
        return False
    try:
        number = _watch_number(fd)
    except ValueError:
        return False  # such as a closed socket
    with cython.critical_section(loop):
        _loop_check_thread(loop)
        watch = _watch_find(loop, number)
        if watch is not None and event == READ:
            old, watch.reader = watch.reader, None
        elif watch is not None:
            old, watch.writer = watch.writer, None
        if old is None:
            return False
        if watch.reader is None and watch.writer is None:
            _table_remove(loop, number)
        else:
            try:
                _table_update(loop, number, (READ | WRITE) & ~event)
            except OSError:
                pass  # it was closed
    _handle_cancel(old)
    return True


cdef int _watch_ready(object loop, int fd, uint32_t events, void *arg) except -1:
    """The handler of every fd that asyncio watches; errors are for both."""
    cdef _Watch watch = <_Watch>arg
    if watch.reader is not None and events & ~<uint32_t>WRITE:
        _watch_queue(loop, fd, READ, watch.reader)
    if watch.writer is not None and events & ~<uint32_t>READ:
        _watch_queue(loop, fd, WRITE, watch.writer)


cdef inline int _watch_queue(IOLoop loop, int fd, uint32_t event,
                             _Handle handle) except -1:
    if _handle_is_cancelled(handle):  # by itself, without remove_reader()
        _watch_clear(loop.face, fd, event)
    else:
        loop.queue.push(handle)


def new_event_loop():
    """Return a new asyncio event loop, the face of an IOLoop of its own.

    That is its `ioloop`.  For whatever takes a factory of loops, such as
    `asyncio.Runner(loop_factory=ioloop.new_event_loop)`.
    """
    return _face_of(IOLoop(make_current=False))


# -- File descriptors ----------------------------------------------------------
# What the loop knows of a file descriptor is in two arrays, indexed by it: the
# numbers that decide about an event are in its slot, the Python objects in its
# handler.  Each registration has a generation, which the poller returns with its
# events.  An event whose generation is not the slot's is stale: the fd was removed,
# or its number used again, since the kernel saw it.  It is dropped.

cdef struct _Slot:
    uint32_t generation         # 0: no registration
    uint32_t events
    bint muted                  # temporarily not watched for them,
    bint lost                   # or not at all: the fd was closed
    uint32_t changed_in         # the batch in which a registration last began or ended
    ioloop_handler_v1 function  # of the C API, or NULL
    void *arg


@cython.final
cdef class _Handler:
    """What add_handler was given; for a C handler `callback` is its owner."""
    cdef object file, callback, context
    cdef int number             # the fd
    cdef object pending         # the coroutine or future that it waits for,
    cdef bint paused            # and whose end has the fd watched again

    def __cinit__(self, file, callback, context):
        self.file, self.callback, self.context = file, callback, context


@cython.final
cdef class _Table:
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

    cdef inline _Slot *slot(self, int fd) noexcept:
        if 0 <= fd < self.size and self.slots[fd].generation != 0:
            return &self.slots[fd]
        return NULL

    cdef object forget(self, int fd):
        """Take a registration out of the table; return its handler, or None."""
        slot = self.slot(fd)
        if slot == NULL:
            return None
        slot.generation = 0
        slot.changed_in = self.batch
        self.count -= 1
        return list_take(self.handlers, fd)

    cdef int grow(self, Py_ssize_t size) except -1:
        cdef list more = [None] * (size - self.size)
        # That may have collected garbage, and that added handlers: count from here.
        size = self.size + len(more)
        self.slots = <_Slot *>reallocate(self.slots, size * sizeof(_Slot))
        memset(&self.slots[self.size], 0, len(more) * sizeof(_Slot))
        self.handlers.extend(more)
        self.size = size

    cdef int find(self, object file) except -2:
        """The fd that `file` is registered as, or -1, whatever its fileno() does."""
        cdef _Handler handler
        cdef object error = None
        cdef int number = -1
        try:
            number = fd_number(file)
        except (OSError, OverflowError, ValueError):
            pass  # such as that of a closed file
        except Exception as raised:
            error = raised
        if not isinstance(file, int) and (
                self.slot(number) == NULL or
                (<_Handler>list_peek(self.handlers, number)).file is not file):
            for handler in self.handlers:
                if handler is not None and handler.file is file:
                    return handler.number
        if error is not None:
            raise error
        return number if self.slot(number) != NULL else -1


cdef int _table_add(IOLoop loop, int fd, uint32_t events, ioloop_handler_v1 function,
                    void *arg, _Handler handler) except -1:
    """Tell the poller first, then enter it into the table: all or nothing."""
    cdef _Table table = loop.table
    cdef _Slot *slot = table.slot(fd)
    cdef uint32_t generation = table.generation + 1 or 1
    cdef bint replaced = slot != NULL, added = False
    # A number whose file was closed without remove_handler() is free again.
    if slot != NULL and (fd == loop.queue.inbox.reader or not loop.poller.has_lost(fd)):
        raise FileExistsError(EEXIST, f"fd {fd} already has a handler")
    try:
        loop.poller.add(fd, events, generation)
        added = True
        if load(&loop.state) == CLOSED:  # by a Python poller, or by another thread
            _loop_refuse(loop)
        while fd >= table.size:
            table.grow(max(<Py_ssize_t>fd + 1, 2 * table.size, 32))
    except BaseException:
        if added or not loop.poller.foreign:
            loop.poller.drop(fd)
        raise
    if table.slot(fd) == NULL:
        table.count += 1
    elif not replaced:
        # By a destructor, while the table grew: the poller knows that one now.
        raise FileExistsError(EEXIST, f"fd {fd} already has a handler")
    table.generation = generation
    slot = &table.slots[fd]
    slot.changed_in = table.batch
    slot.generation, slot.events = generation, events
    slot.muted = slot.lost = False
    slot.function, slot.arg = function, arg
    handler.number = fd
    old = list_take(table.handlers, fd)
    list_put(table.handlers, fd, handler)
    del old  # not earlier: its destructor may use the table


cdef bint _table_has(IOLoop loop, int fd) noexcept:
    """Return whether the user has added it, and not the waker or asyncio."""
    cdef _Slot *slot = loop.table.slot(fd)
    return (slot != NULL and slot.function != _waker_drain
            and slot.function != _watch_ready)


cdef int _table_require(IOLoop loop, int fd) except -1:
    if not _table_has(loop, fd):
        raise FileNotFoundError(ENOENT, f"fd {fd} has no handler")


cdef int _table_update(IOLoop loop, int fd, uint32_t events) except -1:
    cdef _Slot *slot = loop.table.slot(fd)
    cdef _Handler handler = <_Handler>list_peek(loop.table.handlers, fd)
    if handler.pending is None:
        loop.poller.change(fd, events, slot.generation)
    slot = loop.table.slot(fd)  # a Python poller may have done anything
    if slot != NULL:
        slot.events = events
        slot.muted = handler.paused = handler.pending is not None
        slot.lost = False


cdef int _table_remove(IOLoop loop, int fd) except -1:
    handler = loop.table.forget(fd)
    loop.poller.drop(fd)
    del handler  # not earlier: its destructor may add one for the same fd


cdef list _table_handlers(IOLoop loop):
    cdef list found = []
    for handler in loop.table.handlers:
        if handler is not None and _table_has(loop, (<_Handler>handler).number):
            found.append(handler)
    return found


# A handler is not called again before the coroutine that it returned is done: until
# then its fd is not watched.

cdef int _handler_pause(IOLoop loop, _Handler handler, object future) except -1:
    slot = _handler_slot(loop, handler)
    handler.pending = future
    if slot != NULL and not slot.muted:  # by ONESHOT
        handler.paused = slot.muted = True
        try:
            loop.poller.change(handler.number, 0, slot.generation)
        except OSError:
            loop.poller.drop(handler.number)  # it was closed, most likely


cdef int _handler_resume(IOLoop loop, _Handler handler) except -1:
    slot = _handler_slot(loop, handler)
    handler.pending = None
    if slot != NULL and handler.paused:
        handler.paused = slot.muted = False
        if loop.state != FORKED:  # else reinit() does it
            try:
                loop.poller.drop(handler.number)
                loop.poller.add(handler.number, slot.events, slot.generation)
            except OSError:
                pass  # it was closed


cdef _Slot *_handler_slot(IOLoop loop, _Handler handler) noexcept:
    cdef _Slot *slot = loop.table.slot(handler.number)
    if slot == NULL or (
            list_peek(loop.table.handlers, handler.number) != <PyObject *>handler):
        return NULL
    return slot


# -- Pollers -------------------------------------------------------------------
# The contract: every poller has these methods, in this order.
#
#   abandon   in a forked child: let go of the set, which is the parent's
#   rebuild   start over with a set of what is registered; else raise and keep the old
#   open_set  make a new set; return its file descriptor
#   enclose   put the set into the outer set, which somebody else can watch
#   add       watch an fd for events, and remember its generation
#   change    watch it for other events
#   drop      do not watch it; never fails
#   has_lost  return whether an fd that was added is another open file now, or
#             closed; false if the kernel does not tell; never fails
#   wait      fill `ready` with events, each with the generation of its fd, and
#             return how many; ns is 0 (it keeps the GIL), a time up to LONGEST_SLEEP
#             or FOREVER; a signal means 0 events and `interrupted`
#   close     free the set; the second time does nothing
#
# Of its fields, a poller sets `set_fd`, `oneshot`, `witness` and `interrupted`.  A new
# one is named in HAVE_* (with stand-ins), `_poll`, `_poller_is_native`, maybe
# `_poller_new_witness`, and IOLoop's docstring.
#
# Events are READ, WRITE, ERROR and any other bits that the kernel knows.  An fd with
# none of them stays in the set, which reports nothing of it, not even a hang-up.

cdef struct _Ready:
    int fd
    uint32_t events
    uint32_t generation


cdef class _Poller(_Referable):
    """What the pollers share: the array of events, and Python's view of them."""
    cdef dict __dict__
    cdef _Ready *ready
    cdef int capacity           # of that array
    cdef int undelivered        # events at its start
    cdef bint foreign           # a Python object's
    cdef int in_use             # by a loop
    cdef unsigned long thread_id    # of the thread that polls it, or 0
    cdef bint interrupted       # the last wait was, by a signal
    cdef bint oneshot           # it knows ONESHOT
    cdef int set_fd             # the kernel's set, or -1
    cdef int outer_set_fd       # a set that holds only that one, or -1
    cdef dict filters           # a kqueue's, by fd
    cdef _Poller witness        # of one that can't tell files apart, or None

    def __cinit__(self, *args):
        self.set_fd = self.outer_set_fd = -1
        self.capacity = 256
        self.ready = <_Ready *>reallocate(NULL, self.capacity * sizeof(_Ready))

    def __dealloc__(self):
        free(self.ready)
        self.close_sets()

    def register(self, fd, events):
        """Watch `fd` for `events`."""
        if self.in_use:
            self.check_thread()
        self.add(fd_number(fd), event_mask(events), 0)

    def modify(self, fd, events):
        """Watch `fd` for other events."""
        if self.in_use:
            self.check_thread()
        self.change(fd_number(fd), event_mask(events), 0)

    def unregister(self, fd):
        """Stop watching `fd`."""
        if self.in_use:
            self.check_thread()
        self.drop(fd_number(fd))

    def poll(self, timeout=-1):
        """Return a list of (fd, events), after `timeout` seconds, or a day, at most.

        A negative timeout waits for ever.
        """
        cdef int64_t ns = FOREVER
        cdef list events = []
        cdef int i, n
        cdef unsigned long before
        if timeout is not None and timeout >= 0:
            ns = min(nanoseconds(timeout, True), LONGEST_SLEEP * <int64_t>SECOND)
        with cython.critical_section(self):
            before = self.claim()
        try:
            n = self.wait(ns)
            PyErr_CheckSignals()
            for i in range(n):
                events.append((self.ready[i].fd, self.ready[i].events))
        finally:
            store_id(&self.thread_id, before)
        return events

    @cython.critical_section
    def fileno(self):
        """Return a file descriptor that is readable when there are events."""
        if self.set_fd < 0:
            raise ValueError("the poller is closed")
        if self.outer_set_fd < 0:
            self.outer_set_fd = self.open_set()
            try:
                self.enclose()
            except BaseException:
                close(self.outer_set_fd)
                self.outer_set_fd = -1
                raise
        return self.outer_set_fd

    def close(self):
        """Close the poller; does nothing the second time."""
        with cython.critical_section(self):
            self.check_thread()
            if self.witness is not None:
                self.witness.close_sets()
            self.close_sets()

    @cython.final
    cdef int check_thread(self) except -1:
        cdef unsigned long thread_id = load_id(&self.thread_id)
        if thread_id != 0 and thread_id != get_thread_id():
            raise RuntimeError("the poller is used by another thread")

    @cython.final
    cdef unsigned long claim(self) except? -1:
        """Let only this thread poll from now on; return which one could before."""
        self.check_thread()
        cdef unsigned long before = load_id(&self.thread_id)
        store_id(&self.thread_id, get_thread_id())
        return before

    cdef int abandon(self) except -1:
        if self.witness is not None:
            self.witness.abandon()
        self.close_sets()

    @cython.critical_section
    cdef int rebuild(self, _Table table) except -1:
        cdef int old = self.set_fd
        filters = self.filters
        self.set_fd, self.filters = self.open_set(), {}
        try:
            self.add_all(table)
            if self.outer_set_fd >= 0:
                self.enclose()
        except BaseException:
            close(self.set_fd)
            self.set_fd, self.filters = old, filters
            raise
        if old >= 0:
            close(old)

    cdef void close_sets(self) noexcept:
        if self.set_fd >= 0:
            close(self.set_fd)
        if self.outer_set_fd >= 0:
            close(self.outer_set_fd)
        self.set_fd = self.outer_set_fd = -1

    cdef bint owns(self, int fd) noexcept:
        return fd in (self.set_fd, self.outer_set_fd) or (
            self.witness is not None and self.witness.owns(fd))

    cdef int add_all(self, _Table table) except -1:
        cdef int fd
        for fd in range(<int>table.size):
            slot = &table.slots[fd]
            if slot.generation and not slot.lost and not self.owns(fd):
                try:
                    self.add(fd, 0 if slot.muted else slot.events, slot.generation)
                except OSError as error:
                    if error.errno not in (EBADF, EPERM):
                        raise
                    # It was closed: the kernel would have dropped it.

    @cython.final
    cdef int append(self, int n, int fd, uint32_t events, uint32_t label) except -1:
        """Put the n-th event into the array; return n + 1."""
        if n == self.capacity:
            self.ready = <_Ready *>reallocate(self.ready, 2 * n * sizeof(_Ready))
            self.capacity = 2 * n
        self.ready[n] = _Ready(fd, events, label)
        return n + 1

    # The rest of the contract, for a witness that knows nothing but which fds are open.

    cdef int open_set(self) except -2: return -1
    cdef int enclose(self) except -1: return 0
    cdef int add(self, int fd, uint32_t events, uint32_t generation) except -1:
        return 0

    cdef int change(self, int fd, uint32_t events, uint32_t generation) except -1:
        return 0

    cdef int drop(self, int fd) except -1: return 0
    cdef bint has_lost(self, int fd) except -1: return fcntl(fd, F_GETFD) == -1
    cdef int wait(self, int64_t ns) except -1: return 0


cdef bint _poller_is_native(object impl) except -1:
    """Return whether it is one of ours, with no Python-level method overridden."""
    if not isinstance(impl, (_EPoll, _KQueue, _Select)):
        return False
    for name in ("register", "modify", "unregister", "poll"):
        if getattr(type(impl), name) is not getattr(_Poller, name):
            return False
    return True


cdef object _poller_refusal(int fd):
    return PermissionError(
        EPERM, f"fd {fd} can't be polled: a regular file, a directory or a device like "
        "/dev/null is always ready; use it from a callback, or from a thread")


# Facts about epoll
# - What is registered is the open file description behind the fd.  The kernel
#   drops it when the last duplicate is closed, not when the fd is: hence ENOENT
#   and EEXIST when the fd's number is used again, and events for an fd that is
#   closed.  The 64 bits of data that come back tell which registration it was.
# - ERR and HUP are always reported, even if nothing is asked for; with ONESHOT just
#   once, after which the fd stays in the set without being reported.
# - Regular files get EPERM.
# - epoll_wait counts in milliseconds, epoll_pwait2 (5.11) in nanoseconds, but a
#   seccomp filter may refuse it with EPERM, as an old kernel does with ENOSYS.

cdef class _EPoll(_Poller):
    """The poller on Linux's epoll."""
    cdef epoll_event *buffer
    cdef int buffer_capacity
    cdef bint coarse            # there is no epoll_pwait2

    def __cinit__(self, *args):
        self.buffer_capacity = 256
        self.buffer = <epoll_event *>reallocate(NULL, 256 * sizeof(epoll_event))
        self.set_fd = self.open_set()
        self.oneshot = True

    def __dealloc__(self):
        free(self.buffer)

    cdef int open_set(self) except -2:
        return above_stdio(check(epoll_create1(EPOLL_CLOEXEC)))

    cdef int enclose(self) except -1:
        check(_epoll_control(self.outer_set_fd, EPOLL_CTL_ADD, self.set_fd, READ, 0))

    @cython.critical_section
    cdef int add(self, int fd, uint32_t events, uint32_t generation) except -1:
        if _epoll_control(self.set_fd, EPOLL_CTL_ADD, fd, events, generation) == -1:
            if errno == EPERM:
                raise _poller_refusal(fd)
            if errno != EEXIST:
                PyErr_SetFromErrno(OSError)
            check(_epoll_control(self.set_fd, EPOLL_CTL_MOD, fd, events, generation))

    @cython.critical_section
    cdef int change(self, int fd, uint32_t events, uint32_t generation) except -1:
        if _epoll_control(self.set_fd, EPOLL_CTL_MOD, fd, events, generation) == -1:
            if errno != ENOENT:
                PyErr_SetFromErrno(OSError)
            check(_epoll_control(self.set_fd, EPOLL_CTL_ADD, fd, events, generation))

    @cython.critical_section
    cdef int drop(self, int fd) except -1:
        _epoll_control(self.set_fd, EPOLL_CTL_DEL, fd, 0, 0)

    cdef bint has_lost(self, int fd) except -1:
        # Only the kernel knows: it adds an fd only if it does not have it.
        if _epoll_control(self.set_fd, EPOLL_CTL_ADD, fd, 0, 0) == -1:
            return errno == EPERM or errno == EBADF and fcntl(fd, F_GETFD) == -1
        return self.drop(fd) == 0

    cdef int wait(self, int64_t ns) except -1:
        cdef int i, count, n = 0
        if self.set_fd < 0:
            raise ValueError("the poller is closed")
        if ns == 0:
            count = epoll_wait(self.set_fd, self.buffer, self.buffer_capacity, 0)
        else:
            with nogil:
                count = _epoll_sleep(self, ns)
        self.interrupted = count == -1 and errno == EINTR
        if self.interrupted:
            return 0
        check(count)
        for i in range(count):
            event = &self.buffer[i]
            n = self.append(n, <int><uint32_t>event.data.u64, event.events,
                            <uint32_t>(event.data.u64 >> 32))
        if count == self.buffer_capacity:
            # `ready` first: it is never the smaller one.
            array = realloc(self.ready, 2 * count * sizeof(_Ready))
            if array != NULL:
                self.ready, self.capacity = <_Ready *>array, 2 * count
                array = realloc(self.buffer, 2 * count * sizeof(epoll_event))
                if array != NULL:
                    self.buffer, self.buffer_capacity = <epoll_event *>array, 2 * count
        return n


cdef inline int _epoll_control(int epoll, int op, int fd, uint32_t events,
                               uint32_t generation) noexcept nogil:
    cdef epoll_event event
    memset(&event, 0, sizeof(event))
    event.events = events or ONESHOT
    event.data.u64 = <uint64_t>generation << 32 | <uint32_t>fd
    return epoll_ctl(epoll, op, fd, &event)


cdef int _epoll_sleep(_EPoll poller, int64_t ns) noexcept nogil:
    cdef int capacity = poller.buffer_capacity, count
    cdef timespec timeout = as_timespec(max(ns, 0))
    if ns == FOREVER:
        return epoll_wait(poller.set_fd, poller.buffer, capacity, -1)
    if not poller.coarse:
        count = epoll_wait_ns(poller.set_fd, poller.buffer, capacity, &timeout)
        if count >= 0 or (errno != ENOSYS and errno != EPERM):
            return count
        poller.coarse = True
    return epoll_wait(poller.set_fd, poller.buffer, capacity,
                      <int>((ns + 999999) // 1000000))


# Facts about kqueue
# - READ and WRITE are two filters with an event each, merged here.  A filter is
#   added or deleted by a change; one change a call, since a failing one may leave
#   those behind it undone.
# - EV_EOF on the READ filter comes with data still unread: it is READ, and the
#   end is where read() says so.  On the WRITE filter it is a refused connection
#   or a reader that has gone: ERROR, and nothing can be written.
# - The kernel drops the filters of an fd that is closed: enabling or disabling one
#   fails with ENOENT then, which tells that the file was lost.  So each fd has a
#   filter, which is disabled if no event is asked for.
# - A kqueue is not inherited by a forked child.
# - Regular files are accepted and always ready; refused here, as by epoll.


cdef class _KQueue(_Poller):
    """The poller on BSD's and macOS's kqueue."""
    cdef kevent_t *buffer
    cdef int buffer_capacity
    cdef int *position          # by fd: its event in `ready`, if that is of this fd
    cdef int positions

    def __cinit__(self, *args):
        self.buffer_capacity = 256
        self.buffer = <kevent_t *>reallocate(NULL, 256 * sizeof(kevent_t))
        self.set_fd, self.filters = self.open_set(), {}

    def __dealloc__(self):
        free(self.buffer)
        free(self.position)

    cdef int abandon(self) except -1:
        self.set_fd = self.outer_set_fd = -1  # not inherited: others' by now

    cdef int open_set(self) except -2:
        cdef int set_fd = above_stdio(check(kqueue()))
        check(fcntl(set_fd, F_SETFD, FD_CLOEXEC))
        return set_fd

    cdef int enclose(self) except -1:
        check(_kqueue_change(self.outer_set_fd, self.set_fd, EVFILT_READ, EV_ADD, 0))

    cdef int add(self, int fd, uint32_t events, uint32_t generation) except -1:
        cdef struct_stat status
        if fd == self.outer_set_fd and not _kqueue_change(
                fd, self.set_fd, EVFILT_READ, EV_ENABLE, 0):
            raise OSError(EINVAL, "the loop can't watch itself")
        check(fstat(fd, &status))
        if S_ISREG(status.st_mode) or S_ISDIR(status.st_mode):
            raise _poller_refusal(fd)
        return self.change(fd, events, generation)

    @cython.critical_section
    cdef int change(self, int fd, uint32_t events, uint32_t generation) except -1:
        cdef uint32_t filters = events & (READ | WRITE) or READ | DISABLED
        cdef uint32_t old = self.filters.get(fd, 0)
        cdef short switch = EV_DISABLE if filters & DISABLED else EV_ENABLE
        cdef int positions
        check(fcntl(fd, F_GETFD))
        if fd >= self.positions:
            positions = 2 * (fd + 32)
            self.position = <int *>reallocate(self.position, positions * sizeof(int))
            memset(&self.position[self.positions], 0,
                   (positions - self.positions) * sizeof(int))
            self.positions = positions
        # All or nothing: first add those that are wanted, then delete the others.
        if filters & WRITE:
            check(_kqueue_change(self.set_fd, fd, EVFILT_WRITE, EV_ADD, generation))
        if filters & READ and _kqueue_change(
                self.set_fd, fd, EVFILT_READ, EV_ADD | switch, generation) == -1:
            try:
                PyErr_SetFromErrno(OSError)
            finally:
                self.delete(fd, filters & ~old & WRITE)
        self.delete(fd, old & ~filters)
        self.filters[fd] = filters

    @cython.critical_section
    cdef int drop(self, int fd) except -1:
        self.delete(fd, self.filters.pop(fd, 0))

    cdef void delete(self, int fd, uint32_t filters) noexcept:
        if filters & READ:
            _kqueue_change(self.set_fd, fd, EVFILT_READ, EV_DELETE, 0)
        if filters & WRITE:
            _kqueue_change(self.set_fd, fd, EVFILT_WRITE, EV_DELETE, 0)

    cdef bint has_lost(self, int fd) except -1:
        cdef uint32_t filters = self.filters.get(fd, 0)
        cdef short which = EVFILT_READ if filters & READ else EVFILT_WRITE
        cdef short as_it_is = EV_DISABLE if filters & DISABLED else EV_ENABLE
        return _kqueue_change(self.set_fd, fd, which, as_it_is, 0) == -1 and (
            errno == ENOENT or errno == EBADF)

    @cython.critical_section
    cdef int wait(self, int64_t ns) except -1:
        cdef timespec timeout = as_timespec(max(ns, 0))
        cdef timespec *limit = NULL if ns == FOREVER else &timeout
        cdef uint32_t events, generation
        cdef int fd, at, i, count, n = 0
        if self.set_fd < 0:
            raise ValueError("the poller is closed")
        if ns == 0:
            count = kevent(self.set_fd, NULL, 0, self.buffer, self.buffer_capacity,
                           limit)
        else:
            with nogil:
                count = kevent(self.set_fd, NULL, 0, self.buffer, self.buffer_capacity,
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
                n = self.append(n, fd, events, generation)
        return n


cdef int _kqueue_change(int kq, int fd, short which, unsigned short flags,
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
# - An fd_set is a bit array of FD_SETSIZE: a larger fd would be written elsewhere in
#   memory.
# - One closed fd fails the whole call with EBADF, and it does not say which.
# - It watches whatever file has the number now.  No property of a file tells whether it
#   is the one that was added: a witness does, another poller that has the same fds and
#   is never asked for events.
# - It knows no hang-up: a closed peer is READ, a refused connection READ | WRITE.
# - Exceptional conditions are out-of-band data: PRI.

cdef _Poller _poller_new_witness():
    """One that can tell files apart, or at least which fds are open."""
    try:
        return _EPoll() if HAVE_EPOLL else _KQueue() if HAVE_KQUEUE else _Poller()
    except OSError as error:
        if error.errno not in (ENOSYS, EPERM):
            raise
    return _Poller()


cdef class _Select(_Poller):
    """The poller on select(2), for where there is nothing else."""
    cdef int64_t *generations   # by fd, -1 if it is not watched
    cdef fd_set[3] sets         # for READ, WRITE and PRI
    cdef int end                # all fds are below

    def __cinit__(self, *args):
        self.generations = <int64_t *>reallocate(NULL, FD_SETSIZE * sizeof(int64_t))
        memset(self.generations, -1, FD_SETSIZE * sizeof(int64_t))
        memset(self.sets, 0, sizeof(self.sets))
        self.witness = _poller_new_witness()

    def __dealloc__(self):
        free(self.generations)

    def fileno(self):
        """Raise io.UnsupportedOperation: select has no file descriptor."""
        import io
        raise io.UnsupportedOperation("select has no file descriptor")

    def close(self):
        """Forget everything."""
        _Poller.close(self)
        with cython.critical_section(self):
            memset(self.sets, 0, sizeof(self.sets))
            self.end = 0

    cdef int rebuild(self, _Table table) except -1:
        cdef int fd
        self.witness.rebuild(table)
        for fd in range(self.end):
            if table.slot(fd) == NULL:
                self.drop(fd)
        return self.add_all(table)

    @cython.critical_section
    cdef int add(self, int fd, uint32_t events, uint32_t generation) except -1:
        if fd >= FD_SETSIZE:
            raise ValueError(f"fd {fd} is not below select's limit, {FD_SETSIZE}")
        self.witness.add(fd, 0, 0)
        self.select(fd, events)
        self.generations[fd] = generation
        self.end = max(self.end, fd + 1)

    cdef int change(self, int fd, uint32_t events, uint32_t generation) except -1:
        return self.add(fd, events, generation)

    @cython.critical_section
    cdef int drop(self, int fd) except -1:
        if fd < FD_SETSIZE:
            self.witness.drop(fd)
            self.select(fd, 0)
            self.generations[fd] = -1
        while self.end and self.generations[self.end - 1] < 0:
            self.end -= 1

    cdef void select(self, int fd, uint32_t events) noexcept:
        cdef uint32_t *bits = [READ, WRITE, PRI]
        cdef int i
        for i in range(3):
            if events & bits[i]:
                FD_SET(fd, &self.sets[i])
            else:
                FD_CLR(fd, &self.sets[i])

    cdef bint has_lost(self, int fd) except -1: return self.witness.has_lost(fd)

    @cython.critical_section
    cdef int wait(self, int64_t ns) except -1:
        cdef fd_set reads = self.sets[0], writes = self.sets[1], others = self.sets[2]
        cdef timespec timeout = as_timespec(max(ns, 0))
        cdef timespec *limit = NULL if ns == FOREVER else &timeout
        cdef int fd, n = 0, count, end = self.end
        cdef uint32_t events, generation
        with nogil:
            count = pselect(end, &reads, &writes, &others, limit, NULL)
        self.interrupted = count == -1 and errno == EINTR
        if self.interrupted:
            return 0
        if count == -1 and errno == EBADF:
            # One was closed.  Each such fd is dropped, and its handler told by ERROR.
            for fd in range(end):
                if self.generations[fd] >= 0 and self.witness.has_lost(fd):
                    n = self.append(n, fd, ERROR, <uint32_t>self.generations[fd])
                    self.drop(fd)
            return n
        check(count)
        for fd in range(end if count else 0):
            events = (READ if FD_ISSET(fd, &reads) else 0) | (
                WRITE if FD_ISSET(fd, &writes) else 0) | (
                PRI if FD_ISSET(fd, &others) else 0)
            generation = <uint32_t>self.generations[fd]
            if self.generations[fd] < 0:
                events = 0  # dropped meanwhile, by another thread
            if events and self.witness.has_lost(fd):
                self.drop(fd)
                events = ERROR
            if events:
                n = self.append(n, fd, events, generation)
        return n


# A Python object given as `impl`.  Its events have no generation: they are for
# the registration that the fd has when they are collected.  It doesn't know either
# whether a number was closed and used again; a witness does.

@cython.final
cdef class _Foreign(_Poller):

    cdef object impl
    cdef _Table table

    def __cinit__(self, impl, _Table table not None):
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
        self.impl, self.table = impl, table
        self.foreign = self.oneshot = True
        self.witness = _poller_new_witness()

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
        """In a forked child: get an empty set of its own."""
        if not hasattr(self.impl, "reinit"):
            raise RuntimeError("the poller has no reinit(): make a new IOLoop")
        self.impl.reinit()

    cdef int rebuild(self, _Table table) except -1:
        self.witness.rebuild(table)
        return self.add_all(table)

    cdef int add(self, int fd, uint32_t events, uint32_t generation) except -1:
        if fd >= 1 << 24:  # far more than any kernel allows
            raise OverflowError(f"file descriptor too large: {fd}")
        return self.tell(
            fd, events, self.impl.register, FileExistsError, self.impl.modify)

    cdef int change(self, int fd, uint32_t events, uint32_t generation) except -1:
        slot = self.table.slot(fd)
        if not events:
            self.drop(fd)
        if not events or slot != NULL and (slot.muted or not slot.events):
            return self.add(fd, events, generation)
        return self.tell(
            fd, events, self.impl.modify, FileNotFoundError, self.impl.register)

    cdef int tell(self, int fd, uint32_t events, first, error, second) except -1:
        self.acquaint(fd)
        if events:
            try:
                first(fd, events | ERROR)
            except error:
                second(fd, events | ERROR)

    cdef bint acquaint(self, int fd) except -1:
        try:
            self.witness.add(fd, 0, 0)
        except OSError:
            return False  # the impl may know better, or the fd is not a real one
        return True

    cdef int drop(self, int fd) except -1:
        self.witness.drop(fd)
        try:
            self.impl.unregister(fd)
        except Exception:
            pass  # closed before it was removed, most likely

    cdef bint has_lost(self, int fd) except -1:
        return (fcntl(fd, F_GETFD) != -1 and self.witness.has_lost(fd)
                and self.acquaint(fd))

    cdef int wait(self, int64_t ns) except -1:
        cdef int n = 0, fd
        cdef uint32_t events
        seconds = -1 if ns == FOREVER else <double>ns / SECOND
        self.interrupted = False
        try:
            pairs = self.impl.poll(seconds)
        except InterruptedError:
            self.interrupted = True
            return 0
        for number, mask in list(pairs):
            fd, events = fd_number(number), event_mask(mask)
            slot = self.table.slot(fd)
            if slot == NULL:
                self.drop(fd)
            else:
                n = self.append(n, fd, events, slot.generation)
        return n


_poll = _EPoll if HAVE_EPOLL else _KQueue if HAVE_KQUEUE else _Select


# -- Watchdog ------------------------------------------------------------------
# A thread for each run of a loop that has a threshold.  It borrows nothing: the loop
# counts its iterations and polls in any case, and says when it sleeps.  Four times
# within the threshold the watchdog looks, without the GIL: a loop that is awake and
# has not moved for four looks is blocked.  It parks while the loop sleeps.

cdef enum:
    LOOKS = 4
    LOOKING = 1             # the watchdog waits for the next look,
    PARKED = 2              # or for the loop to wake up
    PATIENCE = 1            # seconds for an action that is still running


@cython.final
cdef class _Watchdog:
    cdef IOLoop loop
    cdef unsigned long loop_thread_id
    cdef uint64_t seen          # iterations and polls at the last look
    cdef int quiet_looks        # since then, which saw no more
    cdef bint fatal             # the process is to be killed
    cdef PyThread_type_lock lock
    cdef int waiting            # whoever sets it to 0 releases the lock
    cdef int ended              # the run is over
    cdef object thread
    cdef int sent               # SIGALRM is on its way
    cdef object handler, old_handler    # SIGALRM's
    cdef sigaction_t action, old_action

    def __cinit__(self, IOLoop loop not None):
        import threading
        self.loop, self.loop_thread_id = loop, loop.thread_id
        self.fatal = loop.by_signal and loop.action is None
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            raise MemoryError
        PyThread_acquire_lock_timed(self.lock, -1, 0)
        self.thread = threading.Thread(None, self.run, "ioloop watchdog", daemon=True)

    def __dealloc__(self):
        if self.lock != NULL:
            PyThread_free_lock(self.lock)

    def run(self):
        cdef bint blocked = True
        while blocked:
            with nogil:
                blocked = self.look()
            if blocked and not self.report():
                self.quiet_looks = LOOKS - 1  # once more with the next look

    def on_alarm(self, signum, frame):
        """SIGALRM's handler if the program had one before, which gets all others."""
        cdef bint sent = swap(&self.sent, False)
        # Python calls this once for several that came; each left a byte in the pipe.
        if _watchdog_count_alarms(self.loop) > 1 or not sent:
            self.old_handler(signum, frame)
        if sent:
            self.loop.action(signum, frame)

    cdef bint look(self) noexcept nogil:
        """Look until the loop is found blocked; false if its run is over."""
        cdef sigset_t alarm
        cdef uint64_t moves
        while True:
            due = self.wait()
            if load(&self.ended):
                return False
            moves = load64(&self.loop.iterations) + load64(&self.loop.polls)
            if not due or load(&self.loop.queue.inbox.asleep) or moves != self.seen:
                self.seen, self.quiet_looks = moves, 0
                continue
            self.quiet_looks += 1
            if self.quiet_looks == LOOKS:
                if self.fatal:
                    # By SIGALRM, whatever the program has made of it.
                    sigemptyset(&alarm)
                    sigaddset(&alarm, SIGALRM)
                    set_c_handler(SIGALRM, SIG_DFL)
                    pthread_sigmask(SIG_UNBLOCK, &alarm, NULL)
                    raise_(SIGALRM)
                return True

    cdef bint wait(self) noexcept nogil:
        """Wait for the next look (true), or until the loop wakes or ends (false)."""
        cdef long long us = max(1, self.loop.threshold // (1000 * LOOKS))
        cdef int how = PARKED if load(&self.loop.queue.inbox.asleep) else LOOKING
        store(&self.waiting, how)
        fence()
        if load(&self.ended):
            us = 0
        elif how == PARKED and load(&self.loop.queue.inbox.asleep):
            us = -1
        if PyThread_acquire_lock_timed(self.lock, us, 0) == 1:
            return False
        if swap(&self.waiting, 0) == 0:  # the lock is just being released
            PyThread_acquire_lock_timed(self.lock, -1, 0)
            return False
        return True

    cdef void unpark(self) noexcept nogil:
        fence()
        if load(&self.waiting) == PARKED and swap(&self.waiting, 0):
            PyThread_release_lock(self.lock)

    cdef bint report(self) except -1:
        """Report a blocked loop; false while a callback has SIGALRM for itself."""
        cdef sigaction_t now
        if not self.loop.by_signal:
            try:
                frame = sys._current_frames().get(self.loop_thread_id)
                self.loop.log_stack(SIGALRM, frame)
            except BaseException as error:
                _report_unraisable(self.loop, error)
            return True
        if load64(&self.loop.iterations) + load64(&self.loop.polls) != self.seen:
            return True  # it was blocked until we had the GIL
        sigaction(SIGALRM, NULL, &now)
        if (_signal.getsignal(SIGALRM) is not self.handler
                or now.sa_handler != self.action.sa_handler):
            _watchdog_count_alarms(self.loop)  # those so far are for the handler there
            return False
        store(&self.sent, True)
        _signal.pthread_kill(self.loop_thread_id, SIGALRM)
        return True

    cdef int restore_alarm(self) except -1:
        """Restore SIGALRM's handler, unless somebody has set another since."""
        if self.handler is None or _signal.getsignal(SIGALRM) is not self.handler:
            return 0
        if self.old_handler is not None:
            try:
                _signal.signal(SIGALRM, self.old_handler)
            except BaseException:  # of a pending handler, which runs before
                _signal.signal(SIGALRM, self.old_handler)
                raise
        sigaction(SIGALRM, &self.old_action, NULL)


cdef int _watchdog_count_alarms(IOLoop loop) except -1:
    """How many SIGALRMs the pipe has told of since the last call."""
    _waker_drain(loop, loop.queue.inbox.reader, READ, NULL)
    return swap(&loop.alarms, 0)


@cython.critical_section
cdef int _watchdog_set(IOLoop loop, object seconds, bint by_signal, action) except -1:
    cdef int64_t threshold = 0
    if seconds is not None:
        threshold = nanoseconds(seconds, True)
        if threshold <= 0:
            raise ValueError(f"a threshold must be positive, not {seconds!r}")
    _loop_check_thread(loop)
    _watchdog_stop(loop)
    loop.threshold, loop.by_signal, loop.action = threshold, by_signal, action
    if loop.thread_id != 0:
        _watchdog_start(loop)


cdef int _watchdog_start(IOLoop loop) except -1:
    cdef _Watchdog self
    if loop.threshold == 0:
        return 0
    if loop.by_signal and not loop.has_wakeup_fd:
        raise RuntimeError("a loop with a blocking signal threshold runs in the "
                           "main thread only")
    if type(sys.modules["_thread"].start_new_thread) is not type(len):
        raise RuntimeError("a blocking threshold needs threads that are not patched")
    self = _Watchdog(loop)
    if loop.action is not None:
        sigaction(SIGALRM, NULL, &self.old_action)
        self.old_handler = _signal.getsignal(SIGALRM)
        handler = self.on_alarm if callable(self.old_handler) else loop.action
        _signal.signal(SIGALRM, handler)  # runs pending handlers before
        _watchdog_count_alarms(loop)
        self.handler = handler
        sigaction(SIGALRM, NULL, &self.action)
    loop.watchdog = self
    try:
        self.thread.start()
    except BaseException:
        _watchdog_stop(loop)
        raise


cdef int _watchdog_stop(IOLoop loop) except -1:
    cdef _Watchdog self = loop.watchdog
    cdef object error = None
    if self is None:
        return 0
    loop.watchdog = None
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
        if load(&self.sent) and hasattr(_signal, "sigtimedwait"):
            _signal.sigtimedwait((SIGALRM,), 0)  # a blocked one must not come later
    finally:
        self.restore_alarm()
        self.handler = self.thread = None


# -- Forks ---------------------------------------------------------------------
# A fork copies the memory as it is, so it takes the locks that threads without the GIL
# may hold, and frees them on both sides.  The list of them is the module's only state
# in C, since pthread_atfork() passes no argument.  The child gives up what it shares
# with its parent at once, while the numbers are still those of the loop's files; then
# all methods but close() raise RuntimeError until reinit() is called, and a run ends
# before its next poll.

cdef _Inbox *_fork_inboxes = NULL
cdef pthread_mutex_t _fork_lock

pthread_mutex_init(&_fork_lock, NULL)
pthread_atfork(_fork_before, _fork_after, _fork_after)


cdef void _fork_before() noexcept nogil:
    cdef _Inbox *inbox
    pthread_mutex_lock(&_fork_lock)
    inbox = _fork_inboxes
    while inbox != NULL:
        pthread_mutex_lock(&inbox.lock)
        inbox = inbox.next


cdef void _fork_after() noexcept nogil:
    cdef _Inbox *inbox = _fork_inboxes
    while inbox != NULL:
        pthread_mutex_unlock(&inbox.lock)
        inbox = inbox.next
    pthread_mutex_unlock(&_fork_lock)


cdef void _fork_list(_Inbox *inbox, bint alive) noexcept nogil:
    global _fork_inboxes
    cdef _Inbox **link = &_fork_inboxes
    pthread_mutex_lock(&_fork_lock)
    if alive:
        inbox.next, _fork_inboxes = _fork_inboxes, inbox
    else:
        while link[0] != inbox:
            link = &link[0].next
        link[0] = inbox.next
    pthread_mutex_unlock(&_fork_lock)


def _fork_in_child():
    """Let go of what is the parent's: files, the wakeup fd and SIGALRM's handler."""
    cdef IOLoop loop
    cdef dict outer = {}  # wakeup fds by ours, which took their place
    cdef list loops = []
    free_after_fork(_loops)
    for loop in map(ref.__call__, list(_loops.values())):
        if loop is not None:
            loops.append(loop)
    for _ in loops:  # the innermost has to be the first
        for loop in loops:
            if loop.watchdog is not None:
                loop.watchdog.restore_alarm()
    for loop in loops:
        free_after_fork(loop)
        free_after_fork(loop.poller)
        if loop.thread_id != get_thread_id():
            loop.poller.thread_id = 0
        if loop.has_wakeup_fd:
            outer[loop.queue.inbox.writer] = loop.outer_wakeup_fd
        if loop.state == OPEN:
            loop.state = FORKED
        loop.has_wakeup_fd = False
        loop.watchdog = None
        store(&loop.queue.inbox.asleep, 0)
        loop.table.forget(loop.queue.inbox.reader)
        _waker_close(&loop.queue.inbox)
        loop.poller.abandon()
    if outer:
        fd = _signal.set_wakeup_fd(-1)
        while fd in outer:
            fd = outer.pop(fd)
        _wakeup_swap(fd, True)


os.register_at_fork(after_in_child=_fork_in_child)


cdef int _fork_reinit(IOLoop loop) except -1:
    """Replace what a child shared with its parent."""
    cdef _Inbox *inbox = &loop.queue.inbox
    cdef int fd
    if loop.poller.foreign:
        (<_Foreign>loop.poller).reinit()
    _waker_open(inbox)
    loop.poller.rebuild(loop.table)
    loop.poller.undelivered = 0  # the new set reports them again
    # The child may have closed what it has handlers for: these numbers are ours now.
    for fd in range(<int>loop.table.size):
        if fd in (inbox.reader, inbox.writer) or loop.poller.owns(fd):
            loop.table.forget(fd)
    _waker_register(loop)
    if loop.thread_id != 0 and loop.thread_id != get_thread_id():
        # The thread that ran the loop is not in this child: end what it had begun.
        loop.queue.track()
        loop.thread_id = loop.timers.thread_id = 0
        if loop.runs_asyncio:
            loop.runs_asyncio = False
            loop.face.as_loop = loop.face._thread_id = None
        loop.outer_loop = None
        loop.timers.end_pass()
        # It may have been inside a context, which nobody will leave now.
        loop.empty_context = Context()
        for handler in _table_handlers(loop):
            if (<_Handler>handler).context is not None:
                (<_Handler>handler).context = (<_Handler>handler).context.copy()
    loop.state = OPEN
    if loop.thread_id != 0:
        _wakeup_take(loop)
        _watchdog_start(loop)
        if loop.runs_asyncio and getattr(_threads, "loop", None) is loop:
            from asyncio import events  # which forgets its running loop in a child
            events._set_running_loop(loop.face)
    else:
        _waker_go_idle(loop)


# -- C API ---------------------------------------------------------------------
# Documented in ioloop.pxd.  Its `ioloop_door_v1` is an _Inbox.

@cython.critical_section
cdef int c_add_handler(object loop, int fd, uint32_t events, ioloop_handler_v1 function,
                       void *arg, object owner) except -1:
    _loop_check_thread(<IOLoop?>loop)
    if function == NULL:
        raise ValueError("the function is NULL")
    return _table_add(<IOLoop>loop, fd_number(fd), events, function, arg,
                      _Handler.__new__(_Handler, fd, owner, None))


@cython.critical_section
cdef int c_update_handler(object loop, int fd, uint32_t events) except -1:
    _loop_check_thread(<IOLoop?>loop)
    _table_require(<IOLoop>loop, fd_number(fd))
    return _table_update(<IOLoop>loop, fd, events)


@cython.critical_section
cdef int c_remove_handler(object loop, int fd) except -1:
    if (<IOLoop?>loop).state != CLOSED:
        _loop_check_thread(<IOLoop>loop)
        if _table_has(<IOLoop>loop, fd):
            _table_remove(<IOLoop>loop, fd)


@cython.final
cdef class _CTimer:
    # A call that knows its timeout.
    cdef ioloop_callback_v1 function
    cdef void *arg
    cdef object owner
    cdef _Timers timers
    cdef _Timeout timeout

    cdef inline object guard(self):
        """Whose critical section guards it, or None if the loop has gone."""
        if self.timers is None or load_id(&self.timers.thread_id) == get_thread_id():
            return self.timers  # this thread runs the loop, and needs none
        return _timers_guard(<PyObject *>self.timers)


cdef object c_new_timer(object loop, ioloop_callback_v1 function, void *arg,
                        object owner):
    cdef _CTimer timer = _CTimer.__new__(_CTimer)
    _loop_check_open(<IOLoop?>loop)
    if function == NULL:
        raise ValueError("the function is NULL")
    timer.function, timer.arg, timer.owner = function, arg, owner
    timer.timers = (<IOLoop>loop).timers
    timer.timeout = _Timeout.__new__(_Timeout)
    return timer


cdef int c_start_timer(object timer, int64_t delay) except -1:
    cdef _CTimer self = <_CTimer?>timer
    cdef _Timers timers = self.timers
    cdef int64_t deadline
    guard = self.guard()
    with cython.critical_section(guard):
        if guard is None or timers.closed:
            raise RuntimeError("IOLoop is closed")
        deadline = add_times(timers.now(), delay)
        timers.check_thread()
        timers.reserve()  # here, since it may run what starts or stops the timer
        if timers.closed:
            raise RuntimeError("IOLoop is closed")
        if self.timeout.timers != NULL and not timers.passing:
            # Move it within the heap: cancelled and armed at once.
            return timers.place(self.timeout, self.timeout.index, deadline)
        if self.timeout.timers != NULL:
            timers.extract(self.timeout.index)
            timers.release(self.timeout)
        return timers.arm(self.timeout, deadline, self)


cdef int c_stop_timer(object timer) except -1:
    cdef _CTimer self = <_CTimer?>timer
    guard = self.guard()
    with cython.critical_section(guard):
        if guard is not None and not self.timers.closed:
            self.timers.check_thread()
            _timers_cancel(self.timeout)


cdef int c_add_callback(object loop, ioloop_callback_v1 function, void *arg) except -1:
    cdef int error
    _loop_check_open(<IOLoop?>loop)
    error = c_post(&(<IOLoop>loop).queue.inbox, function, arg)
    if error:
        raise (ValueError("the function is NULL") if error == EINVAL
               else OSError(error, os.strerror(error)))


cdef ioloop_door_v1 *c_door(object loop) except NULL:
    _loop_check_open(<IOLoop?>loop)
    return &(<IOLoop>loop).queue.inbox


cdef int c_post(ioloop_door_v1 *door, ioloop_callback_v1 function,
                void *arg) noexcept nogil:
    """Queue a C callback from any thread, without the GIL; return 0 or an errno."""
    cdef _Inbox *inbox = <_Inbox *>door
    cdef int error = 0
    cdef _Post *post
    cdef uint64_t number = 0
    if function == NULL:
        return EINVAL
    pthread_mutex_lock(&inbox.lock)
    if inbox.closed:
        error = ESHUTDOWN
    elif inbox.tail - inbox.head == inbox.capacity and not _inbox_grow(inbox):
        error = ENOMEM
    else:
        post = &inbox.posts[inbox.tail & (inbox.capacity - 1)]
        post.function, post.arg, post.calls_before = function, arg, load64(&inbox.calls)
        number = inbox.tail
        store64(&inbox.tail, number + 1)
    pthread_mutex_unlock(&inbox.lock)
    if error:
        return error
    error = _waker_signal(inbox)
    if error:
        # Take it back, unless the loop runs it or another post is behind it.
        pthread_mutex_lock(&inbox.lock)
        if inbox.tail == number + 1 and inbox.head <= number:
            store64(&inbox.tail, number)
        pthread_mutex_unlock(&inbox.lock)
    return error


# -- Fast methods --------------------------------------------------------------
# The methods of IOLoop that take a callable and its arguments, for every build.
# Cython's own calling convention makes a dict for **kwargs at every call, a third of
# add_callback's time; this is the one that CPython specialises for (METH_FASTCALL).
# The class has their signatures and docstrings.  Parameters may be passed by keyword.

cdef extern from *:
    r"""
    static int ioloop_set_method(PyObject *type, const char *name, const char *doc,
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
    #ifdef Py_LIMITED_API
        if (method)
            rc = PyObject_SetAttrString(type, name, method);
    #else
        if (method)  /* the type is immutable for all others */
            rc = PyDict_SetItemString(((PyTypeObject *)type)->tp_dict, name, method);
        PyType_Modified((PyTypeObject *)type);
    #endif
        Py_XDECREF(method);
        return rc;
    }
    """
    int set_method "ioloop_set_method"(object type, const char *name, const char *doc,
                                       void *function) except -1


cdef inline object _fast_queue(str name, IOLoop loop, _Object *args, Py_ssize_t n,
                               _Object names, object context):
    if n < 1:
        (callback,), kwargs = _fast_bind(name, ("callback",), args, n, names)
        _queue_add(loop, callback, None, kwargs, context)
    else:
        _queue_add(loop, <object>args[0], _fast_tuple(args + 1, n - 1),
                   _fast_keywords(args + n, names), context)


cdef inline object _fast_time(str name, str parameter, IOLoop loop, bint delay,
                              _Object *args, Py_ssize_t n, _Object names):
    if n < 2:
        own = (parameter, "callback")
        (when, callback), kwargs = _fast_bind(name, own, args, n, names)
        return _timers_call(loop, when, delay, callback, None, kwargs)
    return _timers_call(loop, <object>args[0], delay, <object>args[1],
                        _fast_tuple(args + 2, n - 2), _fast_keywords(args + n, names))


cdef tuple _fast_bind(str name, tuple parameters, _Object *args, Py_ssize_t n,
                      _Object names):
    """The method's own arguments, some of them passed by keyword, and the others."""
    cdef dict kwargs = _fast_keywords(args + n, names) or {}
    cdef list bound = []
    for i, parameter in enumerate(parameters):
        if i < n:
            bound.append(<object>args[i])
        elif parameter in kwargs:
            bound.append(kwargs.pop(parameter))
        else:
            raise TypeError(f"{name}() is missing its argument {parameter!r}")
    return bound, kwargs


cdef inline object _fast_tuple(_Object *items, Py_ssize_t n):
    cdef tuple args
    if n <= 0:
        return None
    args = PyTuple_New(n)
    for i in range(n):
        Py_INCREF(<object>items[i])
        PyTuple_SetItem(args, i, <object>items[i])
    return args


cdef inline dict _fast_keywords(_Object *values, _Object names):
    if names == NULL:
        return None
    return {name: <object>values[i] for i, name in enumerate(<tuple>names)}


cdef object _fast_add_callback(IOLoop loop, _Object *args, Py_ssize_t n, _Object names):
    return _fast_queue("add_callback", loop, args, n, names, capture_context())


cdef object _fast_spawn(IOLoop loop, _Object *args, Py_ssize_t n, _Object names):
    return _fast_queue("spawn_callback", loop, args, n, names, None)


cdef object _fast_add_timeout(IOLoop loop, _Object *args, Py_ssize_t n, _Object names):
    return _fast_time("add_timeout", "deadline", loop, False, args, n, names)


cdef object _fast_call_later(IOLoop loop, _Object *args, Py_ssize_t n, _Object names):
    return _fast_time("call_later", "delay", loop, True, args, n, names)


cdef object _fast_call_at(IOLoop loop, _Object *args, Py_ssize_t n, _Object names):
    return _fast_time("call_at", "when", loop, False, args, n, names)


cdef int _fast_install(str name, str parameters, void *function) except -1:
    doc = f"{name}($self, {parameters}, *args, **kwargs)\n--\n\n"
    doc += getattr(IOLoop, name).__doc__
    return set_method(IOLoop, name.encode(), doc.encode(), function)


_fast_install("add_callback", "callback", <void *>_fast_add_callback)
_fast_install("add_callback_from_signal", "callback", <void *>_fast_add_callback)
_fast_install("spawn_callback", "callback", <void *>_fast_spawn)
_fast_install("add_timeout", "deadline, callback", <void *>_fast_add_timeout)
_fast_install("call_later", "delay, callback", <void *>_fast_call_later)
_fast_install("call_at", "when, callback", <void *>_fast_call_at)


# -- Invariants ----------------------------------------------------------------

def _verify(IOLoop loop not None):
    """Raise AssertionError unless all tables agree; called with IOLOOP_DEBUG."""
    cdef _Timers timers = loop.timers
    cdef _Queue queue = loop.queue
    cdef _Table table = loop.table
    cdef _Timeout timeout
    cdef Py_ssize_t i, count = 0
    cdef uint64_t n
    _loop_check_thread(loop)
    assert len(timers.calls) == timers.capacity, "the number of keys"
    assert timers.count + timers.deferred + timers.free == timers.capacity, "free keys"
    for i in range(timers.count):
        timeout = <_Timeout>timers.heap[i].timeout
        assert timeout.index == i, "a timeout's index"
        assert timeout.timers == <PyObject *>timers, "a timeout's owner"
        assert timeout.due == timers.heap[i].deadline, "a timeout's deadline"
        assert timers.calls[timeout.key] is not None, "a timeout's call"
        assert i == 0 or not _heap_precedes(
            &timers.heap[i], &timers.heap[(i - 1) >> 2]), "the heap's order"
    for i in range(timers.free):
        assert timers.calls[timers.free_keys[i]] is None, "a free key"
    lock(&queue.inbox)
    try:
        assert len(queue.ring) == <Py_ssize_t>(queue.mask + 1), "the ring's size"
        assert queue.tail - queue.head <= queue.mask + 1, "the ring's ends"
        for n in range(queue.tail, queue.head + queue.mask + 1):
            assert queue.ring[n & queue.mask] is None, "a free place in the ring"
    finally:
        unlock(&queue.inbox)
    for i in range(table.size):
        assert (table.slots[i].generation != 0) == (table.handlers[i] is not None), i
        count += table.slots[i].generation != 0
    assert count == table.count, "the number of handlers"
