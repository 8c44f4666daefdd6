"""A process supervisor: runs commands, shows their output, restarts them.

python examples/supervisor.py 'ping -n localhost' 'tail -f /var/log/syslog'

SIGINT or SIGTERM stops it: the commands get SIGTERM, and later SIGKILL if necessary.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time

import ioloop

READ_SIZE = 65536
MAX_LINE = 65536
FIRST_DELAY, LAST_DELAY = 0.5, 30.0


class Output:
    """The output of one run, shown line by line; its pipe may outlive the process."""

    def __init__(self, loop, name, pipe):
        self.loop = loop
        self.name = name
        self.pipe = pipe
        self.partial = b""
        os.set_blocking(pipe.fileno(), False)
        loop.add_handler(pipe, self.on_ready, loop.READ)

    def on_ready(self, pipe, events):
        # One read each time, so that no command can monopolise the loop.
        self.read()

    def drain(self):
        """Show what can be read now, when the supervisor ends."""
        while not self.pipe.closed and self.read():
            pass

    def read(self):
        data = self.pipe.read(READ_SIZE)
        if data is None:
            return data
        *lines, self.partial = (self.partial + data).split(b"\n")
        if self.partial and (not data or len(self.partial) > MAX_LINE):
            lines.append(self.partial)
            self.partial = b""
        show(self.name, *lines)
        if not data:
            self.loop.remove_handler(self.pipe)
            self.pipe.close()
        return data


class Child:
    """One command, run again and again."""

    def __init__(self, supervisor, name, command):
        self.supervisor = supervisor
        self.loop = supervisor.loop
        self.name = name
        self.command = command
        self.process = None
        self.output = None
        self.timeout = None
        self.delay = FIRST_DELAY

    def start(self):
        self.timeout = None
        self.started = time.monotonic()
        try:
            self.process = subprocess.Popen(
                self.command,
                bufsize=0,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # A process group of its own: signals also reach what the command
                # starts, and Ctrl-C in the terminal reaches only the supervisor.
                start_new_session=True,
            )
        except OSError as error:
            self.on_exit(f"can't be started: {error.strerror}", failed=True)
            return
        self.output = Output(self.loop, self.name, self.process.stdout)
        show(self.name, b"* started, pid %d" % self.process.pid)

    def reap(self):
        status = self.process and self.process.poll()
        if status is None:
            return
        self.process = None
        if status < 0:
            ending = f"killed by {signal.Signals(-status).name}"
        else:
            ending = f"exited with {status}"
        self.on_exit(ending, failed=status != 0)

    def on_exit(self, ending, failed):
        show(self.name, b"* " + ending.encode())
        if not self.supervisor.restarts(failed):
            self.loop.add_callback(self.supervisor.check)
            return
        if time.monotonic() - self.started > LAST_DELAY:
            self.delay = FIRST_DELAY
        self.timeout = self.loop.call_later(self.delay, self.start)
        self.delay = min(2 * self.delay, LAST_DELAY)

    def signal(self, number):
        if self.timeout is not None:
            self.timeout.cancel()
            self.timeout = None
        if self.process:
            os.killpg(self.process.pid, number)


class Supervisor:
    """Stops its loop when no command is running or due to run again."""

    def __init__(self, loop, commands, restart, grace):
        self.loop = loop
        self.restart = restart
        self.grace = grace
        self.stopping = False
        self.children = [
            Child(self, f"{number} {os.path.basename(command[0])}", command)
            for number, command in enumerate(commands)
        ]

    def start(self):
        for child in self.children:
            child.start()

    def restarts(self, failed):
        wanted = ("always", "failed") if failed else ("always",)
        return not self.stopping and self.restart in wanted

    def reap(self):
        for child in self.children:
            child.reap()

    def check(self):
        if not any(child.process or child.timeout for child in self.children):
            self.loop.stop()

    def stop(self):
        """Ask all commands to end, and kill them when their time is up."""
        if self.stopping:
            return
        self.stopping = True
        self.loop.call_later(self.grace, self.signal, signal.SIGKILL)
        self.signal(signal.SIGTERM)
        self.check()

    def signal(self, number):
        for child in self.children:
            child.signal(number)

    def drain(self):
        for child in self.children:
            if child.output:
                child.output.drain()


def show(name, *lines):
    for line in lines:
        sys.stdout.buffer.write(b"%s | %s\n" % (name.encode(), line))
    sys.stdout.buffer.flush()


def main():
    parser = argparse.ArgumentParser(description="A process supervisor.")
    parser.add_argument("commands", nargs="+", type=shlex.split, metavar="COMMAND")
    parser.add_argument(
        "--restart", choices=["always", "failed", "never"], default="always"
    )
    parser.add_argument("--grace", type=float, default=5, help="seconds to SIGKILL")
    options = parser.parse_args()

    with ioloop.IOLoop() as loop:
        supervisor = Supervisor(loop, options.commands, options.restart, options.grace)

        def on_signal(number, frame):
            ended = number == signal.SIGCHLD
            loop.add_callback_from_signal(supervisor.reap if ended else supervisor.stop)

        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        loop.add_callback(supervisor.start)
        loop.start()
        supervisor.drain()


if __name__ == "__main__":
    main()
