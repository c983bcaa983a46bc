import time

from fastmae.runtime import console, progress
from fastmae.runtime.progress import LOG_EVERY, WINDOW, Progress, Rate, counted_through, duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal:
    def isatty(self):
        return True

    def write(self, text):
        raise AssertionError("nothing may be written to the terminal")


def test_the_rate_is_that_of_the_last_minute_and_forgets_a_slow_start():
    clock = Clock()
    rate = Rate(clock)
    assert rate.seconds_for(10) is None
    rate.add(1)
    assert rate.seconds_for(10) is None
    for seconds, units in [(30, 1), *[(1, 5)] * 80]:
        clock.now += seconds
        rate.add(units)
    assert abs(rate.per_second - 5) < 0.1
    assert abs(rate.seconds_for(50) - 10) < 0.2
    assert len(rate.marks) < WINDOW + 5


def test_the_slow_first_units_are_left_out_as_soon_as_others_have_taken_as_long():
    clock = Clock()
    rate = Rate(clock)
    for seconds, units, per_second in [(20, 10, 0.5), (1, 10, 20 / 21), (9, 90, 110 / 30), (10, 100, 10)]:
        clock.now += seconds
        rate.add(units)
        assert abs(rate.per_second - per_second) < 1e-9


def test_units_of_earlier_calls_do_not_count_towards_the_rate(caplog):
    clock = Clock()
    with Progress("tokenize", "images", total=1000, done=900) as progress:
        progress.rate = Rate(clock)
        for _ in range(2):
            clock.now += 5
            progress.advance(10, loss="0.5")
    assert caplog.messages == ["tokenize  920/1000 images  2.0 images/s  left 40 s  loss 0.5"]


def test_one_unit_may_count_for_many_in_the_rate():
    clock = Clock()
    with Progress("pretrain", "steps", total=10, scale=64, rate_unit="images") as progress:
        progress.rate = Rate(clock)
        for _ in range(2):
            clock.now += 2
            progress.advance(1)
        assert progress.rate_text() == "32.0 images/s  left 16 s"


def test_a_low_rate_is_the_time_of_a_unit():
    clock = Clock()
    with Progress("bench store", "turns", total=10) as progress:
        progress.rate = Rate(clock)
        for _ in range(3):
            clock.now += 40
            progress.advance(1)
        assert progress.rate_text() == "40 s per turn  left 4:40 min"
        clock.now += 100  # it counts down while a unit is under way
        assert progress.rate_text() == "40 s per turn  left 3:00 min"


def test_the_time_left_of_unequal_units_is_what_the_caller_expects_counted_down(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    with Progress("bench step", "turns", total=3) as shown:
        shown.now("MAE, round 1 of 2")
        shown.expect(None)
        assert shown.line() == "bench step  0/3 turns  left ?, 0 s so far  MAE, round 1 of 2"
        shown.advance(1)
        shown.expect(70)
        clock.now += 10
        assert shown.line() == "bench step  1/3 turns  left 1:00 min  MAE, round 1 of 2"
        clock.now += 75
        assert "1:25 min so far, 15 s more than expected" in shown.line()
        shown.advance(2)
        assert "3/3 turns  1:25 min so far" in shown.line()  # something may still follow the last unit
    assert "3/3 turns  took 1:25 min" in shown.line()


def test_work_that_cannot_be_counted_shows_the_time_so_far(caplog, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    with Progress("learn pq8", minor=True) as shown:
        clock.now += 20
        assert shown.line() == "learn pq8  20 s so far"
    with Progress("list", "images", minor=True) as shown:
        clock.now += 5
        shown.advance(10)
    assert caplog.messages == ["learn pq8  20 s so far"]  # the other one was short


def test_work_inside_other_work_adds_to_its_line(caplog, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY", 0.0)
    with Progress("bench accuracy", "runs", total=2) as outer:
        with Progress("pretrain", "steps", total=2) as inner:
            inner.advance(1)
        outer.advance(2)
    assert "bench accuracy  0/2 runs" in caplog.messages[0] and "(pretrain  1/2 steps" in caplog.messages[0]
    assert len(caplog.messages) == 3 and "pretrain" not in caplog.messages[1]


def test_items_are_counted_as_they_are_taken(caplog, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY", 0.0)
    assert list(counted_through("abc", "check", "images", 3)) == ["a", "b", "c"]
    assert caplog.messages[0].startswith("check  1/3 images")


def test_a_log_gets_lines_while_nothing_is_counted(capsys, monkeypatch):
    """As in a command whose standard error is a file."""
    monkeypatch.setattr(progress, "LOG_EVERY", 0.02)
    console.show()
    with Progress("export", "steps", total=2) as shown:
        shown.advance(1)
        shown.now("reading it back")
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert sum("export  1/2 steps" in line and "reading it back" in line for line in lines) > 3
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_line_is_logged_every_ten_seconds_and_at_the_end(caplog, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    with Progress("knn", "images", total=30) as shown:
        for _ in range(30):
            clock.now += LOG_EVERY / 10
            shown.advance(1)
    assert [message.split("  ")[1] for message in caplog.messages] == [f"{n}/30 images" for n in (10, 20, 30, 30)]


def test_a_command_that_has_nothing_left_to_do_shows_nothing(caplog):
    with Progress("pretrain", "steps", total=10, done=10), Progress("check", "images", total=0):
        pass
    assert caplog.messages == []


def test_only_the_command_line_draws_a_bar(caplog, monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    with Progress("knn", "images", total=10) as shown:
        shown.advance(10)
        assert shown.bar is None
    assert len(caplog.messages) == 1
    monkeypatch.setattr(console, "is_shown", lambda: True)
    monkeypatch.setattr(progress.Bar, "start", lambda bar: None)
    with Progress("knn", "images", total=10) as shown:
        with Progress("inner", "images", total=10) as inner:
            assert inner.bar is None
        shown.advance(10)
        assert shown.bar.tasks[0].finished
    assert len(caplog.messages) == 1


def test_the_command_line_knows_the_logger_of_progress_lines():
    assert progress.log.name == console.PROGRESS


def test_durations_read_well():
    texts = [duration(seconds) for seconds in (None, 0.2, 59.4, 61, 3599, 3725)]
    assert texts == ["?", "0 s", "59 s", "1:01 min", "59:59 min", "1:02:05 h"]
