# ioloop.pxd - the C-level door of `ioloop`: what `cimport ioloop` gives.
#
# A client registers a C function and a `void *` for fd events, timers and the
# callback queue; the loop calls them in the same order as Python's callables
# and makes no Python object to do so.  An echo in a dozen lines:
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
# Why functions and not the class: Cython checks no vtable, so a class exported
# here would break stale clients silently.  A function exported here is found
# by name and by signature when the client is imported, and a stale client
# fails there with an ImportError or TypeError that names the function.  Two
# things are not in a signature: what a function pointer's type means, so the
# names of the types below end in a version, and the exception clause, so a
# function whose clause changes gets a new name.
#
# Without Cython, in C:
#
#     PyCapsule_GetPointer(ioloop.__pyx_capi__["c_remove_handler"],
#                          "int (PyObject *, int)")
#
# Rules for all functions but `c_post`: hold the GIL, call from the loop's
# thread while it runs.  A callback is called with the GIL held and raises
# Python exceptions as usual (`except -1`): they reach
# `IOLoop.handle_callback_exception` with the owner as its argument, or None for
# a queued callback; EPIPE from a handler whose own peer has gone is ignored.  A
# handler that raised stays registered.  `arg` lives as long as its owner: with None
# for an owner the client answers for it.  An owner that holds its timer is a cycle:
# drop the timer when it is done.

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

# -- fd events.  `owner` is kept alive while the handler is registered: give
#    the object that `arg` points into, or None.  Errors as in add_handler().
#    After close() there is nothing to remove or to stop, and that is no error.
cdef int c_add_handler(object loop, int fd, uint32_t events,
                       ioloop_handler_v1 function, void *arg,
                       object owner) except -1
cdef int c_update_handler(object loop, int fd, uint32_t events) except -1
cdef int c_remove_handler(object loop, int fd) except -1

# -- timers.  A timer is made once and armed as often as needed; arming an
#    armed timer moves it.  `delay` is in nanoseconds; nothing is allocated.
#    The loop keeps an armed timer alive, and the timer its owner.
cdef object c_new_timer(object loop, ioloop_callback_v1 function, void *arg,
                        object owner)
cdef int c_start_timer(object timer, int64_t delay) except -1
cdef int c_stop_timer(object timer) except -1

# -- the callback queue.  The first needs the GIL and may be called from any
#    thread; `arg` must stay valid until the callback has run or the loop is
#    closed.  `c_post` needs no GIL at all: it returns 0, or an errno (ENOMEM,
#    ESHUTDOWN after close(), EINVAL for NULL).  A door is valid while the loop
#    object lives.  A fork waits for a post that is under way.
cdef int c_add_callback(object loop, ioloop_callback_v1 function,
                        void *arg) except -1
cdef ioloop_door_v1 *c_door(object loop) except NULL
cdef int c_post(ioloop_door_v1 *door, ioloop_callback_v1 function,
                void *arg) noexcept nogil
