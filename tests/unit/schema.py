"""Holds lines against the schema that the package ships."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator

SCHEMA = json.loads((files("stalld") / "schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)


def parse(line: bytes) -> dict[str, Any]:
    """One line as the event it must be."""
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    event: dict[str, Any] = json.loads(line.decode("utf-8", "strict"))
    VALIDATOR.validate(event)
    return event
