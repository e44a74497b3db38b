"""Every hint points to a section of the runbook, and the runbook explains each in the same way."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stalld.enrich import nic_hints
from stalld.track import hints
from stalld.track.verdict import Verdict

TEXT = (Path(__file__).parents[2] / hints.RUNBOOK).read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
POINTERS = {rule.section for rule in hints.RULES} | {rule.section for rule in nic_hints.RULES}


def anchor(title: str) -> str:
    """As a renderer of Markdown makes it of a title."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


ANCHORS = {anchor(title) for title in SECTIONS}


@pytest.mark.parametrize("section", sorted(POINTERS))
def test_every_pointer_has_its_section(section: str) -> None:
    """Whoever follows a hint finds what it is about."""
    assert section in ANCHORS


def test_every_section_is_pointed_to() -> None:
    """None is left of a hint that is gone."""
    assert POINTERS == ANCHORS


def test_every_verdict_has_its_section() -> None:
    """Also the one that has seldom a hint."""
    assert {verdict.value for verdict in Verdict} <= ANCHORS


@pytest.mark.parametrize("title", SECTIONS)
def test_sections_answer_the_same_questions(title: str) -> None:
    """What it means, how to confirm it, what to change, and what that may cost."""
    asked = re.findall(r"^\*\*(\w+)\.\*\*", SECTIONS[title], re.MULTILINE)
    assert asked == ["Means", "Confirm", "Change", "Risk"]


def test_links_inside() -> None:
    """Sections that name others name those that there are."""
    assert set(re.findall(r"\(#([\w-]+)\)", TEXT)) <= ANCHORS
