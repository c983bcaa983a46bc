"""`fastmae knn`: the features that RUN can name, and input that is refused."""

import pytest

from fastmae.cli import run

CPU = ["--workers", "0", "--device", "cpu"]


@pytest.fixture
def knn(photos, printed_json):
    """(RUN, options) -> the JSON of `knn` on the photos."""

    def call(spec, *options):
        assert run(["knn", spec, str(photos), *options, *CPU, "--json"]) == 0
        return printed_json()

    return call


def test_a_timm_name_is_measured_with_given_or_with_random_weights(knn, vit_weights):
    random = knn("timm/vit_tiny_patch16_224", "--no-pretrained", "--image-size", "32")
    assert (random["train"], random["val"], random["classes"], random["dim"]) == (30, 10, 2, 192)
    assert 0 <= random["top1"] <= 100
    options = ["--weights", str(vit_weights), "--image-size", "32", "--pool", "class"]
    assert knn("timm/vit_tiny_patch16_224", *options)["dim"] == 192


def test_a_teacher_is_measured_by_its_name(knn):
    teacher = knn("efficientnet-lite0")
    assert teacher["dim"] == 320
    assert teacher["top1"] == 100.0  # crops of a temple and of a flower


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        ("efficientnet-lite0", "--pool class"),
        ("timm/vit_tiny_patch16_224", "--features teacher"),
        ("timm/vit_tiny_patch16_224 --no-pretrained", "--block 12"),
        ("efficientnet-lite0", "--features random"),
    ],
)
def test_an_option_that_does_not_fit_the_network_is_named(spec, option, photos, error_line):
    name, *options = spec.split()
    assert option in error_line(["knn", name, str(photos), *options, *option.split(), *CPU])


def test_a_run_that_does_not_exist_is_named(photos, error_line):
    assert "no-such-run" in error_line(["knn", "no-such-run", str(photos), *CPU])


def test_an_image_that_cannot_be_decoded_is_named(photos, tmp_path, error_line):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name in ("china", "flower"):
            (tmp_path / split / name).symlink_to(photos / split / name)
    (tmp_path / "val" / "broken").mkdir()
    (tmp_path / "train" / "broken").symlink_to(photos / "train" / "china")
    (tmp_path / "val" / "broken" / "broken.jpg").write_bytes(b"<html>")
    assert "broken.jpg" in error_line(["knn", "efficientnet-lite0", str(tmp_path), *CPU])
