"""Network pressure on one CPU: packets sent from another one that it has to receive."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

from tests.injector.child import Child
from tests.injector.kinds import InjectorError, Mode
from tests.injector.system import other_cpu

_ANSWER_S = 10.0
PROBE = struct.Struct("=QQ")
"""send_ns, rtt_ns; rtt_ns is 0 until the answer is there."""


class Load(NamedTuple):
    """What the sender sends.

    Attributes:
        burst: packets sent at once.
        interval_ms: from one burst, or ping, to the next.
        packet_cost_us: time the receiver takes for a packet, at most 50.
    """

    burst: int
    interval_ms: float
    packet_cost_us: float


# Measured on 6.18 with 50 ms of preempt_off: while another task should run, the kernel polls a
# backlog for 64 packets, wakes ksoftirqd if there are more, and polls again at the next
# interrupt. A hundred each 6 ms are more than one poll takes and less than all do: ksoftirqd
# is woken, and a ping passes within a few ticks. Where nothing else should run, ksoftirqd is
# woken only after 2 ms of softirqs without an end, which a flood makes.
LOADS = {
    Mode.PING: Load(burst=1, interval_ms=2.0, packet_cost_us=0.0),
    Mode.BURSTS: Load(burst=100, interval_ms=6.0, packet_cost_us=5.0),
    Mode.FLOOD: Load(burst=1000, interval_ms=0.0, packet_cost_us=10.0),
}


class Probe(NamedTuple):
    """One measured ping.

    Attributes:
        send_ns: CLOCK_MONOTONIC.
        rtt_ns: round trip, None when there was no answer (yet).
    """

    send_ns: int
    rtt_ns: int | None


class Pressure:
    """A veth pair into a namespace, its host end received on ``cpu``, and a sender elsewhere.

    Namespace and veth pair belong to a child process; the kernel removes them with it. Two
    pressures on one CPU, say a ping beside a flood, do not disturb each other.

    Args:
        cpu: that receives.
        mode: PING measures all the time; BURSTS and FLOOD send within :meth:`active` only.
        load: instead of that mode's in :data:`LOADS`.
        from_cpu: that sends; any other one by default.
        competitor: whether a user-mode task competes for ``cpu`` within :meth:`active` (not
            with PING): the kernel wakes ksoftirqd when softirqs are left over and another task
            should run.
    """

    def __init__(
        self,
        cpu: int,
        mode: Mode,
        *,
        load: Load | None = None,
        from_cpu: int | None = None,
        competitor: bool = True,
    ) -> None:
        self.cpu = cpu
        self.mode = mode
        self.interface = ""
        self._from_cpu = from_cpu
        self._load = LOADS.get(mode) if load is None else load
        self._competitor = competitor
        self._child: Child | None = None
        self._probes = -1

    def __enter__(self) -> Self:
        if self._load is None:
            return self
        from_cpu = other_cpu(self.cpu) if self._from_cpu is None else self._from_cpu
        self._probes = os.memfd_create("injector-probes", os.MFD_CLOEXEC)
        try:
            self._child = Child("netns", [], [self._probes])
            answer = self._child.call(
                {
                    "what": "set up",
                    "mode": self.mode,
                    "cpu": self.cpu,
                    "from_cpu": from_cpu,
                    **self._load._asdict(),
                    "competitor": self._competitor,
                    "probes_fd": self._probes,
                }
            )
        except BaseException:
            self.close()
            raise
        self.interface = answer["interface"]
        if self.mode is Mode.PING:
            self._wait_for_an_answer()
        return self

    def _wait_for_an_answer(self) -> None:
        deadline = time.monotonic() + _ANSWER_S
        while not any(probe.rtt_ns for probe in self.probes()):
            if time.monotonic() > deadline:
                self.close()
                raise InjectorError(f"no ping was answered in {_ANSWER_S:g} s")
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the sender and remove the interface; may be called twice."""
        # The sender first: it cannot send without the interface, and would say so.
        if self._child is not None:
            self._child.close()
            self._child = None
        if self.interface:
            # The kernel would do it too, but some time after the child's end.
            subprocess.run(
                ["ip", "link", "delete", self.interface], capture_output=True, check=False
            )
            self.interface = ""
        if self._probes >= 0:
            os.close(self._probes)
            self._probes = -1

    @contextmanager
    def active(self) -> Iterator[None]:
        """Weigh on the CPU meanwhile; PING does so anyway."""
        if self.mode in (Mode.NONE, Mode.PING):
            yield
            return
        if self._child is None:
            raise InjectorError("use the pressure in a with statement")
        self._child.call({"what": "start"})
        try:
            yield
        finally:
            self._child.call({"what": "stop"})

    def probes(self) -> list[Probe]:
        """All pings so far, in the order they were sent; [] in the other modes."""
        if self._probes < 0:
            return []
        data = os.pread(self._probes, os.fstat(self._probes).st_size, 0)
        pairs = PROBE.iter_unpack(data[: len(data) // PROBE.size * PROBE.size])
        return [Probe(send_ns, rtt_ns or None) for send_ns, rtt_ns in pairs]
