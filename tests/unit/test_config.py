"""The configuration: what a file may say, and how every fault of it is told."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld import tables
from stalld.config import (
    DEFAULT_SOCKET,
    Config,
    Detect,
    FileSink,
    Live,
    Nic,
    Settings,
    Sinks,
    Softnet,
    StdoutSink,
    Storm,
    SyslogSink,
    TcpSink,
    keys,
    load,
    parse,
)
from stalld.errors import ConfigError, UsageError
from stalld.records import VECTORS
from stalld.values import FACILITIES, split_address

ROOT = Path(__file__).parents[2]
DEFAULT_FILE = (ROOT / "systemd" / "config.toml").read_text()
DOCUMENT = (ROOT / "docs" / "configuration.md").read_text()
KEYS = keys()
SECTIONS = tables.sections(Config)
OTHERS = {
    "detect.threshold_ms": 2.5,
    "detect.vectors": ["RCU", "NET_RX"],
    "detect.kthreads": ["irq/*-eth?"],
    "detect.max_samples": 3,
    "detect.lookback": False,
    "detect.nmi_sampler": False,
    "storm.stalls_per_second": 7,
    "storm.identical_per_minute": 8,
    "softnet.enabled": False,
    "softnet.interval_s": 2.5,
    "softnet.drops_per_s": 4.5,
    "softnet.squeezes_per_s": 0.5,
    "nic.enabled": False,
    "nic.drops_per_s": 3.5,
    "sinks.stdout.enabled": False,
    "sinks.stdout.queue_kib": 100,
    "sinks.file.path": "/var/log/e.json",
    "sinks.file.queue_kib": 101,
    "sinks.tcp.address": "[::1]:9000",
    "sinks.tcp.queue_kib": 102,
    "sinks.tcp.tls": True,
    "sinks.tcp.tls_ca": "/etc/ca.pem",
    "sinks.tcp.tls_name": "collector.example",
    "sinks.tcp.tls_cert": "/etc/our.pem",
    "sinks.tcp.tls_key": "/etc/our.key",
    "sinks.syslog.address": "/dev/log",
    "sinks.syslog.facility": "local7",
    "sinks.syslog.app_name": "stalls",
    "sinks.syslog.queue_kib": 103,
    "live.enabled": False,
    "live.socket": "/run/s.sock",
    "live.group": "",
    "live.max_clients": 9,
    "live.queue_kib": 104,
}
"""A value of each key that is not its default."""
DEFAULTS = {
    f"{section}.{field.name}": field.default
    for section, entry in SECTIONS.items()
    for field in fields(entry.type)
    if f"{section}.{field.name}" in KEYS
}
"""The default of each key; MISSING: it must be given."""
REQUIRED = [key for key, value in DEFAULTS.items() if value is MISSING]
PAIR = ("sinks.tcp.tls", "sinks.tcp.tls_cert", "sinks.tcp.tls_key")
NEEDS = {
    "sinks.stdout.enabled": ("sinks.file.path",),
    "sinks.tcp.tls_ca": ("sinks.tcp.tls",),
    "sinks.tcp.tls_name": ("sinks.tcp.tls",),
    "sinks.tcp.tls_cert": PAIR,
    "sinks.tcp.tls_key": PAIR,
}
"""What has to be set besides."""


def split(key: str) -> tuple[str, str]:
    """Section and name of a dotted key."""
    section, _, name = key.rpartition(".")
    return section, name


def toml(values: Mapping[str, str]) -> str:
    """A file that sets dotted keys, each to a value in TOML; a line a section or key.

    Of a section that may stand many times there is one, with what must be given in it.
    """
    text = ""
    for section, entry in SECTIONS.items():
        given = {
            name: value
            for key, value in values.items()
            if (name := split(key)[1]) and split(key)[0] == section
        }
        if entry.many and given:
            needed = {
                split(key)[1]: json.dumps(OTHERS[key])
                for key in REQUIRED
                if split(key)[0] == section
            }
            items = ", ".join(f"{name} = {value}" for name, value in (needed | given).items())
            text += f"{section} = [{{ {items} }}]\n"
        else:
            text += "".join(f"{section}.{name} = {value}\n" for name, value in given.items())
    return text


def line(key: str, value: Any) -> str:
    """A file that sets a dotted key."""
    return toml({key: json.dumps(value)})


def with_needs(key: str) -> dict[str, Any]:
    """A dotted key's other value, with what has to be set besides."""
    section = split(key)[0]
    needed = [other for other in REQUIRED if split(other)[0] == section]
    return {other: OTHERS[other] for other in (*needed, *NEEDS.get(key, ()), key)}


def built(values: Mapping[str, Any]) -> Config:
    """The configuration with these values, by dotted keys; sections that stand many times once."""

    def of(section: str) -> dict[str, Any]:
        return {
            split(key)[1]: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if split(key)[0] == section
        }

    return Config(
        Detect(**of("detect")),
        Storm(**of("storm")),
        Softnet(**of("softnet")),
        Nic(**of("nic")),
        Sinks(
            StdoutSink(**of("sinks.stdout")),
            (FileSink(**of("sinks.file")),) if of("sinks.file") else (),
            (TcpSink(**of("sinks.tcp")),) if of("sinks.tcp") else (),
            (SyslogSink(**of("sinks.syslog")),) if of("sinks.syslog") else (),
        ),
        Live(**of("live")),
    )


def found(config: Config, key: str) -> Any:
    """The value of a dotted key, in the first of sections that stand many times."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value[0] if isinstance(value, tuple) else value, name)
    return value


def refused(text: str | bytes) -> tuple[str, ...]:
    """The errors in a file ``F``, without its name."""
    with pytest.raises(ConfigError) as caught:
        parse(text.encode() if isinstance(text, str) else text, "F")
    errors: tuple[str, ...] = caught.value.args
    assert errors
    assert str(caught.value).split("\n") == list(errors)
    assert all(error.startswith("F: ") and error.isprintable() for error in errors)
    return tuple(error.removeprefix("F: ") for error in errors)


def test_defaults() -> None:
    """The defaults are those of the contract."""
    assert Config() == Config(
        Detect(
            threshold_ms=10.0,
            vectors=("HI", "TIMER", "NET_TX", "NET_RX", "BLOCK", "IRQ_POLL", "TASKLET", "HRTIMER"),
            kthreads=(
                "ksoftirqd/*",
                "ktimers/*",
                "napi/*",
                "backlog_napi/*",
                "watchdog/*",
                "migration/*",
                "irq/*",
            ),
            max_samples=16,
            lookback=True,
            nmi_sampler=True,
        ),
        Storm(stalls_per_second=20, identical_per_minute=5),
        Softnet(enabled=True, interval_s=10.0, drops_per_s=1.0, squeezes_per_s=100.0),
        Nic(enabled=True, drops_per_s=10.0),
        Sinks(StdoutSink(enabled=True, queue_kib=1024), file=(), tcp=(), syslog=()),
        Live(
            enabled=True,
            socket="/run/softirq-stalld/softirq-stalld.sock",
            group="softirq-stalld",
            max_clients=64,
            queue_kib=512,
        ),
    )
    assert FileSink("/f") == FileSink("/f", queue_kib=1024)
    assert TcpSink("h:1") == TcpSink("h:1", 4096, False, "", "", "", "")
    assert SyslogSink("h:1") == SyslogSink("h:1", "daemon", "softirq-stalld", 4096)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "# nothing\n",
        "[detect]\n[storm]\n[sinks]\n[sinks.stdout]\n[live]\n",
        "detect = {}",
        "sinks = { stdout = {}, file = [], tcp = [], syslog = [] }",
        "\ufeff[storm]\r\n",
    ],
)
def test_every_section_is_optional(text: str) -> None:
    """A file that sets nothing gives the defaults."""
    assert parse(text.encode(), "F") == Config()


def test_table_is_of_dataclass_fields() -> None:
    """Every field of every section is a key, and every key of the table has its test value."""

    def walk(section: Any, prefix: str) -> list[str]:
        dotted: list[str] = []
        for name, hint in get_type_hints(section).items():
            inner = get_args(hint)[0] if getattr(hint, "__origin__", None) is tuple else hint
            if is_dataclass(inner):
                dotted += walk(inner, f"{prefix}{name}.")
            else:
                dotted.append(prefix + name)
        return dotted

    assert list(KEYS) == walk(Config, "") == list(OTHERS) == list(DEFAULTS)
    assert REQUIRED == ["sinks.file.path", "sinks.tcp.address", "sinks.syslog.address"]


@pytest.mark.parametrize("key", KEYS)
def test_one_key(key: str) -> None:
    """What a file says of a key becomes its value, of the default's type; no other moves."""
    values = with_needs(key)
    config = parse(toml({k: json.dumps(value) for k, value in values.items()}).encode(), "F")
    # As text too: there 2.0 is not 2.
    assert repr(config) == repr(built(values))
    assert config == built(values)
    assert found(config, key) != DEFAULTS[key]
    assert DEFAULTS[key] is MISSING or type(found(config, key)) is type(DEFAULTS[key])


def test_all_keys() -> None:
    """One file may set all."""
    config = parse(toml({k: json.dumps(value) for k, value in OTHERS.items()}).encode(), "F")
    assert config == Config(
        Detect(2.5, ("RCU", "NET_RX"), ("irq/*-eth?",), 3, False, False),
        Storm(7, 8),
        Softnet(False, 2.5, 4.5, 0.5),
        Nic(False, 3.5),
        Sinks(
            StdoutSink(False, 100),
            (FileSink("/var/log/e.json", 101),),
            (
                TcpSink(
                    "[::1]:9000",
                    102,
                    True,
                    "/etc/ca.pem",
                    "collector.example",
                    "/etc/our.pem",
                    "/etc/our.key",
                ),
            ),
            (SyslogSink("/dev/log", "local7", "stalls", 103),),
        ),
        Live(False, "/run/s.sock", "", 9, 104),
    )


def test_any_number_of_sinks() -> None:
    """A section in two brackets may stand any number of times; their order is the file's."""
    text = "".join(
        f"[[sinks.file]]\npath = '/{n}'\n[[sinks.tcp]]\naddress = 'h:{n}'\n" for n in range(1, 30)
    )
    sinks = parse(text.encode(), "F").sinks
    assert sinks.file == tuple(FileSink(f"/{n}") for n in range(1, 30))
    assert sinks.tcp == tuple(TcpSink(f"h:{n}") for n in range(1, 30))


def test_configuration_is_frozen() -> None:
    """Nobody changes a configuration in use; it can be compared and hashed."""
    with pytest.raises(FrozenInstanceError):
        Config().detect.threshold_ms = 1.0  # type: ignore[misc]
    assert hash(parse(b"", "F")) == hash(Config())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("detect.threshold_ms", "1"),
        ("detect.threshold_ms", "60000"),
        ("detect.threshold_ms", "6e4"),
        ("detect.max_samples", "1"),
        ("detect.max_samples", "0x40"),
        ("storm.stalls_per_second", "1"),
        ("storm.stalls_per_second", "1_000"),
        ("storm.identical_per_minute", "1"),
        ("storm.identical_per_minute", "10000"),
        *(
            (f"sinks.{sink}.queue_kib", bound)
            for sink in ("stdout", "file", "tcp", "syslog")
            for bound in ("64", "1048576")
        ),
        ("live.max_clients", "1"),
        ("live.max_clients", "1000"),
        ("live.queue_kib", "64"),
        ("live.queue_kib", "65536"),
    ],
)
def test_bounds_are_allowed(key: str, value: str) -> None:
    """The least and the greatest value are in range; a whole number serves as any number."""
    read = found(parse(toml({key: value}).encode(), "F"), key)
    assert read == tomllib.loads(f"x = {value}")["x"]
    assert type(read) is type(DEFAULTS[key])


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("detect.threshold_ms", "0", "0"),
        ("detect.threshold_ms", "0.0", "0.0"),
        ("detect.threshold_ms", "-10", "-10"),
        ("detect.threshold_ms", "9.9e-7", "9.9e-07"),
        ("detect.threshold_ms", "60000.1", "60000.1"),
        ("detect.threshold_ms", "nan", "nan"),
        ("detect.threshold_ms", "-inf", "-inf"),
        ("detect.threshold_ms", "inf", "inf"),
        ("detect.threshold_ms", "1" + "0" * 400, "a number beyond 64 bits"),
        ("detect.max_samples", "0", "0"),
        ("detect.max_samples", "65", "65"),
        ("detect.max_samples", "0x" + "f" * 4000, "a number beyond 64 bits"),
        ("storm.stalls_per_second", "0", "0"),
        ("storm.stalls_per_second", "1001", "1001"),
        ("storm.identical_per_minute", "0", "0"),
        ("storm.identical_per_minute", "10001", "10001"),
        *(
            (f"sinks.{sink}.queue_kib", value, value)
            for sink in ("stdout", "file", "tcp", "syslog")
            for value in ("63", "-1", "1048577")
        ),
        ("live.max_clients", "0", "0"),
        ("live.max_clients", "1001", "1001"),
        ("live.queue_kib", "63", "63"),
        ("live.queue_kib", "65537", "65537"),
    ],
)
def test_out_of_range(key: str, value: str, shown: str) -> None:
    """A number out of range, NaN and infinity are refused with the range."""
    rule, meaning = KEYS[key].rule, KEYS[key].meaning
    assert refused(toml({key: value})) == (
        f"{key}: {shown} is out of range; give {rule.allowed} ({meaning})",
    )


WRONG: dict[Any, tuple[str, ...]] = {
    float: ('"10"', "true", "false", "[10]", "{}", "2026-11-23", "10:00:00"),
    int: ('"16"', "true", "false", "16.0", "nan", "inf", "-nan", "[16]", "[]", "{}", "2026-11-23"),
    bool: ('"true"', '"yes"', "1", "0", "1.0", "[true]", "[]", "{}", "2026-11-23"),
    str: ("3", "1.5", "true", "nan", '["/a"]', "[]", "{}", "2026-11-23", "2026-11-23T10:00:00Z"),
    tuple[str, ...]: ('"NET_RX"', '"napi/*"', "true", "3", "{}", "2026-11-23"),
}
"""Values of other types than a key's."""


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key in KEYS for value in WRONG[KEYS[key].type]]
)
def test_wrong_type(key: str, value: str) -> None:
    """A value of another type is refused with the type, the range and the key's meaning."""
    (error,) = refused(toml({key: value}))
    assert re.match(rf"{re.escape(key)}: .+ is (not an? |neither true nor false)", error)
    assert error.endswith(f"; give {KEYS[key].rule.allowed} ({KEYS[key].meaning})")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("2026-11-23", "2026-11-23"),
        ("10:00:00", "10:00:00"),
        ("2026-11-23T10:00:00Z", "2026-11-23 10:00:00+00:00"),
        ("{ a = 1 }", "a table"),
        ("[[1]]", "an array"),
        ("nan", "nan"),
        ("-9223372036854775807", "-9223372036854775807"),
        ("-9223372036854775808", "a number beyond 64 bits"),
    ],
)
def test_shown_as_in_the_file(value: str, shown: str) -> None:
    """A date is not told of as if it were a string, nor anything else by another name."""
    (error,) = refused(f"live.group = {value}")
    assert error.startswith(f"live.group: {shown} is not a string; give ")


@pytest.mark.parametrize(
    ("value", "faults"),
    [
        ("[]", ["the array is empty"]),
        ('["NET_RX", "NET_RX"]', ['"NET_RX" is there already']),
        ('["NET_RQ"]', ['"NET_RQ" is no softirq vector (did you mean NET_RX?)']),
        ('["net_rx"]', ['"net_rx" is no softirq vector (did you mean NET_RX?)']),
        ('["quota"]', ['"quota" is no softirq vector']),
        ('[""]', ['"" is no softirq vector']),
        ('["no", "no"]', ['"no" is no softirq vector'] * 2),
        ("[1, true, 1.0]", [f"{item} is not a string" for item in ("1", "true", "1.0")]),
        ('["HI", 3, "no", true]', ["3 is not a string", "#no", "true is not a string"]),
        ('[["HI"]]', ["an array is not a string"]),
        ('["a\\nb"]', ['"a\\nb" is no softirq vector']),
    ],
)
def test_vectors(value: str, faults: list[str]) -> None:
    """Each wrong vector is named, with the one that was meant where that can be guessed."""
    errors = refused(f"detect.vectors = {value}")
    told = [error.removeprefix("detect.vectors: ").split("; give ")[0] for error in errors]
    assert told == ['"no" is no softirq vector' if fault == "#no" else fault for fault in faults]


def test_deep_values_are_not_compared() -> None:
    """Two equal tables that are nested too deeply to be compared are two errors like others."""
    deep = f"{{ {'.'.join('a' * 250)} = [\n" * 20 + "\n] }" * 20
    assert len(refused(f"detect.vectors = [\n{deep},\n{deep}\n]")) == 2


def test_all_vectors() -> None:
    """Each vector that the kernel has may be watched, in any order."""
    names = VECTORS[::-1]
    assert parse(line("detect.vectors", names).encode(), "F").detect.vectors == names


@pytest.mark.parametrize("patterns", [[], ["a" * 64], ["é" * 64], ["irq/*", "irq/*"], ["[x]?*"]])
def test_kthread_patterns(patterns: list[str]) -> None:
    """No pattern at all, and any of up to 64 characters."""
    text = line("detect.kthreads", patterns).encode()
    assert parse(text, "F").detect.kthreads == tuple(patterns)


def test_bad_kthread_patterns() -> None:
    """Each pattern that is empty, too long or no string is told."""
    errors = refused(f'detect.kthreads = ["", "ok", "{"x" * 65}", 1.5, "a\\u0000"]')
    assert [error.split("; ")[0] for error in errors] == [
        'detect.kthreads: "" has 0 characters',
        f'detect.kthreads: "{"x" * 56}... has 65 characters',
        "detect.kthreads: 1.5 is not a string",
        'detect.kthreads: "a\\u0000" holds a NUL character',
    ]


@pytest.mark.parametrize("key", KEYS)
def test_misspelt_key(key: str) -> None:
    """A key with a letter too few, in capitals or outside its section leads to the right one."""
    section, name = split(key)
    same = [other for other in KEYS if split(other)[1] == name]
    elsewhere = "storm" if section == "detect" else "detect"
    for wrong, right in (
        (f"{section}.{name[:-1]}", [key]),
        (f"{section}.{name.upper()}", [key]),
        (name, same),
        (f"{elsewhere}.{name}", same),
    ):
        (error,) = refused(toml({wrong: "1"}) if wrong.startswith(section) else f"{wrong} = 1")
        assert error in [f"{wrong}: unknown key; did you mean {other}?" for other in right]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[Detect]", "Detect: unknown section; did you mean detect?"),
        ("[detection]\nzzz = 1", "detection: unknown section; did you mean detect?"),
        ("[zzz]", "zzz: unknown section; known here: detect, storm, softnet, nic, sinks, live"),
        ("[storm.storm]", "storm.storm: unknown section; did you mean storm?"),
        ("zzz = 1", "zzz: unknown key; known here: detect, storm, softnet, nic, sinks, live"),
        (
            "storm.zzz = 1",
            "storm.zzz: unknown key; known here: stalls_per_second, identical_per_minute",
        ),
        ('"detect.vectors" = []', '"detect.vectors": unknown key; did you mean detect.vectors?'),
        (
            '"a\\nb" = 1',
            '"a\\nb": unknown key; known here: detect, storm, softnet, nic, sinks, live',
        ),
        ('"" = 1', '"": unknown key; known here: detect, storm, softnet, nic, sinks, live'),
        (
            "x" * 61 + " = 1",
            f'"{"x" * 56}...: unknown key; known here: detect, storm, softnet, nic, sinks, live',
        ),
        ("detect = 10", "detect: 10 is no section; begin it with [detect]"),
        ("[[detect]]", "detect: an array is no section; begin it with [detect]"),
        ("sinks = []", "sinks: an array is no section; begin it with [sinks]"),
        ("[[sinks.stdout]]", "sinks.stdout: an array is no section; begin it with [sinks.stdout]"),
        ("[[file]]", "file: unknown section; did you mean sinks.file?"),
        ("[[sinks.fil]]", "sinks.fil: unknown section; did you mean sinks.file?"),
        ("tcp = [{}]", "tcp: unknown section; did you mean sinks.tcp?"),
        (
            "[sinks.file]\npath = '/a'",
            "sinks.file: a table is no list; begin each with [[sinks.file]]",
        ),
        ("sinks.tcp = 'h:1'", 'sinks.tcp: "h:1" is no list; begin each with [[sinks.tcp]]'),
        (
            "sinks.file = [1]",
            "sinks.file[1]: 1 is no table; begin each with [[sinks.file]]",
        ),
        (
            "sinks.file = [[{ path = '/a' }]]",
            "sinks.file[1]: an array is no table; begin each with [[sinks.file]]",
        ),
        (
            "sinks.tcp = [{ address = 'h:1', x.y = 1 }]",
            "sinks.tcp.x: unknown section; known here: address, queue_kib, tls, tls_ca, tls_name, "
            "tls_cert, tls_key",
        ),
        (
            "sinks.file = [{ path = '/a' }, { path = '/b', sise = 1 }]",
            "sinks.file[2].sise: unknown key; known here: path, queue_kib",
        ),
    ],
)
def test_unknown(text: str, error: str) -> None:
    """What has no place is told with what was meant, or with what is known there."""
    assert refused(text) == (error,)


def test_all_errors_at_once() -> None:
    """One reading finds every error, in the order of the file."""
    errors = refused(
        "threshold = 1\n"
        "[storm]\nstalls_per_second = true\nidentical_per_minute = 6\n"
        "[detect]\nthreshold_ms = nan\nvectors = ['HI', 'HI', 4]\nlockback = true\n"
        "[sink]\nfile = 1\n"
        "[[sinks.file]]\nqueue_kib = 1\npaht = '/a'\n[[sinks.file]]\n"
        "[sinks.tcp]\naddress = 'h'\ntls = 1\n"
        "[[live]]\ngroup = 1\n[[live]]\nsocket = 1\n"
    )
    assert [error.split(": ")[0] for error in errors] == [
        "threshold",
        "storm.stalls_per_second",
        "detect.threshold_ms",
        "detect.vectors",
        "detect.vectors",
        "detect.lockback",
        "sink",
        "sinks.file[1].queue_kib",
        "sinks.file[1].paht",
        "sinks.file[1].path",
        "sinks.file[2].path",
        "sinks.tcp",
        "sinks.tcp.address",
        "sinks.tcp.tls",
        "live",
        "live[1].group",
        "live[2].socket",
    ]


@pytest.mark.parametrize("key", REQUIRED)
def test_required(key: str) -> None:
    """A key without a default must be given; its absence is told with what to give."""
    section, _ = split(key)
    missing = f"is missing; give {KEYS[key].rule.allowed} ({KEYS[key].meaning})"
    assert refused(f"[[{section}]]") == (f"{key}: {missing}",)
    name = key.removeprefix(section + ".")
    assert refused(f"[[{section}]]\n" * 2) == tuple(
        f"{section}[{n}].{name}: {missing}" for n in (1, 2)
    )


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("h:1", "h", 1),
        ("logs.example.org:65535", "logs.example.org", 65535),
        ("logs.example.org.:514", "logs.example.org.", 514),
        ("a_b-c.9x:6514", "a_b-c.9x", 6514),
        ("192.0.2.1:514", "192.0.2.1", 514),
        ("[::1]:514", "::1", 514),
        ("[2001:db8::1]:514", "2001:db8::1", 514),
        ("[fe80::1%eth0]:514", "fe80::1%eth0", 514),
        ("m\u00fcnchen.example:514", "m\u00fcnchen.example", 514),
        ("l" * 63 + ":00514", "l" * 63, 514),
    ],
)
def test_addresses(address: str, host: str, port: int) -> None:
    """Names, IPv4, and IPv6 in brackets, each with a port."""
    assert split_address(address) == (host, port)
    for sink in ("tcp", "syslog"):
        key = f"sinks.{sink}.address"
        assert found(parse(line(key, address).encode(), "F"), key) == address


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("", "no host and port"),
        ("h", "no host and port"),
        (":514", "no host and port"),
        ("h:", "the port is no number from 1 to 65535"),
        ("h:0", "the port is no number from 1 to 65535"),
        ("h:65536", "the port is no number from 1 to 65535"),
        ("h:0000070000", "the port is no number from 1 to 65535"),
        ("h:+514", "the port is no number from 1 to 65535"),
        ("h:514 ", "the port is no number from 1 to 65535"),
        ("h:514\n", "the port is no number from 1 to 65535"),
        ("h:\u0665\u0661\u0664", "the port is no number from 1 to 65535"),
        ("h:syslog", "the port is no number from 1 to 65535"),
        ("[::1]", "the port is no number from 1 to 65535"),
        ("::1", "an IPv6 address stands in brackets"),
        ("2001:db8::1:514", "an IPv6 address stands in brackets"),
        ("[]:514", "no IPv6 address stands in the brackets"),
        ("[h]:514", "no IPv6 address stands in the brackets"),
        ("[192.0.2.1]:514", "no IPv6 address stands in the brackets"),
        ("[::1%]:514", "no IPv6 address stands in the brackets"),
        ("[::1%a b]:514", "no IPv6 address stands in the brackets"),
        ("[:::1]:514", "no IPv6 address stands in the brackets"),
        ("tcp://h:514", "the host is neither a name nor an IP address"),
        ("a b:514", "the host is neither a name nor an IP address"),
        ("a\x1b[31m:514", "the host is neither a name nor an IP address"),
        ("a..b:514", "the host is neither a name nor an IP address"),
        (".b:514", "the host is neither a name nor an IP address"),
        ("l" * 64 + ":514", "the host is neither a name nor an IP address"),
        ("a." * 127 + ":514", "the host is neither a name nor an IP address"),
        ("\u00fc." * 60 + "a:514", "the host is neither a name nor an IP address"),
        ("\u00fc" * 60 + ":514", "the host is neither a name nor an IP address"),
        ("256.0.2.1:514", "the host is neither a name nor an IP address"),
        ("a]:514", "the host is neither a name nor an IP address"),
    ],
)
def test_bad_addresses(address: str, reason: str) -> None:
    """What no resolver can be asked for is refused with the reason."""
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        split_address(address)
    for sink in ("tcp", "syslog"):
        (error,) = refused(line(f"sinks.{sink}.address", address))
        assert f"{json.dumps(address)[:57]}" in error
        assert f" is no address: {reason}; give host:port" in error


@given(st.text(st.characters(codec="utf-8"), max_size=90), st.integers(-1, 70_000))
def test_any_address(host: str, port: int) -> None:
    """Whatever stands for an address: a ValueError, or a name that can be encoded for DNS."""
    with suppress(ValueError):
        name, number = split_address(f"{host}:{port}")
        assert name.partition("%")[0].encode("idna")
        assert 1 <= number <= 65_535


PATHS = ["sinks.file.path", "sinks.tcp.tls_ca", "sinks.tcp.tls_cert", "sinks.tcp.tls_key"]


@pytest.mark.parametrize("key", [*PATHS, "live.socket", "sinks.syslog.address"])
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/", "is the path of a directory"),
        ("/var/log/", "is the path of a directory"),
        ("/var/log/.", "is the path of a directory"),
        ("/var/log/..", "is the path of a directory"),
        ("/a\0b", "holds a NUL character"),
        ("/" + "x" * 4095, "is longer than"),
        ("/" + "\u00fc" * 2048, "is longer than"),
    ],
)
def test_bad_paths(key: str, path: str, reason: str) -> None:
    """What cannot be the path of a file on any host is refused."""
    needed = {other: json.dumps(OTHERS[other]) for other in NEEDS.get(key, ())}
    (error,) = refused(toml(needed | {key: json.dumps(path)}))
    shown = json.dumps(path) if len(path) < 50 else json.dumps(path)[:57] + "..."
    assert error.startswith(f"{key}: {shown} {reason}")


@pytest.mark.parametrize("path", ["e.json", "./e.json", "~/e.json", "%h/e.json", "\\a"])
def test_relative_paths(path: str) -> None:
    """The daemon's working directory is nobody's business: paths are absolute."""
    for key in (PATHS[0], "live.socket"):
        (error,) = refused(line(key, path))
        assert error.startswith(f"{key}: {json.dumps(path)} is no absolute path; give ")


@pytest.mark.parametrize(
    "path", ["/e", "/a b/\u00fc.json", "/..e", "/a/../e", "//e", "/" + "x" * 4094]
)
def test_paths(path: str) -> None:
    """Whatever the kernel takes for the path of a file."""
    assert parse(line("sinks.file.path", path).encode(), "F").sinks.file == (FileSink(path),)


def test_socket_path() -> None:
    """A socket's path has room for the last NUL."""
    fits, long = "/" + "\u00fc" * 53, "/" + "\u00fc" * 53 + "x"
    assert parse(line("live.socket", fits).encode(), "F").live.socket == fits
    assert found(parse(line("sinks.syslog.address", fits).encode(), "F"), "sinks.syslog.address")
    for key in ("live.socket", "sinks.syslog.address"):
        assert "is longer than 107 bytes" in refused(line(key, long))[0]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("sinks.syslog.facility", "Mail", "is none of them (did you mean mail?)"),
        ("sinks.syslog.facility", "local8", "is none of them (did you mean local"),
        ("sinks.syslog.facility", "", "is none of them;"),
        ("sinks.syslog.app_name", "", "has 0 characters"),
        ("sinks.syslog.app_name", "x" * 49, "has 49 characters"),
        ("sinks.syslog.app_name", "a b", "has other characters"),
        ("sinks.syslog.app_name", "a\n", "has other characters"),
        ("sinks.syslog.app_name", "\u00fc", "has other characters"),
        ("sinks.tcp.tls_name", "a b", "is neither a host name nor an IP address"),
        ("sinks.tcp.tls_name", ".a", "is neither a host name nor an IP address"),
        ("sinks.tcp.tls_name", "h:1", "is neither a host name nor an IP address"),
        ("live.group", "a:b", "is no name of a group"),
        ("live.group", "a\nb", "is no name of a group"),
        ("live.group", "x" * 65, "has 65 characters"),
        ("live.group", "\0", "holds a NUL character"),
    ],
)
def test_bad_words(key: str, value: str, reason: str) -> None:
    """Names that cannot be are refused with the reason."""
    (error,) = refused(toml({"sinks.tcp.tls": "true", key: json.dumps(value)}))
    assert error.startswith(f"{key}: ")
    assert reason in error


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("sinks.syslog.facility", FACILITIES),
        ("sinks.syslog.app_name", ("!", "x" * 48, 'a"]~')),
        ("sinks.tcp.tls_name", ("", "h.example", "192.0.2.1", "2001:db8::1")),
        ("live.group", ("", "adm", "domain users", "D\\x", "x" * 64)),
    ],
)
def test_words(key: str, values: tuple[str, ...]) -> None:
    """Names that may be are taken as they stand."""
    for value in values:
        text = toml({"sinks.tcp.tls": "true", key: json.dumps(value)})
        assert found(parse(text.encode(), "F"), key) == value


def test_facilities() -> None:
    """The facilities' numbers are those of RFC 5424."""
    numbers = {"kern": 0, "daemon": 3, "cron": 9, "ntp": 12, "local0": 16, "local7": 23}
    assert {name: FACILITIES.index(name) for name in numbers} == numbers
    assert len(FACILITIES) == 24


TLS = "set tls = true, or leave it out"


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("tls_ca = '/a'", [f"sinks.tcp.tls_ca: is given without TLS; {TLS}"]),
        ("tls_name = 'a'", [f"sinks.tcp.tls_name: is given without TLS; {TLS}"]),
        (
            "tls_cert = '/a'\ntls_key = '/b'",
            [f"sinks.tcp.tls_{name}: is given without TLS; {TLS}" for name in ("cert", "key")],
        ),
        (
            "tls = true\ntls_cert = '/a'",
            ["sinks.tcp.tls_cert: is given without tls_key; give both or neither"],
        ),
        (
            "tls = true\ntls_key = '/a'",
            ["sinks.tcp.tls_key: is given without tls_cert; give both or neither"],
        ),
        ("tls = 1\ntls_ca = '/a'", ["sinks.tcp.tls: 1 is neither"]),
        ("tls = true\ntls_key = '/a'\ntls_cert = 1", ["sinks.tcp.tls_cert: 1 is not a string"]),
        (
            "queue_kib = 1\ntls_ca = '/a'",
            ["sinks.tcp.queue_kib: 1 is out of range", "sinks.tcp.tls_ca: is given without TLS"],
        ),
    ],
)
def test_tls_keys_go_together(text: str, errors: list[str]) -> None:
    """Keys that make no sense without each other are told, unless one of them is wrong itself."""
    told = refused(f"[[sinks.tcp]]\naddress = 'h:1'\n{text}\n")
    assert len(told) == len(errors)
    assert all(error.startswith(start) for error, start in zip(told, errors, strict=True))


NOWHERE = "events would go nowhere; leave it true, or add another sink"


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("sinks.stdout.enabled = false", [f"sinks.stdout.enabled: {NOWHERE}"]),
        (
            "sinks.stdout = { enabled = false, queue_kib = 1 }",
            ["sinks.stdout.queue_kib: 1 is out of range"],
        ),
        (
            "sinks.stdout.enabled = false\nsinks.file = '/a'",
            ['sinks.file: "/a" is no list; begin each with [[sinks.file]]'],
        ),
        ("sinks.stdout.enabled = false\nsinks.fil = [{}]", ["sinks.fil: unknown section"]),
    ],
)
def test_events_go_somewhere(text: str, errors: list[str]) -> None:
    """A configuration without any sink is refused, unless it meant to have one."""
    told = refused(text)
    assert len(told) == len(errors)
    assert all(error.startswith(start) for error, start in zip(told, errors, strict=True))


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("sinks.file.path", "/a/b", "/a/b"),
        ("sinks.file.path", "/a/b", "//a/./b"),
        ("sinks.tcp.address", "h.example:514", "H.example.:0514"),
        ("sinks.tcp.address", "[::1]:514", "[::1]:514"),
        ("sinks.syslog.address", "/dev/log", "/dev//log"),
        ("sinks.syslog.address", "h:1", "h:1"),
    ],
)
def test_each_place_once(key: str, first: str, second: str) -> None:
    """Two sinks for one place would get in each other's way, however it is spelt."""
    section, name = split(key)
    header = f"[[{section}]]\n{name} = "
    assert refused(f"{header}'{first}'\n{header}'/'\n{header}'{second}'\n")[1:] == (
        f'{section}[3].{name}: "{second}" is there already; name each {name} once',
    )


def test_places_that_differ() -> None:
    """A host's other port, a link's other name and another kind of sink are other places."""
    parse(
        b"sinks.file = [{ path = '/a/../b' }, { path = '/b' }, { path = '/B' }]\n"
        b"sinks.tcp = [{ address = 'h:1' }, { address = 'h:2' }, { address = 'i:1' }]\n"
        b"sinks.syslog = [{ address = 'h:1' }]",
        "F",
    )


def test_live_socket_is_no_sink() -> None:
    """Where clients ask for events no sink may write them."""
    error = f'live.socket: "{DEFAULT_SOCKET}" is where a sink sends events; give another path'
    for key in ("sinks.file.path", "sinks.syslog.address"):
        text = line(key, DEFAULT_SOCKET)
        assert refused(text) == (error,)
        assert refused(text + "sinks.tcp = 1")[1:] == (error,)
        assert not parse(f"{text}live.enabled = false".encode(), "F").live.enabled
        assert parse(f"{text}live.socket = '/run/s'".encode(), "F").live.socket == "/run/s"
        assert len(refused(f"{text}live.socket = 1")) == 1


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[detect]\nthreshold_ms = ten\n", "line 2, column 16"),
        ("[detect]\nlookback = True\n", "line 2, column 12"),
        ("[detect]\nmax_samples = 1\nmax_samples = 2\n", "line 3"),
        ("[storm]\n[storm]\n", "line 2"),
        ("detect.kthreads = [", "end of document"),
        ("a = 2026-02-30", "line 1, column 5"),
        ("a = '\x00'", "line 1"),
    ],
)
def test_no_toml(text: str, where: str) -> None:
    """What is no TOML is refused with the line."""
    (error,) = refused(text)
    assert error.startswith("not valid TOML: ")
    assert where in error


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (b"# caf\xe9\n", 1),
        (b"[detect]\n# \xff\n", 2),
        (b"\xef\xbb\xbf\n\n\n\xc3(", 4),
        ("[detect]\n".encode("utf-16"), 1),
    ],
)
def test_not_utf_8(text: bytes, number: int) -> None:
    """A file in another encoding is refused with the first line that shows it."""
    assert refused(text) == (f"line {number} is not UTF-8; save it in that encoding",)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 20_000,
        "a = " + "{ a = " * 5_000,
        "a = " + "9" * 5000,
    ],
)
def test_beyond_the_parser(text: str) -> None:
    """What exhausts the parser is an error of the file like others."""
    assert refused(text) == ("too many digits or brackets in a row; shorten it",)


@pytest.mark.parametrize("line", ["{} = 1", "[{}]", "  {}.'#' = 1", "a = {{ {} = 1 }}"])
def test_endless_keys(line: str) -> None:
    """Keys whose parts would take gigabytes to parse are not parsed."""
    dotted = ".".join("a" * 258)
    text = f"# {dotted}\n" + line.format(dotted)
    assert refused(text) == ("line 2 has over 256 dots; break it up",)
    assert not refused("# ...\n" + line.format(dotted[:-4]))[0].startswith("line")
    assert parse(f"# {dotted}\n  # {dotted}\n".encode(), "F") == Config()


def test_long_key_in_the_parsers_message() -> None:
    """What the parser says stays short, and keeps where it is."""
    key = "x" * 5000
    (error,) = refused(f"[{key}]\n[{key}]\n")
    assert len(error) < 250
    assert error.endswith("(at line 2, column 5002); correct it there")


PLAIN = st.one_of(
    st.none().map(lambda _: "2026-11-23T11:43:06Z"),
    st.booleans().map(json.dumps),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(repr),
    st.text(st.characters(codec="utf-8"), max_size=70).map(
        lambda text: json.dumps(text).replace("\x7f", "\\u007f")
    ),
)
VALUES = st.one_of(PLAIN, st.lists(PLAIN, max_size=4).map(lambda some: f"[{', '.join(some)}]"))


@given(st.dictionaries(st.sampled_from([*KEYS, "detect.x", "sinks.tcp.x", "x", "x.y"]), VALUES))
def test_any_values(values: dict[str, str]) -> None:
    """Whatever the keys are set to: errors that name their key, or values within the rules."""
    text = "".join(
        f"{key} = {value}\n"
        for key, value in values.items()
        if key == "x.y" or (key == "x" and "x.y" not in values)
    ) + toml(values)
    try:
        config = parse(text.encode(errors="surrogatepass"), "F")
    except ConfigError as error:
        for told in error.args:
            assert re.match(r"F: (not valid TOML|line \d|[a-z_.]+: )", told)
            assert told.isprintable()
        return
    assert values.keys() <= KEYS.keys()
    assert 0 < config.detect.threshold_ms <= 60_000
    assert Settings(config).threshold_ns > 0
    assert config.detect.vectors
    assert set(config.detect.vectors) <= set(VECTORS)
    assert all(1 <= len(pattern) <= 64 for pattern in config.detect.kthreads)
    assert 1 <= config.detect.max_samples <= 64
    assert 1 <= config.storm.stalls_per_second <= 1000
    assert 1 <= config.storm.identical_per_minute <= 10_000
    assert {type(config.detect.lookback), type(config.detect.nmi_sampler)} == {bool}
    sinks = config.sinks
    assert sinks.stdout.enabled or sinks.file or sinks.tcp or sinks.syslog
    queues = [sinks.stdout.queue_kib, *(file.queue_kib for file in sinks.file)]
    queues += [tcp.queue_kib for tcp in sinks.tcp]
    queues += [syslog.queue_kib for syslog in sinks.syslog]
    assert all(64 <= queue_kib <= 1_048_576 for queue_kib in queues)
    assert all(file.path.startswith("/") for file in sinks.file)
    assert all(split_address(tcp.address) for tcp in sinks.tcp)
    assert config.live.socket.startswith("/")
    assert 1 <= config.live.max_clients <= 1000


TREES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda some: f"[{', '.join(some)}]"),
        st.dictionaries(
            st.sampled_from([*(key.rpartition(".")[2] for key in KEYS), "x"]), inner, max_size=4
        ).map(lambda some: "{" + ", ".join(f"{k} = {v}" for k, v in some.items()) + "}"),
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["detect", "storm", "sinks", *SECTIONS, "x"]), TREES))
def test_any_trees(values: dict[str, str]) -> None:
    """Whatever stands where a section is meant: errors that name their place, or a Config."""
    text = "".join(
        f"{key} = {value}\n"
        for key, value in values.items()
        if not (key.startswith("sinks.") and "sinks" in values)
    )
    try:
        assert isinstance(parse(text.encode(errors="surrogatepass"), "F"), Config)
    except ConfigError as error:
        for told in error.args:
            assert re.match(r"F: (not valid TOML|line \d|[a-z_.[\]0-9]+: .*;)", told)
            assert told.isprintable()


@given(st.binary(max_size=200))
def test_any_bytes(text: bytes) -> None:
    """Any bytes at all are a configuration or a ConfigError."""
    with suppress(ConfigError):
        assert isinstance(parse(text, "F"), Config)


def test_load(tmp_path: Path) -> None:
    """The named file goes over the default one, which serves when none is named."""
    named, usual = tmp_path / "named.toml", tmp_path / "usual.toml"
    named.write_text("detect.threshold_ms = 3")
    usual.write_text("detect.threshold_ms = 4")
    assert load(named, usual).detect.threshold_ms == 3
    assert load(None, usual).detect.threshold_ms == 4


def test_default_file_may_be_missing(tmp_path: Path) -> None:
    """Without the default file, or its directory, there are the defaults."""
    assert load(None, tmp_path / "none.toml") == Config()
    assert load(None, tmp_path / "none" / "none.toml") == Config()


def unreadable(path: Path | None, usual: Path, reason: str) -> None:
    """Loading fails with the file's name, the reason and the remedy."""
    with pytest.raises(ConfigError) as caught:
        load(path, usual)
    assert caught.value.args == (
        f"{path or usual}: cannot be read: {reason}; it must be a file that this user may read",
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb.toml", r"a\nb.toml"),
        ("\x1b[31mred.toml", r"\x1b[31mred.toml"),
        ("\u202e\x85.toml", r"\u202e\x85.toml"),
        ("gr\u00f6\u00dfe.toml", "gr\u00f6\u00dfe.toml"),
        (os.fsdecode(b"\xff.toml"), r"\xff.toml"),
    ],
)
def test_hostile_file_name(name: str, shown: str, tmp_path: Path) -> None:
    """The file's own name cannot break a message's line, nor the terminal."""
    path = tmp_path / name
    for text, fault in ((None, "cannot be read"), ("a = 1", "a: "), ("#" * 65537, "no conf")):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert caught.value.args[0].startswith(f"{tmp_path}/{shown}: {fault}")


def test_named_file_must_exist(tmp_path: Path) -> None:
    """A file that was asked for is not replaced by defaults."""
    missing, usual = tmp_path / "none.toml", tmp_path / "usual.toml"
    usual.write_text("")
    unreadable(missing, usual, "No such file or directory")
    unreadable(usual / "x", usual, "Not a directory")


@pytest.mark.parametrize("named", [True, False])
def test_unreadable_file(named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory or a file without permission is an error, the default file no less."""
    unreadable(tmp_path if named else None, tmp_path, "Is a directory")

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    path = tmp_path / "secret.toml"
    unreadable(path if named else None, path, "Permission denied")


def test_endless_file() -> None:
    """A device is not read for ever."""
    with pytest.raises(ConfigError, match="no configuration has over 65536 bytes"):
        load(Path("/dev/zero"))


def test_size_limit(tmp_path: Path) -> None:
    """A file of the greatest size is read, one byte more is not."""
    path = tmp_path / "config.toml"
    path.write_text("#" * 65536)
    assert load(path) == Config()
    path.write_text("#" * 65537)
    with pytest.raises(ConfigError, match="shorten it"):
        load(path)


def test_errors_name_the_file(tmp_path: Path) -> None:
    """Each line names the file that was read; the error is one of usage."""
    path = tmp_path / "config.toml"
    path.write_text("a = 1\nb = 2\n")
    with pytest.raises(UsageError) as caught:
        load(path)
    assert caught.value.exit_code == 2
    assert [told.split(": ")[:2] for told in str(caught.value).split("\n")] == [
        [str(path), "a"],
        [str(path), "b"],
    ]


def test_file_from_a_pipe() -> None:
    """A shell's ``<(…)`` may be given as a file."""
    reader, writer = os.pipe()
    os.write(writer, b"detect.max_samples = 2")
    os.close(writer)
    try:
        assert load(Path(f"/dev/fd/{reader}")).detect.max_samples == 2
    finally:
        os.close(reader)


def test_settings() -> None:
    """Settings give the threshold in both units, to the nanosecond."""
    assert (Settings().threshold_ms, Settings().threshold_ns) == (10.0, 10_000_000)
    assert Settings().duration_s is None
    settings = Settings(parse(b"detect.threshold_ms = 1.000001", "F"), 3.0)
    assert (settings.threshold_ns, settings.duration_s) == (1_000_001, 3.0)


def test_default_file_as_shipped() -> None:
    """The shipped file says nothing but names of sections that stand once."""
    assert parse(DEFAULT_FILE.encode(), "F") == Config()
    named: dict[str, Any] = {"sinks": {}}
    for key in KEYS:
        section = split(key)[0]
        if section.startswith("sinks.") and not SECTIONS[section].many:
            named["sinks"][section.removeprefix("sinks.")] = {}
        elif not section.startswith("sinks."):
            named[section] = {}
    assert tomllib.loads(DEFAULT_FILE) == named


def test_default_file_uncommented() -> None:
    """With every key uncommented the shipped file holds all keys, each with its default."""
    text = re.sub(r"^#(?=\S)", "", DEFAULT_FILE, flags=re.MULTILINE)
    values: dict[str, Any] = {}

    def walk(table: dict[str, Any], prefix: str) -> None:
        for name, value in table.items():
            entry = SECTIONS.get(prefix + name)
            if entry is None:
                values[prefix + name] = value
            else:
                (inner,) = value if entry.many else [value]
                walk(inner, f"{prefix}{name}.")

    walk(tomllib.loads(text), "")
    assert list(values) == list(KEYS)
    assert parse(text.encode(), "F") == built({key: values[key] for key in REQUIRED})
    for key in KEYS:
        if key not in REQUIRED:
            assert json.dumps(values[key]) == json.dumps(DEFAULTS[key])


def explained(text: str) -> dict[str, str]:
    """What the comment right above each key says, on one line."""
    said: dict[str, str] = {}
    section = ""
    words: list[str] = []
    for row in text.split("\n"):
        if header := re.fullmatch(r"#?(\[[a-z.]+\]|\[\[[a-z.]+\]\])", row):
            section, words = header[1].strip("[]"), []
            assert header[1].startswith("[[") == SECTIONS[section].many == (row[0] == "#")
        elif row.startswith("# "):
            words += row[2:].split()
        elif key := re.match(r"#([a-z_]+) = ", row):
            said[f"{section}.{key[1]}"] = " ".join(words)
        else:
            assert row == ""
            words = []
    return said


def test_default_file_explains() -> None:
    """One sentence above each key of the shipped file tells its meaning and values."""
    said = explained(DEFAULT_FILE)
    assert list(said) == list(KEYS)
    for key, sentence in said.items():
        assert sentence[0].isupper()
        assert sentence.lower() == f"{KEYS[key].meaning} ({KEYS[key].rule.allowed}).".lower()


def test_documented() -> None:
    """The document has one row for each key, as the table has it, and no other."""
    rows = []
    section = ""
    for text in DOCUMENT.split("\n"):
        if header := re.fullmatch(r"## (\[+)([a-z.]+)\]+", text):
            section = header[2]
            assert (header[1] == "[[") == SECTIONS[section].many
        elif text.startswith("| `"):
            name, *rest = text.strip("| ").split(" | ")
            rows.append((f"{section}.{name.strip('`')}", *rest))
    assert rows == [
        (
            dotted,
            "must be given" if dotted in REQUIRED else f"`{json.dumps(DEFAULTS[dotted])}`",
            key.rule.allowed,
            key.meaning,
        )
        for dotted, key in KEYS.items()
    ]


def test_documented_sections() -> None:
    """Under each section's name the document says what it is for."""
    for section in {split(key)[0] for key in KEYS}:
        name = f"[[{section}]]" if SECTIONS[section].many else f"[{section}]"
        assert f"\n## {name}\n\n{SECTIONS[section].type.__doc__}\n\n" in DOCUMENT


def test_documented_errors_are_real() -> None:
    """The messages that the document shows are those of the program."""
    shown = re.findall(r"^    softirq-stalld: F: (.*)$", DOCUMENT, flags=re.MULTILINE)
    text = "detect.treshold_ms = 1\nstorm.stalls_per_second = true\n"
    assert tuple(shown) == refused(text)
