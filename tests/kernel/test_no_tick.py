"""Where the tick cannot be traced, a stall is still seen when it ends."""

from __future__ import annotations

import time

import pytest

from stalld.decode import decode, is_task
from stalld.kthreads import Watched, iterate_tasks
from stalld.probe.attacher import PROGRAMS
from stalld.probe.btf import VMLINUX_BTF
from stalld.probe.client import ProbeChild, bpf_directory, possible_cpus
from stalld.probe.protocol import Request
from stalld.reader import PerfReader
from stalld.records import KSOFTIRQD, VECTORS, RecordType, Source, StallRecord
from stalld.state import Maps
from tests.injector import Injector, Kind, Mode, Pressure
from tests.kernel.daemon import STALLED_CPU as CPU

pytestmark = pytest.mark.kernel

THRESHOLD_NS = 10_000_000
NET_RX = VECTORS.index("NET_RX")


def test_stalls_are_seen_at_their_end() -> None:
    """Without the sampler each kind of wait gives one closing record, with wait and stack."""
    hooks = [hook for hook in PROGRAMS if hook not in ("hrtimer_expire_entry", "lookback")]
    probes = ProbeChild(Request(possible_cpus(), str(bpf_directory()), VMLINUX_BTF, hooks)).result()
    records: list[StallRecord] = []

    def take(data: bytes) -> None:
        if not is_task(data):
            records.append(decode(data))

    try:
        assert "link:hrtimer_expire_entry" not in probes.fds
        maps = Maps(probes.fds["map:cpus"], probes.fds["map:config"], possible_cpus())
        Watched(probes.fds["map:watched"], maps, ()).learn(iterate_tasks(probes.fds["iter:task"]))
        reader = PerfReader(probes.fds["map:events"], take)
        maps.watch(THRESHOLD_NS, tick_ns=4_000_000, vec_mask=1 << NET_RX, max_samples=16)
        with Injector(CPU) as injector:
            with Pressure(CPU, Mode.PING) as pressure:
                held = injector.inject(Kind.BH_OFF, 40, pressure=pressure)
            with Pressure(CPU, Mode.FLOOD) as pressure:
                ran = [
                    injector.inject(Kind.CPU_CONTENTION, 40, pressure=pressure) for _ in range(5)
                ]
        time.sleep(0.1)
        reader.consume()
        reader.close()
    finally:
        probes.close()

    ours = [r for r in records if r.cpu == CPU]
    late = [r for r in ours if r.source is Source.ENTRY and r.tid == held.tid]
    assert [r.type for r in late] == [RecordType.CLOSE]
    assert late[0].wait_ns[NET_RX] > 30_000_000
    assert late[0].sample_nr == 0
    assert late[0].kernel_stack
    waits = [r for r in ours if r.source is Source.SWITCH and r.time_ns >= ran[0].start_ns]
    assert len(waits) >= 3
    assert all(r.waiter_ns[KSOFTIRQD] >= THRESHOLD_NS for r in waits)
    assert all(r.kernel_stack for r in waits)
    # What ran in between is counted from the wait's begin on, although no tick began the stall.
    assert any(r.switches for r in waits)
