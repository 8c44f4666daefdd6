/* The load on an echo server: closed-loop clients, one request each in flight.
 *
 *     load CORE PORT SERVER_PID SIZE CONNECTIONS SECONDS
 *
 * Runs on the core it is told.  A tenth of the time warms up; the figures are those of
 * the rest: wall time per request, rate, p99, and the server's own CPU time per
 * request, split into user and system as the kernel's clock ticks saw it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHECK(call) ((call) < 0 ? (perror(#call), exit(1), 0) : 0)

enum { BATCH = 256, CHUNK = 262144 };

struct client {
    int fd, blocked;
    size_t sent, received;
    int64_t start;
};

static int epoll;
static size_t size;
static char *request, answer[CHUNK];
static double *latencies;
static size_t finished, room;

static int64_t clock_ns(clockid_t id)
{
    struct timespec t;
    CHECK(clock_gettime(id, &t));
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int64_t now(void) { return clock_ns(CLOCK_MONOTONIC); }

/* User time as a share of all CPU time is known in ticks, the sum exactly. */
static void server_ticks(int pid, long *user, long *system)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *stat = fopen(path, "r");
    if (!stat
        || fscanf(stat, "%*d (%*[^)]) %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u"
                        " %*u %ld %ld", user, system) != 2) {
        perror(path);
        exit(1);
    }
    fclose(stat);
}

static void want(struct client *c, int op, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.ptr = c};
    CHECK(epoll_ctl(epoll, op, c->fd, &e));
}

static void send_more(struct client *c)
{
    ssize_t n = send(c->fd, request + c->sent, size - c->sent,
                     MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN)
        CHECK(n);
    c->sent += n > 0 ? n : 0;
    int blocked = c->sent < size;
    if (blocked != c->blocked)
        want(c, EPOLL_CTL_MOD, blocked ? EPOLLIN | EPOLLOUT : EPOLLIN);
    c->blocked = blocked;
}

static void begin(struct client *c)
{
    c->sent = c->received = 0;
    c->start = now();
    send_more(c);
}

static void receive(struct client *c)
{
    size_t most = size - c->received < CHUNK ? size - c->received : CHUNK;
    ssize_t n = recv(c->fd, answer, most, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0 || memcmp(answer, request + c->received, n)) {
        fprintf(stderr, n > 0 ? "a wrong byte came back\n" : "connection lost\n");
        exit(1);
    }
    c->received += n;
    if (c->received < size)
        return;
    if (finished == room) {
        room = room ? 2 * room : 65536;
        latencies = realloc(latencies, room * sizeof *latencies);
        if (!latencies)
            abort();
    }
    latencies[finished++] = (now() - c->start) / 1e3;
    begin(c);
}

static void drive(int64_t until)
{
    struct epoll_event events[BATCH];
    finished = 0;
    while (now() < until) {
        int count = epoll_wait(epoll, events, BATCH, 1000);
        CHECK(count);
        for (int i = 0; i < count; i++) {
            struct client *c = events[i].data.ptr;
            if (events[i].events & EPOLLOUT)
                send_more(c);
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                receive(c);
        }
    }
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    if (argc != 7) {
        fprintf(stderr, "usage: load CORE PORT PID SIZE CONNECTIONS SECONDS\n");
        return 2;
    }
    struct sockaddr_in address = {
        AF_INET, htons(atoi(argv[2])), {htonl(INADDR_LOOPBACK)}, {0}};
    int server = atoi(argv[3]), connections = atoi(argv[5]), yes = 1;
    double seconds = atof(argv[6]);
    cpu_set_t core;
    size = atol(argv[4]);
    CPU_ZERO(&core);
    CPU_SET(atoi(argv[1]), &core);
    CHECK(sched_setaffinity(0, sizeof core, &core));

    request = malloc(size);
    struct client *clients = calloc(connections, sizeof *clients);
    if (!request || !clients)
        abort();
    for (size_t i = 0; i < size; i++)
        request[i] = (char)(i * 31 + i / 251);

    CHECK(epoll = epoll_create1(0));
    for (int i = 0; i < connections; i++) {
        struct client *c = &clients[i];
        CHECK(c->fd = socket(AF_INET, SOCK_STREAM, 0));
        CHECK(connect(c->fd, (void *)&address, sizeof address));
        CHECK(setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes));
        want(c, EPOLL_CTL_ADD, EPOLLIN);
    }
    for (int i = 0; i < connections; i++)
        begin(&clients[i]);
    drive(now() + (int64_t)(seconds * 1e8));

    clockid_t cpu_clock;
    long user, system, user_after, system_after;
    CHECK(-clock_getcpuclockid(server, &cpu_clock));
    server_ticks(server, &user, &system);
    int64_t cpu = clock_ns(cpu_clock), start = now();
    drive(start + (int64_t)(seconds * 1e9));
    double elapsed = now() - start;
    cpu = clock_ns(cpu_clock) - cpu;
    server_ticks(server, &user_after, &system_after);
    user = user_after - user, system = system_after - system;

    if (!finished) {
        fprintf(stderr, "no request was answered\n");
        return 1;
    }
    double share = user + system ? (double)user / (user + system) : 0;
    double per_request = cpu / 1e3 / finished;
    qsort(latencies, finished, sizeof *latencies, ascending);
    printf("{\"wall\": %.4f, \"rate\": %.0f, \"p99\": %.1f, \"cpu\": %.4f,"
           " \"user\": %.4f, \"system\": %.4f}\n",
           elapsed / 1e3 / finished, finished / elapsed * 1e9,
           latencies[finished * 99 / 100], per_request, per_request * share,
           per_request * (1 - share));
    return 0;
}
