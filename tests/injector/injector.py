"""The injector: real, bounded stalls of one CPU, each with its own ground truth."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Self

from tests.injector.child import Child
from tests.injector.kinds import (
    METHODS,
    InjectorError,
    Kind,
    Mode,
    Truth,
    checked_duration_ns,
)
from tests.injector.pressure import Pressure


class Injector:
    """Stalls one CPU from a process of its own that is pinned there.

    Start it in a thread that outlives it: the kernel kills the process when the thread that
    started it ends.

    Args:
        cpu: to stall.
        busy: let a task run there in user mode when an interrupt stalls it; without, the CPU
            may be idle then and the truth has pid 0.
    """

    def __init__(self, cpu: int, *, busy: bool = True) -> None:
        self.cpu = cpu
        self._busy = busy
        self._worker: Child | None = None

    def __enter__(self) -> Self:
        self._worker = Child("worker", [str(self.cpu), "busy" if self._busy else "idle"])
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    @property
    def pid(self) -> int:
        """Process that stalls the CPU, for all kinds but irqs_off."""
        return self._running().pid

    def _running(self) -> Child:
        if self._worker is None:
            raise InjectorError("use the injector in a with statement")
        return self._worker

    def prepare(self, kind: Kind) -> None:
        """Load and attach what a kind needs, so that the first stall comes at once.

        Raises:
            UnsupportedError: this machine cannot make it; the message says why.
        """
        self._running().call({"kind": kind})

    def inject(
        self,
        kind: Kind,
        duration_ms: float,
        *,
        pressure: Pressure | Mode | None = None,
        reads: str | None = None,
    ) -> Truth:
        """Make one stall and wait for its end.

        Args:
            kind: of stall.
            duration_ms: at most :data:`~tests.injector.kinds.MAX_DURATION_MS`.
            pressure: on the same CPU, active during the stall; a mode instead sets one up for
                this stall alone.
            reads: a file; preempt_off makes its read() slow then.

        Raises:
            DurationError: too long or too short; nothing happened.
            UnsupportedError: this machine cannot make it; the message says why.
            InjectorError: anything else.
        """
        checked_duration_ns(duration_ms)
        self.prepare(kind)
        if isinstance(pressure, Mode):
            with Pressure(self.cpu, pressure) as own:
                return self.inject(kind, duration_ms, pressure=own, reads=reads)
        if pressure is not None and pressure.cpu != self.cpu:
            raise InjectorError(f"the pressure is on CPU {pressure.cpu}, not on {self.cpu}")
        active: AbstractContextManager[None] = pressure.active() if pressure else nullcontext()
        with active:
            file = {} if reads is None else {"reads": reads}
            made = self._running().call({"kind": kind, "duration_ms": duration_ms, **file})
        return Truth(
            kind=kind,
            cpu=made["cpu"],
            pid=made["pid"],
            tid=made["tid"],
            comm=made["comm"],
            start_ns=made["start_ns"],
            end_ns=made["end_ns"],
            symbol=METHODS[kind].symbol,
            others=tuple(made["others"]),
        )
