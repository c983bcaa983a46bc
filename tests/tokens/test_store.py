"""The invariant that carries the method: a view's tokens are the teacher's features of the view's own pixels."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastmae import TokenStore
from fastmae.cli import run
from fastmae.errors import InputError
from fastmae.images.middle import make_middle_image
from fastmae.images.views import ViewDraws
from fastmae.runtime.workers import as_is
from fastmae.teachers import load_teacher
from fastmae.tokens.format import checksum, shard_path
from fastmae.tokens.loader import StoreViews
from fastmae.tokens.reader import open_scales, pooled_statistics


@pytest.fixture
def copy(vit_store, tmp_path):
    shutil.copytree(vit_store, tmp_path / "copy.tokens")
    return tmp_path / "copy.tokens"


def test_view_tokens_and_pixels_equal_the_teachers_sub_grid_at_every_offset(vit_store, photos, vit_weights):
    store = TokenStore(vit_store)
    teacher = load_teacher("timm/vit_tiny_patch16_224", 96, 6, vit_weights)
    paths = store.table()["path"].to_pylist()
    assert len(store) == len(paths) == 30
    for index in (0, 13, 29):
        with (photos / "train" / paths[index]).open("rb") as file:
            middle = make_middle_image(file, paths[index], 96, "whole", None).pixels
        features = teacher(middle[None])[0]
        for size in (1, 4, 6):
            for row in range(6 - size + 1):
                for col in range(6 - size + 1):
                    view = store.view(index, row, col, size)
                    # The teacher ran on a batch here and on one image there: equal up to fp32 rounding of its sums.
                    torch.testing.assert_close(
                        view.tokens, features[row : row + size, col : col + size], atol=1e-4, rtol=1e-4
                    )
                    assert torch.equal(
                        view.tokens, store.view(index, 0, 0, 6).tokens[row : row + size, col : col + size]
                    )
                    assert torch.equal(
                        view.pixels, middle[:, 16 * row : 16 * (row + size), 16 * col : 16 * (col + size)]
                    )


def test_a_jpeg_store_holds_the_teachers_features_of_the_decoded_jpegs(photos, vit_weights, tmp_path):
    args = [
        "--teacher",
        "timm/vit_tiny_patch16_224",
        "--teacher-weights",
        str(vit_weights),
        "--middle-size",
        "96",
        "--workers",
        "0",
    ]
    assert run(["tokenize", str(photos / "val"), str(tmp_path / "s"), *args]) == 0
    store = TokenStore(tmp_path / "s")
    teacher = load_teacher("timm/vit_tiny_patch16_224", 96, 6, vit_weights)
    for index in range(len(store)):
        view = store.view(index, 1, 2, 4)
        assert store.code_dtype == np.float16
        whole = store.pixels(index)
        assert torch.equal(view.pixels, whole[:, 16:80, 32:96])
        torch.testing.assert_close(view.tokens.float(), teacher(whole[None])[0, 1:5, 2:6], atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(
    "view", [(-1, 0, 0, 4), (30, 0, 0, 4), (0, 3, 0, 4), (0, 0, -1, 4), (0, 0, 0, 7), (0, 0, 0, 0)]
)
def test_a_view_outside_the_store_or_the_image_is_an_index_error(vit_store, view):
    with pytest.raises(IndexError):
        TokenStore(vit_store).view(*view)


def test_loader_workers_give_the_same_batches_as_none(vit_store):
    views = StoreViews([[TokenStore(vit_store)]], ViewDraws(4, True, "random", 4, seed=3), with_middle=True)
    views[(0, 0)]  # this process has mapped a shard; a worker must map its own
    visits = [[(epoch, index) for index in range(12)] for epoch in range(3)]
    batches = [list(DataLoader(views, batch_sampler=visits, num_workers=n, collate_fn=as_is)) for n in (0, 2)]
    for here, worker in zip(*batches, strict=True):
        assert torch.equal(here.pixels, worker.pixels)
        assert torch.equal(here.tokens[0], worker.tokens[0])
        assert torch.equal(here.middle, worker.middle)
        assert torch.equal(here.ids_shuffle, worker.ids_shuffle)
    assert here.tokens[0].shape == (12, 16, 192)
    assert here.middle.shape == (12, 3, 96, 96)


def test_a_flipped_view_has_mirrored_pixels_and_tokens(vit_store):
    store = TokenStore(vit_store)
    draws = ViewDraws(4, True, "random", 4, seed=0)
    views = StoreViews([[store]], draws)
    seen = set()
    for index in range(12):
        draw = draws.draw(0, index, [6])
        view, batch = store.view(index, draw.row, draw.col, 4), views[(0, index)]
        mirror = (lambda x, dim: x.flip(dim)) if draw.flipped else (lambda x, dim: x)
        assert torch.equal(batch.pixels[0], mirror(view.pixels, 2))
        assert torch.equal(batch.tokens[0][0], mirror(view.tokens, 1).reshape(16, -1))
        assert batch.crop.tolist() == [[draw.row, draw.col, int(draw.flipped)]]
        seen.add(draw.flipped)
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["vit_store", "small_store"])  # raw pixels and JPEG
def test_a_views_pixels_are_those_of_the_middle_image_in_either_memory_layout(request, name):
    store = TokenStore(request.getfixturevalue(name))
    whole = store.pixels(3)
    for row, col, size in ((0, 0, 4), (1, 2, 4), (2, 0, 3), (5, 5, 1), (0, 0, 6)):
        expected = whole[:, 16 * row : 16 * (row + size), 16 * col : 16 * (col + size)]
        for flipped in (False, True):
            pixels = store.view_pixels(3, row, col, size, flipped)
            assert torch.equal(pixels, expected.flip(-1) if flipped else expected)
            assert pixels.is_contiguous()
            if store.info.pixels == "jpeg":
                channels_last = np.zeros((16 * size, 16 * size, 3), np.uint8).transpose(2, 0, 1)
                store.read_pixels(3, row, col, size, flipped, channels_last)
                assert np.array_equal(channels_last, pixels)


@pytest.fixture(scope="module")
def two_sizes(photos, vit_weights, tmp_path_factory):
    """A store with middle images of 64 and 96 px and stored flips."""
    store = tmp_path_factory.mktemp("stores") / "two.tokens"
    args = [
        "--teacher",
        "timm/vit_tiny_patch16_224",
        "--teacher-weights",
        str(vit_weights),
        "--workers",
        "0",
        "--codec",
        "fp32",
    ]
    more = ["--middle-size", "96,64", "--flips", "stored", "--pixels", "raw", "--shard-size", "16"]
    assert run(["tokenize", str(photos / "train"), str(store), *args, *more]) == 0
    return store


def test_stored_flips_are_the_teachers_features_of_the_mirrored_image(two_sizes, vit_weights):
    store = open_scales(two_sizes)[1]
    teacher = load_teacher("timm/vit_tiny_patch16_224", 96, 6, vit_weights)
    mirrored = store.pixels(5).flip(-1)
    expected = teacher(mirrored[None])[0]
    for row, col in ((0, 0), (1, 2), (2, 1)):
        tokens = store.view_tokens(5, row, col, 4, flipped=True)
        left = 6 - col - 4  # where the view begins in the mirrored image
        torch.testing.assert_close(tokens, expected[row : row + 4, left : left + 4], atol=1e-5, rtol=1e-5)
        pixels = store.view_pixels(5, row, col, 4).flip(-1)
        assert torch.equal(pixels, mirrored[:, 16 * row : 16 * row + 64, 16 * left : 16 * left + 64])
    assert not torch.allclose(
        store.view_tokens(5, 0, 0, 6).flip(1), store.view_tokens(5, 0, 0, 6, flipped=True), atol=1e-3
    )


def test_views_of_several_sizes_are_aligned_at_each(two_sizes):
    scales = open_scales(two_sizes)
    assert [store.info.middle_size for store in scales] == [64, 96]
    draws = ViewDraws(3, False, "random", 2, seed=0)
    views = StoreViews([scales], draws)
    seen = set()
    for index in range(12):
        draw = draws.draw(0, index, [4, 6])
        view = scales[draw.scale].view(index, draw.row, draw.col, 3)
        batch = views[(0, index)]
        assert torch.equal(batch.pixels[0], view.pixels)
        assert torch.equal(batch.tokens[0][0], view.tokens.flatten(0, 1))
        seen.add(draw.scale)
    assert seen == {0, 1}


def test_pooled_statistics_are_those_of_the_tokens_of_all_sizes(two_sizes):
    scales = open_scales(two_sizes)
    tokens = torch.cat([s.view(i, 0, 0, s.grid).tokens.flatten(0, 1) for s in scales for i in range(len(s))]).double()
    pooled = pooled_statistics(scales)
    torch.testing.assert_close(pooled["mean"], tokens.mean(0).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled["std"], tokens.std(0, correction=0).float(), atol=1e-5, rtol=1e-4)


def test_a_folder_of_several_sizes_that_is_damaged_or_other_is_one_line(two_sizes, photos, tmp_path, capsys):
    assert run(["inspect", str(two_sizes), "--json"]) == 0
    held = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (held["grid"], held["middle_size"], held["flips"], held["shards"]) == ([4, 6], [64, 96], "stored", 4)
    assert (
        run(
            [
                "tokenize",
                str(photos / "train"),
                str(two_sizes),
                "--middle-size",
                "64,128",
                "--teacher",
                "efficientnet-lite0",
            ]
        )
        == 2
    )
    assert "was begun with --middle-size 64,96" in capsys.readouterr().err
    assert run(["tokenize", str(photos / "train"), str(tmp_path / "s"), "--middle-size", "64,x"]) == 2
    assert "--middle-size x: give a whole number" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(two_sizes, copy)
    (copy / "scales.json").write_text("{}")
    with pytest.raises(InputError, match="missing required field"):
        open_scales(copy)


def test_statistics_are_the_mean_and_std_of_each_channel_over_the_store(vit_store):
    store = TokenStore(vit_store)
    tokens = torch.cat([store.view(i, 0, 0, 6).tokens.flatten(0, 1) for i in range(len(store))]).double()
    torch.testing.assert_close(store.statistics["mean"], tokens.mean(0).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(store.statistics["std"], tokens.std(0, correction=0).float(), atol=1e-5, rtol=1e-4)


def test_a_shard_lists_the_checksum_of_each_of_its_tensors(vit_store):
    import safetensors

    from fastmae.tokens.shard_header import ShardHeader

    path = shard_path(vit_store, 1)
    with safetensors.safe_open(path, framework="numpy") as file:
        header = ShardHeader.from_metadata(file.metadata(), path)
        assert set(header.checksums) == set(file.keys())
        for name in file.keys():  # noqa: SIM118 - safe_open has keys() but can't be iterated
            assert header.checksums[name] == checksum(file.get_tensor(name).tobytes())


def test_two_stores_hold_the_same_images_if_they_were_made_from_one_list_and_skipped_the_same(
    photos, vit_teacher, tmp_path
):
    images = tmp_path / "images"
    shutil.copytree(photos / "val", images)
    stores = [tmp_path / name for name in ("first", "second", "third")]
    options = [*vit_teacher, "--middle-size", "32", "--workers", "0"]
    for store in stores[:2]:
        assert run(["tokenize", str(images), str(store), *options]) == 0
    min(images.rglob("*.*g")).write_bytes(b"<html>")
    assert run(["tokenize", str(images), str(stores[2]), *options]) == 0
    first, second, third = map(TokenStore, stores)
    assert first.info.images_sha256 == third.info.images_sha256
    assert first.holds_the_images_of(second)
    assert not first.holds_the_images_of(third)
