"""Episodes of counters that grow too fast."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stalld.track.rates import Episode, Phase, Rates

S = 10**9
T0 = 1000 * S


def rates(limit: float = 1.0, **more: float) -> Rates[int]:
    """With a limit for drops, and more."""
    return Rates({"dropped": limit} | more, 32, 8)


def looks(watch: Rates[int], *dropped: int, every_s: int = 10) -> list[Episode | None]:
    """One look each ten seconds."""
    return [
        watch.take(0, T0 + number * every_s * S, {"dropped": count, "packets": 7 * number})
        for number, count in enumerate(dropped)
    ]


def phases(told: list[Episode | None]) -> list[str | None]:
    """Only what they are called."""
    return [episode.phase if episode else None for episode in told]


def test_quiet() -> None:
    """Counters that stand still, or grow no faster than allowed, are nothing to tell."""
    assert phases(looks(rates(), 500, 500, 510, 520)) == [None] * 4


def test_an_episode() -> None:
    """Begun, ongoing at each look, ended once, then quiet; what is told are sums since it began."""
    told = looks(rates(), 0, 5, 105, 305, 306, 306)
    assert phases(told) == [None, None, "begun", "ongoing", "ended", None]
    begun, ongoing, ended = (episode for episode in told if episode)
    assert [e.counts["dropped"] for e in (begun, ongoing, ended)] == [100, 300, 301]
    assert [e.counts["packets"] for e in (begun, ongoing, ended)] == [7, 14, 21]
    assert {e.since_ns for e in (begun, ongoing, ended)} == {T0 + 10 * S}
    assert ended.until_ns == T0 + 40 * S
    assert [e.per_second["dropped"] for e in (begun, ongoing, ended)] == [10, 20, 0.1]


def test_another_episode() -> None:
    """The next one begins with its own sums."""
    told = looks(rates(), 0, 100, 100, 100, 150)
    assert phases(told) == [None, "begun", "ended", None, "begun"]
    assert told[-1] is not None
    assert told[-1].counts["dropped"] == 50


def test_any_limit_will_do() -> None:
    """One counter over its limit makes the episode; rates of all that have one are told."""
    watch = rates(squeezed=5.0)
    watch.take(0, T0, {"dropped": 0, "squeezed": 0})
    told = watch.take(0, T0 + 2 * S, {"dropped": 0, "squeezed": 11})
    assert told == Episode(
        Phase.BEGUN, T0, T0 + 2 * S, {"dropped": 0, "squeezed": 11}, {"dropped": 0, "squeezed": 5.5}
    )


def test_wrap() -> None:
    """Counters have 32 bits."""
    told = looks(rates(), 0xFFFFFFF0, 0x10)
    assert told[1] is not None
    assert told[1].counts["dropped"] == 0x20


def test_a_counter_that_was_reset() -> None:
    """What went back was set to zero: the next look is the first again."""
    told = looks(rates(), 5000, 10, 10, 30)
    assert phases(told) == [None, None, None, "begun"]
    assert told[3] is not None
    assert told[3].counts["dropped"] == 20


def test_packets_of_a_busy_cpu() -> None:
    """They may grow by more than half of 32 bits: that is no reset, as it would be of drops."""
    watch = rates()
    watch.take(0, T0, {"dropped": 0, "packets": 0xF0000000})
    told = watch.take(0, T0 + 3600 * S, {"dropped": 9000, "packets": 0xE0000000})
    assert told is not None
    assert told.counts == {"dropped": 9000, "packets": 0xF0000000}


def test_a_device_that_was_reset() -> None:
    """Counters of 64 bits never wrap: whichever goes back, it was a reset."""
    watch: Rates[int] = Rates({"drops": 1.0}, 64, 8)
    watch.take(0, T0, {"drops": 0, "packets": 1000})
    assert watch.take(0, T0 + S, {"drops": 50, "packets": 10}) is None
    assert watch.take(0, T0 + 2 * S, {"drops": 100, "packets": 20}) is not None


def test_sources_that_come_and_go() -> None:
    """An offline CPU's row is missing; its counters go on where they were when it is back."""
    watch = rates()
    watch.take(0, T0, {"dropped": 3})
    watch.take(1, T0, {"dropped": 7})
    assert watch.take(1, T0 + 10 * S, {"dropped": 7}) is None
    told = watch.take(0, T0 + 100 * S, {"dropped": 503})
    assert told is not None
    assert told.counts == {"dropped": 500}
    watch.keep([0])
    assert watch.take(1, T0 + 110 * S, {"dropped": 9999}) is None


def test_bounded() -> None:
    """No more sources than agreed are kept in mind; a place that is free again is used."""
    watch: Rates[int] = Rates({"dropped": 1.0}, 64, 2)
    for number in range(4):
        watch.take(number, T0, {"dropped": 0})
    told = [watch.take(number, T0 + S, {"dropped": 50}) for number in range(4)]
    assert phases(told) == ["begun", "begun", None, None]
    watch.keep([0, 3])
    watch.take(3, T0 + S, {"dropped": 50})
    assert watch.take(3, T0 + 2 * S, {"dropped": 100}) is not None


def test_limits_that_change() -> None:
    """Others are gone by from the next look on."""
    watch = rates(1000.0)
    assert phases(looks(watch, 0, 100)) == [None, None]
    watch.limits = {"dropped": 1.0}
    assert watch.take(0, T0 + 20 * S, {"dropped": 200, "packets": 14}) is not None


def test_a_counter_that_is_not_known_any_more() -> None:
    """It is left out, and counted from where it is when it is back."""
    watch = rates()
    watch.take(0, T0, {"dropped": 0, "missed": 0})
    told = watch.take(0, T0 + S, {"dropped": 10})
    assert told is not None
    assert told.counts == {"dropped": 10}
    told = watch.take(0, T0 + 2 * S, {"dropped": 20, "missed": 99})
    assert told is not None
    assert told.counts == {"dropped": 20}


def test_no_time_went_by() -> None:
    """Two looks at once make no rate."""
    watch = rates()
    watch.take(0, T0, {"dropped": 0})
    assert watch.take(0, T0, {"dropped": 50}) is None


@given(st.lists(st.integers(0, 1 << 30), min_size=1, max_size=30), st.integers(0, 0xFFFFFFFF))
def test_nothing_is_counted_twice_or_forgotten(steps: list[int], start: int) -> None:
    """From begun to ended the sums are what the counter grew by, across any number of wraps."""
    watch = rates(0.0)
    count = start
    watch.take(0, T0, {"dropped": count & 0xFFFFFFFF})
    total = 0
    for number, step in enumerate(steps, 1):
        count += step
        told = watch.take(0, T0 + number * S, {"dropped": count & 0xFFFFFFFF})
        total += step
        if told is None:
            assert step == total == 0
            continue
        assert told.counts["dropped"] == total
        assert (told.phase is Phase.ENDED) is (step == 0)
        if told.phase is Phase.ENDED:
            total = 0
