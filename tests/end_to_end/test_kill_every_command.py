"""Every command that writes is killed at random moments; the same call then gives what it gives without a kill."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.runs.checkpoint import load_checkpoint
from fastmae.runs.folder import read_evaluations, read_metrics
from promises import rounds

CPU = "--workers 0 --device cpu"
TRAINING = f"{CPU} --epochs 1 --save-every 0 --log-every 1"
TIMES = {"seconds", "images_per_second"}


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of a bright square, with masks."""
    root, generator = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((64, 64), np.uint8)
            mask[8 : 24 + 4 * number, 8:40] = 1
            photo = (90 + 100 * mask[..., None] + generator.integers(0, 30, (64, 64, 3))).astype(np.uint8)
            Image.fromarray(photo).save(root / "images" / split / f"{number}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{number}.png")
    (root / "classes.json").write_text(json.dumps({"classes": {"0": "ground", "1": "square"}}))
    return root


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of a bright square, annotated in COCO's format."""
    root, generator = tmp_path_factory.mktemp("boxes"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        folder = root / f"my_{split}"
        (folder / "images").mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            pixels = generator.integers(90, 130, (64, 64, 3), dtype=np.uint8)
            pixels[10:40, 10 : 30 + number] = (230, 40, 40)
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
            right = 30 + number
            annotations.append(
                {
                    "id": number + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [10, 10, right - 10, 30],
                    "area": 30 * (right - 10),
                    "iscrowd": 0,
                    "segmentation": [[10, 10, right, 10, right, 40, 10, 40]],
                }
            )
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
        (folder / "annotations.json").write_text(json.dumps(content))
    return root


@dataclass
class Writing:
    """A command that writes.

    Attributes:
        args: place of the result -> the command's arguments.
        result: place of the result -> what must be the same.
        prepare: what is there before the first call, given the place of the result.
    """

    args: Callable[[Path], list[str]]
    result: Callable[[Path], Any]
    prepare: Callable[[Path], object] = lambda _: None


def contents(place: Path) -> dict[str, bytes]:
    """The bytes of a file, or of all files in a folder."""
    files = [place] if place.is_file() else [path for path in sorted(place.rglob("*")) if path.is_file()]
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def run_result(folder: Path) -> dict[str, Any]:
    """The names in a run's folder, its logs without times, and its weights."""
    logs = [
        {key: value for key, value in entry.items() if key not in TIMES}
        for entry in [*read_metrics(folder), *read_evaluations(folder)]
    ]
    weights = {
        f"{file}/{name}": tensor.tolist()
        for file in ("checkpoint.pt", "best.pt")
        if (folder / file).exists()
        for name, tensor in load_checkpoint(folder / file)["model"].items()
        if isinstance(tensor, torch.Tensor)
    }
    return {"names": sorted(path.name for path in folder.iterdir()), "logs": logs, "weights": weights}


THOROUGH = ("tokenize", "pretrain")
"""Killed in the usual suite by `test_kill`."""
COMMANDS = (*THOROUGH, "finetune", "segment", "detect", "export", "features", "report")


@pytest.fixture(scope="module")
def commands(
    photos: Path,
    vit_teacher: list[str],
    vit_store: Path,
    tiny_student: list[str],
    tiny_run: Path,
    masks: Path,
    boxes: Path,
) -> dict[str, Writing]:
    """Name -> the command, on inputs as small as they get."""
    store = "--middle-size 96 --patch-size 16 --shard-size 8 --codec fp32 --pixels raw --workers 0".split()
    student = [*tiny_student, *"--epochs 2 --save-every 0 --workers 0".split()]
    run, finetune = str(tiny_run), f"{TRAINING} --batch-size 8".split()
    segment = f"{TRAINING} --batch-size 2 --head-channels 16 --pictures 0".split()
    detect = f"{TRAINING} --batch-size 1 --head-channels 16 --pictures 1 --image-size 64 --no-pretrained".split()
    return {
        "tokenize": Writing(
            lambda out: ["tokenize", str(photos / "train"), str(out), *vit_teacher, *store],
            contents,
        ),
        "pretrain": Writing(lambda out: ["pretrain", str(vit_store), str(out), *student], run_result),
        "finetune": Writing(lambda out: ["finetune", run, str(photos), "--out", str(out), *finetune], run_result),
        "segment": Writing(lambda out: ["segment", run, str(masks), "--out", str(out), *segment], run_result),
        "detect": Writing(lambda out: ["detect", "timm/test_vit", str(boxes), "--out", str(out), *detect], run_result),
        "export": Writing(lambda out: ["export", run, str(out)], contents),
        "features": Writing(
            lambda out: ["features", run, str(photos / "train"), str(out.with_suffix(".safetensors")), *CPU.split()],
            lambda out: contents(out.with_suffix(".safetensors")),
        ),
        "report": Writing(
            lambda out: ["report", str(out), "--images", "1", "--gallery", "8"],
            lambda out: {name: data for name, data in contents(out).items() if "tensorboard" not in name},
            prepare=lambda out: shutil.copytree(tiny_run, out),
        ),
    }


@pytest.mark.promise("kills")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", COMMANDS)
def test_after_a_kill_the_same_call_gives_the_same_result(name, commands, warm, tmp_path, record_property):
    command, tries, kills = commands[name], rounds(0 if name in THOROUGH else 1, 8), 0
    if not tries:
        pytest.skip("killed in test_kill")
    log = tmp_path / "log.txt"

    def place(number):
        (tmp_path / str(number)).mkdir()
        out = tmp_path / str(number) / "out"
        command.prepare(out)
        return out

    out = place(0)
    start = time.monotonic()
    warm.start(command.args(out), log).finish()
    seconds, expected = time.monotonic() - start, command.result(out)
    names = sorted(path.name for path in out.parent.iterdir())
    for number in range(tries):
        out = place(number + 1)
        process = warm.start(command.args(out), log)
        time.sleep(seconds * random.uniform(number, number + 1) / tries)
        os.kill(process.pid, signal.SIGKILL)
        code = process.wait()
        assert code in (0, -signal.SIGKILL), process.output()
        kills += code != 0
        warm.start(command.args(out), log).finish()
        assert command.result(out) == expected
        assert sorted(path.name for path in out.parent.iterdir()) == names  # nothing is left beside it
        shutil.rmtree(out.parent)
    assert "Traceback" not in log.read_text()
    record_property("cases", kills)
    print(f"{name}: {kills} kills in {tries} tries, {seconds:.1f} s without")
