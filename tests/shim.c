/* Preloaded by the tests: sees the calls that wait, and those that set timers. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/time.h>
#include <time.h>

/* The n-th wait that may last raises a signal first, in its own thread. */
int window_countdown, window_signal;
/* How often a timer was set. */
int timer_calls;

static void wait_is_next(int waits) {
    if (waits && window_countdown && --window_countdown == 0)
        raise(window_signal);
}
static int waits(const struct timespec *t) { return !t || t->tv_sec || t->tv_nsec; }

#define REAL(name) static __typeof__(name) *real; \
    if (!real) real = dlsym(RTLD_NEXT, #name)

int epoll_wait(int ep, struct epoll_event *e, int n, int ms) {
    REAL(epoll_wait);
    wait_is_next(ms != 0);
    return real(ep, e, n, ms);
}
int epoll_pwait2(int ep, struct epoll_event *e, int n, const struct timespec *t,
                 const sigset_t *m) {
    REAL(epoll_pwait2);
    wait_is_next(waits(t));
    return real(ep, e, n, t, m);
}
int pselect(int n, fd_set *r, fd_set *w, fd_set *x, const struct timespec *t,
            const sigset_t *m) {
    REAL(pselect);
    wait_is_next(waits(t));
    return real(n, r, w, x, t, m);
}
int poll(struct pollfd *p, nfds_t n, int ms) {
    REAL(poll);
    wait_is_next(ms != 0);
    return real(p, n, ms);
}
int ppoll(struct pollfd *p, nfds_t n, const struct timespec *t, const sigset_t *m) {
    REAL(ppoll);
    wait_is_next(waits(t));
    return real(p, n, t, m);
}
int setitimer(__itimer_which_t which, const struct itimerval *v, struct itimerval *o) {
    REAL(setitimer);
    timer_calls++;
    return real(which, v, o);
}
int timer_settime(timer_t t, int f, const struct itimerspec *v, struct itimerspec *o) {
    REAL(timer_settime);
    timer_calls++;
    return real(t, f, v, o);
}
