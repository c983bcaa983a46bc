"""What a store is made of and how it grows: other sources, later images, codecs, a disk that is too small."""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from fastmae import TokenStore
from fastmae.cli import run

TEACHER = ["--teacher", "timm/vit_tiny_patch16_224"]
SMALL = ["--middle-size", "96", "--shard-size", "8", "--workers", "0", "--codec", "fp32", "--pixels", "raw"]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def tokenize(vit_weights, capsys):
    def call(images, store, *more):
        code = run(
            [
                "tokenize",
                str(images),
                str(store),
                *TEACHER,
                "--teacher-weights",
                str(vit_weights),
                *SMALL,
                *more,
                "--json",
            ]
        )
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else {}, err

    return call


def keys_and_tokens(store):
    store = TokenStore(store)
    keys = [row["path"] for row in store.table().to_pylist() if row["row"] >= 0]
    return {key: store.view(index, 0, 0, store.grid).tokens for index, key in enumerate(keys)}


def test_a_list_and_tar_shards_hold_what_the_folder_holds(photos, vit_store, tokenize, tmp_path):
    folder = photos / "train"
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    (tmp_path / "list.csv").write_text("label,path\n" + "".join(f"x,{folder / path}\n" for path in reversed(paths)))
    (tmp_path / "tars").mkdir()
    for number, part in enumerate((paths[1::2], paths[::2])):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as tar:
            for path in part:
                tar.add(folder / path, path)
    assert tokenize(tmp_path / "list.csv", tmp_path / "l.tokens")[0] == 0
    assert tokenize(tmp_path / "tars", tmp_path / "t.tokens")[0] == 0
    from_folder = keys_and_tokens(vit_store)
    from_list = {
        str(Path(key).relative_to(folder)): tokens for key, tokens in keys_and_tokens(tmp_path / "l.tokens").items()
    }
    from_tars = {key.split(".tar/", 1)[1]: tokens for key, tokens in keys_and_tokens(tmp_path / "t.tokens").items()}
    assert from_folder.keys() == from_list.keys() == from_tars.keys()
    for key, tokens in from_folder.items():  # other images share their batches, so sums are rounded otherwise
        torch.testing.assert_close(from_list[key], tokens, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(from_tars[key], tokens, atol=1e-4, rtol=1e-4)


def test_add_brings_in_what_is_new_and_leaves_the_rest_as_it_was(photos, vit_store, tokenize, tmp_path):
    images, store = tmp_path / "images", tmp_path / "s.tokens"
    shutil.copytree(photos / "train", images)
    assert tokenize(images, store)[0] == 0
    assert {name: data for name, data in contents(store).items() if "shards" in name} == {
        name: data for name, data in contents(vit_store).items() if "shards" in name
    }
    first = contents(store)
    assert tokenize(images, store, "--add")[1]["images"] == 30  # nothing new
    assert contents(store) == first
    shutil.copytree(photos / "val" / "china", images / "aaa")
    (images / "aaa" / "broken.jpg").write_bytes(b"no")
    code, _, err = tokenize(images, store)
    assert code == 2
    assert "images: " in err
    code, summary, _ = tokenize(images, store, "--add")
    assert (code, summary["images"], summary["skipped"]) == (0, 35, 1)
    assert all(contents(store)[name] == data for name, data in first.items() if "shards" in name)
    assert set(keys_and_tokens(store)) == {
        str(p.relative_to(images)) for p in images.rglob("*.*") if "broken" not in p.name
    }
    code, summary, _ = tokenize(
        photos / "val", store, "--add"
    )  # from another folder; the same keys are the same images
    assert (code, summary["images"]) == (0, 45)
    finished = contents(store)
    for shard in (2, 4, 6):  # of each part
        (store / "shards" / f"{shard:05d}.safetensors").unlink()
    assert run(["verify", str(store), "--repair", "--workers", "0"]) == 0
    assert contents(store) == finished
    (store / "lists" / "1.list").unlink()
    assert run(["verify", str(store), "--repair", "--workers", "0"]) == 0
    assert contents(store) == finished


def test_an_add_that_was_interrupted_goes_on(photos, tokenize, tmp_path):
    images, store = tmp_path / "images", tmp_path / "s.tokens"
    shutil.copytree(photos / "train", images)
    assert tokenize(images, store)[0] == 0
    shutil.copytree(photos / "val", images / "more")
    assert tokenize(images, store, "--add")[0] == 0
    finished = contents(store)
    for name in ("manifest.json", "index.parquet", "shards/00005.safetensors"):  # as a kill leaves them
        (store / name).unlink()
    assert tokenize(images, store, "--add")[0] == 0
    assert contents(store) == finished
    (store / "shards/00000.safetensors").unlink()
    (store / "manifest.json").unlink()
    assert tokenize(images, store)[0] == 0  # also without --add
    assert contents(store) == finished


def test_adding_to_nothing_is_one_line(photos, tokenize, tmp_path):
    code, _, err = tokenize(photos / "train", tmp_path / "s", "--add")
    assert code == 2
    assert "no finished store to add to" in err


def test_a_dry_run_says_size_and_time_and_writes_nothing(photos, vit_store, tokenize, tmp_path):
    code, said, err = tokenize(photos / "train", tmp_path / "s", "--dry-run")
    assert code == 0
    assert not (tmp_path / "s").exists()
    real = sum(len(data) for data in contents(vit_store).values())
    assert said["bytes"] == pytest.approx(real, rel=0.1)
    assert said["images"] == 30
    assert said["seconds"] > 0
    assert "nothing was written" in err
    smaller = tokenize(photos / "train", tmp_path / "s", "--dry-run", "--codec", "pq16", "--pixels", "jpeg")[1]
    assert smaller["bytes_per_image"] < said["bytes_per_image"] / 4


@pytest.mark.parametrize("codec", ["int8", "pq16"])
def test_processes_that_share_a_store_share_its_codebooks(codec, photos, tokenize, tmp_path):
    assert tokenize(photos / "train", tmp_path / "one", "--codec", codec)[0] == 0
    for rank in (1, 0):
        assert (
            tokenize(photos / "train", tmp_path / "two", "--codec", codec, "--rank", str(rank), "--world-size", "2")[0]
            == 0
        )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_sizes_of_a_store_share_their_codebooks(photos, tokenize, tiny_student, tmp_path):
    store = tmp_path / "s"
    assert tokenize(photos / "train", store, "--codec", "pq16", "--middle-size", "64,96")[0] == 0
    books = [(store / size / "codebooks.safetensors").read_bytes() for size in ("64", "96")]
    assert books[0] == books[1]
    assert run(["verify", str(store)]) == 0
    assert run(["pretrain", str(store), str(tmp_path / "run"), *tiny_student, "--epochs", "1", "--workers", "0"]) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False).returncode
    ):
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_told_before_the_start(photos, tokenize, small_disk):
    code, _, err = tokenize(photos / "train", small_disk / "s")
    assert code == 2
    assert "30 images take about 0.00166 GB, and 0.001" in err
    assert "free some, or take another disk" in err
    assert not (small_disk / "s").exists()


def test_a_run_on_a_full_disk_is_one_line(vit_store, tiny_student, small_disk, capsys):
    assert (
        run(["pretrain", str(vit_store), str(small_disk / "run"), *tiny_student, "--epochs", "1", "--workers", "0"])
        == 2
    )
    err = capsys.readouterr().err
    assert "No space left on device" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(small_disk.rglob("*.part"))


def test_a_store_on_a_full_disk_is_finished_on_another(photos, vit_store, tokenize, small_disk, tmp_path):
    store = small_disk / "s"
    for shard in (0, 1):
        target = store / "shards" / f"{shard:05d}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(vit_store / "shards" / target.name, target)
    for name in ("store.json", "lists/0.list"):
        (store / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(vit_store / name, store / name)
    code, _, err = tokenize(photos / "train", store)
    assert code == 2
    assert "free" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(store.rglob("*.part"))
    shutil.copytree(store, tmp_path / "s")
    assert tokenize(photos / "train", tmp_path / "s")[0] == 0
    assert contents(tmp_path / "s") == contents(vit_store)


def flip(file, place=-9):
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["codebooks.safetensors", "lists/0.list", "index.parquet", "manifest.json"])
def test_add_does_not_build_on_damage(name, photos, small_store, tokenize, tmp_path):
    shutil.copytree(small_store, tmp_path / "s")
    flip(tmp_path / "s" / name)
    damaged = contents(tmp_path / "s")
    code, _, err = tokenize(photos / "val", tmp_path / "s", "--add", "--codec", "pq16", "--pixels", "jpeg")
    assert code == 2
    assert name in err
    assert contents(tmp_path / "s") == damaged


@pytest.mark.parametrize("name", ["codebooks.safetensors", "codebooks.copy.safetensors"])
def test_codebooks_are_not_mended_by_guessing(name, small_store, tmp_path, capsys):
    """Without the manifest nothing says which of the two is the damaged one."""
    shutil.copytree(small_store, tmp_path / "s")
    flip(tmp_path / "s" / name)
    (tmp_path / "s" / "manifest.json").unlink()
    assert run(["verify", str(tmp_path / "s"), "--repair"]) == 2
    assert "both damaged" in capsys.readouterr().err


def test_lost_codebooks_come_back_from_their_copy_and_are_never_learnt_anew_over_old_shards(
    photos, small_store, tokenize, tmp_path
):
    store = tmp_path / "s"
    shutil.copytree(small_store, store)
    for name in ("codebooks.safetensors", "shards/00003.safetensors"):
        (store / name).unlink()
    args = ["--codec", "pq16", "--pixels", "jpeg", "--codec-images", "8"]
    assert tokenize(photos / "train", store, *args)[0] == 0
    assert contents(store).keys() == contents(small_store).keys()
    assert contents(store)["codebooks.safetensors"] == contents(small_store)["codebooks.safetensors"]
    for name in ("codebooks.safetensors", "codebooks.copy.safetensors", "shards/00003.safetensors"):
        (store / name).unlink()
    code, _, err = tokenize(photos / "train", store, *args)
    assert code == 2
    assert "can't be read without" in err


def test_add_needs_nothing_of_the_images_that_are_in_already(photos, tokenize, tmp_path):
    images, store = tmp_path / "images", tmp_path / "s"
    shutil.copytree(photos / "train", images)
    assert tokenize(images, store)[0] == 0
    images.rename(tmp_path / "gone")
    code, summary, err = tokenize(photos / "val", store, "--add")
    assert (code, summary["images"]) == (0, 40), err
    assert "10 new images; 0 are in the store already" in err


def test_an_add_killed_before_it_was_written_down_goes_on(photos, tokenize, tmp_path):
    images, store = tmp_path / "images", tmp_path / "s"
    shutil.copytree(photos / "train", images)
    assert tokenize(images, store)[0] == 0
    shutil.copytree(photos / "val", images / "more")
    for name in (
        "manifest.json",
        "index.parquet",
    ):  # the last that a kill may leave: store.json does not know of the images yet
        (store / name).unlink()
    code, summary, _ = tokenize(images, store, "--add")
    assert (code, summary["images"]) == (0, 40)


def test_an_add_to_several_sizes_killed_between_two_goes_on(photos, tokenize, tmp_path):
    images, store, sizes = tmp_path / "images", tmp_path / "s", ["--middle-size", "64,96"]
    shutil.copytree(photos / "train", images)
    assert tokenize(images, store, *sizes)[0] == 0
    old = tmp_path / "old"
    shutil.copytree(store / "96", old)
    shutil.copytree(photos / "val", images / "more")
    assert tokenize(images, store, *sizes, "--add")[0] == 0
    finished = contents(store)
    shutil.rmtree(store / "96")
    shutil.copytree(old, store / "96")
    assert run(["verify", str(store)]) == 1
    assert tokenize(images, store, *sizes, "--add")[0] == 0
    assert contents(store) == finished


def test_a_list_damaged_while_the_store_is_unfinished_is_written_again(photos, vit_store, tokenize, tmp_path):
    store = tmp_path / "s"
    shutil.copytree(vit_store, store)
    for name in ("manifest.json", "index.parquet", "shards/00001.safetensors"):
        (store / name).unlink()
    flip(store / "lists" / "0.list")
    assert tokenize(photos / "train", store)[0] == 0
    assert contents(store) == contents(vit_store)


def test_an_archive_that_was_packed_anew_is_read_where_its_images_are_now(photos, tokenize, tmp_path):
    paths = sorted((photos / "train" / "china").iterdir())[:3]
    tars = tmp_path / "tars"
    tars.mkdir()

    def pack(in_order):
        with tarfile.open(tars / "a.tar", "w") as tar:
            for path in in_order:
                tar.add(path, path.name)

    pack(paths)
    assert tokenize(tars, tmp_path / "whole", "--shard-size", "1")[0] == 0
    assert tokenize(tars, tmp_path / "s", "--shard-size", "1")[0] == 0
    for name in ("manifest.json", "shards/00001.safetensors", "shards/00002.safetensors"):
        (tmp_path / "s" / name).unlink()
    pack(reversed(paths))
    assert tokenize(tars, tmp_path / "s", "--shard-size", "1")[0] == 0
    whole, resumed = keys_and_tokens(tmp_path / "whole"), keys_and_tokens(tmp_path / "s")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    flip(tmp_path / "whole" / "shards" / "00002.safetensors")
    assert run(["verify", str(tmp_path / "whole"), "--repair", "--workers", "0"]) == 0
    assert all(torch.equal(whole[key], tokens) for key, tokens in keys_and_tokens(tmp_path / "whole").items())


def test_the_list_of_sizes_is_verified_and_mended(photos, tokenize, tmp_path, capsys):
    store = tmp_path / "s"
    assert tokenize(photos / "val", store, "--middle-size", "64,96")[0] == 0
    finished = contents(store)
    for damage in (lambda file: flip(file, 14), lambda file: file.unlink()):
        damage(store / "scales.json")
        assert run(["verify", str(store)]) == 1
        assert "scales.json" in capsys.readouterr().err
        assert run(["verify", str(store), "--repair"]) == 0
        assert contents(store) == finished
    (store / "scales.json").write_text('{"sizes": []}')
    assert run(["inspect", str(store)]) == 2
    assert "lists no size" in capsys.readouterr().err


def test_a_repair_of_what_follows_from_the_shards_needs_no_images(photos, vit_store, tokenize, tmp_path):
    images, store = tmp_path / "images", tmp_path / "s"
    shutil.copytree(photos / "train", images)
    assert tokenize(images, store)[0] == 0
    finished = contents(store)
    shutil.rmtree(images)
    flip(store / "statistics.safetensors")
    assert run(["verify", str(store), "--repair"]) == 0
    assert contents(store) == finished


def test_names_that_are_not_utf8_and_a_single_image_are_stores_too(photos, vit_weights, fastmae_command, tmp_path):
    images, store = Path(str(tmp_path) + "/im\udce9ges"), tmp_path / "störe"
    images.mkdir()
    shutil.copyfile(photos / "train" / "china" / "00.jpg", images / "\udcff.jpg")

    def call(*args):
        done = subprocess.run(
            [*fastmae_command, *map(str, args), "--json"], capture_output=True, text=True, check=False
        )
        return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}, done.stderr

    tokenize = ["tokenize", images, store, *TEACHER, "--teacher-weights", vit_weights, *SMALL]
    code, said, err = call(*tokenize, "--dry-run")
    assert (code, said["images"]) == (0, 1), err
    assert said["images_per_second"] > 0
    assert call(*tokenize)[0] == 0
    flip(store / "shards" / "00000.safetensors")
    code, said, err = call("verify", store, "--repair", "--workers", "0")
    assert (code, said) == (0, {"ok": True, "damaged": []}), err
    tokenize[2] = str(tmp_path) + "/st\udcefre"
    code, _, err = call(*tokenize)
    assert code == 2
    assert "give one in UTF-8" in err


@pytest.mark.parametrize(
    ("wrong", "says"), [(["--codec", "pq999"], "more bytes than"), (["--workers", "-5"], "--workers -5")]
)
def test_a_call_that_is_refused_leaves_nothing_in_the_way_of_the_right_one(wrong, says, photos, tokenize, tmp_path):
    code, _, err = tokenize(photos / "val", tmp_path / "s", *wrong)
    assert code == 2
    assert says in err
    assert not (tmp_path / "s" / "store.json").exists()
    assert tokenize(photos / "val", tmp_path / "s")[0] == 0


def test_more_images_than_the_store_was_begun_with_are_told_of_add(photos, vit_store, tokenize, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(photos / "train", images)
    shutil.copytree(photos / "val", images / "more")
    shutil.copytree(vit_store, tmp_path / "s")
    code, _, err = tokenize(images, tmp_path / "s")
    assert code == 2
    assert "images: 30 (list " in err
    assert "--add to take new images in" in err


def test_a_repair_does_not_put_other_images_in_the_place_of_sound_records(photos, flip_in_record, tokenize, tmp_path):
    images, store = tmp_path / "images", tmp_path / "s"
    shutil.copytree(photos / "train", images)
    assert tokenize(images, store)[0] == 0
    flip_in_record(store, 1, 2)
    damaged = contents(store)
    keys = TokenStore(store).table()["path"].to_pylist()
    shutil.copyfile(images / keys[0], images / keys[12])
    assert run(["verify", str(store), "--repair", "--workers", "0"]) == 2
    assert contents(store) == damaged
    shutil.copyfile(photos / "train" / keys[12], images / keys[12])
    assert run(["verify", str(store), "--repair", "--workers", "0"]) == 0
    assert run(["verify", str(store)]) == 0


def test_an_unfinished_store_is_said_to_be_just_that(photos, vit_store, tmp_path, capsys):
    shutil.copytree(vit_store, tmp_path / "s")
    for name in (
        "manifest.json",
        "index.parquet",
        "statistics.safetensors",
        "shards/00001.safetensors",
        "shards/00002.safetensors",
    ):
        (tmp_path / "s" / name).unlink()
    assert run(["verify", str(tmp_path / "s"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert [damage["file"].rsplit("/", 1)[1] for damage in json.loads(out)["damaged"]] == ["manifest.json"]
    assert "not finished (2 of its 4 shards are there)" in err
    assert run(["verify", str(tmp_path / "s"), "--repair", "--workers", "0"]) == 0
    assert contents(tmp_path / "s") == contents(vit_store)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_commands_for_folders_say_so_of_a_url(command, capsys):
    assert run([command, "https://example.org/x.tokens"]) == 2
    assert "a URL" in capsys.readouterr().err
