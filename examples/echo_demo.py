"""Start the echo server, drive it, and print what was sent and how fast.

The client uses plain sockets, not ioloop:

1. one connection sends a line and receives it again;
2. one connection sends small messages, waiting for each echo;
3. many connections send random bytes at the same time and compare every byte.

python examples/echo_demo.py --connections 1000
"""

import argparse
import contextlib
import pathlib
import random
import resource
import selectors
import socket
import subprocess
import sys
import time

SERVER = pathlib.Path(__file__).with_name("echo_server.py")
RECV_SIZE = 65536


@contextlib.contextmanager
def running_server():
    """Run the echo server on a free port; yield its address."""
    command = [sys.executable, SERVER, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            if not line:
                raise SystemExit("the echo server did not start")
            host, port = line.split()[-1].rsplit(":", 1)
            yield host, int(port)
        finally:
            server.terminate()


def receive_exactly(sock, size):
    received = b""
    while len(received) < size:
        data = sock.recv(size - len(received))
        if not data:
            raise SystemExit("the connection ended early")
        received += data
    return received


def say(address, text):
    with socket.create_connection(address) as sock:
        print(f"sent     {text!r}")
        sock.sendall(text)
        print(f"received {receive_exactly(sock, len(text))!r}")


def ping(address, messages, size=64):
    """Send small messages one by one; return the time that each echo took."""
    times = []
    with socket.create_connection(address) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(messages):
            message = number.to_bytes(8, "big") * (size // 8)
            start = time.perf_counter()
            sock.sendall(message)
            if receive_exactly(sock, size) != message:
                raise SystemExit(f"message {number} came back changed")
            times.append(time.perf_counter() - start)
    return times


class Stream:
    """A client that sends and receives at the same time, then shuts down sending."""

    def __init__(self, address, data):
        self.data = memoryview(data)
        self.sent = self.received = 0
        self.sock = socket.create_connection(address)
        self.sock.setblocking(False)

    def on_ready(self, events):
        """Return False once all bytes and the end of file have come back, else True."""
        try:
            if events & selectors.EVENT_WRITE:
                self.send()
            if events & selectors.EVENT_READ:
                return self.receive()
        except BlockingIOError:
            pass
        return True

    def send(self):
        self.sent += self.sock.send(self.data[self.sent : self.sent + RECV_SIZE])
        if self.sent == len(self.data):
            self.sock.shutdown(socket.SHUT_WR)

    def receive(self):
        data = self.sock.recv(RECV_SIZE)
        if data != self.data[self.received : self.received + len(data)]:
            raise SystemExit("a byte came back changed")
        self.received += len(data)
        if not data and self.received < len(self.data):
            raise SystemExit(f"{len(self.data) - self.received} bytes lost")
        return bool(data)

    def wanted(self):
        writing = self.sent < len(self.data)
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)


def stream(address, connections, size):
    """Send `size` random bytes on each of many connections; return the seconds."""
    noise = random.randbytes(size + connections)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for number in range(connections):
            # Each sends other bytes, so that a mix-up of connections is noticed.
            client = Stream(address, noise[number : number + size])
            stack.enter_context(client.sock)
            selector.register(client.sock, client.wanted(), client)
        while selector.get_map():
            ready = selector.select(timeout=30)
            if not ready:
                raise SystemExit("the echo server fell silent")
            for key, events in ready:
                client = key.data
                if not client.on_ready(events):
                    selector.unregister(client.sock)
                elif client.wanted() != key.events:
                    selector.modify(client.sock, client.wanted(), client)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description="Drive the echo server.")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--size", type=int, default=65536, help="bytes of each")
    parser.add_argument("--messages", type=int, default=10_000)
    options = parser.parse_args()

    # Allow enough descriptors here and in the server, which inherits the limit.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(soft, options.connections + 64)
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

    with running_server() as address:
        print("echo server at {}:{}".format(*address))
        say(address, b"hello, ioloop\n")

        times = sorted(ping(address, options.messages))
        print(
            f"{len(times):,} messages of 64 bytes, one after the other: "
            f"{len(times) / sum(times):,.0f} a second, "
            f"{times[len(times) // 2] * 1e6:.0f} us median, "
            f"{times[len(times) * 99 // 100] * 1e6:.0f} us 99th percentile"
        )

        seconds = stream(address, options.connections, options.size)
        total = options.connections * options.size
        print(
            f"{options.connections:,} connections at once: {total:,} bytes sent, "
            f"{total:,} received, none lost or changed, in {seconds:.2f} s "
            f"({total / seconds / 1e6:,.0f} MB/s each way)"
        )


if __name__ == "__main__":
    main()
