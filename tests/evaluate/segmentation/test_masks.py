import numpy as np
import pytest
from PIL import Image

from fastmae.errors import InputError
from fastmae.evaluate.segmentation.masks import MaskEncoding, mask_size, read_mask
from fastmae.images import decode


def test_grey_palette_1_bit_and_16_bit_masks_hold_the_same_ids(tmp_path):
    ids = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette([200, 0, 0, 0, 200, 0] + [0] * 762)
    assert palette.mode == "P"
    images = {
        "grey": Image.fromarray(ids),
        "palette": palette,
        "1_bit": Image.fromarray(ids.astype(bool)),
        "16_bit": Image.fromarray(ids.astype(np.uint16)),
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        read = read_mask(tmp_path / f"{name}.png", MaskEncoding())
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, ids, err_msg=name)
        assert mask_size(tmp_path / f"{name}.png") == (3, 2)


@pytest.mark.parametrize("read", [lambda path: read_mask(path, MaskEncoding()), mask_size])
def test_a_mask_with_colours_is_refused(shapes, read):
    mask = shapes / "masks" / "train" / "02.png"
    Image.open(mask).convert("RGB").save(mask)
    with pytest.raises(InputError, match=r"02\.png: has colours \(RGB\)"):
        read(mask)


@pytest.mark.parametrize("read", [lambda path: read_mask(path, MaskEncoding()), mask_size])
def test_a_mask_that_declares_too_many_pixels_is_refused(shapes, read, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    with pytest.raises(InputError, match=r"02\.png: declares 94 x 72 pixels"):
        read(shapes / "masks" / "train" / "02.png")


def test_ids_above_255_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "wide.png")
    with pytest.raises(InputError, match=r"wide\.png: holds the id 1000"):
        read_mask(tmp_path / "wide.png", MaskEncoding())


def test_a_truncated_mask_is_named(shapes):
    mask = shapes / "masks" / "train" / "02.png"
    mask.write_bytes(mask.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"02\.png: damaged"):
        read_mask(mask, MaskEncoding())
