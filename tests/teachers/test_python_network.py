"""What a module of the user's own must have and return, as a teacher."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from fastmae.config.teacher import GivenTeacher
from fastmae.errors import InputError
from fastmae.teachers import Teacher, load_teacher

MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.3)


class Patches(nn.Module):
    """Patch features by one convolution: [B, 3, S, S] -> [B, g * g, 8]."""

    mean, std, patch_size = MEAN, STD, 16

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, 16, 16)

    def forward(self, images):
        return self.convolution(images).flatten(2).transpose(1, 2)


def with_attributes(**attributes):
    module = Patches()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def returning(change):
    """A module whose features are changed."""
    module = Patches()
    module.forward = lambda images: change(Patches.forward(module, images))
    return GivenTeacher.of(lambda: module)


def teacher_of(module, size=64, **options):
    return load_teacher(GivenTeacher.of(module), size, size // 16, **options)


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_its_tokens_are_what_the_module_returns_for_normalised_images(pixels):
    teacher = teacher_of(Patches())
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        expected = Patches()((pixels / 255 - mean) / std).unflatten(1, (4, 4))
    assert (teacher.kind, teacher.block, teacher.norm, teacher.input_size) == ("vit", 0, "none", 64)
    torch.testing.assert_close(teacher(pixels), expected)
    maps = load_teacher(returning(lambda x: x.transpose(1, 2).unflatten(2, (4, 4))), 64, 4)
    torch.testing.assert_close(maps(pixels), expected)


def test_mean_and_std_may_be_lists_arrays_or_tensors(pixels):
    expected = teacher_of(Patches())(pixels)
    other = with_attributes(mean=np.array(MEAN), std=torch.tensor(STD).view(1, 3, 1, 1), patch_size=(16, 16))
    torch.testing.assert_close(teacher_of(other)(pixels), expected)


def test_another_size_gives_another_grid_which_is_interpolated(pixels):
    teacher = teacher_of(Patches(), input_size=96)
    assert (teacher.input_size, teacher(pixels).shape) == (96, (2, 4, 4, 8))
    with pytest.raises(InputError, match="--teacher-size 100: not a multiple"):
        teacher_of(Patches(), input_size=100)


def test_weights_in_half_precision_compute_in_float32(pixels):
    assert teacher_of(Patches().half())(pixels).dtype == torch.float32
    assert teacher_of(Patches().half()).weights_sha256 != teacher_of(Patches()).weights_sha256


def test_under_bf16_the_tokens_are_float32_too(pixels):
    teacher = teacher_of(Patches())
    exact = teacher(pixels)
    teacher.precision = "bf16-mixed"
    assert teacher(pixels).dtype == torch.float32
    torch.testing.assert_close(teacher(pixels), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("changes", [{"mean": (0.7, 0.5, 0.61)}, {"std": (0.2, 0.25, 0.31)}])
def test_the_digest_covers_mean_and_std(changes):
    assert teacher_of(with_attributes(**changes)).weights_sha256 != teacher_of(Patches()).weights_sha256


def test_the_callers_module_stays_as_it_is():
    module = Patches().train()
    teacher_of(module)
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())


class Blocks(Patches):
    """Features of three blocks."""

    teacher_blocks = 3

    def forward(self, images, blocks):
        return [super(Blocks, self).forward(images) * (block + 1) for block in blocks]


def test_a_module_of_several_blocks_is_tapped_at_each_or_averaged(pixels):
    one = teacher_of(Patches())(pixels)
    assert teacher_of(Blocks()).block == 2
    torch.testing.assert_close(teacher_of(Blocks(), block=1)(pixels), 2 * one)
    torch.testing.assert_close(teacher_of(Blocks(), last=2)(pixels), 2.5 * one)
    with pytest.raises(InputError, match="--teacher-block 3"):
        teacher_of(Blocks(), block=3)
    with pytest.raises(InputError, match="--teacher-block 1"):
        teacher_of(Patches(), block=1)
    with pytest.raises(InputError, match=r"returns a tensor .* as it has teacher_blocks, return a list"):
        teacher_of(with_attributes(teacher_blocks=3, forward=lambda images, blocks: images))


def test_a_norm_is_added_only_if_it_is_asked_for(pixels):
    layer = teacher_of(Patches(), norm="layer")(pixels)
    torch.testing.assert_close(layer.mean(-1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="--teacher-norm final"):
        teacher_of(Patches(), norm="final")


def test_a_model_of_timm_keeps_its_blocks_and_its_norm_and_takes_the_users_mean(pixels):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    plain = Teacher("t", timm.create_model("vit_tiny_patch16_224", num_classes=0), 64, 4)
    teacher = teacher_of(model, block=5)
    assert (teacher.block, teacher.norm, teacher_of(model).norm) == (5, "layer", "final")
    model.mean = MEAN
    assert teacher_of(model).mean.flatten().tolist() == pytest.approx(MEAN)
    assert teacher_of(model).std.equal(plain.std)


@pytest.mark.parametrize(
    ("attributes", "cause"),
    [
        ({"mean": None}, "has no mean"),
        ({"std": None}, "has no std"),
        ({"patch_size": None}, "has no patch_size"),
        ({"mean": (0.5, 0.5)}, "its mean is not three numbers"),
        ({"mean": "grey"}, "its mean is not three numbers"),
        ({"mean": (123.7, 116.3, 103.5)}, "can't be that of values from 0 to 1"),
        ({"std": (0.2, 0.0, 0.2)}, "its std .* can't be"),
        ({"mean": (0.5, 0.5, float("nan"))}, "its mean .* can't be"),
        ({"patch_size": 0}, "its patch_size is 0"),
        ({"patch_size": 16.0}, "its patch_size is 16.0"),
        ({"patch_size": (16, 8)}, r"its patch_size is \(16, 8\)"),
        (
            {"patch_size": 8},
            r"returns a tensor \[1, 4, 8\] .* with patch_size 8, return \[1, C, 4, 4\] or \[1, 16, C\]",
        ),
        ({"kind": "mlp"}, "its kind is 'mlp'"),
        ({"teacher_blocks": 0}, "its teacher_blocks is 0"),
    ],
)
def test_a_module_without_what_a_teacher_needs_is_one_line_that_names_it(attributes, cause):
    with pytest.raises(InputError, match=rf"test_python_network:Patches: .*{cause}") as caught:
        teacher_of(with_attributes(**attributes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda x: (x,), r"returns a tuple for images \[1, 3, 64, 64\]; return one tensor"),
        (lambda x: None, "returns nothing"),
        (lambda x: x.long(), r"returns a tensor of int64 \[1, 16, 8\]"),
        (lambda x: torch.cat([x[:, :1], x], 1), r"16 patches and 1 more: leave out class .* \[:, 1:\]"),
        (lambda x: x.mean(1), "one vector for an image"),
        (lambda x: x.unflatten(1, (4, 4)), r"permute\(0, 3, 1, 2\)"),
        (lambda x: x[:, :9], r"with patch_size 16, return \[1, C, 4, 4\]"),
        (lambda x: torch.cat([x, x]), r"return \[1, C, 4, 4\]"),
        (lambda x: x * float("nan"), "features of a black image are not finite"),
        (lambda x: 1 / 0, r"fails on images \[1, 3, 64, 64\] \(ZeroDivisionError: .*test_python_network.py:\d+\)"),
    ],
)
def test_features_that_are_none_are_one_line_that_names_the_way_out(change, cause):
    with pytest.raises(InputError, match=cause) as caught:
        load_teacher(returning(change), 64, 4)
    assert str(caught.value).startswith("python/")


def test_a_lack_of_memory_stays_one():
    def full(_):
        raise MemoryError

    with pytest.raises(MemoryError):
        load_teacher(returning(full), 64, 4)


def test_it_brings_its_own_weights(tmp_path):
    with pytest.raises(InputError, match="brings its own weights"):
        teacher_of(Patches(), weights=tmp_path / "w.pth")
