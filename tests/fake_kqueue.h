/* kqueue() and kevent() for Linux, made of poll(2): enough of BSD to test
 * _KQueue where there is no BSD.  Only the tests include this file.
 *
 * As on FreeBSD:
 * - EVFILT_READ and EVFILT_WRITE of a descriptor are two filters, each with its
 *   own udata and each reported as its own event; both are level-triggered.
 * - EV_EOF comes together with the data that is still unread (data > 0).
 * - A change that fails leaves an EV_ERROR entry with errno in data as long as
 *   the event list has room, and fails the call with errno when it has none.
 *   EV_RECEIPT leaves such an entry for every change, 0 meaning success.
 *   With any entry of that kind the call returns without looking for events.
 * - EV_DELETE, EV_ENABLE and EV_DISABLE: EBADF for a closed descriptor, ENOENT
 *   for a filter that is not there.
 * - A new filter is enabled unless EV_DISABLE comes with EV_ADD.  Adding one that
 *   is there changes its udata and leaves it disabled if it was: EV_ENABLE is due.
 *   (The manual says otherwise, the kernels of FreeBSD, OpenBSD and macOS do so.)
 * - Closing a descriptor removes its filters, even while a duplicate lives.
 * - EINTR ends the wait; the changes of that call stay applied.
 * - The queue is not inherited by fork(): the child finds its number closed.
 * - The queue itself is a pollable descriptor and not close-on-exec.
 *
 * Nothing tells the fake of a close, so it looks for them at every call: all files
 * that any queue watches are also in an epoll set that is never waited on, the
 * witness, into which a number can be added again only if its file has changed.
 *
 * Unlike FreeBSD: no EV_CLEAR and no other filters (EINVAL).  A number that was
 * closed, and is the same open file again at the next call, was never closed.  What
 * epoll refuses (regular files, /dev/null) is known by st_dev and st_ino.  While a
 * duplicate of a closed descriptor lives the queue may poll as readable for it.
 * A queue may be moved to another number (dup, then close), not shared by two.
 */
#ifndef FAKE_KQUEUE_H
#define FAKE_KQUEUE_H

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define EVFILT_READ (-1)
#define EVFILT_WRITE (-2)

#define EV_ADD 0x0001
#define EV_DELETE 0x0002
#define EV_ENABLE 0x0004
#define EV_DISABLE 0x0008
#define EV_ONESHOT 0x0010
#define EV_CLEAR 0x0020
#define EV_RECEIPT 0x0040
#define EV_ERROR 0x4000
#define EV_EOF 0x8000

#define EV_SET(kev, a, b, c, d, e, f)                                          \
    do {                                                                       \
        struct kevent *kev_ = (kev);                                           \
        kev_->ident = (uintptr_t)(a);                                          \
        kev_->filter = (b);                                                    \
        kev_->flags = (c);                                                     \
        kev_->fflags = (d);                                                    \
        kev_->data = (e);                                                      \
        kev_->udata = (f);                                                     \
    } while (0)

struct kevent {
    uintptr_t ident;
    short filter;
    unsigned short flags;
    unsigned int fflags;
    intptr_t data;
    void *udata;
};

/* Fault injection: {n, e} makes the n-th EV_ADD from now fail with errno e. */
__attribute__((visibility("default"))) int fake_kqueue_fault[2];

struct fake_filter {
    int present, enabled, oneshot;
    void *udata;
};

/* filters[0] is EVFILT_READ, filters[1] is EVFILT_WRITE. */
struct fake_knote {
    int fd;
    int witnessed;
    struct stat st;
    struct fake_filter filters[2];
};

struct fake_kq {
    int fd;
    struct fake_knote *notes;
    int count, size;
    int turn; /* the filter where the next scan begins: none starves */
    struct fake_kq *next;
};

static struct fake_kq *fake_kqs;
static pthread_mutex_t fake_kq_lock = PTHREAD_MUTEX_INITIALIZER;

/* All epoll sets have the same inode: what is in one tells that it is a queue (or
   the witness), and not an epoll set that got its number later. */
static int fake_marker = -1;
static int fake_witness = -1;
static int fake_stale; /* the witness may hold what no knote is for */

static int fake_is_queue(int fd)
{
    struct epoll_event event = {0};
    return epoll_ctl(fd, EPOLL_CTL_MOD, fake_marker, &event) == 0;
}

/* Out of the way of those who open, count and close descriptors. */
static int fake_move_up(int fd)
{
    int moved = fcntl(fd, F_DUPFD_CLOEXEC, 740);
    if (moved >= 0)
        close(fd);
    return moved >= 0 ? moved : fd;
}

static void fake_mark(int set)
{
    struct epoll_event event = {0};
    epoll_ctl(set, EPOLL_CTL_ADD, fake_marker, &event);
}

__attribute__((constructor)) static void fake_set_up(void)
{
    fake_marker = fake_move_up(eventfd(0, EFD_CLOEXEC));
    fake_witness = fake_move_up(epoll_create1(EPOLL_CLOEXEC));
    fake_mark(fake_witness);
}

/* The errno for adding a number to a set: 0 if its file is not in it yet. */
static int fake_enter(int set, int fd)
{
    struct epoll_event event = {0};
    return epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) < 0 ? errno : 0;
}

static void fake_leave(int fd)
{
    struct epoll_event event = {0};
    if (epoll_ctl(fake_witness, EPOLL_CTL_DEL, fd, &event) < 0)
        fake_stale = 1;
}

/* Whether the number still is the file that it was when the knote was made. */
static int fake_is_same(const struct fake_knote *note)
{
    struct stat st;
    int error = fake_enter(fake_witness, note->fd);
    if (error == 0)
        fake_leave(note->fd);
    if (note->witnessed)
        return error == EEXIST;
    return error != 0 && error != EEXIST && fstat(note->fd, &st) == 0 &&
           st.st_dev == note->st.st_dev && st.st_ino == note->st.st_ino;
}

static int fake_has_filter(const struct fake_knote *note)
{
    return note->filters[0].present || note->filters[1].present;
}

static void fake_lose(struct fake_knote *note)
{
    memset(note->filters, 0, sizeof note->filters);
    if (note->witnessed)
        fake_stale = 1;
}

/* Make a witness of what the knotes are for and nothing else. */
static void fake_renew_witness(void)
{
    struct fake_kq *kq;
    int i, fresh = fake_is_queue(fake_witness) ? epoll_create1(EPOLL_CLOEXEC) : -1;
    if (fresh < 0)
        return;
    for (kq = fake_kqs; kq != NULL; kq = kq->next)
        for (i = 0; i < kq->count; i++) {
            struct fake_knote *note = &kq->notes[i];
            if (fake_has_filter(note) && !fake_is_same(note))
                fake_lose(note);
            if (fake_has_filter(note) && note->witnessed)
                fake_enter(fresh, note->fd);
        }
    fake_mark(fresh);
    dup3(fresh, fake_witness, O_CLOEXEC);
    close(fresh);
    fake_stale = 0;
}

static int fake_is_open(const struct fake_knote *note)
{
    return fake_has_filter(note) && fake_is_same(note);
}

/* No filter is left of a knote: the witness forgets its file, unless it is watched
   by another queue. */
static void fake_forget(const struct fake_knote *gone)
{
    struct fake_kq *kq;
    int i;
    if (!gone->witnessed || fake_stale)
        return;
    for (kq = fake_kqs; kq != NULL; kq = kq->next)
        for (i = 0; i < kq->count; i++)
            if (kq->notes[i].fd == gone->fd && fake_has_filter(&kq->notes[i]))
                return;
    fake_leave(gone->fd);
}

/* A number is to be watched: what was known of another file on it is void. */
static void fake_meet(struct fake_knote *note, const struct stat *st)
{
    struct fake_kq *kq;
    int i, error = fake_enter(fake_witness, note->fd);
    if (error != EEXIST)
        for (kq = fake_kqs; kq != NULL; kq = kq->next)
            for (i = 0; i < kq->count; i++)
                if (kq->notes[i].fd == note->fd && kq->notes[i].witnessed)
                    fake_lose(&kq->notes[i]);
    note->witnessed = error == 0 || error == EEXIST;
    note->st = *st;
}

static void fake_before_fork(void) { pthread_mutex_lock(&fake_kq_lock); }

static void fake_after_fork(void) { pthread_mutex_unlock(&fake_kq_lock); }

static void fake_in_child(void)
{
    struct fake_kq *kq;
    while ((kq = fake_kqs) != NULL) {
        if (fake_is_queue(kq->fd))
            close(kq->fd);
        fake_kqs = kq->next;
        free(kq->notes);
        free(kq);
    }
    fake_renew_witness(); /* this one is the parent's */
    pthread_mutex_unlock(&fake_kq_lock);
}

static int kqueue(void)
{
    static int fork_handled;
    struct fake_kq **link, *kq, *fresh = calloc(1, sizeof *fresh);
    if (fresh == NULL)
        return -1;
    /* An epoll set that mirrors the filters makes the queue pollable. */
    fresh->fd = epoll_create1(0);
    if (fresh->fd < 0) {
        free(fresh);
        return -1;
    }
    pthread_mutex_lock(&fake_kq_lock);
    if (!fake_is_queue(fake_witness))
        fake_set_up(); /* somebody has closed all there was */
    fake_mark(fresh->fd);
    if (!fork_handled) {
        pthread_atfork(fake_before_fork, fake_after_fork, fake_in_child);
        fork_handled = 1;
    }
    for (link = &fake_kqs; (kq = *link) != NULL;) {
        if (kq->fd == fresh->fd || !fake_is_queue(kq->fd)) {
            *link = kq->next;
            fake_stale |= kq->count > 0;
            free(kq->notes);
            free(kq);
        } else {
            link = &kq->next;
        }
    }
    fresh->next = fake_kqs;
    fake_kqs = fresh;
    pthread_mutex_unlock(&fake_kq_lock);
    return fresh->fd;
}

static struct fake_kq *fake_find_kq(int fd)
{
    struct fake_kq *kq, *moved = NULL;
    for (kq = fake_kqs; kq != NULL && kq->fd != fd; kq = kq->next)
        if (moved == NULL && !fake_is_queue(kq->fd))
            moved = kq;
    if (kq == NULL && moved != NULL && fake_is_queue(fd)) {
        kq = moved;
        kq->fd = fd;
    }
    return kq != NULL && fake_is_queue(fd) ? kq : NULL;
}

static void fake_mirror(struct fake_kq *kq, const struct fake_knote *note)
{
    struct epoll_event event = {0};
    if (note->filters[0].enabled)
        event.events |= EPOLLIN | EPOLLRDHUP;
    if (note->filters[1].enabled)
        event.events |= EPOLLOUT;
    if (event.events == 0)
        epoll_ctl(kq->fd, EPOLL_CTL_DEL, note->fd, &event);
    else if (epoll_ctl(kq->fd, EPOLL_CTL_MOD, note->fd, &event) < 0)
        epoll_ctl(kq->fd, EPOLL_CTL_ADD, note->fd, &event);
}

static void fake_drop_filter(struct fake_kq *kq, struct fake_knote *note, int which)
{
    memset(&note->filters[which], 0, sizeof note->filters[which]);
    fake_mirror(kq, note);
    if (!fake_has_filter(note))
        fake_forget(note);
}

static struct fake_knote *fake_find_note(struct fake_kq *kq, int fd)
{
    int i;
    for (i = 0; i < kq->count; i++)
        if (kq->notes[i].fd == fd)
            return &kq->notes[i];
    return NULL;
}

static struct fake_knote *fake_new_note(struct fake_kq *kq, int fd)
{
    struct fake_knote *note;
    if (kq->count == kq->size) {
        int size = kq->size ? 2 * kq->size : 16;
        note = realloc(kq->notes, (size_t)size * sizeof *note);
        if (note == NULL)
            return NULL;
        kq->notes = note;
        kq->size = size;
    }
    note = &kq->notes[kq->count++];
    memset(note, 0, sizeof *note);
    note->fd = fd;
    return note;
}

/* Forget what close() removed and what has no filter left. */
static void fake_sweep(struct fake_kq *kq)
{
    int i;
    for (i = 0; i < kq->count;) {
        struct fake_knote *note = &kq->notes[i];
        if (fake_is_open(note)) {
            i++;
        } else {
            if (fake_has_filter(note))
                fake_lose(note);
            *note = kq->notes[--kq->count];
        }
    }
}

static int fake_change(struct fake_kq *kq, const struct kevent *change)
{
    struct fake_knote *note;
    struct fake_filter *filter;
    struct stat st;
    int fd = (int)change->ident;
    if ((change->filter != EVFILT_READ && change->filter != EVFILT_WRITE) ||
        change->flags & EV_CLEAR)
        return EINVAL;
    note = fake_find_note(kq, fd);
    if (note != NULL && !fake_is_open(note) && fake_has_filter(note))
        fake_lose(note);
    if (fstat(fd, &st) < 0)
        return EBADF;
    if (fd == kq->fd)
        return EINVAL;
    if (change->flags & EV_ADD && fake_kqueue_fault[0] > 0 &&
        --fake_kqueue_fault[0] == 0)
        return fake_kqueue_fault[1];
    if (note == NULL && change->flags & EV_ADD) {
        note = fake_new_note(kq, fd);
        if (note == NULL)
            return ENOMEM;
    }
    if (note == NULL)
        return ENOENT;
    filter = &note->filters[-1 - change->filter];
    if (change->flags & EV_ADD) {
        if (!fake_has_filter(note))
            fake_meet(note, &st);
        if (!filter->present)
            filter->present = filter->enabled = 1;
        filter->oneshot = (change->flags & EV_ONESHOT) != 0;
        filter->udata = change->udata;
    }
    if (!filter->present)
        return ENOENT;
    if (change->flags & EV_DELETE) {
        fake_drop_filter(kq, note, -1 - change->filter);
        return 0;
    }
    if (change->flags & EV_DISABLE)
        filter->enabled = 0;
    if (change->flags & EV_ENABLE)
        filter->enabled = 1;
    fake_mirror(kq, note);
    return 0;
}

/* What BSD answers in fflags at EV_EOF.  SO_ERROR would tell, and clear it for
 * the user: a closed connection without a round trip was never one. */
static unsigned int fake_socket_error(int fd, short revents)
{
    struct tcp_info info;
    socklen_t size = sizeof info;
    if (!(revents & POLLERR) ||
        getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) < 0)
        return 0;
    return info.tcpi_rtt == 0 ? ECONNREFUSED : ECONNRESET;
}

static int fake_ready(const struct fake_knote *note, int which, short revents,
                      struct kevent *event)
{
    short eof = which ? POLLHUP : POLLHUP | POLLRDHUP;
    int unread = 0;
    if (!note->filters[which].enabled ||
        !(revents & (eof | POLLERR | (which ? POLLOUT : POLLIN))))
        return 0;
    if (S_ISFIFO(note->st.st_mode))
        eof |= POLLERR;
    EV_SET(event, note->fd, which ? EVFILT_WRITE : EVFILT_READ, 0, 0, 1,
           note->filters[which].udata);
    if (note->filters[which].oneshot)
        event->flags |= EV_ONESHOT;
    if (revents & eof) {
        event->flags |= EV_EOF;
        event->fflags = fake_socket_error(note->fd, revents);
        event->data = 0;
    }
    if (which == 0 && ioctl(note->fd, FIONREAD, &unread) == 0)
        event->data = unread;
    return 1;
}

static int fake_collect(struct fake_kq *kq, const struct pollfd *polled, int npolled,
                        struct kevent *events, int nevents)
{
    int count = 2 * (npolled < kq->count ? npolled : kq->count);
    int k, n = 0, first = count ? kq->turn % count : 0;
    kq->turn = 0;
    for (k = 0; k < count; k++) {
        int turn = (first + k) % count, i = turn / 2, which = turn % 2;
        struct fake_knote *note = &kq->notes[i];
        struct kevent event;
        if (polled[i].fd != note->fd || polled[i].revents & POLLNVAL ||
            !fake_is_open(note) || !fake_ready(note, which, polled[i].revents, &event))
            continue;
        if (n == nevents) {
            kq->turn = turn;
            break;
        }
        events[n++] = event;
        if (note->filters[which].oneshot)
            fake_drop_filter(kq, note, which);
    }
    return n;
}

/* What each knote waits for; with room for another. */
static struct pollfd *fake_pollfds(const struct fake_kq *kq)
{
    struct pollfd *polled = calloc((size_t)kq->count + 1, sizeof *polled);
    int i;
    for (i = 0; polled != NULL && i < kq->count; i++) {
        const struct fake_filter *filters = kq->notes[i].filters;
        polled[i].fd = -1;
        if (filters[0].enabled || filters[1].enabled)
            polled[i].fd = kq->notes[i].fd;
        if (filters[0].enabled)
            polled[i].events |= POLLIN | POLLRDHUP;
        if (filters[1].enabled)
            polled[i].events |= POLLOUT;
    }
    return polled;
}

static int fake_wait(struct fake_kq *kq, struct kevent *events, int nevents,
                     const struct timespec *timeout)
{
    int fd = kq->fd;
    struct timespec left = {0, 0}, now, end = {0, 0};
    if (timeout != NULL) {
        clock_gettime(CLOCK_MONOTONIC, &end);
        end.tv_sec += timeout->tv_sec;
        end.tv_nsec += timeout->tv_nsec;
        if (end.tv_nsec >= 1000000000) {
            end.tv_sec++;
            end.tv_nsec -= 1000000000;
        }
        left = *timeout;
    }
    for (;;) {
        struct pollfd *polled;
        int rc, saved, n = 0, count;
        fake_sweep(kq);
        polled = fake_pollfds(kq);
        if (polled == NULL)
            return -1;
        count = kq->count;
        if (fake_stale)
            fake_renew_witness();
        pthread_mutex_unlock(&fake_kq_lock);
        rc = ppoll(polled, (nfds_t)count, timeout ? &left : NULL, NULL);
        saved = errno;
        pthread_mutex_lock(&fake_kq_lock);
        if (fake_find_kq(fd) != kq) {
            rc = -1;
            saved = EBADF;
        }
        if (rc > 0)
            n = fake_collect(kq, polled, count, events, nevents);
        free(polled);
        errno = saved;
        if (rc <= 0 || n > 0)
            return rc < 0 ? -1 : n;
        /* All that was ready has been closed meanwhile: wait for the rest. */
        if (timeout != NULL) {
            clock_gettime(CLOCK_MONOTONIC, &now);
            left.tv_sec = end.tv_sec - now.tv_sec;
            left.tv_nsec = end.tv_nsec - now.tv_nsec;
            if (left.tv_nsec < 0) {
                left.tv_sec--;
                left.tv_nsec += 1000000000;
            }
            if (left.tv_sec < 0)
                return 0;
        }
    }
}

static int fake_kevent(int fd, const struct kevent *changes, int nchanges,
                       struct kevent *events, int nevents,
                       const struct timespec *timeout)
{
    struct fake_kq *kq = fake_find_kq(fd);
    int i, n = 0;
    if (kq == NULL) {
        errno = EBADF;
        return -1;
    }
    if (timeout != NULL && (timeout->tv_sec < 0 || timeout->tv_nsec < 0 ||
                            timeout->tv_nsec >= 1000000000)) {
        errno = EINVAL;
        return -1;
    }
    for (i = 0; i < nchanges; i++) {
        struct kevent change = changes[i]; /* the two lists may be one array */
        int error = fake_change(kq, &change);
        if (error == 0 && !(change.flags & EV_RECEIPT))
            continue;
        if (n == nevents) {
            errno = error;
            return error ? -1 : 0;
        }
        change.flags = EV_ERROR;
        change.data = error;
        events[n++] = change;
    }
    if (n > 0 || nevents == 0)
        return n;
    return fake_wait(kq, events, nevents, timeout);
}

/* Other threads may use other queues meanwhile, and this one while it waits. */
static int kevent(int fd, const struct kevent *changes, int nchanges,
                  struct kevent *events, int nevents,
                  const struct timespec *timeout)
{
    int rc, saved;
    pthread_mutex_lock(&fake_kq_lock);
    rc = fake_kevent(fd, changes, nchanges, events, nevents, timeout);
    saved = errno;
    if (fake_stale)
        fake_renew_witness();
    pthread_mutex_unlock(&fake_kq_lock);
    errno = saved;
    return rc;
}

#endif
