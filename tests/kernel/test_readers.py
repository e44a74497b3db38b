"""Perf buffers, symbol rings and the sampler while a CPU really goes offline and comes back."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from stalld import perf
from stalld.enrich.ksymbols import KsymbolError, KsymbolFeed
from stalld.perf import NmiSampler, SamplerError
from stalld.reader import Changed, PerfReader, online_cpus
from stalld.reading import Reading
from tests.injector import build
from tests.injector.libbpf import BpfObject
from tests.kernel.test_symbols import load_program, mine, wait_for

pytestmark = pytest.mark.kernel

CPU = 1
ROUNDS = 5
HZ = 200

# Runs by request on any CPU; numbers its records and counts those for which there was no room.
SOURCE = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, 4);
	__uint(value_size, 4);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} written SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u64);
} samples SEC(".maps");

SEC("raw_tp/sys_enter")
int write_record(void *ctx)
{
	__u32 zero = 0, one = 1;
	__u64 *number = bpf_map_lookup_elem(&written, &zero);
	__u64 *failed = bpf_map_lookup_elem(&written, &one);

	if (!number || !failed)
		return 0;
	*number += 1;
	if (bpf_perf_event_output(ctx, &events, BPF_F_CURRENT_CPU, number, sizeof(*number)))
		*failed += 1;
	return 0;
}

SEC("perf_event")
int count_sample(void *ctx)
{
	__u32 cpu = bpf_get_smp_processor_id();
	__u64 *count = bpf_map_lookup_elem(&samples, &cpu);

	if (count)
		*count += 1;
	return 0;
}

char _license[] SEC("license") = "GPL";
"""


class Programs(BpfObject):
    """The programs above."""

    def program_fd(self, name: str) -> int:
        """Descriptor of a program, ours to use until it is closed."""
        return int(self._so.bpf_program__fd(self._program(name)))

    def write(self, cpu: int, count: int = 1) -> None:
        """Write records on a CPU."""
        for _ in range(count):
            self.run_on_cpu("write_record", cpu)

    @property
    def written(self) -> int:
        """The number of the last record."""
        return self._number("written", 0)

    @property
    def failed(self) -> int:
        """How many records found no buffer."""
        return self._number("written", 1)

    def samples(self, cpu: int) -> int:
        """How often the sampler's program ran there."""
        return self._number("samples", cpu)

    def _number(self, name: str, index: int) -> int:
        return int.from_bytes(self.lookup(self.map_fd(name), index, 8), "little")


class Hotplug:
    """Takes CPU 1 offline and back."""

    path = Path(f"/sys/devices/system/cpu/cpu{CPU}/online")

    def set(self, online: bool) -> None:
        """Returns when it is done."""
        if self.path.read_text().strip() != str(int(online)):
            self.path.write_text(str(int(online)))

    def off_and_on(self) -> None:
        """Between two looks of anybody."""
        self.set(False)
        self.set(True)


@pytest.fixture
def hotplug() -> Iterator[Hotplug]:
    found = Hotplug()
    if not os.access(found.path, os.W_OK):
        pytest.skip(f"CPU {CPU} cannot be taken offline (CONFIG_HOTPLUG_CPU): no {found.path}")
    affinity = os.sched_getaffinity(0)
    try:
        yield found
    finally:
        found.set(True)
        os.sched_setaffinity(0, affinity)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Programs]:
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "_cache", lambda: tmp_path)
    (tmp_path / "readers.bpf.c").write_text(SOURCE)
    with Programs(build.compiled("readers")) as loaded:
        yield loaded


class Readings:
    """A started `Reading` and the records it gave."""

    def __init__(self, programs: Programs) -> None:
        self.numbers: list[int] = []
        self.readers: list[str] = []
        self.errors: list[BaseException] = []
        self.follow_ups = 0
        self.reader = PerfReader(programs.map_fd("events"), self._take)
        self.reading = Reading(self.reader, self._on_read, self.errors.append)

    def _take(self, data: bytes) -> None:
        self.numbers.append(int.from_bytes(data[:8], "little"))
        self.readers.append(threading.current_thread().name)

    def _on_read(self) -> None:
        self.follow_ups += 1

    async def settled(self) -> None:
        """Wait until the loop has taken what nobody waited for."""
        await asyncio.sleep(0.15)

    async def arrive(self, programs: Programs) -> str:
        """Wait for the last record written; the thread that read it."""
        await until(lambda: self.numbers and self.numbers[-1] == programs.written)
        return self.readers[-1]

    def far(self) -> set[int] | None:
        """Where the reader thread may run."""
        for thread in threading.enumerate():
            if thread.name == "stalld-reader":
                return os.sched_getaffinity(thread.native_id or 0)
        return None


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def run(
    programs: Programs,
    test: Callable[[Readings], Awaitable[None]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
) -> None:
    """Run a test in a loop, with reading started; no descriptor is left afterwards."""

    async def whole() -> None:
        readings = Readings(programs)
        try:
            with readings.reader.lock:
                readings.reading.start()
            await test(readings)
        finally:
            readings.reading.close()
            readings.reader.close()
        assert readings.errors == []

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(asyncio.sleep(0))  # libuv keeps a pair for signals after its first loop
    before = open_fds()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(whole())
    assert open_fds() == before


def open_fds() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def spin(cpu: int, seconds: float) -> None:
    """Use a CPU for so long, from a thread of its own."""

    def loop() -> None:
        os.sched_setaffinity(0, {cpu})
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_cpu_goes_and_comes_back(
    programs: Programs, hotplug: Hotplug, loop: Callable[[], Any]
) -> None:
    """Time and again each CPU's records come, read from the other CPU as long as there are two."""

    async def test(readings: Readings) -> None:
        reading = readings.reading
        fds = 0
        for _ in range(ROUNDS):
            await readings.settled()
            fds = fds or open_fds()
            assert open_fds() == fds
            assert os.sched_getaffinity(0) == {0}
            assert readings.far() == {CPU}
            programs.write(0)
            assert await readings.arrive(programs) == "stalld-reader"
            programs.write(CPU)
            assert await readings.arrive(programs) == "MainThread"

            hotplug.set(False)
            assert reading.refresh() == Changed(lost=frozenset({CPU}))
            await readings.settled()
            assert readings.far() is None
            programs.write(0)
            assert await readings.arrive(programs) == "MainThread"

            hotplug.set(True)
            assert reading.refresh() == Changed(gained=frozenset({CPU}))
            assert reading.refresh({0, CPU}) == Changed()
        programs.write(CPU)
        await readings.arrive(programs)
        assert programs.failed == 0
        assert readings.numbers == list(range(1, programs.written + 1))
        assert readings.follow_ups

    if online_cpus() != [0, CPU]:
        pytest.skip("who reads whom is known for two CPUs")
    run(programs, test, loop)


def test_back_between_two_looks(programs: Programs, hotplug: Hotplug) -> None:
    """A CPU that nobody saw go is deaf until it is suspected, and is heard after that."""

    async def test(readings: Readings) -> None:
        for nth in range(1, ROUNDS + 1):
            hotplug.off_and_on()
            programs.write(CPU)
            assert programs.failed == nth
            assert readings.reading.refresh() == Changed()
            assert readings.reading.refresh({0, CPU}) == Changed(gained=frozenset({CPU}))
            assert readings.reading.refresh({0, CPU}) == Changed()
            programs.write(CPU)
            assert programs.failed == nth
            await readings.arrive(programs)
        assert len(readings.numbers) == ROUNDS

    run(programs, test)


def test_looked_at_while_it_comes(programs: Programs, hotplug: Hotplug) -> None:
    """Who looks all the time sees a CPU come before tasks may run there; all ends as it should."""

    async def test(readings: Readings) -> None:
        affinity = os.sched_getaffinity(0), readings.far()
        for _ in range(ROUNDS):
            for online in (False, True):
                switch = asyncio.create_task(asyncio.to_thread(hotplug.set, online))
                while not switch.done():
                    readings.reading.refresh({CPU})
                    programs.write(0)
                    await asyncio.sleep(0)
                await switch
                readings.reading.refresh({CPU})
            await until(lambda: (os.sched_getaffinity(0), readings.far()) == affinity)
            programs.write(CPU)
            await until(lambda: len(readings.numbers) == programs.written)
        assert programs.failed == 0
        # In the order of each CPU; the buffers of different ones are read side by side.
        assert sorted(readings.numbers) == list(range(1, programs.written + 1))

    run(programs, test)


def test_no_record_is_lost_with_its_cpu(programs: Programs, hotplug: Hotplug) -> None:
    """What waits in the buffer of a CPU that went is handed over, in order, and only once."""
    numbers: list[int] = []
    reader = PerfReader(
        programs.map_fd("events"), lambda data: numbers.append(int.from_bytes(data[:8], "little"))
    )
    try:
        programs.write(CPU, 10)
        hotplug.set(False)
        assert reader.refresh(online_cpus()) == Changed(lost=frozenset({CPU}))
        assert numbers == list(range(1, 11))
        reader.consume([0, CPU])
        hotplug.set(True)
        assert reader.refresh(online_cpus()) == Changed(gained=frozenset({CPU}))
        programs.write(CPU, 10)
        hotplug.off_and_on()
        dead = reader.detached(online_cpus())
        assert dead == {CPU}
        assert reader.refresh(online_cpus(), dead) == Changed(gained=frozenset({CPU}))
        assert numbers == list(range(1, 21))
        programs.write(CPU)
        reader.consume()
        assert numbers == list(range(1, 22))
        hotplug.set(False)
        assert reader.refresh([0]) == Changed(lost=frozenset({CPU}))
        assert reader.refresh([0, CPU]) == Changed()
    finally:
        reader.close()


def test_symbols_are_announced_again(hotplug: Hotplug) -> None:
    """Rings follow the CPUs: what one announced before it went is kept, a gap is said once."""
    try:
        feed = KsymbolFeed.open(online_cpus())
    except KsymbolError as error:
        pytest.skip(f"the kernel does not announce its symbols: {error}")

    def load(name: str) -> None:
        affinity = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {CPU})
        try:
            os.close(load_program(name))
        finally:
            os.sched_setaffinity(0, affinity)

    with feed:
        before = open_fds()
        for _ in range(ROUNDS):
            load("stalld_before")
            hotplug.set(False)
            feed.refresh(online_cpus(), {CPU})
            assert feed.pending()
            drained = feed.drain()
            assert not drained.lost
            assert not mine(drained.events, "stalld_before")[0].removed
            hotplug.set(True)
            feed.refresh(online_cpus())
            assert feed.pending()
            assert feed.drain().lost
            load("stalld_after")
            assert len(wait_for(feed, "stalld_after", 2)) == 2

            hotplug.off_and_on()
            load("stalld_unheard")
            assert not mine(feed.drain().events, "stalld_unheard")
            feed.refresh(online_cpus(), {0, CPU})
            assert feed.drain().lost
            load("stalld_heard")
            assert len(wait_for(feed, "stalld_heard", 2)) == 2
            assert open_fds() == before


def test_sampler_follows_the_cpus(programs: Programs, hotplug: Hotplug) -> None:
    """The program runs on each CPU at about the frequency; also on one that was offline."""
    fd = programs.program_fd("count_sample")
    before = open_fds()
    sampler = NmiSampler.open(fd, online_cpus(), HZ, perf.TYPE_SOFTWARE, perf.SW_CPU_CLOCK)

    def ran(cpu: int) -> int:
        count = programs.samples(cpu)
        spin(cpu, 0.1)
        return programs.samples(cpu) - count

    try:
        assert sampler.cpus == tuple(online_cpus())
        assert ran(0) >= 0.1 * HZ / 2
        opened = open_fds()
        for _ in range(ROUNDS):
            assert ran(CPU) >= 0.1 * HZ / 2
            hotplug.set(False)
            sampler.refresh(online_cpus(), {CPU})
            assert CPU not in sampler.cpus
            hotplug.set(True)
            assert ran(CPU) == 0
            sampler.refresh(online_cpus())
            assert ran(CPU) >= 0.1 * HZ / 2
            hotplug.off_and_on()
            assert ran(CPU) == 0
            sampler.refresh(online_cpus(), {0, CPU})
            assert open_fds() == opened
    finally:
        sampler.close()
    count = programs.samples(0)
    spin(0, 0.05)
    assert programs.samples(0) == count
    assert open_fds() == before


def test_sampler_without_counters(programs: Programs) -> None:
    """Where there are no hardware counters the error says so, and nothing stays open."""
    if any(Path("/sys/bus/event_source/devices").glob("cpu*")):
        pytest.skip("this machine has hardware counters")
    before = open_fds()
    with pytest.raises(SamplerError, match="PMU"):
        NmiSampler.open(programs.program_fd("count_sample"), online_cpus(), HZ)
    assert open_fds() == before


def test_sampler_on_cycles(programs: Programs) -> None:
    """The program runs off the cycle counter of a CPU that is busy in the kernel."""
    if not any(Path("/sys/bus/event_source/devices").glob("cpu*")):
        pytest.skip("no hardware counter of cycles (PMU)")
    cpu = max(online_cpus())
    sampler = NmiSampler.open(programs.program_fd("count_sample"), online_cpus(), HZ)
    try:
        before, until = os.sched_getaffinity(0), time.monotonic() + 0.5
        os.sched_setaffinity(0, {cpu})
        try:
            while time.monotonic() < until:
                os.getrandom(1 << 16)
        finally:
            os.sched_setaffinity(0, before)
        assert programs.samples(cpu) > 0
    finally:
        sampler.close()


def test_sampler_refuses_what_cannot_be(programs: Programs) -> None:
    """A program of another type and a frequency over the limit are errors that leave nothing."""
    before = open_fds()
    event = perf.TYPE_SOFTWARE, perf.SW_CPU_CLOCK
    with pytest.raises(SamplerError, match="not of type perf_event"):
        NmiSampler.open(programs.program_fd("write_record"), online_cpus(), HZ, *event)
    with pytest.raises(SamplerError, match="perf_event_max_sample_rate"):
        NmiSampler.open(programs.program_fd("count_sample"), online_cpus(), 10**9, *event)
    assert open_fds() == before
