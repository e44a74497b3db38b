"""``make demo``: the detector, one real bounded stall of each kind, and what was caught."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.injector import METHODS, Injector, InjectorError, Kind, Pressure
from tests.injector.system import other_cpu

DURATION_MS = 100.0
KINDS = (
    Kind.BH_OFF,
    Kind.IRQS_OFF_TIMER,
    Kind.SOFTIRQ_HOG,
    Kind.PREEMPT_OFF,
    Kind.CPU_CONTENTION,
)
COMMAND = str(Path(sys.executable).with_name("softirq-stalld"))


def main() -> int:
    """Run the demonstration; the exit status is 0 when every stall was caught."""
    cpu = max(os.sched_getaffinity(0))
    if other_cpu(cpu) == cpu:
        print("the demonstration needs two CPUs: one that stalls, one that sends packets")
        return 1
    missed = 0
    for kind in KINDS:
        method = METHODS[kind]
        print(f"\n=== {kind}: {method.means}", flush=True)
        with tempfile.TemporaryFile("w+") as output:
            caught = demonstrate(kind, cpu, output.fileno())
            output.seek(0)
            shown = [line for line in output if " started " not in line and " stopped " not in line]
        print("".join(shown), end="")
        missed += not caught or not any(method.comm in line for line in shown)
    print(f"\n{'every stall was caught' if not missed else f'{missed} kinds were not caught'}")
    return 1 if missed else 0


def demonstrate(kind: Kind, cpu: int, output: int) -> bool:
    """Run the detector beside one stall; False when the stall could not be made."""
    with subprocess.Popen([COMMAND, "run", "--format", "text"], stdout=output) as daemon:
        try:
            deadline = time.monotonic() + 60
            while os.fstat(output).st_size == 0:
                if daemon.poll() is not None or time.monotonic() > deadline:
                    print("the detector did not start")
                    return False
                time.sleep(0.05)
            with Injector(cpu) as injector, Pressure(cpu, METHODS[kind].pressure) as pressure:
                truth = injector.inject(kind, DURATION_MS, pressure=pressure)
            print(
                f"    injected: {truth.comm} (pid {truth.pid}) "
                f"stalled CPU {truth.cpu} for {truth.duration_ms:.1f} ms"
            )
            time.sleep(0.3)
        except InjectorError as error:
            print(f"    could not be injected: {error}")
            return False
        finally:
            daemon.terminate()
    return True


if __name__ == "__main__":
    sys.exit(main())
