"""A TCP echo server whose work is done in C: see _c_echo.pyx.

python -m c_echo --port 8888 --idle 60
"""

import argparse
import signal
import socket

from _c_echo import Server

import ioloop


def main():
    parser = argparse.ArgumentParser(description="A TCP echo server in Cython.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8888, help="0: any free port")
    parser.add_argument(
        "--idle",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="close a client that neither sends nor reads for so long",
    )
    options = parser.parse_args()

    loop = ioloop.IOLoop.instance()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.add_callback_from_signal(loop.stop))
    with socket.create_server((options.host, options.port), backlog=1024) as listener:
        listener.setblocking(False)
        server = Server(loop, listener.fileno(), options.idle)
        print("listening on {}:{}".format(*listener.getsockname()[:2]), flush=True)
        loop.start()
        server.close()
        loop.close()


if __name__ == "__main__":
    main()
