"""The configuration: a TOML file of typed keys, nearly all optional.

The dataclasses are the table of all keys, see :mod:`stalld.tables`. A new key needs nothing else
here; the tests then ask for it in ``systemd/config.toml`` and ``docs/configuration.md``.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from stalld import tables
from stalld.errors import ConfigError
from stalld.records import VECTORS
from stalld.tables import SWITCH, Key, number
from stalld.values import (
    ADDRESS,
    FACILITY,
    GROUP,
    HOST,
    OPTIONAL_PATH,
    PATH,
    PATTERNS,
    QUEUE_KIB,
    SOCKET,
    SYSLOG,
    VECTOR_NAMES,
    WORD,
    place,
)

DEFAULT_PATH = Path("/etc/softirq-stalld/config.toml")
DEFAULT_SOCKET = "/run/softirq-stalld/softirq-stalld.sock"
MAX_THRESHOLD_MS = 60_000
_MAX_BYTES = 1 << 16
# A key of n dotted parts costs tomllib n² bytes of memory: of 64 KiB of dots, gigabytes.
_MAX_DOTS = 256
_QUEUE = "so many KiB of events may wait; further ones are dropped and counted"


@dataclass(frozen=True)
class Detect:
    """What is watched, and when it is a stall."""

    threshold_ms: Annotated[
        float,
        number(float, 1, MAX_THRESHOLD_MS),
        "work that waits this many milliseconds is a stall",
    ] = 10.0
    vectors: Annotated[tuple[str, ...], VECTOR_NAMES, "the softirq vectors that are watched"] = (
        tuple(name for name in VECTORS if name not in ("SCHED", "RCU"))
    )
    kthreads: Annotated[
        tuple[str, ...],
        PATTERNS,
        "kernel threads whose wait for a CPU is watched, by name; ksoftirqd/* always is",
    ] = (
        "ksoftirqd/*",
        "ktimers/*",
        "napi/*",
        "backlog_napi/*",
        "watchdog/*",
        "migration/*",
        "irq/*",
    )
    max_samples: Annotated[
        int, number(int, 1, 64), "at most so many stack samples are taken of one stall"
    ] = 16
    lookback: Annotated[
        bool,
        SWITCH,
        "what runs at every tick of a busy CPU is kept, to tell what ran before a stall",
    ] = True
    nmi_sampler: Annotated[
        bool, SWITCH, "stacks are sampled while interrupts are off too, where there is a PMU"
    ] = True


@dataclass(frozen=True)
class Storm:
    """What is held back when stalls are many."""

    stalls_per_second: Annotated[
        int,
        number(int, 1, 1000),
        "further stalls of a CPU are counted in the kernel, not sent one by one",
    ] = 20
    identical_per_minute: Annotated[
        int,
        number(int, 1, 10_000),
        "further identical stalls are folded into one `suppressed` event",
    ] = 5


_PER_S = 1_000_000_000


@dataclass(frozen=True)
class Softnet:
    """What CPUs drop, or leave over, of received packets, whether or not there is a stall."""

    enabled: Annotated[
        bool, SWITCH, "CPUs that drop packets, or run out of their budget, are told of"
    ] = True
    interval_s: Annotated[
        float,
        number(float, 1, 3600),
        "the counters of CPUs and devices are looked at each time so many seconds are over",
    ] = 10.0
    drops_per_s: Annotated[
        float, number(float, 0, _PER_S), "a CPU may drop so many packets in a second"
    ] = 1.0
    squeezes_per_s: Annotated[
        float,
        number(float, 0, _PER_S),
        "a CPU may leave packets over, its budget used up, so many times in a second",
    ] = 100.0


@dataclass(frozen=True)
class Nic:
    """What network devices drop of received packets."""

    enabled: Annotated[bool, SWITCH, "devices that drop packets are told of"] = True
    drops_per_s: Annotated[
        float, number(float, 0, _PER_S), "a device may drop so many packets in a second"
    ] = 10.0


@dataclass(frozen=True)
class StdoutSink:
    """Standard output: under systemd that is the journal."""

    enabled: Annotated[bool, SWITCH, "events are written to standard output"] = True
    queue_kib: Annotated[int, QUEUE_KIB, _QUEUE] = 1024


@dataclass(frozen=True)
class FileSink:
    """A file that events are appended to."""

    path: Annotated[str, PATH, "the file; SIGHUP has it opened again, for logrotate"]
    queue_kib: Annotated[int, QUEUE_KIB, _QUEUE] = 1024


@dataclass(frozen=True)
class TcpSink:
    """A collector that takes JSON lines over TCP: Vector, Fluent Bit, Logstash, rsyslog."""

    address: Annotated[str, ADDRESS, "where the collector listens"]
    queue_kib: Annotated[int, QUEUE_KIB, _QUEUE] = 4096
    tls: Annotated[bool, SWITCH, "the connection is encrypted, and the collector proves itself"] = (
        False
    )
    tls_ca: Annotated[
        str, OPTIONAL_PATH, "certificates that may vouch for the collector; none: the system's"
    ] = ""
    tls_name: Annotated[
        str,
        HOST,
        "the name that the collector's certificate must have",
    ] = ""
    tls_cert: Annotated[
        str, OPTIONAL_PATH, "our own certificate, for a collector that asks for one"
    ] = ""
    tls_key: Annotated[str, OPTIONAL_PATH, "the private key of our own certificate"] = ""

    def faults(self, wrong: Set[str]) -> Iterable[str]:
        """What does not fit together."""
        if not self.tls and "tls" not in wrong:
            for name in ("tls_ca", "tls_name", "tls_cert", "tls_key"):
                if getattr(self, name):
                    yield f"{name}: is given without TLS; set tls = true, or leave it out"
        if wrong.isdisjoint({"tls_cert", "tls_key"}) and bool(self.tls_cert) != bool(self.tls_key):
            lone, other = ("cert", "key") if self.tls_cert else ("key", "cert")
            yield f"tls_{lone}: is given without tls_{other}; give both or neither"


@dataclass(frozen=True)
class SyslogSink:
    """A syslog server that takes RFC 5424 messages."""

    address: Annotated[
        str,
        SYSLOG,
        "where the syslog server listens",
    ]
    facility: Annotated[str, FACILITY, "the facility of the messages"] = "daemon"
    app_name: Annotated[
        str,
        WORD,
        "the name of the program in the messages",
    ] = "softirq-stalld"
    queue_kib: Annotated[int, QUEUE_KIB, _QUEUE] = 4096


@dataclass(frozen=True)
class Sinks:
    """Where events go, to any number of places at once."""

    stdout: StdoutSink = StdoutSink()
    file: tuple[FileSink, ...] = ()
    tcp: tuple[TcpSink, ...] = ()
    syslog: tuple[SyslogSink, ...] = ()

    def faults(self, wrong: Set[str]) -> Iterable[str]:
        """What does not fit together."""
        if not (wrong or self.stdout.enabled or self.file or self.tcp or self.syslog):
            yield "stdout.enabled: events would go nowhere; leave it true, or add another sink"
        for section, key, names in (
            ("file", "path", [sink.path for sink in self.file]),
            ("tcp", "address", [sink.address for sink in self.tcp]),
            ("syslog", "address", [sink.address for sink in self.syslog]),
        ):
            # A wrong one stands as None.
            places = [place(name) if name else None for name in names]
            for n, (name, at) in enumerate(zip(names, places, strict=True)):
                if at is not None and at in places[:n]:
                    fault = f"{tables.shown(name)} is there already; name each {key} once"
                    yield f"{section}[{n + 1}].{key}: {fault}"


@dataclass(frozen=True)
class Live:
    """The socket at which `softirq-stalld tail` asks for live events."""

    enabled: Annotated[bool, SWITCH, "live events are served"] = True
    socket: Annotated[
        str,
        SOCKET,
        "the unix socket; its directory must exist",
    ] = DEFAULT_SOCKET
    group: Annotated[
        str,
        GROUP,
        "who may tail besides our own user; if there is no such group, only our own",
    ] = "softirq-stalld"
    max_clients: Annotated[int, number(int, 1, 1000), "so many may tail at once"] = 64
    queue_kib: Annotated[
        int,
        number(int, 64, 65_536),
        "so many KiB of events may wait for one client; then it loses some, and is told how many",
    ] = 512


@dataclass(frozen=True)
class Config:
    """The whole file."""

    detect: Detect = Detect()
    storm: Storm = Storm()
    softnet: Softnet = Softnet()
    nic: Nic = Nic()
    sinks: Sinks = Sinks()
    live: Live = Live()

    def faults(self, wrong: Set[str]) -> Iterable[str]:
        """What does not fit together."""
        names = [*(s.path for s in self.sinks.file), *(s.address for s in self.sinks.syslog)]
        taken = {place(name) for name in names if name}
        if self.live.enabled and "live" not in wrong and place(self.live.socket) in taken:
            shown = tables.shown(self.live.socket)
            yield f"live.socket: {shown} is where a sink sends events; give another path"


@dataclass(frozen=True)
class Settings:
    """What one run goes by.

    Attributes:
        duration_s: how long to detect; None: until stopped.
        style: how events are written to standard output: ``json`` or ``text``.
        source: the configuration file, for people.
    """

    config: Config = Config()
    duration_s: float | None = None
    style: str = "json"
    source: str = str(DEFAULT_PATH)

    @property
    def threshold_ms(self) -> float:
        """Waiting this long is a stall, in milliseconds."""
        return self.config.detect.threshold_ms

    @property
    def threshold_ns(self) -> int:
        """The threshold in nanoseconds."""
        return round(self.threshold_ms * 1e6)


def keys() -> dict[str, Key]:
    """All keys by their dotted names, in the order of the table."""
    return tables.keys(Config)


def load(path: Path | None, default: Path = DEFAULT_PATH) -> Config:
    """The configuration in ``path``; None: in ``default``, which may be missing.

    Raises:
        ConfigError: the file cannot be read, or what :func:`parse` finds.
    """
    chosen = default if path is None else path
    name = printable(os.fsencode(chosen).decode(errors="backslashreplace"))
    try:
        with chosen.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        if path is None and isinstance(error, FileNotFoundError):
            return Config()
        raise ConfigError(
            f"{name}: cannot be read: {error.strerror}; it must be a file that this user may read"
        ) from None
    if len(text) > _MAX_BYTES:  # A device or a log, named by mistake.
        raise ConfigError(f"{name}: no configuration has over {_MAX_BYTES} bytes; shorten it")
    return parse(text, name)


def parse(text: bytes, name: str) -> Config:
    """The configuration that ``text`` holds; ``name`` stands for it in messages.

    Raises:
        ConfigError: all that is wrong. Sections that are unknown are not looked into.
    """
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}: line {line} is not UTF-8; save it in that encoding") from None
    for n, line_text in enumerate(decoded.split("\n"), 1):
        if line_text.count(".") > _MAX_DOTS and not line_text.lstrip().startswith("#"):
            raise ConfigError(f"{name}: line {n} has over {_MAX_DOTS} dots; break it up")
    try:
        document = tomllib.loads(decoded)
    except tomllib.TOMLDecodeError as error:
        fault = _shortened(str(error))
        raise ConfigError(f"{name}: not valid TOML: {fault}; correct it there") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{name}: too many digits or brackets in a row; shorten it") from None
    errors: list[str] = []
    config: Config = tables.read(Config, document, errors)
    if errors:
        raise ConfigError(*(f"{name}: {error}" for error in errors))
    return config


def printable(text: str) -> str:
    """For messages: what a terminal might obey, or cannot show, stands as an escape."""
    valid = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in valid)


def _shortened(text: str) -> str:
    """With its end: there the parser says where."""
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"
