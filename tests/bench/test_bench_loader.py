"""`bench loader`: its figures are consistent, MAE's side loads as MAE does, and commands of two words are found."""

import json
import shutil

import pytest
import torch
from PIL import Image
from torchvision import transforms

from fastmae.bench.bench_loader import MAE
from fastmae.bench.loading import MaeImages
from fastmae.bench.timing import Rate, interleave
from fastmae.cli import overview, run
from fastmae.images.sources import open_source

SIZES = ["--middle-size", "96", "--image-size", "64", "--batch-size", "8"]
SMALL = [*SIZES, "--rounds", "2", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def options(vit_weights):
    return [*SMALL, "--teacher", "timm/vit_tiny_patch16_224", "--teacher-weights", str(vit_weights)]


@pytest.fixture
def bench(options, capsys):
    def call(images, *more):
        assert run(["bench", "loader", str(images), *options, *more, "--json"]) == 0
        out, err = capsys.readouterr()
        return json.loads(out.splitlines()[-1]), err

    return call


def test_rates_ratios_and_shares_are_consistent_and_the_markdown_file_names_the_settings(photos, bench, tmp_path):
    threads, random_state = torch.get_num_threads(), torch.random.get_rng_state()
    file = tmp_path / "loader.md"
    result, err = bench(photos, "--codecs", "fp16,pq16", "--sample", "20", "--out", str(file))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), random_state)
    mae, *ours = result["rows"]
    stores = [f"fastmae: {pixels} pixels, {codec} tokens" for pixels in ("jpeg", "raw") for codec in ("fp16", "pq16")]
    our_methods = [f"{store}{suffix}" for store in stores for suffix in ("", ", normalised here")]
    assert [row["method"] for row in result["rows"]] == [MAE, *our_methods]
    assert result["images"] == 20
    for row in result["rows"]:
        rate = row["images_per_second"]
        assert row["images_per_second_min"] <= rate <= row["images_per_second_max"]
        assert row["milliseconds_per_image"] == pytest.approx(1000 / rate, rel=0.01)
        assert row["times_mae"] == pytest.approx(rate / mae["images_per_second"], rel=0.01, abs=0.01)
        shares = [row[f"share_{part}"] for part in ("decode", "copy", "tokens", "draws", "rest")]
        assert sum(share for share in shares if share is not None) == pytest.approx(1, abs=0.01)
        assert (row["first_pass_images_per_second"] is None) == (row is mae or "normalised" in row["method"])
        if row is mae:
            assert row["delivered_views_per_second"] is row["reader_views_per_second"] is None
            continue
        assert row["delivered_views_per_second"] > 0
        ratio = row["delivered_views_per_second"] / row["reader_views_per_second"]
        assert 0.2 < row["delivered_over_reader"] < 2  # of sizes at which a view takes little more than its message
        assert row["delivered_over_reader"] == pytest.approx(ratio, rel=0.5)
        assert row["main_process_milliseconds_per_view"] > 0
        if "normalised" not in row["method"]:
            assert row["reader_views_per_second"] == pytest.approx(rate, rel=0.001)
    assert mae["share_copy"] is mae["share_tokens"] is mae["share_draws"] is None
    assert all((row["share_decode"] == 0) == ("raw" in row["method"]) for row in ours)
    text = file.read_text()
    assert all(f"| {row['method']} |" in text for row in result["rows"])
    assert all(f"- {name}: {value}" in text for name, value in result["settings"].items())
    assert {"CPU", "cores", "torch", "fastmae", "images", "sizes"} <= result["settings"].keys()
    assert "20 of" in result["settings"]["images"]
    assert MAE in err


def test_an_image_that_one_side_cannot_decode_is_loaded_by_neither(photos, bench, tmp_path):
    shutil.copytree(photos / "val", tmp_path / "images")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no")
    result, _ = bench(tmp_path / "images", "--codecs", "fp16")
    assert result["images"] == 10


def test_maes_batch_is_what_the_authors_transforms_make_of_the_files(photos):
    source = open_source(photos)
    entries = sorted(source.entries())[:3]
    torch.manual_seed(5)
    batch = MaeImages.of(source, entries, 48).batch([2, 0])
    steps = [
        transforms.RandomResizedCrop(48, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    transform = transforms.Compose(steps)
    torch.manual_seed(5)
    images = [Image.open(photos / entries[index].decode()).convert("RGB") for index in (2, 0)]
    assert torch.equal(batch, torch.stack([transform(image) for image in images]))


def test_contenders_take_turns_and_the_first_round_does_not_count():
    calls = []

    def turn(name):
        return lambda number: calls.append((number, name)) or 10.0 * number + (name == "b")

    assert interleave({"a": turn("a"), "b": turn("b")}, 3) == {"a": [10.0, 20.0, 30.0], "b": [11.0, 21.0, 31.0]}
    assert calls == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b"), (3, "b"), (3, "a")]
    assert Rate.of(20, [4.0, 1.0, 2.0]) == Rate(median=10.0, slowest=5.0, fastest=20.0)


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--image-size", "60"], ["--image-size 60", "64"]),
        (["--image-size", "112"], ["--image-size 112", "--middle-size 96"]),
        (["--middle-size", "100"], ["--middle-size 100"]),
        (["--codecs", "fp17"], ["fp17"]),
        (["--codecs", "fp16,fp16"], ["--codecs fp16,fp16"]),
        (["--out", "no-such-folder/x.md"], ["--out no-such-folder/x.md"]),
        (["--teacher", "no-such"], ["no-such"]),
    ],
)
def test_an_option_that_cannot_be_used_is_named_in_one_line(args, names, photos, options, capsys):
    assert run(["bench", "loader", str(photos), *options, *args]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("fastmae bench loader: ")
    assert all(name in err for name in names)


def test_a_folder_without_an_image_that_both_sides_decode_is_named(options, tmp_path, capsys):
    assert run(["bench", "loader", str(tmp_path), *options]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    (tmp_path / "broken.jpg").write_bytes(b"no")
    assert run(["bench", "loader", str(tmp_path), *options]) == 2
    assert f"{tmp_path}: none of the 1 images" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["bench"], ["bench", "lodaer", "x"]])
def test_a_wrong_second_word_is_one_line_that_lists_the_right_ones(args, capsys):
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith(f"fastmae {' '.join(args[:2])}: ")
    assert all(command in err for command in ("bench step", "bench loader", "bench store", "bench accuracy"))
    assert "lodaer" not in args or "did you mean 'bench loader'" in err


@pytest.mark.parametrize("second", ["loader", "store"])
def test_commands_of_two_words_have_help_and_a_line_in_the_overview(second, capsys):
    with pytest.raises(SystemExit) as stop:
        run(["bench", second, "--help"])
    assert not stop.value.code
    assert f"usage: fastmae bench {second}" in capsys.readouterr().out
    assert f"  bench {second}" in overview()
