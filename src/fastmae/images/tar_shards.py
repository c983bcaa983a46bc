"""Tar files of images (WebDataset shards) as a source. Listing reads only the headers; nothing is ever unpacked.

The list keeps the offset and size of each image, so opening one needs no search through the tar.
"""

import io
import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from fastmae.errors import InputError, first_line
from fastmae.images.decode import MAX_BYTES, UndecodableError
from fastmae.images.entries import entry_of, key_of, numbers_of, plain_name
from fastmae.images.folders import is_named_as_image, leads_to
from fastmae.outside.regular_file import open_regular

log = logging.getLogger(__name__)

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
"""First bytes of compressed files, whatever they are called."""
OFFSET_DIGITS = 15
"""Offsets are written with zeros in front, so that they sort as numbers in every tar of less than a petabyte."""
MAX_OPEN_TARS = 8
"""Tars that one source keeps open."""


class TarSource:
    """The images in one .tar file, or in all .tar files of a folder; a key is `<name of the tar>/<name of the member>`.

    Args:
        path: a .tar file, or a folder with .tar files directly in it.
    """

    kind: ClassVar[str] = "tar"

    def __init__(self, path: Path):
        self.path = path
        self._opened: dict[str, BinaryIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": {}}

    def entries(self) -> Iterator[bytes]:
        """One entry for each regular member with an image suffix; the location is its offset and size in bytes.

        Of members with the same name, the last one in the tar is last in byte order, which is the one that a list
        keeps. Links are left out, and counted in a line.

        Raises:
            InputError: a tar is compressed, cut off or damaged, or an image in it is stored as a sparse file.
        """
        links, first_link = 0, ""
        for tar in self._tars():
            for member in _headers(tar):
                if not is_named_as_image(member.name):
                    continue
                key = f"{tar.name}/{plain_name(member.name)}"
                if member.islnk() or member.issym():
                    links, first_link = links + 1, first_link or key
                if member.isreg():
                    if member.issparse():
                        raise InputError(
                            f"{tar}: {member.name[:80]!r} is stored with holes; pack the tar again without --sparse"
                        )
                    yield entry_of(tar, key, f"{member.offset_data:0{OFFSET_DIGITS}},{member.size}")
        if links:
            log.info(
                f"{self.path}: hard and symbolic links among the images, which are left out: {links} "
                f"({first_link[:80]!r} first); to have them, pack with `tar --dereference --hard-dereference`"
            )

    def open(self, entry: bytes) -> BinaryIO:
        """Open an image, as bytes in memory.

        Raises:
            InputError: the entry belongs to none of the tars, or the tar has become shorter.
            UndecodableError: the image's file is larger than the memory that decoding may take.
            OSError: the tar can't be read.
        """
        offset, size = numbers_of(entry, 2, self.path)
        name = key_of(entry).partition("/")[0]
        descriptor = self._open_tar(name).fileno()
        if MAX_BYTES < size <= os.fstat(descriptor).st_size - offset:
            raise UndecodableError(f"a file of {size / 1e9:.2f} GB, more than the {MAX_BYTES / 1e9:.2f} GB allowed")
        # A size that a changed list names must not be allocated unless the tar has as many bytes.
        # pread instead of seek and read: forked worker processes share the position of an open file.
        data = os.pread(descriptor, size, offset) if offset + size <= os.fstat(descriptor).st_size else b""
        while 0 < len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
            data += more
        if len(data) < size:
            raise InputError(
                f"{self.path}: {name} ends before the image {key_of(entry)[:80]!r}; "
                "it has changed, list the images again"
            )
        return io.BytesIO(data)

    def _tars(self) -> list[Path]:
        """The tars, sorted by name."""
        if not self.path.is_dir():
            return [self.path]
        with os.scandir(self.path) as children:
            return sorted(
                self.path / child.name
                for child in children
                if is_tar(child.name) and leads_to(child, os.DirEntry.is_file)
            )

    def _open_tar(self, name: str) -> BinaryIO:
        """The open file of a tar. The one that was opened first is closed if there are too many."""
        if name not in self._opened:
            path = self.path / name if self.path.is_dir() else self.path
            if path.name != name or not name.lower().endswith(".tar"):
                raise InputError(
                    f"{self.path}: the list names a tar {name[:80]!r} that is not there; list the images again"
                )
            file = open_regular(path, 0)
            while len(self._opened) >= MAX_OPEN_TARS:
                self._opened.pop(next(iter(self._opened)))
            self._opened[name] = file
        return self._opened[name]


def is_tar(name: str) -> bool:
    """Whether a file in a folder counts as a tar, by its name."""
    return name.lower().endswith(".tar") and not name.startswith(".")


def is_compressed_tar(name: str) -> bool:
    """Whether a file in a folder counts as a compressed tar, by its name."""
    return name.lower().endswith(COMPRESSED_SUFFIXES) and not name.startswith(".")


def refuse_compressed(path: Path) -> None:
    """Refuse a compressed tar.

    Raises:
        InputError: always; the message says what to do with the tar.
    """
    raise InputError(
        f"{path}: a compressed tar, whose images can't be reached one by one; "
        "unpack it, or decompress it to a plain .tar"
    )


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar's members, skipping over their data."""
    with open_regular(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if file.read(6).startswith(COMPRESSED_STARTS):
            refuse_compressed(path)
        file.seek(0)
        try:
            yield from _checked_headers(file, size)
        except OSError:
            raise
        except Exception as error:  # hostile headers raise nearly any type
            raise InputError(
                f"{path}: a damaged tar, or cut off ({first_line(error)}); fetch or pack it again"
            ) from error


def _checked_headers(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar of `size` bytes. Each must lead forwards within the file, and only zeros may follow the end.

    The loop of `tarfile` takes a damaged header for the end of the tar, and follows one that leads backwards for ever.
    """
    tar: Any = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
    reached = 0
    while (member := tar.next()) is not None:
        tar.members.clear()  # tarfile would keep every member in memory
        if member.size < 0 or not reached < tar.offset <= size:
            raise tarfile.ReadError(f"the header at byte {member.offset} leads out of the file")
        reached = tar.offset
        yield member
    file.seek(tar.offset)
    if len(rest := file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end mark at byte {tar.offset}")
    while rest:
        if any(rest):
            raise tarfile.ReadError(f"neither a header nor the end at byte {tar.offset}")
        rest = file.read(tarfile.RECORDSIZE)
