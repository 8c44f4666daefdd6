"""One measurement in a process of its own: `python -m benchmarks.worker PEER CASE`.

The figures go to standard output as JSON.  BENCHMARKS_TOOLS names the directory
where build.py has put the compiled parts.
"""

import importlib.util
import json
import os
import resource
import subprocess
import sys

from benchmarks import scenarios
from benchmarks.loops import DOOR, FLOOR, LOOPS
from benchmarks.scenarios import LOAD, TOOLS


def case_named(name):
    if name.startswith("asyncio "):  # asyncio is imported only where it is measured
        from benchmarks.asyncio_scenarios import CASES
    else:
        from benchmarks.scenarios import CASES
    return next(case for case in CASES if case.name == name)


def measure(peer, name, quick=False):
    case = case_named(name)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if case.run is scenarios.importing:
        return case.run(LOOPS[peer])
    if peer == FLOOR:
        run = floor
    elif peer == DOOR:
        run = door
    else:
        run = with_adapter(case.adapters[peer])
    if not quick and case.warm_up:
        run(case.run, **case.quick)
    return run(case.run, **(case.quick if quick else case.parameters))


def with_adapter(adapter):
    def run(scenario, **parameters):
        loop = adapter()
        try:
            return scenario(loop, **parameters)
        finally:
            loop.close()

    return run


def floor(scenario, **parameters):
    command = [str(TOOLS / "floor"), scenario.__name__]
    if scenario is scenarios.echo:
        server = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: os.sched_setaffinity(0, {scenarios.SERVER_CORE}),
        )
        try:
            port = int(server.stdout.readline())
            return scenarios.run_load(LOAD, port, server.pid, **parameters)
        finally:
            server.kill()
            server.communicate()
    command += [str(value) for value in parameters.values()]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(answer.stdout)


def door(scenario, **parameters):
    spec = importlib.util.spec_from_file_location("door", TOOLS / "door.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run(scenario.__name__, LOAD, **parameters)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], "--quick" in sys.argv)))
