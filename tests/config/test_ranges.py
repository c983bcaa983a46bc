"""Ranges of options: what they hold, how they are shown, and that every number has one."""

import math
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from fastmae.config.commands import COMMANDS
from fastmae.config.ranges import BATCH, EPOCHS, FRACTION, Range
from fastmae.config.resolve import range_of

pytestmark = pytest.mark.promise("numbers")


@pytest.mark.parametrize(
    ("span", "inside", "outside", "text"),
    [
        (BATCH, [1, 1 << 24], [0, -1, 100_000_000, 10**300], "1 to 16777216"),
        (EPOCHS, [1e-30, 5], [0, -2, 1e300], "more than 0 to 1000000"),
        (FRACTION, [0, 0.999], [1, -0.1], "0 to less than 1"),
        (Range(gt=0, le=1), [1, 0.5], [0, 1.1], "more than 0 to 1"),
    ],
)
def test_a_range_holds_its_values_and_says_so(span, inside, outside, text):
    assert all(span.holds(value) for value in inside)
    assert not any(span.holds(value) for value in outside)
    assert not any(span.holds(value) for value in (math.nan, math.inf, -math.inf))
    assert str(span) == text


@pytest.mark.parametrize("limits", [{}, {"ge": 0}, {"le": 1}, {"ge": 0, "gt": 0, "le": 1}])
def test_a_range_has_a_lower_and_an_upper_limit(limits):
    with pytest.raises(AssertionError, match="limit"):
        Range(**limits)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_of_every_command_has_a_range_that_holds_its_default(command):
    kind = COMMANDS[command].kind
    hints, plain_hints = get_type_hints(kind, include_extras=True), get_type_hints(kind)
    for option in fields(kind):
        types = {plain_hints[option.name], *get_args(plain_hints[option.name])}
        if types & {int, float}:
            span = range_of(hints[option.name])
            assert span is not None, option.name
            defaults = option.default if isinstance(option.default, tuple) else (option.default,)
            assert all(default is None or span.holds(default) for default in defaults), option.name
