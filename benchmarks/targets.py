"""The targets: each looks at the medians of one row and gives its verdict."""

from dataclasses import dataclass

PYTHON_PEERS = ("tornado", "asyncio", "uvloop", "rloop", "rsloop", "gevent")


@dataclass
class Target:
    bound: float
    subject = "ioloop"

    def verdict(self, medians):
        """(text, met), or None when a figure it needs is absent."""
        if medians.get(self.subject) is None:
            return None
        return self.judge(medians[self.subject], medians)


class Below(Target):
    def judge(self, own, medians):
        return f"< {self.bound:g}: {own:.4g}", own < self.bound


class AtLeast(Target):
    def judge(self, own, medians):
        return f">= {self.bound:g}: {own:.4g}", own >= self.bound


class Fastest(Target):
    """So many times as fast as the fastest peer."""

    def judge(self, own, medians):
        best = best_peer(medians)
        if best is None:
            return None
        ratio = medians[best] / own
        return f">= {self.bound:g}x best ({best}): {ratio:.2f}x", ratio >= self.bound


class Peer(Target):
    """So many times as fast as one peer."""

    def judge(self, own, medians):
        if medians.get(self.peer) is None:
            return None
        ratio = medians[self.peer] / own
        text = f"{self.subject} >= {self.bound:g}x {self.peer}: {ratio:.3g}x"
        return text, ratio >= self.bound


class Seed(Peer):
    peer = "seed"


class Uvloop(Peer):
    peer = "uvloop"


class FastUvloop(Uvloop):
    subject = "ioloop+fn"


class Floor(Target):
    """At most so many times what the C program takes."""

    def judge(self, own, medians):
        if not medians.get("C"):
            return None
        ratio = own / medians["C"]
        text = f"{self.subject} <= {self.bound:g}x C: {ratio:.2f}x"
        return text, ratio <= self.bound


class DoorFloor(Floor):
    subject = "ioloop-c"


@dataclass
class Least(Target):
    """The least of all loops with Python handlers."""

    bound: float = 1

    def judge(self, own, medians):
        best = best_peer(medians, ("seed", *PYTHON_PEERS))
        if best is None:
            return None
        text = f"least: {own:.3g}, {best}: {medians[best]:.3g}"
        return text, own <= medians[best]


def best_peer(medians, peers=PYTHON_PEERS):
    there = [peer for peer in peers if medians.get(peer) is not None]
    return min(there, key=medians.get, default=None)
