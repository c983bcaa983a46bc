"""An entry: what an image list holds of one image. The key that names it for good, and where its source finds it again.

An entry is the key in UTF-8 (bytes that are no UTF-8 stay as they are: surrogateescape); where an image is no file of its
own, b"\\x01" and a location follow. No key holds the bytes 0 and 1, so entries that are sorted as bytes are sorted by key.
"""

from pathlib import Path, PurePosixPath

from fastmae.errors import InputError

KEY_END = b"\x01"
"""Between key and location."""
ENTRY_END = b"\0"
"""After each entry of a list."""


def entry_of(source: Path, key: str | bytes, location: str = "") -> bytes:
    """The entry of an image.

    Args:
        source: what is listed, for the message.
        key: the image's name in it, the same whatever the order in which its images come.
        location: what the source needs to find the image besides the key; without the bytes 0 and 1.

    Raises:
        InputError: a key with the byte 0 or 1 in it.
    """
    name = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
    if KEY_END in name or ENTRY_END in name:
        raise InputError(
            f"{source}: the name {key[:80]!r} holds a byte 0 or 1; rename the image (or save the list as UTF-8 text)"
        )
    return name + KEY_END + location.encode("ascii") if location else name


def key_bytes(entry: bytes) -> bytes:
    """The key of an entry, as it is sorted and hashed."""
    return entry.partition(KEY_END)[0]


def key_of(entry: bytes) -> str:
    """The key of an entry."""
    return key_bytes(entry).decode("utf-8", "surrogateescape")


def numbers_of(entry: bytes, count: int, source: Path) -> tuple[int, ...]:
    """The location of an entry, when it is `count` numbers of 0 or more with commas between them.

    Raises:
        InputError: it is not.
    """
    parts = entry.partition(KEY_END)[2].split(b",")
    if len(parts) != count or not all(part.isdigit() and len(part) < 20 for part in parts):
        raise InputError(
            f"{source}: the list does not say where {key_of(entry)[:80]!r} lies; it was changed by hand, list the images again"
        )
    return tuple(map(int, parts))


def label_of(key: str) -> str:
    """The name of the folder that holds the image (the class, in a labelled tree), or '' at the top level (of a tar too)."""
    folder = PurePosixPath(key).parent.name
    return "" if folder.lower().endswith(".tar") else folder
