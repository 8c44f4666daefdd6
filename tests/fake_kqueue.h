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
 * - Closing a descriptor removes its filters, even while a duplicate lives.
 * - EINTR ends the wait; the changes of that call stay applied.
 * - The queue is not inherited by fork(): the child finds its number closed.
 * - The queue itself is a pollable descriptor and not close-on-exec.
 *
 * Unlike FreeBSD: no EV_CLEAR and no other filters (EINVAL).  A closed number
 * is told from its reuse by st_dev and st_ino, so anonymous inodes (eventfd,
 * epoll) that follow each other on one number look like one object.  While a
 * duplicate of a closed descriptor lives the queue may poll as readable for it.
 * A queue may be moved to another number (dup, then close), not shared by two.
 */
#ifndef FAKE_KQUEUE_H
#define FAKE_KQUEUE_H

#include <errno.h>
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

static int fake_is_open(int fd, const struct stat *was)
{
    struct stat st;
    return fstat(fd, &st) == 0 && st.st_dev == was->st_dev &&
           st.st_ino == was->st_ino;
}

/* All epoll sets have the same inode: what is in a queue's mirror tells that it is
   one, and not an epoll set that got its number later. */
static int fake_marker = -1;

__attribute__((constructor)) static void fake_make_marker(void)
{
    fake_marker = eventfd(0, EFD_CLOEXEC);
}

static int fake_is_queue(int fd)
{
    struct epoll_event event = {0};
    return epoll_ctl(fd, EPOLL_CTL_MOD, fake_marker, &event) == 0;
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
    epoll_ctl(fresh->fd, EPOLL_CTL_ADD, fake_marker, &(struct epoll_event){0});
    pthread_mutex_lock(&fake_kq_lock);
    if (!fork_handled) {
        pthread_atfork(fake_before_fork, fake_after_fork, fake_in_child);
        fork_handled = 1;
    }
    for (link = &fake_kqs; (kq = *link) != NULL;) {
        if (kq->fd == fresh->fd || !fake_is_queue(kq->fd)) {
            *link = kq->next;
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
    pthread_mutex_lock(&fake_kq_lock);
    for (kq = fake_kqs; kq != NULL && kq->fd != fd; kq = kq->next)
        if (moved == NULL && !fake_is_queue(kq->fd))
            moved = kq;
    if (kq == NULL && moved != NULL && fake_is_queue(fd)) {
        kq = moved;
        kq->fd = fd;
    }
    pthread_mutex_unlock(&fake_kq_lock);
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
        if ((note->filters[0].present || note->filters[1].present) &&
            fake_is_open(note->fd, &note->st))
            i++;
        else
            *note = kq->notes[--kq->count];
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
    if (fstat(fd, &st) < 0) {
        if (note != NULL) /* the same file may come back on this number */
            memset(note->filters, 0, sizeof note->filters);
        return EBADF;
    }
    if (fd == kq->fd)
        return EINVAL;
    if (note != NULL &&
        (note->st.st_dev != st.st_dev || note->st.st_ino != st.st_ino))
        memset(note->filters, 0, sizeof note->filters);
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
        note->st = st;
        filter->present = filter->enabled = 1;
        filter->oneshot = (change->flags & EV_ONESHOT) != 0;
        filter->udata = change->udata;
    }
    if (!filter->present)
        return ENOENT;
    if (change->flags & EV_ENABLE)
        filter->enabled = 1;
    if (change->flags & EV_DISABLE)
        filter->enabled = 0;
    if (change->flags & EV_DELETE)
        memset(filter, 0, sizeof *filter);
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

static int fake_collect(struct fake_kq *kq, const struct pollfd *polled,
                        struct kevent *events, int nevents)
{
    int k, n = 0, count = 2 * kq->count, first = count ? kq->turn % count : 0;
    kq->turn = 0;
    for (k = 0; k < count; k++) {
        int turn = (first + k) % count, i = turn / 2, which = turn % 2;
        struct fake_knote *note = &kq->notes[i];
        struct kevent event;
        if (polled[i].revents & POLLNVAL || !fake_is_open(note->fd, &note->st) ||
            !fake_ready(note, which, polled[i].revents, &event))
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

static int kevent(int fd, const struct kevent *changes, int nchanges,
                  struct kevent *events, int nevents,
                  const struct timespec *timeout)
{
    struct fake_kq *kq = fake_find_kq(fd);
    struct timespec left = {0, 0}, now, end = {0, 0};
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
        int rc, saved;
        fake_sweep(kq);
        polled = calloc((size_t)kq->count + 1, sizeof *polled);
        if (polled == NULL)
            return -1;
        for (i = 0; i < kq->count; i++) {
            const struct fake_filter *filters = kq->notes[i].filters;
            polled[i].fd = -1;
            if (filters[0].enabled || filters[1].enabled)
                polled[i].fd = kq->notes[i].fd;
            if (filters[0].enabled)
                polled[i].events |= POLLIN | POLLRDHUP;
            if (filters[1].enabled)
                polled[i].events |= POLLOUT;
        }
        rc = ppoll(polled, (nfds_t)kq->count, timeout ? &left : NULL, NULL);
        saved = errno;
        if (rc > 0)
            n = fake_collect(kq, polled, events, nevents);
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

#endif
