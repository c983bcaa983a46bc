import numpy as np

from fastmae.evaluate.drawing import class_hue, evenly_spaced


def test_evenly_spaced_indices_include_the_first_and_the_last():
    assert evenly_spaced(range(0, 90, 10), 3) == [0, 40, 80]
    assert evenly_spaced([3, 5], 6) == [3, 5]
    assert evenly_spaced([3, 5], 0) == evenly_spaced([], 4) == []


def test_no_two_of_200_classes_have_the_same_hue():
    hues = np.sort([class_hue(number) for number in range(200)])
    assert np.diff(hues, append=hues[0] + 1).min() > 1e-3
