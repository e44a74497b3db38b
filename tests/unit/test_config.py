"""The configuration: what a file may say, and how every fault of it is told."""

from __future__ import annotations

import json
import os
import re
import tomllib
from contextlib import suppress
from dataclasses import FrozenInstanceError, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.config import Config, Detect, Settings, Storm, keys, load, parse
from stalld.errors import ConfigError, UsageError
from stalld.records import VECTORS

ROOT = Path(__file__).parents[2]
DEFAULT_FILE = (ROOT / "systemd" / "config.toml").read_text()
DOCUMENT = (ROOT / "docs" / "configuration.md").read_text()
KEYS = keys()
OTHERS = {
    "detect.threshold_ms": 2.5,
    "detect.vectors": ["RCU", "NET_RX"],
    "detect.kthreads": ["irq/*-eth?"],
    "detect.max_samples": 3,
    "detect.lookback": False,
    "detect.nmi_sampler": False,
    "storm.stalls_per_second": 7,
    "storm.identical_per_minute": 8,
}
"""A value of each key that is not its default."""


def default(key: str) -> Any:
    """The default of a dotted key."""
    return attrgetter(key)(Config())


def line(key: str, value: Any) -> str:
    """``section.key = value`` as a line of TOML."""
    return f"{key} = {json.dumps(value)}\n"


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
    )


@pytest.mark.parametrize(
    "text", ["", "\n", "# nothing\n", "[detect]\n[storm]\n", "detect = {}", "\ufeff[storm]\r\n"]
)
def test_every_key_is_optional(text: str) -> None:
    """A file that sets nothing gives the defaults."""
    assert parse(text.encode(), "F") == Config()


def test_table_is_of_dataclass_fields() -> None:
    """Every field of every section is a key, and every key of the table has its test value."""
    hints = get_type_hints(Config)
    assert all(is_dataclass(section) for section in hints.values())
    dotted = [f"{name}.{key.name}" for name, section in hints.items() for key in fields(section)]
    assert list(KEYS) == dotted == list(OTHERS)


@pytest.mark.parametrize("key", KEYS)
def test_one_key(key: str) -> None:
    """What a file says of a key becomes its value, of the default's type; no other moves."""
    value = OTHERS[key]
    config = parse(line(key, value).encode(), "F")
    found = attrgetter(key)(config)
    assert found == (tuple(value) if isinstance(value, list) else value) != default(key)
    assert type(found) is type(default(key))
    assert all(attrgetter(other)(config) == default(other) for other in KEYS if other != key)


def test_all_keys() -> None:
    """One file may set all."""
    config = parse("".join(line(*item) for item in OTHERS.items()).encode(), "F")
    assert config == Config(
        Detect(2.5, ("RCU", "NET_RX"), ("irq/*-eth?",), 3, False, False), Storm(7, 8)
    )


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
    ],
)
def test_bounds_are_allowed(key: str, value: str) -> None:
    """The least and the greatest value are in range; a whole number serves as any number."""
    found = attrgetter(key)(parse(f"{key} = {value}".encode(), "F"))
    assert found == tomllib.loads(f"x = {value}")["x"]
    assert type(found) is type(default(key))


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
    ],
)
def test_out_of_range(key: str, value: str, shown: str) -> None:
    """A number out of range, NaN and infinity are refused with the range."""
    rule, meaning = KEYS[key].rule, KEYS[key].meaning
    assert refused(f"{key} = {value}") == (
        f"{key}: {shown} is out of range; give {rule.allowed} ({meaning})",
    )


WRONG = {
    "threshold_ms": ('"10"', "true", "false", "[10]", "{}", "2026-11-23", "10:00:00"),
    "vectors": ('"NET_RX"', "true", "3", "{}", "2026-11-23"),
    "kthreads": ('"napi/*"', "true", "3", "{}", "2026-11-23"),
    "max_samples": ('"16"', "true", "16.0", "nan", "[16]", "{}", "2026-11-23"),
    "lookback": ('"true"', "1", "0", "1.0", "[true]", "{}", "2026-11-23"),
    "nmi_sampler": ('"yes"', "1", "0", "1.0", "[]", "{}", "2026-11-23"),
    "stalls_per_second": ('"20"', "true", "20.0", "inf", "[]", "{}", "2026-11-23"),
    "identical_per_minute": ('"5"', "false", "5.0", "-nan", "[]", "{}", "2026-11-23"),
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key in KEYS for value in WRONG[key.partition(".")[2]]]
)
def test_wrong_type(key: str, value: str) -> None:
    """A value of another type is refused with the type, the range and the key's meaning."""
    (error,) = refused(f"{key} = {value}")
    assert re.match(rf"{re.escape(key)}: .+ is (not an? |neither true nor false)", error)
    assert error.endswith(f"; give {KEYS[key].rule.allowed} ({KEYS[key].meaning})")


@pytest.mark.parametrize(
    ("value", "faults"),
    [
        ("[]", ["the array is empty"]),
        ('["NET_RX", "NET_RX"]', ['"NET_RX" is there already']),
        ('["NET_RQ"]', ['"NET_RQ" is no softirq vector (did you mean NET_RX?)']),
        ('["net_rx"]', ['"net_rx" is no softirq vector (did you mean NET_RX?)']),
        ('["quota"]', ['"quota" is no softirq vector']),
        ('[""]', ['"" is no softirq vector']),
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
    errors = refused(f'detect.kthreads = ["", "ok", "{"x" * 65}", 1.5]')
    assert [error.split("; ")[0] for error in errors] == [
        'detect.kthreads: "" has 0 characters',
        f'detect.kthreads: "{"x" * 56}... has 65 characters',
        "detect.kthreads: 1.5 is not a string",
    ]


@pytest.mark.parametrize("key", KEYS)
def test_misspelt_key(key: str) -> None:
    """A key with a letter too few, in capitals or outside its section leads to the right one."""
    section, _, name = key.partition(".")
    other = "storm" if section == "detect" else "detect"
    for wrong in (f"{section}.{name[:-1]}", f"{section}.{name.upper()}", name, f"{other}.{name}"):
        assert refused(f"{wrong} = 1") == (f"{wrong}: unknown key; did you mean {key}?",)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[Detect]", "Detect: unknown section; did you mean detect?"),
        ("[detection]\nzzz = 1", "detection: unknown section; did you mean detect?"),
        ("[zzz]", "zzz: unknown section; known here: detect, storm"),
        ("[storm.storm]", "storm.storm: unknown section; did you mean storm?"),
        ("zzz = 1", "zzz: unknown key; known here: detect, storm"),
        (
            "storm.zzz = 1",
            "storm.zzz: unknown key; known here: stalls_per_second, identical_per_minute",
        ),
        ('"detect.vectors" = []', '"detect.vectors": unknown key; did you mean detect.vectors?'),
        ('"a\\nb" = 1', '"a\\nb": unknown key; known here: detect, storm'),
        ('"" = 1', '"": unknown key; known here: detect, storm'),
        ("x" * 61 + " = 1", f'"{"x" * 56}...: unknown key; known here: detect, storm'),
        ("detect = 10", "detect: 10 is no section; begin it with [detect]"),
        ("[[detect]]", "detect: an array is no section; begin it with [detect]"),
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
    )
    assert [error.split(": ")[0] for error in errors] == [
        "threshold",
        "storm.stalls_per_second",
        "detect.threshold_ms",
        "detect.vectors",
        "detect.vectors",
        "detect.lockback",
        "sink",
    ]


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


@pytest.mark.parametrize("text", ["a = " + "[" * 20_000, "a = " + "9" * 5000])
def test_beyond_the_parser(text: str) -> None:
    """What exhausts the parser is an error of the file like others."""
    assert refused(text) == ("too many digits or brackets in a row; shorten it",)


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


@given(st.dictionaries(st.sampled_from([*KEYS, "detect.x", "x", "x.y"]), VALUES))
def test_any_values(values: dict[str, str]) -> None:
    """Whatever the keys are set to: errors that name their key, or values within the rules."""
    text = "".join(f"{key} = {value}\n" for key, value in values.items() if key != "x")
    text = (f"x = {values['x']}\n" if "x" in values and "x.y" not in values else "") + text
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
    """The shipped file says nothing but section names."""
    assert parse(DEFAULT_FILE.encode(), "F") == Config()
    assert tomllib.loads(DEFAULT_FILE) == {key.partition(".")[0]: {} for key in KEYS}


def test_default_file_uncommented() -> None:
    """With every key uncommented the shipped file holds all keys, each with its default."""
    text = re.sub(r"^#(?=\S)", "", DEFAULT_FILE, flags=re.MULTILINE)
    assert parse(text.encode(), "F") == Config()
    tables = tomllib.loads(text)
    assert [f"{name}.{key}" for name, table in tables.items() for key in table] == list(KEYS)
    for dotted in KEYS:
        section, _, name = dotted.partition(".")
        assert json.dumps(tables[section][name]) == json.dumps(default(dotted))


@pytest.mark.parametrize("key", KEYS)
def test_default_file_explains(key: str) -> None:
    """One sentence above each key of the shipped file tells its meaning and values."""
    comment = DEFAULT_FILE.partition(f"\n#{key.partition('.')[2]} = ")[0]
    words: list[str] = []
    for text in reversed(comment.split("\n")):
        if not text.startswith("# "):
            break
        words[:0] = text[2:].split()
    said = " ".join(words)
    assert said[0].isupper()
    assert said.lower() == f"{KEYS[key].meaning} ({KEYS[key].rule.allowed}).".lower()


def test_documented() -> None:
    """The document has one row for each key, as the table has it, and no other."""
    rows = []
    section = ""
    for text in DOCUMENT.split("\n"):
        if text.startswith("## "):
            section = text[3:].strip("[]")
        elif text.startswith("| `"):
            name, *rest = text.strip("| ").split(" | ")
            rows.append((f"{section}.{name.strip('`')}", *rest))
    assert rows == [
        (dotted, f"`{json.dumps(default(dotted))}`", key.rule.allowed, key.meaning)
        for dotted, key in KEYS.items()
    ]


def test_documented_errors_are_real() -> None:
    """The messages that the document shows are those of the program."""
    shown = re.findall(r"^    softirq-stalld: F: (.*)$", DOCUMENT, flags=re.MULTILINE)
    text = "detect.treshold_ms = 1\nstorm.stalls_per_second = true\n"
    assert tuple(shown) == refused(text)
