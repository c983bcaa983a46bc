"""16-bit, integer and float values become the 8-bit values that a value range gives, by its formula."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastmae.errors import InputError
from fastmae.images import value_range as module
from fastmae.images.decode import UndecodableError, decode_bands
from fastmae.images.value_range import bounds_of, sample_of, text_of, to_8_bits

pytestmark = pytest.mark.promise("values")

GRADIENT = np.linspace(0, 1, 24 * 40).reshape(24, 40)
TWELVE_BITS = np.rint(GRADIENT * 4095).astype(np.uint16)
HOUNSFIELD = np.rint(GRADIENT * 4000 - 1024).astype(np.int32)
METRES = (GRADIENT * 3.5).astype(np.float32)


def decoded(values, suffix, value_range, channels=1):
    """The 8-bit values of an image file: [H, W, channels]."""
    file = io.BytesIO()
    if suffix == ".npy":
        np.save(file, values)
    else:
        Image.fromarray(values).save(file, {".png": "PNG", ".tif": "TIFF"}[suffix])
    file.seek(0)
    bands, (width, height) = decode_bands(file, f"x{suffix}", channels, value_range=value_range)
    assert (height, width) == values.shape[:2]
    return np.concatenate([np.atleast_3d(np.asarray(band)) for band in bands], axis=2)


def expected(values, low, high):
    return np.rint((values.astype(np.float64) - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("values", "suffix", "low", "high"),
    [
        (TWELVE_BITS, ".png", 0, 4095),
        (TWELVE_BITS, ".tif", 100, 3000),
        (TWELVE_BITS, ".npy", 0, 4095),
        (HOUNSFIELD, ".tif", -1000, 400),
        (HOUNSFIELD, ".npy", -1000, 400),
        (HOUNSFIELD.astype(np.int16), ".npy", -1000, 400),
        (METRES, ".tif", 0.5, 3.5),
        (METRES.astype(np.float64), ".npy", 0.5, 3.5),
        (METRES.astype(">f4"), ".npy", 0.5, 3.5),
        ((GRADIENT * 50).astype(np.uint8), ".npy", 0, 50),
    ],
)
def test_values_are_mapped_linearly_clipped_and_rounded(values, suffix, low, high):
    mapped = decoded(values, suffix, text_of(low, high))[..., 0]
    np.testing.assert_array_equal(mapped, expected(values, low, high))
    assert (mapped.min(), mapped.max()) == (0, 255)


def test_grey_values_become_the_same_in_all_three_colours():
    mapped = decoded(TWELVE_BITS, ".png", "0 4095", channels=3)
    np.testing.assert_array_equal(mapped, expected(np.dstack([TWELVE_BITS] * 3), 0, 4095))


def test_all_channels_of_an_array_have_one_range():
    values = np.stack([TWELVE_BITS // scale for scale in (1, 2, 4, 8, 16)], axis=2)
    np.testing.assert_array_equal(decoded(values, ".npy", "0 4095", channels=5), expected(values, 0, 4095))
    low, high = np.percentile(values, (0.5, 99.5))
    np.testing.assert_array_equal(decoded(values, ".npy", "file", channels=5), expected(values, low, high))


@pytest.mark.parametrize(("values", "suffix"), [(TWELVE_BITS, ".png"), (HOUNSFIELD, ".tif"), (METRES, ".tif")])
def test_file_takes_the_percentiles_of_each_image(values, suffix):
    low, high = np.percentile(values, (0.5, 99.5))
    np.testing.assert_array_equal(decoded(values, suffix, "file")[..., 0], expected(values, low, high))


def test_file_takes_the_extremes_where_nearly_all_values_are_the_same():
    values = np.zeros((100, 100), np.uint16)
    values[50, 50] = 4000
    assert np.unique(to_8_bits(values, "file")).tolist() == [0, 255]


@pytest.mark.parametrize("value", [0, 4000])
def test_an_image_of_one_value_is_black_by_its_own_range(value):
    assert (to_8_bits(np.full((5, 4), value, np.uint16), "file") == 0).all()


def test_values_that_are_no_numbers_are_black_and_do_not_count():
    values = METRES.copy()
    values[0] = np.nan
    values[1, :5], values[1, 5:10] = np.inf, -np.inf
    sound = np.isfinite(values)
    low, high = np.percentile(values[sound].astype(np.float64), (0.5, 99.5))
    mapped = to_8_bits(values, "file")
    assert (mapped[0] == 0).all()
    assert mapped[1, 0] == 255
    assert mapped[1, 5] == 0
    np.testing.assert_array_equal(mapped[sound], expected(values[sound], low, high))
    assert (to_8_bits(np.full((3, 3), np.nan), "file") == 0).all()


def test_a_large_image_is_mapped_strip_by_strip_to_the_same_values(monkeypatch):
    whole = to_8_bits(TWELVE_BITS, "0 4095")
    monkeypatch.setattr(module, "STRIP_VALUES", 100)
    np.testing.assert_array_equal(to_8_bits(TWELVE_BITS, "0 4095"), whole)


def test_a_sample_has_about_as_many_values_as_asked_for():
    values = np.arange(1000 * 1000, dtype=np.float32).reshape(1000, 1000)
    assert len(sample_of(values, 10_000)) == 10_000
    assert len(sample_of(values, 10**7)) == 10**6


def test_pictures_of_8_bits_are_not_changed():
    picture = (np.dstack([GRADIENT] * 3) * 90).astype(np.uint8)
    np.testing.assert_array_equal(decoded(picture, ".png", "0 50", channels=3), picture)
    np.testing.assert_array_equal(decoded(picture[..., 0], ".png", "file")[..., 0], picture[..., 0])


def test_arrays_without_a_known_range_are_refused_with_the_way_out():
    with pytest.raises(UndecodableError, match="--value-range maps any values"):
        decoded(HOUNSFIELD, ".npy", "auto")


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 3)])
def test_a_png_of_16_bits_in_several_channels_is_refused_since_half_of_its_bits_are_not_read(colour_type, channels):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    samples = {2: 3, 4: 2, 6: 4}[colour_type]
    row = b"\0" + np.full(4 * samples, 4000, ">u2").tobytes()
    header = struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(4 * row)) + chunk(b"IEND", b"")
    assert len(decode_bands(io.BytesIO(png), "x.png", channels)[0])
    with pytest.raises(UndecodableError, match="16 bits in several channels"):
        decode_bands(io.BytesIO(png), "x.png", channels, value_range="file")


@pytest.mark.parametrize(("low", "high"), [(-1000, 400), (0.1, 1 / 3), (0, 1e300), (-0.5, 65535)])
def test_two_numbers_are_the_same_after_they_were_written_down(low, high):
    assert bounds_of(text_of(low, high)) == (low, high)


def test_a_range_is_written_as_it_is_typed():
    assert text_of(-1000, 400.5) == "-1000 400.5"


@pytest.mark.parametrize("text", ["", "set", "1", "2 1", "1 1", "nan 1", "0 inf", "0 1 2", "a b"])
def test_a_text_that_is_no_range_is_refused(text):
    with pytest.raises(InputError, match="no value range"):
        bounds_of(text)
