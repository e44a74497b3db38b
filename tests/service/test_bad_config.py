"""Some hundreds of bad configurations through the real command: told clearly, never a crash."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest

from stalld import cli
from stalld.config import keys

COMMAND = Path(sys.executable).with_name("softirq-stalld")
SEED = 20261123

Document = dict[str, list[dict[str, str]]]
"""Section → its tables, one or many: key → value in TOML."""

GOOD: Document = {
    "detect": [
        {
            "threshold_ms": "12.5",
            "vectors": '["NET_RX", "TIMER"]',
            "kthreads": '["napi/*"]',
            "max_samples": "8",
            "lookback": "false",
            "nmi_sampler": "false",
        }
    ],
    "storm": [{"stalls_per_second": "10", "identical_per_minute": "3"}],
    "softnet": [
        {"enabled": "true", "interval_s": "5.5", "drops_per_s": "2.0", "squeezes_per_s": "7"}
    ],
    "nic": [{"enabled": "false", "drops_per_s": "3"}],
    "sinks.stdout": [{"enabled": "false", "queue_kib": "512"}],
    "sinks.file": [
        {"path": '"/var/log/softirq-stalld/a.json"', "queue_kib": "64"},
        {"path": '"/var/log/softirq-stalld/b.json"', "queue_kib": "1048576"},
    ],
    "sinks.tcp": [
        {
            "address": '"collector.example.org:9000"',
            "queue_kib": "2048",
            "tls": "true",
            "tls_ca": '"/etc/softirq-stalld/ca.pem"',
            "tls_name": '"collector"',
            "tls_cert": '"/etc/softirq-stalld/cert.pem"',
            "tls_key": '"/etc/softirq-stalld/key.pem"',
        },
        {"address": '"[2001:db8::1]:9000"'},
    ],
    "sinks.syslog": [
        {
            "address": '"/dev/log"',
            "facility": '"local3"',
            "app_name": '"stalls"',
            "queue_kib": "128",
        },
        {"address": '"logs.example.org:514"'},
    ],
    "live": [
        {
            "enabled": "true",
            "socket": '"/run/softirq-stalld/live.sock"',
            "group": '"adm"',
            "max_clients": "4",
            "queue_kib": "256",
        }
    ],
}
MANY = ("sinks.file", "sinks.tcp", "sinks.syslog")
HOSTILE = r"\u001b[31m\n\r\t\u0000\u0007\u0008\u007f\u0085\u009b2J\u2028\u202e\U000e0001\\\""
"""Inside a TOML string: what would break a line or take over a terminal."""

WRONG_TYPE = ("[[]]", "{ a = 1 }", "2026-11-23", "2026-11-23T10:00:00Z", "10:00:00", "nan")
WRONG = {
    "number": ('"10"', "true", "0", "-1", "1e9", "-inf", "0x" + "f" * 300, "[1]"),
    "rate": ('"10"', "true", "-1", "1e12", "-inf", "0x" + "f" * 300, "[1]"),
    "whole number": ('"10"', "false", "0", "-1", "1.0", "inf", "2_000_000", "9" * 400, "[1]"),
    "switch": ('"true"', "0", "1", "[true]", "1.0", '""'),
    "array": ('"NET_RX"', "1", "true", '[""]', "[1]", "[['NET_RX']]", f'["{HOSTILE}"]'),
    "string": ("1", "true", "['/a']", "-0.0", f'"{HOSTILE}"', '"\\u0000"'),
    "path": ('""', '"a"', '"/"', '"/a/"', '"/a/.."', f'"/{"x" * 5000}"'),
    "address": ('""', '"h"', '"h:0"', '"h:65536"', '"::1"', '"a b:1"', '"[h]:1"', '"a..b:1"'),
    "word": ('""', '"a b"', f'"{"x" * 99}"', '"\\u00fc"'),
    "group": ('"a:b"', f'"{"x" * 99}"'),
}
"""Values that a key must not have, besides those of another type."""
KINDS = {
    "threshold_ms": ("number",),
    "interval_s": ("number",),
    "drops_per_s": ("rate",),
    "squeezes_per_s": ("rate",),
    "vectors": ("array",),
    "kthreads": ("array",),
    "path": ("string", "path"),
    "address": ("string", "address"),
    "tls_ca": ("string",),
    "tls_name": ("string",),
    "tls_cert": ("string",),
    "tls_key": ("string",),
    "facility": ("string", "word"),
    "app_name": ("string", "word"),
    "socket": ("string", "path"),
    "group": ("string", "group"),
    **dict.fromkeys(("lookback", "nmi_sampler", "enabled", "tls"), ("switch",)),
    **dict.fromkeys(
        ("max_samples", "stalls_per_second", "identical_per_minute", "queue_kib", "max_clients"),
        ("whole number",),
    ),
}


def render(document: Document) -> str:
    """The document as TOML."""
    rows = []
    for section, tables in document.items():
        for table in tables:
            rows.append(f"[[{section}]]" if section in MANY else f"[{section}]")
            rows += [f"{key} = {value}" for key, value in table.items()]
    return "\n".join(rows) + "\n"


class Mutation(NamedTuple):
    """One error in an otherwise good document; ``place`` is what its message must name."""

    place: str
    apply: Callable[[Document], None]
    name: str


def value_mutations() -> Iterator[Mutation]:
    """Each key with each value that it must not have."""
    for section, tables in GOOD.items():
        for index, table in enumerate(tables):
            for key in table:
                for value in (*WRONG_TYPE, *itertools.chain(*(WRONG[k] for k in KINDS[key]))):
                    yield set_value(section, index, key, value)


def place(section: str, index: int) -> str:
    """How messages name a section."""
    return f"{section}[{index + 1}]" if len(GOOD[section]) > 1 else section


def set_value(section: str, index: int, key: str, value: str) -> Mutation:
    """A key has a value that it must not have."""

    def apply(document: Document) -> None:
        document[section][index][key] = value

    dotted = f"{place(section, index)}.{key}"
    return Mutation(f"{dotted}: ", apply, f"{dotted}={value}")


def unknown_mutations() -> Iterator[Mutation]:
    """Unknown keys in each section, some of them misspelt, some hostile."""
    for section, tables in GOOD.items():
        for index, table in enumerate(tables):
            first = next(iter(table))
            for key in (f"{first}s", first.upper(), "zzz", "a-b", "1", '""', f'"{HOSTILE}"'):
                yield set_unknown(section, index, key)


def set_unknown(section: str, index: int, key: str) -> Mutation:
    """A section holds a key that there is not."""

    def apply(document: Document) -> None:
        document[section][index][key] = "1"

    shown = re.escape(key) if key[0] != '"' else '".*'
    where = re.escape(place(section, index))
    return Mutation(rf"{where}\.{shown}: unknown key; ", apply, f"{section}.{key}")


def missing_mutations() -> Iterator[Mutation]:
    """Each key that must be given is left out once."""
    for section in MANY:
        for index, table in enumerate(GOOD[section]):
            yield leave_out(section, index, next(iter(table)))


def leave_out(section: str, index: int, key: str) -> Mutation:
    """A section lacks a key that it must have."""

    def apply(document: Document) -> None:
        del document[section][index][key]

    return Mutation(f"{place(section, index)}.{key}: is missing; ", apply, f"no {section}.{key}")


VALUES = list(value_mutations())
UNKNOWN = list(unknown_mutations())
MISSING = list(missing_mutations())
WHOLE: dict[str, bytes] = {
    "no_toml": b"what?",
    "unfinished_table": b"[detect",
    "unfinished_array": b"detect.vectors = ['HI',",
    "unfinished_string": b"live.group = 'adm",
    "two_values": b"[detect]\nlookback = true false",
    "python": b"[detect]\nlookback = True",
    "yaml": b"detect:\n  lookback: true\n",
    "json": b'{"detect": {"lookback": true}}',
    "ini": b"[detect]\nvectors = NET_RX, HI\n",
    "section_twice": b"[storm]\n[storm]\n",
    "key_twice": b"[storm]\nstalls_per_second = 1\nstalls_per_second = 1\n",
    "section_and_array": b"[sinks.file]\n[[sinks.file]]\n",
    "key_and_section": b"detect = 1\n[detect]\n",
    "impossible_date": b"detect.lookback = 2026-02-30",
    "bad_escape": rb'live.group = "\q"',
    "surrogate": rb'live.group = "\ud800"',
    "nul": b"live.group = 'a\x00b'",
    "nul_first": b"\x00",
    "nul_only": b"\x00" * 1000,
    "escape_sequence": b"live.group = 'a\x1b[31mb'",
    "escape_sequence_as_key": b"\x1b]0;pwned\x07 = 1",
    "delete": b"live.group = 'a\x7fb'",
    "carriage_return": b"# a\rlive.group = 'b'",
    "bell_in_comment": b"# \x07",
    "latin_1": "# größe".encode("latin-1"),
    "utf_16": render(GOOD).encode("utf-16"),
    "utf_32": render(GOOD).encode("utf-32"),
    "overlong": b"live.group = '\xc0\xaf'",
    "cut_in_a_character": "live.group = 'ü'".encode()[:-2],
    "random": random.Random(SEED).randbytes(4096),
    "elf": b"\x7fELF\x02\x01\x01" + bytes(57),
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    "too_long": b"#" * 65_537,
    "too_long_by_far": b"a" * (1 << 20),
    "deep_arrays": b"a = " + b"[" * 30_000 + b"]" * 30_000,
    "deep_tables": b"a = " + b"{a=" * 20_000 + b"1" + b"}" * 20_000,
    "deep_keys": b"a." * 30_000 + b"a = 1",
    "deep_sections": b"[" + b"a." * 30_000 + b"a]",
    "deep_value": b"detect.vectors = " + b"[" * 200 + b"]" * 200,
    "endless_number": b"storm.stalls_per_second = " + b"9" * 60_000,
    "endless_hex_number": b"storm.stalls_per_second = 0x" + b"f" * 60_000,
    "endless_string": b"live.group = '" + b"x" * 60_000 + b"'",
    "endless_key": b"x" * 60_000 + b" = 1",
    "endless_key_twice": (b"[" + b"x" * 30_000 + b"]\n") * 2,
    "thousands_of_keys": b"".join(b"k%d = 1\n" % n for n in range(2000)),
    "thousands_of_vectors": b"detect.vectors = [" + b"'X'," * 2000 + b"]",
    "table_for_array": b"[sinks.file]\npath = '/a'\n",
    "inline_table_for_array": b"sinks.file = { path = '/a' }",
    "string_for_array": b"sinks.file = '/a'",
    "array_of_strings": b"sinks.file = ['/a', '/b']",
    "mixed_array": b"sinks.file = [{ path = '/a' }, 1]",
    "array_of_arrays": b"sinks.file = [[{ path = '/a' }]]",
    "array_for_section": b"[[detect]]\nlookback = true\n",
    "array_for_inner_section": b"[[sinks.stdout]]\n",
    "array_around": b"[[sinks]]\n[[sinks.file]]\npath = '/a'\n",
    "value_for_section": b"detect = 10",
    "key_as_section": b"[detect.lookback]\nx = 1\n",
    "unknown_section": b"[metrics]\nport = 1\n",
    "unknown_array": b"[[sinks.kafka]]\nbroker = 'x'\n",
    "hostile_section": f'["{HOSTILE}"]\n'.encode(),
    "dotted_key_in_quotes": b'"detect.lookback" = true',
    "same_file_twice": b"[[sinks.file]]\npath = '/a/b'\n[[sinks.file]]\npath = '/a//b'\n",
    "same_collector_twice": b"[[sinks.tcp]]\naddress = 'h:1'\n[[sinks.tcp]]\naddress = 'H:1'\n",
    "events_go_nowhere": b"sinks.stdout.enabled = false",
    "key_without_certificate": b"[[sinks.tcp]]\naddress = 'h:1'\ntls = true\ntls_key = '/k'\n",
    "certificate_without_tls": b"[[sinks.tcp]]\naddress = 'h:1'\ntls_ca = '/k'\n",
    "file_is_live_socket": b"[[sinks.file]]\npath = '/a'\n[live]\nsocket = '/a'\n",
}
"""Files that are wrong as a whole or in their structure."""


def errors_in(stderr: str, path: Path) -> list[str]:
    """The messages without what is before them; each a line that names the file and a remedy."""
    assert stderr.endswith("\n")
    lines = stderr[:-1].split("\n")
    start = f"softirq-stalld: {path}: "
    for line in lines:
        assert line.startswith(start)
        assert line.isprintable()
        assert "; " in line
        assert "Traceback" not in line
    return [line.removeprefix(start) for line in lines]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[bytes], list[str]]:
    """Runs ``check --config`` in this process on a bad file; gives the errors."""
    path = tmp_path / "bad.toml"

    def run(text: bytes) -> list[str]:
        path.write_bytes(text)
        assert cli.main(["check", "--config", str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return errors_in(err, path)

    return run


def test_enough_of_them() -> None:
    """There are some hundreds, and every key of the configuration is among them."""
    assert len(VALUES) + len(UNKNOWN) + len(MISSING) + len(WHOLE) > 400
    places = {re.sub(r"\[\d+\]", "", mutation.place)[:-2] for mutation in VALUES}
    assert places == set(keys())


def test_good_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an error in it the same document is valid."""
    path = tmp_path / "good.toml"
    path.write_text(render(GOOD))
    assert cli.main(["check", "--config", str(path)]) == 0
    assert capsys.readouterr() == (f"{path}: valid\n", "")


def test_one_bad_value(check: Callable[[bytes], list[str]]) -> None:
    """A value that its key must not have: each message names the key, and says what to give."""
    for mutation in VALUES:
        document = deepcopy(GOOD)
        mutation.apply(document)
        errors = check(render(document).encode())
        assert errors, mutation.name
        for error in errors:
            assert error.startswith(mutation.place), mutation.name
            assert "; give " in error, mutation.name


def test_one_unknown_or_missing_key(check: Callable[[bytes], list[str]]) -> None:
    """A key too many or too few is the only error that is told, with its place."""
    for mutation in UNKNOWN:
        document = deepcopy(GOOD)
        mutation.apply(document)
        (error,) = check(render(document).encode())
        assert re.match(mutation.place, error), mutation.name
    for mutation in MISSING:
        document = deepcopy(GOOD)
        mutation.apply(document)
        (error,) = check(render(document).encode())
        assert error.startswith(mutation.place), mutation.name


def many_errors(chance: random.Random) -> tuple[Document, list[Mutation]]:
    """A document with several errors that have nothing to do with each other."""
    document = deepcopy(GOOD)
    by_place: dict[str, list[Mutation]] = {}
    for mutation in VALUES:
        by_place.setdefault(mutation.place, []).append(mutation)
    names = chance.sample(sorted(by_place), chance.randint(2, 12))
    chosen = [chance.choice(by_place[name]) for name in names]
    for mutation in chosen:
        mutation.apply(document)
    return document, chosen


@pytest.mark.parametrize("number", range(60))
def test_all_errors_at_once(number: int, check: Callable[[bytes], list[str]]) -> None:
    """Of several errors each is told, whatever the others are, and nothing that is right."""
    chance = random.Random(SEED + number)
    document, chosen = many_errors(chance)
    unknown = chance.choice(UNKNOWN)
    unknown.apply(document)
    errors = check(render(document).encode())
    assert len(errors) >= len(chosen) + 1
    for mutation in chosen:
        assert any(error.startswith(mutation.place) for error in errors), mutation.name
    assert any(re.match(unknown.place, error) for error in errors), unknown.name
    for error in errors:
        assert re.match(unknown.place, error) or any(
            error.startswith(mutation.place) for mutation in chosen
        )


@pytest.mark.parametrize("name", WHOLE)
def test_bad_as_a_whole(name: str, check: Callable[[bytes], list[str]]) -> None:
    """What is no TOML, no text, too much or of another shape is told like other errors."""
    errors = check(WHOLE[name])
    assert all(len(error) < 600 for error in errors)


@pytest.mark.parametrize("number", range(40))
def test_damaged(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A good file with bytes changed, lost or doubled: errors that are told, or still valid."""
    chance = random.Random(SEED + number)
    text = bytearray(render(GOOD).encode())
    path = tmp_path / "damaged.toml"
    for _ in range(8):
        at, length = chance.randrange(len(text)), chance.randrange(1, 40)
        changed = [b"", bytes(text[at : at + length]) * 2, chance.randbytes(1), b"'", b"\x1b", b"]"]
        text[at : at + length] = chance.choice(changed)
        path.write_bytes(text)
        code = cli.main(["check", "--config", str(path)])
        out, err = capsys.readouterr()
        if code == 0:
            assert (out, err) == (f"{path}: valid\n", "")
        else:
            assert (code, out) == (2, "")
            assert errors_in(err, path)


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """The command as it is installed, with no terminal and in no particular language."""
    return subprocess.run(
        [COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
    )


PROCESSES = [
    *("nul", "escape_sequence", "escape_sequence_as_key", "latin_1", "random", "too_long"),
    *("deep_arrays", "deep_keys", "endless_number", "thousands_of_keys", "table_for_array"),
    *("array_for_section", "hostile_section", "events_go_nowhere"),
]


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("name", [*PROCESSES, "many_1", "many_2", "many_3"])
def test_in_a_process(command: str, name: str, tmp_path: Path) -> None:
    """A process says the same, has nothing on stdout and ends with 2 before it does anything."""
    path = tmp_path / "bad.toml"
    if name in WHOLE:
        text, least = WHOLE[name], 1
    else:
        document, chosen = many_errors(random.Random(name))
        text, least = render(document).encode(), len(chosen)
    path.write_bytes(text)
    done = in_a_process(command, "--config", str(path))
    assert (done.returncode, done.stdout) == (2, b"")
    assert len(errors_in(done.stderr.decode("ascii"), path)) >= least


def test_good_document_in_a_process(tmp_path: Path) -> None:
    """A process finds the good document valid."""
    path = tmp_path / "good.toml"
    path.write_text(render(GOOD))
    done = in_a_process("check", "--config", str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}: valid\n".encode(), b"")
