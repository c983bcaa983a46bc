"""Tar files of images (webdataset shards) as a source. Only headers are read to list them, and nothing is ever unpacked.

An image is found again by the place and the length of its bytes, so that reading it costs no search through the tar.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from fastmae.errors import InputError, first_line
from fastmae.images.entries import entry_of, key_of, numbers_of
from fastmae.images.folders import is_named_as_image

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
OPEN_TARS = 8
"""Tars that a source keeps open."""


class TarSource:
    """The images in one .tar file or in all of a folder; a key is `<name of the tar>/<name of the member>`.

    Args:
        path: a .tar file, or a folder with .tar files in it (not below it).
    """

    kind: ClassVar[str] = "tar"

    def __init__(self, path: Path):
        self.path = path
        self._opened: dict[str, BinaryIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": {}}

    def entries(self) -> Iterator[bytes]:
        """An entry a regular member with an image's suffix; the location is its offset and size in bytes.

        Raises:
            InputError: a tar that is compressed, cut off or damaged.
        """
        for tar in self._tars():
            for member in _headers(tar):
                if member.isreg() and is_named_as_image(member.name):
                    if member.issparse():
                        raise InputError(
                            f"{tar}: {member.name[:80]!r} is stored with holes; pack the tar again without --sparse"
                        )
                    yield entry_of(tar, f"{tar.name}/{member.name}", f"{member.offset_data},{member.size}")

    def open(self, entry: bytes) -> BinaryIO:
        """The bytes of an image, in memory.

        Raises:
            InputError: the entry is none of these tars', or the tar has become shorter.
            OSError: the tar can't be read.
        """
        offset, size = numbers_of(entry, 2, self.path)
        name = key_of(entry).partition("/")[0]
        file = self._file(name)
        # pread, not seek and read: worker processes that were forked share the place of an open file.
        data = os.pread(file.fileno(), size, offset) if offset + size <= os.fstat(file.fileno()).st_size else b""
        while 0 < len(data) < size and (more := os.pread(file.fileno(), size - len(data), offset + len(data))):
            data += more
        if len(data) < size:
            raise InputError(
                f"{self.path}: {name} ends before the image {key_of(entry)[:80]!r}; it has changed, list the images again"
            )
        return io.BytesIO(data)

    def _tars(self) -> list[Path]:
        """The tars, sorted by name."""
        if self.path.is_file():
            return [self.path]
        with os.scandir(self.path) as entries:
            return sorted(self.path / entry.name for entry in entries if is_tar(entry.name) and entry.is_file())

    def _file(self, name: str) -> BinaryIO:
        if name not in self._opened:
            path = self.path if self.path.is_file() else self.path / name
            if path.name != name or not name.lower().endswith(".tar"):
                raise InputError(
                    f"{self.path}: the list names a tar {name[:80]!r} that is not there; list the images again"
                )
            file = path.open("rb", buffering=0)
            while len(self._opened) >= OPEN_TARS:
                self._opened.pop(next(iter(self._opened)))
            self._opened[name] = file
        return self._opened[name]


def is_tar(name: str) -> bool:
    """Whether a file in a folder counts as a tar, by its name."""
    return name.lower().endswith(".tar") and not name.startswith(".")


def is_compressed_tar(name: str) -> bool:
    """The same of a compressed tar."""
    return name.lower().endswith(COMPRESSED_SUFFIXES) and not name.startswith(".")


def refuse_compressed(path: Path) -> None:
    """Say what to do with a compressed tar.

    Raises:
        InputError: always.
    """
    raise InputError(
        f"{path}: a compressed tar, whose images can't be reached one by one; unpack it, or decompress it to a plain .tar"
    )


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, one after another; their data are passed over."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if file.read(6).startswith(COMPRESSED_STARTS):
            refuse_compressed(path)
        file.seek(0)
        try:
            yield from _intact_headers(file, size)
        except OSError:
            raise
        except Exception as error:  # hostile headers raise nearly any type
            raise InputError(
                f"{path}: a damaged tar, or cut off ({first_line(error)}); fetch or pack it again"
            ) from error


def _intact_headers(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """The same, as long as every header leads onwards and within the file's `size`, and nothing follows the end.

    Python's own loop stops at a damaged header as if the tar ended there, and follows one that leads backwards for ever.
    """
    tar: Any = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
    reached = 0
    while (member := tar.next()) is not None:
        tar.members.clear()  # it would remember them all
        if member.size < 0 or not reached < tar.offset <= size:
            raise tarfile.ReadError(f"the header at byte {member.offset} leads out of the file")
        reached = tar.offset
        yield member
    file.seek(tar.offset)
    if len(rest := file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no mark of its end at byte {tar.offset}")
    while rest:
        if any(rest):
            raise tarfile.ReadError(f"neither a header nor the end at byte {tar.offset}")
        rest = file.read(tarfile.RECORDSIZE)
