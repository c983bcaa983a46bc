"""One value range, from the store to all that reads images for a run: 12-bit images are what they would be in 8.

The 12-bit images hold 16 times the values of 8-bit ones, so that `--value-range 0 4080` gives back exactly these.
"""

import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from fastmae import TokenStore
from fastmae.cli import run
from fastmae.config import KnnConfig
from fastmae.evaluate.knn import labelled_features
from fastmae.runs.encoder import open_encoder
from fastmae.runs.folder import read_run
from fastmae.tokens.format import read_store_info, shard_path

pytestmark = pytest.mark.promise("values")

RANGE = ["--value-range", "0", "4080"]
OPTIONS = "--middle-size 96 --patch-size 16 --shard-size 8 --codec fp32 --pixels raw --workers 0".split()


@pytest.fixture(scope="module")
def grey(photos, tmp_path_factory):
    """Two folders with the same grey pictures in classes below train/ and val/: `8`, and `12` of 12 bits in 16."""
    root = tmp_path_factory.mktemp("grey")
    for path in sorted(photos.rglob("*.png")):
        values = np.asarray(Image.open(path).convert("L").resize((90, 80)))
        for folder, picture in (("8", values), ("12", values.astype(np.uint16) * 16)):
            place = root / folder / path.relative_to(photos)
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place)
    return root


@pytest.fixture(scope="module")
def options(vit_teacher):
    """Options of `tokenize`."""
    return [*vit_teacher, *OPTIONS]


@pytest.fixture(scope="module")
def store(grey, options, tmp_path_factory):
    """A store of the 12-bit images."""
    folder = tmp_path_factory.mktemp("values") / "12.tokens"
    assert run(["tokenize", str(grey / "12" / "train"), str(folder), *options, *RANGE]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(store, tiny_student, tmp_path_factory):
    """A run of one epoch on that store."""
    folder = tmp_path_factory.mktemp("values") / "run"
    assert run(["pretrain", str(store), str(folder), *tiny_student, "--epochs", "1", "--workers", "0"]) == 0
    return folder


def embedded(model, images, out):
    assert run(["features", str(model), str(images), str(out), "--device", "cpu", "--workers", "0"]) == 0
    return safetensors.numpy.load_file(out)["embeddings"]


def test_the_store_is_that_of_the_8_bit_images_and_records_the_range(grey, options, store, tmp_path):
    assert run(["tokenize", str(grey / "8" / "train"), str(tmp_path / "8"), *options]) == 0
    assert shard_path(store, 0).read_bytes() == shard_path(tmp_path / "8", 0).read_bytes()
    assert read_store_info(store).value_range == "0 4080"
    assert "value_range" not in (tmp_path / "8" / "store.json").read_text()
    assert read_store_info(tmp_path / "8").value_range == "auto"


@pytest.mark.parametrize("other", [[], ["--value-range", "file"], ["--value-range", "0", "4095"]])
def test_a_continued_call_with_another_range_is_refused(grey, options, store, error_line, other):
    line = error_line(["tokenize", str(grey / "12" / "train"), str(store), *options, *other])
    assert "was begun with other settings (value_range: 0 4080, not" in line


def test_more_images_need_the_same_range(grey, options, store, error_line):
    call = ["tokenize", str(grey / "12" / "val"), str(store), *options, "--add"]
    assert "value_range: 0 4080, not auto" in error_line(call)


def test_a_repair_maps_as_the_store_records(store, tmp_path):
    shutil.copytree(store, tmp_path / "s")
    shard_path(tmp_path / "s", 1).unlink()
    assert run(["verify", str(tmp_path / "s"), "--repair", "--workers", "0"]) == 0
    assert shard_path(tmp_path / "s", 1).read_bytes() == shard_path(store, 1).read_bytes()


def test_set_measures_the_range_once_and_keeps_it(grey, options, tmp_path, error_line):
    images, folder = grey / "12" / "train", tmp_path / "s"
    assert run(["tokenize", str(images), str(folder), *options, "--value-range", "set"]) == 0
    values = np.concatenate([np.asarray(Image.open(path)).ravel() for path in sorted(images.rglob("*.png"))])
    low, high = (float(f"{value:.6g}") for value in np.percentile(values, (0.5, 99.5)))
    assert read_store_info(folder).value_range == f"{low:g} {high:g}"
    first = TokenStore(folder).pixels(0)[0].numpy()
    shard_path(folder, 0).unlink()
    assert run(["tokenize", str(images), str(folder), *options, "--value-range", "set"]) == 0
    np.testing.assert_array_equal(TokenStore(folder).pixels(0)[0].numpy(), first)
    line = error_line(["tokenize", str(grey / "8" / "train"), str(tmp_path / "8"), *options, "--value-range", "set"])
    assert line.endswith("have no values of more than 8 bits, or one value only; leave it out")
    assert not (tmp_path / "8").exists()


def test_features_of_a_run_and_of_its_export_map_as_the_store_did(grey, trained, tmp_path):
    assert read_run(trained)["store"]["value_range"] == "0 4080"
    expected = embedded(trained, grey / "8" / "val", tmp_path / "8.safetensors")
    np.testing.assert_array_equal(embedded(trained, grey / "12" / "val", tmp_path / "12.safetensors"), expected)
    assert run(["export", str(trained), str(tmp_path / "exported")]) == 0
    assert "from 0 (0) to 4080 (255)" in (tmp_path / "exported" / "README.md").read_text()
    np.testing.assert_array_equal(
        embedded(tmp_path / "exported", grey / "12" / "val", tmp_path / "export.safetensors"), expected
    )


@pytest.mark.parametrize("features", ["encoder", "teacher"])
def test_knn_maps_as_the_store_did(features, grey, trained):
    figures = []
    for bits in ("8", "12"):
        config = KnnConfig(run=trained, data=grey / bits, features=features, device="cpu", workers=0)
        embedded = labelled_features(config)
        figures.append(torch.cat([embedded.train, embedded.val]))
    assert torch.equal(figures[0], figures[1])


def test_an_encoder_hands_the_range_on_to_the_run_that_is_made_from_it(trained):
    opened = open_encoder(str(trained))
    assert opened.value_range == opened.describe()["value_range"] == "0 4080"
    assert "value_range" not in open_encoder("timm/vit_tiny_patch16_224", pretrained=False).describe()


def test_a_range_that_was_changed_by_hand_is_refused(trained, store, error_line, grey, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    saved["run"]["store"]["value_range"] = "9 1"
    torch.save(saved, tmp_path / "run" / "checkpoint.pt")
    assert "no value range: '9 1'" in error_line(["knn", str(tmp_path / "run"), str(grey / "8"), "--device", "cpu"])
    shutil.copytree(store, tmp_path / "s")
    text = (store / "store.json").read_text()
    (tmp_path / "s" / "store.json").write_text(text.replace("0 4080", "9 1"))
    assert "store.json: no value range: '9 1'" in error_line(["inspect", str(tmp_path / "s")])
