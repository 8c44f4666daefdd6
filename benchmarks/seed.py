"""The ancestor: the loop design of Tornado 1.2-2.0, written anew in plain Python 3.

What made it what it was is kept: a list of callbacks taken as a batch, a heap of
timeouts whose cancelled entries stay until they are due, a poll of 0.2 s at most,
a pipe written whenever the list of callbacks was empty, a dict of handlers and one
of events not yet delivered, and every callable wrapped to keep its context.
"""

import contextvars
import functools
import heapq
import logging
import os
import select
import time

log = logging.getLogger(__name__)

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
ERROR = select.EPOLLERR | select.EPOLLHUP

LONGEST_NAP = 0.2


def in_this_context(fn):
    """What stack contexts did, in terms of today's context variables."""
    return functools.partial(contextvars.copy_context().run, fn)


class Alarm:
    __slots__ = ("due", "fn")

    def __init__(self, due, fn):
        self.due = due
        self.fn = fn

    def __lt__(self, other):
        if self.due != other.due:
            return self.due < other.due
        return id(self) < id(other)


class IOLoop:
    def __init__(self):
        self._epoll = select.epoll()
        self._watched = {}
        self._undelivered = {}
        self._queue = []
        self._alarms = []
        self._leaving = False
        self._doorbell, self._button = os.pipe()
        for end in (self._doorbell, self._button):
            os.set_blocking(end, False)
        self.add_handler(self._doorbell, self._answer, READ)

    def close(self):
        self._epoll.close()
        os.close(self._doorbell)
        os.close(self._button)

    def add_handler(self, fd, handler, events):
        self._watched[fd] = in_this_context(handler)
        self._epoll.register(fd, events | ERROR)

    def update_handler(self, fd, events):
        self._epoll.modify(fd, events | ERROR)

    def remove_handler(self, fd):
        for known in (self._watched, self._undelivered):
            known.pop(fd, None)
        try:
            self._epoll.unregister(fd)
        except OSError:
            log.debug("fd %d was not registered", fd)

    def add_callback(self, callback):
        first = not self._queue
        self._queue.append(in_this_context(callback))
        if first:
            self._ring()

    def add_timeout(self, deadline, callback):
        alarm = Alarm(deadline, in_this_context(callback))
        heapq.heappush(self._alarms, alarm)
        return alarm

    def remove_timeout(self, alarm):
        alarm.fn = None

    def stop(self):
        self._leaving = True
        self._ring()

    def start(self):
        while not self._leaving:
            batch, self._queue = self._queue, []
            for fn in batch:
                self._attempt(fn)
            nap = self._run_alarms() if self._alarms else LONGEST_NAP
            if self._leaving:
                break
            for fd, events in self._epoll.poll(0 if self._queue else nap):
                self._undelivered[fd] = events
            self._deliver()
        self._leaving = False

    def _run_alarms(self):
        """Run what is due; answer for how long the loop may sleep then."""
        alarms, now = self._alarms, time.time()
        while alarms and (alarms[0].fn is None or alarms[0].due <= now):
            fn = heapq.heappop(alarms).fn
            if fn is not None:
                self._attempt(fn)
        return min(LONGEST_NAP, alarms[0].due - now) if alarms else LONGEST_NAP

    def _deliver(self):
        waiting = self._undelivered
        while waiting:
            fd, events = waiting.popitem()
            try:
                self._watched[fd](fd, events)
            except BrokenPipeError:
                log.debug("the peer of fd %d has gone", fd)
            except Exception:
                log.exception("Exception in the handler of fd %d", fd)

    def _attempt(self, fn):
        try:
            fn()
        except Exception:
            log.exception("Exception in callback %r", fn)

    def _ring(self):
        try:
            os.write(self._button, b"!")
        except BlockingIOError:
            log.debug("the doorbell is ringing already")

    def _answer(self, fd, events):
        try:
            while os.read(fd, 4096):
                continue
        except BlockingIOError:
            return
