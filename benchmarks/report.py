"""The table, and the machine it was measured on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from benchmarks.loops import FLOOR
from benchmarks.targets import best_peer


def machine():
    return (
        f"{os.cpu_count()} x {processor()}, {platform.system()} {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}"
    )


def processor():
    try:
        with open("/proc/cpuinfo") as lines:
            models = [line for line in lines if line.startswith("model name")]
        return models[0].split(":")[1].strip()
    except (OSError, IndexError):
        return platform.machine()


def head(peers):
    """What was measured, and on what."""
    found = []
    for peer in [*peers, "aiofastnet"]:
        distribution = "ioloop-native" if peer == "ioloop" else peer
        try:
            found.append(f"{peer} {version(distribution)}")
        except PackageNotFoundError:
            continue
    return f"{machine()}\n{', '.join(found)}\n"


def number(value):
    if value is None:
        return "-"
    if abs(value) >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.3g}"


def table(results, peers, absent, failures, judged=True):
    """A Markdown table, aligned so that it reads well as plain text too.

    Without targets if it is not judged.
    """

    def cell(case, peer, medians):
        if peer in absent:
            return "absent"
        if (case.name, peer) in failures:
            return "fails"
        return number(medians.get(peer))

    ratios = {"best/ioloop": against_best}
    if FLOOR in peers:
        ratios["ioloop/C"] = against_floor
    lines = [["scenario", "unit", *peers, *ratios, "targets"]]
    met = missed = 0
    for case, row, medians in results:
        label = case.name if row.figure == "wall" else f"{case.name}, {row.figure}"
        verdicts = [target.verdict(medians) for target in row.targets]
        marks = []
        for text, ok in filter(None, verdicts):
            marks.append(f"{'yes' if ok else 'NO'} ({text})")
            met, missed = met + bool(ok), missed + (not ok)
        lines.append(
            [
                label,
                row.unit,
                *(cell(case, peer, medians) for peer in peers),
                *(against(row, medians) for against in ratios.values()),
                "; ".join(marks),
            ]
        )
    right = [False, False, *[True] * (len(lines[0]) - 3), False]
    tail = [f"Targets met: {met} of {met + missed}."]
    if not judged:
        lines, right, tail = [line[:-1] for line in lines], right[:-1], []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = [
        "-" * (width - 1) + (":" if is_right else "-")
        for width, is_right in zip(widths, right, strict=True)
    ]
    text = [
        "| " + " | ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ) + " |"
        for line in [lines[0], rule, *lines[1:]]
    ]  # fmt: skip
    names = [case.name for case, *_ in results]
    reasons = [
        f"{name}, {peer}: {reason.splitlines()[-1]}"
        for (name, peer), reason in failures.items()
        if name in names
    ]
    return "\n".join([*text, "", *reasons, *tail, ""])


def against_best(row, medians):
    return ratio(row, medians.get(best_peer(medians)), medians.get("ioloop"))


def against_floor(row, medians):
    return ratio(row, medians.get("ioloop"), medians.get(FLOOR))


def ratio(row, above, below):
    if row.unit in ("1/s", "x"):  # less is better everywhere else
        return "-"
    if above is None or not below or above * below < 0:
        return "-"
    return f"{above / below:.2f}"
