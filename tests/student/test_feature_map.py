"""Networks of timm with a feature map: the map against timm's features, the step to the grid against its formula."""

import pytest
import timm
import torch

from fastmae.errors import InputError
from fastmae.student.feature_map import (
    build_network,
    check_maps,
    freeze_unread,
    last_map,
    network_arguments,
    pyramid_stages,
    resized_network,
    stage_maps,
    to_grid,
)


def noise(size, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("side", "window"), [(8, 1), (4, 2), (2, 4)])
def test_a_finer_map_is_averaged_over_each_patch(side, window):
    feature_map = noise(8)
    tokens = to_grid(feature_map, side)
    for number in range(side * side):
        row, col = window * (number // side), window * (number % side)
        expected = feature_map[:, :, row : row + window, col : col + window].mean((2, 3))
        torch.testing.assert_close(tokens[:, number], expected)


def test_a_finer_map_that_does_not_divide_is_averaged_over_overlapping_patches():
    feature_map = noise(5)  # at 3 x 3: rows 0-1, 1-3 and 3-4
    tokens = to_grid(feature_map, 3)
    torch.testing.assert_close(tokens[:, 4], feature_map[:, :, 1:4, 1:4].mean((2, 3)))
    torch.testing.assert_close(tokens[:, 8], feature_map[:, :, 3:5, 3:5].mean((2, 3)))


def test_a_coarser_map_is_interpolated_bilinearly():
    feature_map = noise(2)
    tokens = to_grid(feature_map, 4).unflatten(1, (4, 4))
    # Centres of the finer positions lie at -0.25, 0.25, 0.75 and 1.25 of the coarser ones; outside, the edge repeats.
    weights = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1.0]])
    expected = torch.einsum("ri,cj,bdij->brcd", weights, weights, feature_map)
    torch.testing.assert_close(tokens, expected)


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("resnet10t", 64, (512, 2, 2)),
        ("convnext_atto", 64, (320, 2, 2)),
        ("swin_tiny_patch4_window7_224", 64, (768, 2, 2)),  # [B, h, w, D]
        ("vit_tiny_r_s16_p8_224", 64, (192, 2, 2)),  # a hybrid: tokens, a class token first
        ("timm/levit_128", 224, (384, 4, 4)),  # tokens, and images of one size alone
    ],
)
@torch.inference_mode()
def test_the_last_map_holds_timms_forward_features(name, size, shape):
    network, images = build_network(name, size, 3).eval(), noise(size)
    feature_map, final = last_map(network, images), network.forward_features(images)
    assert feature_map.shape == (2, *shape) == (2, *check_maps(name, network, size, 3)[1:])
    if final.dim() == 3:
        expected = final[:, final.shape[1] - shape[1] * shape[2] :].transpose(1, 2).unflatten(2, shape[1:])
    else:
        expected = final if final.shape[1] == shape[0] else final.permute(0, 3, 1, 2)
    torch.testing.assert_close(feature_map, expected)
    torch.testing.assert_close(stage_maps(network, images)[-1], feature_map)


@torch.inference_mode()
def test_a_hybrid_vit_pools_the_mean_of_its_normalised_map():
    network = build_network("vit_tiny_r_s16_p8_224", 64, 3).eval()
    torch.testing.assert_close(network(noise(64)), last_map(network, noise(64)).mean((2, 3)))


@torch.inference_mode()
def test_the_stages_have_timms_strides_and_widths():
    network = build_network("resnet10t", 64, 3).eval()
    features = timm.create_model("resnet10t", features_only=True)
    shapes = [(stage.shape[1], 64 // stage.shape[2]) for stage in stage_maps(network, noise(64))]
    info = features.feature_info
    assert shapes == list(zip(info.channels(), info.reduction(), strict=True))
    assert pyramid_stages(network, (4, 8, 16, 32)) == [1, 2, 3, 4]
    assert pyramid_stages(build_network("vit_tiny_r_s16_p8_224", 64, 3), (4, 8, 16, 32)) is None


def test_only_networks_of_a_fixed_size_are_built_for_a_size():
    assert network_arguments("resnet10t", 64, 1) == {"num_classes": 0, "in_chans": 1}
    assert network_arguments("timm/swin_tiny_patch4_window7_224", 96, 3)["img_size"] == 96


def test_parameters_that_no_map_depends_on_are_not_trained():
    network = build_network("mobilenetv3_small_050", 32, 3)
    freeze_unread(network, lambda images: [last_map(network, images)], 32, 3)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv_head.weight", "conv_head.bias"}  # they follow the pooling
    assert network.training


@torch.inference_mode()
def test_weights_of_a_fixed_size_go_to_another_where_they_fit():
    hybrid = build_network("vit_tiny_r_s16_p8_224", 64, 3).eval()
    arguments = network_arguments("vit_tiny_r_s16_p8_224", 64, 3)
    larger = resized_network("RUN", hybrid, "vit_tiny_r_s16_p8_224", arguments, 96)
    assert last_map(larger, noise(96)).shape == (2, 192, 3, 3)
    swin, name = build_network("swin_tiny_patch4_window7_224", 224, 3).eval(), "swin_tiny_patch4_window7_224"
    arguments = network_arguments(name, 224, 3)
    larger = resized_network("RUN", swin, name, arguments, 448)
    assert torch.equal(larger.patch_embed.proj.weight, swin.patch_embed.proj.weight)
    with pytest.raises(InputError, match=r"RUN.*64 px"):  # smaller windows have other relative positions
        resized_network("RUN", swin, name, arguments, 64)


@pytest.mark.parametrize(
    ("name", "size", "named"),
    [
        ("timm/resnet81", 64, "--encoder timm/resnet81.*did you mean timm/resnet"),
        ("timm/resnet18.a1_in1k", 64, "--init timm/resnet18.a1_in1k"),
        ("timm/nest_tiny", 50, "--encoder timm/nest_tiny.*50 px"),  # not a multiple of its patches
    ],
)
def test_a_network_that_cannot_be_built_is_named(name, size, named):
    with pytest.raises(InputError, match=named):
        build_network(name, size, 3)


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 64), ("crossvit_tiny_240", 240), ("pit_ti_224", 224)])
def test_a_network_without_a_map_of_this_size_is_named_in_one_line(name, size):
    with torch.device("meta"):
        network = build_network(name, size, 3)
    with pytest.raises(InputError, match=f"--encoder {name}.*{size} px") as caught:
        check_maps(f"--encoder {name}", network, size, 3)
    assert "\n" not in str(caught.value)
