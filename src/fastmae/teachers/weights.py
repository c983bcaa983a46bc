"""Weight files -> state dicts. Code in a file is never run: safetensors, or torch.load with weights_only."""

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from fastmae.errors import InputError, first_line

NESTED_UNDER = ("state_dict", "model", "teacher", "module")
"""Keys under which training scripts put the weights."""


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a .safetensors file or a PyTorch checkpoint.

    Raises:
        InputError: no such file, a damaged one, or one that would have to run code to be read.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: damaged, or not a weights file ({first_line(error)})") from error
    except Exception as error:  # pickle.UnpicklingError, and whatever else a hostile pickle can raise
        if "weights only" not in str(error).lower():
            raise InputError(f"{path}: not a weights file, or a damaged one") from error
        raise InputError(
            f"{path}: holds more than tensors, and reading it would run its code ({first_line(error)}); "
            "save its state dict alone, as safetensors"
        ) from error
    return _find_state_dict(checkpoint, path)


def load_strictly(model: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a state dict that must match the model in all names and shapes.

    Raises:
        InputError: names a tensor that is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        example = f"lacks {missing[0]}" if missing else f"has {unexpected[0]} besides"
        raise InputError(
            f"{path}: not the weights of this model ({example}; {len(missing)} missing, {len(unexpected)} unexpected "
            "in all)"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(
                f"{path}: {name} has shape {list(state[name].shape)}, the model's has {list(tensor.shape)}"
            )
    model.load_state_dict(state)


def _find_state_dict(checkpoint: Any, path: Path) -> dict[str, torch.Tensor]:
    """Descend into nested dictionaries until one holds tensors."""
    while isinstance(checkpoint, dict) and not any(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        nested = next((checkpoint[key] for key in NESTED_UNDER if isinstance(checkpoint.get(key), dict)), None)
        if nested is None:
            raise InputError(f"{path}: no weights in it (looked under {', '.join(NESTED_UNDER)})")
        checkpoint = nested
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: holds a {type(checkpoint).__name__}, not a state dict")
    return {name: tensor for name, tensor in checkpoint.items() if isinstance(tensor, torch.Tensor)}
