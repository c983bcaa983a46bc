"""What the check works on: photos, small labelled sets, teachers with random weights, and stores of their tokens."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fastmae.tokens.format import read_store_info
from gpu_check.commands import Outcome
from gpu_check.report import Report
from gpu_check.setting import Setting

CLASSES = 4
LABELLED = {"train": 48, "val": 24}
OBJECTS = {"train": 12, "val": 4}
RED, BLUE = (230, 40, 40), (40, 60, 240)
CODECS = {"fp16": [], "pq38": ["--jpeg-quality", "65"]}
"""Codec -> more options of its store: those that the guide gives."""
LIKE_PHOTOS = ((16, 60), (4, 25), (1, 6))
"""Pixels a side, and amplitude, of the random squares that make up a photo. A JPEG of it is as large as a photo's."""


def inputs(setting: Setting, report: Report) -> None:
    """Make everything that is not there yet. A folder that is kept (`--work`) serves the next call."""
    done = setting.work / "inputs.json"
    if not done.exists():
        for part in (setting.photos, setting.many, setting.labelled, setting.work / "boxes", setting.work / "masks"):
            shutil.rmtree(part, ignore_errors=True)
        _write_photos(setting)
        _link_photos(setting)
        _write_objects(setting.work)
        for name in {setting.sizes.teacher, "vit_tiny_patch16_224"}:
            torch.manual_seed(0)
            save_file(timm.create_model(name, num_classes=0).state_dict(), setting.weights(name))
        done.write_text("{}")
    _tokenise(setting, report)


def _tokenise(setting: Setting, report: Report) -> None:
    for codec, options in CODECS.items():
        outcome = tokenise(setting, codec, options, setting.photos, setting.store(codec))
        images = outcome.result.get("images", 0)
        expected = f"{setting.sizes.images} images"
        seen = f"{images} images" if outcome.code == 0 else outcome.ending
        if outcome.code == 0:
            seen += f", by the teacher in {read_store_info(setting.store(codec)).teacher.get('precision', '32-true')}"
        report.check(f"tokenize, {codec}", images == setting.sizes.images, expected, seen, outcome.details)


def tokenise(setting: Setting, codec: str, options: list[str], photos: Path, store: Path) -> Outcome:
    """Run `fastmae tokenize` with the setting's teacher; `options` are those of the codec."""
    call = ["tokenize", str(photos), str(store), "--codec", codec, *options, *setting.teacher]
    return setting.commands.run([*call, "--middle-size", str(setting.sizes.middle), "--device", setting.device])


def _link_photos(setting: Setting) -> None:
    for photo in setting.photos.rglob("*.jpg"):
        for number in range(setting.sizes.copies):
            link = setting.many / str(number) / photo.relative_to(setting.photos)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(photo, link)


def _write_photos(setting: Setting) -> None:
    width, height = setting.sizes.photo
    places = [(setting.photos / f"class{n % CLASSES}" / f"{n:05d}.jpg", n) for n in range(setting.sizes.images)]
    for split, count in LABELLED.items():
        places += [(setting.labelled / split / f"class{n % CLASSES}" / f"{n:05d}.jpg", n) for n in range(count)]
    for folder in {path.parent for path, _ in places}:
        folder.mkdir(parents=True)
    jobs = [(path, seed, width, height) for path, seed in places]
    workers = max(1, min(16, os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        for _ in pool.map(_write_photo, jobs, chunksize=32):
            pass


def _write_photo(job: tuple[Path, int, int, int]) -> None:
    path, seed, width, height = job
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0, np.float32)
    for square, amplitude in LIKE_PHOTOS:
        coarse = random.normal(0, amplitude, (-(-height // square), -(-width // square), 3))
        values = np.clip(128 + coarse, 0, 255).astype(np.uint8)
        layer = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
        pixels += np.asarray(layer, np.float32) - 128
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=92)


def _write_objects(work: Path) -> None:
    """Two squares on grey noise in each picture, with masks (`segment`) and with boxes (`detect`)."""
    random = np.random.default_rng(0)
    for split, count in OBJECTS.items():
        boxes: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
        boxes["categories"] = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
        for number in range(count):
            pixels = random.integers(90, 130, (80, 96, 3), dtype=np.uint8)
            mask = np.zeros((80, 96), np.uint8)
            for kind, left in ((1, 8), (2, 52)):
                pixels[20:60, left : left + 32] = RED if kind == 1 else BLUE
                mask[20:60, left : left + 32] = kind
            boxes["images"].append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 80})
            boxes["annotations"] += _annotations(number)
            for path, array in (
                (work / "boxes" / split / "images", pixels),
                (work / "masks" / "images" / split, pixels),
                (work / "masks" / "masks" / split, mask),
            ):
                path.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path / f"{number}.png")
        (work / "boxes" / split / "annotations.json").write_text(json.dumps(boxes))


def _annotations(image: int) -> Iterator[dict[str, Any]]:
    for kind, left in ((1, 8), (2, 52)):
        outline = [left, 20, left + 32, 20, left + 32, 60, left, 60]
        yield {
            "id": 2 * image + kind,
            "image_id": image,
            "category_id": kind,
            "bbox": [left, 20, 32, 40],
            "area": 1280,
            "iscrowd": 0,
            "segmentation": [outline],
        }
