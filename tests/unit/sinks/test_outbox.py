"""The queue of a sink: bounded, counted, honest about gaps, and patient with acknowledgements."""

from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stalld.sinks import outbox as module
from stalld.sinks.outbox import Gap, Outbox, Stats


class Clock:
    """Goes on by one at each look."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        self.ns += 1
        return self.ns


def tell(gap: Gap) -> bytes:
    """A line that tells of a gap."""
    return f"gap {gap.dropped} {gap.since_ns}-{gap.until_ns}\n".encode()


def make(max_bytes: int = 10, *, told: bool = True) -> Outbox:
    """An empty outbox."""
    return Outbox(max_bytes, tell if told else None, Clock())


def counts(outbox: Outbox) -> tuple[int, int, int]:
    """Delivered, queued, dropped."""
    return outbox.stats("x")[1:]


def test_stats_name() -> None:
    """The counts bear the name of the sink."""
    assert make().stats("tcp") == Stats("tcp", 0, 0, 0)


def test_lines_go_through_in_order() -> None:
    """Whole lines come out as they came in, and are counted."""
    outbox = make(100)
    assert not outbox
    assert outbox.chunk() == outbox.head() == b""
    assert all(outbox.put(line) for line in (b"one\n", b"two\n", b"three\n"))
    assert outbox
    assert outbox.head() == b"one\n"
    assert outbox.chunk() == b"one\ntwo\nthree\n"
    assert counts(outbox) == (0, 3, 0)
    outbox.advance(8)
    assert counts(outbox) == (2, 1, 0)
    assert outbox.chunk() == b"three\n"


def test_chunk_is_limited_to_whole_lines() -> None:
    """A chunk holds whole lines up to its size, and one line at least."""
    outbox = make(100)
    for _ in range(3):
        outbox.put(b"1234\n")
    assert outbox.chunk(10) == b"1234\n1234\n"
    assert outbox.chunk(14) == b"1234\n1234\n"
    assert outbox.chunk(1) == b"1234\n"


def test_partial_write() -> None:
    """What is left of a line comes next; it is delivered with its last byte."""
    outbox = make(100)
    outbox.put(b"1234\n")
    outbox.put(b"5678\n")
    outbox.advance(2)
    assert counts(outbox) == (0, 2, 0)
    assert outbox.chunk(3) == b"34\n"
    assert outbox.chunk(8) == b"34\n5678\n"
    outbox.advance(4)
    assert counts(outbox) == (1, 1, 0)
    assert outbox.chunk() == b"678\n"
    outbox.restart()
    assert outbox.chunk() == b"5678\n"
    assert counts(outbox) == (1, 1, 0)


def test_a_full_queue_drops_and_tells() -> None:
    """What finds no room is dropped; where it would have stood a line tells, once half is free."""
    outbox = make(10)
    assert outbox.put(b"1234\n")
    assert outbox.put(b"5678\n")
    assert not outbox.put(b"x\n")
    assert not outbox.put(b"y\n")
    assert counts(outbox) == (0, 2, 2)
    outbox.advance(4)
    assert not outbox.put(b"\n")  # It would fit, but the order would be wrong.
    outbox.advance(1)
    assert outbox.chunk() == b"5678\ngap 3 1-3\n"
    assert counts(outbox) == (1, 1, 3)
    outbox.advance(len(b"5678\ngap 3 1-3\n"))
    assert counts(outbox) == (2, 0, 3)  # What tells of a gap is not counted.
    assert outbox.put(b"z\n")
    assert outbox.chunk() == b"z\n"


def test_a_gap_is_closed_by_what_is_put() -> None:
    """A line too long for an empty queue is told of before the next line."""
    outbox = make(20)
    assert not outbox.put(b"much, much too long\n\n")
    assert not outbox
    assert outbox.put(b"1\n")
    assert outbox.chunk() == b"gap 1 1-1\n1\n"


def test_gaps_may_go_untold() -> None:
    """Without a way to tell, lines are only counted."""
    outbox = make(10, told=False)
    outbox.put(b"much too long\n")
    outbox.put(b"1\n")
    assert outbox.chunk() == b"1\n"
    assert counts(outbox) == (0, 1, 1)


def test_lines_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short lines are, there are not more than so many; those kept count."""
    monkeypatch.setattr(module, "MAX_LINES", 2)
    outbox = make(100, told=False)
    outbox.put(b"\n")
    outbox.put(b"\n")
    outbox.hand_over(1)
    assert not outbox.put(b"\n")


def test_gaps_are_lines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where lines are too many, no more are queued to tell of those that are not."""
    monkeypatch.setattr(module, "MAX_LINES", 2)
    outbox = make(1000)
    for _ in range(8):
        outbox.put(b"\n")
    assert outbox.chunk() == b"\n\n"
    outbox.advance(1)
    assert outbox.chunk() == b"\ngap 6 1-6\n"
    assert counts(outbox) == (1, 1, 6)


def test_skip() -> None:
    """A line that the other side never takes is dropped; room that it leaves closes a gap."""
    outbox = make(10)
    outbox.put(b"123456789\n")
    outbox.put(b"x\n")
    outbox.skip()
    assert outbox.chunk() == b"gap 1 1-1\n"
    outbox.skip()
    assert counts(outbox) == (0, 0, 2)


def test_give_up() -> None:
    """All that waits, and all that is kept, is dropped; also what was dropped untold is told."""
    outbox = make(10)
    outbox.put(b"1234\n")
    outbox.put(b"5678\n")
    outbox.put(b"x\n")
    outbox.hand_over(7)
    assert outbox.give_up() == 3
    assert counts(outbox) == (0, 0, 3)
    assert counts(outbox) == (0, 0, 3)
    assert outbox.chunk() == b""
    outbox.restart()
    assert outbox.chunk() == b""


def test_handed_over_lines_are_kept() -> None:
    """What was handed over counts as queued until the other side is known to have it."""
    outbox = make(100)
    for line in (b"1234\n", b"5678\n", b"90\n"):
        outbox.put(line)
    outbox.hand_over(7)
    kept = [outbox.unacknowledged]
    assert outbox.chunk() == b"78\n90\n"
    assert counts(outbox) == (0, 3, 0)
    outbox.acknowledge(3)  # Four bytes are there: not all of a line.
    assert counts(outbox) == (0, 3, 0)
    outbox.acknowledge(2)
    assert counts(outbox) == (1, 2, 0)
    kept.append(outbox.unacknowledged)  # Of the second line only a part was handed over.
    outbox.hand_over(6)
    kept.append(outbox.unacknowledged)
    outbox.acknowledge(0)
    assert counts(outbox) == (3, 0, 0)
    kept.append(outbox.unacknowledged)
    assert kept == [True, False, True, False]


def test_a_new_stream_has_all_that_was_not_acknowledged() -> None:
    """After a break come the kept lines, then the cut one whole, then the others, in order."""
    outbox = make(100)
    for line in (b"one\n", b"two\n", b"three\n", b"four\n"):
        outbox.put(line)
    outbox.hand_over(16)
    outbox.acknowledge(12)
    assert counts(outbox) == (1, 3, 0)
    outbox.restart()
    assert outbox.chunk() == b"two\nthree\nfour\n"
    outbox.hand_over(4)
    outbox.acknowledge(0)
    assert counts(outbox) == (2, 2, 0)


def test_whole() -> None:
    """Where a part of what was handed over is of no use, no line of it is there before all is."""
    outbox = make(100)
    outbox.put(b"one\n")
    outbox.put(b"two\n")
    outbox.hand_over(8, whole=True)
    outbox.acknowledge(1)
    assert counts(outbox) == (0, 2, 0)
    outbox.acknowledge(0)
    assert counts(outbox) == (2, 0, 0)


def test_kept_lines_take_room() -> None:
    """What is kept is bounded as well; acknowledging it makes room and closes a gap."""
    outbox = make(30)
    outbox.put(b"1" * 15)
    outbox.put(b"2" * 15)
    outbox.hand_over(30)
    assert not outbox.put(b"x\n")
    outbox.acknowledge(15)
    assert outbox.chunk() == b"gap 1 1-1\n"
    assert outbox.put(b"1\n")
    assert counts(outbox) == (1, 2, 1)


def test_threads() -> None:
    """Whatever threads put and take out at the same time, each line is counted once."""
    outbox = make(2000)
    count = 3000
    done = threading.Event()
    taken: list[bytes] = []

    def put(name: int) -> None:
        for number in range(count):
            outbox.put(b"%d %d\n" % (name, number))

    def take() -> None:
        while not done.is_set() or outbox or outbox.unacknowledged:
            data = outbox.chunk(100)
            outbox.hand_over(len(data))
            outbox.acknowledge(0)
            taken.append(data)
            stats = outbox.stats("x")
            assert stats.queued >= 0

    putters = [threading.Thread(target=put, args=(name,)) for name in range(3)]
    taker = threading.Thread(target=take)
    for thread in (taker, *putters):
        thread.start()
    for thread in putters:
        thread.join()
    outbox.put(b"last\n")
    done.set()
    taker.join()
    delivered, queued, dropped = counts(outbox)
    lines = b"".join(taken).splitlines()
    gaps = [int(line.split()[1]) for line in lines if line.startswith(b"gap")]
    assert queued == 0
    assert delivered + dropped == 3 * count + 1
    assert delivered == len(lines) - len(gaps)
    assert sum(gaps) == dropped
    for name in range(3):
        mine = [int(line.split()[1]) for line in lines if line.startswith(b"%d " % name)]
        assert mine == sorted(set(mine))


class Streams(RuleBasedStateMachine):
    """Whatever is put, cut, acknowledged and broken: what the other side reads has no hole.

    The other side has what it acknowledged, of each stream. Read one after another, streams must
    hold every line that was put, in order, or a line that tells how many are missing there.
    """

    MAX_BYTES = 200

    def __init__(self) -> None:
        super().__init__()
        self.outbox = make(self.MAX_BYTES)
        self.put_count = 0
        self.sent = 0
        self.stream = b""  # All that was handed over of this stream.
        self.acknowledged = 0
        self.streams: list[bytes] = []

    @rule(length=st.integers(0, 90))
    def put(self, length: int) -> None:
        """A line with its number."""
        self.outbox.put(b"%d %b\n" % (self.put_count, b"x" * length))
        self.put_count += 1

    @rule(size=st.integers(1, 120), part=st.floats(0, 1))
    def write(self, size: int, part: float) -> None:
        """The kernel takes a part."""
        data = self.outbox.chunk(size)
        taken = round(len(data) * part)
        self.outbox.hand_over(taken)
        self.stream += data[:taken]

    @rule(part=st.floats(0, 1))
    def acknowledge(self, part: float) -> None:
        """The other side has some more."""
        self.acknowledged += round((len(self.stream) - self.acknowledged) * part)
        self.outbox.acknowledge(len(self.stream) - self.acknowledged)

    @rule(part=st.floats(0, 1))
    def fall_apart(self, part: float) -> None:
        """The stream breaks; the other side may have more than we know."""
        more = round((len(self.stream) - self.acknowledged) * part)
        self.streams.append(self.stream[: self.acknowledged + more])
        self.outbox.restart()
        self.stream, self.acknowledged = b"", 0

    @precondition(lambda self: self.put_count > 0)
    @rule()
    def catch_up(self) -> None:
        """All is written and acknowledged: then nothing is missing."""
        while data := self.outbox.chunk():
            self.outbox.hand_over(len(data))
            self.stream += data
        self.acknowledged = len(self.stream)
        self.outbox.acknowledge(0)
        seen = -1
        missing = 0
        for stream in (*self.streams, self.stream):
            for line in stream.split(b"\n")[:-1]:
                word, rest = line.split(b" ", 1)
                if word == b"gap":
                    dropped = int(rest.split()[0])
                    if not missing:
                        missing = dropped
                    assert missing == dropped
                    continue
                number = int(word)
                if number > seen:
                    assert number == seen + 1 + missing
                    seen, missing = number, 0
        assert counts(self.outbox)[1] == 0
        assert seen + 1 + missing <= self.put_count

    @invariant()
    def bounded_and_counted(self) -> None:
        """The counts sum up, the bytes are within bounds (but for lines that tell of gaps)."""
        delivered, queued, dropped = counts(self.outbox)
        assert delivered + queued + dropped == self.put_count
        assert min(delivered, queued, dropped) >= 0
        assert len(self.outbox.chunk(1 << 30)) <= self.MAX_BYTES + 200


Streams.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestStreams = Streams.TestCase
