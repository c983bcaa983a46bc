"""A small labelled set: bright discs (class 1) and squares (class 2) on a dark ground (class 0), with ignored rims."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = np.array([[40, 60, 90], [220, 180, 60], [200, 70, 160]])


def draw_shapes(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A photo uint8 [H, W, 3] and its mask uint8 [H, W]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    for class_id in (1, 2):
        centre, radius = random.uniform(0.25, 0.75, 2) * (height, width), random.uniform(10, 16)
        offsets = np.abs(np.stack([y, x]) - centre[:, None, None])
        distance = np.hypot(*offsets) if class_id == 1 else offsets.max(0)
        mask[distance <= radius] = class_id
        mask[np.abs(distance - radius) < 1] = 255
    noise = random.normal(0, 12, (height, width, 3))
    return (COLOURS[np.where(mask == 255, 0, mask)] + noise).clip(0, 255).astype(np.uint8), mask


def write_pair(root: Path, split: str, name: str, photo: np.ndarray, mask: np.ndarray) -> None:
    for kind, suffix, array in (("images", "jpg", photo), ("masks", "png", mask)):
        path = root / kind / split / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A data folder of ten training and four validation photos of many sizes. The class 'never' does not occur."""
    root = tmp_path / "shapes"
    for number in range(14):
        split = "train" if number < 10 else "val"
        photo, mask = draw_shapes(number, 64 + 4 * (number % 4), 80 + 7 * (number % 3))
        write_pair(root, split, f"{number:02d}", photo, mask)
    (root / "classes.json").write_text(
        json.dumps({"classes": {"0": "ground", "1": "disc", "2": "square", "3": "never"}, "ignore_index": 255})
    )
    return root


@pytest.fixture
def shapes_as_ade(shapes: Path, tmp_path: Path) -> Path:
    """The photos and masks of `shapes` in ADE20K's own layout: 0 is ignored, and class k is k + 1."""
    root = tmp_path / "ade"
    (root / "images").mkdir(parents=True)
    for split, ade_split in (("train", "training"), ("val", "validation")):
        (root / "images" / ade_split).symlink_to(shapes / "images" / split)
        (root / "annotations" / ade_split).mkdir(parents=True)
        for mask in (shapes / "masks" / split).iterdir():
            ids = np.array(Image.open(mask)).astype(int)
            ade_ids = np.where(ids == 255, 0, ids + 1).astype(np.uint8)
            Image.fromarray(ade_ids).save(root / "annotations" / ade_split / mask.name)
    return root


@pytest.fixture
def change_mask() -> Callable[[Path, Callable[[np.ndarray], np.ndarray]], None]:
    """(mask file, function of its ids) -> the file is rewritten."""

    def change(path: Path, function: Callable[[np.ndarray], np.ndarray]) -> None:
        Image.fromarray(function(np.array(Image.open(path)))).save(path)

    return change
