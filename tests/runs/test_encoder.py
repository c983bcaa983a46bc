"""RUN in all its forms gives the same features as its weights do, and what can't be opened is one line."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastmae.cli import run
from fastmae.errors import InputError
from fastmae.runs.encoder import initialise_student, load_encoder, open_encoder
from fastmae.runs.load import load_run, load_student
from fastmae.student.encoder import build_encoder
from fastmae.student.student import Student

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def tokens(network, images=IMAGES):
    with torch.no_grad():
        return network.forward_features(images)


def test_a_run_its_checkpoint_and_a_rebuilt_one_are_the_same_encoder(tiny_run):
    expected = tokens(load_encoder(tiny_run))
    for spec in (str(tiny_run), str(tiny_run / "checkpoint.pt")):
        opened = open_encoder(spec)
        assert torch.equal(tokens(opened.network), expected)
        assert (opened.image_size, opened.patch_size, opened.channels) == (64, 16, 3)
    again = timm.create_model(opened.architecture, **opened.arguments)
    again.load_state_dict(opened.network.state_dict())
    assert torch.equal(tokens(again.eval()), expected)
    assert json.loads(json.dumps(opened.describe()))["image_size"] == 64


def test_at_random_it_is_another_of_the_same_shape(tiny_run):
    torch.manual_seed(0)
    opened = open_encoder(str(tiny_run), pretrained=False)
    assert {n: t.shape for n, t in opened.network.state_dict().items()} == {
        n: t.shape for n, t in load_encoder(tiny_run).state_dict().items()
    }
    assert not torch.allclose(tokens(opened.network), tokens(load_encoder(tiny_run)), atol=1e-2)


def test_a_network_for_any_size_resamples_its_positions_as_a_resized_one_does(tiny_run):
    free, wide = open_encoder(str(tiny_run), any_size=True).network, torch.randn(1, 3, 96, 32)
    assert torch.allclose(tokens(free), tokens(load_encoder(tiny_run)), atol=1e-5)
    fixed = load_encoder(tiny_run)
    fixed.set_input_size(img_size=(96, 32))
    assert torch.allclose(tokens(free, wide), tokens(fixed, wide), atol=1e-5)
    assert open_encoder(str(tiny_run), 96).network.pos_embed.shape[1] == 37


def test_stochastic_depth_grows_to_the_last_block(tiny_run):
    network = open_encoder(str(tiny_run), drop_path=0.3).network
    assert isinstance(network.blocks[0].drop_path1, torch.nn.Identity)
    assert network.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)


def published_mae(path):
    """A checkpoint as MAE's authors lay theirs out: the decoder beside the encoder, under 'model'."""
    torch.manual_seed(1)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
    state = vit.state_dict() | {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    torch.save({"model": state, "epoch": 3}, path)
    return vit.eval()


def test_a_checkpoint_of_another_project_is_recognised_with_and_without_its_prefix(tmp_path):
    vit = published_mae(tmp_path / "mae.pth")
    for spec in (f"file/{tmp_path}/mae.pth", str(tmp_path / "mae.pth")):
        opened = open_encoder(spec)
        assert torch.allclose(tokens(opened.network), tokens(vit), atol=1e-6)
        assert (opened.image_size, opened.mean) == (64, (0.485, 0.456, 0.406))


def test_a_timm_name_with_a_weights_file(vit_weights):
    opened = open_encoder("timm/vit_tiny_patch16_224", 64, weights=vit_weights)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    vit.load_state_dict(open_encoder("timm/vit_tiny_patch16_224", weights=vit_weights).network.state_dict())
    vit.set_input_size(img_size=(64, 64))
    assert torch.allclose(tokens(opened.network), tokens(vit.eval()), atol=1e-6)
    assert opened.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        ("nowhere", {}, "no such run"),
        ("timm/resnet18", {"pretrained": False}, "a ResNet, not a plain ViT"),
        (
            "timm/vit_tiny_patch16_224",
            {"pretrained": False, "image_size": 100},
            "not a multiple of the patch of 16 px; take 96",
        ),
        ("timm/vit_tiny_patch15_224", {}, "did you mean"),
        ("file/nowhere.pth", {}, "no such weights file"),
        ("file/nowhere.pth", {"pretrained": False}, "nothing to read"),
    ],
)
def test_what_can_not_be_opened_is_one_line(spec, options, says):
    with pytest.raises(InputError, match=says) as caught:
        open_encoder(spec, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_or_file_of_another_kind_is_named(tmp_path, tiny_run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "vit"}')
    for name, says in (
        ("empty", "holds no run"),
        ("text.pth", "text.pth: "),
        ("model", "not the description of a timm model"),
    ):
        with pytest.raises(InputError, match=says):
            open_encoder(str(tmp_path / name))
    with pytest.raises(InputError, match="brings its own"):
        open_encoder(str(tiny_run), weights=tmp_path / "text.pth")


def student_of(run_folder):
    description, _ = load_run(run_folder)
    width, dim = description["options"]["encoder_width"], sum(description["target_dims"])
    return lambda dim=dim: Student(
        build_encoder("vit_tiny_patch16_224", 64, 16, width, 2, 2), dim, decoder_width=32, decoder_heads=2
    )


def test_a_student_begins_with_a_runs_weights_its_decoder_too_where_it_fits(tiny_run):
    make, (_, trained) = student_of(tiny_run), load_student(tiny_run)
    whole, other_target = make(), make(dim=7)
    assert initialise_student(whole, str(tiny_run)).startswith("the whole student")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), trained.state_dict().values(), strict=True)
    )
    assert initialise_student(other_target, str(tiny_run)).startswith("the encoder")
    assert torch.equal(other_target.encoder.blocks[1].mlp.fc1.weight, trained.encoder.blocks[1].mlp.fc1.weight)


def test_a_student_begins_with_published_weights_and_their_own_positions(tmp_path):
    vit = published_mae(tmp_path / "mae.pth")
    student = Student(build_encoder("vit_tiny_patch16_224", 64, 16), 10, decoder_width=32, decoder_heads=2)
    initialise_student(student, str(tmp_path / "mae.pth"))
    assert torch.equal(student.encoder.pos_embed, vit.pos_embed)
    deeper = Student(build_encoder("vit_tiny_patch16_224", 64, 16, depth=13), 10, decoder_width=32, decoder_heads=2)
    with pytest.raises(InputError, match=r"another encoder \(blocks.12.*give the --encoder"):
        initialise_student(deeper, str(tmp_path / "mae.pth"))


def test_pretrain_goes_on_from_another_run(tiny_run, vit_store, tiny_student, tmp_path, capsys):
    args = [
        "pretrain",
        str(vit_store),
        str(tmp_path / "run"),
        *tiny_student,
        "--epochs",
        "1",
        "--workers",
        "0",
        "--json",
    ]
    assert run([*args, "--init", str(tiny_run)]) == 0
    assert f"begins with the whole student of {tiny_run}" in capsys.readouterr().err
    assert run(args) == 2  # another run than the one begun
    assert "init: " in capsys.readouterr().err


def test_weights_exported_elsewhere_are_read_without_running_code(tmp_path, vit_weights):
    save_file({"patch_embed.proj.weight": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="no ViT in the layout"):
        open_encoder(str(tmp_path / "odd.safetensors"))
