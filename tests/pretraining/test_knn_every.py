"""`pretrain --knn-every`: the encoder is measured while it trains, and the training stays the same."""

import pytest
import torch

from fastmae.cli import run
from fastmae.errors import InputError
from fastmae.pretraining.knn_every import labelled_images
from fastmae.runs.folder import read_evaluations, read_metrics
from fastmae.tokens import TokenStore


@pytest.mark.parametrize("workers", [["--workers", "0"], []], ids=["no workers", "default workers"])
def test_measuring_does_not_change_the_training_and_agrees_with_the_command_knn(
    workers, vit_store, photos, tiny_student, tmp_path, printed_json
):
    options = [*tiny_student, "--epochs", "4", *workers]
    measured = ["--knn-every", "2", "--knn-data", str(photos)]
    assert run(["pretrain", str(vit_store), str(tmp_path / "a"), *options]) == 0
    assert run(["pretrain", str(vit_store), str(tmp_path / "b"), *options, *measured]) == 0
    losses, measured_losses = ([entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("a", "b"))
    assert measured_losses == losses
    evaluations = read_evaluations(tmp_path / "b")
    assert [entry["step"] for entry in evaluations] == [8, 15]
    assert run(["knn", str(tmp_path / "b"), str(photos), "--workers", "0", "--json"]) == 0
    assert evaluations[-1]["knn_top1"] == printed_json()["top1"]


def test_a_stores_images_are_labelled_by_their_folders_and_every_fifth_one_is_held_out(vit_store):
    store = TokenStore(vit_store)
    images = labelled_images(None, store, 64)
    assert (len(images.train), len(images.val)) == (24, 6)
    assert not set(images.train.indices) & set(images.val.indices)
    assert torch.equal(images.val[0], store.view_pixels(0, 1, 1, 4))
    for views, labels in ((images.train, images.train_labels), (images.val, images.val_labels)):
        names = ["china" if "china" in store.key(int(index)) else "flower" for index in views.indices]
        assert [["china", "flower"][label] for label in labels.tolist()] == names


def test_the_images_of_a_single_folder_have_no_labels(photos, vit_teacher, tmp_path):
    store = tmp_path / "a.tokens"
    options = ["--middle-size", "32", "--workers", "0"]
    assert run(["tokenize", str(photos / "val" / "china"), str(store), *vit_teacher, *options]) == 0
    with pytest.raises(InputError, match="--knn-data"):
        labelled_images(None, TokenStore(store), 32)
