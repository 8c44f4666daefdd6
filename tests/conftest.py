"""Fixtures of the whole suite: the pollers, the loops, and what must be left behind."""

import asyncio
import contextlib
import faulthandler
import functools
import gc
import logging
import os
import re
import shutil
import signal
import stat
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

HERE = Path(__file__).parent
LINUX = sys.platform == "linux"
# Test modules are imported by path (importlib mode), what they share by name.
sys.path.insert(0, str(HERE))

import building  # noqa: E402
import covered  # noqa: E402
import processes  # noqa: E402

import ioloop  # noqa: E402

# The file that names the test which runs; it outlives a process that does not end well.
CURRENT_TEST = os.environ.get("IOLOOP_CURRENT_TEST")
HANG_SECONDS = float(os.environ.get("IOLOOP_TEST_TIMEOUT", "60"))


if os.environ.get("IOLOOP_COVERAGE", "0") != "0":
    covered.count_before_exit()


# -- The hang guard: stacks of all threads on the real stderr, then exit ------


def pytest_configure(config):
    config.ioloop_stderr = os.dup(2)
    # From the first thread on, glibc handles a signal of its own.
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def pytest_unconfigure(config):
    os.close(config.ioloop_stderr)
    if CURRENT_TEST:
        Path(CURRENT_TEST).unlink(missing_ok=True)


def pytest_runtest_logstart(nodeid):
    if CURRENT_TEST:
        Path(CURRENT_TEST).write_text(nodeid)


# -- Which tests ---------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption(
        "--row",
        action="append",
        default=[],
        metavar="A17",
        help="only tests of this row of tests/README.md (may be given several times)",
    )
    parser.addoption(
        "--part", type=int, choices=[1, 2], help="only every second test (see parts.py)"
    )


@pytest.hookimpl(trylast=True)  # of what -m and -k leave
def pytest_collection_modifyitems(config, items):
    chosen = list(items)
    if wanted := set(config.getoption("row")):
        chosen = [
            item
            for item in items
            if any(wanted & set(mark.args) for mark in item.iter_markers("row"))
        ]
    if part := config.getoption("part"):
        chosen = chosen[part - 1 :: 2]
    if len(chosen) < len(items):
        kept = set(chosen)
        config.hook.pytest_deselected(items=[i for i in items if i not in kept])
        items[:] = chosen


# -- Pollers ------------------------------------------------------------------


class Poller:
    """One of the module's pollers and the build of the module that has it."""

    def __init__(self, name, module):
        self.name = name
        self.module = module
        self.impl = {
            "epoll": module._EPoll,
            "select": module._Select,
            "kqueue": module._KQueue,
        }[name]

    def __repr__(self):
        return f"<{self.name}>"

    def run(self, code, **options):
        """Run `code` in a new process that has `ioloop` and `impl` (the class)."""
        prelude = (
            "import importlib.machinery, importlib.util, sys\n"
            "import ioloop\n"
            f"path = {self.module.__file__!r}\n"
            "if path != ioloop.__file__:\n"
            "    spec = importlib.util.spec_from_file_location(\n"
            f"        {self.module.__name__!r}, path,\n"
            "        loader=importlib.machinery.ExtensionFileLoader(\n"
            f"            {self.module.__name__!r}, path))\n"
            "    ioloop = importlib.util.module_from_spec(spec)\n"
            "    spec.loader.exec_module(ioloop)\n"
            f"impl = ioloop.{self.impl.__name__}\n"
        )
        return processes.run_python(code, prelude=prelude, **options)


@pytest.fixture(scope="session")
def fake_kqueue():
    """The module built with the fake kqueue, as a module object of its own."""
    name = "fakekq.ioloop"
    sys.modules[name] = building.load(building.fake_kqueue(), name)
    return sys.modules[name]


@pytest.fixture(scope="session", autouse=True)
def compiled(request):
    """Compile before the first test, whose hang guard knows no compiler."""
    if LINUX and any("kqueue" in item.nodeid for item in request.session.items):
        request.getfixturevalue("fake_kqueue")


@pytest.fixture(params=["epoll", "select", "kqueue"])
def poller(request):
    """Each poller in turn."""
    if request.param == "epoll" and not LINUX:
        pytest.skip("Linux's alone")
    if request.param == "kqueue" and LINUX:
        return Poller("kqueue", request.getfixturevalue("fake_kqueue"))
    return Poller(request.param, ioloop)


@pytest.fixture
def make_loop(poller):
    """Make loops on `poller` (keywords: of the constructor); they get closed."""
    with contextlib.ExitStack() as loops:

        def make(cls=None, **options):
            options.setdefault("impl", poller.impl())
            loop = (cls or poller.module.IOLoop)(**options)
            loops.callback(loop.close)
            return loop

        yield make


@pytest.fixture
def loop(make_loop):
    """A loop on `poller`."""
    return make_loop()


@pytest.fixture
def face(loop):
    """The other face of `loop`, an event loop of asyncio's."""
    return loop.asyncio_loop


@pytest.fixture
def stock():
    """A loop of asyncio's own."""
    loop = asyncio.SelectorEventLoop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def clients(tmp_path_factory):
    """`clients(module)`: cdoor_client, bound to that build of ioloop."""
    path = building.extension(building.HERE / "cdoor_client.pyx")
    loaded = {}

    def get(module):
        if module not in loaded:
            copy = tmp_path_factory.mktemp("client") / path.name
            shutil.copy(path, copy)
            with mock.patch.dict(sys.modules, ioloop=module):
                loaded[module] = building.load(copy)
        return loaded[module]

    get(ioloop)
    return get


@pytest.fixture
def client(poller, clients):
    return clients(poller.module)


@pytest.fixture
def warns_unclosed():
    """`with warns_unclosed():` a loop goes that nobody has closed.

    The abi3 build says nothing then: the limited API has no finalizers for a class.
    """
    if building.IS_ABI3:
        return contextlib.nullcontext
    return functools.partial(pytest.warns, ResourceWarning, match="unclosed IOLoop")


@pytest.fixture(scope="session")
def shim():
    """A library to preload, which sees the calls that wait and that set timers."""
    return str(building.compile_library(HERE / "shim.c"))


# -- What a test may not leave behind -----------------------------------------


class Records(list):
    """Log records of `ioloop` and `asyncio`; those not taken fail the test."""

    def take(self, pattern, exception=None):
        """Remove the oldest record, which must match; return it."""
        assert self, f"nothing logged, expected {pattern!r}"
        record = self.pop(0)
        message = record.getMessage()
        assert re.search(pattern, message), f"{pattern!r} is not in {message!r}"
        if exception is not None:
            assert record.exc_info and issubclass(record.exc_info[0], exception)
        return record

    def texts(self):
        return [logging.Formatter().format(record) for record in self]


class RecordsHandler(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = Records()
        self.seen = []

    def emit(self, record):
        self.records.append(record)
        self.seen.append(record)

    def let_go(self):
        """Let go of callbacks and tracebacks; pytest holds on to the records."""
        for record in self.seen:
            record.msg, record.args, record.exc_info = record.getMessage(), (), None
        self.seen.clear()


@pytest.fixture
def expect_log(clean):
    """`expect_log.take(pattern, exception=None)` takes what should be logged."""
    return clean


def open_files():
    """{fd: what it is}; the listing's own descriptor is gone when it is read."""
    files = {}
    for fd in map(int, os.listdir("/proc/self/fd" if LINUX else "/dev/fd")):
        with contextlib.suppress(OSError):
            if LINUX:
                files[fd] = os.readlink(f"/proc/self/fd/{fd}")
            else:
                files[fd] = stat.S_IFMT(os.fstat(fd).st_mode)
    return files


def signal_state():
    """Python's and the kernel's view of handlers, masks, timers and wakeup fd."""
    state = {number: signal.getsignal(number) for number in signal.valid_signals()}
    for which in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
        state["itimer", which] = signal.getitimer(which)
    state["wakeup fd"] = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(state["wakeup fd"])
    if not LINUX:
        return state
    with open("/proc/self/status") as status:
        state.update(line.split() for line in status if line.startswith("Sig"))
    del state["SigQ:"]
    with contextlib.suppress(OSError), open("/proc/self/timers") as timers:
        state["posix timers"] = timers.read()
    return state


def tasks():
    """The kernel's threads; a single listing may miss one while another one ends."""
    before, now = None, set()
    while LINUX and now != before:
        before, now = now, set(os.listdir("/proc/self/task"))
    return now


def threads_left(threads, before):
    """What runs that did not; a joined thread may need a moment to vanish."""
    deadline = time.monotonic() + 2
    while True:
        left = set(threading.enumerate()) - threads or tasks() - before
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.001)


def difference(before, after):
    return {
        key: (before.get(key), after.get(key))
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    }


def modules_under_test():
    found = (sys.modules.get(name) for name in ("ioloop", "fakekq.ioloop"))
    return [module for module in found if module is not None]


def loops_left():
    """Describe and close the loops that no test should have left registered."""
    for module in modules_under_test():
        current = module.IOLoop.current(instance=False)
        if current is not None:
            module.IOLoop.clear_current()
            yield f"{current!r} is still current"
        if module.IOLoop.initialized():
            module.IOLoop.instance().close()
            yield f"{module.__name__} still has its instance()"


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What tests and reports have left so far stays out of later collections too."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def clean(request):
    """After each test all is as before: files, signals, threads, log, loops."""
    if HANG_SECONDS:
        faulthandler.dump_traceback_later(
            HANG_SECONDS, exit=True, file=request.config.ioloop_stderr
        )
    handler = RecordsHandler()
    loggers = [logging.getLogger(name) for name in ("ioloop", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    files, signals = open_files(), signal_state()
    threads, ids = set(threading.enumerate()), tasks()
    try:
        yield handler.records
        complaints = [f"logged: {text}" for text in handler.records.texts()]
        handler.let_go()
        request.node.funcargs.clear()  # pytest would hold the loops
        complaints.extend(loops_left())
        gc.collect()
        # A failed test's traceback holds its loops: nothing to complain of.  Nor is
        # there on 3.13t, where a class is never collected once a thread has run.
        if not (getattr(request.node, "test_failed", False) or building.IS_3_13T):
            types = tuple(module.IOLoop for module in modules_under_test())
            alive = [o for o in gc.get_objects() if issubclass(type(o), types)]
            complaints.extend(f"not collectable: {o!r}" for o in alive)
            if alive:
                del alive
                gc.freeze()  # not to be reported again by the next test
        if left := threads_left(threads, ids):
            complaints.append(f"threads left: {left}")
        if changed := difference(files, open_files()):
            complaints.append(f"descriptors changed: {changed}")
        if changed := difference(signals, signal_state()):
            complaints.append(f"signal state changed: {changed}")
        if complaints:
            pytest.fail("\n".join(complaints), pytrace=False)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.test_failed = True
    return report


@pytest.fixture
def log():
    return []


@pytest.fixture
def counted_files():
    """A function: {fd: what it is} of the descriptors opened since."""
    before = open_files()

    def opened():
        now = open_files()
        return {fd: now[fd] for fd in now if now[fd] != before.get(fd)}

    return opened
