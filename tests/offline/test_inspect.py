"""`inspect --quality`: the suspicious images of a store, counted and drawn."""

import json
import shutil

import pytest
from PIL import Image

from fastmae.cli import run


@pytest.fixture
def odd_store(photos, tokenize, tmp_path):
    """A store of three photos, one of them twice, and a picture of one colour."""
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted((photos / "train").rglob("*.png"))[:3]):
        shutil.copy(path, images / f"{number}.png")
    shutil.copy(images / "0.png", images / "$x_{\\frac$ é.png")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(images / "red.png")
    assert tokenize(images, tmp_path / "odd.tokens")[0] == 0
    return tmp_path / "odd.tokens"


def test_the_suspicious_images_are_drawn_beside_the_store(odd_store, verify, printed_json, contents):
    before = contents(odd_store)
    assert run(["inspect", str(odd_store), "--quality", "--json"]) == 0
    quality = printed_json()["quality"]
    assert quality["one_colour"] == {"images": 1, "example": "red.png"}
    assert quality["near_duplicates"] == {"images": 1, "example": "0.png"}
    assert quality["few_levels"] == {"images": 0, "example": None}
    assert quality["sheet"] == f"{odd_store}-quality.png"
    sheet = Image.open(quality["sheet"])
    assert sheet.getpixel((72, 72)) == (200, 30, 30)  # the first picture: `SIDE` pixels behind a gap
    assert sheet.size == (2 * 272 + 8, 180 + 8)  # two entries in a row
    assert contents(odd_store) == before
    assert verify(odd_store)[0] == 0


def test_the_sheet_is_written_where_out_says_but_never_into_the_store(odd_store, error_line, tmp_path):
    out = tmp_path / "new" / "sheet.png"
    assert run(["inspect", str(odd_store), "--quality", "--out", str(out)]) == 0
    assert Image.open(out).format == "PNG"
    line = error_line(["inspect", str(odd_store), "--quality", "--out", str(odd_store / "shards" / "sheet.png")])
    assert "is inside the store" in line
    assert "give that too" in error_line(["inspect", str(odd_store), "--out", str(out)])


def test_a_store_without_suspicious_images_gets_no_sheet(vit_store, printed_json, capsys):
    assert run(["inspect", str(vit_store), "--quality"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing looks wrong; 30 images looked at"
    assert run(["inspect", str(vit_store), "--quality", "--json"]) == 0
    assert printed_json()["quality"]["sheet"] is None
    assert not vit_store.with_name("vit.tokens-quality.png").exists()


def test_sizes_are_told_in_full_and_in_a_readable_unit(vit_store, capsys):
    assert run(["inspect", str(vit_store)]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert run(["inspect", str(vit_store), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert f"weights_sha256 {summary['teacher']['weights_sha256'][:12]}..." in lines["teacher"]
    assert lines["bytes"] == f"{summary['bytes']:,} ({summary['bytes'] / 1e6:.1f} MB)"
    assert lines["bytes_per_image"] == f"{summary['bytes_per_image']:,} ({summary['bytes_per_image'] / 1e3:.1f} kB)"
