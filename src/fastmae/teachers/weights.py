"""Weight files -> state dicts, never running code from them (safetensors, or torch.load with weights_only)."""

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from fastmae.errors import InputError, first_line

NESTED_UNDER = ("state_dict", "model", "teacher", "module")
"""Keys under which training scripts put the weights proper."""


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
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: damaged, or not a weights file ({first_line(error)})") from error
    except Exception as error:  # pickle.UnpicklingError and its kin
        if "weights only" not in str(error).lower():
            raise InputError(f"{path}: not a weights file, or a damaged one") from error
        raise InputError(
            f"{path}: holds more than tensors, and reading it would run its code ({first_line(error)}); "
            "save its state dict alone, as safetensors"
        ) from error
    return _innermost(value, path)


def load_strictly(model: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a state dict that must fit the model name for name and shape for shape.

    Raises:
        InputError: names one tensor that is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]} besides"
        raise InputError(
            f"{path}: not the weights of this model ({what}; {len(missing)} missing, {len(unexpected)} unexpected in all)"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(
                f"{path}: {name} has shape {list(state[name].shape)}, the model's has {list(tensor.shape)}"
            )
    model.load_state_dict(state)


def _innermost(value: Any, path: Path) -> dict[str, torch.Tensor]:
    while isinstance(value, dict) and not any(isinstance(v, torch.Tensor) for v in value.values()):
        inner = next((value[key] for key in NESTED_UNDER if isinstance(value.get(key), dict)), None)
        if inner is None:
            raise InputError(f"{path}: no weights in it (looked under {', '.join(NESTED_UNDER)})")
        value = inner
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not a state dict")
    return {name: tensor for name, tensor in value.items() if isinstance(tensor, torch.Tensor)}
