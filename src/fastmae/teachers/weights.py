"""Weight files as training scripts leave them -> a network's state dict, under the network's own names."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from fastmae.errors import InputError
from fastmae.outside.tensors import Weights, read_tensors

NESTED_UNDER = ("state_dict", "model", "teacher", "module", "model_state_dict", "model_state", "network")
"""Keys under which training scripts put the weights."""
DEEPEST_PREFIX = 16
"""Most parts of a prefix that is looked for."""


def read_weights(path: Path) -> Weights:
    """Read a state dict from a .safetensors file or a PyTorch checkpoint.

    Raises:
        InputError: as `read_tensors`, or no weights in it.
    """
    content = read_tensors(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state dict; save the network's state dict")
    weights = _find_state_dict(content)
    if not weights:
        raise InputError(
            f"{path}: no weights in it (looked under {', '.join(NESTED_UNDER)}); save the network's state dict"
        )
    return weights


def weights_of(names: Collection[str], state: Weights, path: Path) -> Weights:
    """A network's weights out of a training checkpoint: without the prefix that wrappers gave their names, and without
    the bookkeeping beside them.

    Wrappers are DataParallel (`module.`), torch.compile (`_orig_mod.`), Lightning (`model.`), and whatever holds the
    network as a part of it. What does not lie below the prefix belongs to something else.

    Args:
        names: names that the network gives its tensors. Not all need to be there.
        state: from `read_weights`.
        path: of the file, for messages.

    Raises:
        InputError: several whole networks in it.
    """
    prefix = prefix_of(names, state, path)
    below = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in below.items() if name in names or not is_bookkeeping(tensor)}


def prefix_of(names: Collection[str], state: Mapping[str, Any], path: Path) -> str:
    """The prefix below which most of a network's names stand; none if they stand there without one.

    Arguments and errors: as `weights_of`.
    """
    wanted = set(names)
    counts: dict[str, int] = {}
    for name in state:
        parts = name.split(".")
        for start in range(min(len(parts), DEEPEST_PREFIX)):
            if ".".join(parts[start:]) in wanted:
                prefix = "".join(f"{part}." for part in parts[:start])
                counts[prefix] = counts.get(prefix, 0) + 1
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    if not best or "" in best:
        return ""
    if len(best) > 1:
        raise InputError(
            f"{path}: holds this network {len(best)} times, under {' and '.join(map(repr, sorted(best)[:2]))}; save "
            "one of them alone"
        )
    return best[0]


def is_bookkeeping(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a counter, a best accuracy or the state of a random generator, rather than a weight."""
    return tensor.dim() == 0 or not tensor.is_floating_point()


def _find_state_dict(content: dict[Any, Any]) -> Weights:
    """The tensors of the innermost of the dictionaries that hold weights."""
    for key in NESTED_UNDER:
        nested = content.get(key)
        if isinstance(nested, dict) and (weights := _find_state_dict(nested)):
            return weights
    tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    return tensors if any(not is_bookkeeping(tensor) for tensor in tensors.values()) else {}
