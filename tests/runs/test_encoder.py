"""Encoders in every form that RUN can take, and a student that starts from one."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fastmae.cli import run
from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.runs.encoder import initialise_student, load_encoder, open_encoder
from fastmae.runs.load import load_student
from fastmae.student.encoder import build_encoder
from fastmae.student.student import Student
from fastmae.student.student import build_student as student_of

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def tokens(network, images=IMAGES):
    with torch.no_grad():
        return network.forward_features(images)


def test_a_run_its_checkpoint_and_a_network_rebuilt_from_the_description_are_the_same_encoder(tiny_run):
    expected = tokens(load_encoder(tiny_run))
    for spec in (str(tiny_run), str(tiny_run / "checkpoint.pt")):
        opened = open_encoder(spec)
        assert torch.equal(tokens(opened.network), expected)
        assert (opened.image_size, opened.patch_size, opened.channels) == (64, 16, 3)
    rebuilt = timm.create_model(opened.architecture, **opened.arguments)
    rebuilt.load_state_dict(opened.network.state_dict())
    assert torch.equal(tokens(rebuilt.eval()), expected)
    assert json.loads(json.dumps(opened.describe()))["image_size"] == 64


def test_without_pretrained_the_same_architecture_has_random_weights(tiny_run):
    torch.manual_seed(0)
    random, trained = open_encoder(str(tiny_run), pretrained=False).network, load_encoder(tiny_run)
    shapes, trained_shapes = (
        {name: tensor.shape for name, tensor in network.state_dict().items()} for network in (random, trained)
    )
    assert shapes == trained_shapes
    assert not torch.allclose(tokens(random), tokens(trained), atol=1e-2)


def test_positions_are_resampled_for_another_image_size(tiny_run):
    assert open_encoder(str(tiny_run), 96).network.pos_embed.shape[1] == 1 + 6 * 6
    dynamic = open_encoder(str(tiny_run), dynamic_img_size=True).network
    assert torch.allclose(tokens(dynamic), tokens(load_encoder(tiny_run)), atol=1e-5)
    resized, wide_images = load_encoder(tiny_run), torch.randn(1, 3, 96, 32)
    resized.set_input_size(img_size=(96, 32))
    assert torch.allclose(tokens(dynamic, wide_images), tokens(resized, wide_images), atol=1e-5)


def test_more_arguments_go_to_timm(tiny_run):
    network = open_encoder(str(tiny_run), drop_path_rate=0.3).network
    assert isinstance(network.blocks[0].drop_path1, torch.nn.Identity)
    assert network.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)


def published_mae(path):
    """Write a checkpoint like those of MAE's authors, with the decoder beside the encoder; returns the encoder."""
    torch.manual_seed(1)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
    state = vit.state_dict() | {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    torch.save({"model": state, "epoch": 3}, path)
    return vit.eval()


def test_a_checkpoint_of_mae_is_recognised_with_and_without_the_prefix_file(tmp_path):
    vit = published_mae(tmp_path / "mae.pth")
    for spec in (f"file/{tmp_path}/mae.pth", str(tmp_path / "mae.pth")):
        opened = open_encoder(spec)
        assert torch.allclose(tokens(opened.network), tokens(vit), atol=1e-6)
        assert (opened.image_size, opened.mean) == (64, (0.485, 0.456, 0.406))


def test_a_timm_name_takes_its_weights_from_a_file(vit_weights):
    opened = open_encoder("timm/vit_tiny_patch16_224", 64, weights=vit_weights)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    vit.load_state_dict(load_file(vit_weights))
    vit.set_input_size(img_size=(64, 64))
    assert torch.allclose(tokens(opened.network), tokens(vit.eval()), atol=1e-6)
    assert opened.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("spec", "options", "named"),
    [
        ("nowhere", {}, "nowhere"),
        ("timm/pit_ti_224", {"pretrained": False}, "timm/pit_ti_224"),
        ("timm/vit_tiny_patch16_224", {"pretrained": False, "image_size": 100}, "--image-size 100"),
        ("timm/vit_tiny_patch15_224", {}, "did you mean"),
        ("file/nowhere.pth", {}, "nowhere.pth"),
        ("file/nowhere.pth", {"pretrained": False}, "--no-pretrained"),
    ],
)
def test_what_cannot_be_opened_is_named_in_one_line(spec, options, named):
    with pytest.raises(InputError, match=named) as caught:
        open_encoder(spec, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_or_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "vit"}')
    save_file({"patch_embed.proj.weight": torch.zeros(3)}, tmp_path / "odd.safetensors")
    for name in ("empty", "text.pth", "model", "odd.safetensors"):
        with pytest.raises(InputError, match=name):
            open_encoder(str(tmp_path / name))


def test_a_run_takes_no_other_weights(tiny_run, vit_weights):
    with pytest.raises(InputError, match="--weights"):
        open_encoder(str(tiny_run), weights=vit_weights)


def build_student(target_dim, depth=2, width=64, heads=2):
    encoder = build_encoder("vit_tiny_patch16_224", 64, 16, width, depth, heads)
    return Student(encoder, target_dim, decoder_width=32, decoder_heads=2)


def test_a_student_starts_from_a_runs_encoder_and_from_its_decoder_if_that_fits(tiny_run):
    description, trained = load_student(tiny_run)
    same_target, other_target = build_student(sum(description["target_dims"])), build_student(7)
    assert initialise_student(same_target, str(tiny_run)).startswith("the whole student")
    weights = same_target.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained.state_dict().items())
    assert initialise_student(other_target, str(tiny_run)).startswith("the encoder")
    assert torch.equal(other_target.encoder.blocks[1].mlp.fc1.weight, trained.encoder.blocks[1].mlp.fc1.weight)


def test_a_student_starts_from_published_weights_and_their_positions(tmp_path):
    vit = published_mae(tmp_path / "mae.pth")
    student = build_student(10, depth=None, width=None, heads=None)
    initialise_student(student, str(tmp_path / "mae.pth"))
    assert torch.equal(student.encoder.pos_embed, vit.pos_embed)


def test_weights_of_another_architecture_are_refused(tmp_path):
    published_mae(tmp_path / "mae.pth")
    deeper = build_student(10, depth=13, width=None, heads=None)
    with pytest.raises(InputError, match=r"--init .*blocks\.12"):
        initialise_student(deeper, str(tmp_path / "mae.pth"))


def test_a_network_starts_from_weights_whose_final_norm_has_the_other_place(tmp_path):
    """EVA pools its class token or the mean, with the norm before or after; a student has it before."""
    name = "eva02_tiny_patch14_224"
    published = timm.create_model(name, num_classes=0)
    assert published.fc_norm.weight.shape == (192,)
    torch.nn.init.normal_(published.fc_norm.weight)
    save_file(published.state_dict(), tmp_path / "eva.safetensors")
    exported = tmp_path / "exported"
    assert run(["export", f"timm/{name}", str(exported), "--weights", str(tmp_path / "eva.safetensors")]) == 0
    options = PretrainConfig(stores=("s",), run="r", encoder=f"timm/{name}", mask_ratio=0, image_size=224)
    student = student_of(options, 14, 7, 3)
    initialise_student(student, str(exported))
    assert torch.equal(student.encoder.norm.weight, published.fc_norm.weight)


def test_pretrain_starts_from_another_run_and_keeps_to_it(
    tiny_run, vit_store, tiny_student, tmp_path, capsys, error_line
):
    args = ["pretrain", str(vit_store), str(tmp_path / "run"), *tiny_student, "--epochs", "1", "--workers", "0"]
    assert run([*args, "--init", str(tiny_run)]) == 0
    assert f"the whole student of {tiny_run}" in capsys.readouterr().out
    assert "init" in error_line(args)  # without --init it would be another run


def test_a_network_that_is_no_plain_vit_is_opened_with_what_builds_it_again():
    torch.manual_seed(0)
    opened = open_encoder("timm/resnet10t", 64, pretrained=False, drop_path_rate=0.1, dynamic_img_size=True)
    assert (opened.is_vit, opened.image_size, opened.patch_size, opened.dim, opened.grid) == (False, 64, 32, 512, 2)
    assert opened.arguments == {"num_classes": 0, "in_chans": 3}
    again = timm.create_model(opened.architecture, **opened.arguments).eval()
    again.load_state_dict(opened.network.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images), opened.network(images))


def test_a_network_of_a_fixed_size_is_opened_at_another_where_its_weights_fit():
    opened = open_encoder("timm/swin_tiny_patch4_window7_224", 448, pretrained=False)
    assert (opened.arguments["img_size"], opened.grid) == (448, 14)
    with pytest.raises(InputError, match="64 px"):
        open_encoder("timm/swin_tiny_patch4_window7_224", 64, pretrained=False)


def exported(folder, **changes):
    """A model as timm itself exports it."""
    folder.mkdir()
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64, depth=1)
    timm.models.save_for_hf(network, folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return network.eval()


def test_an_export_of_timm_with_its_classifier_is_opened(tmp_path):
    network = exported(tmp_path / "model")
    assert torch.equal(tokens(load_encoder(tmp_path / "model")), tokens(network))


@pytest.mark.promise("networks")
@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"model_args": {"pretrained": True, "cache_dir": "x"}}, "the argument 'pretrained'"),
        ({"model_args": {"checkpoint_path": "evil.bin"}}, "the argument 'checkpoint_path'"),
        ({"architecture": "hf-hub:user/name"}, "timm has no network"),
        ({"architecture": 3}, "Expected `str`"),
        ({"model_args": {"depth": 10**8}}, "depth: "),
        ({"pretrained_cfg": {}}, "input_size"),
        ({"pretrained_cfg": {"input_size": [3, 64, 1 << 40], "mean": [0.5] * 3, "std": [0.5] * 3}}, "input_size"),
        ({"pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5], "std": [0.5]}}, "mean and std of 1 and 1"),
    ],
)
def test_an_export_that_asks_for_more_than_a_network_is_refused(changes, cause, tmp_path):
    exported(tmp_path / "model", **changes)
    with pytest.raises(InputError, match=rf"config\.json: .*{cause}"):
        load_encoder(tmp_path / "model")
    assert not (tmp_path / "x").exists()
