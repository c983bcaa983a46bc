"""A teacher's precision: what it changes, what it leaves alone, and which precision `auto` would take."""

import pytest
import timm
import torch

from fastmae.offline.settle import fastest
from fastmae.teachers import Teacher
from fastmae.teachers.factory import teacher_of_store
from fastmae.teachers.precision import mean_cosine, precision_cosines, reduced_precisions

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return Teacher("timm/vit_tiny_patch16_224", timm.create_model("vit_tiny_patch16_224", num_classes=0), 64, 4)


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_mixed_precision_computes_what_autocast_computes_and_returns_float32(teacher, pixels):
    exact = teacher(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = teacher(pixels)
    teacher.precision = "bf16-mixed"
    tokens = teacher(pixels)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, exact)
    assert mean_cosine(tokens, exact) > 0.999


def test_cosines_are_to_the_tokens_in_fp32_whatever_the_teachers_own_precision(teacher, pixels):
    exact = teacher(pixels)
    teacher.precision = "bf16-mixed"
    mixed = teacher(pixels)
    cosines = precision_cosines(teacher, pixels)
    assert cosines == {"bf16-mixed": mean_cosine(mixed, exact)}
    assert teacher.precision == "bf16-mixed"
    pairs = zip(mixed.reshape(-1, 192), exact.reshape(-1, 192), strict=True)
    by_formula = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
    assert cosines["bf16-mixed"] == pytest.approx(sum(by_formula) / len(by_formula), abs=1e-6)


def test_only_a_precision_other_than_fp32_is_described_and_the_described_teacher_has_it(vit_weights, pixels):
    options = {"middle_size": 64, "grid": 4}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(vit_weights))
    teacher = Teacher("timm/vit_tiny_patch16_224", network, **options, weights_file=str(vit_weights))
    assert "precision" not in teacher.describe()
    assert teacher_of_store(teacher.describe(), **options).precision == "32-true"
    teacher.precision = "bf16-mixed"
    again = teacher_of_store(teacher.describe(), **options)
    assert again.precision == "bf16-mixed"
    assert torch.equal(again(pixels), teacher(pixels))


@pytest.mark.parametrize(
    ("cosines", "expected"),
    [
        ({"bf16-mixed": 0.9995, "tf32": 0.99999}, "bf16-mixed"),
        ({"bf16-mixed": 0.9985, "tf32": 0.99999}, "tf32"),
        ({"bf16-mixed": float("nan")}, "32-true"),
        ({}, "32-true"),
    ],
)
def test_the_first_precision_that_keeps_the_cosine_is_taken_on_a_gpu(cosines, expected):
    assert fastest(cosines, GPU) == expected
    assert fastest(cosines, CPU) == "32-true"


def test_a_gpu_offers_what_its_generation_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert reduced_precisions(GPU) == ["bf16-mixed", "tf32", "16-mixed"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    assert reduced_precisions(GPU) == ["16-mixed"]
    assert reduced_precisions(CPU) == ["bf16-mixed"]
