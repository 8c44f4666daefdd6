"""The example in the documentation of Tornado's IOLoop, in today's Python.

In its use of the loop only the import has changed, from `from tornado import ioloop`.

python examples/seed.py --port 8888
"""

import argparse
import errno
import functools
import socket

import ioloop


def handle_connection(connection, address):
    connection.send(b"hello, %s\n" % address[0].encode())
    connection.close()


def connection_ready(sock, fd, events):
    while True:
        try:
            connection, address = sock.accept()
        except OSError as e:
            if e.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise
            return
        connection.setblocking(False)
        handle_connection(connection, address)


def main():
    parser = argparse.ArgumentParser(description="Greets whoever connects.")
    parser.add_argument("--port", type=int, default=8888, help="0: any free port")
    port = parser.parse_args().port

    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", port))
    sock.listen(128)
    print("listening on {}:{}".format(*sock.getsockname()), flush=True)

    io_loop = ioloop.IOLoop.instance()
    callback = functools.partial(connection_ready, sock)
    io_loop.add_handler(sock.fileno(), callback, io_loop.READ)
    try:
        io_loop.start()
    except KeyboardInterrupt:
        io_loop.close(all_fds=True)


if __name__ == "__main__":
    main()
