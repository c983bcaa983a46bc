"""The detector and its pyramid: shapes, strides, positions of anchors and RoIAlign, dtypes under mixed precision."""

import pytest
import timm
import torch

from fastmae.evaluate.detection.datasets import SizeLimits, Targets
from fastmae.evaluate.detection.mask_rcnn import StridedAnchors, StridedRoIAlign, build_detector
from fastmae.evaluate.detection.pyramid import STRIDES_IN_PATCHES, SimplePyramid
from fastmae.runs.encoder import OpenedEncoder

NAMES = ["0", "1", "2", "3", "pool"]


def tiny_encoder(patch=8, channels=3):
    torch.manual_seed(0)
    sizes = {"img_size": 4 * patch, "patch_size": patch, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=channels, dynamic_img_size=True, **sizes)


def opened_encoder(patch=8, channels=3):
    mean, std = (0.3,) * channels, (0.2,) * channels
    return OpenedEncoder(
        tiny_encoder(patch, channels), "vit_tiny_patch16_224", {}, 4 * patch, channels, mean, std, "whole", "tiny"
    )


@pytest.fixture(scope="module")
def detector():
    return build_detector(opened_encoder(), 2, SizeLimits(48, 96), 16)


def photo_with_objects(height=40, width=60, objects=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    photo = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(objects, height, width, dtype=torch.uint8)
    masks[:, 5:25, 10:40] = 1
    boxes = torch.tensor([[10.0, 5.0, 40.0, 25.0]]).expand(objects, 4).clone()
    return photo, {"boxes": boxes, "labels": torch.ones(objects, dtype=torch.int64), "masks": masks}


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_the_pyramid_has_strides_of_a_quarter_to_four_patches(patch):
    pyramid = SimplePyramid(tiny_encoder(patch), 24)
    maps = pyramid(list(torch.randn(2, 3, 8 * patch, 12 * patch)))
    assert list(maps) == NAMES
    for stride, features in zip(STRIDES_IN_PATCHES, maps.values(), strict=True):
        assert features.shape == (2, 24, 8 / stride, 12 / stride)


def test_an_images_maps_do_not_depend_on_the_other_images_of_its_batch():
    pyramid = SimplePyramid(tiny_encoder(), 8).eval()
    images = [torch.randn(3, *size) for size in ((32, 64), (64, 48), (32, 64))]
    with torch.no_grad():
        together = pyramid(images)
        for index, image in enumerate(images):
            for name, alone in pyramid([image]).items():
                rows, cols = alone.shape[2:]
                beside = together[name][index]
                assert torch.allclose(beside[:, :rows, :cols], alone[0], atol=1e-5)
                assert not beside[:, rows:].any()
                assert not beside[:, :, cols:].any()


def test_positions_are_trained_and_the_final_norm_is_not():
    encoder = tiny_encoder()
    encoder.pos_embed.requires_grad_(False)  # as in pre-training
    SimplePyramid(encoder, 8)([torch.randn(3, 32, 48)])["2"].square().sum().backward()
    assert encoder.pos_embed.grad is not None
    untrained = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert untrained == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("patch", [8, 14])
def test_roi_align_reads_every_map_at_the_objects_place(patch):
    align = StridedRoIAlign(patch, 7)
    strides = [patch * stride for stride in STRIDES_IN_PATCHES[:4]]
    maps = {}
    for name, stride in zip(NAMES, strides, strict=False):  # each map holds the x and y of its cells, in pixels
        cells = int(32 * patch / stride)
        pixels = torch.arange(cells, dtype=torch.float32) * stride
        maps[name] = torch.stack([pixels[None, :].expand(cells, cells), pixels[:, None].expand(cells, cells)])[None]
    for side in (1.5 * patch, 5 * patch, 10 * patch, 16 * patch, 25 * patch):  # from the finest map to the coarsest
        box = torch.tensor([[2.0 * patch, 3.0 * patch, 2.0 * patch + side, 3.0 * patch + side]])
        centre = align(maps, [box], [(32 * patch, 32 * patch)])[0].mean((1, 2))
        assert centre.tolist() == pytest.approx([2 * patch + side / 2, 3 * patch + side / 2], abs=1e-3)


def test_larger_objects_are_read_from_coarser_maps():
    align = StridedRoIAlign(16, 7)
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in (20, 56, 111, 112, 223, 224, 447, 448, 2000)])
    assert align.map_levels([boxes]).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]  # as in FPN: 224 pixels at stride 16


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_anchors_are_placed_at_the_true_strides(patch):
    strides = tuple(patch * stride for stride in STRIDES_IN_PATCHES)
    maps = [torch.zeros(1, 1, 3, 5) for _ in strides]
    images = type("Images", (), {"image_sizes": [(1, 1), (1, 1)], "tensors": torch.zeros(2, 3, 7, 7)})()
    anchors = StridedAnchors(strides)(images, maps)
    assert len(anchors) == 2
    by_map = anchors[0].view(5, 3, 5, 3, 4)  # map, row, column, aspect ratio, box
    for stride, level in zip(strides, by_map, strict=True):
        centres = (level[..., :2] + level[..., 2:]) / 2
        assert centres[2, 4].tolist() == [[4 * stride, 2 * stride]] * 3
        wide, square, tall = (level[0, 0, :, 2:] - level[0, 0, :, :2]).tolist()
        assert square == pytest.approx([8 * stride] * 2, abs=1)
        assert wide[0] / wide[1] == pytest.approx(2, rel=0.15)
        assert tall == wide[::-1]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_losses_and_boxes_are_float32_under_mixed_precision(precision, detector):
    photo, objects = photo_with_objects()
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        torch.manual_seed(0)
        losses = detector.train()([photo], Targets([objects]))
        (output,) = detector.eval()([photo])
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert output["boxes"].dtype == output["scores"].dtype == output["masks"].dtype == torch.float32


def test_mixed_precision_changes_losses_and_proposals_only_a_little(detector):
    photo, objects = photo_with_objects(700, 1000)
    objects["boxes"] *= 20
    detector.train()
    proposals, losses = [], []
    hook = detector.rpn.register_forward_hook(lambda module, args, output: proposals.append(output[0][0]))
    for mixed in (False, True):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            torch.manual_seed(0)
            losses.append({name: float(loss) for name, loss in detector([photo], Targets([objects])).items()})
    hook.remove()
    assert losses[1]["loss_objectness"] == pytest.approx(losses[0]["loss_objectness"], rel=0.02)
    not_rounded = proposals[1] != proposals[1].bfloat16()  # bf16 would round to whole pixels, or to four of them
    assert not_rounded.float().mean() > 0.3


def test_photos_without_objects_give_finite_losses_and_gradients_for_every_weight(detector):
    detector.train().zero_grad()
    photo, objects = photo_with_objects(objects=0)
    losses = detector([photo, photo], Targets([objects, objects]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert float(losses["loss_mask"].detach()) == float(losses["loss_box_reg"].detach()) == 0
    without_gradient = [
        name for name, parameter in detector.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert without_gradient == []  # DDP would wait for them


def test_boxes_are_in_the_pixels_of_photos_of_any_size_and_masks_are_over_boxes(detector):
    detector.eval()
    detector.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        for height, width in ((40, 60), (300, 20), (7, 9)):
            (output,) = detector([photo_with_objects(height, width)[0]])
            assert len(output["boxes"])
            assert output["masks"].shape[1:] == (1, 28, 28)
            assert (output["boxes"] >= 0).all()
            assert (output["boxes"][:, 2] <= width + 1e-3).all()
            assert (output["boxes"][:, 3] <= height + 1e-3).all()
    detector.roi_heads.score_thresh = 0.05


def test_photos_are_normalised_by_the_encoders_mean_and_std(detector):
    photo = torch.full((3, 48, 48), 255, dtype=torch.uint8)
    images, _ = detector.transform([photo])
    assert images.tensors[0].flatten().tolist() == pytest.approx([(1 - 0.3) / 0.2] * 3 * 48 * 48)


def test_a_grey_encoder_takes_grey_photos():
    detector = build_detector(opened_encoder(channels=1), 2, SizeLimits(48, 96), 8).eval()
    with torch.no_grad():
        assert set(detector([photo_with_objects()[0][:1]])[0]) == {"boxes", "labels", "scores", "masks"}


def test_gradients_have_the_memory_layout_of_their_weights(detector):
    detector.train().zero_grad()
    photo, objects = photo_with_objects()
    sum(detector([photo], Targets([objects])).values()).backward()
    weights = [weight for weight in detector.parameters() if weight.dim() == 4 and weight.grad is not None]
    assert len(weights) > 20
    # Otherwise DDP would copy the gradients, and warn.
    assert all(weight.grad.stride() == weight.stride() for weight in weights)
