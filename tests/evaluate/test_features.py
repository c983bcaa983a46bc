"""`fastmae features` against the encoder called directly, on folders, lists and tars, with images that can't be decoded."""

import json
import os
import shutil
import signal
import subprocess
import tarfile
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.numpy
import torch
from PIL import Image

import fastmae
from fastmae.cli import run
from fastmae.evaluate.feature_files import SafetensorsFeatures
from fastmae.images.middle import resize_whole, to_tensor
from fastmae.images.views import normalise

CPU = ["--workers", "0", "--device", "cpu"]


def result(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def read(file):
    """The tensors of a file, the paths as a list."""
    tensors = safetensors.numpy.load_file(file)
    return {**tensors, "paths": tensors["paths"].tobytes().decode("utf-8", "surrogateescape").split("\0")}


@pytest.fixture(scope="module")
def tiny_run(vit_store, tiny_student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert run(["pretrain", str(vit_store), str(folder), *tiny_student, "--epochs", "1", "--workers", "0"]) == 0
    return folder


@pytest.fixture(scope="module")
def files(photos):
    """The images of val/, in the order of their keys."""
    return sorted((photos / "val").rglob("*.*"), key=lambda path: str(path.relative_to(photos / "val")))


@pytest.fixture(scope="module")
def tokens(tiny_run, files):
    """What the encoder makes of them, one by one: [10, 1 + 16, 64]."""
    encoder = fastmae.load_encoder(tiny_run)
    with torch.inference_mode():
        pictures = [normalise(to_tensor(resize_whole(Image.open(path).convert("RGB"), 64)))[None] for path in files]
        return torch.cat([encoder.forward_features(picture) for picture in pictures]).numpy()


def test_features_equal_the_encoders_own_in_the_order_of_the_keys(tiny_run, photos, files, tokens, tmp_path, capsys):
    out = tmp_path / "new" / "val.safetensors"
    args = ["features", str(tiny_run), str(photos / "val"), str(out), "--batch-size", "4", "--dense"]
    assert run([*args, *CPU, "--json"]) == 0
    found = result(capsys)
    assert (found["images"], found["dim"], found["grid"], found["skipped"], found["file"]) == (10, 64, 4, 0, str(out))
    assert found["images_per_second"] > 0
    assert found["bytes"] == out.stat().st_size
    held = read(out)
    assert held["paths"] == [str(path.relative_to(photos / "val")) for path in files]
    np.testing.assert_allclose(held["dense"], tokens[:, 1:].reshape(10, 4, 4, 64), atol=1e-4)
    np.testing.assert_allclose(held["embeddings"], tokens[:, 1:].mean(1), atol=1e-4)
    with safetensors.safe_open(out, "np") as opened:
        made = json.loads(opened.metadata()["fastmae"])
        assert opened.get_slice("dense")[3:5].shape == (2, 4, 4, 64)
    assert (made["pool"], made["listed"], made["encoder"]["patch_size"]) == ("mean", 10, 16)


def test_parquet_holds_the_same(tiny_run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmae.evaluate.feature_files.ROW_GROUP", 4)
    for name in ("val.safetensors", "val.parquet"):
        assert (
            run(["features", str(tiny_run), str(photos / "val"), str(tmp_path / name), "--batch-size", "3", *CPU]) == 0
        )
    held, table = read(tmp_path / "val.safetensors"), pq.read_table(tmp_path / "val.parquet")
    assert table["path"].to_pylist() == held["paths"]
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), held["embeddings"])
    assert pq.ParquetFile(tmp_path / "val.parquet").num_row_groups == 2
    assert b"fastmae" in table.schema.metadata


def test_class_token_another_block_half_precision_and_another_size(tiny_run, photos, tokens, tmp_path):
    out = tmp_path / "val.safetensors"
    args = ["features", str(tiny_run), str(photos / "val"), str(out), *CPU]
    assert run([*args, "--pool", "class", "--dtype", "fp16"]) == 0
    held = read(out)
    assert held["embeddings"].dtype == np.float16
    np.testing.assert_allclose(held["embeddings"], tokens[:, 0], atol=4e-3)
    assert run([*args, "--block", "0"]) == 0
    assert abs(read(out)["embeddings"] - tokens[:, 1:].mean(1)).max() > 0.1
    assert run([*args, "--dense", "--image-size", "96"]) == 0
    assert read(out)["dense"].shape == (10, 6, 6, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["val.safetensors"]


def test_lists_and_tars_give_the_same_as_the_folder(tiny_run, photos, files, tokens, tmp_path):
    listed = tmp_path / "some.txt"
    listed.write_text("\n".join(str(path) for path in files[:4]))
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for path in files[:4]:
            tar.add(path, str(path.relative_to(photos / "val")))
    for source in (listed, tmp_path / "some.tar"):
        out = tmp_path / f"{source.suffix[1:]}.safetensors"
        assert run(["features", str(tiny_run), str(source), str(out), *CPU]) == 0
        np.testing.assert_allclose(read(out)["embeddings"], tokens[:4, 1:].mean(1), atol=1e-4)


def test_what_can_not_be_decoded_is_skipped_and_named(tiny_run, photos, tokens, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(photos / "val", images)
    (images / "china" / "00 broken.jpg").write_bytes(b"<html>")
    (images / "zz.png").write_bytes((images / "china" / "07.png").read_bytes()[:500])
    args = ["features", str(tiny_run), str(images), str(tmp_path / "out.safetensors"), "--json", "--dense"]
    for workers in ("0", "1"):
        assert run([*args, "--batch-size", "1", "--workers", workers, "--device", "cpu"]) == 0
        captured = capsys.readouterr()
        found = json.loads(captured.out.splitlines()[-1])
        assert (found["images"], found["skipped"]) == (10, 2)
        assert [skipped["path"] for skipped in found["skipped_images"]] == ["china/00 broken.jpg", "zz.png"]
        assert "skipped china/00 broken.jpg: not an image" in captured.err
        held = read(tmp_path / "out.safetensors")
        assert len(held["paths"]) == 10
        np.testing.assert_allclose(held["embeddings"], tokens[:, 1:].mean(1), atol=1e-4)
        np.testing.assert_allclose(held["dense"].mean((1, 2)), tokens[:, 1:].mean(1), atol=1e-4)

    (tmp_path / "out.safetensors").unlink()
    assert run([*args, "--strict", *CPU]) == 2
    assert "china/00 broken.jpg: not an image, or its header is damaged; repair or remove it" in capsys.readouterr().err
    for path in (images / "china").iterdir():
        path.write_bytes(b"<html>")
    assert run(["features", str(tiny_run), str(images / "china"), str(tmp_path / "out.safetensors"), *CPU]) == 2
    assert "none of its 6 images can be decoded" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_names_that_are_not_utf_8(tiny_run, photos, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    name = os.fsdecode(b"caf\xe9 \n.jpg")
    shutil.copy(photos / "val" / "china" / "03.jpg", images / name)
    assert run(["features", str(tiny_run), str(images), str(tmp_path / "a.safetensors"), *CPU]) == 0
    assert run(["features", str(tiny_run), str(images), str(tmp_path / "a.parquet"), *CPU]) == 0
    assert read(tmp_path / "a.safetensors")["paths"] == [name]
    assert pq.read_table(tmp_path / "a.parquet")["path"].to_pylist() == ["caf\\xe9 \n.jpg"]


def test_an_export_and_a_bare_name_are_embedded_with_too(tiny_run, photos, tokens, vit_weights, tmp_path, capsys):
    assert run(["export", str(tiny_run), str(tmp_path / "exported")]) == 0
    out = tmp_path / "out.safetensors"
    assert run(["features", str(tmp_path / "exported"), str(photos / "val"), str(out), *CPU]) == 0
    np.testing.assert_allclose(read(out)["embeddings"], tokens[:, 1:].mean(1), atol=1e-4)
    named = ["features", "timm/vit_tiny_patch16_224", str(photos / "val"), str(out), "--image-size", "32", *CPU]
    capsys.readouterr()
    assert run([*named, "--weights", str(vit_weights), "--json"]) == 0
    assert result(capsys)["dim"] == 192
    first = read(out)["embeddings"]
    assert run([*named, "--no-pretrained", "--seed", "1"]) == 0
    assert abs(read(out)["embeddings"] - first).max() > 0.1


@pytest.mark.parametrize(
    ("args", "out", "says"),
    [
        ([], "out.csv", "give a file that ends in .safetensors or .parquet"),
        (["--dense"], "out.parquet", "give a .safetensors file"),
        (["--block", "2"], "out.parquet", "blocks 0 to 1"),
        (["--batch-size", "0"], "out.parquet", "--batch-size 0"),
        (["--image-size", "50"], "out.parquet", "not a multiple"),
        (["--dtype", "fp8"], "out.parquet", "fp8"),
    ],
)
def test_what_does_not_go_together_is_one_line(args, out, says, tiny_run, photos, tmp_path, capsys):
    assert run(["features", str(tiny_run), str(photos / "val"), str(tmp_path / out), *args, *CPU]) == 2
    err = capsys.readouterr().err
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_no_images_and_a_folder_as_the_file(tiny_run, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(["features", str(tiny_run), str(tmp_path / "empty"), str(tmp_path / "out.parquet"), *CPU]) == 2
    assert "no image in it" in capsys.readouterr().err
    (tmp_path / "dir.parquet").mkdir()
    assert run(["features", str(tiny_run), str(photos / "val"), str(tmp_path / "dir.parquet"), *CPU]) == 2
    assert "is a folder; give a file in it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_call_leaves_the_earlier_file(tiny_run, photos, tmp_path, fastmae_command):
    images, out = tmp_path / "images", tmp_path / "out.safetensors"
    images.mkdir()
    for number in range(3000):
        (images / f"{number}.jpg").symlink_to(photos / "val" / "china" / "03.jpg")
    assert run(["features", str(tiny_run), str(photos / "val"), str(out), *CPU]) == 0
    before = out.read_bytes()
    started = subprocess.Popen(
        [*fastmae_command, "features", str(tiny_run), str(images), str(out), *CPU, "--batch-size", "1"]
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.part")):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert out.read_bytes() == before
    assert len(list(tmp_path.glob("*.part"))) == 1
    assert run(["features", str(tiny_run), str(photos / "val"), str(out), *CPU]) == 0
    assert not list(tmp_path.glob("*.part"))
    assert out.read_bytes() == before


def test_a_file_grows_row_by_row_whatever_the_number_of_rows(tmp_path):
    for rows in (1, 9, 10, 101):  # lengths of the header's numbers
        vectors = np.random.default_rng(0).normal(size=(rows, 5)).astype(np.float32)
        grids = np.random.default_rng(1).normal(size=(rows, 2, 2, 5)).astype(np.float32)
        file = SafetensorsFeatures(tmp_path / "a", 1000, 5, 2, "fp32", {})
        for row in range(rows):
            file.add([f"{row}"], vectors[row : row + 1], grids[row : row + 1])
        file.close()
        held = read(tmp_path / "a")
        np.testing.assert_array_equal(held["embeddings"], vectors)
        np.testing.assert_array_equal(held["dense"], grids)
        assert held["paths"] == [str(row) for row in range(rows)]
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
