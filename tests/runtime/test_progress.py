from fastmae.runtime.progress import WINDOW, Progress, Rate, duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


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


def test_what_earlier_calls_did_does_not_count_towards_the_rate(capsys):
    clock = Clock()
    with Progress("tokenize", "images", total=1000, done=900) as progress:
        progress.rate = Rate(clock)
        clock.now += 10
        progress.advance(20, loss="0.5")
        assert progress.tail() == "2.0 images/s  left 40 s  loss 0.5"
    assert "920/1000 images" in capsys.readouterr().err


def test_a_step_may_count_many_images(capsys):
    clock = Clock()
    with Progress("pretrain", "steps", total=10, scale=64, rate_unit="images") as progress:
        progress.rate = Rate(clock)
        clock.now += 2
        progress.advance(1)
        assert progress.tail() == "32.0 images/s  left 18 s"


def test_a_command_that_has_nothing_left_to_do_shows_no_rate(capsys):
    with Progress("pretrain", "steps", total=10, done=10):
        pass
    assert capsys.readouterr().err == ""


def test_durations_read_well():
    assert [duration(s) for s in (None, 0.2, 59.4, 61, 3599, 3725)] == [
        "?",
        "0 s",
        "59 s",
        "1:01 min",
        "59:59 min",
        "1:02:05 h",
    ]
