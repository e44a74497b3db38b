"""What the records of a stall prove: who had the CPU, for how long, and how."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Container, Sequence
from functools import lru_cache
from typing import NamedTuple

from stalld.enrich.stack import leaves_interrupt, reaches_base
from stalld.records import (
    KSOFTIRQD,
    LOOKBACK_SAMPLES,
    VEC_NONE,
    VECTORS,
    Source,
    StallRecord,
    TickKind,
    TickSample,
)
from stalld.rings import device_of
from stalld.track.gather import Stall
from stalld.track.model import Blocker, Handler, Net, Observation, Tick
from stalld.track.verdict import Evidence, Verdict

STUCK_PART = 3
"""A task is stuck in the kernel when it was there for this part of the stall."""
MAIN_PART = 2
"""What is to explain a stall by itself must have lasted for this part of it."""

_U32 = 0xFFFFFFFF
_NET_RX = VECTORS.index("NET_RX")
# Where interrupts are enabled again: the first interrupt after comes right there.
_ENABLES_INTERRUPTS = re.compile(
    r"_*raw_(?:spin|read|write)_(?:rt_)?unlock_irq(?:restore)?|finish_task_switch"
    r"|(?:raw_)?local_irq_(?:enable|restore)"
)


def weigh(
    stall: Stall,
    threshold_ns: int,
    serves_inline: bool | None,
    tells_steal: bool,
    *,
    threaded: bool = False,
) -> Evidence:
    """The evidence as of now."""
    during = stall.during
    starved = max(stall.wait_ns) >= threshold_ns
    late = [o for o in during if max(o.record.wait_ns) >= threshold_ns]
    closing = stall.closing
    gave_way = [closing] if closing and closing.record.source is Source.SWITCH else []
    main_ns = max(threshold_ns, stall.duration_ns / MAIN_PART)
    stolen_ns = stall.stolen_ns()
    # The ring holds no tick any more to count from.
    forgotten = stolen_ns is None and stall.keeps_steal()
    stolen_ns = stolen_ns or 0
    handler = longest_handler(stall, threshold_ns)
    waits = (stall.ksoftirqd_wait_ns, *stall.waiting.values())
    return Evidence(
        stolen=stolen_ns >= main_ns,
        late=stall.late_ns - stolen_ns >= main_ns,
        steal_told=tells_steal and not forgotten,
        interrupts_enabled=any(
            o.record.source is Source.NMI or enabled_interrupts(o) for o in after_late(stall)
        ),
        handler_long=handler is not None
        and handler.service_ns >= main_ns
        and not was_preempted(stall, handler.vec),
        starved=starved,
        starved_modes=frozenset(o.mode for o in late),
        handler_ran=any(o.record.serving_vec != VEC_NONE for o in late),
        enabled_late=closing is not None and closing.bottom_halves_enabled,
        waited=max(waits) >= threshold_ns,
        ksoftirqd_runnable=stall.ksoftirqd_wait_ns > 0,
        serves_inline=serves_inline,
        threaded=threaded,
        # While the hypervisor had the CPU nobody was anywhere, wherever in the stall that was.
        stuck=longest_in_kernel_ns(during, closing, stall.user_ticks_ns()) - stolen_ns
        >= max(threshold_ns, stall.duration_ns / STUCK_PART),
        user=any(o.task_mode == "user" for o in (*stall.observations, *gave_way)),
        others=stall.switches > 0 or len({o.record.tid for o in during}) > 1,
    )


def after_late(stall: Stall) -> list[Observation]:
    """The observation made by the tick that came too late, and NMIs before it."""
    found = [o for o in stall.observations if o.record.source is Source.NMI]
    for observation in (*stall.observations, *([stall.closing] if stall.closing else [])):
        record = observation.record
        if record.source is Source.TICK and record.late_ns:
            return [*found, observation]
    return found


def enabled_interrupts(observation: Observation) -> bool:
    """Whether the innermost function is one that has just enabled interrupts."""
    if observation.mode != "kernel" or not observation.frames:
        return False
    name = observation.frames[0].partition("+0x")[0].partition(".")[0]
    return _ENABLES_INTERRUPTS.fullmatch(name) is not None


def longest_in_kernel_ns(
    during: list[Observation], closing: Observation | None, user_ns: Sequence[int] = ()
) -> int:
    """How long one task stayed in the kernel, for all that the samples show.

    A task has had the CPU since the last context switch, or since the stall began; two
    samples of it with no switch between them show that it had it all the time. It was in
    the kernel since the last sample, or tick (``user_ns``), that found user code.
    """
    longest = 0
    since = 0
    user_until_ns = 0
    before: Observation | None = None
    for now in during:
        record = now.record
        same = before is not None and (
            before.record.tid == record.tid and before.record.switches == record.switches
        )
        if now.task_mode != "kernel":
            before = None
            if now.task_mode == "user":
                user_until_ns = record.time_ns
            continue
        if not same:
            since = max(record.started_ns, record.switched_ns, user_until_ns)
        since = max((since, *(at for at in user_ns if at <= record.time_ns)))
        longest = max(longest, record.time_ns - since)
        before = now
    if (
        before
        and closing
        and closing.task_mode != "user"
        and closing.record.switches == before.record.switches
    ):
        end_ns = closing.record.time_ns
        since = max((since, *(at for at in user_ns if at <= end_ns)))
        longest = max(longest, end_ns - since)
    return longest


def longest_handler(stall: Stall, threshold_ns: int) -> Handler | None:
    """The softirq handler that ran longest, where that was the threshold or longer."""
    records = [o.record for o in stall.observations]
    if stall.closing:
        records.append(stall.closing.record)
    record = max(records, key=lambda r: r.served_ns, default=None)
    if record is None or record.served_ns < threshold_ns or record.served_vec == VEC_NONE:
        return None
    # The tracepoint comes when a poll is over, so seldom before the last record.
    polled = next((r for r in reversed(records) if r.napi_budget), None)
    # What was polled after another vector's handler has no part in that.
    if polled is None or record.served_vec != _NET_RX:
        return Handler(record.served_vec, record.served_ns, None, None, None)
    _, device = device_of(polled.napi_ifindex, polled.napi_name)
    return Handler(
        record.served_vec, record.served_ns, device, polled.napi_work, polled.napi_budget
    )


def was_preempted(stall: Stall, vec: int) -> bool:
    """Whether samples taken while this handler was in service hit somebody else.

    With PREEMPT_RT handlers are preempted like any task, and their time goes on meanwhile.
    """
    for observation in stall.during:
        if observation.record.serving_vec != vec:
            continue
        outside = observation.mode == "kernel" and is_whole(observation.frames)
        if observation.mode in ("user", "idle") or outside:
            return True
    return False


def main_observation(stall: Stall) -> Observation | None:
    """What stands for the stall: the first sample of the task, and stack, seen longest."""
    return _most_seen(stall.during or stall.observations or _let_go(stall.closing))


def _most_seen(observations: list[Observation]) -> Observation | None:
    """A sample stands for the time since the one before, as their spacing grows."""
    if len(observations) < 2:
        return observations[0] if observations else None
    tasks: Counter[int] = Counter()
    paths: Counter[tuple[int, tuple[str, ...]]] = Counter()
    before_ns = observations[0].record.started_ns
    for observation in observations:
        record = observation.record
        spent_ns = max(1, record.time_ns - before_ns)
        before_ns = record.time_ns
        tasks[record.tid] += spent_ns
        paths[record.tid, path(observation.frames)] += spent_ns
    tid = tasks.most_common(1)[0][0]
    whole = {key: reaches_base(key[1]) for key in paths}
    # A walk that ended early says little, however long that sample stands for.
    longest = max((k for k in paths if k[0] == tid), key=lambda k: (whole[k], paths[k]))
    return next(o for o in observations if (o.record.tid, path(o.frames)) == longest)


def _let_go(closing: Observation | None) -> list[Observation]:
    """The closing record, unless a watched thread wrote it, who did not stand in its own way."""
    if closing is None:
        return []
    record = closing.record
    # A slot keeps the pid of its last waiter; ksoftirqd's is always its own.
    waited = {pid for pid, ns in zip(record.waiter_pid, record.waiter_ns, strict=True) if ns}
    waited.add(record.waiter_pid[KSOFTIRQD])
    return [] if record.tid and record.tid in waited else [closing]


def shows_whole_stack(stall: Stall) -> bool:
    """Whether what stands for the stall has one, down to where the task entered the kernel."""
    main = main_observation(stall)
    return main is not None and is_whole(main.frames)


def main_consumer(stall: Stall) -> TickSample | None:
    """The task seen at most ticks of the stall; None where the ring does not hold them all.

    The samples thin out as a stall goes on, the ring has every tick.
    """
    inside = stall.ticks_inside()
    if not 0 < len(inside) < LOOKBACK_SAMPLES:
        return None
    tid = Counter(tick.tid for tick in inside).most_common(1)[0][0]
    own = [tick for tick in inside if tick.tid == tid]
    return next((tick for tick in own if tick.kind is TickKind.STACK), own[0])


class Culprit(NamedTuple):
    """Who had the CPU, and the stack that shows it; ``seen`` is None without a record."""

    blocker: Blocker | None = None
    frames: tuple[str, ...] = ()
    user_stack: tuple[int, ...] = ()
    captured: str = "none"
    seen: Observation | None = None


def culprit_of(stall: Stall, verdict: Verdict, explain: Callable[[TickSample], Tick]) -> Culprit:
    """Who is to blame under this verdict."""
    main = main_observation(stall)
    if main is None or verdict is Verdict.VCPU_PREEMPTED:
        return Culprit()  # Nobody of this machine had the CPU.
    if verdict is Verdict.CPU_CONTENTION:
        consumer = main_consumer(stall)
        if consumer is not None and consumer.tid != main.record.tid:
            sampled = [o for o in stall.during if o.record.tid == consumer.tid]
            if not sampled:
                tick = explain(consumer)
                return Culprit(blocker_at(tick), tick.frames, (), "during")
            main = sampled[0]
    if verdict is Verdict.IRQS_DISABLED:
        # Only an NMI shows what had them off.
        main = _most_seen([o for o in stall.during if o.record.source is Source.NMI]) or main
    blocker = blocker_of(main)
    captured = "during" if main in stall.during else "after"
    if verdict is Verdict.IRQS_DISABLED and main.record.source is not Source.NMI:
        # The tick had to wait as well: it came when interrupts were enabled again.
        captured = "after"
        if blocker.mode == "user" or (main.frames and leaves_interrupt(main.frames[0])):
            # User code cannot disable them: an interrupt was being handled.
            blocker = blocker._replace(mode="hardirq")
    if not (main.record.kernel_stack or main.frames):
        captured = "none"
    # The walker may end on a null frame pointer.
    user_stack = tuple([address for address in main.record.user_stack if address])
    return Culprit(blocker, main.frames, user_stack, captured, main)


def blocker_of(observation: Observation) -> Blocker:
    """Who had the CPU, from a record."""
    record = observation.record
    return Blocker(
        record.tgid,
        record.tid,
        record.comm,
        observation.mode,
        record.policy,
        record.prio,
        record.cgroup_id,
    )


def blocker_at(tick: Tick) -> Blocker:
    """Who had the CPU, from the ring."""
    sample = tick.sample
    return Blocker(
        sample.tgid, sample.tid, sample.comm, tick.mode, sample.policy, sample.prio, None
    )


def net_of(stall: Stall, near_ns: int, counts: Container[str]) -> Net:
    """What the CPU did for the network during the stall.

    Args:
        counts: see ``Host.counts``.
        near_ns: a tick that came longer before the stall tells of another time: an idle
            CPU has none, and on a busy one the ring may have gone on.
    """
    last = stall.last_record
    tick = stall.last_tick_before()
    if last is None:
        return Net(0, 0, None, None, stall.polled)
    base: TickSample | StallRecord = last
    served_ns = 0
    if tick is not None and tick.time_ns >= stall.started_ns - near_ns:
        base = tick
    elif stall.observations:
        base = stall.observations[0].record
        # The handler that runs now belongs to the stall as a whole.
        served_ns = base.served_ns if base.serving_vec == _NET_RX else 0

    # 0: the tick's timer is not known yet, or there was never a packet.
    known = last.processed > 0

    def grown(before: int, now: int, place: str) -> int | None:
        return (now - before) & _U32 if known and place in counts else None

    return Net(
        runs=(last.net_rx_runs - base.net_rx_runs) & _U32,
        service_ns=max(0, last.net_rx_ns - base.net_rx_ns + served_ns),
        packets=grown(base.processed, last.processed, "softnet"),
        squeezed=grown(base.squeezed, last.squeezed, "softnet"),
        dropped=grown(base.dropped, last.dropped, "dropped"),
        received_rps=grown(base.received_rps, last.received_rps, "received_rps"),
        flow_limited=grown(base.flow_limit, last.flow_limit, "flow_limit"),
        backlog=grown(0, last.backlog, "backlog"),
        napi=stall.polled,
    )


@lru_cache(maxsize=256)
def is_whole(frames: tuple[str, ...]) -> bool:
    """Whether the walk of a stack went down to its base."""
    return reaches_base(path(frames))


@lru_cache(maxsize=256)
def path(frames: tuple[str, ...]) -> tuple[str, ...]:
    """A stack without offsets: samples of one loop count as one."""
    return tuple([sys.intern(frame.partition("+0x")[0]) for frame in frames])
