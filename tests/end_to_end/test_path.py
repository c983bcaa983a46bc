"""Images -> store -> pre-trained ViT -> k-NN, by the commands, on real photos."""

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


def losses_of(run_folder):
    return [entry["loss"] for entry in read_metrics(run_folder)]


def assert_loss_falls(losses):
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.fixture(scope="module")
def pretrain(vit_store, tiny_student, tmp_path_factory):
    """(options, stores) -> the folder of a finished run of three epochs; 12 steps."""

    def train(*options, stores=(vit_store,)):
        folder = tmp_path_factory.mktemp("runs") / "run"
        args = ["pretrain", *map(str, stores), str(folder), *tiny_student, "--epochs", "3", "--workers", "0", *options]
        assert run(args) == 0
        return folder

    return train


def test_a_cnn_teachers_store_leads_to_an_encoder_with_a_lower_loss_and_useful_features(
    cnn_store, photos, tmp_path, tiny_student, printed_json
):
    assert run(["inspect", str(cnn_store), "--json"]) == 0
    store = printed_json()
    expected = {"images": 30, "grid": 6, "token_dim": 320, "codec": "fp16", "shards": 1}
    assert expected.items() <= store.items()
    assert store["teacher"]["spec"] == "efficientnet-lite0"

    folder = tmp_path / "run"
    args = ["pretrain", str(cnn_store), str(folder), *tiny_student, "--epochs", "6", "--workers", "1", "--json"]
    assert run(args) == 0
    result, losses = printed_json(), losses_of(folder)
    assert result["steps"] == len(losses) == 23  # 6 epochs of 30 images in batches of 8, rounded up
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert result["loss"] == losses[-1]
    assert list((folder / "tensorboard").iterdir())
    assert json.loads((folder / "run.json").read_text())["options"]["norm"] == "store"

    for features in ("encoder", "random", "teacher"):
        assert run(["knn", str(folder), str(photos), "--features", features, "--json", "--workers", "0"]) == 0
        accuracy = printed_json()
        assert accuracy["val"] == 10
        assert accuracy["top1"] >= 50

    encoder = fastmae.load_encoder(folder, image_size=96)
    assert encoder.forward_features(torch.zeros(1, 3, 96, 96)).shape == (1, 37, 64)


def test_a_finished_run_is_not_trained_again_and_gives_the_same_result(
    vit_store, tmp_path, tiny_student, printed_json, error_line
):
    folder = tmp_path / "run"
    args = ["pretrain", str(vit_store), str(folder), *tiny_student, "--epochs", "2", "--workers", "0", "--json"]
    assert run(args) == 0
    result, written_at = printed_json(), (folder / "checkpoint.pt").stat().st_mtime_ns
    assert run(args) == 0
    assert printed_json() == result
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == written_at
    assert "--epochs 2" in error_line([*args, "--epochs", "3"])
    assert run([*args, "--epochs", "3", "--no-resume"]) == 0
    assert (folder / "replaced-1" / "checkpoint.pt").exists()


@pytest.mark.parametrize("norm", ["patch", "store"])
def test_the_online_teacher_gives_the_losses_of_the_stored_tokens(norm, pretrain):
    offline = losses_of(pretrain("--norm", norm))
    online = losses_of(pretrain("--norm", norm, "--target", "teacher"))
    assert len(offline) == 12
    assert online == pytest.approx(offline, abs=1e-4)


def test_the_online_teacher_gives_the_losses_of_stored_flips(photos, vit_teacher, pretrain, tmp_path):
    options = "--middle-size 96 --codec fp32 --pixels raw --flips stored --workers 0".split()
    assert run(["tokenize", str(photos / "train"), str(tmp_path / "s"), *vit_teacher, *options]) == 0
    offline, online = (
        losses_of(pretrain("--target", target, stores=(tmp_path / "s",))) for target in ("tokens", "teacher")
    )
    assert online == pytest.approx(offline, abs=1e-4)


def test_a_store_of_several_sizes_with_stored_flips_trains(photos, vit_teacher, pretrain, tmp_path):
    options = "--middle-size 64,96 --codec fp32 --pixels raw --flips stored --workers 0".split()
    assert run(["tokenize", str(photos / "train"), str(tmp_path / "s"), *vit_teacher, *options]) == 0
    folder = pretrain(stores=(tmp_path / "s",))
    assert_loss_falls(losses_of(folder))
    assert json.loads((folder / "run.json").read_text())["store"]["middle_sizes"] == [64, 96]


@pytest.fixture
def five_channel_images(photos, tmp_path):
    """The photos as arrays of red, green, blue, and the inverted red and green."""
    for path in photos.rglob("*.*"):
        rgb = np.asarray(Image.open(path).convert("RGB"))
        file = tmp_path / "images" / path.relative_to(photos).with_suffix(".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.concatenate([rgb, 255 - rgb[..., :2]], axis=2))
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("images", "options", "teacher_channels"),
    [
        ("photos", "--channels 1", [0, 0, 0]),
        ("five_channel_images", "--channels 5 --teacher-channels 2,1,0 --pixels raw", [2, 1, 0]),
    ],
    ids=["grey", "five channels"],
)
def test_grey_and_many_channel_images_go_the_whole_path(
    images, options, teacher_channels, vit_weights, vit_teacher, tiny_student, tmp_path, request
):
    folder, store = request.getfixturevalue(images), tmp_path / "s.tokens"
    args = [*vit_teacher, "--middle-size", "96", "--workers", "0", *options.split()]
    assert run(["tokenize", str(folder / "train"), str(store), *args]) == 0

    opened = fastmae.TokenStore(store)
    pixels = torch.stack([opened.pixels(index) for index in range(len(opened))]) / 255
    channels = opened.info.channels
    assert pixels.shape == (30, channels, 96, 96)
    mean, std = opened.normalisation
    torch.testing.assert_close(torch.tensor(mean), pixels.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(std), pixels.std((0, 2, 3), correction=0), atol=1e-4, rtol=1e-4)
    teacher = load_teacher("timm/vit_tiny_patch16_224", 96, 6, vit_weights)
    expected = teacher(opened.pixels(3)[teacher_channels][None])[0]
    torch.testing.assert_close(opened.view_tokens(3, 0, 0, 6).float(), expected, atol=4e-3, rtol=4e-3)

    for target in ("tokens", "teacher", "pixels"):
        args = [*tiny_student, "--target", target, "--epochs", "3", "--workers", "0"]
        assert run(["pretrain", str(store), str(tmp_path / target), *args]) == 0
        assert_loss_falls(losses_of(tmp_path / target))
    for features in ("encoder", "teacher"):
        assert run(["knn", str(tmp_path / "tokens"), str(folder), "--features", features, "--workers", "0"]) == 0
    encoder = fastmae.load_encoder(tmp_path / "tokens")
    assert encoder.forward_features(torch.zeros(1, channels, 64, 64)).shape == (1, 17, 64)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--channels 5", "--teacher-channels"),
        ("--channels 5 --teacher-channels 0,1,2", "--pixels raw"),
        ("--channels 5 --teacher-channels 0,1,9 --pixels raw", "--teacher-channels 9"),
    ],
)
def test_channel_options_that_do_not_fit_are_named(options, named, photos, tmp_path, error_line):
    assert named in error_line(["tokenize", str(photos), str(tmp_path / "s"), *options.split()])


def test_accumulated_micro_batches_give_the_losses_of_whole_batches(pretrain):
    accumulated = losses_of(pretrain("--micro-batch", "3"))  # 8 views in four micro-batches of 2
    assert accumulated == pytest.approx(losses_of(pretrain()), abs=1e-5)


def test_two_teachers_have_a_head_and_a_loss_each(vit_store, cnn_store, pretrain):
    folder = pretrain("--store-weights", "1,0.5", stores=(vit_store, cnn_store))
    assert_loss_falls(losses_of(folder))
    description = json.loads((folder / "run.json").read_text())
    assert description["target_dims"] == [192, 320]
    assert [teacher["kind"] for teacher in description["store"]["teachers"]] == ["vit", "cnn"]
    assert fastmae.load_encoder(folder).embed_dim == 64


def test_the_encoder_of_a_run_is_the_moving_average_if_there_is_one(pretrain):
    folder = pretrain("--ema", "0.9")
    assert losses_of(folder) == losses_of(pretrain())  # the average changes nothing
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    last, average = (checkpoint[name]["encoder.blocks.0.attn.qkv.weight"] for name in ("model", "ema"))
    assert not torch.equal(last, average)
    assert torch.equal(fastmae.load_encoder(folder).blocks[0].attn.qkv.weight, average)


@pytest.mark.parametrize(
    "options",
    [
        "--target pixels --decoder-depth 2",
        "--target hog --mask block --checkpoint-activations",
        "--loss cosine --loss-on all --fusion --no-all-layers",
        "--norm channel --fusion --precision bf16-mixed",
        "--norm none --no-all-layers --clip-grad 1 --loss mse --no-flip",
    ],
)
def test_the_loss_falls_with_other_targets_norms_and_losses(options, pretrain):
    assert_loss_falls(losses_of(pretrain(*options.split(), "--epochs", "6")))


@pytest.mark.parametrize(
    "option",
    [
        "--image-size 112",
        "--image-size 60",
        "--encoder resnet18",
        "--encoder vit_relpos_small_patch16_224",
        "--decoder-width 33",
        "--device cuda:7",
        "--devices 64",
        "--store-weights 1,2",
    ],
)
def test_an_option_that_does_not_fit_is_named_in_one_line_before_the_run_is_created(
    option, vit_store, tmp_path, tiny_student, capsys
):
    assert run(["pretrain", str(vit_store), str(tmp_path / "run"), *tiny_student, *option.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert option in line
    assert not (tmp_path / "run").exists()


def test_a_decoder_width_that_does_not_fit_the_positions_is_refused(vit_store, tmp_path, tiny_student, error_line):
    args = ["pretrain", str(vit_store), str(tmp_path / "run"), *tiny_student, "--decoder-width", "30"]
    assert "width" in error_line(args)
    assert not (tmp_path / "run").exists()


def test_a_damaged_shard_stops_the_training_and_is_named(vit_store, tmp_path, tiny_student, error_line):
    store = shutil.copytree(vit_store, tmp_path / "s.tokens")
    shard = store / "shards" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert str(shard) in error_line(["pretrain", str(store), str(tmp_path / "run"), *tiny_student, "--workers", "1"])


def test_a_loss_that_is_not_a_number_ends_with_code_1_and_keeps_the_last_checkpoint(
    vit_store, tmp_path, tiny_student, capsys
):
    options = "--epochs 8 --workers 0 --save-every 0 --loss mse --norm none --base-lr 9000 --weight-decay 1e6".split()
    assert run(["pretrain", str(vit_store), str(tmp_path / "run"), *tiny_student, *options]) == 1
    assert "--base-lr" in capsys.readouterr().err
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] >= 1


def test_a_broken_link_among_the_images_is_skipped_and_named(photos, vit_teacher, tmp_path, capsys):
    images = shutil.copytree(photos / "train" / "china", tmp_path / "images")
    (images / "00-gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    options = "--middle-size 32 --workers 0 --json".split()
    assert run(["tokenize", str(images), str(tmp_path / "s"), *vit_teacher, *options]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["skipped"] == 1
    assert "00-gone.jpg" in err
