"""The process that stalls its CPU: ``python -m tests.injector.worker PPID CPU BUSY``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.injector import system
from tests.injector.child import be_child, serve
from tests.injector.kinds import METHODS, Kind, checked_duration_ns
from tests.injector.stalls import Stall, prepare


class Worker:
    """Prepares each kind once and makes stalls on demand.

    Args:
        cpu: to stall; the process is pinned to it on the first request.
        busy: whether a task runs there when an interrupt stalls it.
    """

    def __init__(self, cpu: int, *, busy: bool) -> None:
        self._cpu = cpu
        self._busy = busy
        self._stalls: dict[Kind, Stall] = {}
        self._pinned = False

    def handle(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """``{"kind", "duration_ms"}`` → :class:`~tests.injector.stalls.Made` as a mapping.

        Without a duration, the kind is only prepared; with ``reads`` it reads a file slowly.
        """
        kind = Kind(request["kind"])
        stall = self._stalls.get(kind) or self._prepare(kind)
        if "duration_ms" not in request:
            return {}
        duration_ns = checked_duration_ns(request["duration_ms"])
        system.set_comm(METHODS[kind].comm)
        try:
            if "reads" in request:
                return stall.make_reading(duration_ns, request["reads"])._asdict()
            return stall.make(duration_ns)._asdict()
        finally:
            system.set_comm("inj-worker")

    def close(self) -> None:
        """Take down what the kinds set up."""
        for stall in self._stalls.values():
            stall.close()

    def _prepare(self, kind: Kind) -> Stall:
        if not self._pinned:
            system.pin(self._cpu)
            system.enter_new_netns()
            self._pinned = True
        return self._stalls.setdefault(kind, prepare(kind, self._cpu, busy=self._busy))


def main() -> None:
    """Serve until the injector closes the pipe."""
    cpu, busy = be_child("inj-worker")
    worker = Worker(int(cpu), busy=busy == "busy")
    try:
        serve(worker.handle)
    finally:
        worker.close()


if __name__ == "__main__":
    main()
