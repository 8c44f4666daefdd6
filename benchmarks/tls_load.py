"""The load on a TLS echo server, on blocking sockets: load.c with TLS.

    tls_load.py CORE PORT SERVER_PID SIZE CONNECTIONS SECONDS

Sends a request on each connection and then receives the answers, again and again.
"""

import json
import os
import socket
import ssl
import sys
import time


def connect(port):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client = socket.create_connection(("127.0.0.1", port))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(client)


def drive(clients, request, seconds):
    """The requests that were answered in that time, or a little more."""
    answer, finished = memoryview(bytearray(len(request))), 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for client in clients:
            client.sendall(request)
        for client in clients:
            received = 0
            while received < len(request):
                count = client.recv_into(answer[received:])
                if not count:
                    sys.exit("connection lost")
                received += count
            if answer != request:
                sys.exit("a wrong byte came back")
        finished += len(clients)
    return finished


def used(server):
    """The server's CPU time, exactly, and what of it the clock's ticks call user's."""
    with open(f"/proc/{server}/stat") as stat:
        user, system = map(int, stat.read().rpartition(")")[2].split()[11:13])
    clock = ~server << 3 | 2  # as clock_getcpuclockid() has it on Linux
    return time.clock_gettime_ns(clock), user, system


def main(core, port, server, size, connections, seconds):
    os.sched_setaffinity(0, {core})
    request = os.urandom(size)
    clients = [connect(port) for _ in range(connections)]
    drive(clients, request, seconds / 10)
    before, start = used(server), time.monotonic_ns()
    finished = drive(clients, request, seconds)
    elapsed = time.monotonic_ns() - start
    cpu, user, system = (b - a for a, b in zip(before, used(server), strict=True))
    per_request = cpu / 1e3 / finished
    share = user / (user + system or 1)
    figures = {
        "wall": elapsed / 1e3 / finished,
        "cpu": per_request,
        "user": per_request * share,
        "system": per_request * (1 - share),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:6]), float(sys.argv[6]))
