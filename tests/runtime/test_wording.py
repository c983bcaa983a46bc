"""Numbers in messages."""

from fastmae.runtime.wording import counted, weight_count


def test_one_is_singular_and_all_other_numbers_are_plural():
    assert [counted(number, "epoch") for number in (0, 1, 1.0, 0.5, 30)] == [
        *("0 epochs", "1 epoch", "1 epoch", "0.5 epochs", "30 epochs"),
    ]
    assert counted(1_281_167, "image") == "1281167 images"


def test_small_networks_are_counted_in_thousands():
    assert (weight_count(85_800_000), weight_count(1_290)) == ("85.8 M weights", "1.3 k weights")
