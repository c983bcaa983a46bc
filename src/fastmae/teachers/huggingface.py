"""hf/NAME: the vision models of transformers, by hub name or from a folder that `save_pretrained` wrote."""

import inspect
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import nn

from fastmae.errors import InputError, first_line
from fastmae.outside.documents import checked, read_json
from fastmae.outside.networks import LARGEST_NETWORK
from fastmae.outside.tensors import check_file, check_finite, is_lack_of_memory

FINAL_NORMS = ("layernorm", "norm", "post_layernorm")
"""Names of the norm after the last block, in the families of transformers."""
UNMASKED_KINDS = {"vit_mae": "vit"}
"""Kinds of models that mask most patches in every forward pass -> the kind with the same encoder and no masking."""
MOST_BLOCKS = 1024
WEIGHT_FILES = ("*.safetensors", "*.bin")
"""Names of a folder's files with weights."""
Colours = Annotated[list[float], msgspec.Meta(min_length=3, max_length=3)]
"""One number for each of red, green and blue."""
CONFIG_FILE, PROCESSOR_FILE = "config.json", "preprocessor_config.json"
CODE_OF_ITS_OWN = (
    "{}: its config.json asks to run code that comes with the model (auto_map), which fastmae never does; take a model "
    "whose kind transformers knows"
)


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

    takes_features_as_they_are = False

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
    _check_folder(spec, Path(name))
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        _check_config(spec, config)
        unmasked = UNMASKED_KINDS.get(config.model_type)
        if unmasked is not None:
            arguments = {key: value for key, value in config.to_dict().items() if key != "model_type"}
            config = transformers.AutoConfig.for_model(unmasked, **arguments)
        model_class: Any = transformers.MODEL_MAPPING[type(config)]
        has_pooling = "add_pooling_layer" in inspect.signature(model_class).parameters
        pooling = {"add_pooling_layer": False} if has_pooling else {}
        with torch.device("meta"):
            _check_size(spec, model_class(config, **pooling), Path(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # In float32, whatever the files hold: --precision decides what a teacher computes in.
            model, report = model_class.from_pretrained(
                name,
                config=config,
                output_loading_info=True,
                dtype=torch.float32,
                trust_remote_code=False,
                **pooling,
            )
    except InputError:
        raise
    except Exception as error:  # what transformers raises depends on what is wrong in the description
        raise _named(error, spec, name) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{spec}: its weights file lacks {missing[0]} and {len(missing) - 1} more; not the weights of a "
            f"{config.model_type}"
        )
    check_finite(model.state_dict(), spec)
    mean, std = _normalisation(spec, name)
    try:
        return HuggingFaceNetwork(spec, model, mean, std)
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"{spec}: its config.json has sizes that can't be used ({first_line(error)})") from error


def _check_folder(spec: str, folder: Path) -> None:
    """Check the files of a local folder, before transformers reads them.

    Raises:
        InputError: no folder, a file that can't be what its name says, or a model that brings code or an adapter.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(
            f"{spec}: is a file; give the folder that save_pretrained wrote, or file/PATH for a checkpoint"
        )
    for name in (CONFIG_FILE, PROCESSOR_FILE):
        if (folder / name).exists():
            content = read_json(folder / name, dict[str, Any], way_out="save the model again with save_pretrained")
            if name == CONFIG_FILE and "auto_map" in content and "model_type" not in content:
                raise InputError(CODE_OF_ITS_OWN.format(spec))
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{spec}: holds an adapter; merge it into the model, and save that with save_pretrained")
    for pattern in WEIGHT_FILES:
        for file in sorted(folder.glob(pattern)):
            check_file(file)


def _check_config(spec: str, config: Any) -> None:
    """Check that a model's description asks for nothing but a network, and not for an endless one.

    Raises:
        InputError: for quantised weights, for attention from another place than torch, or for too many blocks.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{spec}: its weights are quantised; take the model as it was trained")
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        raise InputError(f"{spec}: its config.json asks for the attention '{attention}'; take that out of the file")
    blocks = (getattr(config, "num_hidden_layers", None), *(getattr(config, "depths", None) or ()))
    if any(number is not None and not 0 < number <= MOST_BLOCKS for number in blocks):
        raise InputError(f"{spec}: its config.json asks for {blocks} blocks; take another model")


def _check_size(spec: str, skeleton: nn.Module, folder: Path) -> None:
    """Check that a model, still without memory, has no more weights than its files can hold.

    Raises:
        InputError: it has.
    """
    size = sum(parameter.numel() for parameter in skeleton.parameters())
    files = [file for pattern in WEIGHT_FILES for file in folder.glob(pattern)] if folder.is_dir() else []
    held = sum(file.stat().st_size for file in files)
    if size > LARGEST_NETWORK or (files and size > held):
        held_by = f", and its files hold {held / 1e6:.4g} MB" if files else ""
        raise InputError(f"{spec}: its config.json describes a network of {size:.3g} weights{held_by}; take another")


def _named(error: Exception, spec: str, name: str) -> InputError:
    """What transformers says, with the model's name, the cause and the way out."""
    if "custom code" in str(error) or "trust_remote_code" in str(error):
        return InputError(CODE_OF_ITS_OWN.format(spec))
    if is_lack_of_memory(error):
        return InputError(f"{spec}: not enough memory to load it; free some, or take a machine with more")
    where = "" if Path(name).exists() else " from the hub or the local cache; without a network give hf/FOLDER"
    return InputError(f"{spec}: can't be loaded{where} ({first_line(error)})")


def _normalisation(spec: str, name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of each colour, from the model's image processor."""
    from transformers import image_processing_base  # noqa: PLC0415 - as above

    try:
        processor, _ = image_processing_base.ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"{spec}: no preprocessor_config.json with image_mean and image_std; save its image processor beside it"
        ) from error
    way_out = "save the model's image processor beside it"
    mean, std = (
        checked(processor.get(key), Colours, name=f"{spec}: {PROCESSOR_FILE}: {key}", way_out=way_out)
        for key in ("image_mean", "image_std")
    )
    if not all(math.isfinite(value) for value in mean) or not all(math.isfinite(value) and value > 0 for value in std):
        raise InputError(f"{spec}: its {PROCESSOR_FILE} has an image_mean or image_std that can't be used; {way_out}")
    return mean, std
