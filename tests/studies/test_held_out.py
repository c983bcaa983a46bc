"""The held-out fifth of train/."""

from pathlib import Path

import pytest
import torch

from fastmae.errors import InputError
from fastmae.probes.labelled import LabelledFolder
from fastmae.studies.held_out import held_out_fifth


def folder(counts):
    paths = [Path(f"{label}/{number}") for label, count in enumerate(counts) for number in range(count)]
    labels = torch.tensor([int(path.parent.name) for path in paths])
    return LabelledFolder(["a", "b"], paths, labels, [Path("val")], torch.tensor([0]))


def test_every_fifth_image_of_each_class_is_measured_and_does_not_vote():
    data = held_out_fifth(folder([11, 7]), "photos")
    assert [str(path) for path in data.val] == ["0/4", "0/9", "1/4"]
    assert data.val_labels.tolist() == [0, 0, 1]
    assert len(data.train) == 15
    assert not set(data.train) & set(data.val)
    assert data.train_labels.tolist() == [int(path.parent.name) for path in data.train]


def test_classes_that_are_too_small_are_refused():
    with pytest.raises(InputError, match="photos"):
        held_out_fifth(folder([4, 4]), "photos")
