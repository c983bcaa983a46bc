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
    ("name", "patch"),
    [
        ("vit_tiny_patch16_224", 16),
        ("vit_small_patch14_dinov2", 14),
        ("vit_small_patch14_reg4_dinov2", 14),
        ("vit_tiny_r_s16_p8_224", 32),
    ],
)
def test_a_vit_gives_its_normed_patch_tokens_one_for_one_whatever_its_patch(name, patch, pixels):
    model = network(name)
    teacher = Teacher("timm/" + name, model, middle_size=64, grid=4)
    assert teacher.input_size == 4 * patch
    tokens = teacher(pixels)
    assert tokens.shape == (2, 4, 4, model.embed_dim)
    # Written out with timm's own forward: all tokens after the final norm, prefix dropped.
    images = F.interpolate(
        pixels.float(), size=(4 * patch, 4 * patch), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 255)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.forward_features((images / 255 - mean) / std)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(tokens.flatten(1, 2), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224",  # MAE's and DINO's kind
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",  # rotary positions, four registers
        "vit_base_patch32_clip_224",  # a norm before the blocks, its own mean and deviation
        "vit_base_patch16_siglip_224",  # no class token, mean and deviation 0.5
        "eva02_tiny_patch14_224",  # its norm comes after the pooling: none over the patches
    ],
)
def test_each_family_saved_and_loaded_gives_what_the_original_gives(name, tmp_path):
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


def test_clip_by_its_own_name_is_timms_encoder_with_the_activation_it_was_trained_with(tmp_path):
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


def test_another_block_is_tapped_and_layer_normed_without_parameters(pixels):
    model = network("vit_tiny_patch16_224")
    teacher = Teacher("t", model, 64, 4, block=5)
    assert (teacher.block, teacher.norm) == (5, "layer")
    tokens = teacher(pixels)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(2, 4, 4), atol=1e-3, rtol=0)
    raw = Teacher("t", network("vit_tiny_patch16_224"), 64, 4, block=5, norm="none")(pixels)
    torch.testing.assert_close(tokens, F.layer_norm(raw, raw.shape[-1:], eps=1e-6), atol=1e-5, rtol=1e-4)
    assert Teacher("t", network("vit_tiny_patch16_224"), 64, 4, block=-1).block == 11


def test_a_cnn_sees_at_least_its_own_size_and_its_map_is_brought_to_the_grid(pixels):
    model = network("resnet18")
    teacher = Teacher("timm/resnet18", model, middle_size=64, grid=8)
    assert (teacher.kind, teacher.norm, teacher.input_size) == ("cnn", "none", 224)
    tokens = teacher(pixels)
    assert tokens.shape == (2, 8, 8, 512)
    fine = Teacher(
        "timm/resnet18", network("resnet18"), middle_size=64, grid=8, block=2
    )  # stride 8: its grid is the student's
    assert fine.input_size == 64
    assert fine(pixels).shape == (2, 8, 8, 128)


@pytest.mark.parametrize(
    "name", ["convnext_atto", "regnetx_002", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"]
)
@pytest.mark.parametrize("grid", [8, 12])  # 12: swin looks at 352 px, not at its own 224
def test_other_families_give_a_grid_too(name, grid, pixels):
    teacher = Teacher("timm/" + name, network(name), middle_size=352 if grid == 12 else 64, grid=grid)
    assert teacher(pixels if grid == 8 else F.interpolate(pixels, 352)).shape[:3] == (2, grid, grid)


@pytest.mark.parametrize("name", ["gmlp_s16_224", "hiera_tiny_224"])  # made for one size only, each in its own way
def test_a_model_that_can_not_look_at_another_size_is_one_line_with_its_name(name):
    with pytest.raises(InputError, match=rf"timm/{name}: can't be a teacher here \(.+\); take another"):
        Teacher(f"timm/{name}", network(name), middle_size=96, grid=6)


def test_what_a_teacher_does_not_have_is_an_input_error():
    with pytest.raises(InputError, match="blocks 0 to 11"):
        Teacher("t", network("vit_tiny_patch16_224"), 64, 4, block=12)
    with pytest.raises(InputError, match="no final norm"):
        Teacher("t", network("resnet18"), 64, 4, norm="final")
    with pytest.raises(InputError, match="not a multiple"):
        Teacher("t", network("vit_tiny_patch16_224"), 64, 4, size=100)


def test_the_digest_changes_with_one_weight():
    model = network("vit_tiny_patch16_224")
    before = Teacher("t", model, 64, 4).weights_sha256
    with torch.no_grad():
        model.norm.weight[0] += 1
    assert Teacher("t", model, 64, 4).weights_sha256 != before


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resnet18", "give timm/NAME"),
        ("timm/vit_tiny_patch16_24", "did you mean timm/vit_tiny_patch16_224"),
        ("dino/vitb16", "give timm/NAME, hf/NAME, clip/NAME, file/PATH"),
        ("clip/RN50", "there are clip/ViT-B-32"),
        ("file/none.pth", "no such weights file"),
    ],
)
def test_an_unknown_teacher_is_named_with_what_there_is(spec, says):
    with pytest.raises(InputError, match=says):
        load_teacher(spec, 64, 4)


def test_a_hub_name_without_a_network_fails_at_once_and_says_what_works(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"no network.*efficientnet-lite0") as caught:
        load_teacher("timm/vit_base_patch16_224.dino", 64, 4)
    assert "\n" not in str(caught.value)


def test_weights_files_load_strictly_in_both_kinds_of_file(tmp_path, pixels):
    model = timm.create_model("vit_tiny_patch16_224")  # with its classifier, which is left out
    plain, nested = tmp_path / "w.safetensors", tmp_path / "w.pth"
    save_file(model.state_dict(), plain)
    torch.save({"model": model.state_dict(), "epoch": 3}, nested)
    tokens = [load_teacher("timm/vit_tiny_patch16_224", 64, 4, path)(pixels) for path in (plain, nested)]
    assert torch.equal(*tokens)
    with pytest.raises(InputError, match="not the weights of this model"):
        load_teacher("timm/resnet18", 64, 4, plain)
    with pytest.raises(InputError, match="shape"):
        load_teacher("timm/vit_small_patch16_224", 64, 4, plain)


def test_a_weights_file_with_code_in_it_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="holds more than tensors"):
        load_teacher("timm/vit_tiny_patch16_224", 64, 4, tmp_path / "evil.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(InputError, match="damaged"):
        load_teacher("timm/vit_tiny_patch16_224", 64, 4, tmp_path / "cut.safetensors")


def test_a_stores_description_makes_the_same_teacher_again_or_says_that_it_changed(vit_weights, tmp_path, pixels):
    teacher = load_teacher("timm/vit_tiny_patch16_224", 64, 4, vit_weights, block=3)
    assert torch.equal(teacher_of_store(teacher.describe(), 64, 4)(pixels), teacher(pixels))
    with pytest.raises(InputError, match="SHA-256 differs"):
        teacher_of_store({**teacher.describe(), "weights_sha256": "0" * 64}, 64, 4)


def test_a_file_named_from_another_folder_is_found_again(tmp_path, pixels, monkeypatch):
    torch.save(network("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
    monkeypatch.chdir(tmp_path)
    teacher = load_teacher("file/vit.pth", 64, 4)
    monkeypatch.chdir("/")
    assert torch.equal(teacher_of_store(teacher.describe(), 64, 4)(pixels), teacher(pixels))
