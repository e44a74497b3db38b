"""What goes into the tracker and what comes out: plain data, times in ns."""

from __future__ import annotations

import enum
from collections.abc import Container, Sequence
from typing import NamedTuple, Protocol

from stalld.records import StallRecord, TaskRecord, TickSample
from stalld.rings import Napi
from stalld.track.verdict import Verdict

SERIOUS_FACTOR = 10
"""From this many thresholds on a stall is an error, and no limit hides it (``bpf/state.h``)."""


class Observation(NamedTuple):
    """A record and what its kernel stack says (see ``enrich.stack``).

    ``mode``: what the stack interrupted: kernel, user, softirq, hardirq, idle
    or None. ``frames``: the culprit's frames, innermost first.
    ``bottom_halves_enabled``: the record was written when the task enabled
    bottom halves again, so it had held them off. ``below``: in softirq or
    hardirq mode what that came over: kernel, user or idle.
    """

    record: StallRecord
    mode: str | None
    frames: tuple[str, ...]
    bottom_halves_enabled: bool = False
    below: str | None = None

    @property
    def task_mode(self) -> str | None:
        """Where the task itself was, whatever interrupted it."""
        return self.below if self.mode in ("softirq", "hardirq") else self.mode


class Tick(NamedTuple):
    """What ran when a tick came, from the look-back ring: see :class:`Observation`."""

    sample: TickSample
    mode: str | None
    frames: tuple[str, ...]


class Host(Protocol):
    """What the tracker asks about the machine."""

    def ticks(self, cpu: int) -> Sequence[TickSample]:
        """What ran on ``cpu`` at its last ticks, oldest first."""

    def recent(self, cpu: int, since_ns: int) -> Sequence[TickSample]:
        """Of these the ones after ``since_ns``, and the last one until then."""

    def polled(self, cpu: int, seq: int) -> Napi | None:
        """What ``cpu`` polled in its stall ``seq``; None: not known any more."""

    def explain(self, sample: TickSample) -> Tick:
        """Name the stack of a tick."""

    def serves_inline(self) -> bool | None:
        """Whether this kernel serves softirqs while ksoftirqd is runnable; None: not known."""

    @property
    def threaded(self) -> bool:
        """Whether only threads serve softirqs, never an interrupt's end."""

    def counts(self) -> Container[str]:
        """Which of softnet_data's members can be read, by the names of ``Description.percpu``."""

    def tells_steal(self, cpu: int) -> bool:
        """Whether a tick that comes late could be told from a CPU that was taken away."""


class Phase(enum.StrEnum):
    """Contract values of ``phase``."""

    ONGOING = "ongoing"
    RESOLVED = "resolved"


class Ended(enum.StrEnum):
    """How the end became known.

    RECORD: the kernel's closing record. STATE: that record was lost, the
    shared state told. LOST: both were gone, the duration is what was seen.
    SHUTDOWN: the daemon stopped first.
    """

    RECORD = "record"
    STATE = "state"
    LOST = "lost"
    SHUTDOWN = "shutdown"


class Blocker(NamedTuple):
    """The task (or context) that had the CPU, as of its first sample."""

    tgid: int
    tid: int
    comm: bytes
    mode: str | None
    policy: int
    prio: int
    cgroup_id: int | None


class Handler(NamedTuple):
    """A softirq handler that ran for the threshold or longer.

    ``device``, ``work`` and ``budget`` are of its longest NAPI poll; None
    where it polled nothing, or that poll is not over yet.
    """

    vec: int
    service_ns: int
    device: bytes | None
    work: int | None
    budget: int | None


class Net(NamedTuple):
    """What the CPU did for the network meanwhile.

    ``packets``, ``squeezed``, ``dropped``, ``received_rps`` and ``flow_limited`` (packets that
    the flow limit dropped) are softnet_data's counters and ``backlog`` the
    packets in the CPU's own queue at the last record, each None where the
    kernel does not have it, or it cannot be read. ``napi`` counts from when the
    stall was detected; None: the CPU had another stall before we looked.
    """

    runs: int
    service_ns: int
    packets: int | None
    squeezed: int | None
    napi: Napi | None
    dropped: int | None = None
    received_rps: int | None = None
    flow_limited: int | None = None
    backlog: int | None = None


class Update(NamedTuple):
    """One line about one stall. Durations in ns; see the contract for meanings."""

    phase: Phase
    cpu: int
    seq: int
    started_ns: int
    duration_ns: int
    verdict: Verdict
    starved: dict[str, int]
    ksoftirqd_pid: int
    ksoftirqd_wait_ns: int
    waiting: dict[int, int]
    """Other watched threads: pid → longest wait at or over the threshold."""
    late_ns: int
    """The longest that a tick came too late."""
    stolen_ns: int | None
    handler: Handler | None
    blocker: Blocker | None
    task: TaskRecord | None
    """Who the blocker is, if the kernel told."""
    kernel_stack: tuple[str, ...]
    user_stack: tuple[int, ...]
    captured: str
    lookback: Sequence[Tick] | None
    """What ran before, oldest first; None in the first line, which waits for nothing."""
    net: Net
    nmi: bool
    """The stack was taken by the NMI sampler."""
    samples: int
    expected: int
    lost: int
    switches: int
    serves_inline: bool | None
    ended: Ended | None
    record_ns: int
    """When the kernel wrote the record behind this update; 0: none did."""
