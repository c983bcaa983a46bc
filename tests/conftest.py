"""Shared inputs: crops of photos that scikit-learn ships, and stores and runs made from them by the real commands."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread per process: with more threads than cores, most of the time goes into waiting. This overrides the value
    # set below by the process that started the workers.
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")

# Tests start dozens of processes. With this variable, each would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import json
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from fastmae.cli import run
from fastmae.runtime.fabric import Fabric
from fastmae.runtime.launch import launch
from fastmae.tokens.format import shard_path
from fastmae.tokens.manifest import read_header
from forks import Forks, forks
from promises import pytest_collection_modifyitems, pytest_terminal_summary  # noqa: F401  # hooks
from simulated.own_process import pytest_configure  # noqa: F401  # a hook: tests marked `accelerator`

TINY_STUDENT = (
    "--encoder vit_tiny_patch16_224 --encoder-depth 2 --encoder-width 64 --encoder-heads 2 --image-size 64 "
    "--decoder-width 32 --decoder-heads 2 --batch-size 8 --warmup-epochs 1 --base-lr 0.02 --log-every 1 --device cpu"
)
VIT_STORE = "--middle-size 96 --patch-size 16 --shard-size 8 --codec fp32 --pixels raw --workers 1"
SMALL_STORE = "--middle-size 96 --patch-size 16 --shard-size 8 --codec pq16 --workers 1"


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heeded() -> None:
    """As in a terminal: what a shell starts in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 crops of two photos in class folders below train/ (30) and val/ (10), of many sizes and in three formats."""
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
    """A file's name -> the name of the part that a killed writer on this machine leaves behind.

    The process id in it is larger than any that Linux assigns.
    """
    return lambda name: f"{name}.{socket.gethostname().replace('.', '-')}.4194304.part"


@pytest.fixture(scope="session")
def vit_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small ViT teacher in timm's layout; `timm/vit_tiny_patch16_224` loads them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit_tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def vit_teacher(vit_weights: Path) -> list[str]:
    """Options of `tokenize` for the small ViT teacher."""
    return ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", str(vit_weights)]


@pytest.fixture(scope="session")
def vit_store(photos: Path, vit_teacher: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store of `photos/train` by the ViT teacher: fp32 tokens, raw pixels, grid 6, 4 shards of 8."""
    store = tmp_path_factory.mktemp("stores") / "vit.tokens"
    assert run(["tokenize", str(photos / "train"), str(store), *vit_teacher, *VIT_STORE.split()]) == 0
    return store


@pytest.fixture(scope="session")
def small_store(photos: Path, vit_teacher: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images and teacher as in `vit_store`, as small as they get: 16 bytes per token, and JPEG."""
    store = tmp_path_factory.mktemp("stores") / "small.tokens"
    assert run(["tokenize", str(photos / "train"), str(store), *vit_teacher, *SMALL_STORE.split()]) == 0
    return store


@pytest.fixture(scope="session")
def cnn_store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images and grid as in `vit_store`, by a CNN: fp16 tokens of 320 channels, in one shard."""
    store = tmp_path_factory.mktemp("stores") / "cnn.tokens"
    options = "--teacher efficientnet-lite0 --middle-size 96 --workers 1".split()
    assert run(["tokenize", str(photos / "train"), str(store), *options]) == 0
    return store


@pytest.fixture(scope="session")
def flip_in_record() -> Callable[..., None]:
    """(store, shard, row, tensor) -> one bit of an image's tokens, or of another tensor's row, is flipped on disk."""

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
    """Options of `pretrain` for a student that trains in seconds on the small stores."""
    return TINY_STUDENT.split()


@pytest.fixture(scope="session")
def tiny_run(vit_store: Path, tiny_student: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on `vit_store`. Its encoder: 2 blocks of width 64, images of 64 px, patches of 16."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(["pretrain", str(vit_store), str(folder), *tiny_student, "--epochs", "2", "--workers", "0"]) == 0
    return folder


@pytest.fixture(scope="session")
def fastmae_command() -> list[str]:
    """The command line that starts `fastmae` in a process of its own."""
    return [sys.executable, "-m", "fastmae"]


@pytest.fixture(scope="session")
def warm() -> Iterator[Forks]:
    """Starts commands in processes of their own, without the seconds that imports take."""
    with forks() as started:
        yield started


@pytest.fixture(scope="session")
def fabric() -> Fabric:
    """One process on the CPU."""
    return launch("cpu", "32-true", devices=1, seed=0)


@pytest.fixture
def printed_json(capsys: pytest.CaptureFixture[str]) -> Callable[[], dict[str, Any]]:
    """() -> the JSON that the last command printed."""
    return lambda: json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """(arguments) -> the line with which the command refuses them, on standard error; its exit code is 2."""

    def refuse(args: list[str]) -> str:
        capsys.readouterr()
        assert run(args) == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        line = err.splitlines()[-1]
        assert line.startswith(f"fastmae {args[0]}")
        return line

    return refuse


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """The package's messages, as a program that imports it gets them, even if an earlier test has run a command."""
    logger = logging.getLogger("fastmae")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])
    caplog.set_level("INFO", logger="fastmae")
    return caplog
