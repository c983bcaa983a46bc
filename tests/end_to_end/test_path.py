"""Images -> store -> pre-trained ViT -> kNN, by the commands, on real photos."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import fastmae
from fastmae.cli import run
from fastmae.runs.folder import read_metrics
from fastmae.teachers import load_teacher


def result(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def cnn_store(photos, tmp_path_factory):
    store = tmp_path_factory.mktemp("stores") / "cnn.tokens"
    args = ["--teacher", "efficientnet-lite0", "--middle-size", "96", "--workers", "1"]
    assert run(["tokenize", str(photos / "train"), str(store), *args]) == 0
    return store


def test_the_whole_path_with_a_cnn_teacher(cnn_store, photos, tmp_path, tiny_student, capsys):
    assert run(["inspect", str(cnn_store), "--json"]) == 0
    held = result(capsys)
    assert (held["images"], held["grid"], held["token_dim"], held["codec"], held["shards"]) == (30, 6, 320, "fp16", 1)
    assert held["teacher"]["spec"] == "efficientnet-lite0"

    assert (
        run(
            [
                "pretrain",
                str(cnn_store),
                str(tmp_path / "run"),
                *tiny_student,
                "--epochs",
                "6",
                "--workers",
                "1",
                "--json",
            ]
        )
        == 0
    )
    trained = result(capsys)
    assert trained["steps"] == 23  # 6 epochs of 30 images in batches of 8, rounded up
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "run")]
    assert len(losses) == 23
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert trained["loss"] == losses[-1]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["options"]["norm"] == "store"  # a CNN's default

    for features in ("encoder", "random", "teacher"):
        assert run(["knn", str(tmp_path / "run"), str(photos), "--features", features, "--json", "--workers", "0"]) == 0
        accuracy = result(capsys)
        assert accuracy["val"] == 10
        assert accuracy["top1"] >= 50

    assert run(["knn", str(tmp_path / "run"), str(photos), "--image-size", "4"]) == 2
    assert "take 16" in capsys.readouterr().err
    encoder = fastmae.load_encoder(tmp_path / "run", image_size=96)
    assert encoder.forward_features(torch.zeros(1, 3, 96, 96)).shape == (1, 37, 64)
    by_file = fastmae.load_encoder(tmp_path / "run" / "checkpoint.pt")
    assert torch.equal(by_file.blocks[0].attn.qkv.weight, encoder.blocks[0].attn.qkv.weight)


def test_a_second_call_of_a_finished_run_does_nothing_and_says_the_same(vit_store, tmp_path, tiny_student, capsys):
    args = [
        "pretrain",
        str(vit_store),
        str(tmp_path / "run"),
        *tiny_student,
        "--epochs",
        "2",
        "--workers",
        "0",
        "--json",
    ]
    assert run(args) == 0
    first = result(capsys)
    written = (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns
    assert run(args) == 0
    assert result(capsys) == first
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns == written
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert run(args) == 2
    assert "its metrics.jsonl is gone" in capsys.readouterr().err
    assert run([*args, "--epochs", "3"]) == 2
    assert "options epochs: 2, not 3" in capsys.readouterr().err
    assert run([*args, "--epochs", "3", "--no-resume"]) == 0
    assert (tmp_path / "run" / "replaced-1" / "checkpoint.pt").exists()


@pytest.fixture(scope="module")
def losses_of(vit_store, tiny_student, tmp_path_factory):
    """Losses of the first twelve steps of a run with some options more."""

    def train(*options, stores=(vit_store,)):
        folder = tmp_path_factory.mktemp("runs") / "run"
        args = ["--epochs", "3", "--workers", "0", *options]
        assert run(["pretrain", *map(str, stores), str(folder), *tiny_student, *args]) == 0
        return [entry["loss"] for entry in read_metrics(folder)][:12], folder

    return train


@pytest.mark.parametrize("norm", ["patch", "store"])
def test_the_online_teacher_is_the_same_function_as_the_stored_tokens(norm, losses_of):
    offline, _ = losses_of("--norm", norm)
    online, _ = losses_of("--norm", norm, "--target", "teacher")
    assert len(offline) >= 10
    assert online == pytest.approx(offline, abs=1e-4)


def test_several_sizes_and_stored_flips_train_and_go_online_as_the_same_function(
    photos, vit_weights, losses_of, tmp_path, capsys
):
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
    stores = {sizes: tmp_path / sizes for sizes in ("96", "64,96")}
    for sizes, store in stores.items():
        more = ["--middle-size", sizes, "--pixels", "raw", "--flips", "stored"]
        assert run(["tokenize", str(photos / "train"), str(store), *args, *more]) == 0
    offline, _ = losses_of(stores=(stores["96"],))
    online, _ = losses_of("--target", "teacher", stores=(stores["96"],))
    assert online == pytest.approx(offline, abs=1e-4)
    losses, folder = losses_of(stores=(stores["64,96"],))
    assert sum(losses[-3:]) < sum(losses[:3])
    assert json.loads((folder / "run.json").read_text())["store"]["middle_sizes"] == [64, 96]
    capsys.readouterr()
    assert (
        run(["pretrain", str(stores["64,96"]), str(tmp_path / "run"), "--image-size", "64", "--target", "teacher"]) == 2
    )
    assert "one middle size" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 5])
def test_grey_and_many_channelled_images_take_the_whole_path(
    channels, photos, vit_weights, tiny_student, tmp_path, capsys
):
    folder = tmp_path / "images"
    if channels == 1:
        folder = photos
    else:  # red, green, blue, and two more of them
        for path in photos.rglob("*.*"):
            rgb = np.asarray(Image.open(path).convert("RGB"))
            target = folder / path.relative_to(photos).with_suffix(".npy")
            target.parent.mkdir(parents=True, exist_ok=True)
            np.save(target, np.concatenate([rgb, 255 - rgb[..., :2]], axis=2))
    store, trained = tmp_path / "s.tokens", tmp_path / "run"
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
    more = ["--channels", str(channels), *(["--teacher-channels", "2,1,0", "--pixels", "raw"] if channels == 5 else [])]
    assert run(["tokenize", str(folder / "train"), str(store), *args, *more]) == 0
    held = fastmae.TokenStore(store)
    pixels = torch.stack([held.pixels(index) for index in range(len(held))]) / 255
    assert pixels.shape == (30, channels, 96, 96)
    mean, std = held.normalisation
    torch.testing.assert_close(torch.tensor(mean), pixels.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(std), pixels.std((0, 2, 3), correction=0), atol=1e-4, rtol=1e-4)
    seen = held.pixels(3)[[0, 0, 0] if channels == 1 else [2, 1, 0]]
    by_name = load_teacher("timm/vit_tiny_patch16_224", 96, 6, vit_weights)
    torch.testing.assert_close(held.view_tokens(3, 0, 0, 6).float(), by_name(seen[None])[0], atol=4e-3, rtol=4e-3)

    for target in ("tokens", "teacher", "pixels"):
        options = ["--target", target, "--epochs", "3", "--workers", "0"]
        assert run(["pretrain", str(store), str(trained / target), *tiny_student, *options]) == 0
        losses = [entry["loss"] for entry in read_metrics(trained / target)]
        assert sum(losses[-3:]) < sum(losses[:3])
    for features in ("encoder", "teacher"):
        assert run(["knn", str(trained / "tokens"), str(folder), "--features", features, "--workers", "0"]) == 0
    encoder = fastmae.load_encoder(trained / "tokens")
    assert encoder.forward_features(torch.zeros(1, channels, 64, 64)).shape == (1, 17, 64)


def test_channels_that_do_not_fit_are_one_line(photos, tmp_path, capsys):
    for options, says in (
        (["--channels", "5"], "--teacher-channels 0,1,2"),
        (["--channels", "5", "--teacher-channels", "0,1,2"], "take --pixels raw"),
        (["--channels", "5", "--teacher-channels", "0,1,9", "--pixels", "raw"], "three numbers from 0 to 4"),
        (["--channels", "0"], "--channels 0"),
    ):
        assert run(["tokenize", str(photos), str(tmp_path / "s"), *options]) == 2
        assert says in capsys.readouterr().err


def test_accumulated_micro_batches_are_the_same_run(losses_of):
    whole, _ = losses_of()
    in_parts, _ = losses_of("--micro-batch", "3")  # 8 views in parts of 2
    assert in_parts == pytest.approx(whole, abs=1e-5)


def test_two_teachers_at_once_have_a_head_and_a_loss_each(photos, vit_store, losses_of, tmp_path, capsys):
    other = tmp_path / "lite.tokens"
    args = ["--teacher", "efficientnet-lite0", "--middle-size", "96", "--workers", "0"]
    assert run(["tokenize", str(photos / "train"), str(other), *args]) == 0
    losses, folder = losses_of("--store-weights", "1,0.5", stores=(vit_store, other))
    assert sum(losses[-3:]) < sum(losses[:3])
    description = json.loads((folder / "run.json").read_text())
    assert description["target_dims"] == [192, 320]
    assert [teacher["kind"] for teacher in description["store"]["teachers"]] == ["vit", "cnn"]
    assert fastmae.load_encoder(folder).embed_dim == 64

    assert run(["tokenize", str(photos / "val"), str(tmp_path / "val.tokens"), *args]) == 0
    assert run(["pretrain", str(vit_store), str(tmp_path / "val.tokens"), str(tmp_path / "run")]) == 2
    assert "has other images than" in capsys.readouterr().err


def test_an_average_of_the_student_is_what_is_loaded(losses_of):
    losses, folder = losses_of("--ema", "0.9")
    assert losses == losses_of()[0]  # it watches the run and changes nothing
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    last, average = (saved[name]["encoder.blocks.0.attn.qkv.weight"] for name in ("model", "ema"))
    assert not torch.equal(last, average)
    assert torch.equal(fastmae.load_encoder(folder).blocks[0].attn.qkv.weight, average)


@pytest.mark.parametrize(
    "options",
    [
        ["--target", "pixels", "--decoder-depth", "2"],
        ["--target", "hog", "--mask", "block", "--checkpoint-activations"],
        ["--loss", "cosine", "--loss-on", "all", "--fusion", "--no-all-layers"],
        ["--norm", "channel", "--fusion", "--precision", "bf16-mixed"],
        ["--norm", "none", "--no-all-layers", "--clip-grad", "1", "--loss", "mse", "--no-flip"],
    ],
)
def test_the_other_targets_norms_and_losses_train(options, vit_store, tmp_path, tiny_student, capsys):
    args = ["--epochs", "6", "--workers", "0", "--json"]
    assert run(["pretrain", str(vit_store), str(tmp_path / "run"), *tiny_student, *options, *args]) == 0
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "run")]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--image-size", "112"], "larger than"),
        (["--image-size", "60"], "not a multiple of the store's patch size 16"),
        (["--encoder", "resnet18"], "not one of timm's vit_"),
        (["--mask-ratio", "1"], "--mask-ratio 1.0"),
        (["--epochs", "0"], "--epochs 0"),
        (["--target", "pixels", "--all-layers"], "--no-all-layers"),
        (["--device", "cuda:7"], "--device cuda:7"),
        (["--devices", "64"], "--devices 64"),
        (["--decoder-width", "30"], "width"),
        (["--decoder-width", "33"], "not a multiple of --decoder-heads"),
        (["--base-lr", "-1"], "--base-lr"),
        (["--betas", "1.5", "0.9"], "--betas"),
        (["--weight-decay", "-0.1"], "--weight-decay"),
        (["--encoder", "vit_relpos_small_patch16_224"], "--encoder vit_relpos_small_patch16_224"),
        (["--target", "hog", "--norm", "store"], "--norm store"),
        (["--store-weights", "1,2"], "--store-weights 1,2"),
        (["--store-weights", "a"], "--store-weights a"),
        (["--target", "pixels", "--store-weights", "2"], "reads none"),
        (["--encoder-width", "0"], "--encoder-width 0"),
        (["--seed", "99999999999"], "--seed"),
        (["--ema", "1.5"], "--ema 1.5"),
    ],
)
def test_options_that_do_not_fit_are_one_line_and_leave_no_run(
    options, says, vit_store, tmp_path, tiny_student, capsys
):
    assert run(["pretrain", str(vit_store), str(tmp_path / "run"), *tiny_student, *options]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_damaged_shard_met_while_training_is_one_line(vit_store, tmp_path, tiny_student, capsys):
    store = tmp_path / "s.tokens"
    shutil.copytree(vit_store, store)
    shard = store / "shards" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert run(["pretrain", str(store), str(tmp_path / "run"), *tiny_student, "--workers", "1"]) == 2
    err = capsys.readouterr().err
    assert f"{shard}: has 5000 bytes, not" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_loss_that_is_no_number_stops_with_code_1_and_keeps_the_last_checkpoint(
    vit_store, tmp_path, tiny_student, capsys
):
    args = [*tiny_student, "--epochs", "8", "--workers", "0", "--save-every", "0", "--loss", "mse", "--norm", "none"]
    assert run(["pretrain", str(vit_store), str(tmp_path / "run"), *args, "--base-lr", "1e30"]) == 1
    assert "no longer a number" in capsys.readouterr().err
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] >= 1


def test_a_link_to_nothing_is_skipped_and_named(photos, vit_weights, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(photos / "train" / "china", images)
    (images / "00-gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    args = [
        "tokenize",
        str(images),
        str(tmp_path / "s"),
        "--teacher",
        "timm/vit_tiny_patch16_224",
        "--teacher-weights",
        str(vit_weights),
    ]
    assert run([*args, "--middle-size", "32", "--workers", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["skipped"] == 1
    assert "00-gone.jpg: a link to a file that is not there" in err
