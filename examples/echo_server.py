"""A TCP echo server: sends every byte back to the client that it came from.

python examples/echo_server.py --port 8888
"""

import argparse
import errno
import signal
import socket

import ioloop

# Larger is not faster: beyond 128 KiB, malloc maps and unmaps memory for each recv().
RECV_SIZE = 65536

# Stop reading from a client while this much waits to be sent back to it.
MAX_UNSENT = 256 * 1024


class Connection:
    """One client, until it has received all its bytes again, or until an error."""

    def __init__(self, loop, sock):
        self.loop = loop
        self.sock = sock
        self.unsent = bytearray()
        self.ended = False
        self.events = loop.READ
        loop.add_handler(sock, self.on_ready, self.events)

    def on_ready(self, sock, events):
        try:
            if events & self.loop.READ:
                self.receive()
            if self.unsent:
                self.send()
        except BlockingIOError:
            pass
        except OSError:
            # The client reset the connection, which is not worth a log message.
            self.close()
            return
        self.watch()

    def receive(self):
        data = self.sock.recv(RECV_SIZE)
        self.ended = not data
        self.unsent += data

    def send(self):
        sent = self.sock.send(self.unsent)
        del self.unsent[:sent]

    def watch(self):
        """Watch for whatever can be done next; close if there is nothing left to do."""
        events = self.loop.NONE
        if self.unsent:
            events |= self.loop.WRITE
        if not self.ended and len(self.unsent) < MAX_UNSENT:
            events |= self.loop.READ
        if not events:
            self.close()
        elif events != self.events:
            self.loop.update_handler(self.sock, events)
            self.events = events

    def close(self):
        self.loop.remove_handler(self.sock)
        self.sock.close()


def listen(host, port, backlog=1024):
    """Return a non-blocking listening socket; port 0 lets the kernel choose one."""
    sock = socket.create_server((host, port), backlog=backlog)
    sock.setblocking(False)
    return sock


def serve(loop, listener, connection=Connection):
    """Call `connection(loop, sock)` for every client that `listener` accepts."""

    def on_client(listener, events):
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                # Without a free descriptor, the client stays in the queue and the
                # listener stays ready: don't watch it for a while.
                loop.update_handler(listener, loop.NONE)
                loop.call_later(0.1, loop.update_handler, listener, loop.READ)
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection(loop, sock)

    loop.add_handler(listener, on_client, loop.READ)


def main():
    parser = argparse.ArgumentParser(description="A TCP echo server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8888, help="0: any free port")
    options = parser.parse_args()

    loop = ioloop.IOLoop.instance()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.add_callback_from_signal(loop.stop))
    with listen(options.host, options.port) as listener:
        serve(loop, listener)
        print("listening on {}:{}".format(*listener.getsockname()[:2]), flush=True)
        loop.start()
        loop.close(all_fds=True)


if __name__ == "__main__":
    main()
