# cython: language_level=3
"""An echo server on ioloop's C API: no Python object for a message."""

cimport ioloop
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport (
    EAGAIN, ECONNABORTED, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, errno
)
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.unistd cimport close

cdef extern from *:
    """
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <sys/socket.h>
    """
    enum:
        IPPROTO_TCP, MSG_NOSIGNAL, SOCK_CLOEXEC, SOCK_NONBLOCK, TCP_NODELAY
    int accept4(int fd, void *address, void *size, int flags) nogil
    ssize_t recv(int fd, void *data, size_t size, int flags) nogil
    ssize_t send(int fd, const void *data, size_t size, int flags) nogil
    int setsockopt(int fd, int level, int name, const void *value, int size) nogil

cdef enum:
    CHUNK = 65536           # received at once; also what is kept of a message

cdef int64_t RETRY = 100_000_000    # nanoseconds

# For what is received and sent on in one go: handlers hold the GIL meanwhile.
cdef char chunk[CHUNK]


cdef class Server:
    """Echoes to those who connect to `listener`, a non-blocking fd of the caller."""

    cdef object loop
    cdef int listener
    cdef int64_t idle       # nanoseconds
    cdef object retry

    def __init__(self, loop, int listener, double idle):
        self.loop, self.listener, self.idle = loop, listener, <int64_t>(idle * 1e9)
        self.retry = ioloop.c_new_timer(loop, on_retry, <void *>self, self)
        ioloop.c_add_handler(
            loop, listener, ioloop.IOLOOP_READ, on_client, <void *>self, self
        )

    def close(self):
        """Accept no more."""
        ioloop.c_stop_timer(self.retry)
        ioloop.c_remove_handler(self.loop, self.listener)


cdef int on_client(object loop, int fd, uint32_t events, void *arg) except -1:
    cdef Server server = <Server>arg
    cdef int client
    while True:
        client = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)
        if client >= 0:
            Connection(server, client)
        elif errno == EAGAIN:
            return 0
        elif errno in (EMFILE, ENFILE, ENOBUFS, ENOMEM):
            # The client stays in the queue and the listener ready: look away for
            # a while.
            ioloop.c_update_handler(loop, fd, ioloop.IOLOOP_NONE)
            return ioloop.c_start_timer(server.retry, RETRY)
        elif errno not in (ECONNABORTED, EINTR):
            PyErr_SetFromErrno(OSError)


cdef int on_retry(object loop, void *arg) except -1:
    cdef Server server = <Server>arg
    return ioloop.c_update_handler(loop, server.listener, ioloop.IOLOOP_READ)


cdef class Connection:
    """One client.  The loop keeps it alive: it owns its handler and its timer."""

    cdef Server server
    cdef int fd
    cdef object timer
    cdef char *unsent               # CHUNK bytes, once they have been needed
    cdef size_t begin, end          # of what is in there
    cdef uint32_t events

    def __cinit__(self, Server server, int fd):
        cdef int yes = 1
        self.server, self.fd, self.events = server, fd, ioloop.IOLOOP_READ
        # Fails where it means nothing, which does not matter.
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes))
        ioloop.c_add_handler(
            server.loop, fd, self.events, on_ready, <void *>self, self
        )
        self.timer = ioloop.c_new_timer(server.loop, on_idle, <void *>self, self)
        ioloop.c_start_timer(self.timer, server.idle)

    def __dealloc__(self):
        free(self.unsent)
        if self.fd >= 0:
            close(self.fd)

    cdef int receive(self) except -1:
        """Receive, and send it back, or as much as the kernel takes."""
        cdef ssize_t size = recv(self.fd, chunk, CHUNK, 0)
        cdef ssize_t sent
        if size == 0:
            return self.end_it()
        if size < 0:
            return self.failed()
        sent = send(self.fd, chunk, size, MSG_NOSIGNAL)
        if sent < 0:
            self.failed()
            sent = 0
        if sent < size and self.fd >= 0:
            self.keep(chunk + sent, size - sent)
        return 0

    cdef int keep(self, const char *data, size_t size) except -1:
        if self.unsent == NULL:
            self.unsent = <char *>malloc(CHUNK)
            if self.unsent == NULL:
                raise MemoryError
        memcpy(self.unsent, data, size)
        self.begin, self.end = 0, size
        return 0

    cdef int send_rest(self) except -1:
        cdef ssize_t sent = send(
            self.fd, self.unsent + self.begin, self.end - self.begin, MSG_NOSIGNAL
        )
        if sent < 0:
            return self.failed()
        self.begin += sent
        if self.begin == self.end:
            self.begin = self.end = 0
        return 0

    cdef int failed(self) except -1:
        """After a system call: is it the end, or has the kernel changed its mind?"""
        return 0 if errno in (EAGAIN, EINTR) else self.end_it()

    cdef int watch(self) except -1:
        """Wait for what can be done next."""
        cdef uint32_t events = ioloop.IOLOOP_WRITE if self.end else ioloop.IOLOOP_READ
        if events != self.events:
            ioloop.c_update_handler(self.server.loop, self.fd, events)
            self.events = events
        return ioloop.c_start_timer(self.timer, self.server.idle)

    cdef int end_it(self) except -1:
        """First the loop forgets the fd, then its number becomes free."""
        cdef int fd = self.fd
        if fd >= 0:
            self.fd = -1
            ioloop.c_stop_timer(self.timer)
            self.timer = None       # its owner is this connection
            ioloop.c_remove_handler(self.server.loop, fd)
            close(fd)
        return 0


cdef int on_ready(object loop, int fd, uint32_t events, void *arg) except -1:
    cdef Connection self = <Connection>arg
    if self.end:
        self.send_rest()
    else:
        self.receive()
    return 0 if self.fd < 0 else self.watch()


cdef int on_idle(object loop, void *arg) except -1:
    return (<Connection>arg).end_it()
