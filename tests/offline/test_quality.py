"""What looks wrong in a store is said at the end of `tokenize`, and is the same after a kill."""

import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fastmae import TokenStore
from fastmae.cli import run
from fastmae.offline import quality as module
from fastmae.offline.quality import look_at

pytestmark = pytest.mark.promise("values")

FOUND = {
    "looked_at": 10,
    "compared": 10,
    "one_colour": {"images": 2, "example": "grey.png"},
    "few_levels": {"images": 3, "example": "12-bit-0.png"},
    "near_duplicates": {"images": 1, "example": "photo0.png"},
}


@pytest.fixture(scope="module")
def odd_images(photos, tmp_path_factory):
    """Four photos, one of them twice; two pictures of one colour; three of 12 bits in 16."""
    folder = tmp_path_factory.mktemp("odd")
    paths = sorted((photos / "train" / "flower").rglob("*.png"))
    for number, path in enumerate(paths[:4]):
        shutil.copy(path, folder / f"photo{number}.png")
    Image.open(paths[0]).resize((150, 150)).save(folder / "photo-copy.jpg", quality=60)
    Image.new("RGB", (40, 30), (90, 90, 90)).save(folder / "grey.png")
    Image.fromarray(np.full((30, 30), 200, np.uint16)).save(folder / "zeros.tif")
    for number, path in enumerate(paths[:3]):
        values = np.asarray(Image.open(path).convert("L").transpose(Image.Transpose.ROTATE_90)).astype(np.uint16)
        Image.fromarray(values * 16).save(folder / f"12-bit-{number}.png")
    return folder


@pytest.fixture
def odd_store(odd_images, tokenize, tmp_path):
    """(the store's folder, the command's JSON, its standard error)"""
    code, result, err = tokenize(odd_images, tmp_path / "odd", "--shard-size", "4", "--pixels", "jpeg")
    assert code == 0
    return tmp_path / "odd", result, err


def test_the_kinds_of_suspicious_images_are_counted_with_an_example_and_a_way_out(odd_store):
    _, result, err = odd_store
    quality = result["quality"]
    assert quality.pop("token_spread") > 0.3
    assert quality == FOUND
    lines = err.splitlines()
    assert lines[-3:] == [
        "one colour: 2 of 10 images looked at (grey.png); 16-bit, integer or float values need --value-range, others "
        "are best removed",
        "few of their 256 levels: 3 of 10 images looked at (12-bit-0.png); 16-bit, integer or float values need "
        "--value-range",
        "nearly the same as an earlier image: 1 of the first 10 (photo0.png as photo-copy.jpg); each weighs as much "
        "as any other, so thin them out",
    ]


def test_a_store_that_was_killed_and_continued_tells_the_same(odd_images, odd_store, tokenize):
    store, result, err = odd_store
    for name in ("shards/00001.safetensors", "manifest.json", "index.parquet"):
        (store / name).unlink()
    _, continued, err_again = tokenize(odd_images, store, "--shard-size", "4", "--pixels", "jpeg")
    assert continued["quality"] == result["quality"]
    assert err_again.splitlines()[-3:] == err.splitlines()[-3:]
    _, finished, _ = tokenize(odd_images, store, "--shard-size", "4", "--pixels", "jpeg")
    assert finished["quality"] == result["quality"]


def test_a_value_range_takes_the_12_bit_images_off_the_list(odd_images, tokenize, tmp_path):
    _, result, err = tokenize(odd_images, tmp_path / "s", "--value-range", "0", "4095")
    assert result["quality"]["few_levels"] == {"images": 0, "example": None}
    assert "values need another --value-range" in err  # the line of the one-coloured images


def test_ordinary_photos_raise_no_line(vit_store):
    quality = look_at(TokenStore(vit_store))
    assert (quality.looked_at, quality.one_colour, quality.few_levels, quality.duplicates) == (30, [], [], [])
    assert quality.token_spread > 0.3
    assert module.as_lines(quality, TokenStore(vit_store)) == []


def test_of_a_large_store_a_part_is_looked_at(vit_store, monkeypatch):
    monkeypatch.setattr(module, "FIRST", 5)
    monkeypatch.setattr(module, "SPREAD", 4)
    quality = look_at(TokenStore(vit_store))
    assert (quality.looked_at, quality.first) == (8, 5)  # 0 to 4; and 0, 10, 19, 29


def test_a_teacher_whose_tokens_do_not_differ_is_told_with_its_file(photos, tmp_path, capsys):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    zeros["norm.bias"] = torch.ones_like(zeros["norm.bias"])
    save_file(zeros, tmp_path / "wrong.safetensors")
    teacher = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", str(tmp_path / "wrong.safetensors")]
    options = "--middle-size 32 --workers 0 --pixels raw".split()
    assert run(["tokenize", str(photos / "val"), str(tmp_path / "s"), *teacher, *options]) == 0
    lines = capsys.readouterr().err.splitlines()
    problem = "the tokens of different images hardly differ (by 0 % of their length)"
    assert f"{problem}; give another teacher than {tmp_path}/wrong.safetensors, or another --teacher-block" in lines


def test_a_store_of_one_image_has_no_spread_of_tokens(photos, tokenize, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(next((photos / "train").rglob("*.png")), tmp_path / "one")
    code, result, _ = tokenize(tmp_path / "one", tmp_path / "s")
    assert (code, result["quality"]["token_spread"]) == (0, None)
