"""`bench store`: sums equal their formulas, figures are consistent, and the recommendation follows its rule."""

import json

import pytest
import torch

from fastmae.bench.bench_store import recommended
from fastmae.bench.codecs import Distortion
from fastmae.cli import run
from fastmae.teachers import Teacher

CHANNELS, GRID = 192, 6
SMALL = ["--middle-size", "96", "--batch-size", "8", "--rounds", "2", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def options(vit_weights):
    return [*SMALL, "--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", str(vit_weights)]


@pytest.fixture
def bench(options, capsys):
    def call(images, *more):
        assert run(["bench", "store", str(images), *options, *more, "--json"]) == 0
        out, err = capsys.readouterr()
        return json.loads(out.splitlines()[-1]), err

    return call


def test_sizes_distortion_and_knn_of_labelled_images_are_consistent(photos, bench, tmp_path):
    file = tmp_path / "store.md"
    result, err = bench(photos, "--codecs", "fp32,fp16,pq16", "--jpeg-qualities", "90,60", "--out", str(file))
    rows = {row["codec"]: row for row in result["rows"]}
    assert list(rows) == ["fp32", "fp16", "pq16"]
    assert result["images"] == 10  # val/
    pixel_bytes = result["pixel_bytes_per_image"]
    assert 0 < pixel_bytes["60"] < pixel_bytes["90"]
    sizes = [("fp32", 4 * CHANNELS, 0), ("fp16", 2 * CHANNELS, 0), ("pq16", 16, 2 * CHANNELS)]
    for codec, token_bytes, mean_bytes in sizes:
        row = rows[codec]
        assert row["token_bytes_per_image"] == GRID**2 * token_bytes + mean_bytes
        assert row["pixel_bytes_per_image"] == pixel_bytes["90"]
        image_bytes = row["token_bytes_per_image"] + pixel_bytes["90"] + 200
        assert row["bytes_per_image"] == pytest.approx(image_bytes, abs=1)
        assert row["imagenet_gb"] == pytest.approx(1281167 * row["bytes_per_image"] / 1e9, rel=0.01)
        assert row["encode_tokens_per_second"] == pytest.approx(GRID**2 * row["encode_images_per_second"], rel=0.01)
        decode, slowest, fastest = (row[f"decode_tokens_per_second{suffix}"] for suffix in ("", "_min", "_max"))
        assert slowest <= decode <= fastest
        assert 0 <= row["knn"] <= 100
        assert 0 < row["host_ms_per_image_min"] <= row["host_ms_per_image"] <= row["host_ms_per_image_max"]
    assert (rows["fp32"]["cosine"], rows["fp32"]["relative_error"], rows["fp32"]["cosine_patch_norm"]) == (1, 0, 1)
    assert rows["fp16"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert 0 < rows["fp16"]["relative_error"] < 1e-3
    assert rows["fp16"]["relative_error"] < rows["pq16"]["relative_error"]
    assert rows["fp16"]["cosine_patch_norm"] > rows["pq16"]["cosine_patch_norm"]
    assert result["recommended"] == recommended(result["rows"])
    building = result["building"]
    rate, teacher_rate = (building[f"{name}_images_per_second"] for name in ("tokenize", "teacher"))
    assert building["ratio"] == pytest.approx(rate / teacher_rate, rel=0.02)
    assert building["images"] == 10
    assert list(result["precisions"]) == ["bf16-mixed"]
    assert 0.99 < result["precisions"]["bf16-mixed"] < 1
    assert result["settings"]["precision"] == "32-true"
    text = file.read_text()
    assert f"bf16-mixed {result['precisions']['bf16-mixed']:.5f}" in text
    assert all(f"| {codec} |" in text for codec in rows)
    assert all(f"- {name}: {value}" in text for name, value in result["settings"].items())
    assert f"Recommended: {result['recommended']} ({result['rule']})" in text
    assert "Recommended" in err


def test_without_labels_there_is_no_knn_and_no_codec_learns_on_a_measured_image(photos, bench):
    result, _ = bench(photos / "train", "--codecs", "fp16,pq16")  # 30 images
    assert [row["knn"] for row in result["rows"]] == [None, None]
    assert result["images"] == 15
    assert "codecs learnt on 15 others" in result["settings"]["images"]
    few, _ = bench(photos / "train" / "china", "--codecs", "fp16", "--codec-images", "4", "--limit", "12")
    assert few["images"] == 8
    assert few["recommended"] == "fp16"


def test_the_precision_of_the_teacher_can_be_chosen(photos, bench, monkeypatch):
    precisions, forward = [], Teacher.forward

    def noted(teacher, pixels):
        precisions.append(teacher.precision)
        return forward(teacher, pixels)

    monkeypatch.setattr(Teacher, "forward", noted)
    exact, _ = bench(photos / "val", "--codecs", "fp16")
    in_bf16 = precisions.count("bf16-mixed")  # for the cosine of each precision
    precisions.clear()
    mixed, _ = bench(photos / "val", "--codecs", "fp16", "--precision", "bf16-mixed")
    assert mixed["settings"]["precision"] == "bf16-mixed"
    assert mixed["precisions"] == exact["precisions"]
    assert precisions.count("bf16-mixed") > in_bf16


def test_distortion_equals_its_formulas_in_whatever_batches_tokens_come():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 3, 4, generator=generator)
    decoded = tokens + 0.3 * torch.randn(5, 3, 4, generator=generator)
    distortion = Distortion()
    distortion.add(tokens[:2], decoded[:2])
    distortion.add(tokens[2:], decoded[2:])
    pairs = list(zip(tokens.flatten(0, 1), decoded.flatten(0, 1), strict=True))
    assert distortion.cosine == pytest.approx(sum(float(x @ y / (x.norm() * y.norm())) for x, y in pairs) / 15)
    assert distortion.relative_error == pytest.approx(float((tokens - decoded).norm() / tokens.norm()))


def row(codec, size, cosine, knn):
    return {"codec": codec, "bytes_per_image": size, "cosine": cosine, "knn": knn}


def test_the_smallest_codec_that_keeps_cosine_and_knn_is_recommended():
    fp16, pq64, pq32 = row("fp16", 100, 1.0, 80.0), row("pq64", 20, 0.97, 79.7), row("pq32", 10, 0.96, 79.6)
    assert recommended([fp16, pq64, pq32]) == "pq64"
    assert recommended([fp16, {**pq64, "cosine": 0.949}, pq32]) == "fp16"
    assert recommended([fp16, pq64, {**pq32, "knn": 85.0}]) == "pq32"
    assert recommended([{**r, "knn": None} for r in (fp16, pq64, pq32)]) == "pq32"
    assert recommended([row("pq32", 10, 0.9, None)]) is None


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["--jpeg-qualities", "90,0"], "--jpeg-qualities 0"),
        (["--jpeg-qualities", "high"], "--jpeg-qualities high"),
        (["--limit", "1"], "1 image"),
        (["--codecs", "fp16,"], "int8"),
        (["--codecs", "fp16,pq200"], "pq200"),
        (["--middle-size", "100"], "--middle-size 100"),
        (["--precision", "tf32"], "--precision tf32"),
        (["--out", "."], "--out ."),
    ],
)
def test_an_option_that_cannot_be_used_is_named_in_one_line(args, name, photos, options, capsys):
    assert run(["bench", "store", str(photos), *options, *args]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("fastmae bench store: ")
    assert name in err


def test_a_single_image_is_too_few(photos, options, tmp_path, capsys):
    (tmp_path / "one.jpg").symlink_to(photos / "train" / "china" / "00.jpg")
    assert run(["bench", "store", str(tmp_path), *options]) == 2
    assert f"{tmp_path}: 1 image:" in capsys.readouterr().err
