"""Small photos with bright rectangles in them, annotated in COCO's format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

COLOURS = {3: (230, 40, 40), 8: (40, 60, 240)}
"""Category id -> colour of its rectangles."""
Box = tuple[int, int, int, int]
"""(left, top, width, height) in pixels."""


def rectangle_runs(image_width: int, image_height: int, box: Box) -> list[int]:
    """Uncompressed run lengths of a filled box, computed without pycocotools: down the columns, background first."""
    left, top, width, height = box
    mask = np.zeros((image_height, image_width), dtype=int)
    mask[top : top + height, left : left + width] = 1
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)]).tolist()
    return [0, *runs] if flat[0] else runs


def annotate(annotation_id: int, image: dict[str, Any], category: int, box: Box, as_rle: bool) -> dict[str, Any]:
    left, top, width, height = box
    right, bottom = left + width, top + height
    polygon = [[left, top, right, top, right, bottom, left, bottom]]
    rle = {"size": [image["height"], image["width"]], "counts": rectangle_runs(image["width"], image["height"], box)}
    return {
        "id": annotation_id,
        "image_id": image["id"],
        "category_id": category,
        "bbox": list(box),
        "area": width * height,
        "iscrowd": 0,
        "segmentation": rle if as_rle else polygon,
    }


def draw_split(folder: Path, images: int, seed: int) -> dict[str, Any]:
    """Write a split's photos, and give the content of its annotations.json."""
    rng = np.random.default_rng(seed)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 8, "name": "blue"}, {"id": 3, "name": "red"}],
    }
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        width, height = (int(side) for side in rng.integers(60, 90, 2))
        image = {"id": 100 + number, "file_name": f"{number:02d}.png", "width": width, "height": height}
        pixels = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
        for category, left in ((3, 4), (8, 34)):
            box = (left, int(rng.integers(2, 12)), int(rng.integers(16, 26)), int(rng.integers(20, 36)))
            pixels[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = COLOURS[category]
            annotation_id = len(content["annotations"]) + 1
            content["annotations"].append(annotate(annotation_id, image, category, box, as_rle=number % 2 == 1))
        Image.fromarray(pixels).save(folder / "images" / image["file_name"])
        content["images"].append(image)
    return content


@pytest.fixture
def rectangles(tmp_path: Path) -> Callable[..., Path]:
    """(change) -> a data folder of four training and two validation photos with two objects each.

    `change` is applied to the annotations of the training split, or of the named one.
    """

    def write(change: Callable[[dict[str, Any]], object] | None = None, split: str = "train") -> Path:
        data = tmp_path / "data"
        for name, images, seed in (("train", 4, 0), ("val", 2, 1)):
            content = draw_split(data / f"my_{name}", images, seed)
            if change is not None and name == split:
                change(content)
            (data / f"my_{name}" / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
        return data

    return write
