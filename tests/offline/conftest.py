"""The commands of the offline stage, called as a user calls them, and what their tests do to a store's files."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastmae.cli import run

TEACHER = ["--teacher", "timm/vit_tiny_patch16_224"]
SMALL = ["--middle-size", "96", "--shard-size", "8", "--workers", "0", "--codec", "fp32", "--pixels", "raw"]


@pytest.fixture
def tokenize(vit_weights: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """(images, store, options) -> exit code, JSON and standard error of `tokenize`, with `vit_store`'s options."""

    def call(images: Path, store: Path, *options: str) -> tuple[int, dict[str, Any], str]:
        weights = ["--teacher-weights", str(vit_weights)]
        code = run(["tokenize", str(images), str(store), *TEACHER, *weights, *SMALL, *options, "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else {}, err

    return call


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """(store, options) -> exit code, JSON and standard error of `verify`."""

    def call(store: Path, *options: str) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        code = run(["verify", str(store), "--json", "--workers", "0", *options])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else {}, err

    return call


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """A folder -> the bytes of every file below it, by its relative path."""

    def read(folder: Path) -> dict[str, bytes]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return read


@pytest.fixture(scope="session")
def flip_bit() -> Callable[..., None]:
    """(file, position) -> one bit of the file is flipped; without a position, a bit that depends on the seed."""

    def flip(file: Path, position: int | None = None, seed: int = 0) -> None:
        data = bytearray(file.read_bytes())
        generator = random.Random(seed)
        at = generator.randrange(len(data)) if position is None else position
        data[at] ^= 1 << generator.randrange(8)
        file.write_bytes(data)

    return flip


@pytest.fixture
def keys_and_tokens() -> Callable[[Path], dict[str, Any]]:
    """A store -> the tokens of each decoded image by its key."""
    from fastmae import TokenStore

    def read(folder: Path) -> dict[str, Any]:
        store = TokenStore(folder)
        keys = [row["path"] for row in store.table().to_pylist() if row["row"] >= 0]
        return {key: store.view(index, 0, 0, store.grid).tokens for index, key in enumerate(keys)}

    return read
