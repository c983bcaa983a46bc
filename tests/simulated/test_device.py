import pytest
import torch

pytestmark = pytest.mark.accelerator


def test_x():
    assert torch.ones(3, device="sim").device.type == "sim"


def test_y():
    assert torch.ones(3, device="sim").device.type == "sm"
