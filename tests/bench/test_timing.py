"""What is left of a benchmark: the turns of each contender, by its last turn."""

from fastmae.bench import timing
from fastmae.bench.timing import Timetable


def test_the_time_left_counts_each_contender_by_its_own_last_turn(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    timetable = Timetable({"slow": 3, "quick": 3, "other": 1})
    assert (timetable.turns, timetable.seconds_left()) == (7, None)
    for name, seconds in [("slow", 30), ("slow", 20), ("quick", 2)]:
        assert timetable.seconds_left() is None  # one contender tells nothing about the others
        with timetable.turn(name):
            now[0] += seconds
    assert timetable.seconds_left() == 1 * 20 + 2 * 2 + 1 * 11  # of the unknown one: the mean
    assert timetable.turns == 4


def test_what_is_expected_gives_a_time_before_the_first_turn():
    assert Timetable({"a": 2, "b": 1}, {"a": 3.0, "b": 4.0}).seconds_left() == 10
