import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fastmae.errors import InputError
from fastmae.evaluate.segmentation.upernet import UperNet, segmentation_loss, synchronised, tapped_blocks

SMALL = {
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 0,
    "img_size": 64,
    "patch_size": 16,
    "dynamic_img_size": True,
}
ENCODERS = {
    "vit_tiny_patch16_224": SMALL,
    "vit_small_patch14_reg4_dinov2": SMALL,
    "vit_small_patch16_dinov3": SMALL,
}


def small(name="vit_tiny_patch16_224"):
    torch.manual_seed(0)
    return UperNet(timm.create_model(name, **ENCODERS[name]), classes=5, head_channels=16)


def test_maps_are_taken_after_blocks_4_6_8_12_of_12_and_in_proportion_of_others():
    assert tapped_blocks(12) == [4, 6, 8, 12]
    assert tapped_blocks(24) == [8, 12, 16, 24]
    assert tapped_blocks(4) == [1, 2, 3, 4]
    assert tapped_blocks(1) == [1, 1, 1, 1]
    assert all(
        blocks == sorted(blocks) and blocks[-1] == depth for depth in range(1, 41) for blocks in [tapped_blocks(depth)]
    )


def test_the_pyramid_has_four_scales_of_the_tapped_blocks_without_the_final_norm():
    network = small().eval()
    images = torch.randn(2, 3, 64, 96)
    tokens = {}
    for number, block in enumerate(network.encoder.blocks, 1):
        block.register_forward_hook(lambda *args, number=number: tokens.__setitem__(number, args[2]))
    seen = {}
    network.pyramid.register_forward_hook(lambda _, given, maps: seen.update(given=given[0], maps=maps))
    main, auxiliary = network(images)
    for number, given in enumerate(seen["given"], 1):
        torch.testing.assert_close(given, tokens[number][:, 1:].transpose(1, 2).unflatten(2, (4, 6)))
    assert [tuple(part.shape) for part in seen["maps"]] == [
        (2, 32, 16, 24),
        (2, 32, 8, 12),
        (2, 32, 4, 6),
        (2, 32, 2, 3),
    ]
    torch.testing.assert_close(seen["maps"][3], F.max_pool2d(seen["given"][3], 2))
    assert (main.shape, auxiliary.shape) == ((2, 5, 16, 24), (2, 5, 4, 6))


def test_the_head_has_the_recipes_parts():
    network = small()
    assert tuple(network.head.pool_scales) == (1, 2, 3, 6)
    assert (network.head.channels, network.auxiliary.channels, network.auxiliary.in_index) == (16, 256, 2)
    for head in (network.head, network.auxiliary):
        dropout, classifier = head.classifier
        assert dropout.p == 0.1
        assert classifier.out_channels == 5


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_that_asks_for_a_gradient_gets_one(name):
    network = small(name)
    loss = segmentation_loss(network(torch.randn(2, 3, 64, 64)), torch.randint(0, 5, (2, 64, 64), dtype=torch.uint8))
    loss["loss"].backward()
    idle = [
        name for name, parameter in network.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert idle == []
    assert [name for name, parameter in network.named_parameters() if not parameter.requires_grad] == [
        "encoder.norm.weight",
        "encoder.norm.bias",
    ]


def test_fewer_blocks_than_maps_are_tapped_twice():
    shallow = UperNet(timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 1}), 3, 8).eval()
    assert shallow(torch.randn(1, 3, 32, 32))[0].shape == (1, 3, 8, 8)


def test_the_loss_is_the_cross_entropy_of_the_counted_pixels_of_both_heads():
    torch.manual_seed(0)
    main, auxiliary = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)
    masks = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    masks[0, :5] = 255
    parts = []
    for scores in (main, auxiliary):
        odds = F.interpolate(scores, size=(8, 8), mode="bilinear", align_corners=False).log_softmax(1)
        counted = [
            -odds[image, int(masks[image, row, col]), row, col]
            for image in range(2)
            for row in range(8)
            for col in range(8)
            if masks[image, row, col] != 255
        ]
        parts.append(torch.stack(counted).mean())
    found = segmentation_loss((main, auxiliary), masks)
    torch.testing.assert_close(found["decode_loss"], parts[0])
    torch.testing.assert_close(found["auxiliary_loss"], parts[1])
    torch.testing.assert_close(found["loss"], parts[0] + 0.4 * parts[1])


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_gradient():
    scores = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss((scores, scores), torch.full((1, 8, 8), 255, dtype=torch.uint8))["loss"]
    loss.backward()
    assert loss == 0
    assert (scores.grad == 0).all()


def test_batch_norms_are_synchronised_over_several_gpus_only():
    def norms(device, processes):
        modules = list(synchronised(small(), torch.device(device), processes).modules())
        return {type(module) for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)}

    assert norms("cuda", 2) == {nn.SyncBatchNorm}
    assert norms("cuda", 1) == norms("cpu", 2) == {nn.BatchNorm2d}
    # The pooling blocks of transformers' head keep their parts in a list besides: it must hold the converted ones.
    head = synchronised(small(), torch.device("cuda"), 2).head
    assert all(isinstance(block.layers[1].batch_norm, nn.SyncBatchNorm) for block in head.psp_modules.blocks)


def test_without_transformers_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"come with transformers; pip install 'fastmae\[segment\]'"):
        small()
