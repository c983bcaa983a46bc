"""Precision and codec of a store: recorded when it is begun, and kept by every later call."""

import shutil

import pytest

from fastmae import TokenStore
from fastmae.offline.codec_choice import MIN_COSINE
from fastmae.tokens.format import read_store_info, shard_path

BF16 = ["--precision", "bf16-mixed"]
AUTO = ["--codec", "auto"]


@pytest.fixture
def bf16_store(photos, tokenize, tmp_path):
    """A finished store of the validation photos by a teacher in bf16, in 2 shards."""
    assert tokenize(photos / "val", tmp_path / "bf16", *BF16)[0] == 0
    return tmp_path / "bf16"


@pytest.fixture(scope="module")
def auto_store(photos, vit_teacher, tmp_path_factory):
    """A store whose codec was chosen for it."""
    from fastmae.cli import run

    store = tmp_path_factory.mktemp("auto") / "s"
    options = [*"--middle-size 96 --shard-size 8 --workers 0 --pixels raw".split(), *AUTO]
    assert run(["tokenize", str(photos / "train"), str(store), *vit_teacher, *options]) == 0
    return store


def test_the_default_on_a_cpu_is_fp32_and_is_not_written_down(vit_store):
    assert "precision" not in read_store_info(vit_store).teacher
    assert '"precision"' not in (vit_store / "store.json").read_text()


def test_another_precision_gives_other_tokens_and_is_recorded(photos, bf16_store, tokenize, keys_and_tokens, tmp_path):
    assert tokenize(photos / "val", tmp_path / "fp32")[0] == 0
    assert read_store_info(bf16_store).teacher["precision"] == "bf16-mixed"
    exact, mixed = keys_and_tokens(tmp_path / "fp32"), keys_and_tokens(bf16_store)
    assert exact.keys() == mixed.keys()
    for key in exact:
        assert 0 < (exact[key] - mixed[key]).norm() < 0.05 * exact[key].norm()


@pytest.mark.parametrize("options", [[], BF16])
def test_a_continued_call_takes_the_recorded_precision(options, photos, bf16_store, tokenize, contents):
    finished = contents(bf16_store)
    shard_path(bf16_store, 1).unlink()
    assert tokenize(photos / "val", bf16_store, *options)[0] == 0
    assert contents(bf16_store) == finished


def test_a_repair_takes_the_recorded_precision(bf16_store, verify, contents):
    finished = contents(bf16_store)
    shard_path(bf16_store, 0).unlink()
    assert verify(bf16_store, "--repair")[0] == 0
    assert contents(bf16_store) == finished


def test_added_images_get_the_recorded_precision(photos, bf16_store, tokenize, keys_and_tokens, tmp_path):
    assert tokenize(photos / "train", bf16_store, "--add")[0] == 0
    assert tokenize(photos / "train", tmp_path / "alone", *BF16)[0] == 0
    together, alone = keys_and_tokens(bf16_store), keys_and_tokens(tmp_path / "alone")
    assert all((together[key] == alone[key]).all() for key in alone)


def test_processes_take_the_precision_with_which_the_first_began(photos, bf16_store, tokenize, contents, tmp_path):
    share = ["--world-size", "2", "--rank"]
    assert tokenize(photos / "val", tmp_path / "two", *BF16, *share, "0")[0] == 0
    assert tokenize(photos / "val", tmp_path / "two", *share, "1")[0] == 0
    assert contents(tmp_path / "two") == contents(bf16_store)


def test_a_precision_that_differs_from_the_recorded_one_is_refused(photos, bf16_store, vit_store, tokenize, contents):
    for store, images, option, named in (
        (bf16_store, "val", "32-true", "teacher precision: bf16-mixed, not 32-true"),
        (vit_store, "train", "bf16-mixed", "teacher precision: 32-true, not bf16-mixed"),
    ):
        before = contents(store)
        code, _, err = tokenize(photos / images, store, "--precision", option)
        assert (code, named in err) == (2, True)
        assert contents(store) == before


def test_tf32_is_refused_where_there_is_none(photos, tokenize, tmp_path):
    code, _, err = tokenize(photos / "val", tmp_path / "s", "--precision", "tf32", "--device", "cpu")
    assert (code, "--precision tf32" in err) == (2, True)


def test_the_chosen_codec_is_recorded_and_said_with_its_cosine(photos, tokenize, tmp_path):
    code, _, err = tokenize(photos / "train", tmp_path / "s", *AUTO)
    assert code == 0
    codec = read_store_info(tmp_path / "s").codec
    line = next(line for line in err.splitlines() if line.startswith("--codec auto: "))
    found = dict(pair.split() for pair in line.rsplit(": ", 1)[1].split(", "))
    assert line.startswith(f"--codec auto: {codec};")
    assert float(found[codec]) >= MIN_COSINE - 5e-4


def test_the_store_has_the_bytes_of_one_whose_codec_was_named(photos, auto_store, tokenize, contents, tmp_path):
    codec = read_store_info(auto_store).codec
    assert tokenize(photos / "train", tmp_path / "named", "--codec", codec)[0] == 0
    assert contents(tmp_path / "named") == contents(auto_store)


def test_continued_calls_processes_and_added_images_take_the_chosen_codec(
    photos, auto_store, tokenize, contents, tmp_path
):
    finished, store = contents(auto_store), tmp_path / "s"
    shutil.copytree(auto_store, store)
    for name in ("shards/00001.safetensors", "codebooks.safetensors"):
        (store / name).unlink(missing_ok=True)
    assert tokenize(photos / "train", store, *AUTO)[0] == 0
    assert contents(store) == finished
    for rank in ("1", "0"):
        share = ["--rank", rank, "--world-size", "2"]
        assert tokenize(photos / "train", tmp_path / "two", *AUTO, *share)[0] == 0
    assert contents(tmp_path / "two") == finished
    assert tokenize(photos / "val", store, *AUTO, "--add")[0] == 0
    assert read_store_info(store).codec == read_store_info(auto_store).codec
    assert len(TokenStore(store)) == 40


def test_all_middle_sizes_get_one_codec(photos, tokenize, tmp_path):
    assert tokenize(photos / "val", tmp_path / "s", *AUTO, "--middle-size", "64,96")[0] == 0
    codecs = {read_store_info(tmp_path / "s" / size).codec for size in ("64", "96")}
    assert len(codecs) == 1
    books = [(tmp_path / "s" / size / "codebooks.safetensors") for size in ("64", "96")]
    assert books[0].read_bytes() == books[1].read_bytes()


def test_without_faiss_a_larger_codec_is_taken_and_the_way_out_named(photos, tokenize, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = tokenize(photos / "val", tmp_path / "s", *AUTO)
    assert code == 0
    assert read_store_info(tmp_path / "s").codec == "int8"
    assert "pip install 'fastmae[pq]'" in err


def test_a_single_image_gets_fp16(photos, tokenize, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copyfile(photos / "train" / "china" / "00.jpg", tmp_path / "images" / "00.jpg")
    assert tokenize(tmp_path / "images", tmp_path / "s", *AUTO)[0] == 0
    assert read_store_info(tmp_path / "s").codec == "fp16"


def test_a_dry_run_names_the_codec_and_the_precision(photos, tokenize, tmp_path):
    code, estimate, err = tokenize(photos / "val", tmp_path / "s", *AUTO, "--dry-run")
    assert code == 0
    assert f"({estimate['codec']} tokens" in err
    assert estimate["precision"] == "32-true"
    assert not (tmp_path / "s").exists()
