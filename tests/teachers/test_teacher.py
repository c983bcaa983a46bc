"""What part of which network a teacher taps, at what size, and where its weights come from."""

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastmae.errors import InputError
from fastmae.teachers import Teacher, load_teacher
from fastmae.teachers.factory import teacher_of_store


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def network(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **options).eval()


@pytest.mark.parametrize(
    ("name", "patch_size"),
    [
        ("vit_tiny_patch16_224", 16),
        ("vit_small_patch14_dinov2", 14),
        ("vit_small_patch14_reg4_dinov2", 14),
        ("vit_tiny_r_s16_p8_224", 32),
    ],
)
def test_a_vit_of_any_patch_size_gives_one_normed_token_for_each_patch_of_the_student(name, patch_size, pixels):
    model = network(name)
    teacher = Teacher("timm/" + name, model, middle_size=64, grid=4)
    assert teacher.input_size == 4 * patch_size
    tokens = teacher(pixels)
    assert tokens.shape == (2, 4, 4, model.embed_dim)
    # The reference is timm's own forward pass: all tokens after the final norm, without the prefix.
    images = F.interpolate(
        pixels.float(), size=(4 * patch_size, 4 * patch_size), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 255)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.forward_features((images / 255 - mean) / std)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(tokens.flatten(1, 2), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224",  # MAE's and DINO's kind
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",  # rotary positions, four registers
        "vit_base_patch32_clip_224",  # a norm before the blocks, its own mean and std
        "vit_base_patch16_siglip_224",  # no class token, mean and std 0.5
        "eva02_tiny_patch14_224",  # its norm comes after the pooling, so none over the patches
    ],
)
def test_weights_saved_and_loaded_give_the_features_of_the_original(name, tmp_path):
    model = network(name)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    size = model.pretrained_cfg["input_size"][-1]
    grid = size // model.patch_embed.patch_size[0]
    teacher = load_teacher(
        f"timm/{name}", size, grid, tmp_path / "w.safetensors", norm="none" if name.startswith("eva02") else "auto"
    )
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.forward_features((pixels / 255 - mean) / std)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(teacher(pixels).flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_openais_name_of_a_clip_gives_timms_encoder_with_the_activation_of_its_training(tmp_path):
    model = network("vit_base_patch32_clip_quickgelu_224")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    teacher = load_teacher("clip/ViT-B/32", 64, 4, tmp_path / "w.safetensors")
    assert torch.equal(teacher(pixels), Teacher("t", model, 64, 4)(pixels))
    again = teacher_of_store(teacher.describe(), 64, 4)
    assert torch.equal(again(pixels), teacher(pixels))


def test_the_last_blocks_are_averaged_after_the_norm(pixels):
    one_by_one = [
        Teacher("t", network("vit_tiny_patch16_224"), 64, 4, block=b, norm="final")(pixels) for b in (9, 10, 11)
    ]
    together = Teacher("t", network("vit_tiny_patch16_224"), 64, 4, last=3)
    assert (together.block, together.last, together.norm) == (11, 3, "final")
    torch.testing.assert_close(together(pixels), sum(one_by_one) / 3, atol=1e-5, rtol=1e-5)
    for last, name in ((0, "vit_tiny_patch16_224"), (13, "vit_tiny_patch16_224"), (2, "resnet18")):
        with pytest.raises(InputError, match=f"--teacher-last {last}"):
            Teacher("t", network(name), 64, 4, last=last)


def test_an_inner_block_is_normed_without_parameters(pixels):
    model = network("vit_tiny_patch16_224")
    teacher = Teacher("t", model, 64, 4, block=5)
    assert (teacher.block, teacher.norm) == (5, "layer")
    tokens = teacher(pixels)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(2, 4, 4), atol=1e-3, rtol=0)
    raw = Teacher("t", network("vit_tiny_patch16_224"), 64, 4, block=5, norm="none")(pixels)
    torch.testing.assert_close(tokens, F.layer_norm(raw, raw.shape[-1:], eps=1e-6), atol=1e-5, rtol=1e-4)
    assert Teacher("t", network("vit_tiny_patch16_224"), 64, 4, block=-1).block == 11


def test_a_cnn_sees_at_least_its_training_size_and_its_map_is_interpolated_to_the_grid(pixels):
    model = network("resnet18")
    teacher = Teacher("timm/resnet18", model, middle_size=64, grid=8)
    assert (teacher.kind, teacher.norm, teacher.input_size) == ("cnn", "none", 224)
    tokens = teacher(pixels)
    assert tokens.shape == (2, 8, 8, 512)
    # The stage of stride 8 has the student's grid already.
    fine = Teacher("timm/resnet18", network("resnet18"), middle_size=64, grid=8, block=2)
    assert fine.input_size == 64
    assert fine(pixels).shape == (2, 8, 8, 128)


@pytest.mark.parametrize(
    "name", ["convnext_atto", "regnetx_002", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"]
)
@pytest.mark.parametrize("grid", [8, 12])  # 12: the swin sees 352 px, not its native 224
def test_other_families_give_the_students_grid(name, grid, pixels):
    teacher = Teacher("timm/" + name, network(name), middle_size=352 if grid == 12 else 64, grid=grid)
    assert teacher(pixels if grid == 8 else F.interpolate(pixels, 352)).shape[:3] == (2, grid, grid)


@pytest.mark.parametrize("name", ["gmlp_s16_224", "hiera_tiny_224"])  # built for one size only, each in its own way
def test_a_model_of_a_fixed_size_is_refused_by_name(name):
    with pytest.raises(InputError, match=rf"timm/{name}: can't be a teacher here \(.+\)"):
        Teacher(f"timm/{name}", network(name), middle_size=96, grid=6)


def test_a_block_a_norm_or_a_size_that_a_model_does_not_have_is_refused():
    with pytest.raises(InputError, match="--teacher-block 12"):
        Teacher("t", network("vit_tiny_patch16_224"), 64, 4, block=12)
    with pytest.raises(InputError, match="--teacher-norm final"):
        Teacher("t", network("resnet18"), 64, 4, norm="final")
    with pytest.raises(InputError, match="--teacher-size 100"):
        Teacher("t", network("vit_tiny_patch16_224"), 64, 4, input_size=100)


def test_one_changed_weight_changes_the_digest():
    model = network("vit_tiny_patch16_224")
    before = Teacher("t", model, 64, 4).weights_sha256
    with torch.no_grad():
        model.norm.weight[0] += 1
    assert Teacher("t", model, 64, 4).weights_sha256 != before


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("resnet18", "give timm/NAME"),
        ("timm/vit_tiny_patch16_24", "did you mean timm/vit_tiny_patch16_224"),
        ("dino/vitb16", "give timm/NAME, hf/NAME, clip/NAME, file/PATH"),
        ("clip/RN50", "there are clip/ViT-B-32"),
        ("file/none.pth", "no such weights file"),
    ],
)
def test_an_unknown_teacher_is_refused_with_what_exists(spec, hint):
    with pytest.raises(InputError, match=hint):
        load_teacher(spec, 64, 4)


def test_a_hub_name_without_a_network_fails_at_once_with_a_teacher_that_works(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"no network.*efficientnet-lite0") as caught:
        load_teacher("timm/vit_base_patch16_224.dino", 64, 4)
    assert "\n" not in str(caught.value)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # the network may be back for the next one


def test_weights_load_strictly_from_safetensors_and_pytorch_files(tmp_path, pixels):
    model = timm.create_model("vit_tiny_patch16_224")  # with a classifier, which the teacher leaves out
    plain, nested = tmp_path / "w.safetensors", tmp_path / "w.pth"
    save_file(model.state_dict(), plain)
    torch.save({"model": model.state_dict(), "epoch": 3}, nested)
    tokens = [load_teacher("timm/vit_tiny_patch16_224", 64, 4, path)(pixels) for path in (plain, nested)]
    assert torch.equal(*tokens)
    with pytest.raises(InputError, match="not the weights of this model"):
        load_teacher("timm/resnet18", 64, 4, plain)
    with pytest.raises(InputError, match="shape"):
        load_teacher("timm/vit_small_patch16_224", 64, 4, plain)


def test_a_weights_file_with_code_in_it_or_a_cut_one_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="holds more than tensors"):
        load_teacher("timm/vit_tiny_patch16_224", 64, 4, tmp_path / "evil.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(InputError, match="damaged"):
        load_teacher("timm/vit_tiny_patch16_224", 64, 4, tmp_path / "cut.safetensors")


def test_a_stores_description_loads_the_same_teacher_and_refuses_changed_weights(vit_weights, tmp_path, pixels):
    teacher = load_teacher("timm/vit_tiny_patch16_224", 64, 4, vit_weights, block=3)
    assert torch.equal(teacher_of_store(teacher.describe(), 64, 4)(pixels), teacher(pixels))
    with pytest.raises(InputError, match="SHA-256 differs"):
        teacher_of_store({**teacher.describe(), "weights_sha256": "0" * 64}, 64, 4)


def test_a_weights_file_is_found_again_from_another_working_folder(tmp_path, pixels, monkeypatch):
    torch.save(network("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
    monkeypatch.chdir(tmp_path)
    teacher = load_teacher("file/vit.pth", 64, 4)
    monkeypatch.chdir("/")
    assert torch.equal(teacher_of_store(teacher.describe(), 64, 4)(pixels), teacher(pixels))


def test_weights_of_another_image_size_are_read_and_resampled_once(tmp_path, pixels):
    torch.manual_seed(0)
    larger = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=96).eval()
    state = {f"module._orig_mod.{name}": tensor for name, tensor in larger.state_dict().items()}
    torch.save({"state_dict": state, "best_acc1": torch.tensor(70.0)}, tmp_path / "a.pth")
    teacher = load_teacher("timm/vit_tiny_patch16_224", 64, 4, weights=tmp_path / "a.pth")
    larger.reset_classifier(0)
    torch.testing.assert_close(teacher(pixels), Teacher("t", larger, 64, 4)(pixels))
    assert teacher_of_store(teacher.describe(), 64, 4).weights_sha256 == teacher.weights_sha256


@pytest.mark.promise("networks")
@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"spec": 5}, "Expected `str`"),
        ({"block": -1}, "block"),
        ({"input_size": 1 << 40}, "input_size"),
        ({"channels": [0]}, "channels"),
        ({"precision": "8-true"}, "precision"),
        ({"weights_file": "user/name"}, "no absolute path"),
        ({"weights_file": "/dev/zero"}, "is a device"),
        ({"spec": "timm/hf-hub:user/name"}, "timm has no network"),
        ({"spec": "http://127.0.0.1/x", "weights_file": None}, "no teacher"),
    ],
)
def test_a_teacher_that_a_store_describes_wrongly_is_refused_in_one_line(changes, cause, vit_weights):
    described = load_teacher("timm/vit_tiny_patch16_224", 64, 4, weights=vit_weights).describe()
    with pytest.raises(InputError, match=cause):
        teacher_of_store({**described, **changes}, 64, 4, "STORE")
