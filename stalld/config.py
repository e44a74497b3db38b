"""The configuration: a TOML file of typed keys, all optional.

The dataclasses are the table of all keys: a field is annotated with the key's type, rule and
meaning, or it is a section, a dataclass again. A new key needs nothing else here; the tests
then ask for it in ``systemd/config.toml`` and ``docs/configuration.md``.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from stalld.errors import ConfigError
from stalld.records import VECTORS

DEFAULT_PATH = Path("/etc/softirq-stalld/config.toml")
MAX_THRESHOLD_MS = 60_000
_MAX_BYTES = 1 << 16


class Rule(NamedTuple):
    """The values that a key takes.

    Attributes:
        allowed: for people; completes "give …".
        read: makes a TOML value a setting; raises ValueError with one argument per fault.
    """

    allowed: str
    read: Callable[[Any], Any]


class Key(NamedTuple):
    """One key of the table."""

    type: Any
    rule: Rule
    meaning: str


def _number(kind: type[int] | type[float], least: float, most: int) -> Rule:
    noun = "a whole number" if kind is int else "a number"

    def read(value: Any) -> float:
        # Not isinstance: a bool is an int to Python.
        if type(value) not in (int, kind):
            raise ValueError(f"{_shown(value)} is not {noun}")
        if not least <= value <= most:
            raise ValueError(f"{_shown(value)} is out of range")
        return kind(value)

    return Rule(f"{noun} from {f'{least:f}'.rstrip('0').rstrip('.')} to {most}", read)


def _read_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{_shown(value)} is neither true nor false")
    return value


def _strings(allowed: str, fault: Callable[[str], str], *, distinct: bool = False) -> Rule:
    """An array; ``fault`` says what is wrong with an item, or "". Distinct: one at least."""

    def read(items: Any) -> tuple[str, ...]:
        if not isinstance(items, list):
            raise ValueError(f"{_shown(items)} is not an array")
        said = [(i, fault(i) if isinstance(i, str) else "is not a string") for i in items]
        if distinct:
            said += [(i, "is there already") for n, i in enumerate(items) if items.index(i) < n]
        faults = [f"{_shown(item)} {what}" for item, what in said if what]
        if faults or (distinct and not items):
            raise ValueError(*faults or ["the array is empty"])
        return tuple(items)

    return Rule(allowed, read)


def _vector_fault(name: str) -> str:
    if name in VECTORS:
        return ""
    meant = _closest(name.upper(), VECTORS)
    return "is no softirq vector" + (f" (did you mean {meant}?)" if meant else "")


def _pattern_fault(pattern: str) -> str:
    return "" if 1 <= len(pattern) <= 64 else f"has {len(pattern)} characters"


_SWITCH = Rule("true or false", _read_bool)
_VECTORS = _strings(
    f"an array of one or more of {', '.join(VECTORS)}, none twice", _vector_fault, distinct=True
)
_PATTERNS = _strings(
    "an array, maybe empty, of shell patterns of 1 to 64 characters", _pattern_fault
)


@dataclass(frozen=True)
class Detect:
    """What is watched, and when it is a stall."""

    threshold_ms: Annotated[
        float,
        _number(float, 1, MAX_THRESHOLD_MS),
        "work that waits this many milliseconds is a stall",
    ] = 10.0
    vectors: Annotated[tuple[str, ...], _VECTORS, "the softirq vectors that are watched"] = tuple(
        name for name in VECTORS if name not in ("SCHED", "RCU")
    )
    kthreads: Annotated[
        tuple[str, ...],
        _PATTERNS,
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
        int, _number(int, 1, 64), "at most so many stack samples are taken of one stall"
    ] = 16
    lookback: Annotated[
        bool,
        _SWITCH,
        "what runs at every tick of a busy CPU is kept, to tell what ran before a stall",
    ] = True
    nmi_sampler: Annotated[
        bool, _SWITCH, "stacks are sampled while interrupts are off too, where there is a PMU"
    ] = True


@dataclass(frozen=True)
class Storm:
    """What is held back when stalls are many."""

    stalls_per_second: Annotated[
        int,
        _number(int, 1, 1000),
        "further stalls of a CPU are counted in the kernel, not sent one by one",
    ] = 20
    identical_per_minute: Annotated[
        int,
        _number(int, 1, 10_000),
        "further identical stalls are folded into one `suppressed` event",
    ] = 5


@dataclass(frozen=True)
class Config:
    """The whole file."""

    detect: Detect = Detect()
    storm: Storm = Storm()


@dataclass(frozen=True)
class Settings:
    """What one run goes by. ``duration_s`` None: until stopped."""

    config: Config = Config()
    duration_s: float | None = None

    @property
    def threshold_ms(self) -> float:
        """Waiting this long is a stall, in milliseconds."""
        return self.config.detect.threshold_ms

    @property
    def threshold_ns(self) -> int:
        """The threshold in nanoseconds."""
        return round(self.threshold_ms * 1e6)


def keys(section: type = Config, prefix: str = "") -> dict[str, Key]:
    """All keys by their dotted names, in the order of the table."""
    found: dict[str, Key] = {}
    for name, entry in _entries(section).items():
        dotted = prefix + name
        found |= {dotted: entry} if isinstance(entry, Key) else keys(entry, f"{dotted}.")
    return found


def load(path: Path | None, default: Path = DEFAULT_PATH) -> Config:
    """The configuration in ``path``; None: in ``default``, which may be missing.

    Raises:
        ConfigError: the file cannot be read, or what :func:`parse` finds.
    """
    chosen = default if path is None else path
    try:
        with chosen.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        if path is None and isinstance(error, FileNotFoundError):
            return Config()
        raise ConfigError(
            f"{chosen}: cannot be read: {error.strerror}; it must be a file that this user may read"
        ) from None
    if len(text) > _MAX_BYTES:  # A device or a log, named by mistake.
        raise ConfigError(f"{chosen}: no configuration has over {_MAX_BYTES} bytes; shorten it")
    return parse(text, str(chosen))


def parse(text: bytes, name: str) -> Config:
    """The configuration that ``text`` holds; ``name`` stands for it in messages.

    Raises:
        ConfigError: all that is wrong. Sections that are unknown are not looked into.
    """
    try:
        tables = tomllib.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}: line {line} is not UTF-8; save it in that encoding") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}; correct it there") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{name}: too many digits or brackets in a row; shorten it") from None
    errors: list[str] = []
    config: Config = _read(Config, tables, "", errors)
    if errors:
        raise ConfigError(*(f"{name}: {error}" for error in errors))
    return config


def _entries(section: type) -> dict[str, Any]:
    """Name → :class:`Key`, or the dataclass of a section."""
    hints = get_type_hints(section, include_extras=True)
    return {name: Key(*get_args(hint)) if get_args(hint) else hint for name, hint in hints.items()}


def _read(section: type, table: dict[str, Any], prefix: str, errors: list[str]) -> Any:
    """The section that ``table`` holds, with defaults for what is left out or wrong."""
    entries = _entries(section)
    values = {}
    for name, value in table.items():
        dotted = prefix + (name if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name) else _shown(name))
        entry = entries.get(name)
        if entry is None:
            errors.append(f"{dotted}: {_unknown(dotted, value, entries)}")
        elif isinstance(entry, Key):
            try:
                values[name] = entry.rule.read(value)
            except ValueError as refused:
                remedy = f"give {entry.rule.allowed} ({entry.meaning})"
                errors += [f"{dotted}: {fault}; {remedy}" for fault in refused.args]
        elif isinstance(value, dict):
            values[name] = _read(entry, value, f"{dotted}.", errors)
        else:
            errors.append(f"{dotted}: {_shown(value)} is no section; begin it with [{dotted}]")
    return section(**values)


def _unknown(dotted: str, value: Any, entries: Iterable[str]) -> str:
    kind, known = "key", set(keys())
    if isinstance(value, dict):
        kind, known = "section", {name.rpartition(".")[0] for name in known}
    meant = _closest(dotted.lower(), known)
    return f"unknown {kind}; " + (
        f"did you mean {meant}?" if meant else f"known here: {', '.join(entries)}"
    )


def _closest(word: str, known: Iterable[str]) -> str:
    return "".join(difflib.get_close_matches(word[:100], known, 1))


def _shown(value: object) -> str:
    """A TOML value for a message: short, on one line."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "an array"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a number beyond 64 bits"
    text = repr(value) if isinstance(value, float) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
