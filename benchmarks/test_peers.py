"""pytest-benchmark's view of the comparison: one group per scenario.

A measurement runs in a process of its own and reports its time.  Here that
report drives the clock that pytest-benchmark reads, so its tables, statistics,
comparisons and JSON all work; and the peers still take turns, because the first
test of a group measures all rounds of all peers and the others replay theirs.
"""

import pytest

pytest.importorskip("pytest_benchmark")

from benchmarks.__main__ import CASES, OURS, failed, rounds_of  # noqa: E402
from benchmarks.build import build  # noqa: E402
from benchmarks.loops import ALL_PEERS, DOOR, installed  # noqa: E402

SECONDS = {"ns": 1e-9, "us": 1e-6}
TIMED = [case for case in CASES if case.rows[0].figure == "wall"]


class ReportedClock:
    """Stands still but for the times that measurements report."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


reported = ReportedClock()


@pytest.fixture(scope="session")
def figures_of(request, tmp_path_factory):
    tools = tmp_path_factory.mktemp("tools")
    quick = request.config.getoption("benchmark_disable")
    build(tools, door=installed(DOOR))
    measured = {}

    def figures_of(case, peer):
        if case.name not in measured:
            measured[case.name] = rounds_of(tools, case, ALL_PEERS, 5, quick)
        return measured[case.name].get(peer)

    return figures_of


@pytest.mark.benchmark(timer=reported)
@pytest.mark.parametrize(
    ("case", "peer"),
    [
        pytest.param(case, peer, id=f"{case.name}-{peer}")
        for case in TIMED
        for peer in case.peers
    ],
)
def test_peer(benchmark, case, peer, figures_of):
    benchmark.group = case.name
    figures = figures_of(case, peer)
    if figures is None:
        pytest.skip(f"{peer} is not installed")
    if failed(figures):
        assert peer not in OURS, figures
        pytest.skip(figures.splitlines()[-1])
    second = SECONDS[case.rows[0].unit]
    replay = iter(figures)

    def measure():
        reported.now += next(replay)["wall"] * second

    benchmark.extra_info["figures"] = figures
    benchmark.pedantic(measure, rounds=len(figures))
