import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from fastmae.images import jpeg


def picture(size, channels):
    image = Image.fromarray(load_sample_image("china.jpg")).resize((size, size))
    return torch.from_numpy(np.atleast_3d(np.array(image.convert("RGB" if channels == 3 else "L")))).permute(2, 0, 1)


def decoded_part(data, top, left, side, size, channels, mirrored=False):
    out = np.zeros((side, side, channels), np.uint8)
    jpeg.decode_part(data, top, left, size, out, mirrored)
    return out.transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [96, 72, 101, 352])
def test_every_part_is_decoded_bit_for_bit_as_in_the_whole(size, channels):
    random = np.random.default_rng(size)
    for quality in (50, 90, 100):
        data = jpeg.encode(picture(size, channels), quality).numpy()
        whole = jpeg.decode(data, channels)
        assert whole.shape == (channels, size, size)
        for _ in range(25):
            side = int(random.integers(1, size + 1))
            top, left = (int(offset) for offset in random.integers(0, size - side + 1, 2))
            expected = whole[:, top : top + side, left : left + side]
            assert np.array_equal(decoded_part(data, top, left, side, size, channels), expected)
            mirrored = decoded_part(data, top, left, side, size, channels, mirrored=True)
            assert np.array_equal(mirrored, expected[:, :, ::-1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_a_part_of_whole_blocks_is_written_where_it_belongs_and_nowhere_else(channels, mirrored, contiguous):
    data = jpeg.encode(picture(96, channels), 90).numpy()
    whole = jpeg.decode(data, channels)
    for side in (16, 48, 96):
        for top in range(0, 96 - side + 1, 16):
            for left in range(0, 96 - side + 1, 16):
                memory = np.full((3, side, side, channels) if contiguous else (3, channels, side, side), 7, np.uint8)
                outs = memory if contiguous else memory.transpose(0, 2, 3, 1)
                jpeg.decode_part(data, top, left, 96, outs[1], mirrored)
                expected = whole[:, top : top + side, left : left + side].transpose(1, 2, 0)
                assert np.array_equal(outs[1], expected[:, ::-1] if mirrored else expected)
                assert (outs[[0, 2]] == 7).all()


def test_parts_can_be_decoded_in_several_threads_at_once():
    data = jpeg.encode(picture(352, 3), 90).numpy()
    whole = jpeg.decode(data, 3)
    offsets = [int(offset) for offset in np.random.default_rng(0).integers(0, 352 - 224 + 1, 64)]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda offset: decoded_part(data, offset, offset, 224, 352, 3, offset % 2 == 1), offsets))
    for offset, part in zip(offsets, parts, strict=True):
        expected = whole[:, offset : offset + 224, offset : offset + 224]
        assert np.array_equal(part, expected[:, :, ::-1] if offset % 2 else expected)


def test_a_jpeg_that_ends_early_is_not_decoded():
    data = jpeg.encode(picture(96, 3), 90).numpy()
    for length in (len(data) // 2, 700, 20):
        with pytest.raises((IndexError, ValueError)):
            decoded_part(data[:length], 48, 48, 48, 96, 3)


@pytest.mark.promise("stores")
@pytest.mark.parametrize(("size", "channels"), [(96, 3), (101, 3), (101, 1), (8, 1)])
def test_what_was_encoded_passes_the_check(size, channels):
    jpeg.check(jpeg.encode(picture(size, channels), 90).numpy(), size, channels)


def saved(size=96, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((size, size), np.uint8)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.promise("stores")
@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (saved(112, restart_marker_blocks=1), "no image of 96 x 96 pixels and 3 channels"),
        (saved(mode="L", restart_marker_blocks=1), "no image of 96 x 96 pixels and 3 channels"),
        (saved(subsampling="4:4:4", restart_marker_blocks=1), "4:2:0"),
        (saved(subsampling="4:2:0"), "marked one by one"),
        (saved(subsampling="4:2:0", restart_marker_blocks=1) + b"x", "marked one by one"),
        (saved(progressive=True), "header is incomplete"),
        (b"", "out of range"),
        (b"\x89PNG", "out of range"),
    ],
)
def test_an_image_of_which_no_part_can_be_decoded_alone_fails_the_check(data, cause):
    with pytest.raises((IndexError, ValueError), match=cause):
        jpeg.check(np.frombuffer(bytearray(data), np.uint8), 96, 3)


@pytest.mark.promise("stores")
def test_a_header_that_declares_gigabytes_is_refused_before_anything_is_decoded():
    data = jpeg.encode(picture(96, 3), 90).numpy()
    sides = data.tobytes().index(b"\x00\x60\x00\x60")
    data[sides : sides + 4] = 255
    with pytest.raises(ValueError, match="no image of 96 x 96"):
        jpeg.decode_middle(data, 96, 3)


def test_any_jpeg_reader_can_read_the_whole():
    data = jpeg.encode(picture(96, 3), 90).numpy()
    image = Image.open(io.BytesIO(data.tobytes()))
    assert (image.format, image.size, image.mode) == ("JPEG", (96, 96), "RGB")
    difference = np.asarray(image).astype(int) - jpeg.decode(data, 3).transpose(1, 2, 0)
    assert np.abs(difference).mean() < 2  # Pillow interpolates chroma; our decoder repeats it


def test_restart_markers_add_less_than_6_percent():
    pixels = picture(352, 3)
    plain = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(plain, "JPEG", quality=90, subsampling="4:2:0", optimize=True)
    assert len(jpeg.encode(pixels, 90)) < 1.06 * len(plain.getvalue())
