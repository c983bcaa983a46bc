from fastmae.runtime import forecast
from fastmae.runtime.forecast import Forecast


def test_the_time_left_follows_the_jobs_that_are_done(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(forecast.time, "monotonic", lambda: now[0])
    left = Forecast(40.0, at_once=2)
    assert left.seconds_left() == 20
    left.begin("a")
    now[0] = 5.0
    assert left.seconds_left() == 35 / 2
    now[0] = 20.0  # twice as long as predicted
    left.end("a", 10.0)
    assert left.seconds_left() == 2 * 30 / 2
