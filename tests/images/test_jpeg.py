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
            part = jpeg.decode_part(data, top, left, side, size, channels)
            assert np.array_equal(part, whole[:, top : top + side, left : left + side])


def test_parts_decoded_in_two_threads_do_not_share_memory():
    data = jpeg.encode(picture(96, 3), 90).numpy()
    here = jpeg.decode_part(data, 0, 0, 64, 96, 3)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(jpeg.decode_part, data, 32, 32, 64, 96, 3).result()
    whole = jpeg.decode(data, 3)
    assert np.array_equal(here, whole[:, :64, :64])
    assert np.array_equal(there, whole[:, 32:, 32:])
    assert not np.shares_memory(here, there)


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
