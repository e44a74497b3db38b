"""The reader of typed tables, with a table of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from stalld.tables import (
    SWITCH,
    Key,
    Rule,
    Section,
    closest,
    keys,
    number,
    one_of,
    read,
    sections,
    shown,
    string,
    strings,
)

WORD = string("letters", lambda word: "" if word.isalpha() else "has no letters")


@dataclass(frozen=True)
class Leg:
    """A section that stands many times, with a key that must be given."""

    name: Annotated[str, WORD, "what it is called"]
    joints: Annotated[int, number(int, 0, 9), "how often it bends"] = 2

    def faults(self, wrong: Set[str]) -> Iterable[str]:
        """Lame legs do not bend."""
        if self.name == "lame" and self.joints and "joints" not in wrong:
            yield "joints: a lame leg has none; give 0"


@dataclass(frozen=True)
class Head:
    """A section in a section."""

    horns: Annotated[bool, SWITCH, "whether it has horns"] = False
    weight_kg: Annotated[float, number(float, 0.5, 90), "how heavy it is"] = 7.0


@dataclass(frozen=True)
class Body:
    """A section that stands once."""

    colours: Annotated[
        tuple[str, ...],
        strings("colours", lambda c: "" if c else "is nothing"),
        "what it looks like",
    ] = ("brown",)
    head: Head = Head()
    legs: tuple[Leg, ...] = ()

    def faults(self, wrong: Set[str]) -> Iterable[str]:
        """Tells what it was told."""
        if wrong:
            yield f"wrong: {', '.join(sorted(wrong))}; right them"


@dataclass(frozen=True)
class Animal:
    """The root."""

    species: Annotated[str, one_of("cow", "Goat"), "what it is"] = "cow"
    body: Body = Body()


KEYS = {
    "species": "what it is",
    "body.colours": "what it looks like",
    "body.head.horns": "whether it has horns",
    "body.head.weight_kg": "how heavy it is",
    "body.legs.name": "what it is called",
    "body.legs.joints": "how often it bends",
}


def refused(table: dict[str, Any]) -> list[str]:
    """The errors in a document."""
    errors: list[str] = []
    read(Animal, table, errors)
    assert errors
    return errors


def test_keys() -> None:
    """All keys by their dotted names in the order of the table, each with what is said of it."""
    assert {name: key.meaning for name, key in keys(Animal).items()} == KEYS
    assert list(keys(Animal)) == list(KEYS)
    assert keys(Animal)["body.legs.name"] == Key(str, WORD, "what it is called")
    assert keys(Animal)["body.colours"].type == tuple[str, ...]


def test_sections() -> None:
    """All sections by their dotted names, each with whether it may stand many times."""
    assert sections(Animal) == {
        "body": Section(Body, False),
        "body.head": Section(Head, False),
        "body.legs": Section(Leg, True),
    }


def test_names_given_out_may_be_changed() -> None:
    """Who changes what :func:`keys` and :func:`sections` give changes nothing for others."""
    keys(Animal).clear()
    sections(Animal).clear()
    assert list(keys(Animal)) == list(KEYS)
    assert len(sections(Animal)) == 3


def test_nothing_given() -> None:
    """What is not given has its default."""
    errors: list[str] = []
    assert read(Animal, {}, errors) == Animal()
    assert read(Animal, {"body": {"head": {}, "legs": []}}, errors) == Animal()
    assert errors == []


def test_all_given() -> None:
    """What is given becomes the value, in sections, sections of sections and arrays of them."""
    errors: list[str] = []
    found = read(
        Animal,
        {
            "species": "Goat",
            "body": {
                "colours": [],
                "head": {"horns": True, "weight_kg": 8},
                "legs": [{"name": "left"}, {"name": "lame", "joints": 0}],
            },
        },
        errors,
    )
    assert found == Animal("Goat", Body((), Head(True, 8.0), (Leg("left"), Leg("lame", 0))))
    assert type(found.body.head.weight_kg) is float
    assert errors == []


def test_errors_add_to_those_that_are_there() -> None:
    """One list takes the errors of many readings."""
    errors = ["before"]
    read(Animal, {"x": 1}, errors)
    assert errors == ["before", "x: unknown key; known here: species, body"]


def test_what_is_wrong_has_its_default_or_none() -> None:
    """A reading with errors still gives something that can be looked at."""
    errors: list[str] = []
    legs = [{"name": 1, "joints": 10}, {}, 3]
    found = read(Animal, {"species": 1, "body": {"head": 1, "legs": legs}}, errors)
    nameless: Any = None
    assert found == Animal(body=Body(legs=(Leg(nameless), Leg(nameless))))


@pytest.mark.parametrize(
    ("kind", "least", "most", "said"),
    [
        (int, 1, 9, "a whole number from 1 to 9"),
        (int, -10, 100, "a whole number from -10 to 100"),
        (float, 0.25, 60_000, "a number from 0.25 to 60000"),
        (float, 0, 10, "a number from 0 to 10"),
    ],
)
def test_number(kind: type[int] | type[float], least: float, most: int, said: str) -> None:
    """Both bounds are in, what is beyond them is not, and the rule says so."""
    rule = number(kind, least, most)
    assert rule.allowed == said
    for value in (kind(least), kind(most), int(most)):
        assert rule.read(value) == value
        assert type(rule.read(value)) is kind
    for value in (least - 1, most + 1):
        with pytest.raises(ValueError, match=f"^{value} is out of range$"):
            rule.read(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 10**400, -(10**400)])
def test_no_number(value: float) -> None:
    """What is no number, or beyond all, is out of every range; it is no error of ours."""
    with pytest.raises(ValueError, match=r" is out of range$"):
        number(float, 1, 5).read(value)


@pytest.mark.parametrize("value", [True, "1", 1.0, None, [1], {}])
def test_no_whole_number(value: object) -> None:
    """A bool is no whole number, nor is a number that happens to be whole."""
    with pytest.raises(ValueError, match=r" is not a whole number$"):
        number(int, 0, 5).read(value)


def faults(rule: Rule, value: object) -> tuple[str, ...]:
    """What a rule has against a value."""
    with pytest.raises(ValueError, match=r".") as caught:
        rule.read(value)
    return caught.value.args


def test_strings() -> None:
    """Each item is told that is no string or against the rule; an array may be empty."""
    rule = strings("words", lambda word: "" if word.isalpha() else "has no letters")
    assert rule.read(["b", "a", "b"]) == ("b", "a", "b")
    assert rule.read([]) == ()
    assert faults(rule, "a") == ('"a" is not an array',)
    assert faults(rule, ["a", 1, "2", "b\0", [["a"]]]) == (
        "1 is not a string",
        '"2" has no letters',
        '"b\\u0000" holds a NUL character',
        "an array is not a string",
    )


def test_distinct_strings() -> None:
    """None twice, and one at least; what is wrong is not called a repetition too."""
    rule = strings("words", lambda word: "" if word.isalpha() else "has no letters", distinct=True)
    assert rule.read(["b", "a"]) == ("b", "a")
    assert faults(rule, []) == ("the array is empty",)
    assert faults(rule, ["a", "b", "a", "a"]) == ('"a" is there already',) * 2
    assert faults(rule, ["2", "2", 1, True, 1.0]) == (
        '"2" has no letters',
        '"2" has no letters',
        "1 is not a string",
        "true is not a string",
        "1.0 is not a string",
    )


def test_string() -> None:
    """A string, without NUL, that the rule has nothing against."""
    assert WORD.read("abc") == "abc"
    assert faults(WORD, 1) == ("1 is not a string",)
    assert faults(WORD, "1") == ('"1" has no letters',)
    assert faults(WORD, "a\0") == ('"a\\u0000" holds a NUL character',)


def test_one_of() -> None:
    """One of the words; a word in other letters leads to it."""
    rule = one_of("cow", "goat")
    assert rule.allowed == "one of cow, goat"
    assert rule.read("goat") == "goat"
    assert faults(rule, "GOAT") == ('"GOAT" is none of them (did you mean goat?)',)
    assert faults(rule, "horse") == ('"horse" is none of them',)


def test_switch() -> None:
    """True or false and nothing that is like them."""
    assert SWITCH.read(True) is True
    assert SWITCH.read(False) is False
    for value in (0, 1, "true", None):
        assert faults(SWITCH, value)[0].endswith(" is neither true nor false")


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({"species": 1}, "species: 1 is not a string; give one of cow, Goat (what it is)"),
        ({"x": 1}, "x: unknown key; known here: species, body"),
        ({"x": {}}, "x: unknown section; known here: species, body"),
        ({"x": []}, "x: unknown key; known here: species, body"),
        ({"x": [1, {}]}, "x: unknown section; known here: species, body"),
        ({"Species": 1}, "Species: unknown key; did you mean species?"),
        ({"horns": True}, "horns: unknown key; did you mean body.head.horns?"),
        ({"head": {}}, "head: unknown section; did you mean body.head?"),
        ({"a\x1b\n.b": 1}, '"a\\u001b\\n.b": unknown key; known here: species, body'),
        ({"é": 1}, '"\\u00e9": unknown key; known here: species, body'),
    ],
)
def test_one_error(table: dict[str, Any], error: str) -> None:
    """Each fault is one line: place, fault and remedy."""
    assert refused(table) == [error]


LEGS = "begin each with [[body.legs]]"


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ({"head": 1}, ["head: 1 is no section; begin it with [body.head]"]),
        ({"head": []}, ["head: an array is no section; begin it with [body.head]"]),
        (
            {"head": [{"horns": 1}]},
            [
                "head: an array is no section; begin it with [body.head]",
                "head.horns: 1 is neither true nor false; give true or false "
                "(whether it has horns)",
            ],
        ),
        (
            {"head": [{"horns": 1}, 2, {"x": 1}]},
            [
                "head: an array is no section; begin it with [body.head]",
                "head[1].horns: 1 is neither true nor false; give true or false "
                "(whether it has horns)",
                "head[3].x: unknown key; known here: horns, weight_kg",
            ],
        ),
        ({"legs": 1}, [f"legs: 1 is no list; {LEGS}"]),
        ({"legs": {"name": "a"}}, [f"legs: a table is no list; {LEGS}"]),
        (
            {"legs": {"x": 1}},
            [
                f"legs: a table is no list; {LEGS}",
                "legs.x: unknown key; known here: name, joints",
                "legs.name: is missing; give letters (what it is called)",
            ],
        ),
        (
            {"legs": [1, {"name": "a"}, []]},
            [f"legs[1]: 1 is no table; {LEGS}", f"legs[3]: an array is no table; {LEGS}"],
        ),
        ({"legs": [{}]}, ["legs.name: is missing; give letters (what it is called)"]),
        (
            {"legs": [{"name": "a"}, {"name": "b", "Joints": 1}]},
            ["legs[2].Joints: unknown key; did you mean body.legs.joints?"],
        ),
        (
            {"legs": [{"name": "lame"}, {"name": "lame", "joints": "1"}]},
            [
                "legs[1].joints: a lame leg has none; give 0",
                'legs[2].joints: "1" is not a whole number; give a whole number from 0 to 9 '
                "(how often it bends)",
            ],
        ),
    ],
)
def test_sections_of_another_shape(body: dict[str, Any], errors: list[str]) -> None:
    """What is no section is told, and what it holds is looked into all the same.

    The section around it hears where something was wrong.
    """
    (name,) = body
    assert refused({"body": body}) == [
        *(f"body.{error}" for error in errors),
        f"body.wrong: {name}; right them",
    ]


def test_closest() -> None:
    """The most similar word, or none; a long one takes no long time."""
    assert closest("hed", ("head", "legs")) == "head"
    assert closest("xyz", ("head", "legs")) == ""
    assert closest("head" + "x" * 10**6, ("head",)) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (1, "1"),
        (-(1 << 63) + 1, "-9223372036854775807"),
        (1 << 63, "a number beyond 64 bits"),
        pytest.param(-(10**5000), "a number beyond 64 bits", id="huge"),
        (1.5, "1.5"),
        (float("nan"), "nan"),
        ("", '""'),
        ('a"\\\x7f\x1b\n\u2028é', r'"a\"\\\u007f\u001b\n\u2028\u00e9"'),
        ("x" * 58, f'"{"x" * 58}"'),
        ("x" * 59, f'"{"x" * 56}...'),
        ([], "an array"),
        ({}, "a table"),
    ],
)
def test_shown(value: object, text: str) -> None:
    """A value on one line, short, without a character that a terminal takes amiss."""
    assert shown(value) == text
    assert len(shown(value)) <= 60
    assert shown(value).isascii()
    assert shown(value).isprintable()


def test_readings_are_independent() -> None:
    """The same document read twice gives the same, and is not changed."""
    table = {"body": {"legs": [{"name": "a"}], "head": 1}, "x": {"y": [1]}}
    before = json.dumps(table)
    assert refused(table) == refused(table)
    assert json.dumps(table) == before
