import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from fastmae.evaluate.drawing import (
    LONGEST_LABEL,
    class_hue,
    evenly_spaced,
    label,
    png_bytes,
    text_as_it_is,
)


def test_evenly_spaced_indices_include_the_first_and_the_last():
    assert evenly_spaced(range(0, 90, 10), 3) == [0, 40, 80]
    assert evenly_spaced([3, 5], 6) == [3, 5]
    assert evenly_spaced([3, 5], 0) == evenly_spaced([], 4) == []


def test_no_two_of_200_classes_have_the_same_hue():
    hues = np.sort([class_hue(number) for number in range(200)])
    assert np.diff(hues, append=hues[0] + 1).min() > 1e-3


@pytest.mark.promise("saved")
def test_a_formula_among_the_names_is_drawn_as_text():
    def drawn(parse_math):
        with mpl.rc_context({"text.parse_math": parse_math}):
            figure = Figure()
            figure.text(0.1, 0.5, "a$b$c")
            return png_bytes(figure, dpi=50)

    with text_as_it_is():
        figure = Figure()
        figure.text(0.1, 0.5, "a$b$c")
        as_it_is = png_bytes(figure, dpi=50)
    assert as_it_is == drawn(parse_math=False) != drawn(parse_math=True)


def test_a_label_is_short_and_on_one_line():
    assert label("a  b\nc") == "a b c"
    assert label("_background_") == " _background_"
    assert label("half \udcff") == "half ?"
    assert len(label(255 * "w")) == LONGEST_LABEL
