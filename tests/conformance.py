"""make conformance: CPython's own tests of asyncio, on ioloop's event loops.

Each module of tests is run twice, with asyncio's event loop and with ioloop's in its
place, in a process of its own.  A test that passes with asyncio's has to pass with
ioloop's.  Some tests depend on timing, so it may do so when it is run again.  Modules
that make no event loop are left out.

The tests are those of the interpreter that runs this program.  An argument is part of
the names of the modules to run; without any, all are.
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TIME_LIMIT = 60  # seconds in which some test has to begin or end
AT_ONCE = 2  # modules

HERE = Path(__file__).parent
LIBRARY = Path(os.__file__).parent
ASYNCIO = "test/test_asyncio/test_*.py"
OTHERS = [  # that make event loops; no version has all of these
    "test/test_asyncgen.py",
    "test/test_contextlib_async.py",
    "test/test_coroutines.py",
    "test/test_external_inspection.py",
    "test/test_unittest/test_async_case.py",
    "test/test_unittest/testmock/testasync.py",
    "unittest/test/test_async_case.py",
    "unittest/test/testmock/testasync.py",
]

# Tests that need not pass, and why.
SIGNALS = "test.test_asyncio.test_unix_events.SelectorEventLoopSignalTests."
EXCEPTIONS = dict.fromkeys(
    [
        SIGNALS + "test_add_signal_handler_install_error",
        SIGNALS + "test_add_signal_handler_install_error2",
        SIGNALS + "test_add_signal_handler_install_error3",
        SIGNALS + "test_add_signal_handler_setup_error",
    ],
    "it replaces the module that asyncio's own add_signal_handler() uses",
)

# Outcomes; any other is an error.
PASSED, SKIPPED = "passed", "skipped: "
NOT_ENDED, NOT_RUN = "did not end", "was not run"


# -- In a process that runs tests, and in all that it starts -------------------


def plug_in():
    """Let asyncio count the event loops that it makes, or have ioloop make them."""
    import asyncio
    import select
    import selectors

    import ioloop

    ioloop.new_event_loop().close()  # its class is derived from asyncio's own
    stock = asyncio.SelectorEventLoop
    pollers = {
        selectors.EpollSelector: ioloop._EPoll,
        selectors.PollSelector: select.epoll,  # as a poller of the program's own
        selectors.SelectSelector: ioloop._Select,
    }

    class Factory(type):
        def __call__(cls, selector=None):
            with open(os.environ["CONFORMANCE_COUNT"], "ab") as file:
                file.write(b".")
            if os.environ["CONFORMANCE_LOOP"] == "asyncio":
                return stock(selector)
            if selector is None:
                return ioloop.new_event_loop()
            selector.close()
            poller = pollers[type(selector)]()
            return ioloop.IOLoop(impl=poller, make_current=False).asyncio_loop

        def __instancecheck__(cls, instance):
            return isinstance(instance, stock)

    class SelectorEventLoop(metaclass=Factory):
        pass

    for module in asyncio, asyncio.unix_events:
        for name, value in list(vars(module).items()):
            if value is stock:
                setattr(module, name, SelectorEventLoop)
    policy = asyncio.unix_events._UnixDefaultEventLoopPolicy
    policy._loop_factory = SelectorEventLoop


class Result(unittest.TestResult):
    """Writes a line when a test begins, and for its outcome."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def write(self, test, outcome):
        print(json.dumps([test.id(), outcome]), file=self.file, flush=True)

    def startTest(self, test):
        super().startTest(test)
        self.write(test, NOT_ENDED)

    def stopTest(self, test):
        from test import support

        super().stopTest(test)
        if support.environment_altered:
            support.environment_altered = False
            self.write(test, "left threads or processes behind")

    def addSuccess(self, test):
        self.write(test, PASSED)

    def addExpectedFailure(self, test, error):
        self.write(test, PASSED)

    def addUnexpectedSuccess(self, test):
        self.write(test, "passed, and was expected to fail")

    def addSkip(self, test, reason):
        test = getattr(test, "test_case", test)  # in place of a subtest
        self.write(test, SKIPPED + reason)

    def addError(self, test, error):
        self.write(test, self._exc_info_to_string(error, test))

    addFailure = addError

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.addError(test, error)


def run_tests(module, results, only):
    """Run a module's tests, or only some, and write down the outcomes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
    try:
        suite = unittest.defaultTestLoader.loadTestsFromName(module)
    except unittest.SkipTest:
        return  # it is for another system
    if only:
        suite = unittest.TestSuite(t for t in tests_of(suite) if t.id() in only)
    with open(results, "w") as file:
        suite.run(Result(file))


def tests_of(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from tests_of(test)
        else:
            yield test


# -- In the process that compares ----------------------------------------------


class Run:
    """What came of a module's tests on one kind of loop, and how many were made."""

    def __init__(self, module, loop, only=()):
        with tempfile.TemporaryDirectory() as directory:
            self.run(module, loop, only, Path(directory))

    def run(self, module, loop, only, directory):
        results, count = directory / "results", directory / "count"
        results.touch(), count.touch()
        # Python imports this in each process, also in those that the tests start.
        plug = directory / "sitecustomize.py"
        plug.write_text("import conformance\nconformance.plug_in()\n")
        path = [str(directory), str(HERE), os.environ.get("PYTHONPATH", "")]
        with open(directory / "output", "w") as output:
            process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", __file__]
                + ["--run", module, results, *only],
                cwd=directory,
                env={
                    **os.environ,
                    "PYTHONPATH": ":".join(path),
                    "CONFORMANCE_COUNT": str(count),
                    "CONFORMANCE_LOOP": loop,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait(process, results)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the tests have left
        self.outcomes = dict(map(json.loads, results.read_text().splitlines()))
        self.loops = count.stat().st_size
        self.crash = None
        if process.returncode:
            output = (directory / "output").read_text(errors="replace")
            self.crash = f"ended with code {process.returncode}:\n{output[-8000:]}"

    def passed(self, test):
        return self.outcomes.get(test) == PASSED

    def counts(self):
        outcomes = list(self.outcomes.values())
        run = [outcome for outcome in outcomes if not outcome.startswith(SKIPPED)]
        return run.count(PASSED), len(run)


def wait(process, results):
    """Wait for a process while it writes results; if it hangs, end it."""
    size = -1
    while size < (size := results.stat().st_size):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TIME_LIMIT)
            return
    process.send_signal(signal.SIGABRT)  # it writes the stacks of all threads
    process.wait()


class Comparison:
    """A module's tests on asyncio's loop and on ioloop's, and what differs."""

    def __init__(self, module):
        self.module = module
        self.failures, self.notes = {}, []
        begun = time.monotonic()
        self.stock = self.ours = Run(module, "asyncio")
        if self.stock.crash:
            self.notes.append(f"{module} with asyncio's loop {self.stock.crash}")
        if self.stock.loops:
            self.ours = Run(module, "ioloop")
            self.compare()
        self.seconds = time.monotonic() - begun

    def compare(self):
        wrong = []
        # A class that could not be set up may be among the outcomes of ours only.
        for test in {**self.stock.outcomes, **self.ours.outcomes}:
            unknown = NOT_RUN if self.stock.crash else PASSED
            outcome = self.stock.outcomes.get(test, unknown)
            passed = self.ours.passed(test)
            if outcome.startswith(SKIPPED):
                continue
            if outcome != PASSED:
                self.notes.append(f"does not pass with asyncio's loop: {test}")
            elif test in EXCEPTIONS and passed:
                self.failures[test] = "passes, but is an exception"
            elif test in EXCEPTIONS:
                self.notes.append(f"need not pass, since {EXCEPTIONS[test]}: {test}")
            elif not passed:
                wrong.append(test)
        if wrong or (self.ours.crash and not self.stock.crash):
            self.run_again(wrong)

    def run_again(self, tests):
        again = Run(self.module, "ioloop", tests)
        if again.crash:
            self.failures[self.module] = again.crash
        for test in tests:
            if again.passed(test):
                self.notes.append(f"passed only when it was run again: {test}")
            else:
                self.failures[test] = again.outcomes.get(test, NOT_RUN)


def modules(parts):
    """The names of the modules to run, those with the most tests first."""
    if not any(LIBRARY.glob(ASYNCIO)):
        return []
    files = [file for pattern in [ASYNCIO, *OTHERS] for file in LIBRARY.glob(pattern)]
    files.sort(key=lambda file: file.stat().st_size, reverse=True)
    paths = [file.relative_to(LIBRARY).with_suffix("") for file in files]
    names = [".".join(path.parts) for path in paths]
    return [name for name in names if not parts or any(part in name for part in parts)]


def print_row(name, numbers, seconds):
    stock, ours = "{}/{}".format(*numbers[:2]), "{}/{}".format(*numbers[2:4])
    print(f"{name:42}{stock:>11}{ours:>11}{numbers[4]:>7}{seconds:>9.0f}", flush=True)


def main(parts):
    names = modules(parts)
    if not names:
        print("conformance: skipped, since this Python comes without asyncio's tests")
        return
    print(f"CPython {platform.python_version()}, passed/run with each kind of loop")
    print(f"{'':42}{'asyncio':>11}{'ioloop':>11}{'loops':>7}{'seconds':>9}")
    begun = time.monotonic()
    totals, failures, notes = [0] * 5, {}, []
    executor = ThreadPoolExecutor(AT_ONCE)
    try:
        for result in executor.map(Comparison, names):
            failures |= result.failures
            notes += result.notes
            if result.stock.loops:
                ours = result.ours
                numbers = [*result.stock.counts(), *ours.counts(), ours.loops]
                totals = list(map(sum, zip(totals, numbers, strict=True)))
                print_row(result.module, numbers, result.seconds)
    finally:
        executor.shutdown(cancel_futures=True)
    print_row("total", totals, time.monotonic() - begun)
    print(*notes, sep="\n")
    for test, outcome in sorted(failures.items(), key=lambda item: item[1] != NOT_RUN):
        print(f"{test}: {outcome}")
    if failures or not totals[-1]:
        sys.exit(f"conformance: {len(failures)} failures, {totals[-1]} loops")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run_tests(*sys.argv[2:4], only=sys.argv[4:])
    else:
        main(sys.argv[1:])
