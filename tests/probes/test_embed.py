"""One vector per image, against timm's own forward pass."""

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

from fastmae.errors import InputError
from fastmae.images.views import IMAGENET_MEAN, IMAGENET_STD
from fastmae.probes.embed import WholeImages, embed_images, embed_with_encoder, room_for

PIXELS = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=0).eval()


@pytest.fixture(scope="module")
def tokens(encoder):
    """Class token and patch tokens of `PIXELS`, [5, 1 + 4, 192]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        return encoder.forward_features((PIXELS / 255 - mean) / std)


@torch.inference_mode()
def test_an_image_is_embedded_by_the_mean_of_its_patch_tokens_or_by_its_class_token(encoder, tokens):
    assert torch.allclose(embed_with_encoder(encoder, "mean")(PIXELS), tokens[:, 1:].mean(1), atol=1e-5)
    assert torch.allclose(embed_with_encoder(encoder, "class")(PIXELS), tokens[:, 0], atol=1e-5)


@torch.inference_mode()
def test_the_last_block_is_the_default_and_may_be_counted_from_either_end(encoder):
    last = embed_with_encoder(encoder, "mean")(PIXELS)
    assert torch.equal(embed_with_encoder(encoder, "mean", 2)(PIXELS), last)
    assert torch.equal(embed_with_encoder(encoder, "mean", -1)(PIXELS), last)
    first = embed_with_encoder(encoder, "mean", 0)(PIXELS)
    assert torch.equal(embed_with_encoder(encoder, "mean", -3)(PIXELS), first)
    assert not torch.allclose(first, last, atol=1e-2)


@pytest.mark.parametrize("block", [3, -4])
def test_a_block_that_does_not_exist_is_refused(block, encoder):
    with pytest.raises(InputError, match=f"--block {block}"):
        embed_with_encoder(encoder, "mean", block)


def test_the_features_do_not_depend_on_the_batch_size(encoder, tokens):
    embed, dataset = embed_with_encoder(encoder, "mean"), TensorDataset(PIXELS)
    for batch_size in (2, 5):
        features = embed_images(dataset, embed, torch.device("cpu"), batch_size, 0, "features", quiet=True)
        assert torch.allclose(features, tokens[:, 1:].mean(1), atol=1e-5)


@pytest.mark.parametrize(("free", "home"), [(5 * 192 * 4 * 2, "meta"), (5 * 192 * 4 * 2 - 1, "cpu")])
def test_features_stay_on_their_device_if_they_take_at_most_half_of_its_free_memory(free, home, monkeypatch):
    monkeypatch.setattr("fastmae.probes.embed.free_bytes", lambda device: free)
    assert room_for(5, torch.empty(2, 192, device="meta")).device.type == home


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"broken\.jpg"):
        WholeImages([tmp_path / "broken.jpg"], 32, "whole", 3)[0]


@torch.inference_mode()
def test_a_network_that_is_no_plain_vit_is_embedded_by_the_mean_of_its_last_map_or_of_a_stage():
    network = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = (PIXELS / 255 - mean) / std
    last = network.forward_features(images).mean((2, 3))
    torch.testing.assert_close(embed_with_encoder(network, "mean")(PIXELS), last)
    torch.testing.assert_close(embed_with_encoder(network, "mean", -1)(PIXELS), last)
    second = network.forward_intermediates(images, indices=[1], intermediates_only=True)[0].mean((2, 3))
    torch.testing.assert_close(embed_with_encoder(network, "mean", 1)(PIXELS), second)


@pytest.mark.parametrize(("pool", "block", "named"), [("class", None, "--pool class"), ("mean", 5, "stages 0 to 4")])
def test_what_a_network_without_a_class_token_or_stage_is_asked_for_is_refused(pool, block, named):
    with pytest.raises(InputError, match=named):
        embed_with_encoder(timm.create_model("resnet10t", num_classes=0), pool, block)
