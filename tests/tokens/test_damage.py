"""A damaged store: whatever was done to it, the reader refuses it or gives what was written."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmae import TokenStore
from fastmae.cli import run
from fastmae.errors import InputError
from fastmae.images.views import ViewDraws
from fastmae.tokens.format import checksum, shard_path
from fastmae.tokens.loader import StoreViews
from fastmae.tokens.manifest import read_header
from fastmae.tokens.shard import DamagedError

pytestmark = pytest.mark.promise("bytes")


@pytest.fixture
def copy(small_store, tmp_path):
    shutil.copytree(small_store, tmp_path / "copy.tokens")
    return tmp_path / "copy.tokens"


@pytest.fixture(scope="module")
def written(small_store):
    """What the undamaged store gives for each image, and its statistics."""
    return read_all(TokenStore(small_store))


def read_all(store):
    views = [store.view(index, 0, 0, store.grid) for index in range(len(store))]
    return [(view.pixels, view.tokens) for view in views], store.statistics


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def damaged(data, kind, offset, bit):
    offset %= max(1, len(data))
    if kind == "flip":
        return data[:offset] + bytes([data[offset] ^ (1 << bit)]) + data[offset + 1 :] if data else data
    if kind == "cut":
        return data[:offset]
    if kind == "zero":
        return data[:offset] + bytes(len(data[offset : offset + 64])) + data[offset + 64 :]
    if kind == "grow":
        return data[:offset] + b"\0" + data[offset:]
    return b""


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10**6),
    st.sampled_from(["flip", "flip", "flip", "cut", "zero", "grow", "empty", "delete", "swap"]),
    st.integers(0, 10**9),
    st.integers(0, 7),
)
def test_a_mutated_store_never_gives_wrong_tokens_silently(
    small_store, written, tmp_path_factory, number, kind, offset, bit
):
    folder = tmp_path_factory.mktemp("mutated") / "s"
    shutil.copytree(small_store, folder)
    names = files_of(folder)
    file = folder / names[number % len(names)]
    if kind == "delete":
        file.unlink()
    elif kind == "swap":  # with another file of the store
        other = folder / names[(number + 1 + offset % (len(names) - 1)) % len(names)]
        shutil.copyfile(other, file)
    else:
        file.write_bytes(damaged(file.read_bytes(), kind, offset, bit))
    try:
        views, statistics = read_all(TokenStore(folder))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        for (pixels, tokens), (written_pixels, written_tokens) in zip(views, written[0], strict=True):
            assert torch.equal(pixels, written_pixels)
            assert torch.equal(tokens, written_tokens)
        assert all(torch.equal(statistics[name], written[1][name]) for name in statistics)
    finally:
        shutil.rmtree(folder.parent)


def test_a_damaged_image_is_refused_by_name_or_replaced_by_the_next_one(copy, flip_in_record):
    store = TokenStore(copy)
    paths = store.table()["path"].to_pylist()
    flip_in_record(copy, 1, 3)  # image 11 of shards of 8
    draws = ViewDraws(4, True, "random", 4, seed=0)
    visits = [(0, index) for index in range(8, 14)]
    with pytest.raises(DamagedError, match=f"image {paths[11]}: .*00001.safetensors: .*image 3"):
        StoreViews([[TokenStore(copy)]], draws)[(0, 11)]
    skipping = StoreViews([[TokenStore(copy)]], draws, on_damage="skip")
    batch = skipping.__getitems__(visits)
    expected = StoreViews([[TokenStore(copy)]], draws).__getitems__([(0, i) for i in (8, 9, 10)])
    assert torch.equal(batch.tokens[0][:3], expected.tokens[0])
    assert skipping.damaged == {11}
    draw = draws.draw(0, 11, [6])
    assert torch.equal(batch.pixels[3], TokenStore(copy).view_pixels(12, draw.row, draw.col, 4, draw.flipped))


def test_pretrain_stops_at_a_damaged_image_or_skips_it_on_request(copy, flip_in_record, tiny_student, tmp_path, capfd):
    flip_in_record(copy, 0, 2)
    args = ["pretrain", str(copy), str(tmp_path / "run"), *tiny_student, "--epochs", "1", "--workers", "1"]
    assert run(args) == 2
    err = capfd.readouterr().err
    assert "00000.safetensors" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert run([*args, "--on-damage", "skip"]) == 0
    assert "skipped image" in capfd.readouterr().err


def test_a_run_that_stops_at_damage_saves_a_checkpoint(copy, flip_in_record, tiny_student, tmp_path):
    args = [
        "pretrain",
        str(copy),
        str(tmp_path / "run"),
        *tiny_student,
        "--epochs",
        "8",
        "--workers",
        "0",
        "--shuffle-window",
        "1",
    ]
    last_shard = int(np.random.default_rng((0, 0)).permutation(4)[-1])  # of the first epoch
    flip_in_record(copy, last_shard, 0)
    assert run(args) == 2
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 2


def test_only_the_records_that_were_read_are_checked(copy):
    store = TokenStore(copy)
    store.view(0, 0, 0, 4)
    checked = store.shards.read(0, lambda shard: shard.checked)
    assert checked[0].tolist() == [True, True, False]
    assert not checked[1:].any()


def edit(path, **changes):
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **changes}))


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def link(path, target):
    path.unlink()
    path.symlink_to(target)


def edit_part(path, **changes):
    value = json.loads(path.read_text())
    edit(path, parts=[{**value["parts"][0], **changes}])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: edit(s / "store.json", version=99), "format version 99"),
        (lambda s: edit(s / "store.json", format="other"), "not a token store"),
        (lambda s: edit(s / "store.json", middle_size="96"), r"Expected `int`, got `str` - at `\$.middle_size`"),
        (lambda s: edit(s / "store.json", patch_size=0), r"Expected `int` >= 1 - at `\$.patch_size`"),
        (lambda s: edit(s / "store.json", middle_size=90), "store.json: impossible sizes"),
        (lambda s: edit(s / "store.json", middle_size=1 << 40), "Expected `int` <= 16384"),
        (lambda s: edit(s / "store.json", token_dim=1 << 40), "Expected `int` <= 65536"),
        (lambda s: edit(s / "store.json", codec="pq1000"), "more bytes than a token has channels"),
        (lambda s: edit(s / "store.json", pixels="raw"), "raw pixels of 3 channels in JPEG quality 90"),
        (
            lambda s: edit(s / "store.json", teacher={"spec": "x"}),
            "store.json: teacher: .*missing required field `kind`",
        ),
        (
            lambda s: edit(s / "store.json", token_dim=96),
            "store.json: does not go with manifest.json .token_dim: 96, not 192",
        ),
        (lambda s: edit_part(s / "store.json", source="../../etc"), "source '../../etc' is not a whole path"),
        (lambda s: edit_part(s / "store.json", source="/data/../etc"), "is not a whole path"),
        (lambda s: edit_part(s / "store.json", source="/data"), "where the images lay"),
        (lambda s: edit_part(s / "store.json", images=31), "store.json: does not go with manifest.json"),
        (lambda s: edit_part(s / "store.json", images=1 << 40), "Expected `int` <= 2147483647"),
        (lambda s: edit(s / "store.json", parts=[]), r"Expected `array` of length >= 1 - at `\$.parts`"),
        (lambda s: edit(s / "store.json", parts=[3]), r"Expected `object`, got `int` - at `\$.parts\[0\]`"),
        (lambda s: (s / "store.json").write_text("{"), "store.json: not JSON"),
        (lambda s: (s / "store.json").write_text("[" * 100_000), "store.json: nested too deeply"),
        (lambda s: fifo(s / "store.json"), "store.json: is a named pipe"),
        (lambda s: fifo(s / "manifest.json"), "manifest.json: is a named pipe"),
        (lambda s: fifo(s / "index.parquet"), "index.parquet: is a named pipe"),
        (lambda s: fifo(s / "statistics.safetensors"), "statistics.safetensors: is a named pipe"),
        (lambda s: fifo(shard_path(s, 0)), "00000.safetensors: is a named pipe"),
        (lambda s: link(s / "manifest.json", "/dev/zero"), "manifest.json: is a device"),
        (lambda s: link(shard_path(s, 0), "/dev/zero"), "00000.safetensors: is a device"),
        (lambda s: (s / "store.json").unlink(), "no store.json"),
        (lambda s: (s / "manifest.json").unlink(), "not finished"),
        (lambda s: (s / "manifest.json").write_text("{}"), "manifest.json: damaged"),
        (lambda s: (s / "index.parquet").unlink(), "index.parquet: missing"),
        (lambda s: (s / "index.parquet").write_bytes(b"PAR1"), "index.parquet: damaged"),
        (lambda s: shard_path(s, 0).unlink(), "00000.safetensors: missing"),
        (
            lambda s: shard_path(s, 0).write_bytes(shard_path(s, 0).read_bytes()[:5000]),
            "00000.safetensors: has 5000 bytes, not",
        ),
        (lambda s: shutil.copy(shard_path(s, 1), shard_path(s, 0)), r"00000.safetensors: has \d+ bytes, not"),
        (
            lambda s: shard_path(s, 0).write_bytes(shard_path(s, 0).read_bytes().replace(b"F64", b"I64", 1)),
            "its header is damaged",
        ),
        (lambda s: (s / "statistics.safetensors").unlink(), "statistics.safetensors: missing"),
    ],
)
def test_a_damaged_store_is_refused_with_the_name_of_the_file(copy, damage, message):
    damage(copy)
    with pytest.raises(InputError, match=message) as caught:
        store = TokenStore(copy)
        assert store.statistics["mean"].shape == (192,)
        store.view(0, 0, 0, 4)
    assert "\n" not in str(caught.value)


def test_checksums_cover_every_byte_of_a_shard(small_store):
    """The tensors that the header lists leave no gaps, and each tensor has a checksum."""
    for shard in range(4):
        data, header = shard_path(small_store, shard).read_bytes(), read_header(shard_path(small_store, shard))
        entries = json.loads(header[8:])
        checksums = json.loads(entries.pop("__metadata__")["fastmae"])["checksums"]
        covered = np.zeros(len(data) - len(header), int)
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            covered[start:end] += 1
            assert checksum(data[len(header) :][start:end]) == checksums[name]
        assert (covered == 1).all()
