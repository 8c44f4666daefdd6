"""Who uses the servers of examples/ and of the documentation.

What is called a server or a program here has a method `connect`.
"""

import contextlib
import socket
import struct


def reset(sock, data=b""):
    """Close the connection so that the peer gets ECONNRESET."""
    if data:
        sock.sendall(data)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_all(sock):
    return b"".join(iter(lambda: sock.recv(65536), b""))


class ChatClient:
    """A client of a chat: knows lines; says its name, if it has one."""

    def __init__(self, server, name=None):
        self.sock = server.connect()
        self.file = self.sock.makefile("rb")
        assert self.read() == "* your name?"
        if name is not None:
            assert self.enter(name).startswith(f"* hello {name}, here: ")

    def enter(self, name):
        self.write(name)
        return self.read()

    def read(self):
        """The next line, or "" at the end."""
        return self.file.readline().decode().rstrip("\n")

    def write(self, *lines):
        self.sock.sendall("".join(f"{line}\n" for line in lines).encode())

    def reset(self):
        self.file.close()
        reset(self.sock)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.sock.close()


def assert_all_hear_each_other(server, count=50):
    with contextlib.ExitStack() as stack:
        guests = []
        for number in range(count):
            guests.append(stack.enter_context(ChatClient(server, f"guest {number}")))
            for guest in guests[:-1]:
                assert guest.read() == f"* guest {number} came"
        for number, guest in enumerate(guests):
            guest.write(str(number))
            for other in guests[:number] + guests[number + 1 :]:
                assert other.read() == f"guest {number}: {number}"
