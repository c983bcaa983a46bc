"""Shared inputs: real photos that scikit-learn ships, cut into small files; and stores made of them by the real command."""

import os

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # a core each: with more threads than cores most of the time goes into waiting for one another
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # over what it has from the process that started it, where this file was read as well
    )
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from fastmae.cli import run
from fastmae.tokens.format import shard_path
from fastmae.tokens.manifest import read_header

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 cut-outs of two photos in train/ and val/ class folders, of many sizes and three formats."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("china", "flower"):
        photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
        for number in range(20):
            left, top = 24 * number, 13 * (number % 7)
            cut = photo.crop((left, top, left + 90 + 5 * number, top + 120 + number))
            suffix = ("jpg", "png", "webp")[number % 3]
            path = folder / ("val" if number % 4 == 3 else "train") / name / f"{number:02d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            cut.save(path)
    return folder


@pytest.fixture(scope="session")
def abandoned_part() -> Callable[[str], str]:
    """A file's name -> what a killed writer of this machine leaves of it. Linux gives no process this number."""
    return lambda name: f"{name}.{socket.gethostname().replace('.', '-')}.4194304.part"


@pytest.fixture(scope="session")
def vit_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small ViT teacher at random, in timm's layout: `timm/vit_tiny_patch16_224` loads them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit_tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), path)
    return path


VIT = ["--teacher", "timm/vit_tiny_patch16_224"]
SMALL = ["--middle-size", "96", "--patch-size", "16", "--workers", "1"]


@pytest.fixture(scope="session")
def vit_store(photos: Path, vit_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of `photos/train` by the ViT teacher: fp32 tokens, raw pixels, grid 6, 4 shards of 8."""
    store = tmp_path_factory.mktemp("stores") / "vit.tokens"
    exact = ["--codec", "fp32", "--pixels", "raw", "--shard-size", "8"]
    assert (
        run(
            ["tokenize", str(photos / "train"), str(store), *VIT, "--teacher-weights", str(vit_weights), *SMALL, *exact]
        )
        == 0
    )
    return store


@pytest.fixture(scope="session")
def small_store(photos: Path, vit_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images and teacher as `vit_store`, as small as they get: 16 bytes a token, and JPEG."""
    store = tmp_path_factory.mktemp("stores") / "small.tokens"
    codec = ["--codec", "pq16", "--shard-size", "8"]
    assert (
        run(
            ["tokenize", str(photos / "train"), str(store), *VIT, "--teacher-weights", str(vit_weights), *SMALL, *codec]
        )
        == 0
    )
    return store


@pytest.fixture(scope="session")
def flip_in_record() -> Callable[..., None]:
    """(store, shard, row, tensor) -> one bit of an image's tokens, or of another tensor's row, is flipped on the disk."""

    def flip(store: Path, shard: int, row: int, tensor: str = "tokens") -> None:
        file = shard_path(store, shard)
        header = read_header(file)
        entry = json.loads(header[8:])[tensor]
        start, end = entry["data_offsets"]
        data = bytearray(file.read_bytes())
        data[len(header) + start + (end - start) // entry["shape"][0] * row + 5] ^= 16
        file.write_bytes(data)

    return flip


@pytest.fixture(scope="session")
def tiny_student() -> list[str]:
    """Options of a student that trains in seconds on the small stores."""
    return [
        "--encoder",
        "vit_tiny_patch16_224",
        "--encoder-depth",
        "2",
        "--encoder-width",
        "64",
        "--encoder-heads",
        "2",
        "--image-size",
        "64",
        "--decoder-width",
        "32",
        "--decoder-heads",
        "2",
        "--batch-size",
        "8",
        "--warmup-epochs",
        "1",
        "--base-lr",
        "0.02",
        "--log-every",
        "1",
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="session")
def tiny_run(vit_store: Path, tiny_student: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on `vit_store`: its encoder has 2 blocks of width 64, patch 16, 64 px."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(["pretrain", str(vit_store), str(folder), *tiny_student, "--epochs", "2", "--workers", "0"]) == 0
    return folder


@pytest.fixture(scope="session")
def fastmae_command() -> list[str]:
    """The command as a process of its own."""
    return [sys.executable, "-m", "fastmae"]
