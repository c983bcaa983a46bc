"""A store that is not what was written: the reader says so or gives what was written, whatever was done to it."""

import json
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


@pytest.fixture
def copy(small_store, tmp_path):
    shutil.copytree(small_store, tmp_path / "copy.tokens")
    return tmp_path / "copy.tokens"


@pytest.fixture(scope="module")
def written(small_store):
    """What the sound store gives for each image."""
    return read_all(TokenStore(small_store))


def read_all(store):
    views = [store.view(index, 0, 0, store.grid) for index in range(len(store))]
    return [(view.pixels, view.tokens) for view in views], store.statistics


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def damaged(data, kind, place, bit):
    place %= max(1, len(data))
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :] if data else data
    if kind == "cut":
        return data[:place]
    if kind == "zero":
        return data[:place] + bytes(len(data[place : place + 64])) + data[place + 64 :]
    if kind == "grow":
        return data[:place] + b"\0" + data[place:]
    return b""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10**6),
    st.sampled_from(["flip", "flip", "flip", "cut", "zero", "grow", "empty", "delete", "swap"]),
    st.integers(0, 10**9),
    st.integers(0, 7),
)
def test_a_mutated_store_never_gives_wrong_tokens_in_silence(
    small_store, written, tmp_path_factory, which, kind, place, bit
):
    folder = tmp_path_factory.mktemp("mutated") / "s"
    shutil.copytree(small_store, folder)
    names = files_of(folder)
    file = folder / names[which % len(names)]
    if kind == "delete":
        file.unlink()
    elif kind == "swap":  # with another file of the store
        other = folder / names[(which + 1 + place % (len(names) - 1)) % len(names)]
        shutil.copyfile(other, file)
    else:
        file.write_bytes(damaged(file.read_bytes(), kind, place, bit))
    try:
        views, statistics = read_all(TokenStore(folder))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        for (pixels, tokens), (right_pixels, right_tokens) in zip(views, written[0], strict=True):
            assert torch.equal(pixels, right_pixels)
            assert torch.equal(tokens, right_tokens)
        assert all(torch.equal(statistics[name], written[1][name]) for name in statistics)
    finally:
        shutil.rmtree(folder.parent)


def test_a_damaged_record_stops_training_with_its_name_or_is_skipped(copy, flip_in_record):
    store = TokenStore(copy)
    paths = store.table()["path"].to_pylist()
    flip_in_record(copy, 1, 3)  # image 11 of shards of 8
    draws = ViewDraws(4, True, "random", 4, seed=0)
    visits = [(0, index) for index in range(8, 14)]
    with pytest.raises(
        DamagedError, match=f"image {paths[11]}: .*00001.safetensors: the tokens of its image 3 are damaged"
    ):
        StoreViews([[TokenStore(copy)]], draws)[(0, 11)]
    without = StoreViews([[TokenStore(copy)]], draws, on_damage="skip")
    batch = without.__getitems__(visits)
    expected = StoreViews([[TokenStore(copy)]], draws).__getitems__([(0, i) for i in (8, 9, 10)])
    assert torch.equal(batch.tokens[0][:3], expected.tokens[0])
    assert without.damaged == {11}
    stand_in = TokenStore(copy)
    draw = draws.draw(0, 11, [6])
    assert torch.equal(batch.pixels[3], stand_in.view_pixels(12, draw.row, draw.col, 4, draw.flipped))


def test_pretrain_stops_at_damage_by_default_and_goes_on_without_the_image_on_request(
    copy, flip_in_record, tiny_student, tmp_path, capfd
):
    flip_in_record(copy, 0, 2)
    args = ["pretrain", str(copy), str(tmp_path / "run"), *tiny_student, "--epochs", "1", "--workers", "1"]
    assert run(args) == 2
    err = capfd.readouterr().err
    assert "the tokens of its image 2 are damaged" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert run([*args, "--on-damage", "skip"]) == 0
    assert "skipped image" in capfd.readouterr().err


def test_a_run_that_meets_damage_saves_what_it_has_trained(copy, flip_in_record, tiny_student, tmp_path):
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
    flip_in_record(
        copy, int(np.random.default_rng((0, 0)).permutation(4)[-1]), 0
    )  # of the last shard of the first epoch
    assert run(args) == 2
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 2


def test_a_record_is_checked_once_in_a_process(copy):
    store = TokenStore(copy)
    store.view(0, 0, 0, 4)
    shard = store._shards[0]
    assert shard.checked[0].tolist() == [True, True, False]
    assert not shard.checked[1:].any()


def edit(path, **changes):
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **changes}))


def edit_part(path, **changes):
    value = json.loads(path.read_text())
    edit(path, parts=[{**value["parts"][0], **changes}])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda s: edit(s / "store.json", version=99), "format version 99"),
        (lambda s: edit(s / "store.json", format="other"), "not a token store"),
        (lambda s: edit(s / "store.json", middle_size="96"), "'middle_size' is missing or not of type int"),
        (lambda s: edit(s / "store.json", patch_size=0), "sizes that can't be"),
        (
            lambda s: edit(s / "store.json", token_dim=96),
            "store.json: was changed after the store was finished .token_dim: 96, not 192",
        ),
        (lambda s: edit_part(s / "store.json", source="../../etc"), "source '../../etc' is not a whole path"),
        (lambda s: edit_part(s / "store.json", source="/data/../etc"), "is not a whole path"),
        (lambda s: edit_part(s / "store.json", source="/data"), "where the images lay"),
        (lambda s: edit_part(s / "store.json", images=31), "store.json: was changed"),
        (lambda s: edit(s / "store.json", parts=[]), "sizes that can't be"),
        (lambda s: edit(s / "store.json", parts=[3]), "'images' is missing"),
        (lambda s: (s / "store.json").write_text("{"), "can't be read"),
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
def test_a_damaged_store_is_one_clear_line(copy, damage, says):
    damage(copy)
    with pytest.raises(InputError, match=says) as caught:
        store = TokenStore(copy)
        assert store.statistics["mean"].shape == (192,)
        store.view(0, 0, 0, 4)
    assert "\n" not in str(caught.value)


def test_checksums_cover_every_byte_of_a_shard(small_store):
    """No gaps: the header names every byte after it, and each tensor has a checksum."""
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
