"""What a run is made of, without a kernel."""

from __future__ import annotations

import pytest

from bench.fidelity.run import KINDS, estimate_s, gather, shares, steal_ms
from bench.fidelity.truth import EXPECTED
from tests.injector.kinds import Kind
from tests.unit.bench.make import line


def test_kinds() -> None:
    """Every kind has a right verdict; the one that holds up two CPUs is left out unless asked."""
    assert set(EXPECTED) == set(Kind)
    assert set(KINDS) == set(Kind) - {Kind.IRQS_OFF}


def test_shares() -> None:
    """Equal, the rest to the first ones."""
    assert shares(60, 6) == [10] * 6
    assert shares(62, 6) == [11, 11, 10, 10, 10, 10]


def test_estimate_grows_with_the_stalls() -> None:
    """A thousand stalls take less than a quarter of an hour."""
    assert 10 * estimate_s(60) < estimate_s(1000) < 15 * 60


def test_lines_of_one_stall_come_together() -> None:
    """Ongoing lines go with their own resolved one; a stall without an end is none."""
    lines = [
        line(stall_id="a", phase="ongoing"),
        line(stall_id="b", phase="ongoing", cpu=0),
        line(stall_id="a", phase="ongoing"),
        line(stall_id="a"),
        line(stall_id="c", duration_ms=1.5),
    ]
    first, second = gather(lines)
    assert first.resolved is lines[3]
    assert first.ongoing == (lines[0], lines[2])
    assert first.span.length_ns == 50_000_000
    assert second.ongoing == ()
    assert second.span.length_ns == 1_500_000


def test_steal_column() -> None:
    """The eighth number of the CPU's own line, in ticks of user space."""
    stat = "cpu  1 2 3 4 5 6 7 99 0 0\ncpu1 1 2 3 4 5 6 7 12 0 0\ncpu11 1 2 3 4 5 6 7 13 0 0\n"
    assert steal_ms(stat, 1) == 120
    with pytest.raises(ValueError, match="cpu2"):
        steal_ms(stat, 2)
