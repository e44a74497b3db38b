"""What each BPF program costs a run, from the kernel's own statistics of them.

    python -m bench.hot_path [--times N] [--rounds N] [--seconds S] [--against CHECKOUT]

Ours and an empty program are on each hook at the same time, so that both see the very same
events; with ``--against`` so are the programs of another checkout. Two loads, each pinned to
one CPU: a pipe ping-pong for switches, wake-ups and ticks, and a flood of packets over veth for
softirqs. Rounds take turns in the order of attaching, since the first program on a hook takes
the cache misses. All are loaded anew a few times: where the kernel happens to put a program's code
moves its cost, and that of the empty one, by some ns.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from bench.bpf import SETTLE_S, BenchError, Programs, costs, empty, statistics_enabled
from bench.command import run
from bench.loads import CPU, Flood
from bench.processes import our_programs, tool
from bench.row import Goal, Row, differences, row, spread, unmeasured
from stalld.probe.attacher import HOOKS, PROGRAMS

TIMES, ROUNDS, SECONDS = 4, 4, 1.0
GOALS = {
    "sched_switch": Goal(5, "ns", "against"),
    "sched_wakeup": Goal(10, "ns", "against"),
    "hrtimer_expire_entry": Goal(20, "ns", "against"),
}
"""By our name of the program."""
SOFTIRQS = ("softirq_raise", "softirq_entry", "softirq_exit")
SOFTIRQS_GOAL = Goal(120, "ns", "against")
MEANS = {"hrtimer_expire_entry": "tick", "lookback": "tick, the look-back's own program"}
RARE = {"cpuhp_enter"}
"""Programs that run only when a CPU comes or goes."""
NOTES = {"lookback": "most ticks cost little, every fourth walks a stack; can be turned off"}
FEWEST_RUNS = 50
"""In a round: fewer say nothing. A busy CPU has 100 ticks a second at least."""
NO_REFERENCE = "no empty program can be on its hook: with what the timing itself takes"

Means = dict[str, dict[str, list[float]]]
"""Program → side → ns a run, once for each round."""


def our_name(hook: str, name: str) -> str:
    """What we call the program that the kernel knows by this name on this hook."""
    for ours, function in PROGRAMS.items():
        if HOOKS.get(ours, ours) == hook and function.startswith(name):
            return ours
    return f"{hook}: {name}"


def rounds_of(
    sides: Mapping[str, Programs], loads: Sequence[Callable[[], object]], rounds: int
) -> list[Means]:
    """What each load had each program cost, side by side."""
    found = [_nothing() for _ in loads]
    names = list(sides)
    for number in range(rounds):
        with ExitStack() as stack:
            for side in reversed(names) if number % 2 else names:
                stack.callback(sides[side].detach)
                sides[side].attach()
            time.sleep(SETTLE_S)
            for load, means in zip(loads, found, strict=True):
                for side, name, ns in _means(sides, load):
                    means[name][side].append(ns)
    return found


def _nothing() -> Means:
    return defaultdict(lambda: defaultdict(list))


def _means(
    sides: Mapping[str, Programs], load: Callable[[], object]
) -> Iterator[tuple[str, str, float]]:
    with statistics_enabled():
        before = costs(sides)
        load()
        after = costs(sides)
    for key, cost in after.items():
        side, hook, name = key
        runs = cost.runs - before[key].runs
        if runs >= FEWEST_RUNS:
            own = hook if side == "empty" else our_name(hook, name)
            yield side, own, (cost.ns - before[key].ns) / runs


def pipe(seconds: float) -> None:
    """Switches and wake-ups all the time, and a busy CPU's ticks; no softirq but theirs."""
    command = ["taskset", "-c", str(CPU), tool("perf", "linux-perf"), "bench"]
    process = subprocess.Popen(
        [*command, "sched", "pipe", "-l", "100000000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        time.sleep(seconds)
        if process.poll() is not None:
            raise BenchError(f"perf bench sched pipe ended, status {process.returncode}")
    finally:
        # perf has a partner, which would wait for it for good.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def packets(flood: Flood, seconds: float) -> None:
    """Softirqs all the time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        flood.packet_us(10_000)


def measure(
    times: int = TIMES,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    against: str | None = None,
) -> list[Row]:
    """A row for each program, and one for the three of the softirqs together."""
    by_pipe, by_flood = _nothing(), _nothing()
    for _ in range(times):
        for sums, means in zip(
            (by_pipe, by_flood), _loaded_once(rounds, seconds, against), strict=True
        ):
            for name, sides in means.items():
                for side, values in sides.items():
                    sums[name][side] += values
    return [*_rows(by_pipe, by_flood, against), *_softirqs(by_flood)]


def _loaded_once(rounds: int, seconds: float, against: str | None) -> list[Means]:
    """What the pipe and the packets had each program cost."""
    with ExitStack() as stack:
        sides = {"ours": stack.enter_context(our_programs())}
        hooks = list(dict.fromkeys(p.hook for p in sides["ours"].programs if p.hook))
        sides["empty"] = stack.enter_context(empty(hooks))
        if against:
            programs = our_programs(checkout=Path(against).resolve())
            sides["theirs"] = stack.enter_context(programs)
        flood = stack.enter_context(Flood())
        loads = [lambda: pipe(seconds), lambda: packets(flood, seconds)]
        return rounds_of(sides, loads, rounds)


def _rows(by_pipe: Means, by_flood: Means, against: str | None) -> Iterator[Row]:
    for name in (name for name in PROGRAMS if name not in RARE):
        softirq = name in SOFTIRQS or name == "napi_poll"
        means = (by_flood if softirq else by_pipe)[name]
        full = f"a run of {MEANS.get(name, name)}"
        goal = GOALS.get(name)
        own = means["ours"]
        base = (by_flood if softirq else by_pipe)[HOOKS.get(name, name)]["empty"]
        if name in HOOKS.values():
            # Never the first on its hook, so it is held against an empty one that is not either.
            own, base = own[::2], base[::2]
        if not own or len(own) != len(base):
            yield unmeasured(full, "its hook was hardly called, or it was not attached", goal)
            continue
        why = NOTES.get(name, f"under the load of the {'packets' if softirq else 'pipe'}")
        why += f"; {len(own)} rounds"
        if against:
            why += f"; {against}: {spread(means['theirs'], 'ns').text}"
        yield row(
            full,
            spread(own, "ns"),
            reference=spread(base, "ns"),
            against=differences(own, base, "ns"),
            goal=goal,
            why=why,
        )


def _softirqs(by_flood: Means) -> Iterator[Row]:
    functions = [name for name in by_flood if name.startswith(": ")]
    for name in functions:
        yield row(f"a run of {name[2:]}", spread(by_flood[name]["ours"], "ns"), why=NO_REFERENCE)
    name = "raise, entry and exit of a softirq together"
    without = f", without {' and '.join(each[2:] for each in functions)}" if functions else ""
    own = [by_flood[hook]["ours"] for hook in SOFTIRQS]
    base = [by_flood[hook]["empty"] for hook in SOFTIRQS]
    if not all(own) or len({len(values) for values in own + base}) != 1:
        yield unmeasured(name, "one of them was not attached", SOFTIRQS_GOAL)
        return
    ours = [sum(values) for values in zip(*own, strict=True)]
    empties = [sum(values) for values in zip(*base, strict=True)]
    yield row(
        name,
        spread(ours, "ns"),
        reference=spread(empties, "ns"),
        against=differences(ours, empties, "ns"),
        goal=SOFTIRQS_GOAL,
        why=f"under the load of the packets{without}",
    )


if __name__ == "__main__":
    sys.exit(
        run(
            __doc__,
            measure,
            ("times", TIMES, "that all programs are loaded"),
            ("rounds", ROUNDS, "of all loads each time, an even number"),
            ("seconds", SECONDS, "of each load in a round"),
            ("against", None, "another checkout of this project"),
        )
    )
