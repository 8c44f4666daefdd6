"""A ZeroMQ socket (pyzmq) on an ioloop, and a demonstration that nothing stalls.

A ZeroMQ socket has a file descriptor to watch, and here is the trap: it becomes
readable not because there is a message to receive, but because something has changed,
and any use of the socket resets it.  The true state is in EVENTS.  So after a wake-up,
receive and send what you can and then look at EVENTS, until there is nothing left to
do.  The next change makes the descriptor readable again.

python examples/zmq_adapter.py --messages 100000 --transport inproc
"""

import argparse
import collections
import time

import zmq

import ioloop

# Messages per callback, so that the loop's other handlers get their turn.
BATCH = 100


class Stream:
    """Sends messages, and calls `on_message(parts)` for each that arrives.

    For the loop's thread only, like the socket itself.
    """

    def __init__(self, loop, socket, on_message=None):
        self.loop = loop
        self.socket = socket
        self.on_message = on_message
        self.unsent = collections.deque()
        self.scheduled = False
        self.fd = socket.FD
        loop.add_handler(self.fd, self._on_news, loop.READ)
        # The descriptor may have been reset already, so look at EVENTS once.
        self._go_on_later()

    def send(self, *parts):
        """Send a message, now or when ZeroMQ has room for it."""
        self.unsent.append(parts)
        self._go_on_later()

    def close(self):
        """Stop watching, then close; drop messages that ZeroMQ has not accepted yet."""
        if not self.socket.closed:
            self.loop.remove_handler(self.fd)
            self.socket.close()

    def _on_news(self, fd, events):
        self._go_on()

    def _go_on_later(self):
        if not self.scheduled:
            self.scheduled = True
            self.loop.add_callback(self._go_on)

    def _go_on(self):
        self.scheduled = False
        try:
            self._receive()
            self._send()
        finally:
            # After all other use of the socket, since that resets the descriptor.
            if self._is_ready():
                self._go_on_later()

    def _receive(self):
        if self.on_message is None:
            return
        for _ in range(BATCH):
            if self.socket.closed:
                return
            try:
                parts = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self.on_message(parts)

    def _send(self):
        for _ in range(BATCH):
            if self.socket.closed or not self.unsent:
                return
            try:
                self.socket.send_multipart(self.unsent[0], zmq.DONTWAIT)
            except zmq.Again:
                return
            self.unsent.popleft()

    def _is_ready(self):
        """Return whether there is something to do; else the descriptor will tell."""
        if self.socket.closed:
            return False
        events = self.socket.EVENTS
        can_receive = self.on_message is not None and events & zmq.POLLIN
        can_send = self.unsent and events & zmq.POLLOUT
        return bool(can_receive or can_send)


class Counter:
    """Checks that numbered messages arrive in order."""

    def __init__(self, expected, on_last):
        self.expected = expected
        self.on_last = on_last
        self.received = 0

    def __call__(self, parts):
        if int(parts[0]) != self.received:
            raise ValueError(f"message {self.received} is missing")
        self.received += 1
        if self.received == self.expected:
            self.on_last()


def connected(context, transport):
    """Return a PUSH socket and the PULL socket that is connected to it."""
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    if transport == "tcp":
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        push.connect(f"tcp://127.0.0.1:{port}")
    else:
        name = f"inproc://{id(pull)}"
        pull.bind(name)
        push.connect(name)
    return push, pull


def main():
    parser = argparse.ArgumentParser(description="Messages in both directions.")
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--transport", choices=["inproc", "tcp"], default="tcp")
    arguments = parser.parse_args()

    def one_way_done():
        ways_left.pop()
        if not ways_left:
            loop.stop()

    ways_left = ["there", "back"]
    streams = []
    with zmq.Context() as context, ioloop.IOLoop() as loop:
        for _ in list(ways_left):
            push, pull = connected(context, arguments.transport)
            counter = Counter(arguments.messages, one_way_done)
            streams += [Stream(loop, push), Stream(loop, pull, counter)]
            for number in range(arguments.messages):
                streams[-2].send(b"%d" % number)
        start = time.perf_counter()
        loop.start()
        seconds = time.perf_counter() - start
        for stream in streams:
            stream.close()
    total = 2 * arguments.messages
    print(f"{total} messages in {seconds:.2f} s, {total / seconds:.0f} a second")


if __name__ == "__main__":
    main()
