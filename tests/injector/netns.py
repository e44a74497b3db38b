"""The process that owns namespace, veth pair and senders: ``python -m tests.injector.netns PPID``.

The namespace has no name: it ends with this process, and the veth pair with it.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Mapping
from typing import Any

from tests.injector import build, senders, system
from tests.injector.child import be_child, serve
from tests.injector.kinds import Mode
from tests.injector.libbpf import INGRESS, BpfObject

_HOST_MAC = "02:00:00:00:01:01"
_NETNS_MAC = "02:00:00:00:01:02"
_PING_PRIORITY = 10


class Netns:
    """State of the process."""

    def __init__(self) -> None:
        self._tasks: list[int] = []
        self._paused: list[int] = []
        pid = os.getpid()
        self._interface = f"inj{pid}"
        # A /30 of the network for benchmarks (RFC 2544), another one for each process.
        base = pid % (1 << 15) * 4
        prefix = f"198.{18 + (base >> 16)}.{base >> 8 & 255}"
        self._host = f"{prefix}.{(base & 255) + 1}"
        self._here = f"{prefix}.{(base & 255) + 2}"

    def handle(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Do one of "set up", "start" and "stop"."""
        if request["what"] == "set up":
            return self._set_up(request)
        number = signal.SIGCONT if request["what"] == "start" else signal.SIGSTOP
        for pid in self._paused:
            os.kill(pid, number)
        return {}

    def _set_up(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        mode = Mode(request["mode"])
        cpu, from_cpu = request["cpu"], request["from_cpu"]
        self._connect(cpu, int(request["packet_cost_us"] * 1000))
        interval_ns = int(request["interval_ms"] * 1e6)
        if mode is Mode.PING:

            def ping() -> None:
                system.make_fifo(_PING_PRIORITY)
                senders.ping(self._host, interval_ns, request["probes_fd"])

            self._tasks.append(system.fork_task("inj-ping", from_cpu, ping))
        else:
            burst = request["burst"]
            self._fork_paused(
                "inj-flood", from_cpu, lambda: senders.flood(self._host, burst, interval_ns)
            )
            if request["competitor"]:
                self._fork_paused("inj-competitor", cpu, senders.compete)
        return {"interface": self._interface}

    def _fork_paused(self, comm: str, cpu: int, task: Callable[[], None]) -> None:
        def wait_then_run() -> None:
            os.kill(os.getpid(), signal.SIGSTOP)
            task()

        pid = system.fork_task(comm, cpu, wait_then_run)
        self._tasks.append(pid)
        self._paused.append(pid)
        os.waitpid(pid, os.WUNTRACED)

    def close(self) -> None:
        """End the senders."""
        while self._tasks:
            system.end_task(self._tasks.pop())

    def _connect(self, cpu: int, packet_cost_ns: int) -> None:
        """Make the veth pair; this process ends up in the new namespace."""
        outside = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        system.enter_new_netns()
        inside = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        system.no_ipv6("default")
        system.ip_batch(
            [
                f"link add peer0 address {_NETNS_MAC} type veth"
                f" peer name {self._interface} address {_HOST_MAC} netns {os.getppid()}",
                f"address add {self._here}/30 dev peer0",
                f"neighbour add {self._host} lladdr {_HOST_MAC} dev peer0 nud permanent",
                "link set peer0 up",
            ]
        )
        system.enter_netns(outside)
        self._set_up_host_end(cpu, packet_cost_ns)
        system.enter_netns(inside)
        os.close(outside)
        os.close(inside)

    def _set_up_host_end(self, cpu: int, packet_cost_ns: int) -> None:
        system.no_ipv6(self._interface)
        system.write_file(f"/sys/class/net/{self._interface}/queues/rx-0/rps_cpus", rps_mask(cpu))
        with BpfObject(build.compiled("pressure")) as bpf:
            bpf.update(bpf.map_fd("cost_ns"), 0, packet_cost_ns.to_bytes(8, "little"))
            index = socket.if_nametoindex(self._interface)
            bpf.attach_tc("flooded_packet", index, INGRESS)
        system.ip_batch(
            [
                f"address add {self._host}/30 dev {self._interface}",
                f"neighbour add {self._here} lladdr {_NETNS_MAC} dev {self._interface}"
                " nud permanent",
                f"link set {self._interface} up",
            ]
        )


def rps_mask(cpu: int) -> str:
    """A CPU as a bit mask in the kernel's form: 32-bit words in hex, highest first."""
    return ",".join([f"{1 << cpu % 32:x}", *["0"] * (cpu // 32)])


def main() -> None:
    """Serve until the injector closes the pipe."""
    be_child("inj-netns")
    netns = Netns()
    try:
        serve(netns.handle)
    finally:
        netns.close()


if __name__ == "__main__":
    main()
