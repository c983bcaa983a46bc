"""hf/NAME: the vision models of transformers, by hub name or from a folder that `save_pretrained` wrote."""

import inspect
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmae.errors import InputError, first_line

FINAL_NORMS = ("layernorm", "norm", "post_layernorm")
"""What the norm after the last block is called in transformers' families."""
MASKS_ITS_INPUT = {"vit_mae": "vit"}
"""Kinds whose own class hides most patches in every forward -> the kind that is the same encoder without that."""
NOT_FOUND = (OSError, ValueError, KeyError, RuntimeError)


class HuggingFaceNetwork(nn.Module):
    """A vision model of transformers as a `Network`.

    ViTs are tapped by a hook on their blocks, since the families differ in what else they give; the patch tokens are the
    last h x w of a block's output (class and register tokens come first in all of them).

    Args:
        spec: its name, for messages.
        model: the vision part, with its weights.
        mean: by which its images are normalised.
        std: the same.

    Raises:
        InputError: a model without blocks of tokens or stages of maps.
    """

    def __init__(self, spec: str, model: Any, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model: Any = model
        self.mean, self.std = tuple(mean), tuple(std)
        config = model.config
        depth = int(getattr(config, "num_hidden_layers", 0))
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        self.blocks: Any = next((blocks for blocks in lists if len(blocks) == depth), None)
        sizes = getattr(config, "image_size", None) or 224
        self.native_size = int(sizes if isinstance(sizes, int) else sizes[0])
        norms = [getattr(model, name) for name in FINAL_NORMS if isinstance(getattr(model, name, None), nn.Module)]
        self.final_norm: Any = norms[0] if norms else None
        if getattr(config, "depths", None):  # stages: ConvNeXt, ResNet, Swin
            self.kind, self.depth, self.patch, self.has_final_norm = "cnn", len(config.depths), 0, False
        elif self.blocks is not None and hasattr(config, "patch_size"):
            self.kind, self.depth, self.patch = "vit", depth, int(config.patch_size)
            self.has_final_norm = self.final_norm is not None
        else:
            raise InputError(
                f"{spec}: this kind of model ({config.model_type}) has no blocks that fastmae can tap; take a ViT or a CNN"
            )
        named = inspect.signature(model.forward).parameters
        self.keywords = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in named else {}

    def look_at(self, size: int) -> None:
        """Nothing to do: position embeddings are resampled in the forward."""

    def features(self, images: torch.Tensor, blocks: Sequence[int], final_norm: bool) -> list[torch.Tensor]:
        """As `Network`."""
        if self.kind == "cnn":
            out = self.model(images, output_hidden_states=True)
            states = (
                getattr(out, "reshaped_hidden_states", None) or out.hidden_states
            )  # Swin gives its maps as tokens too
            return [states[len(states) - self.depth + block] for block in blocks]
        side = images.shape[-1] // self.patch
        tapped: dict[int, torch.Tensor] = {}

        def keep(block: int) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                tapped[block] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self.blocks[block].register_forward_hook(keep(block)) for block in blocks]
        try:
            self.model(images, **self.keywords)
        finally:
            for hook in hooks:
                hook.remove()
        tokens = [self.final_norm(tapped[block]) if final_norm else tapped[block] for block in blocks]
        return [t[:, -side * side :].transpose(1, 2).unflatten(2, (side, side)) for t in tokens]


def load_huggingface(spec: str, name: str) -> HuggingFaceNetwork:
    """Load a model by name.

    Args:
        spec: as it was asked for.
        name: on the hub, or a folder.

    Raises:
        InputError: transformers is not installed, or the model, or its image normalisation, is not to be had.
    """
    try:
        import transformers  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise InputError(f"{spec}: needs transformers; pip install 'fastmae[hf]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        config = getattr(config, "vision_config", config)
        kind = MASKS_ITS_INPUT.get(config.model_type)
        if kind is not None:
            same = {key: value for key, value in config.to_dict().items() if key != "model_type"}
            config = transformers.AutoConfig.for_model(kind, **same)
        loader: Any = transformers.MODEL_MAPPING[type(config)]
        pooling = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(loader).parameters else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, report = loader.from_pretrained(name, config=config, output_loading_info=True, **pooling)
    except NOT_FOUND as error:
        where = "" if Path(name).exists() else " from the hub or the local cache; without a network give hf/FOLDER"
        raise InputError(f"{spec}: can't be loaded{where} ({first_line(error)})") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{spec}: its weights file lacks {missing[0]} and {len(missing) - 1} more; not the weights of a {config.model_type}"
        )
    mean, std = _normalisation(spec, name)
    return HuggingFaceNetwork(spec, model, mean, std)


def _normalisation(spec: str, name: str) -> tuple[Sequence[float], Sequence[float]]:
    from transformers import image_processing_base  # noqa: PLC0415 - as above

    try:
        values, _ = image_processing_base.ImageProcessingMixin.get_image_processor_dict(name)
    except NOT_FOUND as error:
        raise InputError(
            f"{spec}: no preprocessor_config.json with its image mean and deviation; save its image processor beside it"
        ) from error
    mean, std = values.get("image_mean"), values.get("image_std")
    if not mean or not std or not all(math.isfinite(value) for value in (*mean, *std)):
        raise InputError(f"{spec}: its preprocessor_config.json names no image_mean and image_std")
    return mean, std
