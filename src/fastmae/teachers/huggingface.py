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
"""Names of the norm after the last block, in the families of transformers."""
UNMASKED_KINDS = {"vit_mae": "vit"}
"""Kinds of models that mask most patches in every forward pass -> the kind with the same encoder and no masking."""
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError)


class HuggingFaceNetwork(nn.Module):
    """A vision model of transformers, as a `Network`.

    A hook on a ViT's blocks reads their outputs, since the families return different things. The patch tokens are the
    last h x w tokens of a block's output: in all families the class and register tokens come first.

    Args:
        spec: the teacher's name, for messages.
        model: the vision part of the model, with its weights.
        mean: mean of each colour by which images are normalised.
        std: std of each colour.

    Raises:
        InputError: a model without blocks of tokens or stages of maps.
    """

    def __init__(self, spec: str, model: Any, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model: Any = model
        self.mean, self.std = tuple(mean), tuple(std)
        config = model.config
        num_layers = int(getattr(config, "num_hidden_layers", 0))
        module_lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        self.blocks: Any = next((blocks for blocks in module_lists if len(blocks) == num_layers), None)
        image_size = getattr(config, "image_size", None) or 224
        self.native_size = int(image_size if isinstance(image_size, int) else image_size[0])
        norms = [getattr(model, name) for name in FINAL_NORMS if isinstance(getattr(model, name, None), nn.Module)]
        self.final_norm: Any = norms[0] if norms else None
        if getattr(config, "depths", None):  # stages: ConvNeXt, ResNet, Swin
            self.kind, self.depth, self.patch_size, self.has_final_norm = "cnn", len(config.depths), 0, False
        elif self.blocks is not None and hasattr(config, "patch_size"):
            self.kind, self.depth, self.patch_size = "vit", num_layers, int(config.patch_size)
            self.has_final_norm = self.final_norm is not None
        else:
            raise InputError(
                f"{spec}: this kind of model ({config.model_type}) has no blocks that fastmae can tap; take a ViT or "
                "a CNN"
            )
        parameters = inspect.signature(model.forward).parameters
        self.keywords = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}

    def set_image_size(self, size: int) -> None:
        """Nothing to do: the forward pass resamples position embeddings."""

    def features(self, images: torch.Tensor, blocks: Sequence[int], final_norm: bool) -> list[torch.Tensor]:
        """See `Network`."""
        return self._maps(images, blocks) if self.kind == "cnn" else self._tokens(images, blocks, final_norm)

    def _maps(self, images: torch.Tensor, stages: Sequence[int]) -> list[torch.Tensor]:
        output = self.model(images, output_hidden_states=True)
        # Swin's hidden states are tokens; their maps come under another name.
        states = getattr(output, "reshaped_hidden_states", None) or output.hidden_states
        return [states[len(states) - self.depth + stage] for stage in stages]

    def _tokens(self, images: torch.Tensor, blocks: Sequence[int], final_norm: bool) -> list[torch.Tensor]:
        outputs: dict[int, torch.Tensor] = {}

        def keep_output_of(block: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                outputs[block] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self.blocks[block].register_forward_hook(keep_output_of(block)) for block in blocks]
        try:
            self.model(images, **self.keywords)
        finally:
            for hook in hooks:
                hook.remove()
        grid = images.shape[-1] // self.patch_size
        normed = [self.final_norm(outputs[block]) if final_norm else outputs[block] for block in blocks]
        return [tokens[:, -grid * grid :].transpose(1, 2).unflatten(2, (grid, grid)) for tokens in normed]


def load_huggingface(spec: str, name: str) -> HuggingFaceNetwork:
    """Load a vision model of transformers.

    Args:
        spec: the teacher's name, for messages.
        name: name on the hub, or a folder.

    Raises:
        InputError: transformers is not installed, or the model or its image normalisation is not available.
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
        unmasked = UNMASKED_KINDS.get(config.model_type)
        if unmasked is not None:
            arguments = {key: value for key, value in config.to_dict().items() if key != "model_type"}
            config = transformers.AutoConfig.for_model(unmasked, **arguments)
        model_class: Any = transformers.MODEL_MAPPING[type(config)]
        has_pooling = "add_pooling_layer" in inspect.signature(model_class).parameters
        pooling = {"add_pooling_layer": False} if has_pooling else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, report = model_class.from_pretrained(name, config=config, output_loading_info=True, **pooling)
    except LOAD_ERRORS as error:
        where = "" if Path(name).exists() else " from the hub or the local cache; without a network give hf/FOLDER"
        raise InputError(f"{spec}: can't be loaded{where} ({first_line(error)})") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{spec}: its weights file lacks {missing[0]} and {len(missing) - 1} more; not the weights of a "
            f"{config.model_type}"
        )
    mean, std = _normalisation(spec, name)
    return HuggingFaceNetwork(spec, model, mean, std)


def _normalisation(spec: str, name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of each colour, from the model's image processor."""
    from transformers import image_processing_base  # noqa: PLC0415 - as above

    try:
        processor, _ = image_processing_base.ImageProcessingMixin.get_image_processor_dict(name)
    except LOAD_ERRORS as error:
        raise InputError(
            f"{spec}: no preprocessor_config.json with image_mean and image_std; save its image processor beside it"
        ) from error
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not mean or not std or not all(math.isfinite(value) for value in (*mean, *std)):
        raise InputError(f"{spec}: its preprocessor_config.json names no image_mean and image_std")
    return mean, std
