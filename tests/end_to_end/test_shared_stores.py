"""Stores and exports in object storage and on the hub, by the real clients of each protocol against a local server."""

import json
import shutil
from pathlib import Path

import pytest

import hub_stand_in
from fastmae.cli import run
from fastmae.runs.folder import read_metrics
from fastmae.tokens.format import shard_name
from fastmae.tokens.places import open_place
from hub_stand_in import Hub, Repository
from object_storage import object_storage


@pytest.fixture(scope="module")
def hub():
    """A hub that huggingface_hub in this process talks to, as the owner of what is at hf://me/."""
    hub = Hub()
    with pytest.MonkeyPatch.context() as monkeypatch:
        hub.use(monkeypatch)
        yield hub
    hub.close()


@pytest.fixture(scope="module")
def base(request, hub):
    """URL below which a store can lie: one of each protocol."""
    if request.param == "hf":
        yield "hf://datasets/me/photos"
        return
    with object_storage(request.param) as url:
        yield url


every_protocol = pytest.mark.parametrize("base", ["hf", "s3", "gs"], indirect=True)


def result_of(args, capsys):
    """Exit code, JSON and the last line of standard error of a command."""
    capsys.readouterr()
    code = run([*map(str, args), "--json"])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, json.loads(out.splitlines()[-1]) if out else {}, err


@every_protocol
def test_an_uploaded_store_trains_to_the_losses_of_the_local_one_and_passes_verify(
    base, small_store, tiny_student, tmp_path, capsys
):
    url = f"{base}/small.tokens"
    code, result, err = result_of(["upload", small_store, url], capsys)
    assert code == 0, err
    assert (result["url"], result["kept"]) == (url, 0)
    assert result_of(["upload", small_store, url], capsys)[1]["sent"] == 0
    code, result, err = result_of(["verify", url, "--workers", "0"], capsys)
    assert (code, result) == (0, {"ok": True, "damaged": []}), err
    losses = []
    for store in (small_store, url):
        folder = tmp_path / f"run{len(losses)}"
        options = [*tiny_student, "--epochs", "2", "--workers", "2", "--cache", str(tmp_path / "cache")]
        code, _, err = result_of(["pretrain", store, folder, *options], capsys)
        assert code == 0, err
        losses.append([entry["loss"] for entry in read_metrics(folder)])
    assert losses[0] == losses[1]


def test_a_folder_as_url_gets_nothing_twice(small_store, tmp_path, capsys):
    url = f"file://{tmp_path}/up"
    assert result_of(["upload", small_store, url], capsys)[1]["kept"] == 0
    assert result_of(["upload", small_store, url], capsys)[1]["sent"] == 0
    (tmp_path / "up" / "manifest.json").write_bytes(b" " * (small_store / "manifest.json").stat().st_size)
    assert result_of(["upload", small_store, url], capsys)[1]["sent"] == 1  # of the same size, with other bytes


@every_protocol
def test_what_is_missing_or_differs_is_sent_again_and_nothing_else(base, small_store, tmp_path, capsys):
    url = f"{base}/again.tokens"
    store = shutil.copytree(small_store, tmp_path / "s")
    assert result_of(["upload", store, url], capsys)[0] == 0
    shards = sorted((store / "shards").iterdir())
    # An earlier store's shard of the same name and size: another image's tokens.
    first, second = shards[0].read_bytes(), shards[1].read_bytes()
    other = (first + second)[: shards[2].stat().st_size]
    open_place(url).put({"shards/00002.safetensors": other, "index.parquet": second[:100]}, lambda _: None)
    code, result, err = result_of(["upload", store, url], capsys)
    assert (code, result["sent"]) == (0, 2), err
    assert result_of(["verify", url, "--workers", "0"], capsys)[0] == 0


def test_an_upload_that_broke_off_leaves_no_store_to_find_and_continues(hub, small_store, capsys, monkeypatch):
    monkeypatch.setattr("fastmae.tokens.transfer.RETRY_AFTER", ())
    monkeypatch.setattr("fastmae.tokens.places.COMMIT_FILES", 2)
    hub.objects.clear()
    hub.breaks_after = 3
    url = "hf://datasets/me/broken"
    code, _, err = result_of(["upload", small_store, url], capsys)
    assert code == 2
    assert "can't be sent" in err.splitlines()[-1]
    repository = hub.repositories["datasets/me/broken"]
    assert "manifest.json" not in repository.files
    assert result_of(["pretrain", url, "run", "--epochs", "1"], capsys)[0] == 2
    hub.breaks_after = None
    there = len(repository.files)
    code, result, err = result_of(["upload", small_store, url], capsys)
    assert code == 0, err
    assert result["kept"] == there >= 2
    assert repository.commits[-1] == ["manifest.json"]
    assert result_of(["verify", url, "--workers", "0"], capsys)[0] == 0


def test_tokenize_copies_the_finished_store_into_a_new_private_repository(hub, photos, vit_teacher, tmp_path, capsys):
    options = [*vit_teacher, *"--middle-size 96,128 --codec fp32 --workers 0 --shard-size 16".split()]
    args = ["tokenize", photos / "train", tmp_path / "s", *options, "--to", "hf://datasets/me/new/s.tokens"]
    code, _, err = result_of(args, capsys)
    assert code == 0, err
    repository = hub.repositories["datasets/me/new"]
    assert repository.private
    assert {"s.tokens/scales.json", "s.tokens/96/manifest.json", "README.md"} <= repository.files.keys()
    assert b"fastmae pretrain hf://datasets/me/new/s.tokens RUN" in repository.files["README.md"]
    assert result_of(args, capsys)[1]["copied_to"]["sent"] == 0
    assert result_of(["verify", "hf://datasets/me/new/s.tokens", "--workers", "0"], capsys)[0] == 0


def test_a_store_that_has_grown_replaces_its_earlier_state_and_another_store_is_refused(
    hub, photos, vit_teacher, small_store, tmp_path, capsys
):
    store, url = tmp_path / "s", "hf://datasets/me/grown"
    options = [*vit_teacher, *"--middle-size 96 --codec fp32 --workers 0 --shard-size 8".split()]
    assert result_of(["tokenize", photos / "val", store, *options, "--to", url], capsys)[0] == 0
    code, result, err = result_of(["tokenize", photos / "train", store, *options, "--add", "--to", url], capsys)
    assert code == 0, err
    assert result["copied_to"]["kept"] >= 3  # the first shards, and the list
    assert result_of(["verify", url, "--workers", "0"], capsys)[0] == 0
    code, _, err = result_of(["upload", small_store, url], capsys)
    assert code == 2
    assert f"{url}: holds another store (codec: fp32, not pq16" in err


def test_an_export_goes_to_a_repository_of_its_own_and_an_edited_card_stays(hub, tiny_run, tmp_path, capsys):
    args = ["export", tiny_run, tmp_path / "vit", "--to", "hf://me/vit"]
    code, result, err = result_of(args, capsys)
    assert code == 0, err
    repository = hub.repositories["models/me/vit"]
    assert repository.files.keys() == {path.name for path in (tmp_path / "vit").iterdir()}
    repository.files["README.md"] += b"licence: mine\n"
    code, result, err = result_of(args, capsys)
    assert (code, result["copied_to"]["sent"]) == (0, 0)
    assert "hf://me/vit/README.md: was edited, and stays as it is" in err
    assert repository.files["README.md"].endswith(b"licence: mine\n")
    other = ["export", tiny_run, tmp_path / "onnx", "--format", "onnx", "--to", "hf://me/vit"]
    code, _, err = result_of(other, capsys)
    assert code == 2
    assert "holds an export of the format timm, not onnx" in err


def test_a_store_and_an_export_do_not_share_a_folder(small_store, tiny_run, tmp_path, capsys):
    assert result_of(["export", tiny_run, tmp_path / "vit"], capsys)[0] == 0
    for first, second, what in (
        (tmp_path / "vit", small_store, "an exported model"),
        (small_store, tmp_path / "vit", "a token store"),
    ):
        url = f"file://{tmp_path}/behind/{first.name}"
        assert result_of(["upload", first, url], capsys)[0] == 0
        code, _, err = result_of(["upload", second, url], capsys)
        assert (code, err.splitlines()[-1]) == (2, f"fastmae upload: {url}: holds {what}; give another URL")


def test_damage_behind_a_url_is_found_and_named(hub, small_store, capsys, monkeypatch):
    monkeypatch.setattr("fastmae.tokens.transfer.RETRY_AFTER", ())
    url = "hf://datasets/me/damaged"
    assert result_of(["upload", small_store, url], capsys)[0] == 0
    files = hub.repositories["datasets/me/damaged"].files
    data = bytearray(files["shards/00001.safetensors"])
    data[-40] ^= 1
    files |= {"shards/00001.safetensors": bytes(data), "shards/00002.safetensors": b"short"}
    del files["shards/00003.safetensors"], files["statistics.safetensors"]
    code, result, err = result_of(["verify", url, "--workers", "0"], capsys)
    assert code == 1
    names = [entry["file"].removeprefix(f"{url}/") for entry in result["damaged"]]
    assert names == ["statistics.safetensors", *(shard_name(shard) for shard in (1, 2, 3))]
    assert "/tmp" not in err
    assert err.splitlines()[-1].endswith("repair the store where it was made and upload it again")


REFUSED = {
    "no such dataset": (["pretrain", "hf://datasets/me/none/s", "run"], "no such file; check the address"),
    "a private dataset": (
        ["pretrain", "hf://datasets/me/secret/s", "run"],
        "no such repository, or no permission; run",
    ),
    "no token": (["upload", "STORE", "hf://datasets/me/secret"], "no permission; run `hf auth login`, or set HF_TOKEN"),
    "somebody else's": (["upload", "STORE", "hf://datasets/you/new"], "no permission; run `hf auth login`, or set"),
    "no repository": (["upload", "STORE", "hf://datasets/me"], "give hf://datasets/OWNER/NAME for a store"),
    "no store": (["upload", "FOLDER", "hf://datasets/me/new2"], "is neither a token store nor an export"),
    "https": (["upload", "STORE", "https://example.org/x"], "can't be written to; give a URL of s3://, gs:// or hf://"),
    "no URL": (["upload", "STORE", "folder"], "is no URL; give one of s3://, gs:// or hf://"),
    "tokenize to a URL": (
        ["tokenize", "FOLDER", "s3://bucket/x.tokens"],
        "then copied: `fastmae tokenize FOLDER x.tokens --to s3://bucket/x.tokens`",
    ),
    "export to a URL": (["export", "RUN", "hf://me/vit"], "then copied: `fastmae export RUN vit --to hf://me/vit`"),
    "repair": (["verify", "s3://bucket/x", "--repair"], "`fastmae upload STORE s3://bucket/x` then sends what has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_done_is_one_line_with_a_way_out(case, hub, small_store, error_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FOLDER").mkdir()
    hub.repositories["datasets/me/secret"] = Repository(private=True)
    owner = "hf_" + "b" * 34 if case in ("a private dataset", "no token") else hub_stand_in.TOKEN
    monkeypatch.setenv("HF_TOKEN", owner)
    args, line = REFUSED[case]
    assert line in error_line([str(small_store) if word == "STORE" else word for word in args])
    assert not list(tmp_path.glob("*:*"))  # a URL is no folder to make


@every_protocol
def test_without_credentials_or_a_bucket_the_line_says_what_to_set(base, small_store, error_line, monkeypatch):
    if base.startswith("s3"):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        line = error_line(["upload", str(small_store), f"{base}/anonymous"])
        assert "no credentials were found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID" in line
        return
    if base.startswith("gs"):
        assert "no such bucket" in error_line(["upload", str(small_store), "gs://no-such-bucket/x"])
        return
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    assert "set HF_TOKEN" in error_line(["upload", str(small_store), "hf://datasets/me/nobody"])
