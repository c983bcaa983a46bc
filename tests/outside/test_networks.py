import json
import socket

import pytest
import timm
import torch

from fastmae.errors import InputError
from fastmae.outside import networks
from fastmae.outside.networks import ARGUMENTS, checked_arguments, create_network, network_of, on_meta

pytestmark = pytest.mark.promise("networks")

TINY = "vit_tiny_patch16_224"
SMALL = {"num_classes": 0, "img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture
def offline(monkeypatch):
    """No connection can be made."""

    def refuse(*_):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_description_becomes_the_network_with_its_weights():
    expected = timm.create_model(TINY, **SMALL)
    network = network_of(TINY, json.loads(json.dumps(SMALL)), "x", expected.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(network.eval()(images), expected.eval()(images))


@pytest.mark.parametrize(
    "argument",
    [
        *("pretrained", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "features_only"),
        *("scriptable", "custom_load", "pruned", "block_fn", "device", "no_such_argument", "x" * 1000),
    ],
)
def test_any_other_argument_is_refused_by_its_name(argument, offline):
    with pytest.raises(InputError, match=rf"^config\.json: gives timm the argument '{argument[:80]}'") as caught:
        network_of(TINY, {**SMALL, argument: True}, "config.json")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("depth", 10**8),
        ("depth", 0),
        ("depth", True),
        ("depth", "2"),
        ("embed_dim", 2**40),
        ("patch_size", 0),
        ("patch_size", [16]),
        ("img_size", [32, -32]),
        ("in_chans", 1e9),
        ("num_classes", -1),
        ("mlp_ratio", float("nan")),
        ("drop_path_rate", 1.0),
        ("global_pool", "pool"),
        ("qkv_bias", 1),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_its_argument(argument, value):
    with pytest.raises(InputError, match=rf"^config\.json: {argument}: "):
        checked_arguments(TINY, {**SMALL, argument: value}, "config.json")


@pytest.mark.parametrize(
    "name", ["hf-hub:user/name", "local-dir:/tmp", "hf-hub:timm/resnet18.a1_in1k", "../resnet18", ""]
)
def test_only_timms_own_networks_have_a_name(name, offline):
    for build in (network_of, create_network, on_meta):
        with pytest.raises(InputError, match="timm has no network"):
            build(name, {}, "config.json")


@pytest.mark.parametrize("architecture", [None, 3, ["resnet18"]])
def test_a_name_that_is_no_text_is_refused(architecture):
    with pytest.raises(InputError, match=r"^config\.json: "):
        checked_arguments(architecture, {}, "config.json")


def test_a_network_larger_than_any_is_refused_before_it_takes_memory():
    with pytest.raises(InputError, match=r"a network of .* weights, more than"):
        network_of(TINY, {**SMALL, "embed_dim": 65536, "depth": 64}, "config.json")


def test_weights_of_another_shape_are_refused_before_the_network_takes_memory(monkeypatch):
    small, built = timm.create_model(TINY, **SMALL).state_dict(), []
    create = timm.create_model

    def noting(*args, **options):
        network = create(*args, **options)
        built.append(next(network.parameters()).device.type)
        return network

    monkeypatch.setattr(networks.timm, "create_model", noting)
    with pytest.raises(InputError, match=r"^config\.json: .*blocks"):
        network_of(TINY, {**SMALL, "depth": 2}, "config.json", small)
    assert built == ["meta"]


def test_arguments_that_do_not_fit_each_other_are_refused_in_one_line():
    with pytest.raises(InputError, match=r"^config\.json: timm can't build vit_tiny") as caught:
        network_of(TINY, {**SMALL, "num_heads": 5}, "config.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^config\.json: timm can't build resnet18"):
        network_of("resnet18", {"embed_dim": 64}, "config.json")


def test_memory_that_does_not_suffice_is_said(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    monkeypatch.setattr(networks.timm, "create_model", fail)
    with pytest.raises(InputError, match=r"^x: not enough memory"):
        create_network(TINY, {}, "x")


def test_trying_a_network_without_memory_draws_no_random_numbers():
    torch.manual_seed(0)
    on_meta("resnet18", {"num_classes": 0})
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)


def test_none_leaves_an_argument_at_the_names_own():
    assert checked_arguments(TINY, dict.fromkeys(ARGUMENTS), "x") == dict.fromkeys(ARGUMENTS)
