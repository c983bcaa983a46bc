"""The layout of timm models on the hub: config.json describes the network, model.safetensors holds its weights."""

import json
from pathlib import Path
from typing import Any

import timm
import torch

from fastmae import __version__
from fastmae.config import ExportConfig
from fastmae.exporting.export_format import ExportFormat
from fastmae.exporting.exported_model import ExportedModel, model_outputs
from fastmae.exporting.output_folder import write_weights
from fastmae.images.value_range import range_entry
from fastmae.runs.timm_config import EXPORT_CONFIG, EXPORT_WEIGHTS
from fastmae.runtime.durable import write_json

CROP_MODES = {"whole": "squash", "center": "center"}
"""`ExportedModel.crop` -> the name in timm's transforms."""


def write(model: ExportedModel, folder: Path, _: ExportConfig) -> None:
    """Write both files."""
    weights = {name: tensor.detach().contiguous() for name, tensor in model.network.state_dict().items()}
    write_weights(folder / EXPORT_WEIGHTS, weights)
    write_json(folder / EXPORT_CONFIG, config(model))


def config(model: ExportedModel) -> dict[str, Any]:
    """The content of config.json.

    The source, tag and licence of timm's own weights for this architecture are left out: they don't apply here.
    """
    classes, own = len(model.classes), model.network.pretrained_cfg
    pool = getattr(model.network, "global_pool", None)
    return {
        "architecture": model.architecture,
        "num_classes": classes,
        "num_features": model.dim,
        **({"global_pool": pool} if isinstance(pool, str) else {}),  # a module in a ResNet, which builds its own
        **({"label_names": list(model.classes)} if classes else {}),
        "model_args": model.arguments,
        "pretrained_cfg": {
            "tag": "fastmae",
            "custom_load": False,
            "input_size": [model.channels, model.image_size, model.image_size],
            "fixed_input_size": "img_size" in model.arguments,  # timm then builds the network with img_size
            "interpolation": "bicubic",
            "crop_pct": model.crop_share,
            "crop_mode": CROP_MODES[model.crop],
            "mean": list(model.mean),
            "std": list(model.std),
            "num_classes": classes,
            "first_conv": own["first_conv"],
            "classifier": own["classifier"],
        },
        "fastmae": {"version": __version__, "resize": model.resize, **range_entry(model.value_range)},
    }


@torch.inference_mode()
def read(_: ExportedModel, folder: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """All outputs, from the network that timm builds from the folder."""
    network: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model_outputs(network.eval(), images)


def usage(model: ExportedModel, folder: str) -> str:
    """Python code that loads the folder with timm."""
    return f"""\
import timm
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
# From the hub, once the folder is uploaded: timm.create_model("hf-hub:USER/NAME", pretrained=True)
# Or build the architecture by its name and load the weights file:
model = timm.create_model({_arguments_by_name(model, folder)}).eval()

transform = create_transform(**resolve_model_data_config(model))  # PIL image -> tensor [{model.image_shape}]
{_outputs(model)}"""


def _outputs(model: ExportedModel) -> str:
    """Python code for the outputs of `images`."""
    logits = f"logits = model(images)  # images [B, {model.image_shape}] -> [B, {len(model.classes)}]\n"
    if model.is_vit:
        prefix, patches = model.network.num_prefix_tokens, model.network.patch_embed.num_patches
        features = f"features = model(images)  # images [B, {model.image_shape}] -> [B, {model.dim}]\n"
        tokens = f"[B, {prefix} + {patches}, {model.dim}]: prefix tokens, patch tokens"
        return (logits if model.classes else features) + f"tokens = model.forward_features(images)  # {tokens}\n"
    with torch.inference_mode():
        final = model.network.forward_features(torch.zeros(1, model.channels, model.image_size, model.image_size))
    shape = ", ".join(map(str, final.shape[1:]))
    if final.dim() == 3:  # tokens; the last ones are those of the map
        prefix = final.shape[1] - model.grid**2
        mean = f"final[:, {prefix}:].mean(1)" if prefix else "final.mean(1)"
    else:
        mean = "final.mean((2, 3))" if final.shape[1] == model.dim else "final.mean((1, 2))"
    return (
        (logits if model.classes else "")
        + f"final = model.forward_features(images)  # images [B, {model.image_shape}] -> [B, {shape}]\n"
        + f"features = {mean}  # [B, {model.dim}]\n"
    )


def _arguments_by_name(model: ExportedModel, folder: str) -> str:
    """The arguments with which `timm.create_model` builds the architecture by name and loads the weights file."""
    overlay: dict[str, Any] = {
        "file": f"{folder}/{EXPORT_WEIGHTS}",
        "custom_load": False,
        "num_classes": len(model.classes),
    }
    if model.channels != 3:
        overlay["input_size"] = (model.channels, model.image_size, model.image_size)
    return f"""
    "{model.architecture}", pretrained=True, pretrained_cfg_overlay=dict({_as_keywords(overlay)}),
    {_as_keywords(model.arguments)},
"""


def _as_keywords(values: dict[str, Any]) -> str:
    """Keyword arguments as Python code."""
    literals = {name: json.dumps(value) if isinstance(value, str) else repr(value) for name, value in values.items()}
    return ", ".join(f"{name}={literal}" for name, literal in literals.items())


TIMM = ExportFormat("timm", lambda _: None, write, read, usage)
