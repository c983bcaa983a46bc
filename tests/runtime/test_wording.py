"""Numbers in messages."""

from fastmae.runtime.wording import accuracies, counted, tells_top5, weight_count


def test_one_is_singular_and_all_other_numbers_are_plural():
    assert [counted(number, "epoch") for number in (0, 1, 1.0, 0.5, 30)] == [
        *("0 epochs", "1 epoch", "1 epoch", "0.5 epochs", "30 epochs"),
    ]
    assert counted(1_281_167, "image") == "1281167 images"


def test_an_irregular_plural_is_given():
    assert [counted(number, "class", "classes") for number in (1, 2)] == ["1 class", "2 classes"]


def test_a_top_5_accuracy_of_five_classes_is_not_shown():
    assert accuracies(40, 100, 5) == "top-1 40.0 %"
    assert accuracies(40, 81, 6) == "top-1 40.0 %, top-5 81.0 %"
    assert [tells_top5(classes) for classes in (2, 5, 6)] == [False, False, True]


def test_small_networks_are_counted_in_thousands():
    assert (weight_count(85_800_000), weight_count(1_290)) == ("85.8 M weights", "1.3 k weights")
