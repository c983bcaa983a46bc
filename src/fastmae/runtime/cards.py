"""A README.md that a command writes and a person may edit: its last line tells whether anybody has.

The line holds a digest of the text above it. Hidden in a comment, it does not show on a page.
"""

import xxhash

CARD_FILE = "README.md"
EXPORT_FILE = "fastmae.json"
"""What an exported model is. A store has none: only one of the two may lie in a folder, as both have a card."""
LARGEST_CARD = 4 << 20
_MARK = "<!-- Written by fastmae, which replaces this file as long as nobody has changed it: {} -->\n"


def signed(text: str) -> str:
    """A card with its last line."""
    return text + _MARK.format(_digest(text))


def is_unedited(card: bytes) -> bool:
    """Whether a card is as it was written."""
    text = card.decode("utf-8", "replace")
    start = text.rfind("\n", 0, -1) + 1  # of the last line
    return text[start:] == _MARK.format(_digest(text[:start]))


def _digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
