"""Detections are at the original photo's size, whatever size the network saw, and come from all processes."""

import json

import numpy as np
import pytest
import torch

from fastmae.evaluate.detection import masks
from fastmae.evaluate.detection.average_precision import Detections
from fastmae.evaluate.detection.coco import find_splits, read_split
from fastmae.evaluate.detection.validation import detect_objects, gather_detections
from fastmae.runtime.fabric import Fabric


def test_boxes_and_masks_are_at_the_original_photos_size(rectangles):
    split = read_split(find_splits(rectangles())[0])
    width, height = split.size(1)
    photo = torch.zeros(3, height // 2, width // 2, dtype=torch.uint8)

    def find_left_half(photos):
        rows, cols = photos[0].shape[1:]
        return [
            {
                "boxes": torch.tensor([[0.0, 0.0, cols / 2, rows]]),
                "labels": torch.tensor([2]),
                "scores": torch.tensor([0.5]),
                "masks": torch.ones(1, 1, 28, 28),
            }
        ]

    detected = detect_objects(find_left_half, split, 1, photo)
    assert (detected.image, detected.labels.tolist(), detected.scores.tolist()) == (1, [2], [0.5])
    assert detected.boxes[0].tolist() == pytest.approx([0, 0, width / 2, height], abs=1e-4)
    (mask,) = (masks.decode(counts, (width, height)) for counts in detected.masks)
    rows, cols = np.nonzero(mask)
    assert (cols.min(), rows.min(), rows.max() + 1) == (0, 0, height)
    assert cols.max() + 1 == pytest.approx(width / 2, abs=0.6)


def detect_in_own_share(fabric, path):
    """Run in each of two processes: detect something in every second image; the first writes what is gathered."""
    mask = masks.encode([[0, 0, 4, 0, 4, 4]], (8, 8))
    share = range(fabric.global_rank, 5, 2)
    detections = [Detections(image, np.array([image + 1]), np.ones(1), np.zeros((1, 4)), [mask]) for image in share]
    gathered = gather_detections(fabric, detections)
    if fabric.is_global_zero:
        path.write_text(json.dumps([[detected.image, detected.labels.tolist()] for detected in gathered]))
    else:
        assert gathered == []


def test_detections_of_all_processes_are_gathered_in_the_order_of_the_images(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    fabric.launch(detect_in_own_share, tmp_path / "gathered.json")
    assert json.loads((tmp_path / "gathered.json").read_text()) == [[image, [image + 1]] for image in range(5)]
