"""Measures ioloop and its peers side by side and prints a table for each of its faces.

Each measurement has a process of its own.  The peers take turns: one round of a
case runs every peer once, and the table shows the medians of the rounds.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks import asyncio_scenarios, build, chart, report, scenarios
from benchmarks.loops import ALL_PEERS, ASYNCIO_LOOPS, DOOR, FLOOR, LOOPS, installed

HERE = Path(__file__).parent
CASES = [*scenarios.CASES, *asyncio_scenarios.CASES]

# A peer that fails is the peer's affair; one of these makes the run a failure.
OURS = ("ioloop", DOOR, "seed", FLOOR, "ioloop+fn")


def arguments():
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "scenarios",
        nargs="*",
        help="the beginnings of the names of those to run (all): "
        + ", ".join(case.name for case in CASES),
    )
    parser.add_argument(
        "--peers",
        type=lambda names: names.split(","),
        help="comma-separated, of " + ",".join(ALL_PEERS),
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--quick",
        "--smoke",
        action="store_true",
        help="tiny counts, one round: shows that all works and no more",
    )
    parser.add_argument(
        "--chart",
        type=Path,
        help="where to write the SVG chart; a whole run writes benchmarks/chart.svg",
    )
    parser.add_argument(
        "--page",
        type=Path,
        help="where to write the tables without targets; a whole run writes "
        "docs/figures.md",
    )
    parser.add_argument("--json", type=Path, help="where to write all raw figures")
    options = parser.parse_args()
    if unknown := set(options.peers or ()) - set(ALL_PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    options.cases = [
        case
        for case in CASES
        if not options.scenarios or case.name.startswith(tuple(options.scenarios))
    ]
    if not options.cases:
        parser.error("no such scenario")
    if not (options.quick or options.scenarios or options.peers):
        options.chart = options.chart or HERE / "chart.svg"
        options.page = options.page or HERE.parent / "docs" / "figures.md"
    options.peers = options.peers or ALL_PEERS
    return options


def measure(tools, peer, case, quick):
    """The figures of one measurement, or what went wrong as a string."""
    command = [sys.executable, "-m", "benchmarks.worker", peer, case.name]
    patience = 20 if quick else 180
    try:
        answer = subprocess.run(
            [*command, "--quick"] if quick else command,
            cwd=HERE.parent,
            env={**os.environ, "BENCHMARKS_TOOLS": str(tools)},
            capture_output=True,
            text=True,
            timeout=patience,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {patience} s"
    if answer.returncode:
        reason = answer.stderr.strip() or f"exit status {answer.returncode}"
        return reason
    return json.loads(answer.stdout)


def rounds_of(tools, case, peers, rounds, quick):
    """All figures of a case: {peer: [one dict a round]}, the peers in turns.

    For a peer that has failed, what went wrong as a string.
    """
    figures = {peer: [] for peer in peers if case.applies_to(peer)}
    for _ in range(1 if quick else case.rounds or rounds):
        for peer in random.sample(sorted(figures), len(figures)):
            if failed(figures[peer]):
                continue
            answer = measure(tools, peer, case, quick)
            if failed(answer):
                print(f"{case.name}, {peer}: {answer}", file=sys.stderr)
                figures[peer] = answer
            else:
                figures[peer].append(answer)
    return figures


def failed(answers):
    return isinstance(answers, str)


def medians_of(figures, row):
    return {
        peer: median(answer[row.figure] for answer in answers)
        for peer, answers in figures.items()
        if not failed(answers)
    }


def main():
    options = arguments()
    raw = {}
    with tempfile.TemporaryDirectory() as directory:
        tools = Path(directory)
        peers = [peer for peer in options.peers if installed(peer)]
        build.build(tools, door=DOOR in peers)
        for number, case in enumerate(options.cases, 1):
            print(f"{number}/{len(options.cases)} {case.name}", file=sys.stderr)
            raw[case.name] = rounds_of(
                tools, case, peers, options.rounds, options.quick
            )

    results = [
        (case, row, medians_of(raw[case.name], row))
        for case in options.cases
        for row in case.rows
    ]
    failures = {
        (case, peer): answers
        for case, figures in raw.items()
        for peer, answers in figures.items()
        if failed(answers)
    }
    print(report.head(peers))
    page = [report.head(peers)]
    for adapters, title in (LOOPS, "IOLoop"), (ASYNCIO_LOOPS, "asyncio"):
        part = [result for result in results if result[0].adapters is adapters]
        columns = [
            peer
            for peer in options.peers
            if any(peer in case.peers for case, *_ in part)
        ]
        if part:
            absent = set(columns) - set(peers)
            print(report.table(part, columns, absent, failures))
            page += [
                f"### {title}\n",
                report.table(part, columns, absent, failures, False),
            ]
    if options.page:
        options.page.write_text("\n".join(page))
    if options.chart:
        options.chart.write_text(chart.svg(results, report.machine()))
    if options.json:
        content = {"machine": report.machine(), "quick": options.quick, "raw": raw}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(peer in OURS for _, peer in failures))


if __name__ == "__main__":
    sys.exit(main())
