"""A small labelled set: bright discs (class 1) and squares (class 2) on a dark ground (class 0), the shapes' rims ignored."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = np.array([[40, 60, 90], [220, 180, 60], [200, 70, 160]])


def drawn(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A photo uint8 [H, W, 3] and its mask uint8 [H, W]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    for kind in (1, 2):
        centre, radius = random.uniform(0.25, 0.75, 2) * (height, width), random.uniform(10, 16)
        away = np.abs(np.stack([y, x]) - centre[:, None, None])
        distance = np.hypot(*away) if kind == 1 else away.max(0)
        mask[distance <= radius] = kind
        mask[np.abs(distance - radius) < 1] = 255
    noise = random.normal(0, 12, (height, width, 3))
    return (COLOURS[np.where(mask == 255, 0, mask)] + noise).clip(0, 255).astype(np.uint8), mask


def write(root: Path, split: str, name: str, photo: np.ndarray, mask: np.ndarray) -> None:
    """In the plain layout."""
    for kind, suffix, array in (("images", "jpg", photo), ("masks", "png", mask)):
        path = root / kind / split / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Ten photos of many sizes to train on, four to measure, and their classes' names; 'never' does not occur."""
    root = tmp_path / "shapes"
    for number in range(14):
        split = "train" if number < 10 else "val"
        write(root, split, f"{number:02d}", *drawn(number, 64 + 4 * (number % 4), 80 + 7 * (number % 3)))
    (root / "classes.json").write_text(
        json.dumps({"classes": {"0": "ground", "1": "disc", "2": "square", "3": "never"}, "ignore_index": 255})
    )
    return root


@pytest.fixture
def change_mask() -> Callable[[Path, Callable[[np.ndarray], np.ndarray]], None]:
    """(a mask's file, what becomes of its ids): rewrites it."""

    def change(path: Path, by: Callable[[np.ndarray], np.ndarray]) -> None:
        Image.fromarray(by(np.array(Image.open(path)))).save(path)

    return change
