"""`pretrain --knn-every`: it measures the encoder as it stands, and the training does not notice."""

import json

import pytest
import torch

from fastmae.cli import run
from fastmae.errors import InputError
from fastmae.pretraining.knn_every import labelled_images
from fastmae.runs.folder import read_evaluations, read_metrics
from fastmae.tokens import TokenStore


def test_a_run_with_measurements_is_the_run_without(vit_store, photos, tiny_student, tmp_path, capsys):
    args = [str(vit_store), *tiny_student, "--epochs", "4", "--workers", "0"]
    assert run(["pretrain", *args[:1], str(tmp_path / "a"), *args[1:]]) == 0
    assert (
        run(["pretrain", *args[:1], str(tmp_path / "b"), *args[1:], "--knn-every", "2", "--knn-data", str(photos)]) == 0
    )
    losses = [[entry["loss"] for entry in read_metrics(tmp_path / name)] for name in ("a", "b")]
    assert losses[0] == losses[1]
    evaluations = read_evaluations(tmp_path / "b")
    assert [entry["step"] for entry in evaluations] == [8, 15]
    capsys.readouterr()
    assert run(["knn", str(tmp_path / "b"), str(photos), "--workers", "0", "--json"]) == 0
    assert evaluations[-1]["knn_top1"] == json.loads(capsys.readouterr().out.splitlines()[-1])["top1"]


def test_a_stores_own_images_are_labelled_by_their_folders_and_none_asks_and_votes(vit_store):
    store = TokenStore(vit_store)
    images = labelled_images(None, store, 64)
    assert (len(images.votes), len(images.asks)) == (24, 6)
    assert not set(images.votes.indices) & set(images.asks.indices)
    assert torch.equal(images.asks[0], store.view_pixels(0, 1, 1, 4))
    for pictures, labels in ((images.votes, images.vote_labels), (images.asks, images.ask_labels)):
        names = ["china" if "china" in store.key(int(index)) else "flower" for index in pictures.indices]
        assert [["china", "flower"][label] for label in labels.tolist()] == names


def test_images_of_one_folder_have_no_labels(photos, vit_weights, tmp_path):
    teacher = [
        "--teacher",
        "timm/vit_tiny_patch16_224",
        "--teacher-weights",
        str(vit_weights),
        "--middle-size",
        "32",
        "--workers",
        "0",
    ]
    assert run(["tokenize", str(photos / "val" / "china"), str(tmp_path / "a.tokens"), *teacher]) == 0
    with pytest.raises(InputError, match="give --knn-data DATA"):
        labelled_images(None, TokenStore(tmp_path / "a.tokens"), 32)
