from fastmae.runtime import console, progress
from fastmae.runtime.progress import LOG_EVERY, WINDOW, Progress, Rate, duration


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
    for seconds, units in [(30, 1), *[(1, 5)] * 80]:
        clock.now += seconds
        rate.add(units)
    assert abs(rate.per_second - 5) < 0.1
    assert abs(rate.seconds_for(50) - 10) < 0.2
    assert len(rate.marks) < WINDOW + 5


def test_units_of_earlier_calls_do_not_count_towards_the_rate(caplog):
    clock = Clock()
    with Progress("tokenize", "images", total=1000, done=900) as progress:
        progress.rate = Rate(clock)
        clock.now += 10
        progress.advance(20, loss="0.5")
    assert caplog.messages == ["tokenize  920/1000 images  2.0 images/s  left 40 s  loss 0.5"]


def test_one_unit_may_count_for_many_in_the_rate():
    clock = Clock()
    with Progress("pretrain", "steps", total=10, scale=64, rate_unit="images") as progress:
        progress.rate = Rate(clock)
        clock.now += 2
        progress.advance(1)
        assert progress.rate_text() == "32.0 images/s  left 18 s"


def test_a_line_is_logged_every_ten_seconds_and_at_the_end(caplog, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    with Progress("knn", "images", total=30) as shown:
        for _ in range(30):
            clock.now += LOG_EVERY / 10
            shown.advance(1)
    assert [message.split("  ")[1] for message in caplog.messages] == [f"{n}/30 images" for n in (10, 20, 30, 30)]


def test_a_command_that_has_nothing_left_to_do_shows_nothing(caplog):
    with Progress("pretrain", "steps", total=10, done=10):
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
        shown.advance(10)
        assert shown.bar.tasks[0].finished
    assert len(caplog.messages) == 1


def test_the_command_line_knows_the_logger_of_progress_lines():
    assert progress.log.name == console.PROGRESS


def test_durations_read_well():
    texts = [duration(seconds) for seconds in (None, 0.2, 59.4, 61, 3599, 3725)]
    assert texts == ["?", "0 s", "59 s", "1:01 min", "59:59 min", "1:02:05 h"]
