"""What is found comes back at the photo's own size, whatever size the network saw, and from all processes."""

import json

import numpy as np
import pytest
import torch

from fastmae.evaluate.detection import masks
from fastmae.evaluate.detection.average_precision import Detections
from fastmae.evaluate.detection.coco import find_splits, read_split
from fastmae.evaluate.detection.validation import detections, gathered
from fastmae.runtime.fabric import Fabric


def test_boxes_and_masks_come_back_at_the_photos_own_size(rectangles):
    split = read_split(find_splits(rectangles())[0])
    width, height = split.size(1)
    half = torch.zeros(3, height // 2, width // 2, dtype=torch.uint8)

    def network(photos):  # finds one object, in the left half of what it sees
        rows, columns = photos[0].shape[1:]
        box = torch.tensor([[0.0, 0.0, columns / 2, rows]])
        return [
            {
                "boxes": box,
                "labels": torch.tensor([2]),
                "scores": torch.tensor([0.5]),
                "masks": torch.ones(1, 1, 28, 28),
            }
        ]

    (found,) = detections(network, split, [([1], [half])])
    assert (found.image, found.labels.tolist(), found.scores.tolist()) == (1, [2], [0.5])
    assert found.boxes[0].tolist() == pytest.approx([0, 0, width / 2, height], abs=1e-4)
    assert masks.bounds(found.counts[0], (width, height)) == pytest.approx([0, 0, width / 2, height], abs=0.6)


def find_in_share(fabric, path):
    """A process of two: finds something in every second image, and the first one writes what it has of all."""
    share = range(fabric.global_rank, 5, 2)
    counts = masks.encode([[0, 0, 4, 0, 4, 4]], (8, 8))
    found = [Detections(image, np.array([image + 1]), np.ones(1), np.zeros((1, 4)), [counts]) for image in share]
    all_found = gathered(fabric, found)
    if fabric.is_global_zero:
        path.write_text(json.dumps([[detected.image, detected.labels.tolist()] for detected in all_found]))
    else:
        assert all_found == []


def test_detections_of_all_processes_are_gathered_in_order(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    fabric.launch(find_in_share, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == [[image, [image + 1]] for image in range(5)]
