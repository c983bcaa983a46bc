import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastmae.images import decode as decode_module
from fastmae.images.decode import UndecodableError, decode_bands, decode_image, upright_size
from fastmae.images.rgb import to_rgb


def gradient(height=24, width=40):
    values = np.add.outer(np.arange(height) * 5, np.arange(width) * 3)
    return np.stack([values, values[::-1], values[:, ::-1]], -1).clip(0, 255).astype(np.uint8)


def decode(path, at_least=None):
    with path.open("rb") as file:
        return decode_image(file, at_least)


def bands_of(path, channels):
    with path.open("rb") as file:
        return decode_bands(file, path.name, channels)


def decoded(image, path, **options):
    image.save(path, **options)
    rgb, size = decode(path)
    assert rgb.mode == "RGB"
    return np.asarray(rgb).astype(int), size


def test_rgb_pixels_are_kept_exactly(tmp_path):
    pixels, size = decoded(Image.fromarray(gradient()), tmp_path / "x.png")
    assert (pixels == gradient()).all()
    assert size == (40, 24)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_decoded_upright(orientation, tmp_path):
    upright = Image.fromarray(gradient())
    # A camera held in that orientation stores the inverse of what a viewer must do.
    transpose = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, size = decoded(
        upright.transpose(transpose) if transpose is not None else upright, tmp_path / "x.png", exif=exif
    )
    assert (pixels == gradient()).all()
    assert size == (40, 24)


def test_grey_palette_and_one_bit_images_become_rgb(tmp_path):
    grey = Image.fromarray(gradient()[..., 0])
    pixels, _ = decoded(grey, tmp_path / "grey.png")
    assert (pixels == gradient()[..., :1]).all()
    pixels, _ = decoded(Image.fromarray(gradient()).quantize(256), tmp_path / "palette.png")
    assert abs(pixels - gradient()).mean() < 12
    pixels, _ = decoded(grey.point(lambda v: 255 * (v > 128)).convert("1"), tmp_path / "bits.png")
    assert set(np.unique(pixels)) == {0, 255}


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    values = (np.arange(24 * 40).reshape(24, 40) * 68).astype(np.uint16)
    pixels, _ = decoded(Image.fromarray(values), tmp_path / "x.png")
    assert (pixels == (values >> 8)[..., None]).all()


def test_transparent_pixels_become_white(tmp_path):
    rgba = np.dstack([gradient(), np.zeros((24, 40), np.uint8)])
    rgba[:, :20, 3] = 255
    pixels, _ = decoded(Image.fromarray(rgba), tmp_path / "x.png")
    assert (pixels[:, :20] == gradient()[:, :20]).all()
    assert (pixels[:, 20:] == 255).all()


def test_cmyk_and_lab_are_converted_close_to_their_rgb(tmp_path):
    photo = Image.fromarray(gradient()).convert("CMYK")
    pixels, _ = decoded(photo, tmp_path / "x.jpg", quality=100, subsampling=0)
    assert abs(pixels - gradient()).mean() < 6
    white = to_rgb(Image.new("LAB", (4, 4), (255, 128, 128)))  # L is at most 255, a and b are neutral at 128
    assert np.asarray(white).min() > 245


def test_a_large_image_is_reduced_only_where_a_small_one_is_wanted(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient()).save(path, exif=exif)
    monkeypatch.setattr(decode_module, "LARGE_PIXELS", 24 * 40 - 1)
    for at_least, sides in ((None, (24, 40)), (7, (24, 40)), (6, (12, 20)), (3, (6, 10))):
        image, size = decode(path, at_least)
        assert (image.size, size) == (sides, (24, 40))


def test_a_large_jpeg_is_decoded_reduced_and_its_full_size_is_returned(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(gradient()).resize((1600, 960)).save(path)
    image, size = decode(path, at_least=100)
    assert size == (1600, 960)
    assert min(image.size) >= 200
    assert image.size[0] < 1600


def test_a_truncated_file_is_refused_instead_of_half_decoded(tmp_path):
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    Image.fromarray(gradient(200, 200)).save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    with pytest.raises(UndecodableError, match="truncated"):
        decode(cut)


@pytest.mark.parametrize("content", [b"", b"<html>no</html>", b"\xff\xd8\xff\xe0" + b"\0" * 40])
def test_a_file_that_is_not_an_image_is_refused_with_a_reason(content, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(UndecodableError, match=r"not an image|damaged"):
        decode(path)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
showpage
%%EOF
"""


@pytest.mark.promise("files")
def test_a_format_that_starts_a_program_is_not_opened(tmp_path, monkeypatch):
    (tmp_path / "photo.jpg").write_bytes(EPS)
    assert Image.open(tmp_path / "photo.jpg").format == "EPS"
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **options: pytest.fail("a program was started"))
    for channels in (1, 3, 4):
        with pytest.raises(UndecodableError, match="not an image in a format that is read"):
            bands_of(tmp_path / "photo.jpg", channels)


@pytest.mark.parametrize("name", decode_module.FORMATS)
def test_pillow_has_every_format_that_is_read(name):
    Image.init()
    assert name in Image.OPEN


def test_an_image_of_too_many_pixels_is_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    Image.fromarray(gradient()).save(path)
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 24 * 40 - 1)
    with pytest.raises(UndecodableError, match="40 x 24"):
        decode(path)


def test_an_image_of_too_many_pixels_is_refused_with_any_number_of_channels(tmp_path, monkeypatch):
    Image.new("RGBA", (40, 24)).save(tmp_path / "x.png")
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 24 * 40 - 1)
    for channels in (1, 3, 4):
        with pytest.raises(UndecodableError, match="40 x 24"):
            bands_of(tmp_path / "x.png", channels)


@pytest.mark.promise("files")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.webp", {}),
        ("x.avif", {}),
        ("x.jp2", {}),
        ("x.jpg", {"progressive": True}),
        ("x.tif", {"compression": "tiff_lzw", "strip_size": 1 << 20}),
        ("x.png", {}),
    ],
)
def test_an_image_that_takes_too_much_memory_is_refused_before_decoding(name, options, tmp_path, monkeypatch):
    Image.new("RGBA" if name == "x.png" else "RGB", (400, 300)).save(tmp_path / name, **options)
    decode(tmp_path / name)
    monkeypatch.setattr(decode_module, "MAX_BYTES", 5 * 400 * 300)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(UndecodableError, match=r"400 x 300 pixels in \w+ take 0.00 GB to decode, more than"):
        decode(tmp_path / name)


MEASURE = """
import sys
from pathlib import Path
from fastmae.images import decode
from fastmae.images.codec_memory import bytes_per_pixel

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    with open(path, "rb") as file:
        image = decode.open_image(file)
        allowed = 4 * image.width * image.height + max(decode.codec_memory(image), 4 * image.width * image.height)
        decode.decode_image(file)
    print(path, peak() - before, allowed)
"""


@pytest.mark.promise("files")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_decoding_takes_no_more_memory_than_the_bound_allows(tmp_path):
    side = 1600
    rgb = Image.new("RGB", (side, side), (10, 120, 200))
    clear = rgb.convert("RGBA")
    clear.putalpha(200)
    palette = rgb.quantize(8)
    grey = np.full((side, side), 40_000, np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    rgb.save(tmp_path / "a.jpg", exif=turned)
    rgb.save(tmp_path / "b.jpg", progressive=True, subsampling=0)
    rgb.convert("CMYK").save(tmp_path / "c.tif", compression="tiff_lzw")
    clear.save(tmp_path / "d.png", compress_level=1)
    palette.save(tmp_path / "e.gif", transparency=0)
    palette.save(tmp_path / "f.png", compress_level=1, transparency=0)
    Image.fromarray(grey).save(tmp_path / "g.png", compress_level=1)
    Image.new("F", (side, side)).save(tmp_path / "h.tif")
    rgb.save(tmp_path / "i.webp", method=0)
    files = sorted(tmp_path.iterdir())
    command = [sys.executable, "-c", MEASURE, *map(str, files)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == len(files)
    for line in lines:
        name, used, allowed = line.rsplit(" ", 2)
        assert int(used) < int(allowed) + (40 << 20), name  # with a codec's own code and a few strips


def test_the_upright_size_of_a_png_needs_no_pixels_unless_metadata_follow_them(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = {}
    for name, options in {"plain": {}, "turned": {"exif": exif}}.items():
        buffer = io.BytesIO()
        Image.fromarray(gradient()).save(buffer, "PNG", **options)
        data[name] = buffer.getvalue()
    start = data["turned"].index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data["turned"][start : start + 4], "big")
    late = data["turned"][:start] + data["turned"][end:-12] + data["turned"][start:end] + data["turned"][-12:]
    assert upright_size(io.BytesIO(late)) == ((24, 40), True)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))
    assert upright_size(io.BytesIO(data["plain"])) == ((40, 24), False)
    assert upright_size(io.BytesIO(data["turned"])) == ((24, 40), True)


@pytest.mark.promise("machine")
def test_a_codec_that_ran_out_of_memory_is_not_told_as_a_damaged_file(tmp_path, monkeypatch):
    Image.fromarray(gradient()).save(tmp_path / "x.png")
    monkeypatch.setattr(decode_module, "_is_free", lambda size: False)
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:-60])
    with pytest.raises(MemoryError):
        decode(tmp_path / "x.png")


def test_a_failing_disk_is_not_blamed_on_the_image(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    Image.fromarray(gradient()).save(path)

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        decode(path)
    assert caught.value.errno == 5


def test_npy_arrays_with_any_number_of_channels_are_decoded_to_8_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 5), dtype=np.uint8)
    for name, array in {
        "8.npy": values,
        "16.npy": values.astype(np.uint16) * 256 + 7,
        "float.npy": values / 255,
    }.items():
        np.save(tmp_path / name, array)
        bands, size = bands_of(tmp_path / name, 5)
        assert size == (30, 20)
        assert (np.stack([np.asarray(band) for band in bands], axis=2) == values).all()
    np.save(tmp_path / "rgb.npy", values[..., :3])
    (rgb,), _ = bands_of(tmp_path / "rgb.npy", 3)
    assert (rgb.mode, rgb.size) == ("RGB", (30, 20))
    np.save(tmp_path / "flat.npy", values[..., 0])
    (grey,), _ = bands_of(tmp_path / "flat.npy", 1)
    assert (np.asarray(grey) == values[..., 0]).all()


def test_an_array_that_takes_too_much_memory_is_refused_before_its_values_are_read(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.zeros((10, 10, 5), np.float32))
    bands_of(tmp_path / "x.npy", 5)
    monkeypatch.setattr(decode_module, "MAX_BYTES", 7 * 500 - 1)
    with pytest.raises(UndecodableError, match=r"an array of 500 values of float32 takes 0.00 GB to decode, more than"):
        bands_of(tmp_path / "x.npy", 5)


def test_grey_is_the_luma_of_colours_and_four_bands_are_kept(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    (grey,), _ = bands_of(tmp_path / "red.png", 1)
    assert np.asarray(grey)[0, 0] == 76  # 0.299 of 255
    Image.new("RGBA", (4, 3), (1, 2, 3, 4)).save(tmp_path / "four.png")
    bands, size = bands_of(tmp_path / "four.png", 4)
    assert ([band.getpixel((0, 0)) for band in bands], size) == ([1, 2, 3, 4], (4, 3))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4, 2), np.uint8), "has 2 channels, not 5"),
        (np.zeros((4, 4, 5)) + 3.0, "neither 8 nor 16 bits"),
        (np.zeros((4, 4, 5), np.int64), "neither 8 nor 16 bits"),
        (np.zeros((4,), np.uint8), "not \\[H, W, channels\\]"),
        (np.array([{"a": 1}], dtype=object), "not a plain .npy array"),
    ],
)
def test_an_array_that_is_not_an_image_is_refused_with_a_reason(array, reason, tmp_path):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(UndecodableError, match=reason):
        bands_of(tmp_path / "x.npy", 5)
    header = "{'descr': '<u1', 'fortran_order': False, 'shape': (" + "(" * 300
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(UndecodableError, match="not a plain"):
        bands_of(tmp_path / "x.npy", 5)
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UndecodableError, match="not a plain"):
        bands_of(tmp_path / "x.npy", 5)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(UndecodableError, match="has 3 channels, not 5"):
        bands_of(tmp_path / "x.png", 5)


def test_an_image_in_memory_is_decoded_like_its_file(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "x.webp", lossless=True)
    np.save(tmp_path / "x.npy", gradient())
    for name in ("x.webp", "x.npy"):
        (image,), size = decode_bands(io.BytesIO((tmp_path / name).read_bytes()), f"photos.tar/a/{name}", 3)
        assert (np.asarray(image) == gradient()).all()
        assert size == (40, 24)


def test_npy_arrays_in_fortran_order_or_big_endian_keep_their_values(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 5), dtype=np.uint8)
    np.save(tmp_path / "x.npy", np.asfortranarray(values))
    np.save(tmp_path / "y.npy", (values / 255).astype(">f4"))
    for name in ("x.npy", "y.npy"):
        bands, _ = bands_of(tmp_path / name, 5)
        assert (np.stack([np.asarray(band) for band in bands], axis=2) == values).all()


def npy_declaring(shape, descr="|u1", values=b""):
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return io.BytesIO(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + values)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy_declaring((10_000, 10_000, 5), values=b"few"), "declares 500000000 bytes and holds 3"),
        (npy_declaring((10_000, 10_000, 5), descr="<f8"), "declares 4000000000 bytes and holds 0"),
        (npy_declaring((1, 1, 10**18)), "channels, not 5"),
        (npy_declaring((-4, -4, 5), values=bytes(80)), "not \\[H, W, channels\\]"),
        (npy_declaring((10**9, 10**9, 5)), "not \\[H, W, channels\\]"),
        (npy_declaring((4, 4, 5), descr="|O", values=bytes(640)), "not a plain .npy array: Python objects"),
        (npy_declaring((4, 4, 5), descr=[("a", "|u1")], values=bytes(80)), "neither 8 nor 16 bits"),
        (io.BytesIO(b"\x93NUMPY\x01\x00\xff\xff" + b"-" * 9000), "not a plain .npy array"),
        (io.BytesIO(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"), "not a plain .npy array"),
        (io.BytesIO(b"\x93NUMPY\x03\x00" + bytes(100)), "not a plain .npy array"),
        (io.BytesIO(b""), "not a plain .npy array"),
    ],
)
def test_npy_values_are_read_only_if_the_file_holds_all_that_its_header_declares(content, reason):
    with pytest.raises(UndecodableError, match=reason):
        decode_bands(content, "x.npy", 5)
