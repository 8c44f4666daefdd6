/* faults.c - system calls that fail, and signals that come at the worst moment.
 *
 * To be preloaded (LD_PRELOAD) by test_faults.py, which sets the variables below
 * through ctypes.  Only calls that are made by the code between fault_from and
 * fault_to count, the module under test: the interpreter's own are left alone.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* The order is that of CALLS in test_faults.py. */
enum call {
    EPOLL_CREATE1, EPOLL_CTL, EPOLL_WAIT, EPOLL_PWAIT2, PSELECT, POLL,
    READ, WRITE, CLOSE, PIPE2, FCNTL,
    MALLOC, CALLOC, REALLOC, CALLS
};

uintptr_t fault_from, fault_to;
int fault_armed;
unsigned fault_which;           /* calls that count, a bit each */
int fault_nth;                  /* the one to strike at */
int fault_errno;                /* what it fails with, or 0 */
int fault_signal;               /* what it raises first, or 0 */
int fault_seen;                 /* calls that counted so far */
int fault_counts[CALLS];        /* the same, of each sort */

static int strikes(enum call call, void *caller) {
    uintptr_t from = (uintptr_t)caller;
    if (!__atomic_load_n(&fault_armed, __ATOMIC_ACQUIRE)
            || from < fault_from || from >= fault_to
            || !(fault_which >> call & 1))
        return 0;
    __atomic_add_fetch(&fault_counts[call], 1, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&fault_seen, 1, __ATOMIC_RELAXED) != fault_nth)
        return 0;
    if (fault_signal) {
        int saved = errno;
        raise(fault_signal);
        errno = saved;
    }
    if (fault_errno)
        errno = fault_errno;
    return fault_errno != 0;
}

#define STRIKES(call) strikes(call, __builtin_return_address(0))
#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

int epoll_create1(int flags) {
    REAL(epoll_create1);
    return STRIKES(EPOLL_CREATE1) ? -1 : real(flags);
}

int epoll_ctl(int ep, int op, int fd, struct epoll_event *event) {
    REAL(epoll_ctl);
    return STRIKES(EPOLL_CTL) ? -1 : real(ep, op, fd, event);
}

int epoll_wait(int ep, struct epoll_event *events, int n, int ms) {
    REAL(epoll_wait);
    return STRIKES(EPOLL_WAIT) ? -1 : real(ep, events, n, ms);
}

long syscall(long number, ...) {
    REAL(syscall);
    long a[6];
    va_list arguments;
    va_start(arguments, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(arguments, long);
    va_end(arguments);
    return number == SYS_epoll_pwait2 && STRIKES(EPOLL_PWAIT2) ? -1
        : real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int poll(struct pollfd *files, nfds_t n, int ms) {
    REAL(poll);
    return STRIKES(POLL) ? -1 : real(files, n, ms);
}

int pselect(int n, fd_set *reads, fd_set *writes, fd_set *others,
            const struct timespec *timeout, const sigset_t *mask) {
    REAL(pselect);
    return STRIKES(PSELECT) ? -1 : real(n, reads, writes, others, timeout, mask);
}

ssize_t read(int fd, void *buffer, size_t size) {
    REAL(read);
    return STRIKES(READ) ? -1 : real(fd, buffer, size);
}

ssize_t write(int fd, const void *buffer, size_t size) {
    REAL(write);
    return STRIKES(WRITE) ? -1 : real(fd, buffer, size);
}

int close(int fd) {
    REAL(close);
    /* Linux closes, whatever it answers. */
    int fails = STRIKES(CLOSE), error = errno, rc = real(fd);
    if (fails)
        errno = error;
    return fails ? -1 : rc;
}

int pipe2(int fds[2], int flags) {
    REAL(pipe2);
    return STRIKES(PIPE2) ? -1 : real(fds, flags);
}

/* Python is built for large files, which has this in place of fcntl. */
int fcntl64(int fd, int command, long argument) {
    static int (*real)(int, int, long);
    if (!real)
        real = (int (*)(int, int, long))dlsym(RTLD_NEXT, "fcntl64");
    return STRIKES(FCNTL) ? -1 : real(fd, command, argument);
}

void *malloc(size_t size) {
    REAL(malloc);
    return STRIKES(MALLOC) ? NULL : real(size);
}

void *calloc(size_t count, size_t size) {
    REAL(calloc);
    return STRIKES(CALLOC) ? NULL : real(count, size);
}

void *realloc(void *memory, size_t size) {
    REAL(realloc);
    return STRIKES(REALLOC) ? NULL : real(memory, size);
}
