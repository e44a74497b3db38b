"""Typed tables from TOML: dataclasses say which keys there are, this reads and checks them.

A field is annotated with the key's type, rule and meaning (:class:`Key`), or it is a section, a
dataclass again, or ``tuple[Section, ...]`` for a section that may stand any number of times. A
key without a default must be given; a section always has one. A section may have a method
``faults(wrong)``, which says what is wrong with values that are each right. ``wrong`` are the
names of its keys and sections with errors of their own: what these hold proves nothing.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints


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


class Section(NamedTuple):
    """A dataclass; ``many``: any number of tables of it."""

    type: Any
    many: bool


def number(kind: type[int] | type[float], least: float, most: int) -> Rule:
    """A number within bounds; a whole number will do for a float, not the reverse."""
    noun = "a whole number" if kind is int else "a number"

    def read(value: Any) -> float:
        # Not isinstance: a bool is an int to Python.
        if type(value) not in (int, kind):
            raise ValueError(f"{shown(value)} is not {noun}")
        if not least <= value <= most:
            raise ValueError(f"{shown(value)} is out of range")
        return kind(value)

    return Rule(f"{noun} from {f'{least:f}'.rstrip('0').rstrip('.')} to {most}", read)


def strings(allowed: str, fault: Callable[[str], str], *, distinct: bool = False) -> Rule:
    """An array; ``fault`` says what is wrong with an item, or "". Distinct: one at least."""

    def read(items: Any) -> tuple[str, ...]:
        if not isinstance(items, list):
            raise ValueError(f"{shown(items)} is not an array")
        faults = []
        right: dict[str, None] = {}
        for item in items:
            what = _string_fault(item, fault)
            if not what and distinct and item in right:
                what = "is there already"
            if what:
                faults.append(f"{shown(item)} {what}")
            else:
                right[item] = None
        if faults or (distinct and not items):
            raise ValueError(*faults or ["the array is empty"])
        return tuple(items)

    return Rule(allowed, read)


def string(allowed: str, fault: Callable[[str], str]) -> Rule:
    """A string; ``fault`` says what is wrong with it, or ""."""

    def read(value: Any) -> str:
        what = _string_fault(value, fault)
        if what:
            raise ValueError(f"{shown(value)} {what}")
        return str(value)

    return Rule(allowed, read)


def _string_fault(value: Any, fault: Callable[[str], str]) -> str:
    if not isinstance(value, str):
        return "is not a string"
    # No file, host, group or thread has one in its name, and system calls end there.
    return "holds a NUL character" if "\0" in value else fault(value)


def one_of(*words: str) -> Rule:
    """One of some words."""

    def fault(value: str) -> str:
        if value in words:
            return ""
        meant = closest(value.lower(), words)
        return "is none of them" + (f" (did you mean {meant}?)" if meant else "")

    return string(f"one of {', '.join(words)}", fault)


def _read_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{shown(value)} is neither true nor false")
    return value


SWITCH = Rule("true or false", _read_bool)


def keys(section: type, prefix: str = "") -> dict[str, Key]:
    """All keys by their dotted names, in the order of the table."""
    found: dict[str, Key] = {}
    for name, entry in _entries(section).items():
        dotted = prefix + name
        found |= {dotted: entry} if isinstance(entry, Key) else keys(entry.type, f"{dotted}.")
    return found


def sections(section: type, prefix: str = "") -> dict[str, Section]:
    """All sections by their dotted names, in the order of the table."""
    found: dict[str, Section] = {}
    for name, entry in _entries(section).items():
        if isinstance(entry, Section):
            found[prefix + name] = entry
            found |= sections(entry.type, f"{prefix}{name}.")
    return found


def read(section: type, table: dict[str, Any], errors: list[str]) -> Any:
    """The ``section`` that a TOML document holds; adds to ``errors`` all that is wrong.

    With errors, what was left out or wrong has its default, or stands as None.
    """
    return _read(section, table, "", errors, section)


@cache
def _entries(section: type) -> dict[str, Key | Section]:
    found: dict[str, Key | Section] = {}
    for name, hint in get_type_hints(section, include_extras=True).items():
        if get_origin(hint) is Annotated:
            found[name] = Key(*get_args(hint))
        elif get_origin(hint) is tuple:
            found[name] = Section(get_args(hint)[0], True)
        else:
            found[name] = Section(hint, False)
    return found


def _read(section: type, table: dict[str, Any], prefix: str, errors: list[str], root: type) -> Any:
    entries = _entries(section)
    values: dict[str, Any] = {}
    wrong: set[str] = set()
    for name, value in table.items():
        dotted = prefix + (name if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name) else shown(name))
        before = len(errors)
        entry = entries.get(name)
        if entry is None:
            errors.append(f"{dotted}: {_unknown(dotted, value, entries, root)}")
        elif isinstance(entry, Key):
            try:
                values[name] = entry.rule.read(value)
            except ValueError as refused:
                errors += [f"{dotted}: {fault}; {_remedy(entry)}" for fault in refused.args]
        elif entry.many:
            values[name] = _read_many(entry.type, value, dotted, errors, root)
        elif isinstance(value, dict):
            values[name] = _read(entry.type, value, f"{dotted}.", errors, root)
        else:
            errors.append(f"{dotted}: {shown(value)} is no section; begin it with [{dotted}]")
            _look_into(entry.type, value, dotted, errors, root)
        if len(errors) > before:
            wrong.add(name)
    for field in fields(section):
        key = entries[field.name]
        if field.default is MISSING and isinstance(key, Key) and field.name not in values:
            if field.name not in table:
                errors.append(f"{prefix}{field.name}: is missing; {_remedy(key)}")
                wrong.add(field.name)
            values[field.name] = None
    whole = section(**values)
    if hasattr(whole, "faults"):
        errors += [f"{prefix}{fault}" for fault in whole.faults(frozenset(wrong))]
    return whole


def _read_many(
    section: type, value: Any, dotted: str, errors: list[str], root: type
) -> tuple[Any, ...]:
    remedy = f"begin each with [[{_unnumbered(dotted)}]]"
    if not isinstance(value, list):
        errors.append(f"{dotted}: {shown(value)} is no list; {remedy}")
    else:
        errors += [
            f"{dotted}[{index}]: {shown(item)} is no table; {remedy}"
            for index, item in enumerate(value, 1)
            if not isinstance(item, dict)
        ]
    return _look_into(section, value, dotted, errors, root)


def _look_into(
    section: type, value: Any, dotted: str, errors: list[str], root: type
) -> tuple[Any, ...]:
    """Read all tables in ``value``, whatever it is, so that all their errors are told too."""
    items = value if isinstance(value, list) else [value]
    return tuple(
        _read(section, item, f"{dotted}{f'[{n}]' if len(items) > 1 else ''}.", errors, root)
        for n, item in enumerate(items, 1)
        if isinstance(item, dict)
    )


def _remedy(key: Key) -> str:
    return f"give {key.rule.allowed} ({key.meaning})"


def _unnumbered(dotted: str) -> str:
    return re.sub(r"\[\d+\]", "", dotted)


def _unknown(dotted: str, value: Any, entries: Iterable[str], root: type) -> str:
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, dict) for item in items):
        kind, known = "section", list(sections(root))
    else:
        kind, known = "key", list(keys(root))
    prefix, _, word = _unnumbered(dotted).lower().rpartition(".")
    # What has the same name elsewhere comes after what stands in this section.
    known.sort(key=lambda name: name.rpartition(".")[0] != prefix)
    named = {name.rpartition(".")[2]: name for name in reversed(known)}
    meant = named.get(closest(word, named))
    return f"unknown {kind}; " + (
        f"did you mean {meant}?" if meant else f"known here: {', '.join(entries)}"
    )


def closest(word: str, known: Iterable[str]) -> str:
    """The most similar of ``known``, or "" where none is."""
    return "".join(difflib.get_close_matches(word[:100], known, 1))


def shown(value: object) -> str:
    """A TOML value for a message: short, on one line, in printable ASCII."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "an array"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a number beyond 64 bits"
    # Dates and times bare, as they stand in the file: in quotes they would be strings.
    text = json.dumps(value) if isinstance(value, str | bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
