"""What a packet takes more because of us, and because of others.

    python -m bench.flood [--rounds N] [--packets N]

A flood of datagrams over a veth pair, in namespaces of the bench's own; one CPU sends and
receives them, so that a packet's whole cost is its time. The limit are two programs that return
at once, on softirq_entry and softirq_exit: whoever watches softirqs with BPF costs no less.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

from bench.command import run
from bench.loads import Flood
from bench.processes import runqslower, softirqs
from bench.row import Row, ratio, row, spread, unmeasured
from bench.sides import OURS, Sides, added_ns, against_limit

ROUNDS, PACKETS = 30, 50_000
NAME = "added to a packet over veth"


def measure(rounds: int = ROUNDS, packets: int = PACKETS) -> list[Row]:
    """Against the limit, runqslower and softirqs."""
    others = {"runqslower": runqslower, "softirqs": softirqs}
    with ExitStack() as stack:
        flood = stack.enter_context(Flood())
        sides = Sides(stack, ["softirq_entry", "softirq_exit"], others)
        us = sides.interleave(lambda: flood.packet_us(packets), rounds)
    added = added_ns(us)
    ours = spread(added[OURS], "ns")
    rows = [against_limit(NAME, us, f"{packets} packets", "packet")]
    for name in others:
        full = f"{NAME}, against {name}"
        if name in sides.missing:
            rows.append(unmeasured(full, sides.missing[name]))
            continue
        theirs = spread(added[name], "ns")
        rows.append(row(full, ours, reference=theirs, against=ratio(ours, theirs)))
    return rows


if __name__ == "__main__":
    options = ("rounds", ROUNDS, "of all sides"), ("packets", PACKETS, "in each run")
    sys.exit(run(__doc__, measure, *options))
