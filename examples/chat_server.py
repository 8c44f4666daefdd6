"""A chat server: each line that a client types is sent to all the others.

A client's first line is its name. A client that is idle for too long is disconnected.

python examples/chat_server.py --port 8889, then: nc 127.0.0.1 8889
"""

import argparse
import signal

from echo_server import RECV_SIZE, listen, serve

import ioloop

MAX_LINE = 4096

# A client that reads too slowly is disconnected when this much waits for it: the lines
# can't be kept for ever, and the other clients must not be held up.
MAX_UNSENT = 256 * 1024


class Room:
    """The guests in the chat, by name."""

    def __init__(self, loop, idle_seconds):
        self.loop = loop
        self.idle_seconds = idle_seconds
        self.guests = {}

    def connect(self, loop, sock):
        Guest(self, sock)

    def enter(self, guest, name):
        if not name or name in self.guests:
            guest.write(f"* {name or 'that'} is not free, choose another name")
            return
        names = ", ".join(self.guests) or "nobody else"
        guest.name = name
        guest.write(f"* hello {name}, here: {names}")
        self.say(f"* {name} came")
        self.guests[name] = guest

    def leave(self, guest, why):
        if self.guests.pop(guest.name, None):
            self.say(f"* {guest.name} left ({why})")

    def say(self, line, by=None):
        for guest in list(self.guests.values()):
            if guest is not by:
                guest.write(line)


class Guest:
    """One client; it has no name until its first line."""

    def __init__(self, room, sock):
        self.room = room
        self.loop = room.loop
        self.sock = sock
        self.name = None
        self.unread = bytearray()
        self.unsent = bytearray()
        self.timeout = None
        self.loop.add_handler(sock, self.on_ready, self.loop.READ)
        self.rest()
        self.write("* your name?")

    def rest(self):
        """Restart the idle timeout."""
        if self.timeout is not None:
            self.timeout.cancel()
        self.timeout = self.loop.call_later(
            self.room.idle_seconds, self.close, "idle for too long"
        )

    def on_ready(self, sock, events):
        try:
            if events & self.loop.WRITE:
                self.flush()
            if events & ~self.loop.WRITE:
                self.receive()
        except BlockingIOError:
            pass
        except OSError as error:
            self.close(error.strerror)

    def receive(self):
        data = self.sock.recv(RECV_SIZE)
        if not data:
            self.close("bye")
            return
        self.rest()
        self.unread += data
        *lines, self.unread = self.unread.split(b"\n")
        for line in lines:
            self.on_line(line.decode(errors="replace").strip())
        if len(self.unread) > MAX_LINE:
            self.close("that line was too long")

    def on_line(self, line):
        if self.name is None:
            self.room.enter(self, line)
        elif line:
            self.room.say(f"{self.name}: {line}", by=self)

    def write(self, line):
        if self.closed:
            return
        if not self.unsent:
            self.loop.update_handler(self.sock, self.loop.READ | self.loop.WRITE)
        self.unsent += line.encode() + b"\n"
        if len(self.unsent) > MAX_UNSENT:
            # Not now: close() writes to the others, which may have to be closed too.
            self.loop.add_callback(self.close, "did not read")

    def flush(self):
        sent = self.sock.send(self.unsent)
        del self.unsent[:sent]
        if not self.unsent:
            self.loop.update_handler(self.sock, self.loop.READ)

    @property
    def closed(self):
        return self.sock.fileno() < 0

    def close(self, why):
        if self.closed:
            return
        self.timeout.cancel()
        self.loop.remove_handler(self.sock)
        self.sock.close()
        self.room.leave(self, why)


def main():
    parser = argparse.ArgumentParser(description="A line chat.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8889, help="0: any free port")
    parser.add_argument("--idle", type=float, default=600, help="seconds")
    options = parser.parse_args()

    loop = ioloop.IOLoop.instance()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.add_callback_from_signal(loop.stop))
    with listen(options.host, options.port) as listener:
        serve(loop, listener, Room(loop, options.idle).connect)
        print("listening on {}:{}".format(*listener.getsockname()[:2]), flush=True)
        loop.start()
        loop.close(all_fds=True)


if __name__ == "__main__":
    main()
