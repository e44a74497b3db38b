"""Makes real, bounded softirq stalls and knows their truth.

    with Injector(cpu=1) as injector, Pressure(1, Mode.PING) as pressure:
        truth = injector.inject(Kind.BH_OFF, 100, pressure=pressure)

``python -m tests.injector --help`` does the same from a shell. Root only.
"""

from tests.injector.injector import Injector
from tests.injector.kinds import (
    MAX_DURATION_MS,
    METHODS,
    DurationError,
    InjectorError,
    Kind,
    Mode,
    Truth,
    UnsupportedError,
)
from tests.injector.ksoftirqd import KsoftirqdTruth, Wait
from tests.injector.pressure import Pressure, Probe

__all__ = [
    "MAX_DURATION_MS",
    "METHODS",
    "DurationError",
    "Injector",
    "InjectorError",
    "Kind",
    "KsoftirqdTruth",
    "Mode",
    "Pressure",
    "Probe",
    "Truth",
    "UnsupportedError",
    "Wait",
]
