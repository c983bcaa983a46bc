"""Random vision models of transformers, saved by save_pretrained: the loaded teacher gives the model's own features."""

import json

import pytest
import torch
import transformers

from fastmae.errors import InputError
from fastmae.teachers import load_teacher

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
}
VITS = {
    "vit": (transformers.ViTConfig(**SMALL), transformers.ViTModel),
    "vit_mae": (transformers.ViTMAEConfig(**SMALL), transformers.ViTMAEModel),
    "dinov2": (transformers.Dinov2Config(**SMALL, mlp_ratio=2), transformers.Dinov2Model),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, num_register_tokens=4),
        transformers.Dinov2WithRegistersModel,
    ),
    "dinov3": (transformers.DINOv3ViTConfig(**SMALL, num_register_tokens=4), transformers.DINOv3ViTModel),
    "clip": (transformers.CLIPVisionConfig(**SMALL), transformers.CLIPVisionModel),
    "siglip": (transformers.SiglipVisionConfig(**SMALL), transformers.SiglipVisionModel),
}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def saved(name, folder):
    torch.manual_seed(0)
    config, kind = VITS[name]
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(pixels):
    return (pixels / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


@pytest.mark.parametrize("name", [name for name in VITS if name not in ("vit_mae", "clip")])
def test_a_saved_vit_gives_the_patches_of_its_last_hidden_state(name, pixels, tmp_path):
    model = saved(name, tmp_path)
    teacher = load_teacher(f"hf/{tmp_path}", 64, 4)
    with torch.no_grad():
        expected = model(normalised(pixels)).last_hidden_state[:, -16:]  # after the final norm
    assert teacher.norm == "final"
    torch.testing.assert_close(teacher(pixels).flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_without_a_norm_clip_gives_its_last_hidden_state(pixels, tmp_path):
    model = saved("clip", tmp_path)
    with torch.no_grad():
        expected = model(normalised(pixels)).last_hidden_state[:, 1:]
    bare = load_teacher(f"hf/{tmp_path}", 64, 4, norm="none")(pixels).flatten(1, 2)
    torch.testing.assert_close(bare, expected, atol=1e-5, rtol=1e-5)


def test_mae_encodes_all_patches_in_their_order(pixels, tmp_path):
    model = saved("vit_mae", tmp_path)
    noise = torch.arange(16.0).expand(2, 16)  # an ascending order: with nothing masked, every patch keeps its place
    model.config.mask_ratio = 0.0
    with torch.no_grad():
        expected = model(normalised(pixels), noise=noise).last_hidden_state[:, 1:]
    torch.testing.assert_close(
        load_teacher(f"hf/{tmp_path}", 64, 4)(pixels).flatten(1, 2), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", list(VITS))
def test_every_family_takes_another_grid_and_another_block(name, pixels, tmp_path):
    saved(name, tmp_path)
    teacher = load_teacher(f"hf/{tmp_path}", 64, 8, block=1)
    assert (teacher.input_size, teacher.norm) == (128, "layer")
    tokens = teacher(pixels)
    assert tokens.shape == (2, 8, 8, 48)
    assert torch.isfinite(tokens).all()


def test_a_cnn_gives_the_map_of_a_stage(pixels, tmp_path):
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64)
    model = transformers.ConvNextModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    teacher = load_teacher(f"hf/{tmp_path}", 64, 4, block=2)  # stride 16
    assert teacher.kind == "cnn"
    with torch.no_grad():
        expected = model(normalised(pixels), output_hidden_states=True).hidden_states[3].permute(0, 2, 3, 1)
    torch.testing.assert_close(teacher(pixels), expected, atol=1e-5, rtol=1e-5)


def test_a_swin_gives_the_map_of_its_last_stage(pixels, tmp_path):
    torch.manual_seed(0)
    config = transformers.SwinConfig(embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=64)
    model = transformers.SwinModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    teacher = load_teacher(f"hf/{tmp_path}", 64, 8)
    with torch.no_grad():
        expected = model(normalised(pixels), output_hidden_states=True).reshaped_hidden_states[-1].permute(0, 2, 3, 1)
    torch.testing.assert_close(teacher(pixels), expected, atol=1e-5, rtol=1e-5)


def test_a_missing_model_or_image_processor_is_reported_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"hf/.*can't be loaded") as caught:
        load_teacher(f"hf/{tmp_path}/none", 64, 4)
    assert "\n" not in str(caught.value)
    saved("vit", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"no preprocessor_config\.json"):
        load_teacher(f"hf/{tmp_path}", 64, 4)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_model_saved_in_16_bits_computes_in_32(kind, pixels, tmp_path):
    model = saved("vit", tmp_path).to(kind)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.float()(normalised(pixels)).last_hidden_state[:, 1:]
    tokens = load_teacher(f"hf/{tmp_path}", 64, 4)(pixels).flatten(1, 2)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_a_cnn_saved_in_16_bits_is_read(pixels, tmp_path):
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64)
    transformers.ConvNextModel(config).bfloat16().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    assert load_teacher(f"hf/{tmp_path}", 64, 4)(pixels).dtype == torch.float32


@pytest.mark.promise("networks")
@pytest.mark.parametrize("kind", [None, "unknown"])
def test_a_model_with_code_of_its_own_is_refused_and_nothing_is_asked(kind, tmp_path, monkeypatch):
    saved("vit", tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change_config(tmp_path, model_type=kind, auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(InputError, match="auto_map"):
        load_teacher(f"hf/{tmp_path}", 64, 4)
    assert not (tmp_path / "ran").exists()


@pytest.mark.promise("networks")
@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"attn_implementation": "user/kernel"}, "the attention 'user/kernel'"),
        ({"num_hidden_layers": 10**8}, "100000000"),
        ({"hidden_size": 48 * 10**4}, "describes a network of"),
        ({"num_attention_heads": 0}, "can't be loaded"),
        ({"patch_size": "x"}, "can't be loaded"),
    ],
)
def test_a_description_that_asks_for_something_else_is_refused_in_one_line(changes, cause, tmp_path):
    saved("vit", tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(InputError, match=rf"hf/{tmp_path}: .*{cause}") as caught:
        load_teacher(f"hf/{tmp_path}", 64, 4)
    assert "\n" not in str(caught.value)


@pytest.mark.promise("networks")
def test_a_download_that_failed_and_weights_that_are_no_numbers_are_named(tmp_path):
    model = saved("vit", tmp_path)
    torch.nn.init.constant_(model.layernorm.bias, torch.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"layernorm\.bias holds NaN"):
        load_teacher(f"hf/{tmp_path}", 64, 4)
    (tmp_path / "model.safetensors").write_text("<html>")
    with pytest.raises(InputError, match=r"model\.safetensors: is a web page"):
        load_teacher(f"hf/{tmp_path}", 64, 4)
