"""The layout in which timm keeps models on the hub: config.json says how to build the network, model.safetensors holds its weights."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch

from fastmae import __version__
from fastmae.config.exporting import ExportConfig
from fastmae.exporting.format import Exported, Format, outputs_of
from fastmae.runs.encoder import EXPORT_CONFIG, EXPORT_WEIGHTS
from fastmae.runtime.durable import write_json

CROP_MODES = {"whole": "squash", "center": "center"}
"""`Exported.crop` -> what timm's transforms call it."""


def write(model: Exported, folder: Path, _: ExportConfig) -> None:
    """Write both files."""
    weights = {name: tensor.detach().contiguous() for name, tensor in model.network.state_dict().items()}
    safetensors.torch.save_file(weights, folder / EXPORT_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / EXPORT_CONFIG, config(model))


def config(model: Exported) -> dict[str, Any]:
    """The content of config.json; nothing of what timm knows of its own weights for this architecture (source, tag, licence) is in it."""
    classes = len(model.classes)
    return {
        "architecture": model.architecture,
        "num_classes": classes,
        "num_features": model.dim,
        "global_pool": str(model.network.global_pool),
        **({"label_names": list(model.classes)} if classes else {}),
        "model_args": model.arguments,
        "pretrained_cfg": {
            "tag": "fastmae",
            "custom_load": False,
            "input_size": [model.channels, model.image_size, model.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": model.crop_share,
            "crop_mode": CROP_MODES[model.crop],
            "mean": list(model.mean),
            "std": list(model.std),
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "fastmae": {"version": __version__, "resize": model.resize},
    }


@torch.inference_mode()
def read(folder: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that the network gives which timm makes of a folder."""
    network: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return outputs_of(network.eval(), images)


def usage(model: Exported, folder: str) -> str:
    """How timm loads it."""
    prefix, patches = model.network.num_prefix_tokens, model.network.patch_embed.num_patches
    what = (
        f"logits = model(images)  # [B, {len(model.classes)}]"
        if model.classes
        else f"features = model(images)  # [B, {model.dim}]"
    )
    return f"""\
import timm
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
# from the hub, once this folder lies there: timm.create_model("hf-hub:USER/NAME", pretrained=True)
# or built by name, its weights from the file:
model = timm.create_model({_by_name(model, folder)}).eval()

transform = create_transform(**resolve_model_data_config(model))  # a PIL image -> a tensor [{model.shape}]
{what}, of images [B, {model.shape}]
tokens = model.forward_features(images)  # [B, {prefix} + {patches}, {model.dim}]: {prefix} before the patches' own
"""


def _by_name(model: Exported, folder: str) -> str:
    """The arguments of `timm.create_model` that build it by its architecture's name and load the file."""
    source: dict[str, Any] = {
        "file": f"{folder}/{EXPORT_WEIGHTS}",
        "custom_load": False,
        "num_classes": len(model.classes),
    }
    if model.channels != 3:
        source["input_size"] = (model.channels, model.image_size, model.image_size)
    arguments = f"pretrained=True, pretrained_cfg_overlay=dict({_keywords(source)}),\n    {_keywords(model.arguments)},"
    return f'\n    "{model.architecture}", {arguments}\n'


def _keywords(values: dict[str, Any]) -> str:
    written = {name: json.dumps(value) if isinstance(value, str) else repr(value) for name, value in values.items()}
    return ", ".join(f"{name}={value}" for name, value in written.items())


TIMM = Format("timm", lambda _: None, write, read, usage)
