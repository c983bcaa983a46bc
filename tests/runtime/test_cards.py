"""A card knows whether somebody has edited it."""

import pytest

from fastmae.runtime.cards import is_unedited, signed

CARD = signed("# photos\n\nlicence: TO BE FILLED IN\n")


def test_a_card_is_unedited_as_it_was_written():
    assert is_unedited(CARD.encode())


@pytest.mark.parametrize(
    "edited",
    [
        CARD.replace("TO BE FILLED IN", "CC0"),
        CARD + "a line more\n",
        CARD.rpartition("<!--")[0],
        CARD.rstrip("\n"),
        "# somebody's own\n",
        "",
        "\ud800",
    ],
)
def test_any_change_makes_it_edited(edited):
    assert not is_unedited(edited.encode("utf-8", "surrogatepass"))
