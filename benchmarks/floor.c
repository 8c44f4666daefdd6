/* The floor: what a C program needs for the same work, with no interpreter.
 *
 * A loop of the usual parts (a growable ring of callbacks, a binary heap of
 * timers that lie in their owners, epoll, an eventfd to be woken by) and the
 * scenarios of scenarios.py under the same names and with the same parameters:
 *
 *     floor NAME PARAMETER...      prints the figures as JSON
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHECK(call) ((call) < 0 ? (perror(#call), exit(1), 0) : 0)

enum { BATCH = 256, CALLBACKS_PER_POLL = 64, CHUNK = 131072 };

typedef void (*function)(void *);

struct callback {
    function run;
    void *arg;
};

struct queue {
    struct callback *items;
    size_t head, count, size;
};

struct timer {
    size_t index;
    struct callback callback;
};

struct entry {
    int64_t due;
    struct timer *timer;
};

struct watcher {
    int fd;
    void (*ready)(struct watcher *, uint32_t);
};

struct loop {
    int epoll, bell, stopped;
    struct queue queue, posted;
    pthread_mutex_t lock;
    struct entry *heap;
    size_t timers, heap_size;
    struct watcher bell_watcher;
};

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void *allocate(void *old, size_t size)
{
    void *block = realloc(old, size);
    if (!block)
        abort();
    return block;
}

/* -- the queue -- */

static void push(struct queue *q, struct callback c)
{
    if (q->count == q->size) {
        size_t size = q->size ? 2 * q->size : 64;
        struct callback *items = allocate(NULL, size * sizeof *items);
        for (size_t i = 0; i < q->count; i++)
            items[i] = q->items[(q->head + i) & (q->size - 1)];
        free(q->items);
        q->items = items, q->head = 0, q->size = size;
    }
    q->items[(q->head + q->count++) & (q->size - 1)] = c;
}

static struct callback pop(struct queue *q)
{
    struct callback c = q->items[q->head];
    q->head = (q->head + 1) & (q->size - 1);
    q->count--;
    return c;
}

static void call(struct loop *loop, function run, void *arg)
{
    push(&loop->queue, (struct callback){run, arg});
}

static void post(struct loop *loop, function run, void *arg)
{
    pthread_mutex_lock(&loop->lock);
    int first = !loop->posted.count;
    push(&loop->posted, (struct callback){run, arg});
    pthread_mutex_unlock(&loop->lock);
    if (first)
        CHECK(eventfd_write(loop->bell, 1));
}

static void answer_bell(struct watcher *w, uint32_t events)
{
    struct loop *loop = (void *)((char *)w - offsetof(struct loop, bell_watcher));
    eventfd_t value;
    (void)events;
    eventfd_read(w->fd, &value);
    pthread_mutex_lock(&loop->lock);
    while (loop->posted.count)
        push(&loop->queue, pop(&loop->posted));
    pthread_mutex_unlock(&loop->lock);
}

/* -- timers -- */

static void place(struct loop *loop, size_t i, struct entry e)
{
    loop->heap[i] = e;
    e.timer->index = i;
}

static void sift(struct loop *loop, size_t i, struct entry e)
{
    for (size_t up; i && e.due < loop->heap[up = (i - 1) / 2].due; i = up)
        place(loop, i, loop->heap[up]);
    for (size_t down; (down = 2 * i + 1) < loop->timers; i = down) {
        if (down + 1 < loop->timers
            && loop->heap[down + 1].due < loop->heap[down].due)
            down++;
        if (e.due <= loop->heap[down].due)
            break;
        place(loop, i, loop->heap[down]);
    }
    place(loop, i, e);
}

static void start_timer(struct loop *loop, struct timer *t, int64_t due)
{
    if (loop->timers == loop->heap_size) {
        loop->heap_size = loop->heap_size ? 2 * loop->heap_size : 64;
        loop->heap = allocate(loop->heap, loop->heap_size * sizeof *loop->heap);
    }
    loop->timers++;
    sift(loop, loop->timers - 1, (struct entry){due, t});
}

static void stop_timer(struct loop *loop, struct timer *t)
{
    struct entry last = loop->heap[--loop->timers];
    if (last.timer != t)
        sift(loop, t->index, last);
}

/* -- the loop -- */

static void watch(struct loop *loop, int op, struct watcher *w, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.ptr = w};
    CHECK(epoll_ctl(loop->epoll, op, w->fd, &e));
}

static void init(struct loop *loop)
{
    *loop = (struct loop){.lock = PTHREAD_MUTEX_INITIALIZER};
    CHECK(loop->epoll = epoll_create1(EPOLL_CLOEXEC));
    CHECK(loop->bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    loop->bell_watcher = (struct watcher){loop->bell, answer_bell};
    watch(loop, EPOLL_CTL_ADD, &loop->bell_watcher, EPOLLIN);
}

static void run(struct loop *loop)
{
    struct epoll_event events[BATCH];
    struct timespec pause;

    for (size_t ran = 0;;) {
        for (size_t n = loop->queue.count; n; n--, ran++) {
            struct callback c = pop(&loop->queue);
            c.run(c.arg);
        }
        if (loop->timers) {
            int64_t start = now();
            while (loop->timers && loop->heap[0].due <= start) {
                struct timer *t = loop->heap[0].timer;
                stop_timer(loop, t);
                t->callback.run(t->callback.arg);
            }
        }
        if (loop->stopped)
            break;
        if (loop->queue.count && ran < CALLBACKS_PER_POLL)
            continue;
        ran = 0;

        int64_t sleep = 0;
        struct timespec *limit = &pause;
        if (!loop->queue.count) {
            if (loop->timers)
                sleep = loop->heap[0].due - now();
            else
                limit = NULL;
        }
        if (sleep < 0)
            sleep = 0;
        pause = (struct timespec){sleep / 1000000000, sleep % 1000000000};
        int count = epoll_pwait2(loop->epoll, events, BATCH, limit, NULL);
        if (count < 0 && errno != EINTR)
            CHECK(count);
        for (int i = 0; i < count; i++) {
            struct watcher *w = events[i].data.ptr;
            w->ready(w, events[i].events);
        }
    }
    loop->stopped = 0;
}

static void stop(void *loop) { ((struct loop *)loop)->stopped = 1; }

static void nothing(void *arg) { (void)arg; }

/* -- the scenarios -- */

static struct loop loop;
static int64_t left, to_write;
static double param[4];

static void wall(int64_t start, int64_t count)
{
    printf("{\"wall\": %.3f}\n", (double)(now() - start) / count);
}

static double *spread(size_t count, double shortest, double longest)
{
    double *delays = allocate(NULL, count * sizeof *delays);
    srand48(count);
    for (size_t i = 0; i < count; i++)
        delays[i] = (shortest + (longest - shortest) * drand48()) * 1e9;
    return delays;
}

static size_t *shuffled(size_t count)
{
    size_t *order = allocate(NULL, count * sizeof *order);
    srand48(count);
    for (size_t i = 0; i < count; i++) {
        size_t j = drand48() * (i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    return order;
}

static void step(void *arg)
{
    if (--left)
        call(&loop, step, arg);
    else
        stop(&loop);
}

static void chain(void)
{
    int64_t count = left = param[0], start = now();
    call(&loop, step, NULL);
    run(&loop);
    wall(start, count);
}

static void batch(void)
{
    int64_t count = param[0], start = now();
    for (int64_t i = 0; i < count; i++)
        call(&loop, nothing, NULL);
    call(&loop, stop, &loop);
    run(&loop);
    wall(start, count);
}

static void *hand_over(void *arg)
{
    for (int64_t i = 0; i < left; i++)
        post(&loop, nothing, NULL);
    post(&loop, stop, &loop);
    return arg;
}

static void crossthread(void)
{
    pthread_t thread;
    int64_t count = left = param[0], start = now();
    pthread_create(&thread, NULL, hand_over, NULL);
    run(&loop);
    wall(start, count);
}

static struct loop other;

static void ping(void *arg);

static void pong(void *arg) { post(&loop, ping, arg); }

static void ping(void *arg)
{
    if (--left) {
        post(&other, pong, arg);
    } else {
        post(&other, stop, &other);
        stop(&loop);
    }
}

static void *serve_other(void *arg)
{
    run(&other);
    return arg;
}

static void pingpong(void)
{
    pthread_t thread;
    int64_t count = left = param[0];
    init(&other);
    pthread_create(&thread, NULL, serve_other, NULL);
    call(&loop, ping, NULL);
    int64_t start = now();
    run(&loop);
    wall(start, count);
}

static struct timer *new_timers(size_t count, function fn)
{
    struct timer *timers = allocate(NULL, count * sizeof *timers);
    for (size_t i = 0; i < count; i++)
        timers[i] = (struct timer){0, {fn, NULL}};
    return timers;
}

static void timers_cancel(void)
{
    size_t count = param[0], *order = shuffled(count);
    double *delays = spread(count, 60, 600);
    struct timer *timers = new_timers(count, nothing);
    int64_t start = now();
    for (size_t i = 0; i < count; i++)
        start_timer(&loop, &timers[i], now() + (int64_t)delays[i]);
    for (size_t i = 0; i < count; i++)
        stop_timer(&loop, &timers[order[i]]);
    call(&loop, stop, &loop);
    run(&loop);
    wall(start, count);
}

static void fire(void *arg)
{
    (void)arg;
    if (!--left)
        stop(&loop);
}

static void timers_fire(void)
{
    size_t count = left = param[0];
    double *delays = spread(count, 0, 1e-3);
    struct timer *timers = new_timers(count, fire);
    int64_t start = now();
    for (size_t i = 0; i < count; i++)
        start_timer(&loop, &timers[i], now() + (int64_t)delays[i]);
    run(&loop);
    wall(start, count);
}

static struct timer *live_timers;
static size_t *live_order, live, done;

static void activity(void *arg)
{
    for (int i = 0; i < 100; i++, done++) {
        struct timer *t = &live_timers[live_order[done % live]];
        stop_timer(&loop, t);
        start_timer(&loop, t, now() + 60 * 1000000000LL);
    }
    if (done < (size_t)left)
        call(&loop, activity, arg);
    else
        stop(&loop);
}

static void rearm(void)
{
    live = param[0], left = param[1];
    double *delays = spread(live, 30, 60);
    live_timers = new_timers(live, nothing);
    live_order = shuffled(live);
    for (size_t i = 0; i < live; i++)
        start_timer(&loop, &live_timers[i], now() + (int64_t)delays[i]);
    call(&loop, activity, NULL);
    int64_t start = now();
    run(&loop);
    wall(start, left);
}

static void million(void)
{
    size_t count = param[0], *order = shuffled(count);
    double *delays = spread(count, 60, 6000);
    struct timer *timers = new_timers(count, nothing);
    int64_t start = now();
    for (size_t i = 0; i < count; i++)
        start_timer(&loop, &timers[i], now() + (int64_t)delays[i]);
    int64_t added = now();
    for (size_t i = 0; i < count; i++)
        stop_timer(&loop, &timers[order[i]]);
    call(&loop, stop, &loop);
    run(&loop);
    printf("{\"add\": %.3f, \"cancel\": %.3f, \"memory\": %zu}\n",
           (double)(added - start) / count, (double)(now() - added) / count,
           sizeof(struct timer) + sizeof(struct entry));
}

static double *late_delays;
static int64_t *late, due, fired;

static void was_due(void *timer)
{
    late[fired++] = now() - due;
    if (fired == left) {
        stop(&loop);
    } else {
        due = now() + (int64_t)late_delays[fired];
        start_timer(&loop, timer, due);
    }
}

static int ascending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void lateness(void)
{
    struct timer timer = {0, {was_due, &timer}};
    left = param[0];
    late_delays = spread(left, 0.1e-3, 20e-3);
    late = allocate(NULL, left * sizeof *late);
    due = now() + (int64_t)late_delays[0];
    start_timer(&loop, &timer, due);
    run(&loop);
    qsort(late, left, sizeof *late, ascending);
    printf("{\"least\": %.3f, \"p50\": %.3f, \"p99\": %.3f}\n", late[0] / 1e3,
           late[left / 2] / 1e3, late[left * 99 / 100] / 1e3);
}

static int *ring_writer;

struct ring_watcher {
    struct watcher watcher;
    int next;
};

static void pass_on(struct watcher *w, uint32_t events)
{
    char byte;
    (void)events;
    CHECK(read(w->fd, &byte, 1));
    if (to_write) {
        to_write--;
        CHECK(write(((struct ring_watcher *)w)->next, "e", 1));
    }
    if (!--left)
        stop(&loop);
}

static double user_time(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return u.ru_utime.tv_sec * 1e9 + u.ru_utime.tv_usec * 1e3;
}

static void ring(void)
{
    size_t pairs = param[0], active = param[1], count = param[2];
    struct ring_watcher *watchers = allocate(NULL, pairs * sizeof *watchers);
    ring_writer = allocate(NULL, pairs * sizeof *ring_writer);
    for (size_t i = 0; i < pairs; i++) {
        int ends[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends));
        watchers[i].watcher = (struct watcher){ends[0], pass_on};
        ring_writer[i] = ends[1];
        watch(&loop, EPOLL_CTL_ADD, &watchers[i].watcher, EPOLLIN);
    }
    for (size_t i = 0; i < pairs; i++)
        watchers[i].next = ring_writer[(i + 1) % pairs];
    left = count, to_write = count - active;
    for (size_t i = 0; i < active; i++)
        CHECK(write(ring_writer[i * pairs / active], "e", 1));
    double user = user_time();
    int64_t start = now();
    run(&loop);
    printf("{\"wall\": %.3f, \"user\": %.3f}\n",
           (double)(now() - start) / count, (user_time() - user) / count);
}

static void not_ready(struct watcher *w, uint32_t events)
{
    (void)w, (void)events;
    abort();
}

static void churn(void)
{
    int fds = param[0], rounds = param[1] / fds;
    struct watcher *watchers = allocate(NULL, fds * sizeof *watchers);
    struct epoll_event event;
    for (int i = 0; i < fds; i++) {
        int ends[2];
        CHECK(pipe(ends));
        watchers[i] = (struct watcher){ends[0], not_ready};
    }
    int64_t start = now();
    for (int round = 0; round < rounds; round++)
        for (int step = 0; step < 3; step++) {
            for (int i = 0; i < fds; i++)
                watch(&loop,
                      (int[]){EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL}[step],
                      &watchers[i], step ? EPOLLIN | EPOLLOUT : EPOLLIN);
            CHECK(epoll_wait(loop.epoll, &event, 1, 0));
        }
    wall(start, (int64_t)rounds * fds);
}

struct connection {
    struct watcher watcher;
    char *unsent;
    size_t from, to;
};

static char chunk[CHUNK];

static void echo_ready(struct watcher *w, uint32_t events)
{
    struct connection *c = (struct connection *)w;
    char *data = chunk;
    ssize_t size, sent;
    (void)events;
    if (c->to) {
        data = c->unsent + c->from;
        size = c->to - c->from;
    } else {
        size = read(w->fd, chunk, CHUNK);
        if (size <= 0) {
            close(w->fd);
            free(c->unsent);
            free(c);
            return;
        }
    }
    sent = write(w->fd, data, size);
    if (sent < 0)
        sent = 0;
    if (c->to) {
        c->from += sent;
        if (c->from == c->to) {
            c->from = c->to = 0;
            watch(&loop, EPOLL_CTL_MOD, w, EPOLLIN);
        }
    } else if (sent < size) {
        if (!c->unsent)
            c->unsent = allocate(NULL, CHUNK);
        memcpy(c->unsent, data + sent, size - sent);
        c->to = size - sent;
        watch(&loop, EPOLL_CTL_MOD, w, EPOLLOUT);
    }
}

static void echo_accept(struct watcher *w, uint32_t events)
{
    int fd, yes = 1;
    (void)events;
    while ((fd = accept4(w->fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct connection *c = allocate(NULL, sizeof *c);
        *c = (struct connection){{fd, echo_ready}, NULL, 0, 0};
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        watch(&loop, EPOLL_CTL_ADD, &c->watcher, EPOLLIN);
    }
}

/* Prints its port and serves until it is killed. */
static void echo(void)
{
    struct sockaddr_in address = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
    socklen_t length = sizeof address;
    struct watcher listener = {0, echo_accept};
    CHECK(listener.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    CHECK(bind(listener.fd, (void *)&address, length));
    CHECK(listen(listener.fd, 1024));
    CHECK(getsockname(listener.fd, (void *)&address, &length));
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    watch(&loop, EPOLL_CTL_ADD, &listener, EPOLLIN);
    run(&loop);
}

static void idle(void)
{
    struct timer timer = {0, {stop, &loop}};
    struct rusage before, after;
    start_timer(&loop, &timer, now() + (int64_t)(param[0] * 1e9));
    getrusage(RUSAGE_SELF, &before);
    run(&loop);
    getrusage(RUSAGE_SELF, &after);
    double cpu = (after.ru_utime.tv_sec - before.ru_utime.tv_sec) * 1e6
                 + (after.ru_utime.tv_usec - before.ru_utime.tv_usec)
                 + (after.ru_stime.tv_sec - before.ru_stime.tv_sec) * 1e6
                 + (after.ru_stime.tv_usec - before.ru_stime.tv_usec);
    printf("{\"cpu\": %.1f, \"wakeups\": %ld}\n", cpu,
           after.ru_nvcsw - before.ru_nvcsw);
}

#define SCENARIO(name) {#name, name}

static const struct {
    const char *name;
    void (*run)(void);
} scenarios[] = {
    SCENARIO(chain), SCENARIO(batch), SCENARIO(crossthread), SCENARIO(pingpong),
    SCENARIO(timers_cancel), SCENARIO(timers_fire), SCENARIO(rearm),
    SCENARIO(million), SCENARIO(lateness), SCENARIO(ring), SCENARIO(churn),
    SCENARIO(echo), SCENARIO(idle),
};

int main(int argc, char **argv)
{
    for (int i = 2; i < argc && i < 6; i++)
        param[i - 2] = atof(argv[i]);
    init(&loop);
    for (size_t i = 0; argc > 1 && i < sizeof scenarios / sizeof *scenarios; i++)
        if (!strcmp(argv[1], scenarios[i].name)) {
            scenarios[i].run();
            return 0;
        }
    fprintf(stderr, "usage: floor NAME PARAMETER...\n");
    return 2;
}
