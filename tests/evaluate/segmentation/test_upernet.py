import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fastmae.errors import InputError
from fastmae.evaluate.segmentation.upernet import UperNet, segmentation_loss, sync_batch_norms, tapped_blocks
from fastmae.runtime.arithmetic import deterministic_kernels

SMALL = {
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 0,
    "img_size": 64,
    "patch_size": 16,
    "dynamic_img_size": True,
}
ENCODERS = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]


def small_network(name="vit_tiny_patch16_224"):
    torch.manual_seed(0)
    return UperNet(timm.create_model(name, **SMALL), num_classes=5, head_channels=16)


def test_maps_are_taken_after_blocks_4_6_8_and_12_of_12_and_at_the_same_shares_of_other_depths():
    assert tapped_blocks(12) == [4, 6, 8, 12]
    assert tapped_blocks(24) == [8, 12, 16, 24]
    assert tapped_blocks(4) == [1, 2, 3, 4]
    assert tapped_blocks(1) == [1, 1, 1, 1]
    for depth in range(1, 41):
        blocks = tapped_blocks(depth)
        assert blocks == sorted(blocks)
        assert blocks[-1] == depth


def test_the_pyramid_has_four_scales_of_the_tapped_blocks_without_the_final_norm():
    network = small_network().eval()
    images = torch.randn(2, 3, 64, 96)
    tokens, pyramid = {}, {}
    for number, block in enumerate(network.encoder.blocks, 1):
        block.register_forward_hook(lambda *args, number=number: tokens.__setitem__(number, args[2]))
    network.pyramid.register_forward_hook(lambda _, args, maps: pyramid.update(inputs=args[0], maps=maps))
    main_scores, auxiliary_scores = network(images)
    for number, block_map in enumerate(pyramid["inputs"], 1):
        torch.testing.assert_close(block_map, tokens[number][:, 1:].transpose(1, 2).unflatten(2, (4, 6)))
    shapes = [tuple(scaled.shape) for scaled in pyramid["maps"]]
    assert shapes == [(2, 32, 16, 24), (2, 32, 8, 12), (2, 32, 4, 6), (2, 32, 2, 3)]
    torch.testing.assert_close(pyramid["maps"][3], F.max_pool2d(pyramid["inputs"][3], 2))
    assert (main_scores.shape, auxiliary_scores.shape) == ((2, 5, 16, 24), (2, 5, 4, 6))


def test_the_heads_follow_the_recipe():
    network = small_network()
    assert tuple(network.head.pool_scales) == (1, 2, 3, 6)
    assert (network.head.channels, network.auxiliary.channels, network.auxiliary.in_index) == (16, 256, 2)
    for head in (network.head, network.auxiliary):
        dropout, classifier = head.classifier
        assert dropout.p == 0.1
        assert classifier.out_channels == 5


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_that_requires_a_gradient_gets_one(name):
    network = small_network(name)
    masks = torch.randint(0, 5, (2, 64, 64), dtype=torch.uint8)
    segmentation_loss(network(torch.randn(2, 3, 64, 64)), masks)["loss"].backward()
    parameters = dict(network.named_parameters())
    assert [name for name, weight in parameters.items() if weight.requires_grad and weight.grad is None] == []
    frozen = [name for name, weight in parameters.items() if not weight.requires_grad]
    assert frozen == ["encoder.norm.weight", "encoder.norm.bias"]


def test_an_encoder_of_one_block_gives_all_four_maps():
    network = UperNet(timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 1}), 3, 8).eval()
    assert network(torch.randn(1, 3, 32, 32))[0].shape == (1, 3, 8, 8)


def test_the_loss_is_the_cross_entropy_of_both_heads_over_the_pixels_that_are_not_ignored():
    torch.manual_seed(0)
    head_scores = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)
    masks = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    masks[0, :5] = 255
    expected = []
    for scores in head_scores:
        log_probabilities = F.interpolate(scores, size=(8, 8), mode="bilinear", align_corners=False).log_softmax(1)
        pixel_losses = [
            -log_probabilities[image, int(masks[image, row, col]), row, col]
            for image in range(2)
            for row in range(8)
            for col in range(8)
            if masks[image, row, col] != 255
        ]
        expected.append(torch.stack(pixel_losses).mean())
    losses = segmentation_loss(head_scores, masks)
    torch.testing.assert_close(losses["decode_loss"], expected[0])
    torch.testing.assert_close(losses["auxiliary_loss"], expected[1])
    torch.testing.assert_close(losses["loss"], expected[0] + 0.4 * expected[1])


def test_deterministic_kernels_give_the_same_scores_and_losses_to_rounding():
    torch.manual_seed(0)
    network = small_network().eval()
    images, masks = torch.randn(1, 3, 96, 64), torch.randint(0, 5, (1, 96, 64), dtype=torch.uint8)
    masks[0, :9] = 255
    expected = network(images)
    expected_losses = segmentation_loss(expected, masks)
    with deterministic_kernels(True):
        scores = network(images)
        losses = segmentation_loss(scores, masks)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(losses, expected_losses)


def test_a_batch_of_ignored_pixels_has_a_loss_of_0_and_no_gradient():
    scores = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss((scores, scores), torch.full((1, 8, 8), 255, dtype=torch.uint8))["loss"]
    loss.backward()
    assert loss == 0
    assert (scores.grad == 0).all()


def test_batch_norms_are_synchronised_only_over_several_gpus():
    def norm_types(device, processes):
        modules = sync_batch_norms(small_network(), torch.device(device), processes).modules()
        return {type(module) for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)}

    assert norm_types("cuda", 2) == {nn.SyncBatchNorm}
    assert norm_types("cuda", 1) == norm_types("cpu", 2) == {nn.BatchNorm2d}
    # transformers' pooling blocks keep their layers in a plain list too, which must hold the converted ones.
    head = sync_batch_norms(small_network(), torch.device("cuda"), 2).head
    assert all(isinstance(block.layers[1].batch_norm, nn.SyncBatchNorm) for block in head.psp_modules.blocks)


def test_without_transformers_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"transformers.*fastmae\[segment\]"):
        small_network()
