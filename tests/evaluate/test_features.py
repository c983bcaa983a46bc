"""`fastmae features` against the encoder itself, on folders, lists and tars, with images that can't be decoded."""

import json
import os
import shutil
import signal
import tarfile
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors
import torch
from PIL import Image

import fastmae
from fastmae.cli import run
from fastmae.images.middle import resize_whole, to_tensor
from fastmae.images.views import normalise
from fastmae.runtime.ownership import owned_place

CPU = ["--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def files(photos):
    """The images of val/, in the order of their keys."""
    return sorted((photos / "val").rglob("*.*"), key=lambda path: str(path.relative_to(photos / "val")))


@pytest.fixture(scope="module")
def tokens(tiny_run, files):
    """The encoder's tokens of these images, computed one by one: class token and patch tokens, [10, 1 + 16, 64]."""
    encoder = fastmae.load_encoder(tiny_run)
    with torch.inference_mode():
        pictures = [normalise(to_tensor(resize_whole(Image.open(path).convert("RGB"), 64)))[None] for path in files]
        return torch.cat([encoder.forward_features(picture) for picture in pictures]).numpy()


def test_the_features_are_the_encoders_in_the_order_of_the_keys(
    tiny_run, photos, files, tokens, read_features, tmp_path, printed_json
):
    out = tmp_path / "new" / "val.safetensors"
    args = ["features", str(tiny_run), str(photos / "val"), str(out), "--batch-size", "4", "--dense"]
    assert run([*args, *CPU, "--json"]) == 0
    result = printed_json()
    expected = {"images": 10, "dim": 64, "grid": 4, "skipped": 0, "file": str(out), "bytes": out.stat().st_size}
    assert expected.items() <= result.items()
    assert result["images_per_second"] > 0
    features = read_features(out)
    assert features["paths"] == [str(path.relative_to(photos / "val")) for path in files]
    np.testing.assert_allclose(features["dense"], tokens[:, 1:].reshape(10, 4, 4, 64), atol=1e-4)
    np.testing.assert_allclose(features["embeddings"], tokens[:, 1:].mean(1), atol=1e-4)
    with safetensors.safe_open(out, "np") as opened:
        metadata = json.loads(opened.metadata()["fastmae"])
        assert opened.get_slice("dense")[3:5].shape == (2, 4, 4, 64)
    assert (metadata["pool"], metadata["listed"], metadata["encoder"]["patch_size"]) == ("mean", 10, 16)


def test_a_parquet_file_holds_the_same_features(tiny_run, photos, read_features, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmae.evaluate.feature_files.ROW_GROUP", 4)
    for name in ("val.safetensors", "val.parquet"):
        args = ["features", str(tiny_run), str(photos / "val"), str(tmp_path / name), "--batch-size", "3"]
        assert run([*args, *CPU]) == 0
    features, table = read_features(tmp_path / "val.safetensors"), pq.read_table(tmp_path / "val.parquet")
    assert table["path"].to_pylist() == features["paths"]
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), features["embeddings"])
    assert pq.ParquetFile(tmp_path / "val.parquet").num_row_groups == 2
    assert b"fastmae" in table.schema.metadata


def test_pooling_block_precision_and_image_size_can_be_chosen(tiny_run, photos, tokens, read_features, tmp_path):
    out = tmp_path / "val.safetensors"
    args = ["features", str(tiny_run), str(photos / "val"), str(out), *CPU]
    assert run([*args, "--pool", "class", "--dtype", "fp16"]) == 0
    class_tokens = read_features(out)["embeddings"]
    assert class_tokens.dtype == np.float16
    np.testing.assert_allclose(class_tokens, tokens[:, 0], atol=4e-3)
    assert run([*args, "--block", "0"]) == 0
    assert abs(read_features(out)["embeddings"] - tokens[:, 1:].mean(1)).max() > 0.1
    assert run([*args, "--dense", "--image-size", "96"]) == 0
    assert read_features(out)["dense"].shape == (10, 6, 6, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["val.safetensors"]


def test_a_list_and_a_tar_give_the_same_features_as_the_folder(
    tiny_run, photos, files, tokens, read_features, tmp_path
):
    path_list, tar_file = tmp_path / "some.txt", tmp_path / "some.tar"
    path_list.write_text("\n".join(str(path) for path in files[:4]))
    with tarfile.open(tar_file, "w") as tar:
        for path in files[:4]:
            tar.add(path, str(path.relative_to(photos / "val")))
    for source in (path_list, tar_file):
        out = tmp_path / f"{source.suffix[1:]}.safetensors"
        assert run(["features", str(tiny_run), str(source), str(out), *CPU]) == 0
        np.testing.assert_allclose(read_features(out)["embeddings"], tokens[:4, 1:].mean(1), atol=1e-4)


@pytest.fixture
def images_and_two_broken_ones(photos, tmp_path):
    images = shutil.copytree(photos / "val", tmp_path / "images")
    (images / "china" / "00 broken.jpg").write_bytes(b"<html>")
    (images / "zz.png").write_bytes((images / "china" / "07.png").read_bytes()[:500])
    return images


@pytest.mark.parametrize("workers", ["0", "1"])
def test_images_that_cannot_be_decoded_are_skipped_and_named(
    workers, tiny_run, images_and_two_broken_ones, tokens, read_features, tmp_path, capsys
):
    out = tmp_path / "out.safetensors"
    options = ["--json", "--dense", "--batch-size", "1", "--workers", workers, "--device", "cpu"]
    assert run(["features", str(tiny_run), str(images_and_two_broken_ones), str(out), *options]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert (result["images"], result["skipped"]) == (10, 2)
    assert [skipped["path"] for skipped in result["skipped_images"]] == ["china/00 broken.jpg", "zz.png"]
    assert "skipped china/00 broken.jpg" in captured.err
    features = read_features(out)
    assert len(features["paths"]) == 10
    np.testing.assert_allclose(features["embeddings"], tokens[:, 1:].mean(1), atol=1e-4)
    np.testing.assert_allclose(features["dense"].mean((1, 2)), tokens[:, 1:].mean(1), atol=1e-4)


def test_strict_refuses_an_image_that_cannot_be_decoded(tiny_run, images_and_two_broken_ones, tmp_path, error_line):
    args = ["features", str(tiny_run), str(images_and_two_broken_ones), str(tmp_path / "out.safetensors"), *CPU]
    assert "china/00 broken.jpg" in error_line([*args, "--strict"])
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_folder_without_a_single_decodable_image_is_refused(tiny_run, tmp_path, error_line):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.jpg").write_bytes(b"<html>")
    args = ["features", str(tiny_run), str(tmp_path / "images"), str(tmp_path / "out.safetensors"), *CPU]
    assert "broken.jpg" in error_line(args)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_file_name_that_is_not_utf_8_is_kept(tiny_run, photos, read_features, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    name = os.fsdecode(b"caf\xe9 \n.jpg")
    shutil.copy(photos / "val" / "china" / "03.jpg", images / name)
    for file in ("a.safetensors", "a.parquet"):
        assert run(["features", str(tiny_run), str(images), str(tmp_path / file), *CPU]) == 0
    assert read_features(tmp_path / "a.safetensors")["paths"] == [name]
    assert pq.read_table(tmp_path / "a.parquet")["path"].to_pylist() == ["caf\\xe9 \n.jpg"]


def test_an_exported_model_gives_the_features_of_its_run(tiny_run, photos, tokens, read_features, tmp_path):
    assert run(["export", str(tiny_run), str(tmp_path / "exported")]) == 0
    out = tmp_path / "out.safetensors"
    assert run(["features", str(tmp_path / "exported"), str(photos / "val"), str(out), *CPU]) == 0
    np.testing.assert_allclose(read_features(out)["embeddings"], tokens[:, 1:].mean(1), atol=1e-4)


def test_a_timm_name_is_embedded_with_given_or_with_random_weights(
    photos, vit_weights, read_features, tmp_path, printed_json
):
    out = tmp_path / "out.safetensors"
    args = ["features", "timm/vit_tiny_patch16_224", str(photos / "val"), str(out), "--image-size", "32", *CPU]
    assert run([*args, "--weights", str(vit_weights), "--json"]) == 0
    assert printed_json()["dim"] == 192
    with_weights = read_features(out)["embeddings"]
    assert run([*args, "--no-pretrained", "--seed", "1"]) == 0
    assert abs(read_features(out)["embeddings"] - with_weights).max() > 0.1


@pytest.mark.parametrize(
    ("out", "options", "named"),
    [
        ("out.csv", "", "out.csv"),
        ("out.parquet", "--dense", "--dense"),
        ("out.parquet", "--block 2", "--block 2"),
        ("out.parquet", "--image-size 50", "--image-size 50"),
        ("out.parquet", "--dtype fp8", "fp8"),
    ],
)
def test_options_that_do_not_fit_are_named_and_nothing_is_written(
    out, options, named, tiny_run, photos, tmp_path, error_line
):
    args = ["features", str(tiny_run), str(photos / "val"), str(tmp_path / out), *options.split(), *CPU]
    assert named in error_line(args)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_images_is_named(tiny_run, tmp_path, error_line):
    (tmp_path / "empty").mkdir()
    args = ["features", str(tiny_run), str(tmp_path / "empty"), str(tmp_path / "out.parquet"), *CPU]
    assert str(tmp_path / "empty") in error_line(args)


@pytest.mark.slow
def test_a_killed_call_leaves_the_earlier_file(tiny_run, photos, tmp_path, warm):
    images, out = tmp_path / "images", tmp_path / "out.safetensors"
    images.mkdir()
    for number in range(3000):
        (images / f"{number}.jpg").symlink_to(photos / "val" / "china" / "03.jpg")
    assert run(["features", str(tiny_run), str(photos / "val"), str(out), *CPU]) == 0
    before = out.read_bytes()
    args = ["features", str(tiny_run), str(images), str(out), *CPU, "--batch-size", "1"]
    process = warm.start(args, tmp_path / "log.txt")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.part")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert out.read_bytes() == before
    assert len(list(tmp_path.glob("*.part"))) == 1
    assert run(["features", str(tiny_run), str(photos / "val"), str(out), *CPU]) == 0
    assert not list(tmp_path.glob("*.part"))
    assert out.read_bytes() == before


@pytest.mark.promise("owner")
def test_a_second_process_that_would_write_the_same_file_is_refused(tiny_run, photos, tmp_path, error_line):
    out = tmp_path / "val.safetensors"
    with owned_place(out, "features"):
        assert f"{out}: in use by process " in error_line(["features", str(tiny_run), str(photos), str(out), *CPU])
    assert list(tmp_path.iterdir()) == []
