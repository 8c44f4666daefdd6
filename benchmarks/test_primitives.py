"""ioloop's own primitives under pytest-benchmark: what to run while making it faster.

`pytest benchmarks/test_primitives.py` prints statistics; with `--benchmark-disable`
it only shows that everything runs.
"""

import os

import pytest

pytest.importorskip("pytest_benchmark")
ioloop = pytest.importorskip("ioloop")

COUNT = 1000


def nothing(*args):
    pass


@pytest.fixture
def loop():
    with ioloop.IOLoop() as loop:
        yield loop


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_construct_and_close(benchmark):
    benchmark(lambda: ioloop.IOLoop().close())


def test_start_and_stop(benchmark, loop):
    def start():
        loop.add_callback(loop.stop)
        loop.start()

    benchmark(start)


def test_run_once_with_nothing_to_do(benchmark, loop):
    benchmark(loop.run_once, 0)


def test_callbacks(benchmark, loop):
    def run():
        for _ in range(COUNT):
            loop.add_callback(nothing)
        loop.run_once(0)

    benchmark(run)


def test_callbacks_with_arguments(benchmark, loop):
    def run():
        for number in range(COUNT):
            loop.add_callback(nothing, number, key=number)
        loop.run_once(0)

    benchmark(run)


def test_callback_chain(benchmark, loop):
    def run():
        left = COUNT

        def step():
            nonlocal left
            left -= 1
            loop.add_callback(step if left else loop.stop)

        loop.add_callback(step)
        loop.start()

    benchmark(run)


def test_timeouts_cancelled(benchmark, loop):
    def run():
        timeouts = [loop.call_later(60 + i % 7, nothing) for i in range(COUNT)]
        for timeout in timeouts:
            timeout.cancel()

    benchmark(run)


def test_timeouts_fired(benchmark, loop):
    def run():
        for _ in range(COUNT):
            loop.call_later(0, nothing)
        loop.run_once(0)

    benchmark(run)


def test_add_timeout_by_the_clock(benchmark, loop):
    benchmark(lambda: loop.add_timeout(loop.time() + 60, nothing).cancel())


def test_handler_added_updated_removed(benchmark, loop, pipe):
    reader, _ = pipe

    def run():
        loop.add_handler(reader, nothing, loop.READ)
        loop.update_handler(reader, loop.READ | loop.WRITE)
        loop.remove_handler(reader)

    benchmark(run)


def test_event(benchmark, loop, pipe):
    reader, writer = pipe
    loop.add_handler(reader, lambda fd, events: os.read(fd, 1), loop.READ)

    def run():
        os.write(writer, b"e")
        loop.run_once(0)

    benchmark(run)


def test_coroutine_callback(benchmark, loop):
    async def nothing_at_once():
        pass

    def run():
        loop.add_callback(nothing_at_once)
        loop.run_once(0)  # calls it
        loop.run_once(0)  # starts the coroutine

    benchmark(run)


def test_run_sync(benchmark, loop):
    async def answer():
        return 42

    assert benchmark(loop.run_sync, answer) == 42


def test_stats(benchmark, loop):
    benchmark(loop.stats)


@pytest.mark.parametrize("poller", ["_EPoll", "_Select"])
def test_event_on(benchmark, poller, pipe):
    reader, writer = pipe
    with ioloop.IOLoop(getattr(ioloop, poller)()) as loop:
        loop.add_handler(reader, lambda fd, events: os.read(fd, 1), loop.READ)

        def run():
            os.write(writer, b"e")
            loop.run_once(0)

        benchmark(run)
