"""An entry describes one image in an image list: the key that names it for good, and where its source finds it.

An entry is the key in UTF-8; bytes that are not UTF-8 are kept as they are (surrogateescape). If the image is not a
file of its own, b"\\x01" and a location follow. Keys never contain the bytes 0 and 1, so sorting entries by their bytes
sorts them by key.
"""

from functools import lru_cache
from pathlib import Path, PurePosixPath

from fastmae.errors import InputError

KEY_END = b"\x01"
"""Separates key and location."""
ENTRY_END = b"\0"
"""Follows each entry in a list file."""
LONGEST_ENTRY = 1 << 13
"""Most bytes of an entry; Linux opens no path of more than 4095."""


def entry_of(source: Path, key: str | bytes, location: str = "") -> bytes:
    """The entry of one image.

    Args:
        source: path of the source, for the error message.
        key: name of the image within its source; must not depend on the order of the images.
        location: what the source needs besides the key to find the image; must not contain the bytes 0 and 1.

    Raises:
        InputError: the key contains the byte 0 or 1, or is too long.
    """
    encoded_key = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
    if KEY_END in encoded_key or ENTRY_END in encoded_key:
        raise InputError(
            f"{source}: the name {key[:80]!r} holds a byte 0 or 1; rename the image (or save the list as UTF-8 text)"
        )
    entry = encoded_key + KEY_END + location.encode("ascii") if location else encoded_key
    if len(entry) > LONGEST_ENTRY:
        raise InputError(
            f"{source}: the name {key[:80]!r}... has {len(encoded_key)} bytes; names of images have {LONGEST_ENTRY} "
            "at most"
        )
    return entry


def plain_name(name: str) -> str:
    """A path without what leads nowhere else: `./a//b/./1.jpg` -> `a/b/1.jpg`. `..` stays, as links may change it."""
    if not name.startswith("./") and "/./" not in name and "//" not in name:
        return name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/" * name.startswith("/") + "/".join(parts) if parts else name


def key_bytes(entry: bytes) -> bytes:
    """The key of an entry as bytes, for sorting and hashing."""
    return entry.partition(KEY_END)[0]


def key_of(entry: bytes) -> str:
    """The key of an entry as text."""
    return key_bytes(entry).decode("utf-8", "surrogateescape")


def numbers_of(entry: bytes, length: int, source: Path) -> tuple[int, ...]:
    """The location of an entry, as the `length` non-negative integers that it lists.

    Raises:
        InputError: the location is anything else.
    """
    fields = entry.partition(KEY_END)[2].split(b",")
    if len(fields) != length or not all(field.isdigit() and len(field) < 20 for field in fields):
        raise InputError(
            f"{source}: the list does not say where {key_of(entry)[:80]!r} lies; "
            "it was changed by hand, list the images again"
        )
    return tuple(map(int, fields))


def label_of(key: str) -> str:
    """Name of the folder that holds the image, which is its class in a labelled tree; '' at the top level.

    A tar counts as a top level too.
    """
    folder = _name_of_folder(key.rpartition("/")[0])
    return "" if folder.lower().endswith(".tar") else folder


@lru_cache(maxsize=1 << 10)  # images that follow each other mostly lie in one folder
def _name_of_folder(folder: str) -> str:
    return PurePosixPath(folder).name
