"""Events at a terminal: what a person needs, and nothing that controls the terminal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.sinks.text import TOP_FRAMES, render, safe

HEAD = {"timestamp": "T", "level": "warning", "schema": "s", "host": "h"}


def stall(**changes: Any) -> dict[str, Any]:
    """A stall as events.py makes it."""
    event: dict[str, Any] = HEAD | {
        "event": "stall",
        "phase": "resolved",
        "cpu": 3,
        "duration_ms": 51.26,
        "verdict": "stuck_in_kernel",
        "starved": {"NET_RX": 50.0, "TIMER": 20.0},
        "ksoftirqd": {"pid": 16, "runnable_ms": 49.5},
        "blocker": {"comm": "cadvisor", "pid": 10, "tid": 11, "mode": "kernel", "policy": "other"},
        "stack": {"kernel": ["memcg_stat_show+0x10", "seq_read+0x5"], "user": []},
    }
    return event | changes


def test_a_whole_stall() -> None:
    """CPU, length, verdict, who starved, who is to blame, and where."""
    assert render(stall()) == (
        "T warning stall cpu 3: 51.3 ms, stuck_in_kernel; starved: NET_RX 50.0 ms, TIMER 20.0 ms\n"
        "    cadvisor pid 10 tid 11 in kernel mode, policy other\n"
        "    ksoftirqd pid 16 waited 49.5 ms\n"
        "      memcg_stat_show+0x10\n"
        "      seq_read+0x5"
    )


def test_brief() -> None:
    """Unknown things take no line, and a line that goes on says so."""
    bare = stall(
        phase="ongoing", starved={}, ksoftirqd=None, blocker=None, stack={"kernel": [], "user": []}
    )
    assert (
        render(bare) == "T warning stall cpu 3: 51.3 ms so far, stuck_in_kernel; starved: nothing"
    )


@pytest.mark.parametrize("more", [0, 1, 100])
def test_long_stacks_are_cut(more: int) -> None:
    """The innermost frames are shown, the others counted."""
    frames = [f"f{n}+0x0" for n in range(TOP_FRAMES + more)]
    lines = render(stall(stack={"kernel": frames, "user": []})).splitlines()[3:]
    assert lines[:TOP_FRAMES] == [f"      {frame}" for frame in frames[:TOP_FRAMES]]
    assert lines[TOP_FRAMES:] == ([f"      … {more} more"] if more else [])


def test_unknown_mode() -> None:
    """A mode that is not known is called that."""
    blocker = {"comm": "c", "pid": 1, "tid": 1, "mode": None, "policy": None}
    assert "c pid 1 tid 1 in unknown mode" in render(stall(blocker=blocker))


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\nb\r\t\0\x7f", "a\\nb\\r\\t\\x00\\x7f"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202eevil\u2066\u200b\u2028", "\\u202eevil\\u2066\\u200b\\u2028"),
        ("\ud800", "\\ud800"),
        ('it\'s "fine" café 日本', 'it\'s "fine" café 日本'),
    ],
)
def test_control_characters_are_escaped(given_text: str, shown: str) -> None:
    """Sequences that move the cursor, colour or reorder text stand as escapes."""
    assert safe(given_text) == shown


@given(st.text(), st.text())
def test_no_name_controls_the_terminal(comm: str, frame: str) -> None:
    """Whatever task and frame are called, the lines are ours, printable and encodable."""
    blocker = {"comm": comm, "pid": 1, "tid": 1, "mode": None, "policy": None}
    text = render(stall(blocker=blocker, stack={"kernel": [frame], "user": []}))
    lines = text.split("\n")
    assert len(lines) == 4
    assert all(each.isprintable() for each in lines)
    assert text.encode()


@given(st.dictionaries(st.sampled_from(["cpu", "count"]), st.text() | st.lists(st.text())))
def test_other_events_are_one_line(fields: dict[str, Any]) -> None:
    """Any other event is one printable line without the common keys."""
    text = render(HEAD | {"event": "records_lost"} | fields)
    assert text.startswith("T warning records_lost")
    assert "schema=" not in text
    assert text.isprintable()
