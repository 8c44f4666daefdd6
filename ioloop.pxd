# ioloop.pxd - the C API of `ioloop`: what `cimport ioloop` gives you.
#
# A client registers a C function and a `void *` for fd events, timers and the
# callback queue.  The loop calls them in the same order as Python callables,
# and makes no Python object to do so.  An echo server in a dozen lines:
#
#     cimport ioloop
#     from libc.stdint cimport uint32_t
#     from posix.unistd cimport read, write
#
#     cdef int on_ready(object loop, int fd, uint32_t events, void *arg) except -1:
#         cdef char data[4096]
#         cdef ssize_t n = read(fd, data, sizeof(data))
#         if n <= 0:
#             return ioloop.c_remove_handler(loop, fd)
#         write(fd, data, n)
#         return 0
#
#     def serve(loop, int fd):
#         ioloop.c_add_handler(loop, fd, ioloop.IOLOOP_READ, on_ready, NULL, None)
#
# Why functions and not the class: Cython doesn't check vtables, so exporting
# the class would break outdated clients silently.  A function exported here is
# looked up by name and signature when the client is imported, and an outdated
# client fails there with an ImportError or TypeError that names the function.
# Two things are not part of a signature: the meaning of a function pointer's
# type, so the names of the types below end in a version, and the exception
# clause, so a function whose clause changes gets a new name.
#
# Without Cython, in C:
#
#     PyCapsule_GetPointer(ioloop.__pyx_capi__["c_remove_handler"],
#                          "int (PyObject *, int)")
#
# Rules for all functions but `c_post` and `c_add_callback`: hold the GIL (where there
# is none, be attached), and while the loop runs, call them from its thread only.
#
# A callback is called with the GIL held and may raise Python exceptions as usual
# (`except -1`).  They go to `IOLoop.handle_callback_exception`, with the owner as
# its argument, or None for a queued callback; EPIPE from a handler whose own peer
# has gone is ignored.  A handler that has raised stays registered.
#
# `arg` has to live as long as the loop may pass it on.  Its owner sees to that; if
# the owner is None, the client has to.  An owner that refers to its own timer is a
# reference cycle: drop the timer when you are done with it.

from libc.stdint cimport int64_t, uint32_t

cdef enum:
    IOLOOP_NONE = 0
    IOLOOP_READ = 0x001
    IOLOOP_WRITE = 0x004
    IOLOOP_ERROR = 0x018

ctypedef int (*ioloop_handler_v1)(
    object loop, int fd, uint32_t events, void *arg) except -1
ctypedef int (*ioloop_callback_v1)(object loop, void *arg) except -1
ctypedef void ioloop_door_v1

# -- fd events.  `owner` is kept alive while the handler is registered: pass
#    the object that `arg` points into, or None.  Errors are those of add_handler().
#    After close(), removing a handler or stopping a timer does nothing.
cdef int c_add_handler(object loop, int fd, uint32_t events,
                       ioloop_handler_v1 function, void *arg,
                       object owner) except -1
cdef int c_update_handler(object loop, int fd, uint32_t events) except -1
cdef int c_remove_handler(object loop, int fd) except -1

# -- timers.  A timer is made once and started as often as needed; starting a
#    timer that is running moves it.  `delay` is in nanoseconds.  Nothing is
#    allocated.  The loop keeps a running timer alive, and a timer its owner.
cdef object c_new_timer(object loop, ioloop_callback_v1 function, void *arg,
                        object owner)
cdef int c_start_timer(object timer, int64_t delay) except -1
cdef int c_stop_timer(object timer) except -1

# -- the callback queue.  `arg` must stay valid until the callback has run or the
#    loop is closed.  `c_add_callback` needs the GIL and may be called from any
#    thread.  `c_post` may also be called without the GIL.  It returns 0 or an errno
#    (ENOMEM, ESHUTDOWN after close(), EINVAL for NULL).  What it takes in place of
#    the loop is `c_door(loop)`, which is valid while the loop object lives.  A fork
#    waits for a `c_post` that is in progress.
cdef int c_add_callback(object loop, ioloop_callback_v1 function,
                        void *arg) except -1
cdef ioloop_door_v1 *c_door(object loop) except NULL
cdef int c_post(ioloop_door_v1 *door, ioloop_callback_v1 function,
                void *arg) noexcept nogil
