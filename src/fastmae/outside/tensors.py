"""Reading tensors: `.safetensors`, and what `torch.save` wrote (`.pt`, `.pth`). No code in a file is ever run.

Everything that decides what reading costs is checked before: that the file is regular and holds weights, that nothing
in it is compressed, that no tensor is larger than its bytes.
"""

import argparse
import codecs
import contextlib
import errno
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch

from fastmae.errors import InputError, first_line
from fastmae.outside.regular_file import open_regular

Weights = dict[str, torch.Tensor]

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
"""What files of `torch.save` begin with: today's, and those of before 2020."""
LENGTH_BYTES = 8
"""Size of the number at the start of a safetensors file that gives the length of its header."""
LONGEST_HEADER = 100_000_000
"""The limit that safetensors itself sets, in bytes."""
LARGEST_PICKLE = 64 << 20
"""Most bytes of the pickle in a checkpoint, which holds everything but the tensors' values."""
DEEPEST, MOST_PARTS = 64, 1 << 22
"""Most levels of dictionaries and lists in a checkpoint, and most entries of all of them together."""


def read_tensors(path: Path) -> Any:
    """What a weights file holds, in memory.

    Returns:
        Of safetensors: the tensors by their names. Of `torch.save`: what was saved, usually nested dictionaries.

    Raises:
        InputError: no such file, a damaged one, one that is no weights file, or one that would have to run code to be
            read. Or the memory does not suffice.
    """
    with opened(path) as (value, is_safetensors):
        return value if is_safetensors else _in_memory(value, path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, bool]]:
    """A weights file whose tensors are still in the file: their values are read when they are used.

    Gives what `read_tensors` returns, and whether the file is safetensors.

    Raises:
        InputError: as `read_tensors`; that the memory does not suffice also while the values are used.
    """
    begins = check_file(path)
    with _memory_named(path):
        try:
            value = _unpickled(path, begins == ZIP) if begins else safetensors.torch.load_file(path)
        except (MemoryError, OSError):
            raise
        except Exception as error:  # a damaged archive, and whatever a hostile pickle can raise
            if is_lack_of_memory(error):
                raise
            raise InputError(f"{path}: {_cause(error)}") from error
        yield value, not begins


def check_file(path: Path) -> bytes:
    """Check what a weights file says about itself, before any of its tensors is read.

    Returns:
        `ZIP` or `PICKLE`, with which files of `torch.save` begin; nothing for safetensors.

    Raises:
        InputError: no such file, one that can't be read, one that is no weights file, or one that unfolds to more than
            it holds.
    """
    try:
        with open_regular(path) as file:
            head = file.read(512)
            if not head:
                raise InputError(f"{path}: is empty; copy or download it again")
            _check_text(path, head)
            begins = next((begins for begins in (ZIP, PICKLE) if head.startswith(begins)), b"")
            if begins and path.suffix == ".safetensors":  # torch too goes by the name
                raise InputError(f"{path}: was written by torch.save, so it is no safetensors; rename it to .pth")
            if begins == ZIP:
                _check_archive(path, file)
            elif begins == PICKLE:
                _check_pickle(path, head + file.read(LARGEST_PICKLE))
            else:
                _check_header(path, file)
            return begins
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such weights file") from error
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from error


def check_fit(network: torch.nn.Module, weights: Mapping[str, torch.Tensor], name: object) -> None:
    """Check that weights match a network in all names and shapes.

    Args:
        network: on any device, 'meta' too.
        weights: by their names.
        name: what messages call them, usually their file.

    Raises:
        InputError: names a tensor that is missing, unexpected or of another shape.
    """
    own = network.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        example = f"lacks {missing[0]}" if missing else f"has {unexpected[0]} besides"
        raise InputError(
            f"{name}: not the weights of this model ({example}; {len(missing)} missing, {len(unexpected)} unexpected "
            "in all)"
        )
    for key, tensor in own.items():
        if tensor.shape != weights[key].shape:
            raise InputError(
                f"{name}: {key} has shape {list(weights[key].shape)}, the model's has {list(tensor.shape)}"
            )


def check_finite(weights: Mapping[str, torch.Tensor], name: object) -> None:
    """Check that no weight is NaN or infinite.

    Args:
        weights: by their names.
        name: what messages call them, usually their file.

    Raises:
        InputError: names a tensor in which one is.
    """
    for key, tensor in weights.items():
        if tensor.is_floating_point() and tensor.numel():
            exact = tensor.float() if tensor.itemsize == 1 else tensor  # the 8-bit kinds can't be compared
            if not all(math.isfinite(limit) for limit in torch.aminmax(exact)):
                raise InputError(
                    f"{name}: {key} holds NaN or infinite numbers, so the training diverged or the file is damaged; "
                    "give another one"
                )


def load_into(network: torch.nn.Module, weights: Mapping[str, torch.Tensor], name: object) -> None:
    """Give a network weights that match it in all names and shapes, and are finite. Otherwise as `check_fit`."""
    check_fit(network, weights, name)
    check_finite(weights, name)
    network.load_state_dict(weights)


def _check_text(path: Path, head: bytes) -> None:
    """Recognise what a failed download leaves: a web page, an error message, Git LFS's pointer."""
    if re.match(rb"(\xef\xbb\xbf)?\s*<[!?a-zA-Z]", head):
        raise InputError(f"{path}: is a web page, not weights; download it again")
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head).strip()
    except UnicodeDecodeError:
        return
    if text.startswith("version https://git-lfs"):
        raise InputError(f"{path}: is Git LFS's pointer to the weights, not weights; fetch them with `git lfs pull`")
    if all(character.isprintable() or character.isspace() for character in text):
        raise InputError(f"{path}: is text ({text[:60]!r}), not weights; download it again")


def _check_archive(path: Path, file: BinaryIO) -> None:
    """Check that an archive of `torch.save` takes no more memory than it has bytes. torch never compresses."""
    size = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            packed = next((record for record in records if record.compress_type != zipfile.ZIP_STORED), None)
            unfolded = sum(record.file_size for record in records)
            if packed is not None or unfolded > size:
                raise InputError(
                    f"{path}: has {size / 1e6:.4g} MB, but would unfold to {unfolded / 1e6:.4g} MB, while torch.save "
                    "compresses nothing; save the weights again with torch.save or as safetensors"
                )
            for record in records:
                if record.filename.endswith("/data.pkl"):
                    if record.file_size > LARGEST_PICKLE:
                        raise InputError(f"{path}: holds {record.file_size / 1e6:.4g} MB of other things than tensors")
                    _check_pickle(path, archive.read(record))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged ({first_line(error)}); copy or download it again") from error


def _check_pickle(path: Path, data: bytes) -> None:
    """Check that a pickle does not call for memory that its file does not fill: bytearray(10**12), in a few bytes."""
    if b"bytearray" in data:
        raise InputError(f"{path}: holds more than tensors; save its state dict alone, as safetensors")


def _check_header(path: Path, file: BinaryIO) -> None:
    """Check that a file begins with a safetensors header. What the header says, safetensors checks against the size."""
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    begin = file.read(1)
    if begin != b"{" or length > min(LONGEST_HEADER, size - LENGTH_BYTES):
        kind = "cut off" if begin == b"{" and length <= LONGEST_HEADER else "damaged, or not a weights file"
        raise InputError(f"{path}: {kind}; copy or download it again")


def _unpickled(path: Path, is_archive: bool) -> Any:
    # A map of the file also keeps torch from reading beyond a record that is shorter than its tensor, which older
    # releases don't check.
    # timm, MAE and DINO save their command's options beside the weights; a Namespace only holds values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def _cause(error: Exception) -> str:
    if "weights only" in str(error).lower() or "weights_only" in str(error):
        kind = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), first_line(error))
        return (
            f"holds more than tensors, and reading it would run its code ({kind[:120]}); save its state dict alone, "
            "as safetensors"
        )
    return f"damaged, or not a weights file ({first_line(error)}); copy or download it again"


def _in_memory(value: Any, path: Path) -> Any:
    """The same dictionaries and lists, with the tensors' values in memory. Each storage is read once."""
    size, taken = path.stat().st_size, 0
    storages: dict[tuple[int, int], torch.UntypedStorage] = {}
    read_before: dict[int, tuple[Any, int]] = {}
    """By the id of a dictionary or list: what was read, and its entries. They may hold each other many times over."""

    def tensor_of(item: torch.Tensor, name: str) -> torch.Tensor:
        nonlocal taken
        _check_tensor(item, name, path)
        stored = item.untyped_storage()
        key = (stored.data_ptr(), stored.nbytes())
        if key not in storages:
            taken += stored.nbytes()
            if taken > size:
                raise InputError(f"{path}: its tensors take more bytes than it has; copy or download it again")
            storages[key] = stored.clone()
        return torch.empty(0, dtype=item.dtype).set_(storages[key], item.storage_offset(), item.shape, item.stride())

    def read(item: Any, name: str, depth: int) -> tuple[Any, int]:
        if isinstance(item, torch.Tensor):
            return tensor_of(item, name), 1
        if not (isinstance(item, dict) or type(item) in (list, tuple)):
            return item, 1
        if id(item) not in read_before:
            named = item.items() if isinstance(item, dict) else [(name, part) for part in item]
            too_deep = depth > DEEPEST
            parts = [] if too_deep else [(key, *read(part, str(key), depth + 1)) for key, part in named]
            entries = 1 + sum(count for *_, count in parts)
            if too_deep or entries > MOST_PARTS:
                raise InputError(f"{path}: nested too deeply; save its state dict alone, as safetensors")
            if isinstance(item, dict):
                read_before[id(item)] = {key: part for key, part, _ in parts}, entries
            else:
                read_before[id(item)] = type(item)([part for _, part, _ in parts]), entries
        return read_before[id(item)]

    return read(value, "", 0)[0]


def _check_tensor(tensor: torch.Tensor, name: str, path: Path) -> None:
    """Check that a tensor has its own bytes: strides can make a large one of few."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise InputError(f"{path}: {name} is no plain tensor; save its state dict alone, as safetensors")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise InputError(
            f"{path}: {name} has shape {list(tensor.shape)}, but the bytes of fewer numbers; save it as .contiguous()"
        )


@contextlib.contextmanager
def _memory_named(path: Path) -> Iterator[None]:
    """Say that memory is exhausted where it is, rather than that the file is damaged."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        size = path.stat().st_size
        raise InputError(
            f"{path}: not enough memory to load its {size / 1e9:.3g} GB; the file is fine, so free some memory, or "
            "take a machine with more"
        ) from error


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted. torch has no type of its own for that on a CPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in text or "Cannot allocate memory" in text
