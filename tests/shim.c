/* Preloaded by the tests: sees the calls that wait and those that set what belongs to
   the program, and raises signals just before they are made. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#ifndef __GLIBC__
typedef int __itimer_which_t;
#endif

/* The n-th wait that may last raises a signal first, in its own thread, */
int window_countdown, window_signal;
/* ... or the n-th of all the calls below. */
int call_countdown;
/* How often a timer, SIGALRM's handler or a signal mask was set or asked for. */
int borrowed;

static void count(int *countdown) {
    if (*countdown && --*countdown == 0)
        raise(window_signal);
}
static void wait_is_next(int lasts) {
    if (lasts)
        count(&window_countdown);
}
static int lasts(const struct timespec *t) { return !t || t->tv_sec || t->tv_nsec; }

/* A system call has at most six; those that were not passed are passed on as well. */
#define TAKE_ARGUMENTS(last, array) \
    long array[6]; \
    va_list list; \
    va_start(list, last); \
    for (int i = 0; i < 6; i++) \
        array[i] = va_arg(list, long); \
    va_end(list)
#define CALL(type, name, declared, given, before) type name declared { \
    static __typeof__(name) *real; \
    if (!real) \
        real = dlsym(RTLD_NEXT, #name); \
    count(&call_countdown); \
    before; \
    return real given; \
}

CALL(int, epoll_wait, (int ep, struct epoll_event *e, int n, int ms), (ep, e, n, ms),
     wait_is_next(ms))
CALL(long, syscall, (long number, ...), (number, a[0], a[1], a[2], a[3], a[4], a[5]),
     TAKE_ARGUMENTS(number, a); wait_is_next(number == SYS_epoll_pwait2))
CALL(int, pselect, (int n, fd_set *r, fd_set *w, fd_set *x, const struct timespec *t,
     const sigset_t *m), (n, r, w, x, t, m), wait_is_next(lasts(t)))
CALL(int, poll, (struct pollfd *p, nfds_t n, int ms), (p, n, ms), wait_is_next(ms))
CALL(int, ppoll, (struct pollfd *p, nfds_t n, const struct timespec *t,
     const sigset_t *m), (p, n, t, m), wait_is_next(lasts(t)))

CALL(int, setitimer, (__itimer_which_t which, const struct itimerval *v,
     struct itimerval *old), (which, v, old), borrowed++)
CALL(int, getitimer, (__itimer_which_t which, struct itimerval *v), (which, v),
     borrowed++)
CALL(int, timer_create, (clockid_t clock, struct sigevent *e, timer_t *t),
     (clock, e, t), borrowed++)
CALL(int, sigaction, (int number, const struct sigaction *a, struct sigaction *old),
     (number, a, old), borrowed += number == SIGALRM)
CALL(int, pthread_sigmask, (int how, const sigset_t *set, sigset_t *old),
     (how, set, old), borrowed++)

CALL(int, epoll_ctl, (int ep, int op, int fd, struct epoll_event *e), (ep, op, fd, e), )
CALL(int, fstat, (int fd, struct stat *s), (fd, s), )
#ifdef __GLIBC__  /* musl has one fstat for files of every size */
CALL(int, fstat64, (int fd, struct stat64 *s), (fd, s), )
#endif
CALL(ssize_t, read, (int fd, void *data, size_t size), (fd, data, size), )
CALL(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), )
