"""softnet_stat of kernels old and new: what each column means, and which CPU a row is of."""

from __future__ import annotations

import pytest

from stalld.enrich.softnet import Softnet, parse

ROWS = {
    # 2.6.32: nine columns, the last is cpu_collision.
    9: "0000002a 00000003 00000001 00000000 00000000 00000000 00000000 00000000 00000007",
    # 3.2: received_rps.
    10: "0000002a 00000003 00000001 00000000 00000000 00000000 00000000 00000000 00000000 00000005",
    # 4.19: flow_limit_count.
    11: "0000002a 00000003 00000001 00000000 00000000 00000000 00000000 00000000 00000000 00000005 "
    "00000006",
    # 5.10: the backlog's length, and the CPU.
    13: "0000002a 00000003 00000001 00000000 00000000 00000000 00000000 00000000 00000000 00000005 "
    "00000006 00000009 0000000b",
    # 6.18: the backlog's two parts.
    15: "0000002a 00000003 00000001 00000000 00000000 00000000 00000000 00000000 00000000 00000005 "
    "00000006 00000009 0000000b 00000008 00000001",
}
MEANING = {
    9: (4, Softnet(42, 3, 1)),
    10: (4, Softnet(42, 3, 1, 5)),
    11: (4, Softnet(42, 3, 1, 5, 6)),
    13: (11, Softnet(42, 3, 1, 5, 6, 9)),
    15: (11, Softnet(42, 3, 1, 5, 6, 8)),
}


@pytest.mark.parametrize("columns", ROWS)
def test_columns(columns: int) -> None:
    """What a kernel does not tell is unknown; a row that names its CPU is of that one."""
    assert len(ROWS[columns].split()) == columns
    cpu, wanted = MEANING[columns]
    assert parse(ROWS[columns] + "\n", lambda: [4]) == {cpu: wanted}


def test_rows_without_a_number() -> None:
    """They are of the online CPUs in order; if they do not fit, a CPU came or went just now."""
    rows = "\n".join([ROWS[11], ROWS[11].replace("2a", "2b")])
    found = parse(rows, lambda: [0, 3])
    assert {cpu: row.processed for cpu, row in found.items()} == {0: 42, 3: 43}
    with pytest.raises(ValueError, match="2 rows for 3 CPUs"):
        parse(rows, lambda: [0, 1, 3])


def test_numbered_rows_need_no_list() -> None:
    """They tell by themselves who is there: nobody is asked."""
    assert list(parse(ROWS[13], lambda: pytest.fail("asked"))) == [11]


@pytest.mark.parametrize("text", ["1 2", "what is this", "0x1 2 z"])
def test_no_such_table(text: str) -> None:
    """Anything else is an error, not a guess."""
    with pytest.raises(ValueError, match=r"."):
        parse(text, lambda: [0])


def test_nothing() -> None:
    """An empty table is no error."""
    assert parse("", list) == {}
