"""The chart: one panel of bars per scenario, written as SVG by hand."""

from html import escape

from benchmarks.loops import PEERS
from benchmarks.report import number

COLUMNS, PANEL, GAP = 3, 290, 24
NAME, VALUE, BAR, LINE = 62, 56, 11, 16
MARGIN, TITLE, FOOT = 24, 64, 34

STYLE = """
  text { font: 11px system-ui, sans-serif; fill: #24292f }
  .title { font-size: 16px; font-weight: 600 }
  .panel { font-size: 12px; font-weight: 600 }
  .own { font-weight: 600 }
  .note { fill: #57606a }
  .bar { fill: #afb8c1 }
  .bar.own { fill: #0969da }
  .bar.floor { fill: #d4a72c }
  .ground { fill: #ffffff }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .note { fill: #8d96a0 }
    .bar { fill: #57606a }
    .bar.own { fill: #4493f8 }
    .ground { fill: #0d1117 }
  }
"""


def svg(results, machine):
    charted = [
        (case, row, medians)
        for case, row, medians in results
        if case.charted == row.figure and medians
    ]
    present = [peer for peer in PEERS if any(peer in m for _, _, m in charted)]
    height = 24 + LINE * len(present) + GAP
    rows = -(-len(charted) // COLUMNS)
    size = (
        2 * MARGIN + COLUMNS * PANEL + (COLUMNS - 1) * GAP,
        TITLE + rows * height + FOOT,
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" '
        f'height="{size[1]}" viewBox="0 0 {size[0]} {size[1]}" role="img" '
        f'aria-label="ioloop and its peers, time per operation">',
        f"<style>{STYLE}</style>",
        '<rect class="ground" width="100%" height="100%"/>',
        text(MARGIN, 30, "Time per operation: shorter is better", "title"),
        text(MARGIN, 48, "medians; each panel has a scale of its own", "note"),
    ]
    for index, (case, row, medians) in enumerate(charted):
        x = MARGIN + index % COLUMNS * (PANEL + GAP)
        y = TITLE + index // COLUMNS * height
        parts += panel(x, y, case, row, medians, present)
    parts += [text(MARGIN, size[1] - 14, machine, "note"), "</svg>", ""]
    return "\n".join(parts)


def panel(x, y, case, row, medians, present):
    figure = "" if row.figure == "wall" else f" {row.figure}"
    yield text(x, y + 14, f"{case.name}{figure} ({row.unit})", "panel")
    longest = max(medians.values()) or 1
    for line, peer in enumerate(present):
        top = y + 24 + line * LINE
        kind = "own" if peer.startswith("ioloop") else "floor" if peer == "C" else ""
        yield text(x + NAME - 6, top + 9, peer, f"{kind} peer", anchor="end")
        if peer not in medians:
            yield text(x + NAME, top + 9, "-", "note")
            continue
        width = (PANEL - NAME - VALUE) * medians[peer] / longest
        yield (
            f'<rect class="bar {kind}" x="{x + NAME}" y="{top}" '
            f'width="{max(width, 1):.1f}" height="{BAR}" rx="2"/>'
        )
        yield text(x + NAME + width + 5, top + 9, number(medians[peer]), kind)


def text(x, y, content, kind, anchor="start"):
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">'
        f"{escape(content)}</text>"
    )
