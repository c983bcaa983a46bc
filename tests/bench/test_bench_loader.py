"""`bench loader`: its figures agree with each other, MAE's side is MAE's, and the two-word commands are found and named."""

import json
import shutil

import pytest
import torch
from PIL import Image
from torchvision import transforms

from fastmae.bench.bench_loader import MAE, MaeImages
from fastmae.bench.timing import Rate, interleave
from fastmae.cli import overview, run
from fastmae.images.sources import open_source

SMALL = [
    "--middle-size",
    "96",
    "--image-size",
    "64",
    "--batch-size",
    "8",
    "--rounds",
    "2",
    "--device",
    "cpu",
    "--workers",
    "0",
]


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


def test_rates_times_and_shares_agree_and_the_markdown_file_says_what_they_hold_for(photos, bench, tmp_path):
    threads, drawn = torch.get_num_threads(), torch.random.get_rng_state()
    file = tmp_path / "loader.md"
    result, err = bench(photos, "--codecs", "fp16,pq16", "--sample", "20", "--out", str(file))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), drawn)
    mae, *ours = result["rows"]
    stores = [f"fastmae: {pixels} pixels, {codec} tokens" for pixels in ("jpeg", "raw") for codec in ("fp16", "pq16")]
    assert [mae["method"], *(row["method"] for row in ours)] == [
        MAE, *(name + more for name in stores for more in ("", ", normalised here"))
    ]  # fmt: skip
    assert result["images"] == 20
    for row in result["rows"]:
        rate = row["images_per_second"]
        assert row["images_per_second_min"] <= rate <= row["images_per_second_max"]
        assert row["milliseconds_per_image"] == pytest.approx(1000 / rate, rel=0.01)
        assert row["times_mae"] == pytest.approx(rate / mae["images_per_second"], rel=0.01, abs=0.01)
        shares = [row[f"share_{part}"] for part in ("decode", "copy", "tokens", "draws", "rest")]
        assert sum(share for share in shares if share is not None) == pytest.approx(1, abs=0.01)
        assert (row["first_pass_images_per_second"] is None) == (row is mae or "normalised" in row["method"])
    assert mae["share_copy"] is mae["share_tokens"] is mae["share_draws"] is None
    assert all((row["share_decode"] == 0) == ("raw" in row["method"]) for row in ours)
    text = file.read_text()
    assert all(f"| {row['method']} |" in text for row in result["rows"])
    assert all(f"- {name}: {value}" in text for name, value in result["settings"].items())
    assert {"CPU", "cores", "torch", "fastmae", "images", "sizes"} <= result["settings"].keys()
    assert "20 of" in result["settings"]["images"]
    assert MAE in err


def test_an_image_that_one_side_can_not_decode_is_loaded_by_neither(photos, bench, tmp_path):
    shutil.copytree(photos / "val", tmp_path / "images")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no")
    result, _ = bench(tmp_path / "images", "--codecs", "fp16")
    assert result["images"] == 10


def test_maes_batch_is_what_its_authors_transforms_make_of_the_files(photos):
    source = open_source(photos)
    entries = sorted(source.entries())[:3]
    torch.manual_seed(5)
    batch = MaeImages.of(source, entries, 48).batch([2, 0])
    steps = transforms.Compose([
        transforms.RandomResizedCrop(48, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    torch.manual_seed(5)
    assert torch.equal(
        batch, torch.stack([steps(Image.open(photos / entries[index].decode()).convert("RGB")) for index in (2, 0)])
    )


def test_works_take_turns_and_the_first_round_does_not_count():
    calls = []

    def work(name):
        return lambda number: calls.append((number, name)) or 10.0 * number + (name == "b")

    assert interleave({"a": work("a"), "b": work("b")}, 3) == {"a": [10.0, 20.0, 30.0], "b": [11.0, 21.0, 31.0]}
    assert calls == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b"), (3, "b"), (3, "a")]
    assert Rate.of(20, [4.0, 1.0, 2.0]) == Rate(median=10.0, least=5.0, most=20.0)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--image-size", "60"], "--image-size 60: not a multiple of --patch-size 16; take 64"),
        (["--image-size", "112"], "larger than --middle-size 96"),
        (["--middle-size", "100"], "--middle-size 100: not a multiple"),
        (["--codecs", "fp17"], "fp17"),
        (["--codecs", "fp16,fp16"], "names one twice"),
        (["--sample", "0"], "--sample 0"),
        (["--rounds", "0"], "--rounds 0"),
        (["--out", "no-such-folder/x.md"], "its folder does not exist"),
        (["--teacher", "no-such"], "no teacher 'no-such'"),
    ],
)
def test_what_it_can_not_take_is_one_line(args, says, photos, options, capsys):
    assert run(["bench", "loader", str(photos), *options, *args]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("fastmae bench loader: ")
    assert says in err


def test_a_folder_without_an_image_that_both_can_decode_is_one_line(options, tmp_path, capsys):
    assert run(["bench", "loader", str(tmp_path), *options]) == 2
    assert "no image in it" in capsys.readouterr().err
    (tmp_path / "broken.jpg").write_bytes(b"no")
    assert run(["bench", "loader", str(tmp_path), *options]) == 2
    assert "none of the 1 images tried could be decoded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["bench"], "fastmae bench: no such command"),
        (["bench", "lodaer", "x"], "fastmae bench lodaer: no such command; did you mean 'bench loader'"),
    ],
)
def test_a_wrong_second_word_is_one_line_that_lists_the_right_ones(args, says, capsys):
    assert run(args) == 2
    assert capsys.readouterr() == ("", f"{says}; commands: bench step, bench loader, bench store, bench accuracy\n")


@pytest.mark.parametrize("second", ["loader", "store"])
def test_two_word_commands_have_help_and_stand_in_the_overview(second, capsys):
    with pytest.raises(SystemExit) as stop:
        run(["bench", second, "--help"])
    assert not stop.value.code
    assert f"usage: fastmae bench {second}" in capsys.readouterr().out
    assert f"  bench {second}" in overview()
